"""Windows, histories and negatives: all is covered, nothing of the test leaks."""

import math
import os

import numpy as np
import pytest

from transfer_jax.data import interactions, recommend
from transfer_jax.data.interactions import Sequences
from transfer_jax.models import counting

LOG = interactions.generated(users=120).by_frequency()
SPLIT = interactions.leave_one_out(LOG)


@pytest.mark.parametrize(
    "length, window, stride", [(37, 10, 4), (31, 10, 7), (20, 10, 10), (9, 10, 3), (11, 10, 5)]
)
def test_windows_cover_a_sequence(length, window, stride):
    items = np.arange(1, length + 1)
    source = recommend.windows(Sequences.of([[99], items]), window, stride=stride)
    rows = [row[row > 0] for row in source.arrays["inputs"][1:]]
    expected = math.ceil((length - window) / stride) + 1 if length > window else 1
    assert len(rows) == expected
    assert rows[-1][0] == 1 and rows[0][-1] == length  # newest first
    assert set(np.concatenate(rows)) == set(items)
    assert all(len(row) == min(window, length) for row in rows)
    assert source.arrays["user"].tolist() == [0] + [1] * expected


def test_alignment_and_histories():
    sequences = Sequences.of([[1, 2, 3], [4], []])
    left = recommend.windows(sequences, 2, stride=1).arrays["inputs"]
    assert left.tolist() == [[2, 3], [1, 2], [4, 0]]
    right = recommend.windows(sequences, 4, side="right", minimum=1).arrays["inputs"]
    assert right.tolist() == [[0, 1, 2, 3], [0, 0, 0, 4]]
    assert recommend.histories(sequences, 3, mask_id=9).tolist() == [
        [2, 3, 9],
        [4, 9, 0],
        [9, 0, 0],
    ]
    assert recommend.histories(sequences, 3, side="right").tolist()[1] == [0, 0, 4]
    with pytest.raises(ValueError, match="nothing to train on"):
        recommend.windows(sequences, 4, minimum=4)
    copies = recommend.static_copies(recommend.windows(sequences, 4), 11).arrays
    assert copies["draw"].tolist() == list(range(len(copies["inputs"])))
    assert copies["inputs"][10].tolist() == copies["inputs"][0].tolist() == [1, 2, 3, 0]


def test_nothing_of_the_test_is_trained_on():
    """Items of a user are made unique, so that any leak would show as an equal number."""
    unique = Sequences(np.arange(1, len(LOG) + 1), LOG.sequences().offsets)
    held_out = {int(s[-1]) for s in unique} | {int(s[-2]) for s in unique}
    log = interactions.Interactions.of(LOG.users, unique.items)
    split = interactions.leave_one_out(log)
    trained = recommend.windows(split.train, 10, stride=3).arrays["inputs"]
    assert not held_out & set(trained.reshape(-1).tolist())
    for name in recommend.SPLITS:
        source = recommend.evaluation(split, name, 10)
        batch = source.take(np.arange(len(source)))
        for user, whole in enumerate(log.sequences()):
            cut = len(whole) - (1 if name == "test" else 2)
            assert batch["labels"][user] == whole[cut]
            seen = batch["seen"][user][batch["seen"][user] >= 0]
            np.testing.assert_array_equal(seen, whole[:cut])
            inputs = batch["inputs"][user][batch["inputs"][user] > 0]
            np.testing.assert_array_equal(inputs, whole[:cut][-10:])


@pytest.mark.parametrize("sampler", recommend.SAMPLERS)
def test_negatives_were_never_met(sampler):
    drawn = recommend.negatives(SPLIT, 30, sampler=sampler, seed=1)
    for user, whole in enumerate(LOG.sequences()):
        assert not set(drawn[user]) & set(whole) and len(set(drawn[user])) == 30
        assert drawn[user].min() >= 1
    mean = drawn.mean()  # items are numbered by frequency
    assert mean < 85 if sampler == "popularity" else 95 < mean < 115
    with pytest.raises(ValueError, match="popularity, uniform"):
        recommend.negatives(SPLIT, 3, sampler="random", seed=0)


def test_a_random_scorer_has_the_expected_hit_rates():
    rng = np.random.default_rng(0)
    drawn = recommend.negatives(SPLIT, 50, sampler="uniform", seed=0)
    source = recommend.evaluation(SPLIT, "test", 10, seen=False, negatives=drawn)
    runs = [
        counting.rank_scorer(lambda h: rng.random((len(h), LOG.num_items + 1)), source)
        for _ in range(10)
    ]
    for name, share in (("hr@10", 10 / LOG.num_items), ("sampled_hr@10", 10 / 51)):
        mean = np.mean([run[name] for run in runs])
        assert abs(mean - share) < 4 * np.sqrt(share * (1 - share) / (10 * len(source)))
    constant = counting.rank_scorer(lambda h: np.ones((len(h), LOG.num_items + 1)), source)
    assert constant["hr@10"] == constant["sampled_hr@10"] == 0


def test_popularity_is_a_count():
    scorer = counting.popularity(SPLIT.train, LOG.num_items)
    counts = interactions.item_counts(SPLIT.train, LOG.num_items)
    source = recommend.evaluation(SPLIT, "test", 10, seen=False)
    higher = [(counts[1:] >= counts[t]).sum() - 1 for t in SPLIT.test]
    found = counting.rank_scorer(scorer, source)["hr@10"]
    assert found == pytest.approx(np.mean(np.array(higher) < 10))


def test_logs_by_name(tmp_path, monkeypatch):
    walks = recommend.load_log("random_walks", users=5, items=7, length=6, seed=None)
    assert len(walks) == 30 and walks.num_users == 5
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id\na,x\na,y\n")
    assert recommend.load_log("table_file", path=str(path), time="").num_items == 2
    with pytest.raises(ValueError, match="nearest: ml100k"):
        recommend.load_log("ml100")
    with pytest.raises(TypeError, match="no option 'size'"):
        recommend.load_log("ml100k", size=3)
    monkeypatch.delenv("TRANSFER_JAX_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="TRANSFER_JAX_DATA"):
        recommend.load_log("ml100k")


@pytest.mark.skipif("TRANSFER_JAX_DATA" not in os.environ, reason="needs the files")
@pytest.mark.parametrize(
    "name, users, items, actions",
    [
        ("amazon_scientific_small", 2_928, 1_585, 19_712),
        ("amazon_office_5core", 4_905, 2_420, 53_258),
        ("ml100k", 943, 1_682, 100_000),
        ("amazon_beauty_bert4rec", 40_226, 54_542, 353_962),
    ],
)
def test_real_logs_have_their_published_sizes(name, users, items, actions):
    log = recommend.load_log(name)
    assert (log.num_users, log.num_items, len(log)) == (users, items, actions)
