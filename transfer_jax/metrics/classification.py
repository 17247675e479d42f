"""Metrics of predicted classes, sets of labels and scores: those of scikit-learn and SciPy."""

import numpy as np
from numpy.typing import ArrayLike


def matthews(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Matthews' correlation coefficient; 0 where predictions or labels are constant.

    For two classes ``(TP TN - FP FN) / sqrt((TP + FP)(TP + FN)(TN + FP)(TN + FN))``.

    Args:
      predictions: [N] classes.
      labels: [N] classes.

    Raises:
      ValueError: shapes differ, or nothing is given; so too below.
    """
    from sklearn.metrics import matthews_corrcoef

    predictions, labels = _pair(predictions, labels, (1,))
    return float(matthews_corrcoef(labels, predictions))


def macro_f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """The mean over classes of F1.

    Args:
      predictions: [N] classes, of which those count that are predicted or present; or [N, C] of 0
        and 1 where an example has several labels: there a class with neither counts as 0.
      labels: alike.
    """
    from sklearn.metrics import f1_score

    predictions, labels = _pair(predictions, labels, (1, 2))
    return float(f1_score(labels, predictions, average="macro", zero_division=0))


def f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """F1 of class 1 among classes 0 and 1, [N] each; 0 where it is neither predicted nor there."""
    from sklearn.metrics import f1_score

    predictions, labels = _pair(predictions, labels, (1,))
    return float(f1_score(labels, predictions, zero_division=0))


def pearson(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Pearson's correlation of scores [N] and [N]; 0 where either is constant."""
    from scipy.stats import pearsonr

    predictions, labels = _pair(predictions, labels, (1,))
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(pearsonr(predictions, labels).statistic)


def _pair(
    predictions: ArrayLike, labels: ArrayLike, axes: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(predictions), np.asarray(labels)
    if first.shape != second.shape or first.ndim not in axes or len(first) < 1:
        allowed = " or ".join("[N]" if n == 1 else "[N, C]" for n in axes)
        raise ValueError(
            f"predictions have shape {first.shape} and labels {second.shape}; both must be "
            f"{allowed}, and alike."
        )
    return first, second
