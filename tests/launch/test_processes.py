"""The quickstart's first stage in several real processes: 1, 4 and 2 give the same training.

One chain of runs in one work directory: four processes on an `fsdp` mesh of which one gets SIGTERM,
then two on a `data` mesh of which one is killed, then one process with eight devices to the end.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import children
from transfer_jax import configuration
from transfer_jax.training import Experiment, load_variables
from transfer_jax.training.writers import read_metrics

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.slow


def start(workdir, *arguments, pause=0.0):
    """Starts a job."""
    command = [sys.executable, "-m", "launch.local", "--config=tests/launch/first_stage.py",
               f"--workdir={workdir}", "--platform=cpu", *arguments]  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, env=children.environment(PAUSE=str(pause)), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def metrics(workdir):
    return read_metrics(workdir / "stages" / "pretrain" / "metrics.jsonl")


def at_step(job, workdir, step):
    """Waits until the job has written the line of a step."""
    deadline = time.monotonic() + 300
    while not any(line["step"] >= step for line in metrics(workdir)):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def process(job, index):
    """The process id of one of the job's processes."""
    for child in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"JAX_PROCESS_ID={index}".encode() in environment:
            return int(child)
    raise AssertionError(f"{job.pid} has no process {index}")


def assert_same_lines(workdir, reference):
    """As many lines as there are agree with those of one process, within rounding."""
    ours, theirs = metrics(workdir), metrics(reference)
    assert ours
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for name, value in a.items():
            if not name.startswith("time/"):
                np.testing.assert_allclose(value, b[name], rtol=1e-4, atol=1e-6, err_msg=name)


def run_here(workdir):
    """Runs the same in this process, on its eight devices."""
    config = configuration.load_config("tests/launch/first_stage.py")
    experiment = Experiment(config, workdir)
    experiment.run()


def test_any_number_of_processes_trains_the_same_through_signals_and_kills(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "launch"))
    reference, workdir = tmp_path / "one", tmp_path / "many"
    run_here(reference)

    # Four processes, everything split over `fsdp`; SIGTERM to the third alone.
    four = ("--processes=4", "--config.mesh.data=1", "--config.mesh.fsdp=4")
    job = start(workdir, *four, pause=0.3)
    at_step(job, workdir, 3)
    os.kill(process(job, 2), signal.SIGTERM)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 75, output
    saved = re.findall(
        r"\[0\] stage 'pretrain' was asked to stop and saved a .* step (\d+)", output
    )
    assert len(saved) == 1 and "--processes=4" in output.split("run the same command again")[1]
    (stopped,) = map(int, saved)
    checkpoints = workdir / "stages" / "pretrain" / "checkpoints"
    assert max(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit()) == stopped
    assert max(line["step"] for line in metrics(workdir)) == stopped
    layout = (workdir / "stages" / "pretrain" / "layout.txt").read_text()
    assert re.search(r"params/blocks_0/layer/out/kernel .*'fsdp'", layout)
    assert_same_lines(workdir, reference)

    # Two processes go on, data parallel; the second is killed.
    job = start(workdir, "--processes=2", pause=0.3)
    at_step(job, workdir, stopped + 3)
    began = time.monotonic()
    os.kill(process(job, 1), signal.SIGKILL)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 128 + signal.SIGKILL, output
    assert "process 1 of 2 was killed by signal 9, the others were ended" in output
    assert f"resuming at step {stopped}" in output
    assert time.monotonic() - began < 60
    assert not (workdir / "stages" / "pretrain" / "summary.json").exists()

    # One process completes it.
    run_here(workdir)
    assert len(metrics(workdir)) == len(metrics(reference))
    assert_same_lines(workdir, reference)
    ours, theirs = (load_variables(w / "stages" / "pretrain").params for w in (workdir, reference))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-3, atol=1e-5)
    results = [
        json.loads((w / "results.json").read_text())["scalars"] for w in (workdir, reference)
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-4)
