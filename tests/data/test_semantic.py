"""Prefixes, exact neighbours and vectors of histories, against loops and brute force."""

import numpy as np
import pytest

from transfer_jax.data import interactions, recommend, semantic
from transfer_jax.data.interactions import leave_one_out
from transfer_jax.data.semantic import Tables

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prefixes_are_the_training_items_before_each_other_one(side):
    split = leave_one_out(interactions.generated(users=30, items=40, length=9))
    arrays = recommend.prefixes(split.train, 5, side=side).arrays
    expected = [
        (user, items[max(0, i - 5) : i], items[i])
        for user, items in enumerate(split.train)
        for i in range(1, len(items))
    ]
    assert len(expected) == (split.train.lengths - 1).sum() == len(arrays["inputs"])
    for row, (user, before, target) in enumerate(expected):
        empty = np.zeros(5 - len(before), np.int32)
        padded = [before, empty] if side == "left" else [empty, before]
        np.testing.assert_array_equal(arrays["inputs"][row], np.concatenate(padded))
        assert (arrays["user"][row], arrays["labels"][row]) == (user, target)
    np.testing.assert_array_equal(arrays["prefix"], np.arange(len(expected)))
    with pytest.raises(ValueError, match="2 items"):
        recommend.prefixes(interactions.Sequences.of([[1], [2]]), 5)


@pytest.mark.parametrize("block", [64, 500, 512])
def test_blocked_neighbours_are_those_of_brute_force(block):
    vectors = RNG.normal(size=(500, 7)).astype(np.float32)
    owners = RNG.integers(0, 60, 500)
    found = semantic.nearest(vectors, 6, owners=owners, block=block)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = unit.astype(np.float64) @ unit.T
    cosine[owners[:, None] == owners] = -np.inf
    np.testing.assert_array_equal(found, np.argsort(-cosine, axis=1)[:, :6])
    scaled = semantic.nearest(vectors * RNG.uniform(0.1, 9, (500, 1)), 6, owners=owners)
    np.testing.assert_array_equal(scaled, found)
    alone = semantic.nearest(vectors, 6, block=block)
    assert (alone != np.arange(500)[:, None]).all() and (alone != found).any()
    with pytest.raises(ValueError, match="have 499 candidates"):
        semantic.nearest(vectors, 500)


def test_padding_is_a_neighbour_only_where_it_is_allowed():
    vectors = np.ones((9, 3), np.float32) + 0.1 * RNG.normal(size=(9, 3)).astype(np.float32)
    found = semantic.nearest_items(vectors, 7)
    assert found.shape == (9, 7)
    for item in range(1, 9):
        assert set(found[item]) == set(range(1, 9)) - {item}
    assert (semantic.nearest_items(vectors, 8, allow_padding=True) == 0).any(axis=1).sum() == 8


def test_vectors_of_histories_and_of_who_used_what():
    vectors = semantic.centred(RNG.normal(size=(13, 4)))
    np.testing.assert_allclose(vectors[1:].mean(axis=0), 0, atol=1e-6)
    assert (vectors[0] == 0).all()
    weights = np.array([0.64, 0.8, 1.0])
    expected = weights @ vectors[[5, 2, 5]] / weights.sum()
    for history in ([5, 2, 5, 0, 0], [0, 0, 5, 2, 5]):
        both = semantic.recency_means(vectors, np.array([history, [0] * 5]), 0.8)
        np.testing.assert_allclose(both, [expected, np.zeros(4)], atol=1e-6)

    train = interactions.generated(users=40, items=12, groups=3, length=6).sequences()
    used = np.zeros((13, 40))
    for user, items in enumerate(train):
        used[items, user] = 1
    vectors = semantic.collaborative_vectors(train, 12, dim=12)
    np.testing.assert_allclose(vectors @ vectors.T, used @ used.T, atol=1e-3)


def test_a_fingerprint_changes_with_any_number():
    histories = RNG.integers(0, 9, (20, 4))
    tables = Tables.of(histories, RNG.integers(1, 9, 20), 8)
    tables = tables._replace(user_vectors=RNG.normal(size=(20, 3)).astype(np.float32))
    same = Tables(*(None if x is None else x.copy() for x in tables))
    assert same.fingerprint() == tables.fingerprint()
    assert same.fingerprint(items=histories) != tables.fingerprint()
    same.user_vectors[7, 1] += 1e-6
    assert same.fingerprint() != tables.fingerprint()
