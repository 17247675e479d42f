"""Metric writers: JSON lines and CSV always, TensorBoard and Weights & Biases if wanted.

Process 0 holds a ``MetricWriter``; every other process holds a ``NullWriter``. A writer that fails
in the middle of a run (a full disk, no network) is switched off after one warning: losing a curve
is no reason to lose the training.
"""

import contextlib
import csv
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from transfer_jax.training.files import as_path, is_remote, write_text

logger = logging.getLogger(__name__)

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class _Sink(Protocol):
    def write(self, step: int, values: dict[str, float]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class NullWriter:
    """A writer that writes nothing: what every process but the first uses."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class MetricWriter:
    """Writes scalar metrics of one stage below one directory.

    ``metrics.jsonl`` has one object per line, ``{"step": 10, "train/loss": 0.5}``; floats are
    written so that reading them gives the same bits, and NaN and infinities as the strings "NaN",
    "Infinity" and "-Infinity", so that every line is valid JSON. ``metrics.csv`` has the same
    numbers as a table. TensorBoard events go to ``tensorboard/``.

    Object stores cannot append to a file: there everything is written to a temporary local
    directory, which is copied when flushed, and by itself every 30 seconds.

    Args:
      directory: made if it does not exist.
      wandb: keyword arguments of ``wandb.init`` (project, name, mode, ...), or None for no W&B.
      tensorboard: whether to write TensorBoard events.
      resume_step: None for a run from the start: what an earlier run wrote here is removed.
        A step ``s`` for a run that goes on from the checkpoint at ``s``: what was written for
        later steps, and a line that was cut short by the end of the process, are removed.

    Raises:
      OSError: the directory or ``metrics.jsonl`` cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        wandb: Mapping[str, Any] | None = None,
        tensorboard: bool = True,
        resume_step: int | None = None,
    ):
        directory = as_path(directory)
        self._mirror: _Mirror | None = None
        if is_remote(directory):
            self._mirror = _Mirror(directory)
            directory = self._mirror.local
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        kept = [
            r for r in read_metrics(path) if resume_step is not None and r["step"] <= resume_step
        ]
        write_text(path, "".join(map(_json_line, kept)))

        self._sinks: dict[str, _Sink] = {"metrics.jsonl": _JsonLines(path)}
        self._open("metrics.csv", lambda: _Csv(directory / "metrics.csv", path))
        if tensorboard:
            purge = 0 if resume_step is None else resume_step + 1
            self._open("TensorBoard", lambda: _TensorBoard(directory / "tensorboard", purge))
        if wandb is not None:
            self._open("Weights & Biases", lambda: _Wandb(directory, dict(wandb), resume_step))

    def _open(self, name: str, make: Any) -> None:
        try:
            self._sinks[name] = make()
        except Exception as error:
            _warn_off(name, error)

    def _each(self, call: Any) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                call(sink)
            except Exception as error:
                del self._sinks[name]
                _warn_off(name, error)
                with contextlib.suppress(Exception):
                    sink.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes scalars (Python, NumPy or JAX) of one step, and flushes the text files."""
        record = {name: float(value) for name, value in values.items()}
        self._each(lambda sink: sink.write(int(step), record))
        if self._mirror is not None and self._mirror.due():
            self.flush()

    def flush(self) -> None:
        self._each(lambda sink: sink.flush())
        if self._mirror is not None:
            self._mirror.copy()

    def close(self) -> None:
        """Flushes and closes everything; may be called twice."""
        self._each(lambda sink: sink.close())
        self._sinks.clear()
        if self._mirror is not None:
            self._mirror.close()
            self._mirror = None

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a ``metrics.jsonl``: a list of ``{"step": int, name: float, ...}`` in written order.

    Lines that are not whole (the process was killed while writing) are left out, and a file that
    does not exist has no lines.
    """
    records = []
    try:
        text = as_path(path).read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append({k: _NON_FINITE.get(v, v) for k, v in record.items()})
    return records


def _warn_off(name: str, error: Exception) -> None:
    logger.warning(
        "%s is switched off for the rest of this stage, training goes on: %s: %s",
        name, type(error).__name__, error,
    )  # fmt: skip


