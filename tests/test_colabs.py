"""The notebooks run from top to bottom, offline, and show plots."""

import json
import sys
from pathlib import Path

import pytest

from tests import children

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
jupyter_client = pytest.importorskip("jupyter_client")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))
# Trainings that are shorter here than in the notebook, and networks that are smaller: what stands
# there, and what runs here.
SHORTENED = {
    "quickstart": {
        'config = tj.get_config("quickstart")': 'config = tj.get_config("quickstart")\n'
        "for fit in (config.pretrain, config.transfer, config.lora.fit):\n"
        "    fit.steps = 30\n"
        'config.model.update({"depth": 1, "features": 8})\n'
        "config.task_vector.shares = (0.5, 1.0)",
        "steps=300, log_every=300": "steps=40, log_every=40",
    },
    "s4": {
        "config.train.steps = 200": "config.train.steps = 40\n"
        'config.model.update({"depth": 1, "features": 8})',
        "config.train.eval_every = 50": "config.train.eval_every = 20",
        "steps=400, eval_every=100, log_every=25": "steps=30, eval_every=10, log_every=10",
        "warmup_steps=20": "warmup_steps=2",
        "features=64,\n    depth=2": "features=8,\n    depth=1",
    },
    "trees": {"steps=150": "steps=30", "steps=300": "steps=40"},
}
# How many pictures each one shows at least.
PLOTS = {"quickstart": 4, "s4": 5}


def outputs(notebook):
    return [out for cell in notebook.cells for out in cell.get("outputs", [])]


def test_the_notebooks_are_there():
    assert set(PLOTS) <= {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("name", PLOTS)
def test_is_stored_without_outputs(name):
    notebook = nbformat.read(ROOT / "colabs" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not outputs(notebook)
    assert all(cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One kernel for all notebooks: this interpreter with one device, as a notebook's user has."""
    directory = tmp_path_factory.mktemp("jupyter")
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "Python 3", "language": "python"}
    (directory / "kernels" / "python3").mkdir(parents=True)
    (directory / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(directory))
        manager = jupyter_client.KernelManager(
            kernel_name="python3", client_class="jupyter_client.asynchronous.AsyncKernelClient"
        )
        manager.start_kernel(env=children.environment(IPYTHONDIR=str(directory / "ipython")))
        yield manager
        manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, kernel, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    for old, new in SHORTENED.get(path.stem, {}).items():
        (cell,) = (cell for cell in notebook.cells if old in cell.source)
        cell.source = cell.source.replace(old, new)
    # No notebook sees the names or files of another.
    first = nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {tmp_path}")
    notebook.cells.insert(0, first)
    client = nbclient.NotebookClient(notebook, km=kernel, timeout=400)
    client.execute()  # raises CellExecutionError with the cell and its traceback

    kinds = [out.output_type for out in outputs(notebook)]
    assert "error" not in kinds
    plots = [out for out in outputs(notebook) if "image/png" in out.get("data", {})]
    assert len(plots) >= PLOTS.get(path.stem, 1)
