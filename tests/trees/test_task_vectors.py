"""Task vectors, their combinations, and the tangent model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax import trees


def model(params, x):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return hidden @ params["w2"]


def random_params(seed, scale=1.0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "w1": scale * jax.random.normal(keys[0], (3, 4)),
        "b1": scale * jax.random.normal(keys[1], (4,)),
        "w2": scale * jax.random.normal(keys[2], (4, 2)),
    }


BASE = random_params(0)
MODELS = [trees.add(BASE, random_params(i, 0.1)) for i in (1, 2, 3)]
VECTORS = [trees.task_vector(m, BASE) for m in MODELS]


def close(a, b, **kwargs):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **{"atol": 1e-6, **kwargs}), a, b)


@pytest.mark.parametrize("bank", [VECTORS, trees.stack(VECTORS)], ids=["list", "stacked"])
def test_ends_of_the_coefficients(bank):
    close(trees.apply_task_vectors(BASE, bank, 0.0), BASE, atol=0)
    close(trees.apply_task_vectors(BASE, bank, jnp.array([0.0, 1.0, 0.0])), MODELS[1])


@pytest.mark.parametrize("bank", [VECTORS, trees.stack(VECTORS)], ids=["list", "stacked"])
def test_forms_of_coefficients_agree(bank):
    per_vector = jnp.array([0.5, -1.0, 2.0])
    expected = {
        k: BASE[k] + sum(c * v[k] for c, v in zip(per_vector, VECTORS)) for k in BASE
    }  # fmt: skip
    blocks = {"w1": jnp.tile(per_vector[:, None], (1, 3)), "b1": per_vector, "w2": per_vector}
    for form in (per_vector, per_vector.tolist(), {"b1": per_vector, "w": per_vector}, blocks):
        close(trees.apply_task_vectors(BASE, bank, form), expected)


def test_negation_and_analogy():
    close(trees.apply_task_vectors(MODELS[0], [VECTORS[0]], -1.0), BASE)
    a, b, c = VECTORS
    expected = trees.add(BASE, trees.add(c, trees.sub(b, a)))
    close(trees.apply_task_vectors(BASE, [b, a, c], [1.0, -1.0, 1.0]), expected)


def test_scan_stacked_layers_are_blocks_of_their_own():
    base = {"layers": jnp.zeros((5, 2, 2))}
    bank = trees.stack([{"layers": jnp.ones((5, 2, 2))}, {"layers": 10 * jnp.ones((5, 2, 2))}])
    coefficients = {"layers": jnp.stack([jnp.arange(5.0), jnp.ones(5)])}
    result = trees.apply_task_vectors(base, bank, coefficients)["layers"]
    np.testing.assert_allclose(result[:, 0, 0], np.arange(5) + 10)


def test_gradient_in_the_coefficients_is_an_inner_product():
    x = jax.random.normal(jax.random.key(9), (6, 3))
    loss = lambda p: jnp.sum(model(p, x) ** 2)  # noqa: E731
    coefficients = jax.tree.map(lambda _: jnp.zeros(3), BASE)
    gradient = jax.grad(
        lambda c, bank: loss(trees.apply_task_vectors(BASE, bank, c))
    )(coefficients, trees.stack(VECTORS))  # fmt: skip
    at_base = jax.grad(loss)(BASE)
    for name in BASE:
        expected = [jnp.vdot(at_base[name], v[name]) for v in VECTORS]
        np.testing.assert_allclose(gradient[name], expected, rtol=1e-4)


def test_narrow_vectors_are_added_in_float32():
    base = {"w": jnp.full(4, 1.0)}
    vectors = [{"w": jnp.full(4, 2.0**-10, jnp.bfloat16)}]
    assert trees.apply_task_vectors(base, vectors)["w"].tolist() == [1.0 + 2.0**-10] * 4


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"'b1'.*vector 0"):
        trees.apply_task_vectors(BASE, [{"w1": BASE["w1"], "w2": BASE["w2"]}])
    with pytest.raises(ValueError, match=r"'w1'.*expected"):
        trees.apply_task_vectors(BASE, {**trees.stack(VECTORS), "w1": jnp.ones((3, 2))})
    with pytest.raises(ValueError, match="at least one"):
        trees.apply_task_vectors(BASE, [])


def test_linearize_equals_the_explicit_jacobian():
    x = jax.random.normal(jax.random.key(9), (2, 3))
    tangent = trees.linearize(model, BASE)
    jacobian = jax.jacobian(model)(BASE, x)
    change = jax.tree.map(
        lambda j, v: jnp.tensordot(j, v, v.ndim), jacobian, VECTORS[0]
    )  # fmt: skip
    expected = model(BASE, x) + sum(change.values())
    np.testing.assert_allclose(tangent(MODELS[0], x), expected, atol=1e-5)


def test_linearize_is_affine_and_tangent():
    x = jax.random.normal(jax.random.key(9), (2, 3))
    tangent = jax.jit(trees.linearize(model, BASE).__call__)
    at = lambda *c: tangent(trees.apply_task_vectors(BASE, VECTORS[:2], list(c)), x)  # noqa: E731
    both = at(2.0, -3.0) - at(0.0, 0.0)
    each = 2 * (at(1.0, 0.0) - at(0.0, 0.0)) - 3 * (at(0.0, 1.0) - at(0.0, 0.0))
    np.testing.assert_allclose(both, each, atol=1e-5)

    def gap(scale):
        near = trees.apply_task_vectors(BASE, VECTORS[:1], scale)
        return float(jnp.abs(model(near, x) - tangent(near, x)).max())

    assert gap(1.0) / gap(0.5) == pytest.approx(4, rel=0.3)


def test_linearized_model_is_a_pytree_of_its_base():
    tangent = trees.linearize(model, BASE)
    traced = []

    @jax.jit
    def call(tangent, params, x):
        traced.append(1)
        return tangent(params, x)

    x = jnp.ones((1, 3))
    call(tangent, MODELS[0], x)
    call(trees.linearize(model, MODELS[1]), MODELS[0], x)  # An argument, so not compiled again.
    assert len(traced) == 1
    assert len(jax.tree.leaves(tangent)) == 3


def test_the_backward_pass_through_a_stacked_bank_holds_one_model():
    n, size = 16, 2**16
    shapes = (
        {"w": jax.ShapeDtypeStruct((size,), jnp.float32)},
        {"w": jax.ShapeDtypeStruct((n, size), jnp.float32)},
        jax.ShapeDtypeStruct((n,), jnp.float32),
    )

    def loss(base, bank, coefficients):
        return jnp.sum(trees.apply_task_vectors(base, bank, coefficients)["w"] ** 2)

    compiled = jax.jit(jax.grad(loss, argnums=2)).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * (4 * size)
