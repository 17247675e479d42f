"""What importing costs: nothing that the user has not asked for."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
NEVER = ("tensorflow", "torch", "sklearn", "matplotlib", "tensorflow_datasets")


def loaded(statement, modules):
    """Which of ``modules`` a fresh interpreter has loaded after ``statement``."""
    code = f"{statement}\nimport sys\nprint(*(m for m in {modules!r} if m in sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_import_alone_is_light():
    assert loaded("import transfer_jax", (*NEVER, "orbax", "jax", "flax", "grain")) == []


def test_the_tree_tools_need_jax_alone():
    others = (*NEVER, "orbax", "flax", "optax", "grain", "ml_collections")
    assert loaded("from transfer_jax import trees", others) == []


def test_every_public_name_exists_and_none_brings_in_another_framework():
    statement = (
        "import transfer_jax as tj\n"
        "for name in tj.__all__: getattr(tj, name)\n"
        "assert set(tj.__all__) <= set(dir(tj))\n"
        "for part in (tj.data, tj.interop, tj.metrics, tj.models, tj.nn, tj.objectives, tj.ops,\n"
        "             tj.training, tj.trees):\n"
        "    for name in getattr(part, '__all__', ()): getattr(part, name)"
    )
    assert loaded(statement, NEVER) == []
