"""The examples in the docstrings."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import jax
import pytest

import transfer_jax.trees

MODULES = [m.name for m in pkgutil.iter_modules(transfer_jax.trees.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(f"transfer_jax.trees.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


def snippets():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "trees.md").read_text()
    return re.findall(r"```python (\w+)\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("name, code", snippets(), ids=lambda x: x if len(x) < 20 else "")
def test_programs_in_the_documentation_run(name, code):
    if name == "equinox":
        pytest.importorskip("equinox")
    assert len([line for line in code.splitlines() if line.strip()]) < 15
    result: dict = {}
    exec(code, result)
    assert all(bool((x >= 0).all()) for x in jax.tree.leaves(result["fisher"]))
    assert "outputs" not in result or result["outputs"].shape == (4, 2)


def test_every_public_name_is_in_the_documentation():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "trees.md").read_text()
    documented = set(re.findall(r"`(\w+)`", text))
    assert set(transfer_jax.trees.METHODS) <= documented
    functions = {n for n in transfer_jax.trees.__all__ if n[0].islower() and n != "path_str"}
    assert functions <= documented
