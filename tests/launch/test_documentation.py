"""docs/launch.md shows what the launchers print."""

import re
import shlex
import sys
import tempfile
from pathlib import Path

import pytest

from launch import gke, local, slurm, tpu_vm

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "launch.md"
MODULES = {"local": local, "slurm": slurm, "tpu_vm": tpu_vm, "gke": gke}


def printed():
    """The dry runs of the page, as (command, lines below it)."""
    for block in re.findall(r"^```console\n(.*?)^```$", PAGE.read_text(), re.M | re.S):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, *lines = part.splitlines()
            if command.endswith("--dry_run"):
                yield command, lines


def as_documented(text):
    """The same without what depends on the machine."""
    text = text.replace(sys.executable, "python").replace(str(ROOT), "/shared/transfer_jax")
    text = re.sub(r"/\S*/transfer_jax-wheel-\w+", "/tmp/transfer_jax", text)
    return text.replace(f"{tempfile.gettempdir()}/transfer_jax/", "/tmp/transfer_jax/")


@pytest.mark.parametrize("command, lines", printed(), ids=lambda x: x if isinstance(x, str) else "")
def test_dry_run(command, lines, tmp_path, monkeypatch, capsys):
    _, _, module, *arguments = shlex.split(command)
    sweeps = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    (tmp_path / "rates.py").write_text(sweeps[0])
    arguments = [a.replace("=rates.py", f"={tmp_path}/rates.py") for a in arguments]
    monkeypatch.chdir(ROOT)
    assert MODULES[module.removeprefix("launch.")].main(arguments) == 0
    output = iter(as_documented(capsys.readouterr().out).splitlines())
    skipping = False  # after a line of dots
    for line in lines:
        if line == "…":
            skipping = True
            continue
        found = next((o for o in output if o == line), None) if skipping else next(output, None)
        assert found == line
        skipping = False
    assert skipping or next(output, None) is None
