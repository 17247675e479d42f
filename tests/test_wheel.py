"""An installed wheel works without the checkout."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import children

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def run(*command, cwd, **environment):
    inherited = children.environment()
    del inherited["PYTHONPATH"]
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A directory into which the wheel has been installed, and nothing else."""
    if importlib.util.find_spec("hatchling") is None and not os.environ.get("CI"):
        pytest.skip("building the wheel needs hatchling: pip install hatchling")
    directory = tmp_path_factory.mktemp("wheel")
    pip = ("-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", directory, ROOT, cwd=directory)
    (wheel,) = directory.glob("transfer_jax-*.whl")
    target = directory / "target"
    run(*pip, "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=directory)
    return target


def test_imports_come_from_the_wheel(installed, tmp_path):
    code = (
        "import transfer_jax, json; from transfer_jax.configuration import config_directory, "
        "list_configs; print(json.dumps([transfer_jax.__file__, str(config_directory()), "
        "sorted(list_configs())]))"
    )
    # As a user would have it: the directory of the wheel stands before all others. An editable
    # install of the checkout, if there is one, comes after it.
    package, configs, names = json.loads(run("-c", code, cwd=tmp_path, PYTHONPATH=str(installed)))
    assert Path(package).parent == installed / "transfer_jax"
    assert Path(configs) == installed / "transfer_jax" / "_configs"
    assert names == sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.name[0] != "_")


def test_holds_no_more_than_the_package(installed):
    top = {path.name for path in installed.iterdir()} - {"bin"}
    assert {name for name in top if not name.endswith(".dist-info")} == {"transfer_jax"}
    script = (installed / "bin" / "transfer-jax").read_text()
    assert "from transfer_jax.cli import main" in script


def test_runs_from_the_command_line(installed, tmp_path):
    program = ("-m", "transfer_jax.cli")
    listing = run(*program, "list", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "quickstart:digits" in listing

    short = [f"--config.{stage}.steps=21" for stage in ("pretrain", "transfer", "lora.fit")]
    output = run(
        *program, "run", "quickstart", "--workdir=work", *short, "--config.model.depth=1",
        "--config.model.features=8", "--config.lora.rank=2", "--config.task_vector.shares=0.5",
        cwd=tmp_path, PYTHONPATH=str(installed), JAX_PLATFORMS="cpu",
    )  # fmt: skip
    assert "Test accuracy" in output
    assert (tmp_path / "work" / "report" / "report.md").exists()
