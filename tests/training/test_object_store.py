"""Work directories that are not local: addresses, metrics, a whole run on a stand-in for GCS."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import children
from transfer_jax.configuration import ConfigError
from transfer_jax.training import files
from transfer_jax.training.files import absolute, as_path, is_remote
from transfer_jax.training.writers import MetricWriter, read_metrics

ROOT = Path(__file__).parent.parent.parent


def missing(*modules):
    return [m for m in modules if importlib.util.find_spec(m) is None]


def test_an_address_is_local_or_of_a_store_that_is_known(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert as_path("runs/a") == Path("runs/a") and not is_remote(as_path("runs/a"))
    assert absolute("a") == tmp_path / "a"
    with pytest.raises(ConfigError, match="use a local path, gs://"):
        as_path("http://host/a")
    monkeypatch.setitem(files._REMOTE, "gs://", "no_such_package")
    with pytest.raises(ConfigError, match="needs the package no_such_package: pip install"):
        as_path("gs://bucket/a")
    monkeypatch.setitem(files._REMOTE, "gs://", "etils")  # there, without a file system
    path = absolute("gs://bucket/a") / "b"
    assert is_remote(path) and os.fspath(path) == "gs://bucket/a/b"


def test_metrics_are_copied_when_flushed_and_a_resumed_stage_goes_on(tmp_path, monkeypatch):
    """A local directory in the place of a store."""
    monkeypatch.setattr("transfer_jax.training.writers.is_remote", lambda path: True)
    remote = tmp_path / "store"
    (remote / "tensorboard").mkdir(parents=True)
    writer = MetricWriter(remote)
    writer.write(1, {"loss": 2.0})
    assert read_metrics(remote / "metrics.jsonl") == []
    writer.flush()
    assert read_metrics(remote / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    writer.write(2, {"loss": 1.0})
    writer.close()
    with MetricWriter(remote, resume_step=1) as writer:
        writer.write(2, {"loss": 1.5})
    assert [r["loss"] for r in read_metrics(remote / "metrics.jsonl")] == [2.0, 1.5]
    assert len(list((remote / "tensorboard").iterdir())) == 2
    assert (remote / "metrics.csv").exists()


_RUN = """
import sys
import jax
from gcp_storage_emulator.server import create_server
from tests import toy
from transfer_jax.training import Experiment, base_config, fit, fit_config, load_variables
from transfer_jax.training.config import FitConfig, from_dict
from transfer_jax.training.files import as_path
from transfer_jax.training.writers import read_metrics

def recipe(exp):
    data = {"validation": toy.eval_data()}
    source = exp.fit("source", toy.classifier(), toy.train_data(), exp.config.fit, evaluate=data)
    exp.artifact("anchor", lambda: source.params)
    exp.artifact("number", lambda: 3)
    exp.record("accuracy", source.metrics["validation/accuracy"])

if __name__ == "__main__":
    server = create_server("localhost", int(sys.argv[1]), in_memory=True, default_bucket="bucket")
    server.start()
    config = base_config("__main__:recipe")
    config.fit = fit_config(steps=8, log_every=2, eval_every=4, checkpoint_every=2)
    workdir = as_path("gs://bucket/run")
    first = Experiment(config, workdir)
    first.run()
    assert "accuracy" in first.report().read_text()
    stage = workdir / "stages" / "source"
    lines = [r["step"] for r in read_metrics(stage / "metrics.jsonl")]
    assert lines == [2, 4, 4, 6, 8, 8]

    again = Experiment(config, workdir)  # finished: read
    again.run()
    assert again.results == first.results
    (stage / "summary.json").unlink()  # not finished: resumed
    (stage / "checkpoints" / "8").rmtree()
    again.run()
    assert again.results == first.results
    assert [r["step"] for r in read_metrics(stage / "metrics.jsonl")] == lines

    local = fit(toy.classifier(), toy.train_data(), from_dict(FitConfig, config.fit),
                evaluate={"validation": toy.eval_data()}, seed=first.seed("source"))
    assert toy.leaves_equal(load_variables(stage).params, local.params)
    print("all is well", flush=True)
    server.stop()
"""


@pytest.mark.slow
@pytest.mark.skipif(
    bool(missing("gcsfs", "gcp_storage_emulator")),
    reason="needs gcsfs and gcp-storage-emulator",
)
def test_a_run_in_a_bucket_is_reported_read_and_resumed(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "run.py").write_text(_RUN)
    address = f"http://localhost:{port}"
    environment = children.environment(
        PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path]),
        STORAGE_EMULATOR_HOST=address, TENSORSTORE_GCS_HTTP_URL=address,
        GOOGLE_AUTH_TOKEN_FOR_TESTING="none", EPATH_USE_TF="false",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(tmp_path / "run.py"), str(port)], env=environment,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "all is well" in done.stdout, done.stderr[-3000:]