def _json_line(record: Mapping[str, Any]) -> str:
    def plain(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return value

    return json.dumps({k: plain(v) for k, v in record.items()}, allow_nan=False) + "\n"


class _Mirror:
    """A local directory of which an object store has a copy."""

    def __init__(self, remote: Path, seconds: float = 30.0):
        self.local = Path(tempfile.mkdtemp(prefix="transfer_jax-metrics-"))
        self._remote, self._seconds, self._copied = remote, seconds, time.monotonic()
        for name in ("metrics.jsonl", "wandb_id.txt"):  # what a resumed stage goes on with
            if (remote / name).exists():
                (self.local / name).write_bytes((remote / name).read_bytes())

    def due(self) -> bool:
        return time.monotonic() - self._copied > self._seconds

    def copy(self) -> None:
        try:
            for path in (*self.local.glob("*"), *self.local.glob("tensorboard/*")):
                if path.is_file() and not path.name.startswith("."):
                    target = self._remote / path.relative_to(self.local).as_posix()
                    target.write_bytes(path.read_bytes())
        except Exception as error:  # the next copy may succeed
            logger.warning("metrics could not be copied to %s: %s", self._remote, error)
        self._copied = time.monotonic()

    def close(self) -> None:
        self.copy()
        shutil.rmtree(self.local, ignore_errors=True)


class _JsonLines:
    def __init__(self, path: Path):
        self._file: TextIO = open(path, "a")  # noqa: SIM115

    def write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(_json_line({"step": step, **values}))
        self._file.flush()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _Csv:
    """The JSON lines as a table. New columns, and resuming, rewrite it from ``metrics.jsonl``."""

    def __init__(self, path: Path, source: Path):
        self._path, self._source = path, source
        self._columns: list[str] = ["step"]
        self._rewrite()

    def _rewrite(self) -> None:
        records = read_metrics(self._source)
        self._columns = list(dict.fromkeys([*self._columns, *(k for r in records for k in r)]))
        rows = ([record.get(c, "") for c in self._columns] for record in records)
        write_text(self._path, "".join(_csv_lines([self._columns, *rows])))
        self._file: TextIO = open(self._path, "a", newline="")  # noqa: SIM115

    def write(self, step: int, values: dict[str, float]) -> None:
        if values.keys() <= set(self._columns):
            row = [step, *(values.get(c, "") for c in self._columns[1:])]
            self._file.writelines(_csv_lines([row]))
            self._file.flush()
        else:  # the JSON line of this step is written already
            self._file.close()
            self._rewrite()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _csv_lines(rows: Iterable[list[Any]]) -> list[str]:
    lines: list[str] = []

    class _Lines:
        write = staticmethod(lines.append)

    csv.writer(_Lines(), lineterminator="\n").writerows(rows)
    return lines


class _TensorBoard:
    """Event files, written in the caller's thread.

    tensorboardX's own ``SummaryWriter`` writes in a thread behind a bounded queue: when that thread
    dies of a full disk, the queue fills and the training waits for ever.
    """

    def __init__(self, directory: Path, purge_step: int, flush_seconds: float = 30.0):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        directory.mkdir(parents=True, exist_ok=True)
        # The suffix keeps two runs apart that start within the same second.
        self._writer = EventsWriter(str(directory / "events"), f".{time.time_ns()}")
        self._writer.write_event(
            Event(step=purge_step, session_log=SessionLog(status=SessionLog.START))
        )
        self._flush_seconds, self._flushed = flush_seconds, time.monotonic()

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            summary = self._scalar(name, value)
            self._writer.write_event(self._event(step=step, wall_time=time.time(), summary=summary))
        if time.monotonic() - self._flushed > self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, directory: Path, options: dict[str, Any], resume_step: int | None):
        import wandb

        # A resumed stage continues its own W&B run, whose id is kept beside the metrics.
        id_file = directory / "wandb_id.txt"
        if "id" not in options and resume_step is not None and id_file.exists():
            options["id"] = id_file.read_text().strip()
        self._run = wandb.init(**{"dir": str(directory), "resume": "allow", **options})
        id_file.write_text(self._run.id)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()
