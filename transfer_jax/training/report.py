"""A report of a work directory, from its files alone: Markdown with tables and PNG plots.

``results.json`` holds what an experiment recorded::

    {"scalars": {name: number or string},
     "tables": {name: {"columns": [...], "rows": [[...], ...]}},
     "curves": {name: {"x": [...], "series": {label: [...]}, "xlabel": ..., "ylabel": ...}},
     "bars": {name: {"labels": [...], "series": {label: [...]}, "ylabel": ...}}}

Every part is optional. Numbers that are not finite are the strings "NaN", "Infinity", "-Infinity".
"""

import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transfer_jax.training.files import absolute, as_path, modified, write_text
from transfer_jax.training.writers import read_metrics

_COLUMNS = 3  # panels of a figure beside each other
_STYLE: dict[Any, Any] = {
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.labelsize": 10,
    "legend.fontsize": 9, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "#d9d9d9", "grid.linewidth": 0.7,
    "lines.linewidth": 1.8, "lines.markersize": 4.5, "legend.frameon": False,
    "figure.constrained_layout.h_pad": 0.09, "figure.constrained_layout.w_pad": 0.09,
    "savefig.dpi": 144, "savefig.facecolor": "white",
}  # fmt: skip


def write_report(workdir: str | Path) -> Path:
    """Writes ``report/report.md`` and its plots for a work directory, finished or not.

    Reads ``config.json``, ``results.json`` and ``stages/<name>/{metrics.jsonl,summary.json}``.
    What is missing or cannot be read is said in the report.

    Returns:
      The path of the report.

    Raises:
      FileNotFoundError: there is none of these files.
    """
    workdir = as_path(workdir)
    missing: list[str] = []
    config = _read_json(workdir / "config.json", "config.json", missing)
    results = _read_json(workdir / "results.json", "results.json", missing)
    stages = _stages(workdir)
    if config is None and results is None and not stages:
        raise FileNotFoundError(
            f"{workdir} is no work directory: it has no config.json, results.json or stages/."
        )
    directory = workdir / "report"
    directory.mkdir(exist_ok=True)

    lines = [f"# {absolute(workdir).name}", ""]
    if results is None:
        lines += ["**This run has not finished**, or has recorded nothing yet.", ""]
    body = _results_section(results or {}, directory, missing)
    body += _stages_section(stages, workdir, directory, missing)
    if missing:
        lines += ["## What is missing", "", *(f"- {text}" for text in missing), ""]
    lines += body
    if config is not None:
        lines += ["## Configuration", "", *markdown_table(["key", "value"], _flat(config)), ""]
    path = directory / "report.md"
    write_text(path, "\n".join(lines))
    return path


