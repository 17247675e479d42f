"""Contrastive terms of recommenders: closed forms, naive oracles, and what must not matter."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from transfer_jax.data import semantic
from transfer_jax.data.semantic import Tables
from transfer_jax.models.recommender import SequentialRecommender, encoder_stack
from transfer_jax.objectives import Variables
from transfer_jax.objectives import recommend_contrastive as rc
from transfer_jax.objectives.recommend import NextOfPrefix
from transfer_jax.training import Layout, make_mesh

N, L, M, D, B, K = 30, 8, 64, 6, 16, 4
RNG = np.random.default_rng(0)


def histories(alignment="right"):
    lengths = RNG.integers(1, L + 1, M)
    valid = np.arange(L) < lengths[:, None]
    items = np.where(valid, RNG.integers(1, N + 1, (M, L)), 0).astype(np.int32)
    return items if alignment == "left" else items[:, ::-1].copy()


def objective(*, dropout=0.3, causal=True, encoder="transformer", alignment="right", **fields):
    stack = encoder_stack(
        8, num_layers=1, num_heads=2, hidden=8, dropout=dropout, attention_dropout=dropout,
        causal=causal,
    )  # fmt: skip
    module = SequentialRecommender(
        num_items=N, max_length=L, stack=stack, head="dot", encoder=encoder, alignment=alignment,
        positions=encoder != "gru",
    )  # fmt: skip
    inner = NextOfPrefix(module=module)
    return rc.Contrasted(inner=inner, tables=TABLES, **fields)


INPUTS, LABELS = histories(), RNG.integers(1, N + 1, M).astype(np.int32)
ITEMS = RNG.normal(size=(N + 1, D)).astype(np.float32)
USERS = RNG.normal(size=(M, D)).astype(np.float32)
TABLES = Tables.of(INPUTS, LABELS, N)._replace(
    user_vectors=USERS, user_neighbours=semantic.nearest(USERS, K),
    item_neighbours=semantic.nearest_items(ITEMS, K),
)  # fmt: skip
ROWS = np.arange(0, 2 * B, 2, dtype=np.int32)
BATCH = {"inputs": INPUTS[ROWS], "labels": LABELS[ROWS], "prefix": ROWS}
FULL = objective()
KEY = jax.random.key(3)


@jax.jit
def slope(objective, variables, batch, key):
    """Gradient, metrics."""

    def loss(params):
        value, aux = objective.loss(Variables(params, variables.state), batch, key)
        return value, {name: m.value() for name, m in aux.metrics.items()}

    return jax.grad(loss, has_aux=True)(variables.params)


@functools.partial(jax.jit, static_argnames="training")
def value(objective, variables, batch, key, training=True):
    loss, aux = objective.loss(variables, batch, key if training else None)
    return loss, {name: m.value() for name, m in aux.metrics.items()}


@pytest.fixture(scope="module")
def variables():
    drawn = jax.jit(FULL.init)(jax.random.key(0), BATCH)
    keys = iter(jax.random.split(jax.random.key(1), 50))
    return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), drawn)


@pytest.fixture(scope="module")
def full(variables):
    return slope(FULL, variables, BATCH, KEY)


# -- losses ---------------------------------------------------------------------------------------


def test_nt_xent():
    first, second = RNG.normal(size=(2, 5, 3)).astype(np.float32)
    found = rc.nt_xent(first, second, temperature=0.7)
    both = np.concatenate([first, second])
    expected = np.zeros(10)
    for i in range(10):
        scores = {j: both[i] @ both[j] / 0.7 for j in range(10) if j != i}
        expected[i] = np.log(sum(np.exp(s) for s in scores.values())) - scores[(i + 5) % 10]
    np.testing.assert_allclose(found, expected.reshape(2, 5).mean(axis=0), rtol=1e-4)
    swapped = rc.nt_xent(second, first, temperature=0.7)
    np.testing.assert_allclose(found, swapped, rtol=1e-6)
    assert float(rc.nt_xent(first[:1], second[:1])[0]) == 0
    ones = jnp.ones((5, 3))
    np.testing.assert_allclose(rc.nt_xent(ones, ones), np.log(9), rtol=1e-6)
    np.testing.assert_allclose(rc.one_way_nce(ones, ones), np.log(5), rtol=1e-6)
    log_softmax = jax.nn.log_softmax(first @ second.T / 0.7)
    expected = -jnp.diagonal(log_softmax)
    np.testing.assert_allclose(rc.one_way_nce(first, second, temperature=0.7), expected, rtol=1e-5)
    mask = np.array([1, 1, 0, 1, 0])
    for loss in (rc.nt_xent, rc.one_way_nce):  # padding rows are as if they were not there
        alone = loss(first[mask > 0], second[mask > 0])
        np.testing.assert_allclose(loss(first, second, mask=mask)[mask > 0], alone, rtol=1e-5)


# -- synthesis ------------------------------------------------------------------------------------

SYNTHESISER = rc.init_synthesiser(jax.random.key(5), D, 8)
SYNTHESISER = {name: 3 * x for name, x in SYNTHESISER.items()}  # well beyond the kink
NEIGHBOURS = RNG.normal(size=(B, K, D)).astype(np.float32)
HIDDEN = RNG.normal(size=(B, K, 8)).astype(np.float32)


def test_projecting_once_is_the_paper_s_score():
    query = USERS[:B] @ SYNTHESISER["kernel"]
    keys = NEIGHBOURS @ SYNTHESISER["kernel"]
    pairs = np.concatenate([np.broadcast_to(query[:, None], keys.shape), keys], axis=-1)
    raw = pairs @ SYNTHESISER["attention"]
    expected = np.where(raw > 0, raw, 0.2 * raw)
    found = rc.synthesis_scores(SYNTHESISER, USERS[:B], NEIGHBOURS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    weights = jax.nn.softmax(expected, axis=1)
    average = (weights[..., None] * HIDDEN).sum(axis=1)
    found = rc.synthesise(SYNTHESISER, USERS[:B], NEIGHBOURS, HIDDEN)
    np.testing.assert_allclose(found, average, atol=1e-5)


def test_the_user_counts_through_the_kink_alone():
    def weights(user, slope):
        scores = rc.synthesis_scores(SYNTHESISER, user, NEIGHBOURS, slope)
        return np.array(jax.nn.softmax(scores, axis=1))

    own, other = USERS[:B], USERS[B : 2 * B]
    assert np.abs(weights(own, 0.2) - weights(other, 0.2)).max() > 0.05
    np.testing.assert_allclose(weights(own, 1.0), weights(other, 1.0), atol=1e-6)


@pytest.mark.parametrize(
    "k, alike, learns", [(K, False, True), (1, False, False), (K, True, False)]
)
def test_when_the_synthesiser_learns(k, alike, learns):
    """With one neighbour, or equal ones with equal histories, its weights change nothing."""
    neighbours, hidden = NEIGHBOURS[:, :k], HIDDEN[:, :k]
    if alike:
        neighbours, hidden = (np.repeat(x[:, :1], k, axis=1) for x in (neighbours, hidden))

    def loss(params):
        positive = rc.synthesise(params, USERS[:B], neighbours, hidden)
        return rc.nt_xent(HIDDEN[:, 0], positive).mean()

    gradient = jax.grad(loss)(SYNTHESISER)
    largest = [float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)]
    assert min(largest) > 1e-4 if learns else max(largest) < 1e-6
    if k == 1:
        assert max(largest) == 0


# -- altered histories ----------------------------------------------------------------------------


def test_substitution():
    inputs = np.tile(INPUTS, (100, 1))
    found = np.array(rc.substitute(KEY, inputs, TABLES.item_neighbours, 0.2))
    changed = found != inputs
    items = (inputs > 0).sum()
    assert not changed[inputs == 0].any()
    deviation = np.sqrt(0.2 * 0.8 / items)
    assert abs(changed.sum() / items - 0.2) < 3 * deviation  # no item is its own neighbour
    allowed = TABLES.item_neighbours[inputs[changed]]
    assert (allowed == found[changed][:, None]).any(axis=1).all()
    np.testing.assert_array_equal(rc.substitute(KEY, inputs, TABLES.item_neighbours, 0.0), inputs)
    anything = np.array(rc.substitute_anything(KEY, inputs, N, 1.0))
    assert ((anything > 0) == (inputs > 0)).all() and anything.max() == N
    masked = np.array(rc.mask_items(KEY, inputs, N + 1, 0.3))
    share = (masked == N + 1).sum() / items
    assert abs(share - 0.3) < 3 * np.sqrt(0.21 / items)
    assert (masked[masked != N + 1] == inputs[masked != N + 1]).all()


@pytest.mark.parametrize("alignment", ["left", "right"])
def test_crops_and_reordered_stretches(alignment):
    lengths = (INPUTS > 0).sum(axis=1)
    # Items numbered by their place, 1 … l.
    rows = [np.arange(1, l + 1) for l in lengths]
    pad = (lambda r, l: (0, L - l)) if alignment == "left" else (lambda r, l: (L - l, 0))
    inputs = np.stack([np.pad(r, pad(r, len(r))) for r in rows]).astype(np.int32)
    cropped = np.array(rc.crop(KEY, inputs, 0.6, alignment))
    mixed = np.array(rc.reorder(KEY, inputs, 0.6))
    moved, begins = 0, set()
    for row, length in enumerate(lengths):
        kept = max(1, int(0.6 * length + 1e-6))
        stretch = cropped[row][cropped[row] > 0]
        np.testing.assert_array_equal(stretch, stretch[0] + np.arange(kept))
        filled = slice(0, kept) if alignment == "left" else slice(L - kept, L)
        assert (cropped[row, filled] > 0).all()
        begins.add((length, stretch[0]))
        np.testing.assert_array_equal(mixed[row] > 0, inputs[row] > 0)
        np.testing.assert_array_equal(np.sort(mixed[row]), np.sort(inputs[row]))
        places = np.flatnonzero(mixed[row] != inputs[row])
        if len(places):
            moved += 1
            assert places[-1] - places[0] < kept
    assert moved > M / 4
    assert len({b for l, b in begins if l == L}) > 1


# -- objective ------------------------------------------------------------------------------------


def test_without_the_terms_the_gradient_is_the_recommender_s(variables, full):
    """Dropout is on: the terms leave the recommender's randomness alone.

    Switched off, to the last bit; of strength 0, but for the order in which XLA adds up.
    """
    own, alone = slope(FULL.inner, FULL.recommender(variables), BATCH, KEY)
    for fields, tolerance in (
        ({"inter": "none", "intra": "none"}, 0.0), ({"alpha": 0.0, "beta": 0.0}, 1e-7),
    ):  # fmt: skip
        gradient, metrics = slope(FULL.replace(**fields), variables, BATCH, KEY)
        for a, b in zip(jax.tree.leaves(gradient["recommender"]), jax.tree.leaves(own)):
            np.testing.assert_allclose(a, b, rtol=10 * tolerance, atol=tolerance)
        np.testing.assert_allclose(metrics["nll"], alone["nll"], rtol=tolerance)
        assert all((g == 0).all() for g in jax.tree.leaves(gradient["synthesiser"]))
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(full[0]["synthesiser"]))


def test_each_term_has_its_own_streams(variables, full):
    """Switching one off leaves the other's number."""
    metrics = full[1]
    for off, kept in (("intra", "inter"), ("inter", "intra")):
        alone = value(FULL.replace(**{off: "none"}), variables, BATCH, KEY)[1]
        assert off not in alone
        np.testing.assert_allclose(alone[kept], metrics[kept], rtol=1e-5)


