"""Fault drills: what breaks a run from outside, and what is left of it. See docs/reliability.md."""

import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import children, toy
from transfer_jax.training import FitConfig, base_config, fit, load_variables, writers
from transfer_jax.training.checkpoint import CheckpointError, Checkpoints, find_damage
from transfer_jax.training.config import ConfigError
from transfer_jax.training.experiment import Experiment
from transfer_jax.training.writers import read_metrics

CONFIG = FitConfig(steps=8, log_every=2, checkpoint_every=2, keep=3)
ROOT = Path(__file__).parent.parent


def run(workdir, config=CONFIG):
    return fit(toy.classifier(), toy.train_data(), config, workdir=workdir)


def lines(workdir):
    return [
        {k: v for k, v in record.items() if not k.startswith("time/")}
        for record in read_metrics(workdir / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reference")
    return run(workdir), workdir


@pytest.fixture
def copy(reference, tmp_path):
    """A copy of the finished stage."""
    workdir = tmp_path / "copy"
    subprocess.run(["cp", "-r", reference[1], workdir], check=True)
    return workdir


@contextlib.contextmanager
def mounted(directory, options):
    """A tmpfs; only root may make one."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def largest(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# -- damaged checkpoints --------------------------------------------------------------------------


def test_every_file_has_its_checksum(reference):
    for step in ("4", "6", "8"):
        checkpoint = reference[1] / "checkpoints" / step
        files = json.loads((checkpoint / "checksums.json").read_text())["files"]
        there = {p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()}
        assert set(files) == there - {"checksums.json"}
        assert find_damage(checkpoint, ("variables", "training", "meta")) is None


@pytest.mark.parametrize(
    "harm, item",
    [(flip, "variables"), (flip, "training"), (truncate, "variables"), (Path.unlink, "training")],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_result_is_the_same(
    item, harm, copy, reference, caplog
):
    """One bit is enough: without checksums it would be read as another number."""
    harm(largest(copy / "checkpoints" / "8" / item))
    if item == "training":  # of a stage that has not finished
        (copy / "summary.json").unlink()
    with caplog.at_level(logging.WARNING):
        fitted = run(copy)
    assert "The checkpoint of step 8" in caplog.text and "8.damaged" in caplog.text
    assert (copy / "checkpoints" / "8.damaged").is_dir()
    assert toy.leaves_equal(fitted.params, reference[0].params)
    assert toy.leaves_equal(load_variables(copy).params, reference[0].params)
    assert lines(copy) == lines(reference[1])


def test_a_damaged_checkpoint_is_not_read_as_parameters(copy):
    flip(largest(copy / "checkpoints" / "8" / "variables"))
    with pytest.raises(CheckpointError, match=r"8 is damaged: variables/.* has changed since"):
        load_variables(copy)


def test_if_all_are_damaged_the_message_says_so(copy):
    for step in ("4", "6", "8"):
        flip(largest(copy / "checkpoints" / step / "variables"))
    with pytest.raises(CheckpointError, match=r"none of the checkpoints in .* can be read: step 8"):
        run(copy)


def test_a_checkpoint_without_checksums_is_read(copy, reference):
    """Its process was killed after the checkpoint was complete and before they were written."""
    (copy / "checkpoints" / "8" / "checksums.json").unlink()
    assert toy.leaves_equal(run(copy).params, reference[0].params)
    assert not (copy / "checkpoints" / "8.damaged").exists()


# -- disks ----------------------------------------------------------------------------------------


def test_a_full_disk_stops_with_a_message_and_the_run_resumes_when_there_is_room(
    reference, tmp_path
):
    with mounted(tmp_path / "disk", "size=4m") as disk:
        run(disk / "room")  # it fits
        size = sum(p.stat().st_size for p in (disk / "room").rglob("*") if p.is_file())
        subprocess.run(["rm", "-r", disk / "room"], check=True)
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        filler = disk / "filler"
        filler.write_bytes(b"\0" * (free - size // 2))
        with pytest.raises(
            (CheckpointError, OSError), match=r"(?i)no space left|written to"
        ) as stop:
            run(disk / "run")
        assert "No space left on device" in str(stop.value)
        filler.unlink()
        assert toy.leaves_equal(run(disk / "run").params, reference[0].params)
        assert lines(disk / "run") == lines(reference[1])


def test_a_read_only_work_directory_is_refused_before_anything_is_computed(tmp_path):
    with (
        mounted(tmp_path / "disk", "ro") as disk,
        pytest.raises(ConfigError, match=r"cannot be written \(Read-only file system"),
    ):
        Experiment(base_config("none"), disk / "run")


# -- clocks and writers ---------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [86_400, -86_400])
def test_a_clock_that_jumps_loses_nothing(seconds, reference, tmp_path, monkeypatch):
    """Orbax measures its timeouts by the wall clock: a jump during a save may end the run.

    Then the message says which checkpoint is kept, and the same command completes.
    """
    real, calls = time.time, []

    def jumping():
        calls.append(None)
        return real() + (seconds if len(calls) > 40 else 0)

    workdir = tmp_path / "run"
    monkeypatch.setattr(time, "time", jumping)
    try:
        fitted = run(workdir)
    except CheckpointError as error:
        assert re.search(r"could not be written .* resumes", str(error))
        fitted = run(workdir)  # the clock stays where it is now
    assert len(calls) > 40
    assert toy.leaves_equal(fitted.params, reference[0].params)
    assert lines(workdir) == lines(reference[1])


def test_writers_that_throw_are_switched_off_and_the_training_goes_on(
    reference, tmp_path, monkeypatch, caplog
):
    def throw(*_):
        raise RuntimeError("the writer is broken")

    for name in ("_JsonLines", "_Csv", "_TensorBoard"):
        monkeypatch.setattr(getattr(writers, name), "write", throw)
    with caplog.at_level(logging.WARNING):
        fitted = run(tmp_path / "run")
    text = "is switched off for the rest of this stage, training goes on: RuntimeError: the writer"
    assert caplog.text.count(text) == 3
    assert toy.leaves_equal(fitted.params, reference[0].params)


# -- kills ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_three_times_at_random_moments():
    """``python -m tests.kill_drill --count 20`` is the long form."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_drill", "--count=3", "--steps=6"],
        cwd=ROOT, capture_output=True, text=True, check=False, env=children.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills" in done.stdout


def test_a_failed_save_names_the_directory_and_what_is_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, {"variables": {"a": toy.np.ones(3)}}, {})
    checkpoints.wait()
    with (
        pytest.raises(
            CheckpointError, match=r"written to .*/c: it broke. The one of step 1 is kept"
        ),
        checkpoints._explained(),
    ):
        raise OSError("it broke")
    checkpoints.close()
