"""Vector arithmetic on pytrees, against NumPy on the flattened tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax import trees


def random_tree(seed, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "a": jax.random.normal(keys[0], (4, 3), dtype),
        "b": {"c": jax.random.normal(keys[1], (5,), dtype)},
        "d": [jax.random.normal(keys[2], (), dtype)],
    }


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


A, B, C = (random_tree(i) for i in range(3))
FLAT = {
    "add": (lambda: trees.add(A, B), lambda a, b, c: a + b),
    "sub": (lambda: trees.sub(A, B), lambda a, b, c: a - b),
    "scale": (lambda: trees.scale(A, -2.5), lambda a, b, c: -2.5 * a),
    "lerp": (lambda: trees.lerp(A, B, 0.3), lambda a, b, c: 0.7 * a + 0.3 * b),
    "dot": (lambda: trees.dot(A, B), lambda a, b, c: a @ b),
    "norm": (lambda: trees.norm(A), lambda a, b, c: np.linalg.norm(a)),
    "cosine": (
        lambda: trees.cosine(A, B),
        lambda a, b, c: a @ b / np.linalg.norm(a) / np.linalg.norm(b),
    ),
    "weighted_sum": (
        lambda: trees.weighted_sum([A, B, C], [0.5, -1.0, 2.0]),
        lambda a, b, c: 0.5 * a - b + 2 * c,
    ),
}


@pytest.mark.parametrize("name", FLAT)
def test_equals_vectors(name):
    ours, reference = FLAT[name]
    expected = reference(flat(A), flat(B), flat(C))
    np.testing.assert_allclose(flat(ours()), np.ravel(expected), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(flat(jax.jit(ours)()), np.ravel(expected), rtol=1e-5, atol=1e-6)


def test_slerp_keeps_the_norm_and_the_ends():
    unit = lambda t: jax.tree.map(lambda x: x / jnp.linalg.norm(x), t)  # noqa: E731
    a, b = unit({"w": A["a"]}), unit({"w": B["a"]})
    for t in (0.0, 0.2, 0.5, 1.0):
        assert float(trees.norm(trees.slerp(a, b, t))) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(trees.slerp(a, b, 0.0)["w"], a["w"], atol=1e-6)
    np.testing.assert_allclose(trees.slerp(a, b, 1.0)["w"], b["w"], atol=1e-6)
    # The angle to a grows linearly in t.
    angle = jnp.arccos(trees.cosine(a, b))
    quarter = jnp.arccos(trees.cosine(a, trees.slerp(a, b, 0.25)))
    assert float(quarter) == pytest.approx(float(angle) / 4, abs=1e-4)


def test_slerp_of_parallel_and_zero_leaves_is_linear_and_differentiable():
    a = {"w": A["a"], "zero": jnp.zeros(3)}
    b = {"w": 2 * A["a"], "zero": jnp.ones(3)}
    np.testing.assert_allclose(trees.slerp(a, b, 0.5)["w"], 1.5 * A["a"], rtol=1e-6)
    np.testing.assert_allclose(trees.slerp(a, b, 0.5)["zero"], 0.5, rtol=1e-6)
    gradient = jax.grad(lambda t: trees.norm(trees.slerp(a, b, t)))(0.5)
    assert bool(jnp.isfinite(gradient))


def test_cosine_with_zero_is_zero():
    zero = jax.tree.map(jnp.zeros_like, A)
    assert float(trees.cosine(A, zero)) == 0.0


def test_coefficients_per_block():
    ts = {"a": jnp.array([0.0, 0.25, 0.5, 1.0]), "b": {"c": 0.5}, "d": [1.0]}
    mixed = trees.lerp(A, B, ts)
    rows = np.array([0.0, 0.25, 0.5, 1.0])[:, None]
    np.testing.assert_allclose(mixed["a"], (1 - rows) * A["a"] + rows * B["a"], rtol=1e-5)
    by_group = trees.scale(A, {"^a": 2.0, ".*": 0.0})
    np.testing.assert_allclose(by_group["a"], 2 * A["a"])
    assert not by_group["b"]["c"].any()


def test_unfit_coefficients_name_the_leaf():
    with pytest.raises(ValueError, match=r"'a'.*\(4, 3\)"):
        trees.scale(A, {"a": jnp.ones(3), "b": {"c": 1.0}, "d": [1.0]})
    with pytest.raises(ValueError, match="no group matches leaf 'b/c'"):
        trees.scale(A, {"^a": 2.0})
    with pytest.raises(ValueError, match="'zz' matches no leaf"):
        trees.scale(A, {"zz": 2.0, ".*": 1.0})
    with pytest.raises(ValueError, match="2 values"):
        trees.weighted_sum([A, B], [1.0, 2.0, 3.0])


def test_stack_and_unstack_are_inverse():
    stacked = trees.stack([A, B, C])
    assert stacked["a"].shape == (3, 4, 3)
    for original, back in zip([A, B, C], trees.unstack(stacked)):
        np.testing.assert_array_equal(flat(original), flat(back))
    with pytest.raises(ValueError, match="common size"):
        trees.unstack({"a": jnp.ones(2), "b": jnp.ones(3)})


def test_bfloat16_is_accumulated_in_float32():
    # 256 + 1 is 256 in bfloat16; a sum of 1000 ones would stop at 256.
    big = {"w": jnp.full(1000, 1.0, jnp.bfloat16)}
    assert float(trees.dot(big, big)) == 1000.0
    many = [{"w": jnp.full(2, v, jnp.bfloat16)} for v in (256.0, 1.0, 1.0)]
    total = trees.weighted_sum(many, [1.0, 1.0, 1.0])["w"]
    assert total.dtype == jnp.bfloat16
    assert total.tolist() == [258.0, 258.0]


def test_shardings_are_kept():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    a, b = ({"w": jax.device_put(jnp.arange(16.0).reshape(8, 2) + i, sharding)} for i in range(2))
    for result in (trees.add(a, b), trees.lerp(a, b, 0.5), trees.slerp(a, b, 0.5),
                   trees.weighted_sum([a, b], [1.0, 2.0]), trees.scale(a, 2.0)):  # fmt: skip
        assert result["w"].sharding.is_equivalent_to(sharding, 2)
