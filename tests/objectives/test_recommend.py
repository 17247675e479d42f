"""Masks, losses and rankings of sequential recommendation, against counting and closed forms."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from transfer_jax.metrics import ranking
from transfer_jax.models.recommender import (
    PARTITION_RULES,
    SequentialRecommender,
    encoder_stack,
)
from transfer_jax.objectives import Variables, losses
from transfer_jax.objectives import recommend as rec
from transfer_jax.training import Layout, make_mesh

N, L = 30, 12  # items, length
RNG = np.random.default_rng(0)


def module(**fields):
    stack = encoder_stack(
        16, num_layers=1, num_heads=2, hidden=16, causal=fields.pop("causal", False)
    )
    defaults = {"num_items": N, "max_length": L + 4, "stack": stack, "round_rows_to": 8}
    return SequentialRecommender(**{**defaults, **fields})


def sequences(rows=8):
    """Left-aligned items, lengths 1 … L."""
    lengths = np.linspace(1, L, rows).round().astype(int)
    items = RNG.integers(1, N + 1, (rows, L))
    return np.where(np.arange(L) < lengths[:, None], items, 0).astype(np.int32), lengths


INPUTS, LENGTHS = sequences()
CLOZE = rec.Cloze(module=module(), share=0.4, maximum=4)
NEXT = rec.NextItem(module=module(causal=True, head="dot"))


@functools.partial(jax.jit, static_argnames="training")
def evaluate(objective, variables, batch, key, training=True):
    loss, aux = objective.loss(variables, batch, key if training else None)
    return loss, aux.metrics


@pytest.fixture(scope="module")
def variables():
    init = jax.jit(lambda o, k, b: o.init(k, b))
    drawn = init(CLOZE, jax.random.key(0), {"inputs": INPUTS})
    keys = iter(jax.random.split(jax.random.key(1), 50))  # biases that are not zero
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), drawn)


@pytest.fixture(scope="module")
def causal_variables():
    return jax.jit(NEXT.init)(jax.random.key(0), {"inputs": INPUTS})


# -- masks ----------------------------------------------------------------------------------------


def masks(inputs, share=0.4, maximum=4, last=0.0, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(inputs))
    draw = functools.partial(rec.mask_batch, mask_id=N + 1, share=share, maximum=maximum)
    return jax.tree.map(np.array, jax.jit(draw)(keys, inputs, last=last))


@pytest.mark.parametrize("share, maximum", [(0.2, 20), (0.6, 4), (0.1, 20), (0.0, 1)])
def test_as_many_masks_as_the_paper_says(share, maximum):
    length = 25
    inputs = np.tril(np.ones((length, length), np.int32)) * 7  # lengths 1 … 25
    masked, _, _, weights = masks(inputs, share, maximum)
    expected = [min(maximum, max(1, round(l * share))) for l in range(1, length + 1)]
    np.testing.assert_array_equal(weights.sum(axis=1), expected)
    np.testing.assert_array_equal((masked == N + 1).sum(axis=1), expected)
    assert (masks(inputs * 0, share, maximum)[3] == 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_hide_what_they_ask_for_and_nothing_else(side):
    inputs = INPUTS if side == "left" else INPUTS[:, ::-1]
    masked, positions, labels, weights = masks(inputs)
    for row in range(len(inputs)):
        places = positions[row][weights[row] > 0]
        assert len(set(places)) == len(places)
        np.testing.assert_array_equal(masked[row, places], N + 1)
        np.testing.assert_array_equal(labels[row][weights[row] > 0], inputs[row, places])
        others = np.setdiff1d(np.arange(L), places)
        np.testing.assert_array_equal(masked[row, others], inputs[row, others])
    # What is hidden cannot be read: other items there give the same masked row.
    other = np.where(masked == N + 1, inputs % N + 1, inputs)
    again = masks(other)
    np.testing.assert_array_equal(again[0], masked)
    assert (again[2] != labels)[weights > 0].all()
    last = masks(inputs, last=1.0)
    expected = LENGTHS - 1 if side == "left" else np.full(len(inputs), L - 1)
    np.testing.assert_array_equal(last[1][:, 0], expected)
    np.testing.assert_array_equal(last[3].sum(axis=1), 1)


def test_one_row_in_eleven_is_masked_at_its_end_and_places_are_uniform():
    rows = 11_000
    inputs = np.full((rows, L), 3, np.int32)
    _, positions, _, weights = masks(inputs, share=0.5, maximum=6, last=1 / 11)
    single = weights.sum(axis=1) == 1  # random masks are 6
    share, deviation = 1 / 11, np.sqrt(10 / 121 / rows)
    assert abs(single.mean() - share) < 3 * deviation
    counts = np.bincount(positions[~single].reshape(-1), minlength=L)
    expected = (~single).sum() / 2
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected / 2)).all()


def test_static_masks_depend_on_the_copy_alone(variables):
    draw = np.arange(88, 88 + len(INPUTS), dtype=np.int32)
    batch = {"inputs": INPUTS, "draw": draw}
    first = evaluate(CLOZE, variables, batch, jax.random.key(0))[0]
    assert first == evaluate(CLOZE, variables, batch, jax.random.key(1))[0]
    assert first != evaluate(CLOZE, variables, {**batch, "draw": draw + 11}, jax.random.key(0))[0]
    ends = {**batch, "draw": np.full_like(draw, 10)}  # the eleventh copy: the last item
    weight = evaluate(CLOZE, variables, ends, jax.random.key(0))[1]["nll"].weight
    assert weight == len(INPUTS)


# -- losses ---------------------------------------------------------------------------------------


def test_blocks_equal_the_dense_cross_entropy_and_its_gradient():
    queries = jax.random.normal(jax.random.key(0), (9, 5))
    table = jax.random.normal(jax.random.key(1), (23, 5))
    bias = jax.random.normal(jax.random.key(2), (23,)).at[jnp.array([0, 22])].set(rec.NEVER)
    labels = jnp.arange(9) + 3

    def loss(queries, table, block):
        return rec.item_cross_entropy(queries, table, bias, labels, block=block).sum()

    both = jax.value_and_grad(loss, argnums=(0, 1))
    dense = both(queries, table, 0)
    logits = queries @ table.T + bias
    np.testing.assert_allclose(dense[0], losses.cross_entropy(logits, labels).sum(), rtol=1e-6)
    for block in (1, 7, 40):
        parts = both(queries, table, block)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), dense, parts)


def test_reductions_differ_where_lengths_do(variables):
    """Token mean against row mean, and both against the masked items counted by hand."""
    by_row = CLOZE.replace(reduction="sequence")
    key = jax.random.key(3)
    token, metrics = evaluate(CLOZE, variables, {"inputs": INPUTS}, key)
    assert abs(token - evaluate(by_row, variables, {"inputs": INPUTS}, key)[0]) > 1e-3
    np.testing.assert_allclose(token, metrics["nll"].value(), rtol=1e-6)
    equal = {"inputs": np.tile(INPUTS[-1:], (4, 1))}
    fixed = CLOZE.replace(last=0.0), by_row.replace(last=0.0)
    same = [evaluate(o, variables, equal, key)[0] for o in fixed]
    np.testing.assert_allclose(*same, rtol=1e-6)
    with pytest.raises(ValueError, match="token, sequence"):
        CLOZE.replace(reduction="item").loss(variables, equal, key)


def test_a_row_of_padding_changes_nothing(variables):
    objective = CLOZE.replace(reduction="sequence")
    draw = np.arange(len(INPUTS), dtype=np.int32)
    whole = evaluate(objective, variables, {"inputs": INPUTS, "draw": draw}, jax.random.key(0))
    longer = {"inputs": np.pad(INPUTS, ((0, 1), (0, 0))), "draw": np.append(draw, 99)}
    padded = evaluate(objective, variables, longer, jax.random.key(0))
    np.testing.assert_allclose(whole[0], padded[0], rtol=1e-6)
    masked = {**longer, "mask": np.append(np.ones(len(INPUTS)), 0)}
    masked["inputs"] = np.concatenate([INPUTS, INPUTS[-1:]])
    np.testing.assert_allclose(
        whole[0], evaluate(objective, variables, masked, jax.random.key(0))[0], rtol=1e-6
    )


def test_binary_losses():
    positive, negative = jnp.array([0.3, -1.0]), jnp.array([[0.5], [2.0]])
    expected = -nn.log_sigmoid(positive) - jnp.log(1 - nn.sigmoid(negative[:, 0]))
    np.testing.assert_allclose(rec.binary_cross_entropy(positive, negative), expected, rtol=1e-5)
    assert rec.gbce_power(8, 101, 0.0) == pytest.approx(1.0)
    assert rec.gbce_power(8, 101, 1.0) == pytest.approx(0.08)

    # At t = 1 the loss, over what is drawn, is least where the sigmoid is the probability.
    items, count = 6, 2
    share = np.array([0.3, 0.25, 0.2, 0.15, 0.06, 0.04], np.float32)

    def risk(scores, beta):
        chance = count * (1 - share) / (items - 1)  # of being drawn as a negative
        return jnp.sum(share * beta * nn.softplus(-scores) + chance * nn.softplus(scores))

    optimum = jnp.log(share / (1 - share))
    slope = jax.grad(risk)
    np.testing.assert_allclose(slope(optimum, rec.gbce_power(count, items, 1.0)), 0, atol=1e-7)
    assert float(slope(optimum, 1.0).max()) < -0.01  # plain BCE with few negatives overestimates


def test_the_log_q_correction_is_unbiased():
    scores = jax.random.normal(jax.random.key(0), (20,))
    share = jax.nn.softmax(jax.random.normal(jax.random.key(1), (20,)))
    count, label = 4, 2

    def total(key, corrected):
        drawn = jax.random.choice(key, 20, (count,), p=share)
        log_expected = jnp.log(count * share[drawn]) if corrected else 0.0
        nll = rec.sampled_softmax(scores[label], scores[drawn], log_expected, drawn == label)
        return jnp.exp(nll + scores[label]) - jnp.exp(scores[label])

    keys = jax.random.split(jax.random.key(2), 20_000)
    others = float(jnp.exp(scores).sum() - jnp.exp(scores[label]))
    draws = jax.jit(jax.vmap(lambda k: total(k, True)))(keys)
    assert abs(float(draws.mean()) - others) < 4 * float(draws.std()) / np.sqrt(len(draws))
    naive = jax.jit(jax.vmap(lambda k: total(k, False)))(keys)
    assert abs(float(naive.mean()) - others) > 20 * float(naive.std()) / np.sqrt(len(naive))


def test_bpr_max():
    positive = jnp.array([0.3, -1.0])
    negative = jnp.array([[0.5, -0.2, 1.1], [2.0, 0.0, -3.0]])
    share = nn.softmax(negative, axis=-1)
    ranking = -jnp.log((share * nn.sigmoid(positive[:, None] - negative)).sum(-1))
    expected = ranking + 0.7 * (share * negative**2).sum(-1)
    np.testing.assert_allclose(rec.bpr_max(positive, negative, 0.7), expected, rtol=1e-5)
    one = rec.bpr_max(positive, negative[:, :1], 0.0)
    np.testing.assert_allclose(one, nn.softplus(negative[:, 0] - positive), rtol=1e-5)  # BPR
    # A negative that is the right item counts in neither term, and its slope is a number.
    hits = jnp.array([[False, True, False]] * 2)
    without = negative[:, jnp.array([0, 2])]

    def hit(negative):
        return rec.bpr_max(positive, negative, 0.7, hits).sum()

    value, slope = jax.value_and_grad(hit)(negative)
    np.testing.assert_allclose(value, rec.bpr_max(positive, without, 0.7).sum(), rtol=1e-6)
    assert np.isfinite(slope).all() and (slope[:, 1] == 0).all() and (slope[:, 0] != 0).all()


def test_next_item_losses_agree_where_they_must(causal_variables):
    key, batch = jax.random.key(0), {"inputs": INPUTS}
    exact, metrics = evaluate(NEXT, causal_variables, batch, key)
    assert metrics["nll"].weight == np.maximum(LENGTHS - 1, 0).sum()
    np.testing.assert_allclose(exact, np.log(N), atol=0.05)  # nothing is learned yet
    uniform = NEXT.replace(kind="sampled", negatives=4000)
    near = evaluate(uniform, causal_variables, batch, key)[0]
    np.testing.assert_allclose(near, exact, atol=0.03)
    weights = jnp.zeros(NEXT.module.rows).at[1 : N + 1].set(jnp.arange(1.0, N + 1))
    popular = evaluate(uniform.replace(weights=weights), causal_variables, batch, key)[0]
    np.testing.assert_allclose(popular, exact, atol=0.06)
    plain = evaluate(NEXT.replace(kind="bce", negatives=3), causal_variables, batch, key)[0]
    loose = NEXT.replace(kind="gbce", negatives=3, calibration=0.0)
    np.testing.assert_allclose(plain, evaluate(loose, causal_variables, batch, key)[0], rtol=1e-6)
    with pytest.raises(ValueError, match="causal=True"):
        NEXT.replace(module=module()).loss(causal_variables, batch, key)
    with pytest.raises(ValueError, match="causal=False"):
        CLOZE.replace(module=NEXT.module).loss(causal_variables, batch, key)


# -- evaluation -----------------------------------------------------------------------------------


def evaluation_batch():
    users = 10
    histories, lengths = sequences(users)
    inputs = histories.copy()
    inputs[np.arange(users), np.minimum(lengths, L - 1)] = N + 1
    return {
        "inputs": inputs,
        "labels": RNG.integers(1, N + 1, users).astype(np.int32),
        "seen": np.where(histories > 0, histories, -1),
        "negatives": RNG.integers(1, N + 1, (users, 5)).astype(np.int32),
        "mask": np.array([1.0] * 8 + [0.0, 0.0], np.float32),
    }


def test_evaluation_is_the_ranking_of_all_items(variables):
    batch = evaluation_batch()
    loss, metrics = evaluate(CLOZE, variables, batch, None, training=False)
    scores = np.array(jax.jit(CLOZE.predict)(variables, batch))
    assert (scores[:, [0, *range(N + 1, CLOZE.module.rows)]] == np.float32(rec.NEVER)).all()
    places, sampled = [], []
    for user in range(8):
        label, row = batch["labels"][user], scores[user]
        others = set(range(1, N + 1)) - set(batch["seen"][user]) - {label}
        places.append(sum(row[i] > row[label] for i in others))
        sampled.append(sum(row[i] >= row[label] for i in batch["negatives"][user]))
    assert metrics["hr@10"].value() == np.mean(np.array(places) < 10)
    np.testing.assert_allclose(
        metrics["mrr"].value(), np.mean(1 / (np.array(places) + 1)), rtol=1e-5
    )
    np.testing.assert_allclose(
        metrics["sampled_mrr"].value(), np.mean(1 / (np.array(sampled) + 1)), rtol=1e-5
    )
    items = scores[:8, 1 : N + 1]
    nll = losses.cross_entropy(items, batch["labels"][:8] - 1).mean()
    np.testing.assert_allclose([loss, metrics["nll"].value()], nll, rtol=1e-5)
    blocks = evaluate(CLOZE.replace(block=8), variables, batch, None, training=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), (loss, metrics), blocks)
    with pytest.raises(ValueError, match="labels"):
        CLOZE.loss(variables, {"inputs": INPUTS}, None)


def test_sixteen_bits_end_before_the_scores():
    """The encoder may compute in bfloat16; products with the table in it would tie items."""
    stack = encoder_stack(16, num_layers=1, num_heads=2, hidden=16, dtype=jnp.bfloat16)
    objective = rec.Cloze(module=module(num_items=3000, round_rows_to=1, stack=stack))
    batch = {"inputs": RNG.integers(1, N + 1, (64, L)).astype(np.int32)}
    drawn = jax.jit(objective.init)(jax.random.key(0), batch)
    scores = jax.jit(objective.predict)(drawn, batch)
    table = np.array(drawn.params["items"]["embedding"], np.float64)
    query = np.array(jax.jit(objective.query)(drawn, batch), np.float64)
    exact = np.argsort(-(query @ table.T)[:, 1:3001], axis=1)[:, :10] + 1

    def agreement(lists):
        return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(np.array(lists), exact)])

    assert agreement(ranking.top_k(scores, 10)[1]) > 0.999
    assert agreement(ranking.top_k(scores.astype(jnp.bfloat16), 10)[1]) < 0.999


# -- placement ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cloze", "sampled"])
def test_a_sharded_step_is_the_single_one(name, variables, causal_variables):
    objective, own = {
        "cloze": (CLOZE, variables),
        "sampled": (NEXT.replace(kind="sampled", negatives=6), causal_variables),
    }[name]

    @jax.jit
    def step(params, batch):
        return jax.value_and_grad(
            lambda p: objective.loss(Variables(p, {}), batch, jax.random.key(5))[0]
        )(params)

    @jax.jit
    def test(params, batch):
        return objective.loss(Variables(params, {}), batch, None)[1].metrics

    layout = Layout(make_mesh({"data": 2, "model": 4}), PARTITION_RULES)
    params = layout.place(own.params)
    assert params["items"]["embedding"].sharding.spec == PartitionSpec("model")
    one = step(own.params, {"inputs": INPUTS})
    many = step(params, layout.place_batch({"inputs": INPUTS}))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-7), one, many)
    if name == "sampled":
        return
    batch = evaluation_batch()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        test(own.params, batch), test(params, layout.place_batch(batch)),
    )  # fmt: skip
