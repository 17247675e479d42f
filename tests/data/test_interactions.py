"""Interaction logs: numbering, cores, splits that leak nothing, negatives, and the file formats."""

import gzip
import json

import numpy as np
import pytest
from scipy import stats

from transfer_jax.data import interactions
from transfer_jax.data.interactions import Interactions, Sequences

LOG = Interactions.of(
    users=["b", "a", "b", "a", "b", "a", "c", "b"],
    items=["x", "y", "y", "x", "z", "z", "x", "w"],
    times=[1, 5, 2, 4, 2, 6, 0, 9],
)


def named(log, user):
    return [str(log.item_names[i]) for i in log.sequences()[user]]


def test_numbers_by_first_appearance_and_keeps_the_order_of_ties():
    assert LOG.user_names.tolist() == ["b", "a", "c"] and LOG.item_names[1:].tolist() == list(
        "xyzw"
    )
    assert [named(LOG, u) for u in range(3)] == [list("xyzw"), list("xyz"), ["x"]]
    assert LOG.num_items == 4 and LOG.items.min() == 1
    frequent = LOG.by_frequency()
    counts = interactions.item_counts(frequent.sequences(), 4)[1:]
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)
    assert [named(frequent, u) for u in range(3)] == [named(LOG, u) for u in range(3)]
    with pytest.raises(ValueError, match="of user a"):
        Interactions.of(["a"], ["x"], [np.nan])


def test_leave_one_out_leaks_nothing():
    log = interactions.generated(users=50)
    split = interactions.leave_one_out(log)
    for user, whole in enumerate(log.sequences()):
        assert split.train[user].tolist() == whole[:-2].tolist()
        assert (split.validation[user], split.test[user]) == (whole[-2], whole[-1])
        assert split.history("validation")[user].tolist() == whole[:-2].tolist()
        assert split.history("test")[user].tolist() == whole[:-1].tolist()
    small = interactions.leave_one_out(LOG)
    assert small.test.tolist() == [4, 3, 0] and small.train[2].tolist() == [1]
    assert small.evaluated().tolist() == [0, 1]


def test_a_temporal_split_keeps_the_future_out():
    log = interactions.generated(users=50)
    log = Interactions.of(log.users, log.items, np.random.default_rng(0).random(len(log)))
    parts = interactions.temporal_split(log, validation=0.2, test=0.1)
    assert parts["train"].times.max() < parts["validation"].times.min()
    assert parts["validation"].times.max() < parts["test"].times.min()
    assert sum(map(len, parts.values())) == len(log)
    np.testing.assert_allclose(len(parts["validation"]) / len(log), 0.2, atol=0.01)
    with pytest.raises(ValueError, match="no validation"):
        interactions.temporal_split(Interactions.of(["a"] * 9, ["x"] * 9, [1] * 9))


def test_the_core_is_a_fixed_point_and_the_largest():
    rng = np.random.default_rng(1)
    log = Interactions.of(rng.integers(0, 60, 400), rng.zipf(1.5, 400) % 50)
    core = interactions.k_core(log, users=4, items=3)
    assert np.bincount(core.users).min() >= 4 and np.bincount(core.items)[1:].min() >= 3
    pairs = set(zip(log.user_names[log.users], log.item_names[log.items]))
    kept = pairs.copy()
    while True:  # by hand: one pass after another over names
        users = {u for u, _ in kept}
        rows = [(u, i) for u, i in zip(log.user_names[log.users], log.item_names[log.items])
                if (u, i) in kept]  # fmt: skip
        bad = {u for u in users if sum(r[0] == u for r in rows) < 4}
        bad_items = {i for _, i in kept if sum(r[1] == i for r in rows) < 3}
        smaller = {(u, i) for u, i in kept if u not in bad and i not in bad_items}
        if smaller == kept:
            break
        kept = smaller
    assert kept == set(zip(core.user_names[core.users], core.item_names[core.items]))
    with pytest.raises(ValueError, match="core of 100"):
        interactions.k_core(log, users=100)


