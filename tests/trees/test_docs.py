"""The examples in the docstrings."""

import doctest
import importlib
import pkgutil

import pytest

import transfer_jax.trees

MODULES = [m.name for m in pkgutil.iter_modules(transfer_jax.trees.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(f"transfer_jax.trees.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
