"""Retrieval metrics against loops over sorted lists."""

import numpy as np
import pytest

from transfer_jax.metrics.retrieval import folded_retrieval, ranks, retrieval

RNG = np.random.default_rng(0)
SIMILARITY = RNG.normal(size=(12, 60))
OWNER = RNG.permutation(np.repeat(np.arange(12), 5))
SIMILARITY[OWNER, np.arange(60)] += 1.5


def hits(similarity, owner, k):
    """Shares of hits among the first K, with every list sorted."""
    images, captions = similarity.shape
    i2t = [
        any(owner[t] == i for t in sorted(range(captions), key=lambda t: -similarity[i, t])[:k])
        for i in range(images)
    ]
    t2i = [
        owner[t] in sorted(range(images), key=lambda i: -similarity[i, t])[:k]
        for t in range(captions)
    ]
    return 100 * np.mean(i2t), 100 * np.mean(t2i)


def test_five_captions_per_image_against_sorted_lists():
    result = retrieval(SIMILARITY, OWNER)
    total = 0.0
    for k in (1, 5, 10):
        i2t, t2i = hits(SIMILARITY, OWNER, k)
        assert result[f"i2t_r{k}"] == pytest.approx(i2t)
        assert result[f"t2i_r{k}"] == pytest.approx(t2i)
        total += i2t + t2i
    assert result["rsum"] == pytest.approx(total)
    assert 100 < total < 600


def test_by_hand():
    # Image 0 finds its second caption first; image 1 sees a caption of image 0 before its own.
    similarity = np.array([[0.1, 0.9, 0.2, 0.3], [0.0, 0.8, 0.5, 0.4]])
    of_images, of_captions = ranks(similarity)
    assert of_images.tolist() == [0, 1] and of_captions.tolist() == [0, 0, 0, 0]
    result = retrieval(similarity, ks=(1, 2))
    assert (result["i2t_r1"], result["i2t_r2"], result["t2i_r1"]) == (50.0, 100.0, 100.0)
    assert (result["i2t_median"], result["t2i_median"]) == (1.5, 1.0)


def test_equal_similarities_are_worth_nothing():
    assert retrieval(np.zeros((20, 100)))["rsum"] == 0.0


def test_folds_are_scored_alone():
    folds = folded_retrieval(SIMILARITY, OWNER, 3)
    expected = []
    for fold in range(3):
        own = [t for t in range(60) if OWNER[t] // 4 == fold]
        part = SIMILARITY[4 * fold : 4 * fold + 4][:, own]
        expected.append(sum(sum(hits(part, OWNER[own] % 4, k)) for k in (1, 5, 10)))
    assert folds["rsum"] == pytest.approx(np.mean(expected))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: retrieval(np.zeros((3, 4))), "4 captions are not equally many"),
        (lambda: retrieval(np.zeros((2, 2)), np.array([0, 0])), "every image at least once"),
        (lambda: retrieval(np.full((2, 2), np.nan)), "NaN"),
        (lambda: folded_retrieval(SIMILARITY, OWNER, 5), "12 images do not divide into 5"),
    ],
)
def test_what_does_not_fit_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
