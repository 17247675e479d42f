"""Masks by magnitude."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax import trees
from transfer_jax.trees.masks import order_statistics

RNG = np.random.default_rng(0)
TREE = {"a": jnp.asarray(RNG.normal(size=(20, 7)), jnp.float32),
        "b": jnp.asarray(RNG.normal(size=33), jnp.float32) * 3}  # fmt: skip


def reference(x, keep):
    ordered = np.sort(np.abs(x).ravel())[::-1]
    return np.abs(x) >= ordered[max(1, int(keep * x.size)) - 1]


@pytest.mark.parametrize("keep", [0.001, 0.2, 0.5, 1.0])
def test_masks_keep_the_largest(keep):
    by_leaf = trees.magnitude_mask(TREE, keep)
    for name, x in TREE.items():
        np.testing.assert_array_equal(by_leaf[name], reference(x, keep))
    together = trees.magnitude_mask(TREE, keep, "global")
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(TREE)])
    kept = np.concatenate([np.ravel(x) for x in jax.tree.leaves(together)])
    np.testing.assert_array_equal(kept, reference(flat, keep))


@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_search_on_device_equals_selection_on_host(scope):
    host = trees.magnitude_mask(TREE, 0.3, scope)
    device = jax.jit(lambda t: trees.magnitude_mask(t, 0.3, scope))(TREE)
    jax.tree.map(np.testing.assert_array_equal, host, device)


@pytest.mark.parametrize(
    "values", [[0.0, 0.0, 0.0], [1e-40, 1e-30, -3e38], [5.0, -5.0, 5.0, 1.0], [jnp.inf, 0.0, -1.0]]
)
def test_order_statistics_of_difficult_numbers(values):
    x = jnp.asarray(values, jnp.float32)
    ranks = range(len(values))
    found = jax.jit(lambda x: order_statistics([x], ranks))(x)
    # XLA flushes subnormal numbers to zero on some devices.
    np.testing.assert_allclose(found, np.sort(np.abs(x)), rtol=1e-7, atol=1e-37)


@pytest.mark.parametrize("fraction", [0.0, 0.003, 0.8, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["normal", "sorted", "constant", "periodic", "nan"])
def test_selection_on_host_is_exact_even_if_its_sample_misleads(kind, fraction):
    x = RNG.normal(size=70_000).astype(np.float32)
    if kind == "sorted":
        x = np.sort(x)
    elif kind == "constant":
        x[:] = -2.0
    elif kind == "periodic":
        x[::509] = 0.0  # All that is sampled.
    elif kind == "nan":
        x[5:50_000] = np.nan
    rank = int(fraction * (x.size - 1))
    arrays = [x[:30_000].reshape(300, 100), jnp.asarray(x[30_000:])]
    np.testing.assert_array_equal(order_statistics(arrays, [rank])[0], np.sort(np.abs(x))[rank])


def test_bfloat16_and_sharded_leaves():
    narrow = {"w": TREE["a"].astype(jnp.bfloat16)}
    wide = {"w": narrow["w"].astype(jnp.float32)}
    np.testing.assert_array_equal(
        trees.magnitude_mask(narrow, 0.3)["w"], trees.magnitude_mask(wide, 0.3)["w"]
    )
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    sharded = trees.magnitude_mask({"w": jax.device_put(TREE["a"], sharding)}, 0.3)["w"]
    np.testing.assert_array_equal(sharded, trees.magnitude_mask(TREE, 0.3)["a"])
    assert sharded.sharding.is_equivalent_to(sharding, 2)


def test_gradients_through_and_straight_through():
    mask = trees.magnitude_mask(TREE, 0.3)

    def loss(straight, power=2):
        def of_tree(tree):
            masked = trees.apply_mask(tree, mask, straight_through=straight)
            return sum(jnp.sum(x**power) for x in jax.tree.leaves(masked))

        return of_tree

    masked = trees.apply_mask(TREE, mask)
    through = jax.jit(jax.grad(loss(True)))(TREE)
    blocked = jax.grad(loss(False))(TREE)
    assert float(loss(True)(TREE)) == float(loss(False)(TREE))
    for name in TREE:
        np.testing.assert_allclose(blocked[name], 2 * masked[name])
        np.testing.assert_allclose(through[name], 2 * masked[name])  # 2 x at the masked value.
    # The cotangent itself is not masked.
    ones = jax.grad(loss(True, power=1))(TREE)
    assert all(bool((x == 1).all()) for x in jax.tree.leaves(ones))


def test_mistakes_are_explained():
    with pytest.raises(ValueError, match="keep=0"):
        trees.magnitude_mask(TREE, 0)
    with pytest.raises(ValueError, match="'global'"):
        trees.magnitude_mask(TREE, 0.5, "tensor")
