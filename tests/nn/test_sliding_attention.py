"""Attention within a window: dense attention under the mask that it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.nn import Attention, SlidingAttention

B, L, H = 2, 13, 8
X = jax.random.normal(jax.random.key(0), (B, L, H))
LENGTHS = jnp.array([L, 9])
VALID = np.arange(L) < np.array(LENGTHS)[:, None]
GLOBAL = np.zeros((B, L), bool)
GLOBAL[0, [0, 6]] = GLOBAL[1, [4, 11]] = True  # the last one is padding


def sliding(window, **fields):
    return SlidingAttention(
        H, 2, window=window, max_global=3, kernel_init=jax.nn.initializers.normal(0.5), **fields
    )


@pytest.fixture(scope="module")
def params():
    params = sliding(2).init(jax.random.key(1), X)["params"]
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), params)


def dense(params, x, window):
    """Two dense attentions: of the tokens within the window, and of the global ones."""
    shared = {name: params[name] for name in ("query", "key", "value", "out")}
    others = {name: params[f"{name}_global"] for name in ("query", "key", "value")}
    seen = GLOBAL & VALID
    near = jnp.abs(jnp.arange(L)[:, None] - jnp.arange(L)) <= window
    mask = (near | seen[:, None]) & VALID[:, None]
    local = Attention(H, 2).apply({"params": shared}, x, mask=mask[:, None])
    everywhere = Attention(H, 2).apply(
        {"params": {**others, "out": params["out"]}}, x, lengths=LENGTHS
    )
    return jnp.where(seen[..., None], everywhere, local)


@pytest.mark.parametrize("window", [1, 4, 50])
def test_the_dense_attention_of_the_equivalent_mask(params, window):
    module = sliding(window)

    def ours(params, x):
        return module.apply({"params": params}, x, lengths=LENGTHS, global_mask=GLOBAL)

    def score(f):
        def value(params, x):
            y = jnp.where(VALID[..., None], f(params, x), 0)
            return jnp.sum(y**2), y

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))(params, X)

    found, expected = score(ours), score(lambda params, x: dense(params, x, window))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
    )
    np.testing.assert_allclose(found[0][1], expected[0][1], atol=1e-5)


def test_without_global_tokens_nothing_reaches_beyond_the_window(params):
    @jax.jit
    def run(x, mask=None):
        return sliding(3).apply({"params": params}, x, global_mask=mask)

    reached = jax.jit(jax.grad(lambda x: run(x)[:, 6].sum()))(X)
    np.testing.assert_array_equal(np.flatnonzero(np.abs(reached).sum((0, 2))), np.arange(3, 10))
    none = run(X, jnp.zeros((B, L), bool))
    np.testing.assert_allclose(run(X), none, atol=1e-6)


def test_the_work_grows_linearly_with_the_length(params):
    def flops(length):
        x, mask = jnp.zeros((1, length, H)), jnp.zeros((1, length), bool)
        run = jax.jit(lambda x, m: sliding(4).apply({"params": params}, x, global_mask=m))
        return run.lower(x, mask).compile().cost_analysis()["flops"]

    assert flops(512) < 2.2 * flops(256)


def test_more_global_tokens_than_there_is_room_for_are_not_dropped_in_silence(params):
    run = lambda mask: sliding(2).apply({"params": params}, X, global_mask=mask)  # noqa: E731
    many = np.zeros((B, L), bool)
    many[1, :4] = True
    with pytest.raises(ValueError, match="4 global tokens: there is room for max_global=3"):
        run(many)
    y = jax.jit(run)(many)
    assert np.isnan(y[1]).all() and np.isfinite(y[0]).all()
    with pytest.raises(ValueError, match="neither causal nor rotary"):
        sliding(2, causal=True).init(jax.random.key(0), X)


def test_dropout_acts_on_the_weights(params):
    @jax.jit
    def run(seed):
        return sliding(2, dropout=0.5).apply(
            {"params": params}, X, global_mask=GLOBAL, train=True,
            rngs={"dropout": jax.random.key(seed)},
        )  # fmt: skip

    assert np.isfinite(run(0)).all() and np.abs(run(0) - run(1)).max() > 1e-2
