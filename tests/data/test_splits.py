import numpy as np
import pytest

from transfer_jax.data.digits import digits
from transfer_jax.data.sources import ArraySource
from transfer_jax.data.splits import (
    Concatenation,
    Mapped,
    Subset,
    few_shot,
    labels_of,
    select_classes,
    split,
    stratified_split,
)

LABELS = np.repeat([0, 1, 2], [50, 30, 20])
SOURCE = ArraySource({"id": np.arange(100), "labels": LABELS})
FRACTIONS = {"train": 0.7, "validation": 0.1, "test": 0.2}


def ids(source):
    return [int(source[i]["id"]) for i in range(len(source))]


def test_split_by_order_and_by_seed():
    in_order = split(SOURCE, FRACTIONS)
    assert ids(in_order["train"]) == list(range(70))
    assert ids(in_order["test"]) == list(range(80, 100))
    by_seed = split(SOURCE, FRACTIONS, seed=1)
    assert sorted(i for part in by_seed.values() for i in ids(part)) == list(range(100))
    assert ids(by_seed["train"]) == ids(split(SOURCE, FRACTIONS, seed=1)["train"])
    assert ids(by_seed["train"]) != ids(split(SOURCE, FRACTIONS, seed=2)["train"])
    with pytest.raises(ValueError, match="sum to 1"):
        split(SOURCE, {"a": 0.5, "b": 0.6})


def test_stratified_split_keeps_proportions():
    parts = stratified_split(SOURCE, FRACTIONS, seed=0)
    assert sorted(i for part in parts.values() for i in ids(part)) == list(range(100))
    np.testing.assert_array_equal(np.bincount(labels_of(parts["train"])), [35, 21, 14])
    np.testing.assert_array_equal(np.bincount(labels_of(parts["test"])), [10, 6, 4])


def test_class_filter_and_few_shot():
    kept = select_classes(SOURCE, (0, 2))
    assert set(labels_of(kept).tolist()) == {0, 2} and len(kept) == 70
    shots = few_shot(kept, 5, seed=3)
    np.testing.assert_array_equal(np.bincount(labels_of(shots)), [5, 0, 5])
    assert len(set(ids(shots))) == 10
    with pytest.raises(ValueError, match=r"no example has class \[7\]"):
        select_classes(SOURCE, (0, 7))
    with pytest.raises(ValueError, match="fewer than per_class=21"):
        few_shot(SOURCE, 21, seed=0)


def test_concatenation_subset_and_map():
    both = Concatenation([Subset(SOURCE, [5, 3]), Subset(SOURCE, [9])])
    assert ids(both) == [5, 3, 9] and len(both) == 3
    np.testing.assert_array_equal(both.take(np.array([2, 0]))["id"], [9, 5])
    np.testing.assert_array_equal(labels_of(both), [0, 0, 0])
    plain = list(SOURCE[i] for i in range(3))
    np.testing.assert_array_equal(labels_of(plain), [0, 0, 0])
    assert ids(Mapped(both, lambda e: {"id": e["id"] + 1})) == [6, 4, 10]
    double = Mapped(both, lambda e: {"id": 2 * e["id"]}, batched=True)
    np.testing.assert_array_equal(double.take(np.array([2, 0]))["id"], [18, 10])
    assert ids(double) == [10, 6, 18]
    with pytest.raises(IndexError, match="index 3"):
        both[3]
    with pytest.raises(ValueError, match="outside a source of 100"):
        Subset(SOURCE, [100])


def test_digits():
    bundle = digits()
    assert {k: len(v) for k, v in bundle.splits.items()} == {
        "train": 1258, "validation": 180, "test": 359
    }  # fmt: skip
    everything = Concatenation(list(bundle.splits.values()))
    batch = everything.take(np.arange(len(everything)))
    assert batch["inputs"].shape == (1797, 8, 8, 1) and batch["inputs"].dtype == np.float32
    assert batch["inputs"].min() == 0.0 and batch["inputs"].max() == 1.0
    test_counts = np.bincount(labels_of(bundle.splits["test"]))
    assert test_counts.min() >= 34 and test_counts.max() <= 37
    flat = digits(sequence=True).splits["test"].take(np.arange(3))["inputs"]
    image = bundle.splits["test"].take(np.arange(3))["inputs"]
    np.testing.assert_array_equal(flat.reshape(3, 8, 8, 1), image)
