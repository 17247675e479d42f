"""Impressions: the funnel's probabilities, choices of rows, Coat, Ali-CCP as released, hashing."""

import dataclasses
import os

import numpy as np
import pytest

from transfer_jax.data import conversions
from transfer_jax.data.conversions import (
    ALICPP_SLOTS,
    Field,
    Hashing,
    Impressions,
    Vocabularies,
    count_features,
    read_alicpp,
)
from transfer_jax.data.pipeline import Pipeline

needs_data = pytest.mark.skipif(
    not os.environ.get("TRANSFER_JAX_DATA"), reason="needs TRANSFER_JAX_DATA"
)


def test_the_funnel_draws_from_its_probabilities():
    parts = conversions.funnel(train=40_000, test=40_000)
    train = parts["train"]
    clicks, bought = train.labels.T
    assert (bought == clicks * train.outcomes).all()
    # Calibrated in every tenth of the probabilities.
    for rows in np.array_split(np.argsort(train.truth), 10):
        error = 4 * np.sqrt(0.25 / len(rows))
        assert abs(train.outcomes[rows].mean() - train.truth[rows].mean()) < error
    # Those who click would buy more often: clicked rows are no sample.
    assert train.truth.mean() == pytest.approx(0.25, abs=0.02)
    assert train.truth[clicks > 0].mean() > 0.55
    assert [f.size for f in train.fields] == [2001, 1001, 301, 101, 31]
    assert train.ids.min() == 1 and (train.ids < [f.size for f in train.fields]).all()
    again = conversions.funnel(train=40_000, test=40_000)["test"]
    np.testing.assert_array_equal(again.ids, parts["test"].ids)
    assert not np.array_equal(train.ids, parts["test"].ids)


CLICKS = (np.random.default_rng(0).random(4000) < 0.25).astype(np.float32)
BOUGHT = CLICKS * (np.arange(4000) % 3 == 0)


def test_choices_of_rows():
    clicked = np.flatnonzero(CLICKS)
    rows = conversions.with_missing_as_negative(CLICKS, 0.2, seed=1)
    missing = rows[CLICKS[rows] == 0]
    assert len(missing) == round(0.2 * (4000 - len(clicked))) == len(set(missing))
    np.testing.assert_array_equal(rows[CLICKS[rows] > 0], clicked)
    assert len(conversions.with_missing_as_negative(CLICKS, 1.0, 0)) == 4000
    again = conversions.with_missing_as_negative(CLICKS, 0.2, seed=1)
    np.testing.assert_array_equal(again, rows)
    assert not np.array_equal(conversions.with_missing_as_negative(CLICKS, 0.2, seed=2), rows)

    rows, counts = np.unique(conversions.oversampled(CLICKS, BOUGHT, 3), return_counts=True)
    np.testing.assert_array_equal(rows, clicked)
    np.testing.assert_array_equal(counts, np.where(BOUGHT[clicked] > 0, 3, 1))
    with pytest.raises(ValueError, match="share=2"):
        conversions.with_missing_as_negative(CLICKS, 2, 0)


def test_rejection_gives_the_clicked_rows_the_distribution_of_impressions():
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 4, 200_000)
    rates = np.array([0.1, 0.2, 0.4, 0.8])[kind]
    clicks = rng.random(200_000) < rates
    rows, c = conversions.rejection_sampled(clicks, rates, seed=0)
    assert c == pytest.approx(0.1)
    before = np.bincount(kind[clicks]) / clicks.sum()
    after = np.bincount(kind[rows]) / len(rows)
    assert before.max() > 0.5 and np.abs(after - 0.25).max() < 0.02
    assert clicks[rows].all() and len(set(rows)) == len(rows)


