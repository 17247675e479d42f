"""Ranking metrics against sorting, scikit-learn and closed forms, with ties, in blocks, sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.metrics import ndcg_score

from transfer_jax.metrics import ranking
from transfer_jax.training import make_mesh

RNG = np.random.default_rng(0)
USERS, ITEMS = 40, 30
SCORES = RNG.integers(0, 12, (USERS, ITEMS)).astype(np.float32)  # many ties
TARGETS = RNG.integers(0, ITEMS, USERS)
SEEN = np.where(RNG.random((USERS, 5)) < 0.3, -1, RNG.integers(0, ITEMS, (USERS, 5)))


def by_sorting(user, seen=()):
    """Places that the target can have, over all orders of tied items."""
    own = SCORES[user, TARGETS[user]]
    others = [i for i in range(ITEMS) if i != TARGETS[user] and i not in set(seen)]
    higher = sum(SCORES[user, i] > own for i in others)
    equal = sum(SCORES[user, i] == own for i in others)
    return range(higher, higher + equal + 1)


@pytest.mark.parametrize("excluded", [None, SEEN])
@pytest.mark.parametrize("ties", ranking.TIES)
def test_equals_the_mean_over_the_orders_of_ties(excluded, ties):
    where = ranking.ranks(SCORES, TARGETS, excluded=excluded)
    result = ranking.metrics(where, (1, 5), ties=ties)
    for user in range(USERS):
        places = by_sorting(user, () if excluded is None else excluded[user])
        places = {"worst": places[-1:], "best": places[:1], "average": places}[ties]
        for k in (1, 5):
            hit = np.mean([r < k for r in places])
            gain = np.mean([(r < k) / np.log2(r + 2) for r in places])
            np.testing.assert_allclose(result[f"hr@{k}"][user], hit, atol=1e-6)
            np.testing.assert_allclose(result[f"ndcg@{k}"][user], gain, atol=1e-6)
        np.testing.assert_allclose(
            result["mrr"][user], np.mean([1 / (r + 1) for r in places]), rtol=1e-5
        )


def test_average_ties_are_those_of_scikit_learn():
    truth = np.eye(ITEMS)[TARGETS]
    ours = ranking.metrics(ranking.ranks(SCORES, TARGETS), (10,), ties="average")["ndcg@10"]
    np.testing.assert_allclose(ours.mean(), ndcg_score(truth, SCORES, k=10), rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_recbole_ranks_the_same(tied, monkeypatch):
    """Equal where no scores are; where some are, RecBole takes any order of them."""
    peer = pytest.importorskip("recbole.evaluator.metrics")
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(np, "float", float, raising=False)  # a name that NumPy has given up
    ks = (1, 5, 10)
    scores = (
        SCORES
        if tied
        else RNG.permuted(np.tile(np.arange(ITEMS, dtype=np.float32), (USERS, 1)), axis=1)
    )
    best = torch.topk(torch.tensor(scores), max(ks)).indices
    hits = best == torch.tensor(TARGETS)[:, None]
    data = {"rec.topk": torch.cat([hits.int(), torch.ones(USERS, 1, dtype=torch.int)], dim=1)}
    where = ranking.ranks(scores, TARGETS)
    low, high = (
        {name: float(v.mean()) for name, v in ranking.metrics(where, ks, ties=ties).items()}
        for ties in ("worst", "best")
    )
    config = {"topk": list(ks), "metric_decimal_place": 8}
    for cls, ours in ((peer.Hit, "hr"), (peer.Recall, "hr"), (peer.NDCG, "ndcg")):
        for name, value in cls(config).calculate_metric(data).items():
            key = f"{ours}@{name.split('@')[1]}"
            assert low[key] - 1e-6 <= value <= high[key] + 1e-6
            assert tied or abs(low[key] - value) < 1e-6


def test_a_constant_score_earns_nothing_and_nan_never_wins():
    where = ranking.ranks(jnp.zeros((USERS, ITEMS)), TARGETS)
    assert float(ranking.metrics(where)["hr@10"].max()) == 0
    assert float(ranking.metrics(where, ties="best")["hr@10"].min()) == 1
    nan = ranking.ranks(jnp.full((USERS, ITEMS), jnp.nan), TARGETS)
    assert (nan.higher == ITEMS - 1).all()
    with pytest.raises(ValueError, match="average"):
        ranking.metrics(where, ties="fair")


def test_blocks_and_a_sharded_table_give_the_same_ranks():
    users = RNG.integers(-2, 3, (USERS, 4)).astype(np.float32)  # exact products: exact ties
    table = RNG.integers(-2, 3, (ITEMS, 4)).astype(np.float32)
    bias = RNG.integers(0, 2, ITEMS).astype(np.float32)
    whole = ranking.ranks(users @ table.T + bias, TARGETS, excluded=SEEN)
    for block in (7, 30, 64):
        parts = jax.jit(ranking.ranks_by_blocks, static_argnames="block")(
            users, table, TARGETS, block=block, bias=bias, excluded=SEEN
        )
        jax.tree.map(np.testing.assert_array_equal, whole, parts)

    mesh = make_mesh({"model": 2}, jax.devices()[:2])
    sharded = jax.device_put(table, NamedSharding(mesh, PartitionSpec("model")))

    def score(users, table):
        return ranking.ranks(users @ table.T + bias, TARGETS, excluded=SEEN)

    jax.tree.map(np.testing.assert_array_equal, whole, jax.jit(score)(users, sharded))


def test_the_best_k_equal_sorting_in_any_number_of_groups():
    scores = RNG.permutation(USERS * ITEMS).reshape(USERS, ITEMS).astype(np.float32)
    masked = scores.copy()
    for user in range(USERS):
        masked[user, SEEN[user][SEEN[user] >= 0]] = -np.inf
    expected = np.argsort(-masked, axis=1)[:, :4]
    for groups in (1, 4, 7):
        best, items = ranking.top_k(scores, 4, excluded=SEEN, groups=groups)
        np.testing.assert_array_equal(items, expected)
        np.testing.assert_array_equal(best, np.take_along_axis(masked, expected, axis=1))


def test_sampled_metrics_converge_to_full_ones():
    scores = RNG.normal(size=(200, 400)).astype(np.float32)
    targets = RNG.integers(0, 400, 200)
    full = float(ranking.metrics(ranking.ranks(scores, targets), (10,))["ndcg@10"].mean())
    gaps = []
    for count in (20, 100, 399):
        others = np.stack([RNG.permutation(np.delete(np.arange(400), t))[:count] for t in targets])
        candidates = np.concatenate([targets[:, None], others], axis=1)
        sampled = ranking.ranks(np.take_along_axis(scores, candidates, 1), np.zeros(200, int))
        gaps.append(float(ranking.metrics(sampled, (10,))["ndcg@10"].mean()) - full)
    assert gaps[0] > 2 * gaps[1] > 0 and abs(gaps[2]) < 1e-6


def test_a_random_scorer_has_the_expected_hit_rate():
    scores = jax.random.uniform(jax.random.key(0), (4000, 101))
    hits = ranking.metrics(ranking.ranks(scores, np.zeros(4000, int)), (10,))["hr@10"]
    expected = 10 / 101
    assert abs(float(hits.mean()) - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000)


def test_several_right_items():
    lists = np.array([[3, 1, 2, 0], [5, 6, 7, 8]])
    relevant = np.array([[1, 0, 9], [4, -1, -1]])
    result = ranking.list_metrics(lists, relevant, (3,))
    ideal = 1 + 1 / np.log2(3) + 1 / np.log2(4)
    expected = {"recall": [1 / 3, 0], "hr": [1, 0], "ndcg": [1 / np.log2(3) / ideal, 0],
                "mrr": [1 / 2, 0]}  # fmt: skip
    for name, values in expected.items():
        np.testing.assert_allclose(result[f"{name}@3"], values, rtol=1e-5)
    truth = np.isin(np.arange(10), relevant[0]).astype(float)[None]
    scores = np.zeros((1, 10))
    scores[0, lists[0]] = [4, 3, 2, 1]
    np.testing.assert_allclose(
        ranking.list_metrics(lists[:1], relevant[:1], (4,))["ndcg@4"][0],
        ndcg_score(truth, scores, k=4), rtol=1e-5,
    )  # fmt: skip


def test_the_protocol_says_what_a_number_means():
    text = str(ranking.Protocol("full", 1682, "removed"))
    assert text == (
        "leave one out, full ranking of 1,682 items, seen items removed, ties count against the "
        "right item"
    )
    assert "100 sampled negatives (popularity)" in str(ranking.Protocol("popularity", 100, "kept"))
