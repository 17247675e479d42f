"""The quickstart, killed and restarted as real processes: nothing changes, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import children
from transfer_jax import trees
from transfer_jax.training import load_variables

ROOT = Path(__file__).parent.parent
STAGES = ("pretrain", "fine-tuning", "lora", "ewc")
STEPS = 24
FIT = {"steps": STEPS, "log_every": 4, "eval_every": 12, "checkpoint_every": 6,
       "optimizer.warmup_steps": 2}  # fmt: skip
SETTINGS = [
    f"--config.{fit}.{key}={value}"
    for fit in ("pretrain", "transfer", "lora.fit") for key, value in FIT.items()
] + [
    "--config.model.depth=1", "--config.model.features=8", "--config.lora.rank=2",
    "--config.task_vector.shares=0.5,1.0",
]  # fmt: skip


def start(workdir):
    """Starts the quickstart, with a small network, in a work directory."""
    command = [sys.executable, "-m", "launch.local", "--config=configs/quickstart.py",
               f"--workdir={workdir}", *SETTINGS]  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, env=children.environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process, code=0):
    output, _ = process.communicate(timeout=400)
    assert process.returncode == code, output
    return output


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reference") / "run"
    output = finish(start(workdir))
    assert "Test accuracy" in output and "report.md" in output
    return workdir


def metrics(workdir, stage):
    text = (workdir / "stages" / stage / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in records]


def parameters(workdir, stage):
    return named(load_variables(workdir / "stages" / stage).params)


def named(tree):
    return dict(zip(trees.paths(tree), map(np.asarray, jax.tree.leaves(tree)), strict=True))


def without_clock(workdir):
    results = json.loads((workdir / "results.json").read_text())
    table = results["tables"]["Test accuracy"]
    column = table["columns"].index("seconds")
    for row in table["rows"]:
        row[column] = None
    return results


def assert_same(workdir, reference):
    for stage in STAGES:
        assert metrics(workdir, stage) == metrics(reference, stage)
        ours, theirs = parameters(workdir, stage), parameters(reference, stage)
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=f"{stage} {name}")
    assert without_clock(workdir) == without_clock(reference)


def at_step(process, workdir, stage, step):
    """Waits until a stage has written a line at or after ``step``."""
    file = workdir / "stages" / stage / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        lines = file.read_text().splitlines() if file.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"the run never reached step {step} of {stage}: {process.stdout.read()}")


def test_the_work_directory_is_complete(reference):
    assert {p.name for p in reference.iterdir()} == {
        "artifacts", "config.json", "report", "results.json", "stages",
    }  # fmt: skip
    assert {p.name for p in (reference / "stages").iterdir()} == set(STAGES)
    text = (reference / "report" / "report.md").read_text()
    assert "task vector" in text
    assert len(list((reference / "report").glob("*.png"))) >= len(STAGES)


@pytest.mark.slow
def test_killed_at_random_steps_and_restarted(reference, tmp_path):
    choose = random.Random(int.from_bytes(os.urandom(4), "big"))
    workdir = tmp_path / "run"
    stages = sorted(choose.sample(STAGES, 2), key=STAGES.index)
    for stage, sent in zip(stages, choose.sample([signal.SIGKILL, signal.SIGTERM], 2)):
        step = choose.randrange(4, STEPS - 4, 4)
        print(f"{sent.name} in {stage} after step {step}")
        process = start(workdir)
        at_step(process, workdir, stage, step)
        process.send_signal(sent)
        process.communicate()
        # SIGTERM saves first; between stages, where there is nothing to save, it ends at once.
        ended = (75, -sent) if sent == signal.SIGTERM else (-sent,)
        assert process.returncode in ended
        assert not (workdir / "results.json").exists()
    finish(start(workdir))
    assert_same(workdir, reference)