@needs_data
@pytest.mark.parametrize("exclude", [False, True])
def test_coat(exclude):
    parts = conversions.coat(exclude_test=exclude)
    train, test = parts["train"], parts["test"]
    assert len(train) == 87_000 - 4_640 * exclude and len(test) == 4_640
    assert train.labels[:, 0].sum() == 6_960 - 366 * exclude
    if not exclude:
        assert train.labels[:, 1].sum() / 6_960 == pytest.approx(0.274, abs=1e-3)
    assert test.outcomes.mean() == pytest.approx(0.185, abs=1e-3)
    assert test.labels[:, 0].all()
    np.testing.assert_array_equal(test.labels[:, 1], test.outcomes)
    sizes = {"user": 291, "item": 301, "age": 7, "jacket": 17, "colour": 14, "front_page": 3}
    assert {f.name: f.size for f in train.fields}.items() >= sizes.items()
    # A user's fields belong to the user, a coat's to the coat.
    for side, columns in ((0, slice(2, 6)), (1, slice(6, 10))):
        known = np.unique(train.ids[:, side : side + 1].copy(), axis=0)
        pairs = np.concatenate([train.ids[:, side : side + 1], train.ids[:, columns]], 1)
        assert len(np.unique(pairs, axis=0)) == len(known)


@needs_data
def test_the_sample_of_alicpp_has_the_released_fields():
    parts = conversions.alicpp_sample()
    assert {k: len(v) for k, v in parts.items()} == {"train": 100, "validation": 50, "test": 50}
    assert [int(p.labels[:, 0].sum()) for p in parts.values()] == [7, 3, 2]
    assert [int(p.labels[:, 1].sum()) for p in parts.values()] == [1, 1, 1]
    train = parts["train"]
    assert tuple(f.name for f in train.fields) == tuple(ALICPP_SLOTS)
    assert train.ids.min() == 1 and (train.ids < [f.size for f in train.fields]).all()
    column = list(ALICPP_SLOTS).index("109_14")
    assert train.weights[0, column] == np.float32(0.4734) and train.weights[0, 0] == 1


# -- the released files ---------------------------------------------------------------------------


def listed(*features):
    return "\x01".join(f"{field}\x02{feature}\x03{value}" for field, feature, value in features)


@pytest.fixture
def released(tmp_path):
    tags = [("109_14", f"t{i}", 0.1 * (i + 1)) for i in range(5)]
    blocks = [
        ("aaa", listed(("101", "u1", 1), ("121", "7", 1), *tags)),
        ("bbb", listed(("101", "u2", 1), ("109_14", "t0", 0.5))),
    ]
    rows = [
        ("1", 0, 0, "aaa", listed(("205", "i1", 1), ("508", "x", 0.25))),
        ("2", 1, 1, "bbb", listed(("205", "i2", 1))),
        ("3", 0, 1, "aaa", listed(("205", "i3", 1))),  # bought without a click
        ("4", 1, 0, "aaa", listed(("205", "i1", 1), ("999", "unknown field", 1))),
    ]
    skeleton, common = tmp_path / "skeleton.csv", tmp_path / "common.csv"
    skeleton.write_text("".join(f"{n},{y},{z},{b},2,{x}\n" for n, y, z, b, x in rows))
    common.write_text("".join(f"{b},3,{x}\n" for b, x in blocks))
    return skeleton, common


