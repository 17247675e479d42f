"""UniPT against plain NumPy, and what makes it parallel: masks, permutations, perturbations."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.nn import unipt
from transfer_jax.nn.recurrent import GRU
from transfer_jax.nn.unipt import (
    GeneralisedPooling,
    LadderSide,
    ScalarMix,
    UniPT,
    interaction_weights,
    pool_to_anchor,
    pooling_weights,
    unipt_config,
)
from transfer_jax.trees import path_str

BATCH, TOKENS, WIDTH, SIDE, LAYERS = 2, 5, 6, 4, 3
LENGTHS = jnp.array([5, 3])


def draw(module, *inputs, **options):
    """Parameters in general position, no norm at its initial value; nothing is compiled."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs, **options)["params"]
    rng = np.random.default_rng(7)

    def leaf(path, x):
        return jnp.asarray(path_str(path).endswith("scale") + 0.4 * rng.normal(size=x.shape), "f4")

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@pytest.fixture(scope="module")
def states():
    keys = jax.random.split(jax.random.key(1), LAYERS + 1)
    return tuple(jax.random.normal(k, (BATCH, TOKENS, WIDTH)) for k in keys)


@pytest.fixture(scope="module")
def text(states):
    module = UniPT(unipt_config("vse_text", features=SIDE, outputs=7))
    return module, draw(module, states, lengths=LENGTHS)


@functools.partial(jax.jit, static_argnums=0, static_argnames="mutable")
def apply(module, params, *inputs, mutable=False, **options):
    return module.apply({"params": params}, *inputs, mutable=mutable, **options)


def run(module, params, *inputs, **options):
    y, sown = apply(module, params, *inputs, mutable=("intermediates",), **options)
    return np.asarray(y), np.asarray(sown["intermediates"]["confidence"][0])


@pytest.mark.parametrize(
    "variant, shapes, count",
    [
        ("vse_text", [(1, 3, 768)] * 13, 5_921_281),
        ("vse_image", [(1, 8, 8, 256), (1, 4, 4, 512), (1, 2, 2, 1024), (1, 1, 1, 2048)],
         6_433_537),
        ("clip4clip", [(1, 3, 768)] * 13 + [(1, 1, 512)], 5_644_289),
        ("clip4clip", [(1, 3, 512)] * 13 + [(1, 1, 512)], 3_940_353),
        ("clip_vil", [(1, 3, 768)] * 13, 4_736_641),
    ],
)  # fmt: skip
def test_the_variants_have_the_published_numbers_of_parameters(variant, shapes, count):
    inputs = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    drawn = jax.eval_shape(UniPT(unipt_config(variant)).init, jax.random.key(0), inputs)
    assert sum(x.size for x in jax.tree.leaves(drawn["params"])) == count
    if variant == "vse_text":  # 13 maps, but 12 layers are merged
        maps = {k for k in drawn["params"] if k.startswith("map_") and "norm" not in k}
        assert maps == {"map_anchor", *(f"map_{i}" for i in range(12))}