def test_padding_keeps_the_newest_items():
    lists = Sequences.of([[1, 2, 3], [], [4]])
    assert lists.padded(2).tolist() == [[2, 3], [0, 0], [4, 0]]
    assert lists.padded(4, side="left", fill=9).tolist() == [[9, 1, 2, 3], [9] * 4, [9, 9, 9, 4]]
    with pytest.raises(ValueError, match="left"):
        lists.padded(2, side="front")


def test_negatives_follow_the_weights_and_avoid_the_history():
    known = Sequences.of([[1, 2, 3]] * 6000)
    targets = np.full(6000, 4)
    weights = np.arange(13.0)  # item i with weight i; 0 is the padding
    drawn = interactions.sample_negatives(known, targets, weights, 1, seed=0)
    counts = np.bincount(drawn[:, 0], minlength=13)
    assert counts[:5].sum() == 0
    expected = 6000 * weights[5:] / weights[5:].sum()
    assert stats.chisquare(counts[5:], expected).pvalue > 1e-3

    several = interactions.sample_negatives(known, targets, weights, 5, seed=0)[:50]
    assert all(len(set(row)) == 5 for row in several.tolist())
    again = interactions.sample_negatives(
        Sequences.of([[1, 2, 3]] * 7), targets, weights, 5, seed=0
    )
    np.testing.assert_array_equal(several[:7], again)  # a user's draws are the user's own
    with pytest.raises(ValueError, match="fewer than 9"):
        interactions.sample_negatives(known, targets, weights, 9, seed=0)


def test_the_file_formats(tmp_path):
    expected = [["x", "y"], ["y"]]

    def check(log):
        assert [named(log, u) for u in range(2)] == expected
        return log

    table = tmp_path / "t.csv"
    table.write_text("who,what,when,stars\nb,y,7,1\nb,x,3,5\na,y,1,2\n")
    log = check(
        interactions.read_table(table, user="who", item="what", time="when", rating="stars")
    )
    assert log.ratings.tolist() == [5, 1, 2]
    with gzip.open(tmp_path / "r.inter.gz", "wt") as f:
        f.write("user_id:token\titem_id:token\ttimestamp:float\nb\ty\t7\nb\tx\t3\na\ty\t1\n")
    check(interactions.read_table(tmp_path / "r.inter.gz"))
    (tmp_path / "pairs.txt").write_text("b x\nb y\na y\n")
    check(interactions.read_pairs(tmp_path / "pairs.txt"))
    (tmp_path / "lists.txt").write_text("x y\ny\n")
    check(interactions.read_lists(tmp_path / "lists.txt"))
    (tmp_path / "ratings.dat").write_text("b::y::1::7\nb::x::5::3\na::y::2::1\n")
    check(interactions.read_movielens(tmp_path / "ratings.dat"))
    rows = [("b", "y", 7), ("b", "x", 3), ("a", "y", 1)]
    old = [{"reviewerID": u, "asin": i, "unixReviewTime": t, "overall": 4.0} for u, i, t in rows]
    new = [{"user_id": u, "parent_asin": i, "timestamp": t, "rating": 4.0} for u, i, t in rows]
    for records in (old, new):
        (tmp_path / "r.json").write_text("\n".join(map(json.dumps, records)))
        check(interactions.read_amazon_reviews(tmp_path / "r.json"))


def test_errors_say_where(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("user_id,item_id,timestamp\na,x,1\na,y,soon\n")
    with pytest.raises(ValueError, match="line 3: timestamp='soon'"):
        interactions.read_table(table)
    with pytest.raises(ValueError, match="no column 'item'; its columns are user_id, item_id"):
        interactions.read_table(table, item="item")
    table.write_text("user_id,item_id,timestamp\na,x\n")
    with pytest.raises(ValueError, match="line 2: 2 fields, not 3"):
        interactions.read_table(table)
    review = {"reviewerID": "a", "asin": "x", "unixReviewTime": 1, "overall": 4.0}
    (tmp_path / "r.json").write_text(json.dumps(review) + "\n{oops")
    with pytest.raises(ValueError, match="line 2 is neither JSON"):
        interactions.read_amazon_reviews(tmp_path / "r.json")
