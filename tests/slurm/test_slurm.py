"""A job of two nodes on a real Slurm: preempted, requeued, and done with the uninterrupted result.

It starts a cluster on this machine (``cluster.sh``), which takes root, slurm-wlm and munge
(Debian packages) and about a minute:

    TRANSFER_JAX_SLURM=1 python -m pytest tests/slurm

Only on demand: where daemons may not start jobs (some sandboxes), the cluster comes up and its
queue never moves.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from transfer_jax.training.writers import read_metrics

ROOT = Path(__file__).parent.parent.parent
CLUSTER = Path(__file__).parent / "cluster.sh"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("TRANSFER_JAX_SLURM"), reason="set TRANSFER_JAX_SLURM=1 to run it"
    ),
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("sbatch"),
        reason="needs root and `apt-get install slurm-wlm munge`",
    ),
]


@pytest.fixture
def slurm(tmp_path):
    """Runs a command of Slurm and returns what it prints."""
    directory = tmp_path / "cluster"
    environment = {
        **os.environ, "SLURM_CONF": str(directory / "slurm.conf"), "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }  # fmt: skip

    def run(*command, **extra):
        done = subprocess.run(
            command, cwd=ROOT, env={**environment, **extra}, capture_output=True, text=True,
            check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    started = subprocess.run([CLUSTER, "start", directory], capture_output=True, text=True)
    assert started.returncode == 0, started.stdout + started.stderr
    try:
        yield run
    finally:
        subprocess.run([CLUSTER, "stop", directory], check=True)


def wait_until(condition, what, seconds=400):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)


def test_a_preempted_job_is_requeued_and_finishes_with_the_uninterrupted_result(slurm, tmp_path):
    config = "--config=tests/launch/first_stage.py"
    workdir, reference = tmp_path / "run", tmp_path / "reference"

    def metrics(directory):
        return read_metrics(directory / "stages" / "pretrain" / "metrics.jsonl")

    def output():
        return "".join(p.read_text() for p in (workdir / "slurm").glob("*.txt"))

    def state():
        shown = slurm("scontrol", "show", "job", job)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    launcher = (sys.executable, "-m", "launch.slurm", config, f"--workdir={workdir}", "--nodes=2")
    job = slurm(*launcher, "--time=1:00:00", PAUSE="0.3").split()[-1]
    wait_until(lambda: metrics(workdir), output)
    slurm("sbatch", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
    wait_until(lambda: state()["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), output)

    assert state()["JobState"] == "COMPLETED" and state()["Restarts"] == "1", output()
    text = output()
    assert "process 1 of 2: waits up to 300 s for the coordinator at node1:" in text
    assert "was asked to stop and saved a checkpoint at step" in text
    assert "stopped with a checkpoint saved; into the queue again" in text
    assert "resuming at step" in text

    slurm(sys.executable, "-m", "launch.local", config, f"--workdir={reference}", "--platform=cpu")
    ours, theirs = metrics(workdir), metrics(reference)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        for name in a:
            if not name.startswith("time/"):
                np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-6)
