"""A sweep on this machine, as real processes, and the comparison of what it leaves."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from transfer_jax import cli
from transfer_jax.training.compare import compare

ROOT = Path(__file__).parent.parent.parent
_CONFIG = """
from transfer_jax.training import base_config

def get_config(variant=""):
    config = base_config("parabola:recipe")
    config.x = 0.0
    return config

def recipe(exp):
    if exp.config.x == 3 and not (exp.workdir.parent / "mended").exists():
        raise ValueError("x = 3 is broken")
    exp.record("y", (exp.config.x - 1) ** 2 + exp.config.seed)
    exp.table("per class", ["class", "accuracy"], [["cat", 0.5], ["dog", exp.config.x]])
"""
_SWEEP = "def get_sweep():\n    return [{'x': float(x), 'seed': 0} for x in (0, 3)]\n"


def sweep(directory, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "launch.local", "--config=parabola.py", "--workdir=runs",
         "--sweep=sweep.py", "--parallel=2", "--platform=cpu", *arguments],
        cwd=directory, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip


def test_every_entry_runs_a_failed_one_is_shown_and_run_again(tmp_path, capsys):
    (tmp_path / "parabola.py").write_text(_CONFIG)
    (tmp_path / "sweep.py").write_text(_SWEEP)
    planned = sweep(tmp_path, "--dry_run")
    assert planned.returncode == 0 and planned.stdout.count("transfer_jax.cli run parabola.py") == 2
    assert not (tmp_path / "runs").exists()

    first = sweep(tmp_path)
    assert first.returncode == 1, first.stderr
    assert "seed=0,x=3.0" in first.stderr and "x = 3 is broken" in first.stderr
    assert "1 of 2 runs are done" in first.stderr
    (tmp_path / "runs" / "mended").touch()
    again = sweep(tmp_path)
    assert again.returncode == 0, again.stderr
    assert "2 of 2 runs are done. To compare them: transfer-jax compare runs" in again.stderr

    assert cli.main(["compare", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "per class/dog/accuracy" in shown and shown.count("x=") == 2
    with (tmp_path / "out" / "compare.csv").open() as f:
        table = list(csv.DictReader(f))
    assert [(row["x"], row["y"]) for row in table] == [("0.0", "1.0"), ("3.0", "4.0")]
    assert (tmp_path / "out" / "y.png").read_bytes().startswith(b"\x89PNG")
    assert "![y](y.png)" in (tmp_path / "out" / "compare.md").read_text()


def write_run(directory, config, scalars, finished=True):
    stage = directory / "stages" / "fit"
    stage.mkdir(parents=True)
    (directory / "config.json").write_text(
        json.dumps({"mesh": {"data": len(str(directory))}} | config)
    )
    (directory / "results.json").write_text(json.dumps({"scalars": scalars}))
    if finished:
        (stage / "summary.json").write_text(json.dumps({"metrics": {"test/loss": 0.5}, "steps": 3}))


def test_a_comparison_has_what_differs_and_leaves_out_what_has_not_finished(tmp_path):
    write_run(tmp_path / "a" / "run", {"seed": 0, "model": {"depth": 1}}, {"loss": 1.0})
    write_run(tmp_path / "b" / "run", {"seed": 0, "model": {"depth": 2}}, {"loss": 2.0, "more": 3})
    write_run(tmp_path / "c" / "run", {"seed": 1, "model": {"depth": 2}}, {}, finished=False)
    found = compare([tmp_path / "a", tmp_path / "b" / "run", tmp_path / "c"])
    assert found.columns == ["run", "model.depth", "loss", "fit/test/loss", "more"]
    assert found.rows == [["a/run", 1, 1.0, 0.5, None], ["b/run", 2, 2.0, 0.5, 3]]
    assert found.settings == ["model.depth"]
    assert found.notes == [f"left out {tmp_path / 'c' / 'run'}: its stage fit has not finished"]
    assert compare([tmp_path / "a"], "^loss$").columns == ["run", "loss"]
    with pytest.raises(FileNotFoundError, match="holds none"):
        compare([tmp_path])
    with pytest.raises(FileNotFoundError, match="none of these runs has finished"):
        compare([tmp_path / "c"])