def format_table(columns: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Returns a table for a terminal; numbers are right-aligned with four significant digits."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        justify: Any = "right" if is_numeric([row[i] for row in rows]) else "left"
        table.add_column(Text(str(column)), justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    text = io.StringIO()
    Console(file=text, width=10_000, color_system=None).print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join(line for line in lines if line)


def print_results(results: Mapping[str, Any]) -> None:
    """Prints the scalars and tables of ``results.json`` on standard output."""
    scalars = results.get("scalars", {})
    if scalars:
        print(format_table(["result", "value"], list(scalars.items())), end="\n\n")
    for name, table in results.get("tables", {}).items():
        print(_words(name))
        print(format_table(table["columns"], table["rows"]), end="\n\n")


def _read_json(path: Path, name: str, missing: list[str]) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        missing.append(f"`{name}` does not exist.")
        return None
    except ValueError as error:
        missing.append(f"`{name}` cannot be read: {error}.")
        return None
    if not isinstance(value, dict):
        missing.append(f"`{name}` holds a {type(value).__name__}, not an object.")
        return None
    return value


def _stages(workdir: Path) -> list[Path]:
    """Stage directories in the order in which they last wrote metrics: the order they ran in."""
    written: dict[Path, float] = {}
    for name in ("metrics.jsonl", "summary.json"):
        for file in workdir.glob(f"stages/*/{name}"):
            written.setdefault(file.parent, modified(file))
    return sorted(written, key=lambda stage: (written[stage], stage))


def _results_section(results: dict[str, Any], directory: Path, missing: list[str]) -> list[str]:
    lines: list[str] = []

    def part(kind: str, name: str, make: Callable[[], list[str]]) -> None:
        try:
            lines.extend(make())
        except Exception as error:  # one bad record must not cost the whole report
            missing.append(
                f"`{kind}/{name}` in `results.json` cannot be shown: "
                f"{type(error).__name__}: {error}."
            )

    def table(name: str, value: Any) -> list[str]:
        return [f"### {_words(name)}", "", *markdown_table(value["columns"], value["rows"]), ""]

    def plot(kind: str, name: str, value: Any, draw: Callable[..., None]) -> list[str]:
        file = directory / f"{kind}-{file_name(name)}.png"
        draw(value, _words(name), file)
        return [f"### {_words(name)}", "", f"![{_words(name)}]({file.name})", ""]

    scalars = results.get("scalars", {})
    if scalars:
        part("scalars", "*", lambda: [*markdown_table(["result", "value"], scalars.items()), ""])
    for name, value in results.get("tables", {}).items():
        part("tables", name, lambda n=name, v=value: table(n, v))  # type: ignore[misc]
    for kind, draw in (("curves", draw_curves), ("bars", draw_bars)):
        for name, value in results.get(kind, {}).items():
            part(kind, name, lambda k=kind, n=name, v=value, d=draw: plot(k, n, v, d))  # type: ignore[misc]
    return ["## Results", "", *lines] if lines else []


def _stages_section(
    stages: list[Path], workdir: Path, directory: Path, missing: list[str]
) -> list[str]:
    if not stages:
        missing.append("There are no stages with metrics.")
        return []
    lines = ["## Stages", ""]
    for stage in stages:
        name = stage.relative_to(workdir / "stages").as_posix()
        lines += [f"### {name}", ""]
        if (stage / "summary.json").exists():
            summary = _read_json(stage / "summary.json", f"stages/{name}/summary.json", missing)
            if summary:
                lines += [*markdown_table(["summary", "value"], _flat(summary)), ""]
        else:
            lines += ["This stage has no summary: it has not finished.", ""]
        curves = _metric_curves(read_metrics(stage / "metrics.jsonl"))
        if not curves:
            missing.append(f"Stage `{name}` has no metrics.")
            continue
        rows = []
        for metric, (steps, values) in curves.items():
            finite = [v for v in values if math.isfinite(v)] or [math.nan]
            rows.append([metric, values[-1], steps[-1], min(finite), max(finite)])
        columns = ["metric", "last", "at step", "lowest", "highest"]
        lines += [*markdown_table(columns, rows), ""]
        file = directory / f"stage-{file_name(name)}.png"
        _draw_stage(curves, name, file)
        lines += [f"![metrics of stage {name}]({file.name})", ""]
    return lines


def _metric_curves(records: list[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        for name, value in record.items():
            number = as_number(value)
            if name != "step" and isinstance(number, float):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(number)
    return curves


def as_number(value: Any) -> Any:
    """A float for every number, the names of non-finite ones and None; anything else as it is."""
    if isinstance(value, bool):
        return value
    if value is None or value in ("NaN", "Infinity", "-Infinity"):
        return math.nan if value is None else float(value)
    return float(value) if isinstance(value, (int, float)) else value


def is_numeric(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(as_number(v), float) for v in values)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Rows (dotted key, value) of nested dictionaries."""
    rows = []
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            rows += _flat(inner, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", inner))
    return rows


def markdown_table(columns: Sequence[Any], rows: Any) -> list[str]:
    def line(values: Sequence[Any]) -> str:
        cells = (_cell(v).replace("|", "\\|").replace("\n", " ") for v in values)
        return f"| {' | '.join(cells)} |"

    rows = [list(row) for row in rows]
    right = [is_numeric([row[i] for row in rows]) for i in range(len(columns))]
    rule = "|".join("---:" if r else "---" for r in right)
    return [line(columns), f"|{rule}|", *(line(row) for row in rows)]


def _words(name: str) -> str:
    return name.replace("_", " ")


def file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def _figure(width: float, height: float) -> Any:
    # Figure, not pyplot: no display, no global list of open figures.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(draw: Callable[[], Any], file: Path) -> None:
    import matplotlib as mpl

    with mpl.rc_context(_STYLE), file.open("wb") as f:
        draw().savefig(f, format="png")


def _plot_line(axes: Any, x: Sequence[Any], y: Sequence[float], label: str) -> None:
    marker = "o" if len(x) <= 30 else None
    finite = [v if math.isfinite(v) else math.nan for v in y]  # a gap where it was not finite
    axes.plot(x, finite, marker=marker, label=label)
    if all(isinstance(v, int) for v in x):
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=True))


def _draw_stage(
    curves: Mapping[str, tuple[list[int], list[float]]], title: str, file: Path
) -> None:
    """One panel per metric; ``train/loss`` and ``eval/loss`` share one."""
    panels: dict[str, list[str]] = {}
    for name in curves:
        panels.setdefault(name.rpartition("/")[2], []).append(name)

    def draw() -> Any:
        columns = min(len(panels), _COLUMNS)
        rows = math.ceil(len(panels) / columns)
        figure = _figure(max(5.2, 4.2 * columns), 3.2 * rows + 0.3)
        figure.suptitle(title, fontsize=13, fontweight="bold")
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, (metric, names) in zip(grid, panels.items()):
            for name in names:
                _plot_line(axes, *curves[name], name.rpartition("/")[0] or metric)
            axes.set_title(_words(metric))
            axes.set_xlabel("step")
            if len(names) > 1 or "/" in names[0]:
                axes.legend()
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        return figure

    _save(draw, file)


def draw_curves(value: Mapping[str, Any], title: str, file: Path) -> None:
    def draw() -> Any:
        figure = _figure(6.4, 4.2)
        axes = figure.subplots()
        for label, y in value["series"].items():
            _plot_line(axes, value["x"], [as_number(v) for v in y], str(label))
        axes.set_title(title)
        axes.set_xlabel(value.get("xlabel") or "")
        axes.set_ylabel(value.get("ylabel") or "")
        if len(value["series"]) > 6:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        elif len(value["series"]) > 1 or next(iter(value["series"]), ""):
            axes.legend()
        return figure

    _save(draw, file)


def draw_bars(value: Mapping[str, Any], title: str, file: Path) -> None:
    labels = [_words(str(label)) for label in value["labels"]]
    series = value["series"]

    def draw() -> Any:
        figure = _figure(min(16.0, max(6.4, 1.2 + 0.35 * len(labels) * (len(series) + 1))), 4.2)
        axes = figure.subplots()
        width = 0.8 / max(len(series), 1)
        for i, (label, heights) in enumerate(series.items()):
            offset = (i - (len(series) - 1) / 2) * width
            numbers = [as_number(h) for h in heights]
            bars = axes.bar([x + offset for x in range(len(labels))], numbers, width, label=label)
            if len(labels) * len(series) <= 16:
                axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
        crowded = sum(map(len, labels)) > 60
        axes.set_xticks(
            range(len(labels)), labels,
            rotation=35 if crowded else 0, ha="right" if crowded else "center",
        )  # fmt: skip
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.1)
        axes.set_title(title)
        axes.set_ylabel(value.get("ylabel") or "")
        if len(series) > 1 or next(iter(series), ""):  # bars leave no room inside
            figure.legend(loc="outside lower center", ncols=min(len(series), 4))
        return figure

    _save(draw, file)
