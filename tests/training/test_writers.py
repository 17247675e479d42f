import csv
import json
import logging
import math
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.training.writers import MetricWriter, NullWriter, read_metrics


def _events(directory):
    """All (step, tag, value) and START steps of every event file, parsed from the record format."""
    from tensorboardX.proto.event_pb2 import Event

    scalars, starts = [], []
    for path in sorted(directory.glob("events*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[12 + length + 4 :]
            scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            if event.HasField("session_log"):
                starts.append(event.step)
    return scalars, starts


def _table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_floats_survive_bit_for_bit(tmp_path):
    values = np.random.default_rng(0).normal(size=50) * 10.0 ** np.arange(-25, 25)
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        for step, value in enumerate(values):
            writer.write(step, {"train/loss": value})
    read = [r["train/loss"] for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert [struct.pack("d", v) for v in read] == [struct.pack("d", v) for v in values]
    table = [float(r["train/loss"]) for r in _table(tmp_path / "metrics.csv")]
    assert table == list(values)


def test_non_finite_values_stay_valid_json(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"a": math.nan, "b": jnp.inf, "c": -np.inf, "d": jnp.float32(0.5)})
    line = (tmp_path / "metrics.jsonl").read_text()

    def refuse(token):
        raise AssertionError(f"{token} is no JSON")

    assert json.loads(line, parse_constant=refuse) == {
        "step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 0.5,
    }  # fmt: skip
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record["a"])
    assert (record["b"], record["c"]) == (math.inf, -math.inf)


def test_lines_are_on_disk_before_the_writer_is_closed(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(3, {"x": 1.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 3, "x": 1.0}]
    assert _table(tmp_path / "metrics.csv") == [{"step": "3", "x": "1.0"}]
    writer.close()
    writer.close()


def test_csv_columns_grow(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": 4.0})
        writer.write(2, {"loss": 3.0, "eval/accuracy": 0.5})
        writer.write(3, {"loss": 2.0})
    assert _table(tmp_path / "metrics.csv") == [
        {"step": "1", "loss": "4.0", "eval/accuracy": ""},
        {"step": "2", "loss": "3.0", "eval/accuracy": "0.5"},
        {"step": "3", "loss": "2.0", "eval/accuracy": ""},
    ]


def test_resume_equals_a_run_that_was_never_stopped(tmp_path):
    def write(writer, steps):
        for step in steps:
            writer.write(step, {"loss": 1 / step})
            if step % 2 == 0:
                writer.write(step, {"eval/loss": 2 / step})

    with MetricWriter(tmp_path / "whole") as writer:
        write(writer, range(1, 9))
    killed = MetricWriter(tmp_path / "killed")
    write(killed, range(1, 7))
    killed.flush()
    for name, torn in [("metrics.jsonl", '{"step": 7, "lo'), ("metrics.csv", "7,0.14")]:
        with open(tmp_path / "killed" / name, "a") as file:
            file.write(torn)
    with MetricWriter(tmp_path / "killed", resume_step=4) as writer:
        write(writer, range(5, 9))
    for name in ("metrics.jsonl", "metrics.csv"):
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "killed" / name).read_bytes() == whole
    scalars, starts = _events(tmp_path / "killed" / "tensorboard")
    assert starts == [0, 5]  # what the first run wrote from step 5 on is void
    assert scalars.count((8, "loss", 0.125)) == 1


def test_a_run_from_the_start_forgets_an_earlier_one(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"old": 1.0})
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"new": 2.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "new": 2.0}]
    assert _table(tmp_path / "metrics.csv") == [{"step": "1", "new": "2.0"}]
    assert _events(tmp_path / "tensorboard")[1] == [0, 0]


def test_a_full_disk_in_tensorboard_warns_once_and_goes_on(tmp_path, caplog):
    from tensorboardX.event_file_writer import EventsWriter

    writer = MetricWriter(tmp_path)

    def full(self, event):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(EventsWriter, "write_event", full)
        for step in range(30):
            writer.write(step, {"loss": 1.0})
    writer.close()
    assert [r.getMessage() for r in caplog.records] == [
        "TensorBoard is switched off for the rest of this stage, training goes on: "
        "OSError: [Errno 28] No space left on device"
    ]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 30


def test_missing_or_failing_wandb_is_not_fatal(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING), MetricWriter(tmp_path, wandb={}) as writer:
        writer.write(1, {"loss": 1.0})
    assert ["Weights & Biases" in r.getMessage() for r in caplog.records] == [True]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_wandb_gets_the_values_and_resumes_its_own_run(tmp_path, monkeypatch):
    calls = []

    class Run:
        id = "abc"
        log = staticmethod(lambda values, step: calls.append((step, values)))
        finish = staticmethod(lambda: calls.append("finish"))

    def init(**options):
        calls.append(options)
        return Run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with MetricWriter(tmp_path, wandb={"project": "p"}) as writer:
        writer.write(1, {"loss": 2.0})
    MetricWriter(tmp_path, wandb={"project": "p"}, resume_step=1).close()
    options = {"project": "p", "dir": str(tmp_path), "resume": "allow"}
    assert calls == [options, (1, {"loss": 2.0}), "finish", {**options, "id": "abc"}, "finish"]


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        MetricWriter(tmp_path / "file" / "stage")


def test_null_writer_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = NullWriter()
    writer.write(1, {"loss": 1.0})
    writer.flush()
    writer.close()
    assert list(tmp_path.iterdir()) == []
