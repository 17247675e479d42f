"""Classification metrics against their definitions."""

import numpy as np
import pytest
from scipy.stats import norm

from transfer_jax.metrics.classification import (
    StreamingAUC,
    auc,
    auc_difference,
    auc_interval,
    calibration_error,
    f1,
    macro_f1,
    matthews,
    pearson,
)

RNG = np.random.default_rng(0)


def test_matthews_is_its_definition_and_the_correlation_of_two_binary_variables():
    labels = RNG.integers(0, 2, 50)
    predictions = np.where(RNG.uniform(size=50) < 0.7, labels, 1 - labels)
    tp, tn = np.sum(predictions & labels), np.sum((1 - predictions) & (1 - labels))
    fp, fn = np.sum(predictions & (1 - labels)), np.sum((1 - predictions) & labels)
    root = np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert matthews(predictions, labels) == pytest.approx((tp * tn - fp * fn) / root)
    assert matthews(predictions, labels) == pytest.approx(pearson(predictions, labels))
    assert matthews(1 - labels, labels) == -1 and matthews(np.ones(50, int), labels) == 0


def test_macro_f1_of_classes_and_of_sets_of_labels():
    labels, predictions = RNG.integers(0, 2, (2, 40, 3))

    def plain(p, y):
        return 2 * np.sum(p & y) / (p.sum() + y.sum())

    expected = np.mean([plain(predictions[:, c], labels[:, c]) for c in range(3)])
    assert macro_f1(predictions, labels) == pytest.approx(expected)
    single, true = predictions.argmax(1), labels.argmax(1)
    expected = np.mean([plain(single == c, true == c) for c in np.union1d(single, true)])
    assert macro_f1(single, true) == pytest.approx(expected)
    both = [f1_of(predictions[:, 0], labels[:, 0]) for f1_of in (f1, plain)]
    assert both[0] == pytest.approx(both[1])
    nothing = np.zeros((40, 3), int)
    assert macro_f1(nothing, nothing) == 0


def test_pearson_and_what_does_not_fit():
    x = RNG.normal(size=30)
    assert pearson(2 * x + 1, x) == pytest.approx(1) and pearson(-x, x) == pytest.approx(-1)
    assert pearson(x, np.ones(30)) == 0
    for metric in (matthews, pearson, macro_f1):
        with pytest.raises(ValueError, match=r"\(30,\).*\(29,\)"):
            metric(x, x[1:])


def structural(scores, labels):
    """DeLong's components, by comparing every positive with every negative."""
    p, n = scores[labels == 1], scores[labels == 0]
    wins = (p[:, None] > n) + 0.5 * (p[:, None] == n)
    return wins.mean(1), wins.mean(0)


LABELS = RNG.integers(0, 2, 300)
FIRST = RNG.integers(0, 9, 300) + LABELS  # many ties
SECOND = RNG.integers(0, 9, 300) + 2 * LABELS


def test_auc_and_delong_are_counts_of_pairs_with_ties():
    (a, b), (c, d) = structural(FIRST, LABELS), structural(SECOND, LABELS)
    assert auc(FIRST, LABELS) == pytest.approx(a.mean())
    ranks = np.mean([np.searchsorted(np.sort(FIRST), FIRST, side) for side in ("left", "right")], 0)
    n, m = LABELS.sum(), (1 - LABELS).sum()  # average ranks, from 1
    by_ranks = ((ranks[LABELS == 1] + 0.5).sum() - n * (n + 1) / 2) / (n * m)
    assert auc(FIRST, LABELS) == pytest.approx(by_ranks)

    found = auc_interval(FIRST, LABELS)
    error = np.sqrt(a.var(ddof=1) / n + b.var(ddof=1) / m)
    expected = a.mean() + 1.96 * error * np.array([0, -1, 1])
    assert found == pytest.approx(expected, rel=1e-4)
    bootstrap = auc_interval(FIRST, LABELS, method="bootstrap", seed=1)
    assert bootstrap == pytest.approx(found, abs=0.01)

    test = auc_difference(FIRST, SECOND, LABELS)
    error = np.sqrt((a - c).var(ddof=1) / n + (b - d).var(ddof=1) / m)
    assert test[:2] == pytest.approx((a.mean() - c.mean(), error))
    assert test.p_value == pytest.approx(2 * norm.sf(abs(test.difference) / error))
    assert auc_difference(FIRST, 3 * FIRST, LABELS) == (0, 0, 1)


def test_a_stream_of_scores_has_the_same_area():
    labels = RNG.random(20_000) < 0.05
    scores = RNG.normal(size=20_000) + labels
    parts = [StreamingAUC(), StreamingAUC()]
    for i, rows in enumerate(np.array_split(np.arange(20_000), 7)):
        parts[i % 2].update(scores[rows], labels[rows])
    parts[0].merge(parts[1])
    assert parts[0].value() == pytest.approx(auc_interval(scores, labels), abs=1e-4)
    with pytest.raises(ValueError, match="both classes"):
        StreamingAUC().value()


def test_calibration_error_by_hand_and_of_true_probabilities():
    p, y = np.array([0.1, 0.15, 0.9, 1.0]), np.array([0, 1, 1, 1])
    expected = (abs(0.25 - 1) + abs(1.9 - 2)) / 4
    assert calibration_error(p, y, bins=5) == pytest.approx(expected)
    truth = RNG.random(50_000)
    assert calibration_error(truth, RNG.random(50_000) < truth) < 0.01
    assert calibration_error(truth**2, truth) == pytest.approx(1 / 2 - 1 / 3, abs=0.005)


def test_areas_need_two_classes_and_known_methods():
    with pytest.raises(ValueError, match="both; there are"):
        auc(FIRST, np.ones(300))
    with pytest.raises(ValueError, match="'delong' or 'bootstrap'"):
        auc_interval(FIRST, LABELS, method="jackknife")
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        calibration_error([1.5], [1])
