"""A comparison of finished runs, from the files of their work directories alone."""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transfer_jax.configuration import config_differences
from transfer_jax.training import report
from transfer_jax.training.files import write_text

# Where a run was computed and what it is called: never what it was about.
_IGNORED = ("mesh.", "sharding.", "logging.")


class Comparison(NamedTuple):
    """Runs beside each other.

    Attributes:
      columns: ``run``, then the settings in which the runs differ, then their results.
      rows: one per run; None where a run has no such setting or result.
      settings: the columns that are settings.
      notes: what was left out, and why.
    """

    columns: list[str]
    rows: list[list[Any]]
    settings: list[str]
    notes: list[str]


def compare(workdirs: Sequence[Path], pattern: str = "") -> Comparison:
    """Compares finished runs.

    Results are the scalars that the recipe recorded, the numbers of its tables as
    ``table/row/column``, and the last evaluation of every stage as ``stage/set/metric``.

    Args:
      workdirs: work directories, or directories of them.
      pattern: regular expression; only results in whose name it is found. Default: all.

    Raises:
      FileNotFoundError: there is no work directory among them, or none whose run has finished.
    """
    found: list[Path] = []
    notes: list[str] = []
    for path in workdirs:
        inner = [path] if (path / "config.json").exists() else _inside(path)
        if not inner:
            raise FileNotFoundError(
                f"{path} is no work directory and holds none: there is no config.json in it."
            )
        found += [p for p in inner if p not in found]

    runs: list[tuple[Path, Any, dict[str, Any]]] = []
    for path in found:
        try:
            config = json.loads((path / "config.json").read_text())
            reason = _unfinished(path)
            results = {} if reason else _results(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"it cannot be read ({error})"
        if reason:
            notes.append(f"left out {path}: {reason}")
        else:
            runs.append((path, config, results))
    if not runs:
        raise FileNotFoundError("none of these runs has finished: " + "; ".join(notes) + ".")

    settings = list(
        dict.fromkeys(
            key
            for _, config, _ in runs[1:]
            for key in config_differences(runs[0][1], config)
            if not key.startswith(_IGNORED)
        )
    )
    metrics = [
        name
        for name in dict.fromkeys(name for _, _, results in runs for name in results)
        if re.search(pattern, name)
    ]
    rows = [
        [
            name,
            *(_setting(config, key) for key in settings),
            *(results.get(metric) for metric in metrics),
        ]
        for name, (_, config, results) in zip(_names([run[0] for run in runs]), runs)
    ]
    return Comparison(["run", *settings, *metrics], rows, settings, notes)


def write_comparison(comparison: Comparison, directory: Path) -> Path:
    """Writes ``compare.csv``, and ``compare.md`` with a plot of every numeric result.

    A result is plotted over the setting in which the runs differ, if that is one number (a mean
    where several runs share it, as seeds do), and as one bar per run otherwise.

    Returns:
      The path of ``compare.md``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    columns, rows = comparison.columns, comparison.rows
    with (directory / "compare.csv").open("w", newline="") as f:
        csv.writer(f).writerows([columns, *(["" if v is None else v for v in r] for r in rows)])

    axis = [key for key in comparison.settings if key.rpartition(".")[2] != "seed"]
    lines = ["# Comparison", "", *report.markdown_table(columns, rows), ""]
    lines += [f"- {note}" for note in comparison.notes]
    for metric in columns[1 + len(comparison.settings) :]:
        at = columns.index(metric)
        if not report.is_numeric([row[at] for row in rows if row[at] is not None]):
            continue
        file = directory / f"{report.file_name(metric)}.png"
        values = [(row, row[at]) for row in rows if row[at] is not None]
        x = [row[columns.index(axis[0])] for row, _ in values] if len(axis) == 1 else []
        if len(set(x)) > 1 and report.is_numeric(x):
            points: dict[Any, list[float]] = {}
            for key, (_, value) in zip(x, values):
                points.setdefault(key, []).append(report.as_number(value))
            series = {metric: [sum(points[key]) / len(points[key]) for key in sorted(points)]}
            report.draw_curves(
                {"x": sorted(points), "series": series, "xlabel": axis[0], "ylabel": metric},
                metric, file,
            )  # fmt: skip
        else:
            labels = [row[0] for row, _ in values]
            bars = {"labels": labels, "series": {"": [v for _, v in values]}, "ylabel": metric}
            report.draw_bars(bars, metric, file)
        lines += ["", f"![{metric}]({file.name})"]
    path = directory / "compare.md"
    write_text(path, "\n".join(lines) + "\n")
    return path


def _inside(path: Path) -> list[Path]:
    return sorted(p.parent for p in path.glob("*/config.json"))


def _unfinished(path: Path) -> str | None:
    """Why a run counts as unfinished; None if every stage has its summary."""
    if not (path / "results.json").exists():
        return "it has no results.json, so it has not finished"
    for stage in sorted((path / "stages").glob("*")):
        if stage.is_dir() and not (stage / "summary.json").exists():
            return f"its stage {stage.name} has not finished"
    return None


def _results(path: Path) -> dict[str, Any]:
    stored = json.loads((path / "results.json").read_text())
    results: dict[str, Any] = dict(stored.get("scalars", {}))
    for name, table in stored.get("tables", {}).items():
        for label, *cells in table["rows"]:
            for column, cell in zip(table["columns"][1:], cells):
                if report.is_numeric([cell]):
                    results[f"{name}/{label}/{column}"] = cell
    for stage in sorted((path / "stages").glob("*/summary.json")):
        summary = json.loads(stage.read_text())
        for name, value in summary["metrics"].items():
            results[f"{stage.parent.name}/{name}"] = value
    return results


def _setting(config: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            return None
        config = config[part]
    return str(config) if isinstance(config, (dict, list)) else config


def _names(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names