def test_tables_are_not_trained_and_not_needed_to_recommend(variables):
    def loss(vectors):
        own = FULL.replace(tables=TABLES._replace(user_vectors=vectors))
        return own.loss(variables, BATCH, KEY)[0]

    assert (jax.jit(jax.grad(loss))(USERS) == 0).all()
    garbage = jax.tree.map(lambda x: x * 0 + 1, TABLES)
    predict = jax.jit(lambda o, v, b: o.predict(v, b))
    expected = predict(FULL.inner, FULL.recommender(variables), BATCH)
    for tables in (TABLES, garbage, None):
        changed = FULL.replace(tables=tables)
        np.testing.assert_array_equal(predict(changed, variables, BATCH), expected)
    ranked = value(changed, variables, BATCH, KEY, training=False)[1]
    assert "inter" not in ranked and "ndcg@10" in ranked
    with pytest.raises(ValueError, match="user_neighbours"):
        FULL.replace(tables=None).loss(variables, BATCH, KEY)


def test_without_dropout_the_terms_are_those_of_the_inference_pass(variables):
    """What the fused passes compute: the same encoder, on the right histories."""
    plain = objective(dropout=0.0, synthesis_dropout=0.0)
    params = {"params": variables.params["recommender"]}
    represent = jax.jit(lambda x: plain.module.apply(params, x, method="represent"))
    hidden = np.array(represent(INPUTS))
    own, others = hidden[ROWS], hidden[TABLES.user_neighbours[ROWS]]
    made = rc.synthesise(
        variables.params["synthesiser"], USERS[ROWS], USERS[TABLES.user_neighbours[ROWS]], others
    )
    for inter, positive in (("synth", made), ("mean_neighbours", others.mean(axis=1))):
        metrics = value(plain.replace(inter=inter, intra="dropout_twice"), variables, BATCH, KEY)[1]
        np.testing.assert_allclose(
            metrics["inter"], rc.nt_xent(own, positive).mean(), rtol=1e-4, err_msg=inter
        )
        np.testing.assert_allclose(metrics["intra"], rc.nt_xent(own, own).mean(), rtol=1e-4)
    cosine = own / np.linalg.norm(own, axis=1, keepdims=True)
    other = plain.replace(inter="none", intra="semantic_sub", rate=0.0, similarity="cos")
    other = other.replace(form="one_way", temperature=0.5)
    expected = rc.one_way_nce(cosine, cosine, temperature=0.5).mean()
    np.testing.assert_allclose(value(other, variables, BATCH, KEY)[1]["intra"], expected, rtol=1e-4)
    # At rate 0 nothing is left but dropout, from the same streams.
    unchanged = (
        FULL.replace(inter="none", rate=0.0),
        FULL.replace(inter="none", intra="dropout_twice"),
    )
    first, second = (value(o, variables, BATCH, KEY)[1]["intra"] for o in unchanged)
    np.testing.assert_allclose(first, second, rtol=1e-6)


