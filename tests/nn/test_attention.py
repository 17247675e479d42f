"""Attention against the definition; caches against teacher forcing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.nn import Attention, LinearAttention
from transfer_jax.nn.attention import rotate


def setup(module, length=12, seed=0):
    x = jax.random.normal(jax.random.key(seed), (2, length, module.features))
    return jax.jit(module.init)(jax.random.key(1), x), x


def test_attention_is_the_softmax_average():
    module = Attention(8, num_heads=2, causal=True)
    variables, x = setup(module)
    p = variables["params"]
    q, k, v = (jnp.einsum("blh,hnd->blnd", x, p[n]["kernel"]) for n in ("query", "key", "value"))
    scores = jnp.einsum("blnd,bsnd->bnls", q, k) / np.sqrt(4)
    scores = jnp.where(jnp.tri(12, dtype=bool), scores, -jnp.inf)
    y = jnp.einsum("bnls,bsnd->blnd", jax.nn.softmax(scores), v)
    expected = jnp.einsum("blnd,ndh->blh", y, p["out"]["kernel"])
    np.testing.assert_allclose(module.apply(variables, x), expected, atol=1e-5)


@pytest.mark.parametrize(
    "module",
    [
        Attention(8, num_heads=2, causal=True),
        Attention(8, num_heads=2, causal=True, rotary=True),
        LinearAttention(8, num_heads=2, chunk_size=5),
    ],
    ids=["softmax", "rotary", "linear"],
)
def test_cached_decoding_equals_teacher_forcing(module):
    variables, x = setup(module)
    expected = module.apply(variables, x)
    y, state = module.apply(variables, x[:, :4], None, None, 16, method="prefill")
    z, state = module.apply(variables, x[:, 4:7], None, state, method="prefill")
    outputs = [y, z]
    step = jax.jit(lambda v, u, state: module.apply(v, u, state, method="step"))
    for t in range(7, 12):
        w, state = step(variables, x[:, t], state)
        outputs.append(w[:, None])
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), expected, atol=1e-5)
    changed = module.apply(variables, x.at[:, 8:].add(1.0))
    np.testing.assert_allclose(changed[:, :8], expected[:, :8], atol=1e-5)


def test_cross_attention_lengths_bias_and_mask():
    module = Attention(8, num_heads=2)
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    context = jax.random.normal(jax.random.key(1), (2, 9, 6))
    variables = jax.jit(module.init)(jax.random.key(2), x, context)
    lengths = jnp.array([9, 4])
    y = module.apply(variables, x, context, lengths=lengths)
    assert y.shape == (2, 5, 8)
    alone = module.apply(variables, x[1:], context[1:, :4])
    np.testing.assert_allclose(y[1], alone[0], atol=1e-5)
    seen = (jnp.arange(9) < lengths[:, None])[:, None, None]
    for option in ({"mask": seen}, {"bias": jnp.where(seen, 0.0, -1e9)}):
        np.testing.assert_allclose(module.apply(variables, x, context, **option), y, atol=1e-5)


def test_rotation_depends_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    at = lambda x, p: rotate(x, jnp.array([p]))[0, 0, 0]  # noqa: E731
    np.testing.assert_allclose(at(q, 3) @ at(k, 1), at(q, 12) @ at(k, 10), atol=1e-5)
    np.testing.assert_allclose(at(q, 0), q[0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(at(q, 7)), jnp.linalg.norm(q), rtol=1e-5)


def test_linear_attention_is_the_kernel_average():
    module = LinearAttention(8, num_heads=2, chunk_size=4)
    variables, x = setup(module, length=10)
    p = variables["params"]
    q, k, v = (jnp.einsum("blh,hnd->blnd", x, p[n]["kernel"]) for n in ("query", "key", "value"))
    weights = jnp.einsum("blnd,bsnd->bnls", jax.nn.elu(q) + 1, jax.nn.elu(k) + 1)
    weights = jnp.where(jnp.tri(10, dtype=bool), weights, 0)
    y = jnp.einsum("bnls,bsnd->blnd", weights / weights.sum(-1, keepdims=True), v)
    expected = jnp.einsum("blnd,ndh->blh", y, p["out"]["kernel"])
    np.testing.assert_allclose(module.apply(variables, x), expected, atol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="num_heads=3"):
        setup(Attention(8, num_heads=3))
    module = Attention(8, num_heads=2)
    variables, _ = setup(module)
    with pytest.raises(ValueError, match="not causal"):
        module.apply(variables, method="discretise")
