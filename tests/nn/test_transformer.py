"""Transformer stacks: one mathematics, however it is compiled, cached, scanned or split."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.nn import (
    Attention,
    TransformerConfig,
    TransformerStack,
    stack_layers,
    transformer_rules,
    unstack_layers,
)
from transfer_jax.nn.transformer import relative_bucket
from transfer_jax.training.sharding import Layout, make_mesh

DECODER = TransformerConfig(
    features=8, num_layers=3, num_heads=2, hidden=12, causal=True, cross_attention=True,
    relative_buckets=8, relative_distance=6, norm="rms", init_scale=0.3,
)  # fmt: skip
B, L, S = 2, 7, 5
X = jax.random.normal(jax.random.key(0), (B, L, 8))
CONTEXT = jax.random.normal(jax.random.key(1), (B, S, 8))
CONTEXT_LENGTHS = jnp.array([5, 3])


@pytest.fixture(scope="module")
def decoder():
    stack = TransformerStack(DECODER)
    params = stack.init(jax.random.key(2), X, context=CONTEXT)["params"]

    @jax.jit
    def run(params, x):
        return stack.apply({"params": params}, x, context=CONTEXT, context_lengths=CONTEXT_LENGTHS)

    return stack, params, run


def test_scanned_and_recomputed_layers_are_the_same_function(decoder):
    _, params, run = decoder
    expected, gradient = jax.value_and_grad(lambda p: jnp.sum(run(p, X) ** 2))(params)
    scanned = TransformerStack(dataclasses.replace(DECODER, scan=True, remat=True))

    @jax.jit
    def loss(params):
        y, states = scanned.apply(
            {"params": params}, X, context=CONTEXT, context_lengths=CONTEXT_LENGTHS,
            hidden_states=True,
        )  # fmt: skip
        assert len(states) == 4
        return jnp.sum(y**2)

    value, stacked = jax.value_and_grad(loss)(stack_layers(params))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        unstack_layers(stacked), gradient,
    )  # fmt: skip
    own = scanned.init(jax.random.key(2), X, context=CONTEXT)["params"]
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, stack_layers(params))
    first, second = own["layers"]["mlp"]["up"]["kernel"][:2]
    assert not np.allclose(first, second)  # each layer draws its own


@pytest.mark.parametrize("scan", [False, True])
def test_decoding_chunk_by_chunk_is_the_whole_pass(decoder, scan):
    stack, params, run = decoder
    expected = run(params, X)
    if scan:
        stack = TransformerStack(dataclasses.replace(DECODER, scan=True))
        params = stack_layers(params)

    @jax.jit
    def decode(params):
        def apply(x, state=None, **options):
            return stack.apply({"params": params}, x, state, method="decode", **options)

        y, state = apply(X[:, :3], max_length=L, context=CONTEXT, context_lengths=CONTEXT_LENGTHS)
        outputs = [y]
        for t in range(3, L):
            y, state = apply(X[:, t : t + 1], state)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1)

    np.testing.assert_allclose(decode(params), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("form", ["decoder", "masked", "scanned", "window"])
def test_chosen_positions_are_those_of_the_whole_pass(form, norm_first):
    changes = {
        "decoder": {"remat": True},
        "masked": {"causal": False, "cross_attention": False, "relative_buckets": None},
        "scanned": {"scan": True},
        "window": {"causal": False, "relative_buckets": None, "window": 2},
    }[form]  # fmt: skip
    stack = TransformerStack(dataclasses.replace(DECODER, norm_first=norm_first, **changes))
    options = {"context": CONTEXT, "context_lengths": CONTEXT_LENGTHS}
    if form == "masked":
        options = {"mask": jax.random.bernoulli(jax.random.key(3), 0.6, (B, 1, L, L))}
        options["mask"] |= jnp.eye(L, dtype=bool)
    lengths, where = jnp.array([7, 4]), jnp.array([[6, 2, 2], [0, 3, 1]])
    params = stack.init(jax.random.key(2), X, **options)["params"]

    def chosen(params, x):
        y = stack.apply({"params": params}, x, lengths=lengths, where=where, **options)
        return jnp.sum(jnp.sin(y)), y

    def whole(params, x):
        y = stack.apply({"params": params}, x, lengths=lengths, **options)
        y = jnp.take_along_axis(y, where[..., None], axis=1)
        return jnp.sum(jnp.sin(y)), y

    programs = [
        jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True)).lower(params, X).compile()
        for f in (chosen, whole)
    ]
    (grads, y), (expected_grads, expected) = (program(params, X) for program in programs)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, expected_grads
    )
    less, all_of_it = (program.cost_analysis()["flops"] for program in programs)
    assert less < 0.95 * all_of_it or form in ("scanned", "window")
    with pytest.raises(ValueError, match="of all positions"):
        stack.apply({"params": params}, X, where=where, hidden_states=True, **options)


def test_hidden_states_are_those_of_shorter_stacks(decoder):
    stack, params, run = decoder
    y, states = stack.apply(
        {"params": params}, X, context=CONTEXT, context_lengths=CONTEXT_LENGTHS,
        hidden_states=True,
    )  # fmt: skip
    np.testing.assert_allclose(y, run(params, X), atol=1e-5)
    np.testing.assert_array_equal(states[0], X)
    np.testing.assert_array_equal(states[-1], y)
    short = TransformerStack(dataclasses.replace(DECODER, num_layers=2, final_norm=False))
    kept = {k: v for k, v in params.items() if k not in ("layers_2", "norm")}
    second = short.apply({"params": kept}, X, context=CONTEXT, context_lengths=CONTEXT_LENGTHS)
    np.testing.assert_allclose(states[2], second, atol=1e-5)


def test_padding_reaches_nothing():
    config = TransformerConfig(features=8, num_layers=2, num_heads=2, norm_first=False)
    stack = TransformerStack(config)
    params = stack.init(jax.random.key(0), X)
    lengths = jnp.array([7, 4])
    y = stack.apply(params, X, lengths=lengths)
    other = stack.apply(params, X.at[1, 4:].set(9.0), lengths=lengths)
    np.testing.assert_array_equal(y[1, :4], other[1, :4])
    assert not np.allclose(y[1, :4], stack.apply(params, X)[1, :4])


def test_relative_buckets_of_t5():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    attention = transformers.models.t5.modeling_t5.T5Attention
    distance = np.arange(-200, 200)
    for causal in (True, False):
        expected = attention._relative_position_bucket(
            torch.tensor(distance), bidirectional=not causal, num_buckets=32, max_distance=128
        )
        np.testing.assert_array_equal(relative_bucket(distance, 32, 128, causal), expected)


def test_attention_dropout_keeps_the_mean_and_none_is_the_fused_form():
    layer = Attention(8, 2, causal=True, dropout=0.5, scale=1.0)
    params = layer.init(jax.random.key(0), X)
    lengths = jnp.array([7, 4])
    bias = jax.random.normal(jax.random.key(3), (1, 2, L, L))
    still = layer.apply(params, X, lengths=lengths, bias=bias)

    @jax.jit
    @jax.vmap
    def drawn(key):
        return layer.apply(params, X, lengths=lengths, bias=bias, train=True, rngs={"dropout": key})

    draws = drawn(jax.random.split(jax.random.key(1), 4000))
    error = jnp.abs(draws.mean(0) - still)[0]
    assert draws.std() > 0.1 and jnp.all(error < 5 * draws.std(0)[0] / 4000**0.5)
    almost = layer.clone(dropout=1e-12)  # the explicit path, with nothing dropped
    same = almost.apply(
        params, X, lengths=lengths, bias=bias, train=True, rngs={"dropout": jax.random.key(0)}
    )
    np.testing.assert_allclose(same, still, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_tensor_and_fsdp_sharding_change_no_number(decoder, scan):
    stack, params, run = decoder
    expected = run(params, X)
    if scan:
        stack = TransformerStack(dataclasses.replace(DECODER, scan=True))
        params = stack_layers(params)
    layout = Layout(
        make_mesh({"data": 2, "fsdp": 2, "model": 2}), transformer_rules(scan=scan), min_size=1
    )
    placed = layout.place(params)
    layer = placed["layers"] if scan else placed["layers_0"]
    kernel = layer["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[-2:] == (4, 6)

    @jax.jit
    def sharded(params, x):
        return stack.apply({"params": params}, x, context=CONTEXT, context_lengths=CONTEXT_LENGTHS)

    np.testing.assert_allclose(sharded(placed, X), expected, rtol=1e-5, atol=1e-5)