def test_who_the_others_are():
    neighbours = TABLES.user_neighbours[ROWS]
    draws = [
        np.array(FULL.replace(inter="random_neighbour")._others(BATCH, jax.random.key(i)))
        for i in range(20)
    ]
    assert all((d == neighbours).any(axis=1).all() for d in draws)
    assert len({tuple(d[:, 0]) for d in draws}) > 10
    for i in range(20):
        same = np.array(FULL.replace(inter="same_target")._others(BATCH, jax.random.key(i)))
        np.testing.assert_array_equal(LABELS[same[:, 0]], BATCH["labels"])


def test_the_contrast_is_over_the_global_batch(variables, full):
    """Rows over four devices, tables over two: the numbers of one device."""
    layout = Layout(
        make_mesh({"data": 2, "fsdp": 2, "model": 2}),
        ((r"items/embedding$", PartitionSpec("model")),), min_size=1,
    )  # fmt: skip
    placed = layout.place((FULL, variables))
    tables = placed[0].tables
    assert tables.user_vectors.sharding.spec != PartitionSpec()
    assert tables.histories.sharding.spec != PartitionSpec()
    many = slope(*placed, layout.place_batch(BATCH), KEY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), many, full)


BACKBONES = {
    "sasrec_ce": {}, "bert4rec": {"causal": False},
    "gru4rec": {"encoder": "gru", "alignment": "left"},
}  # fmt: skip


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_term_on_every_backbone(backbone):
    """Traced, not run; the synthesiser is there only where it is used."""
    for inter, intra in itertools.zip_longest(rc.INTER, rc.INTRA, fillvalue="none"):
        o = objective(**BACKBONES[backbone], inter=inter, intra=intra)

        def run(rng, o=o):
            v = o.init(rng, BATCH)
            return v, o.loss(v, BATCH, rng)[1].metrics

        v, metrics = jax.eval_shape(run, KEY)
        assert ("synthesiser" in v.params) == (inter == "synth")
        names = {"nll"} | {n for n, x in (("inter", inter), ("intra", intra)) if x != "none"}
        assert set(metrics) == names
    for field in ("inter", "intra", "form", "similarity"):
        with pytest.raises(ValueError, match=f"{field}='x'; choose one of"):
            dataclasses.replace(FULL, **{field: "x"}).init(KEY, BATCH)
