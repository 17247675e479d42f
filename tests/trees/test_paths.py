"""Paths, selections, partitions; importing the subpackage is cheap."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from transfer_jax import trees

TREE = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "steps": jnp.int32(4)}


def test_import_needs_jax_and_numpy_only():
    code = (
        "import sys, transfer_jax.trees\n"
        "heavy = {'flax', 'optax', 'orbax', 'scipy', 'grain', 'ml_collections', 'torch'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    # jax itself imports parts of scipy, so what jax loads is subtracted.
    jax_only = "import sys, jax, jax.numpy\nprint(sorted({'scipy'} & set(sys.modules)))"
    run = [subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True)
           for c in (code, jax_only)]  # fmt: skip
    assert run[0].stdout == run[1].stdout


@pytest.mark.parametrize(
    "where",
    ["kernel", ["kernel$", "nothing"], lambda path, x: jnp.ndim(x) == 2,
     {"dense": {"kernel": True, "bias": False}, "steps": False}],
)  # fmt: skip
def test_every_kind_of_where_selects_the_same(where):
    chosen, rest = trees.partition(TREE, where)
    assert trees.paths(chosen) == ["dense/kernel"]
    assert trees.paths(rest) == ["dense/bias", "steps"]
    whole = trees.combine(chosen, rest)
    assert jax.tree.structure(whole) == jax.tree.structure(TREE)
    assert all(a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(TREE)))


def test_no_match_lists_the_nearest_paths():
    with pytest.raises(ValueError, match="dense/kernel"):
        trees.select(TREE, "dens/kernell")
    assert not any(jax.tree.leaves(trees.select(TREE, "nothing", allow_empty=True)))


def test_combine_refuses_overlap():
    with pytest.raises(ValueError, match="'a'"):
        trees.combine({"a": 1.0}, {"a": 2.0})


def test_is_floating_splits_off_counters_and_functions():
    chosen, rest = trees.partition({**TREE, "f": jnp.tanh}, trees.is_floating)
    assert trees.paths(chosen) == ["dense/bias", "dense/kernel"]
    assert trees.paths(rest) == ["f", "steps"]


@pytest.mark.parametrize(
    "other, message",
    [
        ({"a": 1.0, "b": {"c": 1.0}, "e": 1.0}, "'b/d'|'e'"),
        ({"a": 1.0, "b": {"c": 1.0, "d": jnp.ones(2)}}, r"'b/d'.*\(\).*\(2,\)"),
        ({"a": 1.0, "b": {"c": 1.0, "d": None}}, "'b/d'"),
    ],
)
def test_differences_are_named_by_path(other, message):
    tree = {"a": 1.0, "b": {"c": 1.0, "d": 2.0}}
    with pytest.raises(ValueError, match=message):
        trees.add(tree, other)


def test_different_containers_are_named():
    with pytest.raises(ValueError, match="containers"):
        trees.add([1.0], (1.0,))


def test_integers_are_refused_by_path():
    with pytest.raises(TypeError, match=r"'steps'.*int32.*is_floating"):
        trees.add(TREE, TREE)


def test_leaf_key_depends_on_path_and_key_alone():
    key = jax.random.key(0)
    data = lambda k: tuple(jax.random.key_data(k).tolist())  # noqa: E731
    assert data(trees.leaf_key(key, "a/b")) == data(trees.leaf_key(key, "a.b"))
    keys = {data(trees.leaf_key(k, p)) for k in (key, jax.random.key(1)) for p in ("a", "b", "a/b")}
    assert len(keys) == 6
