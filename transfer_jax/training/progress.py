"""Progress of one stage: a bar on a terminal, plain lines everywhere else."""

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

# Shown first and under these names, from the last part of a metric's name.
_FIRST = {
    "loss": "loss",
    "learning_rate": "lr",
    "examples_per_second": "examples/s",
    "steps_per_second": "steps/s",
}


class Progress:
    """Reports how far a stage is.

    On a terminal: a bar with step, values and time left. Otherwise (log files, notebooks, job
    schedulers): at most one line per ``interval`` seconds, and one at the end.

    Args:
      total_steps: the step at which the stage is finished.
      label: name of the stage.
      stream: where to write.
      interval: seconds between plain lines; plays no part on a terminal.
      enabled: False reports nothing (every process but the first).
    """

    def __init__(
        self,
        total_steps: int,
        label: str,
        stream: TextIO | None = None,
        *,
        interval: float = 10.0,
        enabled: bool = True,
    ):
        self._total, self._label = total_steps, label
        self._stream = sys.stderr if stream is None else stream
        self._interval, self._enabled = interval, enabled
        self._step, self._values = 0, dict[str, float]()
        self._start: tuple[int, float] | None = None  # first step seen here and its time
        self._printed_at, self._printed_step = -float("inf"), -1
        self._bar: Any = None
        if enabled and getattr(self._stream, "isatty", lambda: False)():
            self._bar, self._task = _rich_bar(self._stream, label, total_steps)

    def update(self, step: int, values: Mapping[str, Any] | None = None) -> None:
        """Says that ``step`` is done; ``values`` (host scalars) stay shown until replaced."""
        if not self._enabled:
            return
        self._step = step
        if values:
            self._values.update({k: float(v) for k, v in values.items()})
        if self._bar is not None:
            text = {"values": _format_values(self._values, 4)} if values else {}
            self._bar.update(self._task, completed=step, **text)
            return
        now = time.monotonic()
        if self._start is None:
            self._start = (step, now)
        if now - self._printed_at >= self._interval:
            self._print_line(now)

    def message(self, text: str) -> None:
        """Writes a line of text, above the bar if there is one."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Writes the last state and ends the bar; may be called twice."""
        if not self._enabled:
            return
        self._enabled = False
        if self._bar is not None:
            self._bar.stop()
        elif self._start is not None and self._printed_step != self._step:
            self._print_line(time.monotonic())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _print_line(self, now: float) -> None:
        assert self._start is not None
        parts = [f"{self._label}: step {self._step}/{self._total}"]
        parts += [_format_values(self._values)] if self._values else []
        steps, seconds = self._step - self._start[0], now - self._start[1]
        if steps > 0 and self._step < self._total:
            parts.append(f"{_duration((self._total - self._step) * seconds / steps)} left")
        print("  ".join(parts), file=self._stream, flush=True)
        self._printed_at, self._printed_step = now, self._step


def _rich_bar(stream: TextIO, label: str, total: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[values]}", markup=False),
        TimeRemainingColumn(compact=True),
        console=Console(file=stream),
        refresh_per_second=2,  # drawing must not compete with the step for the interpreter
    )
    task = bar.add_task(label, total=total, values="")
    bar.start()
    return bar, task


def _format_values(values: Mapping[str, float], limit: int | None = None) -> str:
    def rank(name: str) -> int:
        last = name.rsplit("/", 1)[-1]
        return list(_FIRST).index(last) if last in _FIRST else len(_FIRST)

    shown = []
    for name in sorted(values, key=rank)[:limit]:
        prefix, _, last = name.rpartition("/")
        short = _FIRST.get(last, last)
        short = short if prefix in ("", "train", "time") else f"{prefix}/{short}"
        shown.append(f"{short} {values[name]:.4g}")
    return "  ".join(shown)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
