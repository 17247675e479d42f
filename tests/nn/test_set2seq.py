"""Set encoders and pointers: order and padding leave no trace; parity with graph libraries."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.nn.set2seq import (
    ENCODERS,
    PointerDecoder,
    Set2Set,
    SetEncoder,
    masked_softmax,
    segment_softmax,
    set2set_params,
)

LENGTHS = jnp.array([6, 4, 1])
MASK = jnp.arange(6) < LENGTHS[:, None]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def shuffled(x, seed=0):
    """The valid elements of each set in another order, and that order [3, 6]."""
    rng = np.random.default_rng(seed)
    order = np.tile(np.arange(6), (3, 1))
    for row, length in zip(order, np.asarray(LENGTHS)):
        row[:length] = np.roll(rng.permutation(length), 1)
    order[0] = [3, 0, 5, 1, 2, 4]  # one that surely moves everything it can
    return jnp.take_along_axis(x, order[..., None], axis=1), order


# -- the process block -----------------------------------------------------------------------------


def test_the_summary_ignores_the_order_whatever_the_number_of_steps():
    memory, pools = normal(0, 3, 6, 8), [Set2Set(8, steps) for steps in range(11)]
    variables = jax.jit(pools[1].init)(jax.random.key(1), memory)

    @jax.jit
    def summaries(memory):
        return [pool.apply(variables, memory, MASK) for pool in pools]

    first, second = summaries(memory), summaries(shuffled(memory)[0])
    for a, b in zip(first, second):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert not first[0].any()
    for a, b in itertools.pairwise(first):
        assert np.abs(np.asarray(a) - b).max() > 1e-3  # every step changes something


@pytest.mark.parametrize("num_layers", [1, 2])
def test_parity_with_the_layer_of_graph_libraries(num_layers):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(10, 5, num_layers)
    segments = np.array([0, 0, 2, 1, 1, 2, 1, 0])
    x = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    with torch.no_grad():  # what torch_geometric.nn.Set2Set and dgl.nn.Set2Set compute
        items, at = torch.from_numpy(x), torch.from_numpy(segments)
        state = (torch.zeros(num_layers, 3, 5), torch.zeros(num_layers, 3, 5))
        expected = torch.zeros(3, 10)
        for _ in range(4):
            query, state = lstm(expected[None], state)
            score = (items * query[0][at]).sum(-1).exp()
            weight = score / torch.zeros(3).index_add(0, at, score)[at]
            read = torch.zeros(3, 5).index_add(0, at, weight[:, None] * items)
            expected = torch.cat([query[0], read], dim=-1)
    tensors = {f"lstm.{k}": v.detach().numpy() for k, v in lstm.named_parameters()}
    variables = {"params": set2set_params(tensors)}
    pool = Set2Set(5, steps=4, num_layers=num_layers)
    shapes = jax.eval_shape(pool.init, jax.random.key(0), jnp.ones((1, 2, 5)))
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), shapes, variables)
    ours = pool.apply(variables, x, jnp.asarray(segments), 3, method="segments")
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-5)
    # The same sets side by side instead of one after the other.
    dense = np.zeros((3, 4, 5), np.float32)
    for i in range(3):
        dense[i, : (segments == i).sum()] = x[segments == i]
    mask = np.arange(4) < np.bincount(segments)[:, None]
    np.testing.assert_allclose(pool.apply(variables, dense, mask), ours, atol=1e-6)
    if num_layers == 2:
        del tensors["lstm.bias_hh_l1"]
        with pytest.raises(ValueError, match="bias_hh_l1"):
            set2set_params(tensors)


def test_the_paper_s_lstm_without_input_is_the_same():
    memory = normal(2, 2, 4, 3)
    pool = Set2Set(3, steps=5)
    params = jax.jit(pool.init)(jax.random.key(0), memory)["params"]
    params = jax.tree.map(lambda x: x + 0.1 * normal(3, *x.shape), params)
    lstm = params["lstm"]["forward_0"]
    # gates = W q* + b with W = W_ih + [W_hh, 0]
    w = lstm["input"]["kernel"] + jnp.pad(lstm["hidden"]["kernel"], ((0, 3), (0, 0)))
    b = lstm["input"]["bias"] + lstm["hidden"]["bias"]
    summary, cell = jnp.zeros((2, 6)), jnp.zeros((2, 3))
    for _ in range(5):
        i, f, g, o = jnp.split(summary @ w + b, 4, axis=-1)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        query = jax.nn.sigmoid(o) * jnp.tanh(cell)
        weights = jax.nn.softmax(jnp.einsum("bnh,bh->bn", memory, query))
        summary = jnp.concatenate([query, jnp.einsum("bn,bnh->bh", weights, memory)], axis=-1)
    np.testing.assert_allclose(jax.jit(pool.apply)({"params": params}, memory), summary, atol=1e-6)


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_weights_of_one_element_of_equal_elements_and_of_nothing(score):
    memory = normal(0, 3, 6, 4)
    memory = memory.at[0, 1].set(memory[0, 0]).at[0, 4].set(memory[0, 0])
    mask = MASK.at[1].set(False)
    pool = Set2Set(4, steps=3, score=score)
    variables = jax.jit(pool.init)(jax.random.key(1), memory)
    process = jax.jit(functools.partial(pool.apply, method="process"))
    summary, weights = process(variables, memory, mask)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights[2], [[1, 0, 0, 0, 0, 0]] * 3)  # one element
    np.testing.assert_allclose(summary[2, 4:], memory[2, 0], rtol=1e-6)
    np.testing.assert_allclose(weights[0, :, 1], weights[0, :, 0], rtol=1e-6)
    np.testing.assert_allclose(weights[0, :, 4], weights[0, :, 0], rtol=1e-6)
    np.testing.assert_allclose(weights.sum(-1)[jnp.array([0, 2])], 1, rtol=1e-6)
    assert not weights[1].any() and not summary[1, 4:].any()  # an empty set reads zero
    # Multiplicity moves attention, and nothing else does: three times the mass on the triple.
    once, others = memory[:1, jnp.array([0, 2, 3, 5])], weights[0, 0]
    _, single = process(variables, once, jnp.ones((1, 4), bool))
    ratio = others[0] / others[2]
    np.testing.assert_allclose(single[0, 0, 0] / single[0, 0, 1], ratio, rtol=1e-4)
    assert others[jnp.array([0, 1, 4])].sum() > single[0, 0, 0]


def test_softmax_over_nothing_has_a_gradient():
    def total(scores):
        rows = masked_softmax(scores[None], jnp.array([[False] * 4])).sum()
        flat = segment_softmax(scores, jnp.array([0, 2, 2, -1]), 3)
        return rows + (flat * jnp.arange(4.0)).sum()

    scores = normal(0, 4)
    gradient = jax.jit(jax.grad(total))(scores)
    assert np.isfinite(gradient).all() and gradient[1] != 0 and gradient[3] == 0
    flat = segment_softmax(scores, jnp.array([0, 2, 2, -1]), 3)
    np.testing.assert_allclose(flat, [1, *jax.nn.softmax(scores[1:3]), 0], rtol=1e-6)


# -- encoders and pointers -------------------------------------------------------------------------

TARGETS = jnp.array([[2, 0, 1, 5, 4, 3], [3, 3, 0, 1, -1, -1], [0, -1, -1, -1, -1, -1]])


def write(module, memory, summary, targets):
    return module(module.start(memory, summary, MASK), targets)


@functools.cache
def network(kind, dtype=None):
    """Variables of an encoder and a writer, and their outputs and gradients in one function."""
    encoder = SetEncoder(kind, 8, steps=3, dtype=dtype)
    decoder = PointerDecoder(8, dtype=dtype)

    def init(key, inputs):
        (memory, summary), variables = encoder.init_with_output(key, inputs, LENGTHS)
        return variables, decoder.init(key, memory, summary, TARGETS, method=write)

    def loss(variables, inputs, targets):
        memory, summary = encoder.apply(variables[0], inputs, LENGTHS)
        logits = decoder.apply(variables[1], memory, summary, targets, method=write)
        total = jnp.where(jnp.isfinite(logits), logits, 0).sum() + jnp.square(summary).sum()
        return total, (summary, logits)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return jax.jit(init)(jax.random.key(0), normal(0, 3, 6, 2)), run


@pytest.mark.parametrize("kind", ENCODERS)
def test_only_the_recurrent_encoders_see_the_order(kind):
    inputs = normal(0, 3, 6, 2)
    other, order = shuffled(inputs)
    # Pointing at the same elements: the new index of each target.
    back = np.argsort(order, axis=1)
    targets = jnp.where(TARGETS < 0, -1, jnp.take_along_axis(back, jnp.maximum(TARGETS, 0), axis=1))
    variables, run = network(kind)
    (_, (summary, logits)), _ = run(variables, inputs, TARGETS)
    (_, (new_summary, new_logits)), _ = run(variables, other, targets)
    expected = jnp.take_along_axis(jax.nn.softmax(logits), order[:, None], axis=2)
    valid = np.asarray(TARGETS) >= 0
    expected, found = expected[valid], jax.nn.softmax(new_logits)[valid]
    difference = np.abs(summary - new_summary).max()
    if kind in ("ptrnet_lstm", "bilstm"):
        assert difference > 1e-3
        assert np.abs(expected - found).max() > 1e-4
    else:
        assert difference < 1e-6
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_order_in_bfloat16():
    inputs = normal(0, 3, 6, 2).astype(jnp.bfloat16)
    variables, run = network("rpw", jnp.bfloat16)
    (_, (summary, logits)), _ = run(variables, inputs, TARGETS)
    assert logits.dtype == jnp.float32
    again = run(variables, shuffled(inputs)[0], TARGETS)[0][1][0]
    np.testing.assert_allclose(summary.astype(np.float32), again.astype(np.float32), atol=0.02)


@pytest.mark.parametrize("kind", ENCODERS)
def test_padding_changes_nothing_not_even_gradients(kind):
    inputs = normal(0, 3, 6, 2)
    variables, run = network(kind)
    clean = run(variables, jnp.where(MASK[..., None], inputs, 0), TARGETS)
    dirty = run(variables, jnp.where(MASK[..., None], inputs, jnp.array([1e38, jnp.nan])), TARGETS)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert (np.asarray(clean[1][1])[~np.asarray(MASK)] == 0).all()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(clean[1]))


@pytest.mark.parametrize("options", [
    {"glimpses": 0}, {"glimpses": 2, "mask_used": True, "init_map": "split"},
])  # fmt: skip
def test_step_by_step_is_the_same_as_all_at_once(options):
    memory = jnp.where(MASK[..., None], normal(0, 3, 6, 8), 0)
    summary = normal(1, 3, 16)
    decoder = PointerDecoder(8, **options)

    def stepwise(module):
        state = module.start(memory, summary, MASK)
        whole = module(state, TARGETS)
        pointed, steps = jnp.full(3, 6), []
        for t in range(6):
            logits, state = module.step(pointed, state)
            steps.append(logits)
            pointed = jnp.maximum(TARGETS[:, t], 0)
        return whole, jnp.stack(steps, axis=1)

    variables = decoder.init(jax.random.key(0), memory, summary, TARGETS, method=write)
    whole, steps = jax.jit(functools.partial(decoder.apply, method=stepwise))(variables)
    valid = np.asarray(TARGETS) >= 0
    np.testing.assert_allclose(whole[valid], steps[valid], atol=1e-5)
    masked = np.broadcast_to(~np.asarray(MASK)[:, None], whole.shape)[valid]
    assert np.isneginf(whole[valid][masked]).all()
    used = np.isneginf(whole[0]).sum(axis=-1)
    np.testing.assert_array_equal(used, np.arange(6) if options.get("mask_used") else np.zeros(6))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: SetEncoder("rwp", 8), "choose one of rpw"),
    (lambda: SetEncoder("bilstm", 7), "must be even"),
    (lambda: SetEncoder("rpw", 8, score="cosine"), "choose one of dot"),
])  # fmt: skip
def test_misuse_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(make().init, jax.random.key(0), jnp.ones((1, 2, 3)))
