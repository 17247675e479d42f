"""Classification metrics against their definitions."""

import numpy as np
import pytest

from transfer_jax.metrics.classification import f1, macro_f1, matthews, pearson

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
