import json
import threading
import time

import grain
import jax
import numpy as np
import pytest

from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.sources import ArraySource, CachedSource, GeneratedSource


def numbers(n):
    return ArraySource({"inputs": np.arange(n, dtype=np.float32)[:, None], "labels": np.arange(n)})


class Items:
    """The same examples as ``numbers``, without an efficient ``take``."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return {"inputs": np.array([i], np.float32), "labels": i}


def first(pipeline, count, **processes):
    iterator = pipeline.iterator(**processes)
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def whole(pipeline, **processes):
    iterator = pipeline.iterator(**processes)
    batches = list(iterator)
    iterator.close()
    return batches


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Noise(grain.transforms.RandomMap):
    def random_map(self, element, rng):
        return {**element, "noise": rng.normal(size=2)}


VARIANTS = {
    "arrays": dict(source=numbers(29)),
    "items": dict(source=Items(29)),
    "random transform": dict(source=numbers(29), transforms=(Noise(),)),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("repeat", [True, False])
def test_order_is_independent_of_the_number_of_processes(variant, repeat):
    pipeline = Pipeline(batch_size=8, shuffle=True, seed=3, repeat=repeat, **variant)
    count = 9 if repeat else len(pipeline)
    alone = first(pipeline, count)
    for n in (2, 4):
        parts = [first(pipeline, count, process_index=p, process_count=n) for p in range(n)]
        joined = [jax.tree.map(lambda *x: np.concatenate(x), *rows) for rows in zip(*parts)]
        assert_same(joined, alone)


def test_each_epoch_holds_every_example_once_in_a_new_order():
    pipeline = Pipeline(numbers(30), batch_size=7, shuffle=True, seed=1, repeat=True)
    stream = np.concatenate([b["labels"] for b in first(pipeline, 13)])[:90].reshape(3, 30)
    for epoch in stream:
        assert sorted(epoch) == list(range(30))
    orders = {tuple(epoch) for epoch in stream}
    other = Pipeline(numbers(30), batch_size=30, shuffle=True, seed=2, repeat=True)
    orders |= {tuple(b["labels"]) for b in first(other, 3)}
    assert len(orders) == 6
    again = np.concatenate([b["labels"] for b in first(pipeline, 13)])[:90].reshape(3, 30)
    np.testing.assert_array_equal(again, stream)


def test_batch_larger_than_the_source_spans_epochs():
    pipeline = Pipeline(numbers(5), batch_size=12, shuffle=True, repeat=True)
    assert len(pipeline) == 1
    labels = first(pipeline, 1)[0]["labels"]
    assert sorted(labels[:5]) == sorted(labels[5:10]) == list(range(5))


def test_evaluation_pads_the_last_batch_under_the_mask():
    pipeline = Pipeline(numbers(10), batch_size=4)
    batches = whole(pipeline)
    assert len(batches) == len(pipeline) == 3
    for batch in batches:
        assert batch["mask"].dtype == np.float32 and batch["mask"].shape == (4,)
    labels = np.concatenate([b["labels"] for b in batches])
    mask = np.concatenate([b["mask"] for b in batches])
    np.testing.assert_array_equal(mask, [1] * 10 + [0] * 2)
    np.testing.assert_array_equal(labels[mask == 1], np.arange(10))
    # A process whose rows are all padding still yields its batches.
    part = whole(pipeline, process_index=3, process_count=4)
    assert [b["mask"].tolist() for b in part] == [[1], [1], [0]]


def test_evaluation_may_drop_the_remainder():
    batches = whole(Pipeline(numbers(10), batch_size=4, remainder="drop"))
    np.testing.assert_array_equal(np.concatenate([b["labels"] for b in batches]), np.arange(8))
    with pytest.raises(ValueError, match="remainder='pad'"):
        Pipeline(numbers(3), batch_size=4, remainder="drop")


def test_training_has_no_mask_and_a_foreign_mask_is_refused():
    assert "mask" not in Pipeline(numbers(10), batch_size=4, repeat=True).example_batch()
    with pytest.raises(ValueError, match="rename"):
        Pipeline(ArraySource({"mask": np.ones(3)}), batch_size=3).example_batch()


@pytest.mark.parametrize("num_threads", [0, 2])
def test_resumed_equals_uninterrupted_at_any_process_count(num_threads):
    pipeline = Pipeline(
        numbers(29), 8, shuffle=True, repeat=True, transforms=(Noise(),), num_threads=num_threads
    )
    expected = first(pipeline, 9)
    started = pipeline.iterator(process_index=1, process_count=4)
    for _ in range(5):
        next(started)
    state = json.loads(json.dumps(started.get_state()))
    started.close()
    resumed = pipeline.iterator(process_index=0, process_count=1)
    next(resumed)
    resumed.set_state(state)
    assert_same([next(resumed) for _ in range(4)], expected[5:])
    assert resumed.get_state() == {"next_index": 9}
    resumed.close()


def test_array_and_item_paths_agree():
    options = dict(batch_size=6, shuffle=True, seed=5, repeat=True)
    fast = first(Pipeline(numbers(20), **options), 5)
    slow = first(Pipeline(Items(20), transforms=(dict,), **options), 5)
    assert_same(fast, slow)


def test_random_transforms_differ_between_rows_and_seeds():
    def noise(seed):
        pipeline = Pipeline(numbers(6), 12, seed=seed, repeat=True, transforms=(Noise(), Noise()))
        return first(pipeline, 1)[0]["noise"]

    assert len(np.unique(np.concatenate([noise(0), noise(1)]))) == 48


def test_batch_fn_and_abstract_batch():
    pipeline = Pipeline(
        numbers(9), 4, batch_fn=lambda rows: {"total": np.array([r["labels"] * 2.0 for r in rows])}
    )
    np.testing.assert_array_equal(pipeline.example_batch()["total"], [0, 2, 4, 6])
    abstract = pipeline.abstract_batch()
    assert abstract["total"] == jax.ShapeDtypeStruct((4,), jax.numpy.float32)
    assert abstract["mask"].shape == (4,)


def test_example_batch_leaves_iterators_alone():
    pipeline = Pipeline(numbers(9), 4, shuffle=True, repeat=True)
    iterator = pipeline.iterator()
    expected = first(pipeline, 2)
    a = next(iterator)
    assert_same(pipeline.example_batch(), expected[0])
    assert_same([a, next(iterator)], expected)
    iterator.close()


def test_closing_ends_the_threads():
    before = set(threading.enumerate())
    iterator = Pipeline(Items(50), 4, repeat=True, num_threads=4, read_ahead=8).iterator()
    next(iterator)
    assert set(threading.enumerate()) - before
    iterator.close()
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_errors_say_what_would_be_right():
    with pytest.raises(ValueError, match=r"28 or 32 would do"):
        Pipeline(numbers(9), 30).iterator(process_count=4)
    with pytest.raises(ValueError, match=r"not in 0\.\.1"):
        Pipeline(numbers(9), 4).iterator(process_index=2, process_count=2)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Pipeline(numbers(9), 0)
    with pytest.raises(ValueError, match="no examples"):
        Pipeline(numbers(0), 1)
    with pytest.raises(ValueError, match="'pad' or 'drop'"):
        Pipeline(numbers(9), 1, remainder="keep")
    with pytest.raises(ValueError, match=r"'x': \[\(1,\), \(2,\)\]"):
        Pipeline([{"x": np.zeros(1)}, {"x": np.zeros(2)}], 2).example_batch()
    with pytest.raises(ValueError, match="one length"):
        ArraySource({"a": np.zeros(2), "b": np.zeros(3)})


def test_generated_source_is_a_pure_function_of_seed_and_index():
    def fn(rng, index):
        return {"inputs": rng.normal(size=3), "index": index}

    source = GeneratedSource(fn, 10, seed=4)
    assert_same(source[7], GeneratedSource(fn, 10, seed=4)[7])
    draws = [
        GeneratedSource(fn, 3, seed)[i]["inputs"][0] for seed in (0, 1, (0, 1)) for i in (0, 1)
    ]
    assert len(set(draws)) == 6
    with pytest.raises(IndexError, match="index 10"):
        source[10]


def test_cached_source_reads_each_example_once():
    calls = []

    def fn(rng, index):
        calls.append(index)
        return {"inputs": rng.normal(size=3), "labels": index % 2}

    source = GeneratedSource(fn, 10, seed=4)
    cached = CachedSource(source)
    got = cached.take(np.array([3, 1, 3]))
    np.testing.assert_array_equal(got["inputs"][0], source[3]["inputs"])
    calls.clear()
    cached.take(np.array([1, 3]))
    assert_same(cached[3], got_row(got, 0))
    assert calls == []


def got_row(batch, i):
    return {name: a[i] for name, a in batch.items()}
