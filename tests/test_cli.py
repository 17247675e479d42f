import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import local
from transfer_jax import cli, configuration
from transfer_jax.training.writers import read_metrics

_CONFIG = '''"""A line through points."""

from transfer_jax.training import base_config, fit_config

VARIANTS = {"short": "a moment", "long": "for as long as you like"}


def get_config(variant: str = "short"):
    config = base_config("tiny_recipe:recipe")
    steps = {"short": 8, "long": 10**6}[variant]
    config.first = fit_config(steps=steps, log_every=2, eval_every=4,
                              optimizer={"learning_rate": 0.1})
    config.batch_size = 8
    config.fault = ""
    return config
'''
_RECIPE = """
import os, signal, sys, time
import flax.linen as nn
import jax
import numpy as np
from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.sources import ArraySource
from transfer_jax.objectives.tasks import Regression


class Line(nn.Module):
    @nn.compact
    def __call__(self, inputs, *, lengths=None, train=False):
        return nn.Dense(1)(inputs)


def recipe(exp):
    cfg = exp.config
    if cfg.fault == "bug":
        return cfg.fault + 1
    if cfg.fault == "die" and jax.process_index() == 1:
        print("about to die", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.fault == "raise" and jax.process_index() == 1:
        raise FileNotFoundError("there is no file line.txt; prepare it first")
    x = np.linspace(-1, 1, 64, dtype=np.float32)[:, None]
    pause = float(os.environ.get("PAUSE", 0))
    slow = (lambda example: (time.sleep(pause / cfg.batch_size), example)[1],)
    source = ArraySource({"inputs": x, "labels": 3 * x + 1})
    train = Pipeline(source, cfg.batch_size, shuffle=True, repeat=True, transforms=slow)
    test = Pipeline(source, cfg.batch_size)
    fitted = exp.fit("first", Regression(Line()), train, cfg.first, evaluate={"test": test})
    exp.record("test_loss", fitted.metrics["test/loss"])
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    (tmp_path / "tiny.py").write_text(_CONFIG)
    (tmp_path / "tiny_recipe.py").write_text(_RECIPE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(configuration, "config_directory", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("JAX_PLATFORMS", "XLA_FLAGS"):  # restored if the command changes them
        monkeypatch.setenv(name, os.environ[name])
    return tmp_path


def _start(files, *arguments, module="transfer_jax.cli", pause=0.0):
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(files), root])}
    environment["PAUSE"] = str(pause)  # seconds per batch: time to stop a job in its middle
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)], cwd=files, env=environment,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def _wait_until(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


# -- parsing and messages -------------------------------------------------------------------------


def test_list(files, capsys):
    (files / "tiny_recipe.py").unlink()
    assert cli.main(["list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "tiny: A line through points.",
        "  tiny:short  a moment",
        "  tiny:long   for as long as you like",
    ]


@pytest.mark.parametrize("form", [["--config.first.steps=3"], ["--config.first.steps", "3"]])
def test_dry_run_shows_the_resolved_config_and_writes_nothing(files, capsys, form):
    before = sorted(files.rglob("*.*"))
    flags = ["--dry_run", "--processes=2", "--platform=cpu", "--devices=4"]
    assert cli.main(["run", "tiny", *form, *flags]) == 0
    out = capsys.readouterr().out
    config, end = json.JSONDecoder().raw_decode(out)
    assert config["first"]["steps"] == 3 and config["first"]["log_every"] == 2
    assert out[end:].strip().splitlines() == [
        "workdir: runs/tiny-short",
        "processes: 2",
        "devices of each process: 4 virtual CPU devices",
        "dry run: nothing was computed or written",
    ]
    assert [p for p in sorted(files.rglob("*.*")) if "__pycache__" not in p.parts] == before


def test_local_launcher_shares_it(files, capsys):
    assert local.main([f"--config={files}/tiny.py:long", "--workdir=w", "--dry-run"]) == 0
    assert "workdir: w\n" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        local.main(["--workdir=w"])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tny"], "there is no config 'tny'. The nearest: tiny"),
        (["tiny:shrt"], "no variant 'shrt'. The nearest: short"),
        (["tiny", "--config.first.step=3"], "no key 'first.step'. The nearest: first.steps"),
        (
            ["tiny", "--config.first.steps=many"],
            "first.steps=many is of the wrong type: an integer",
        ),
        (["tiny", "--devices=2", "--platform=gpu"], "it goes with --platform=cpu only"),
        (["tiny", "--processes=2", "--distributed"], "--distributed joins those of a cluster"),
    ],
)
def test_wrong_commands_are_one_paragraph_and_exit_code_2(files, capsys, arguments, message):
    assert cli.main(["run", *arguments, "--dry_run"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and message in captured.err
    assert "Traceback" not in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [[], ["run"], ["run", "tiny", "--procs=2"], ["run", "tiny", "--processes=0"],
     ["run", "tiny", "--config.seed"], ["run", "tiny", "--config.seed", "--dry_run"]],
)  # fmt: skip
def test_usage_errors(files, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: transfer-jax" in capsys.readouterr().err


def test_virtual_devices_are_set_before_jax_starts(files, capsys):
    os.environ["XLA_FLAGS"] = "--xla_a=1 --xla_force_host_platform_device_count=8"
    assert cli.main(["run", "tiny", "--devices=3", "--dry_run"]) == 0
    assert os.environ["XLA_FLAGS"] == "--xla_a=1 --xla_force_host_platform_device_count=3"
    assert os.environ["JAX_PLATFORMS"] == "cpu"


def test_report_of_nothing_is_an_error(files, capsys):
    assert cli.main(["report", str(files / "nowhere")]) == 1
    assert "is no work directory" in capsys.readouterr().err


# -- real runs ------------------------------------------------------------------------------------


def test_run_prints_results_and_resumes_and_refuses_another_config(files, capfd):
    assert cli.main(["run", "tiny"]) == 0
    out = capfd.readouterr().out
    loss = json.loads((files / "runs/tiny-short/results.json").read_text())["scalars"]["test_loss"]
    assert f"{loss:.4g}" in out and "runs/tiny-short/report/report.md" in out
    assert "test/loss" in (files / "runs/tiny-short/report/report.md").read_text()

    lines = read_metrics(files / "runs/tiny-short/stages/first/metrics.jsonl")
    assert cli.main(["run", "tiny"]) == 0  # finished: nothing is computed again
    assert read_metrics(files / "runs/tiny-short/stages/first/metrics.jsonl") == lines

    capfd.readouterr()
    assert cli.main(["run", "tiny", "--config.seed=5"]) == 1
    err = capfd.readouterr().err
    assert "belongs to another config: seed is 0 there and 5 now" in err
    assert "Traceback" not in err
    assert cli.main(["report", "runs/tiny-short"]) == 0
    assert "test_loss" in capfd.readouterr().out


def test_programming_errors_keep_their_traceback_and_user_errors_show_it_on_demand(files, capfd):
    assert cli.main(["run", "tiny", "--config.fault=bug", "--workdir=a"]) == 1
    err = capfd.readouterr().err
    assert "Traceback" in err and "TypeError" in err
    (files / "file").write_text("")
    unwritable = ["run", "tiny", "--workdir=file/b"]
    assert cli.main(unwritable) == 1
    err = capfd.readouterr().err
    assert "Traceback" not in err and "cannot be written" in err
    assert cli.main([*unwritable, "--debug"]) == 1
    assert "Traceback" in capfd.readouterr().err


def test_sigterm_saves_and_the_same_command_resumes(files):
    arguments = ["--config=tiny.py:long", "--workdir=w", "--config.first.steps=40"]
    first = _start(files, *arguments, module="launch.local", pause=0.2)
    metrics = files / "w/stages/first/metrics.jsonl"
    _wait_until(lambda: read_metrics(metrics), first)
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=120)
    assert first.returncode == 75, err
    assert "saved a checkpoint at step" in err and "run the same command again" in err
    assert not (files / "w/results.json").exists()
    lines = read_metrics(metrics)

    command = err.strip().splitlines()[-1].split()  # what it says to type
    assert command[:3] == ["python", "-m", "launch.local"]
    second = _start(files, *command[3:], module="launch.local")
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert "resuming at step" in err and "test_loss" in out
    resumed = read_metrics(metrics)
    assert resumed[: len(lines)] == lines
    steps = [r["step"] for r in resumed if "train/loss" in r]
    assert steps == list(range(2, 41, 2))


@pytest.mark.parametrize(
    "fault, code, shown",
    [
        ("die", 128 + 9, ["process 1 of 2 was killed by signal 9", "  about to die"]),
        ("raise", 1, ["process 1 of 2 ended with exit code 1", "  error: there is no file line"]),
    ],
)
def test_a_process_that_fails_ends_the_job_with_its_last_lines(files, fault, code, shown):
    job = _start(files, "run", "tiny.py", "--processes=2", "--devices=1",
                 f"--config.fault={fault}")  # fmt: skip
    began = time.monotonic()
    _, err = job.communicate(timeout=120)
    assert job.returncode == code, err
    for text in shown:
        assert text in err
    assert time.monotonic() - began < 100  # the other one, waiting for it, was ended


def test_processes_end_with_the_one_that_launched_them(files):
    job = _start(files, "run", "tiny.py:long", "--processes=2", "--devices=1", "--workdir=w",
                 "--config.first.log_every=1")  # fmt: skip
    metrics = files / "w/stages/first/metrics.jsonl"
    _wait_until(lambda: read_metrics(metrics), job)
    job.kill()
    job.wait()
    sizes = []

    def still():
        sizes.append(metrics.stat().st_size)
        time.sleep(0.5)
        return len(sizes) > 2 and sizes[-1] == sizes[-3]

    deadline = time.monotonic() + 60
    while not still():
        assert time.monotonic() < deadline


def test_a_recipe_may_lie_beside_its_config_file(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "my_config.py").write_text(
        "from transfer_jax.training import base_config\n"
        "def get_config(variant=''):\n    return base_config('my_recipe:recipe')\n"
    )
    (folder / "my_recipe.py").write_text("def recipe(exp):\n    exp.record('answer', 42)\n")
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-m", "transfer_jax.cli", "run", "mine/my_config.py", "--workdir=run"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["scalars"]["answer"] == 42
