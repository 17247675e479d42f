"""Continual metrics: a matrix by hand, and the published CLIP matrices of ZSCL."""

import os
from pathlib import Path

import numpy as np
import pytest

from transfer_jax.metrics.continual import average, forgetting, last, transfer


def test_a_matrix_by_hand():
    accuracy = [[0.9, 0.4, 0.2], [0.7, 0.8, 0.3], [0.8, 0.6, 1.0]]
    assert transfer(accuracy) == pytest.approx((0.4 + (0.2 + 0.3) / 2) / 2)
    assert average(accuracy) == pytest.approx(5.7 / 9)
    assert last(accuracy) == pytest.approx((0.8 + 0.6 + 1.0) / 3)
    assert forgetting(accuracy) == pytest.approx(((0.9 - 0.8) + (0.8 - 0.6)) / 2)


def test_what_each_metric_reads():
    rng = np.random.default_rng(0)
    accuracy = rng.uniform(size=(5, 5))
    upper = np.triu(np.ones((5, 5), bool), 1)
    other = np.where(upper, accuracy, rng.uniform(size=(5, 5)))
    assert transfer(other) == transfer(accuracy)
    # Transfer weighs tasks alike, not entries: it is not the mean of the upper triangle.
    assert transfer(accuracy) != pytest.approx(accuracy[upper].mean(), abs=1e-3)
    # An accuracy of 0 is an accuracy.
    assert transfer([[1.0, 0.0, 0.0], [1.0, 1.0, 0.6], [1.0, 1.0, 1.0]]) == pytest.approx(0.15)
    for metric in (transfer, average, last):
        assert metric(np.full((4, 4), 0.3)) == pytest.approx(0.3)
    assert forgetting(np.full((4, 4), 0.3)) == 0


def test_forgetting_since_a_task_was_learned_leaves_out_what_came_before():
    accuracy = [[0.9, 0.9], [0.95, 0.6]]
    assert forgetting(accuracy) == pytest.approx(-0.05)
    assert forgetting(accuracy, since_learned=True) == 0
    early = [[0.9, 0.7, 0.1], [0.9, 0.5, 0.1], [0.9, 0.4, 0.1]]
    assert forgetting(early) == pytest.approx((0.0 + 0.3) / 2)
    assert forgetting(early, since_learned=True) == pytest.approx((0.0 + 0.1) / 2)


@pytest.mark.parametrize("accuracy", [[0.1, 0.2], [[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]], [[0.4]]])
def test_other_shapes_are_refused(accuracy):
    with pytest.raises(ValueError, match=r"\[N, N\] with N >= 2"):
        transfer(accuracy)


# Transfer, Average, Last (in per cent, order I); forgetting as in the ZSCL paper's matrices.
PUBLISHED = {
    "t3_1": (44.56, 55.85, 77.27, 12.1),
    "t3_2": (56.90, 64.70, 74.64, 11.7),
    "t3_3": (50.37, 65.66, 80.10, 7.9),
    "t3_4": (57.24, 65.13, 76.56, None),
    "t3_5": (52.33, 60.72, 77.69, None),
    "t3_6": (62.17, 72.63, 84.46, None),
    "t3_7": (68.14, 75.39, 83.62, 3.9),
    "t9_1": (46.61, 56.17, 67.37, None),
    "t9_7": (64.15, 74.52, 83.42, None),
}
SECOND_ORDER = [9, 6, 7, 8, 5, 10, 0, 1, 3, 4, 2]


@pytest.mark.skipif("TRANSFER_JAX_DATA" not in os.environ, reason="TRANSFER_JAX_DATA is not set")
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_numbers_of_zscl(name):
    file = Path(os.environ["TRANSFER_JAX_DATA"]) / "zscl_mtil_matrices" / f"{name}.npy"
    if not file.exists():
        pytest.skip(f"{file.name} is not there")
    matrix = np.delete(np.load(file).reshape(11, 12), 2, axis=1)  # CIFAR10 is no task
    if name.startswith("t9"):
        matrix = matrix[np.ix_(SECOND_ORDER, SECOND_ORDER)]
    *expected, forgotten = PUBLISHED[name]
    found = [metric(matrix) for metric in (transfer, average, last)]
    np.testing.assert_allclose(found, expected, atol=0.006)
    if forgotten is not None:
        assert forgetting(matrix, since_learned=True) == pytest.approx(forgotten, abs=0.06)
