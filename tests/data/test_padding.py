import json

import jax
import numpy as np
import pytest

from transfer_jax.data.padding import bucketed, pad_batch, pad_to

rng = np.random.default_rng(0)
LENGTHS = rng.integers(1, 30, 57)
SOURCE = [
    {"inputs": np.full((t, 2), i + 1, np.float32), "id": i} for i, t in enumerate(LENGTHS.tolist())
]


def make(**options):
    return bucketed(SOURCE, LENGTHS, (8, 16, 32), batch_size=4, **{"seed": 3, **options})


def first(pipeline, count, **processes):
    iterator = pipeline.iterator(**processes)
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def test_pad_to():
    example = {"inputs": np.array([1, 2, 3]), "tags": np.array([[4.0], [5.0], [6.0]])}
    padded = pad_to(5, {"inputs": 0, "tags": -1})(example)
    np.testing.assert_array_equal(padded["inputs"], [1, 2, 3, 0, 0])
    np.testing.assert_array_equal(padded["tags"][:, 0], [4, 5, 6, -1, -1])
    assert padded["lengths"] == 3 and padded["lengths"].dtype == np.int32
    with pytest.raises(ValueError, match="3 positions, more than max_length=2"):
        pad_to(2)(example)
    cut = pad_to(2, truncate=True, lengths="input_lengths")(example)
    np.testing.assert_array_equal(cut["inputs"], [1, 2])
    assert cut["input_lengths"] == 2


def test_pad_batch_takes_the_longest():
    batch = pad_batch(SOURCE[:5])
    assert batch["inputs"].shape == (5, LENGTHS[:5].max(), 2)
    np.testing.assert_array_equal(batch["lengths"], LENGTHS[:5])


def test_every_example_once_per_epoch_in_its_bucket():
    pipeline = make()
    n = len(pipeline)
    batches = first(pipeline, 2 * n)
    orders = []
    for epoch in (batches[:n], batches[n:]):
        ids = np.concatenate([b["id"][b["mask"] == 1] for b in epoch])
        assert sorted(ids) == list(range(57))
        orders.append(tuple(ids))
    assert orders[0] != orders[1]
    for batch in batches:
        boundary = batch["inputs"].shape[1]
        below = {8: 0, 16: 8, 32: 16}[boundary]
        assert ((batch["lengths"] > below) & (batch["lengths"] <= boundary)).all()
        np.testing.assert_array_equal(batch["lengths"], LENGTHS[batch["id"]])
        valid = np.arange(boundary) < batch["lengths"][:, None]
        np.testing.assert_array_equal(
            batch["inputs"][..., 0], np.where(valid, batch["id"][:, None] + 1, 0)
        )


def test_drop_leaves_only_full_batches():
    pipeline = make(remainder="drop", repeat=True)
    ids = np.concatenate([b["id"] for b in first(pipeline, len(pipeline))])
    assert len(set(ids.tolist())) == len(ids) == 4 * len(pipeline)
    assert "mask" not in pipeline.example_batch()


def test_order_is_independent_of_processes_and_resumable():
    pipeline = make()
    count = len(pipeline) + 3
    alone = first(pipeline, count)
    parts = [first(pipeline, count, process_index=p, process_count=2) for p in range(2)]
    joined = [jax.tree.map(lambda *x: np.concatenate(x), *rows) for rows in zip(*parts)]
    jax.tree.map(np.testing.assert_array_equal, joined, alone)
    iterator = pipeline.iterator(process_index=1, process_count=2)
    for _ in range(4):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    resumed = pipeline.iterator()
    resumed.set_state(state)
    rest = [next(resumed) for _ in range(count - 4)]
    resumed.close()
    jax.tree.map(np.testing.assert_array_equal, rest, alone[4:])


def test_one_pass_in_order():
    pipeline = make(shuffle=False, repeat=False)
    iterator = pipeline.iterator()
    ids = np.concatenate([b["id"][b["mask"] == 1] for b in iterator])
    iterator.close()
    order = np.argsort(np.searchsorted((8, 16, 32), LENGTHS), kind="stable")
    np.testing.assert_array_equal(ids, order)


def test_errors():
    with pytest.raises(ValueError, match="make no batch of 40"):
        bucketed(SOURCE, LENGTHS, (8, 16, 32), 40, remainder="drop")
    with pytest.raises(ValueError, match="must increase"):
        bucketed(SOURCE, LENGTHS, (8, 8), 4)
    with pytest.raises(ValueError, match="above the last boundary 16"):
        bucketed(SOURCE, LENGTHS, (8, 16), 4)
    with pytest.raises(ValueError, match=r"shape \(57,\)"):
        bucketed(SOURCE, LENGTHS[1:], (32,), 4)