def layer_norm(x, p):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * p["scale"] + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def by_hand(states, lengths, p, project, up):
    """One example at a time, without padding, in the order of the paper's section 3."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
    rows = []
    for b, n in enumerate(lengths):
        h = [np.asarray(s[b, :n], np.float64) for s in states]
        z = [layer_norm(dense(x, p[f"map_{i}"]), p[f"map_norm_{i}"]) for i, x in enumerate(h[:-1])]
        anchor = layer_norm(dense(h[-1], p["map_anchor"]), p["map_norm_anchor"])
        merged, scores = [], []
        for layer in z:
            a = np.zeros((n, n))
            for i in range(n):
                positive = np.maximum(layer @ anchor[i], 0)
                a[i] = positive / max(positive.sum(), 1e-6)
                a[i, i] += 1
            merged.append(a @ layer)
            scores.append(dense(anchor.mean(0) * layer.mean(0), p["gate"])[0])
        c = np.exp(scores) / np.exp(scores).sum()
        u = sum(w * x for w, x in zip(c, merged))
        if project == "mlp":
            u = np.maximum(dense(u, p["project_hidden"]), 0)
        y = anchor + layer_norm(dense(u, p["project"]), p["project_norm"])
        y = dense(np.maximum(y, 0) if up == "relu_linear" else y, p["up"])
        rows.append((y, c))
    return rows


@pytest.mark.parametrize("variant", ["vse_text", "clip_vil"])
def test_against_loops_over_examples_without_padding(states, variant):
    config = unipt_config(variant, features=SIDE, outputs=7)
    module = UniPT(config)
    params = draw(module, states, lengths=LENGTHS)
    y, confidence = run(module, params, states, lengths=LENGTHS)
    expected = by_hand(states, LENGTHS, params, config.project, config.up)
    for b, (rows, c) in enumerate(expected):
        np.testing.assert_allclose(y[b, : len(rows)], rows, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(confidence[b], c, rtol=2e-4)
    stacked = jnp.stack(states, axis=1)
    np.testing.assert_array_equal(run(module, params, stacked, lengths=LENGTHS)[0], y)


def test_what_lies_in_the_padding_reaches_no_valid_token(states, text):
    module, params = text
    dirty = tuple(s.at[1, 3:].set(50.0) for s in states)
    longer = tuple(jnp.pad(s, ((0, 0), (0, 2), (0, 0)), constant_values=-9.0) for s in states)
    y, c = run(module, params, states, lengths=LENGTHS)
    for other in (dirty, longer):
        again, same = run(module, params, other, lengths=LENGTHS)
        np.testing.assert_allclose(again[0, :5], y[0], atol=1e-5)
        np.testing.assert_allclose(again[1, :3], y[1, :3], atol=1e-5)
        np.testing.assert_allclose(same, c, atol=1e-5)
    assert np.isfinite(run(module, params, states, lengths=jnp.array([5, 0]))[0]).all()


def permuted(params, order, prefix):
    """The parameters of layers moved to the places that ``order`` gives them."""
    moved = dict(params)
    for new, old in enumerate(order):
        for name in prefix:
            moved[f"{name}{new}"] = params[f"{name}{old}"]
    return moved


def test_layers_are_parallel_and_a_ladder_is_not(states, text):
    module, params = text
    order = [2, 0, 1]
    y, c = run(module, params, states)
    shuffled = (*(states[i] for i in order), states[-1])
    again, moved = run(module, permuted(params, order, ["map_", "map_norm_"]), shuffled)
    np.testing.assert_allclose(again, y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moved, c[:, order], rtol=1e-4)

    ladder = LadderSide(4, num_heads=2)
    params = draw(ladder, states)
    y = apply(ladder, params, states)
    other = apply(ladder, permuted(params, order, ["down_"]), shuffled)
    assert np.abs(other - y).max() > 0.01


def test_a_layer_changes_its_own_confidence_and_no_other_score(states, text):
    module, params = text
    _, before = run(module, params, states)
    changed = (states[0], states[1] + 1.0, *states[2:])
    _, after = run(module, params, changed)
    np.testing.assert_allclose(before.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(after[:, 0] / after[:, 2], before[:, 0] / before[:, 2], rtol=1e-5)
    assert np.abs(after[:, 1] - before[:, 1]).min() > 1e-4
    gate = {"kernel": jnp.zeros((SIDE, 1)), "bias": jnp.ones(1)}
    _, uniform = run(module, {**params, "gate": gate}, states)
    np.testing.assert_allclose(uniform, 1 / LAYERS, rtol=1e-6)


def test_rows_of_the_interaction_sum_to_one_or_zero():
    q, c = jax.random.normal(jax.random.key(3), (2, 2, 4, SIDE))
    c = c.at[0].set(-jnp.abs(c[0])).at[1, 3].set(100.0)
    q = q.at[0, 0].set(1.0)  # no positive product
    mask = jnp.array([[1.0, 1, 1, 1], [1, 1, 1, 0]])
    w = interaction_weights(q, c, mask)
    sums = np.asarray(w.sum(-1))
    assert sums[0, 0] == 0
    np.testing.assert_allclose(sums[sums > 0], 1, rtol=1e-6)
    assert not w[1, :, 3].any()
    softmax = interaction_weights(q, c, mask, "softmax")
    np.testing.assert_allclose(softmax.sum(-1), 1, rtol=1e-6)
    assert not softmax[1, :, 3].any()


def test_many_small_products_are_added_in_float32():
    q = jnp.full((1, 1, 2), 0.01, jnp.bfloat16)
    w = interaction_weights(q, jnp.full((1, 5000, 2), 0.01, jnp.bfloat16))
    assert w.dtype == jnp.float32
    np.testing.assert_allclose(w, 1 / 5000, rtol=1e-3)


@pytest.mark.parametrize(
    "change",
    [{"weights": "softmax"}, {"identity": False}, {"confidence": "layer"}],
    ids=lambda c: next(iter(c)),
)
def test_ablations_are_other_functions_of_the_same_parameters(states, text, change):
    module, params = text
    config = unipt_config("vse_text", features=SIDE, outputs=7, **change)
    y, c = run(UniPT(config), params, states)
    before, weights = run(module, params, states)
    assert np.abs(y - before).max() > 1e-3
    assert ("confidence" in change) == bool(np.abs(c - weights).max() > 1e-4)


# -- maps -------------------------------------------------------------------------------------


def test_pixels_of_a_block_weigh_two_or_one_together():
    scores = jax.random.normal(jax.random.key(0), (2, 3, 2, 3, 2)).at[0, 0, :, 0].set(-1.0)
    w = np.asarray(pooling_weights(scores, 2)).sum(axis=(2, 4))
    assert w[0, 0, 0] == 1
    assert set(np.round(w, 5).ravel()) == {1.0, 2.0}


def test_a_constant_stage_is_pooled_to_twice_its_average():
    stage = jnp.broadcast_to(jnp.array([1.0, 2.0, 3.0]), (1, 8, 4, 3))
    pooled = pool_to_anchor(stage, jnp.ones((1, 2, 1, 3)))
    np.testing.assert_allclose(pooled, 2 * stage[:, ::4, ::4], rtol=1e-6)
    with pytest.raises(ValueError, match="9 x 4 pixels cannot be pooled to the grid 2 x 1"):
        pool_to_anchor(jnp.ones((1, 9, 4, 3)), jnp.ones((1, 2, 1, 3)))


def test_pooling_against_loops():
    keys = jax.random.split(jax.random.key(0))
    stage = np.asarray(jax.random.normal(keys[0], (1, 4, 6, 3)))
    anchor = np.abs(jax.random.normal(keys[1], (1, 2, 3, 3)))
    expected = np.zeros((1, 2, 3, 3))
    for i, j in np.ndindex(2, 3):
        block = stage[0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(4, 3)
        positive = np.maximum(block @ anchor[0, i, j], 0)
        expected[0, i, j] = (positive / max(positive.sum(), 1e-6) + 1 / 4) @ block
    np.testing.assert_allclose(pool_to_anchor(stage, anchor), expected, rtol=1e-4, atol=1e-6)


def test_maps_are_normed_by_the_batch_in_training_and_by_its_average_otherwise():
    stages = tuple(
        3 + 2 * jax.random.normal(jax.random.key(i), (4, s, s, c))
        for i, (s, c) in enumerate([(4, 3), (2, 5)])
    )
    module = UniPT(unipt_config("vse_image", features=4, outputs=6))
    variables = jax.jit(module.init)(jax.random.key(0), stages)
    train = jax.jit(lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"]))
    y, updated = train(variables, stages)
    assert y.shape == (4, 4, 6)
    state = variables["batch_stats"]["map_norm_anchor"], updated["batch_stats"]["map_norm_anchor"]
    z = stages[1] @ variables["params"]["map_anchor"]["kernel"]
    z = z + variables["params"]["map_anchor"]["bias"]
    np.testing.assert_allclose(
        state[1]["mean"], 0.9 * state[0]["mean"] + 0.1 * z.mean((0, 1, 2)), rtol=1e-4, atol=1e-5
    )
    assert np.abs(jax.jit(module.apply)(variables, stages) - y).max() > 1e-2


# -- hosts ------------------------------------------------------------------------------------


def test_clip4clip_adds_to_the_embedding_and_reads_the_own_token(states):
    embedding = jax.random.normal(jax.random.key(5), (BATCH, 1, WIDTH))
    inputs = (*states, embedding)
    module = UniPT(unipt_config("clip4clip", features=SIDE))
    params = draw(module, inputs)
    silent = {**params, "up": jax.tree.map(jnp.zeros_like, params["up"])}
    np.testing.assert_array_equal(apply(module, silent, inputs), embedding)

    positions = LENGTHS - 1
    options = {"lengths": LENGTHS, "positions": positions}
    y, c = run(module, params, inputs, **options)
    dirty = (*(s.at[1, 3:].set(9.0) for s in states), embedding)
    np.testing.assert_allclose(run(module, params, dirty, **options)[0], y, atol=1e-5)

    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    relu = lambda x: np.maximum(np.asarray(x, np.float64), 0)  # noqa: E731
    for b, n in enumerate(LENGTHS):
        anchor = dense(relu(embedding[b, 0]), p["map_anchor"])
        u = 0
        for i, s in enumerate(states):
            z = dense(relu(s[b, :n]), p[f"map_{i}"])
            w = relu(z @ anchor)
            u = u + c[b, i] * (w / max(w.sum(), 1e-6) @ z + z[n - 1])
        expected = embedding[b, 0] + dense(relu(u), p["up"])
        np.testing.assert_allclose(y[b, 0], expected, rtol=1e-4, atol=1e-5)


def test_the_decoders_side_attends_to_the_encoders(states):
    encoder = UniPT(unipt_config("mdetr_encoder", features=SIDE))
    context = apply(encoder, draw(encoder, states), states, lengths=LENGTHS)
    assert context.shape == (BATCH, TOKENS, SIDE)
    queries = tuple(s[:, :2] for s in states)
    decoder = UniPT(unipt_config("mdetr_decoder", features=SIDE))
    params = draw(decoder, queries, context=context)

    def outputs(context):
        given = {"context": context, "context_lengths": LENGTHS}
        return np.asarray(apply(decoder, params, queries, **given))

    y = outputs(context)
    assert y.shape == (LAYERS + 1, BATCH, 2, WIDTH)
    np.testing.assert_allclose(outputs(context.at[1, 3:].set(7.0)), y, atol=1e-5)
    assert (np.abs(outputs(-context) - y).max(axis=(1, 2, 3)) > 1e-3).all()
    with pytest.raises(ValueError, match="needs a context"):
        decoder.apply({"params": params}, queries)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: unipt_config("vse_txt"), "did you mean 'vse_text'"),
        (lambda: unipt_config("vse_text", weights="relus"), "weights='relus'; choose one of"),
        (lambda: UniPT(unipt_config("vse_text")).init(jax.random.key(0), (jnp.ones((1, 2, 3)),)),
         "1 states: the anchor and a layer"),
        (lambda: UniPT(unipt_config("vse_text")).init(
            jax.random.key(0), (jnp.ones((1, 3, 3)), jnp.ones((1, 2, 3)))), "must agree"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


# -- other readers, pooling -------------------------------------------------------------------


def test_the_ladders_gates_choose_between_the_state_and_the_side(states):
    ladder = LadderSide(4, num_heads=2)
    params = draw(ladder, states)

    def moved(alpha, i):
        p = {**params, "alpha": jnp.full(LAYERS, alpha)}
        other = [s + (j == i) for j, s in enumerate(states)]
        y = [apply(ladder, p, tuple(x)) for x in (states, other)]
        return float(jnp.abs(y[0] - y[1]).max())

    assert moved(9.0, 0) < 1e-6 < 1e-3 < moved(9.0, LAYERS)  # only the last state
    assert moved(-9.0, LAYERS) < 1e-6 < 1e-3 < moved(-9.0, 0)  # only the first
    mixed = ScalarMix().apply({"params": {"weights": jnp.zeros(LAYERS + 1)}}, states)
    np.testing.assert_allclose(mixed, sum(states) / (LAYERS + 1), rtol=1e-5)


def test_pooled_features_are_weighted_sums_of_sorted_ones():
    x = jax.random.normal(jax.random.key(2), (1, 4, 3))
    module = GeneralisedPooling(features=6)
    params = draw(module, x)
    y = np.asarray(apply(module, params, x))
    padded = jnp.concatenate([x[:, :2], jnp.full((1, 3, 3), 9.0), x[:, 2:]], axis=1)
    mask = jnp.array([[1.0, 1, 0, 0, 0, 1, 1]])
    np.testing.assert_allclose(apply(module, params, padded, mask), y, atol=1e-5)
    np.testing.assert_allclose(apply(module, params, x[:, ::-1]), y, atol=1e-5)
    assert not apply(module, params, x, jnp.zeros((1, 4))).any()

    ranks = np.arange(4)[:, None] / 10_000 ** (np.arange(0, 6, 2) / 6)
    codes = np.stack([np.sin(ranks), np.cos(ranks)], -1).reshape(1, 4, 6)
    there = apply(GRU(6), params["forward"], codes)
    back = apply(GRU(6), params["backward"], codes[:, ::-1])[:, ::-1]
    scores = (there + back)[0] / 2 @ params["score"]["kernel"][:, 0]
    weights = jax.nn.softmax(scores / 0.1)
    expected = weights @ -np.sort(-np.asarray(x[0]), axis=0)
    np.testing.assert_allclose(y[0], expected, rtol=1e-4, atol=1e-5)


def test_dense_layers_start_as_those_of_pytorch():
    class One(nn.Module):
        @nn.compact
        def __call__(self, x):
            return unipt.linear(x.shape[-1], 400, name="layer")(x)

    layer = One().init(jax.random.key(0), jnp.ones((1, 25)))["params"]["layer"]
    for x in layer.values():
        assert 0.19 < float(jnp.abs(x).max()) <= 0.2
        assert abs(float(x.std()) - 0.2 / 3**0.5) < 0.01