def test_released_files_are_joined_by_their_blocks(released, tmp_path):
    sizes = dict.fromkeys(ALICPP_SLOTS, 1000)
    read = read_alicpp(*released, Hashing(sizes), slots={"109_14": 3})
    np.testing.assert_array_equal(read.labels, [[0, 0], [1, 1], [1, 0]])
    np.testing.assert_array_equal(read.index, [0, 1, 0])
    batch = read.take(np.arange(3))["inputs"]
    start = {f.name: sum(g.slots for g in read.fields[:i]) for i, f in enumerate(read.fields)}
    user, tags, item = start["101"], slice(start["109_14"], start["109_14"] + 3), start["205"]
    encode = Hashing(sizes).encode
    np.testing.assert_array_equal(batch["ids"][:, user], encode("101", ["u1", "u2", "u1"]))
    np.testing.assert_array_equal(batch["ids"][:, item], encode("205", ["i1", "i2", "i1"]))
    # The three largest of five, in their order; the rest of a short list is padding.
    np.testing.assert_array_equal(batch["ids"][0, tags], encode("109_14", ["t2", "t3", "t4"]))
    np.testing.assert_allclose(batch["weights"][:2, tags], [[0.3, 0.4, 0.5], [0.5, 0, 0]])
    assert batch["weights"][0, start["508"]] == 0.25 and batch["ids"][1, start["508"]] == 0

    # What is kept on disk is the same, and so is what a batch has if common rows are given once.
    read.save(tmp_path / "kept")
    kept = Impressions.load(tmp_path / "kept")
    assert kept.fields == read.fields and isinstance(kept.ids, np.memmap)
    again = kept.take(np.arange(3))["inputs"]
    for name, x in batch.items():
        np.testing.assert_array_equal(again[name], x)
        np.testing.assert_array_equal(kept[2]["inputs"][name], x[2])
    grouped = dataclasses.replace(kept, groups=3)
    given = Pipeline(grouped, 3).example_batch()["inputs"]
    assert given["common_ids"].shape[0] == 3
    for name in ("ids", "weights"):
        expanded = np.concatenate([given[f"common_{name}"][given["index"]], given[name]], 1)
        np.testing.assert_array_equal(expanded, batch[name])
    with pytest.raises(ValueError, match="2 different common rows and groups=1"):
        dataclasses.replace(kept, groups=1).take(np.arange(3))


def test_vocabularies_count_and_collapse_rare_features(released):
    counts = count_features(*released)
    assert counts["205"] == {"i1": 2, "i2": 1, "i3": 1} and counts["109_14"]["t0"] == 2
    known = Vocabularies.of(counts, minimum=2)
    assert known.size("205") == 3
    np.testing.assert_array_equal(known.encode("205", ["i1", "i2", "new"]), [2, 1, 1])
    read = read_alicpp(*released, known)
    assert dict((f.name, f.size) for f in read.fields)["205"] == 3
    np.testing.assert_array_equal(read.ids[:, 0], [2, 1, 2])


def test_hashing_is_fixed_and_spreads():
    hashing = Hashing({"a": 101, "b": 101})
    names = [str(i) for i in range(20_000)]
    ids = hashing.encode("a", names)
    counts = np.bincount(ids, minlength=101)
    assert counts[0] == 0 and counts[1:].min() > 130 and counts[1:].max() < 270
    assert np.mean(ids == hashing.encode("b", names)) < 0.03
    np.testing.assert_array_equal(ids[:3], hashing.encode("a", ["0", "1", "2"]))


def test_what_does_not_fit_is_named(released, tmp_path):
    skeleton, common = released
    hashing = Hashing(dict.fromkeys(ALICPP_SLOTS, 9))
    bad = tmp_path / "bad.csv"
    for text, message in (
        ("1,0,0,zzz,1,x\n", "no common features 'zzz'"),
        ("1,0,0,aaa,1\n", "5 columns, not 6"),
        ("1,2,0,aaa,1,\n", "not 0 or 1"),
        ("1,0,0,aaa,1,205=3\n", "is no feature"),
    ):
        bad.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_alicpp(bad, common, hashing)
    with pytest.raises(ValueError, match=r"\['888'\] are no fields"):
        read_alicpp(skeleton, common, hashing, slots={"888": 1})
    with pytest.raises(FileNotFoundError, match="Tianchi"):
        read_alicpp(tmp_path / "absent.csv", common, hashing)
    with pytest.raises(ValueError, match="the fields have 2 slots"):
        Impressions((Field("a", 3, 2),), np.zeros((4, 1), np.int32), np.zeros((4, 2)))
