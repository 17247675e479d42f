"""Metrics of predicted classes, sets of labels and scores: those of scikit-learn and SciPy.

Beside them the variance of the area under the ROC curve (DeLong et al. 1988), the same area from a
histogram for scores that do not fit into memory, and the calibration error.
"""

import dataclasses
from typing import NamedTuple

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


# -- area under the ROC curve ---------------------------------------------------------------------


class Area(NamedTuple):
    """An area under the ROC curve and its interval of confidence."""

    auc: float
    low: float
    high: float


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """The chance that a positive scores higher than a negative; equal scores count half.

    Args:
      scores: [N].
      labels: [N] of 0 and 1.

    Raises:
      ValueError: shapes differ, or there is only one class; so too below.
    """
    from sklearn.metrics import roc_auc_score

    scores, labels = _two_classes(scores, labels)
    return float(roc_auc_score(labels, scores))


def auc_interval(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    level: float = 0.95,
    method: str = "delong",
    resamples: int = 1000,
    seed: int = 0,
) -> Area:
    """``auc`` with an interval of confidence.

    Args:
      scores: [N].
      labels: [N] of 0 and 1.
      level: of confidence.
      method: ``delong``: normal, with DeLong's variance, cut off at 0 and 1; ``bootstrap``: the
        quantiles over resamples of the positives and of the negatives.
      resamples, seed: of the bootstrap.

    Raises:
      ValueError: an unknown method.
    """
    scores, labels = _two_classes(scores, labels)
    values, place = np.unique(scores, return_inverse=True)
    negatives, positives = (
        np.bincount(place[labels == label], minlength=len(values)) for label in (0, 1)
    )
    if method == "delong":
        return _normal_interval(*_delong(positives, negatives), level)
    if method != "bootstrap":
        raise ValueError(f"method={method!r}; choose 'delong' or 'bootstrap'.")
    rng = np.random.default_rng(seed)
    # To draw rows with replacement is to draw counts from a multinomial distribution.
    n, m = int(positives.sum()), int(negatives.sum())
    areas = [
        _area(rng.multinomial(n, positives / n), rng.multinomial(m, negatives / m))
        for _ in range(resamples)
    ]
    low, high = np.quantile(areas, [(1 - level) / 2, (1 + level) / 2])
    return Area(_area(positives, negatives), float(low), float(high))


class Difference(NamedTuple):
    """Of two areas: ``auc(first) - auc(second)``, its standard error, and the two-sided p-value."""

    difference: float
    error: float
    p_value: float


def auc_difference(first: ArrayLike, second: ArrayLike, labels: ArrayLike) -> Difference:
    """DeLong's test of two scores, [N] each, of the same examples."""
    from scipy.stats import norm, rankdata

    first, labels = _two_classes(first, labels)
    second, _ = _two_classes(second, labels)
    positive, n = labels == 1, int(labels.sum())
    m = len(labels) - n
    of_positives, of_negatives, areas = [], [], []
    for scores in (first, second):
        ranks = rankdata(scores)
        # The share of the other class that each example beats.
        above = (ranks[positive] - rankdata(scores[positive])) / m
        below = 1 - (ranks[~positive] - rankdata(scores[~positive])) / n
        of_positives.append(above)
        of_negatives.append(below)
        areas.append(above.mean())
    difference = float(areas[0] - areas[1])
    variance = sum(
        np.var(x[0] - x[1], ddof=1) / len(x[0]) if len(x[0]) > 1 else np.inf
        for x in (of_positives, of_negatives)
    )
    error = float(np.sqrt(variance))
    if error == 0:
        return Difference(difference, 0.0, 1.0 if difference == 0 else 0.0)
    return Difference(difference, error, float(2 * norm.sf(abs(difference) / error)))


@dataclasses.dataclass
class StreamingAUC:
    """``auc`` of a stream, from counts of scores in equal bins; what shares a bin counts as equal.

    Attributes:
      low, high: scores outside fall into the first or last bin. The defaults suit log odds.
      bins: how many.
    """

    low: float = -16.0
    high: float = 16.0
    bins: int = 2**16

    def __post_init__(self):
        if not self.low < self.high or self.bins < 2:
            raise ValueError(
                f"low={self.low} < high={self.high} and bins={self.bins} >= 2 are needed."
            )
        self.counts = np.zeros((2, self.bins), np.int64)

    def update(self, scores: ArrayLike, labels: ArrayLike) -> None:
        """Adds [N] scores and [N] labels of 0 and 1; N may be 0."""
        scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
        if scores.shape != labels.shape or scores.ndim != 1:
            raise ValueError(
                f"scores have shape {scores.shape} and labels {labels.shape}; both must be [N]."
            )
        if np.isnan(scores).any():
            raise ValueError("a score is not a number.")
        share = (scores - self.low) / (self.high - self.low)
        place = np.clip(np.floor(share * self.bins), 0, self.bins - 1).astype(np.int64)
        for label in (0, 1):
            self.counts[label] += np.bincount(place[labels == label], minlength=self.bins)

    def merge(self, other: "StreamingAUC") -> None:
        """Adds what another one, with the same bins, has counted (of another process)."""
        if (self.low, self.high, self.bins) != (other.low, other.high, other.bins):
            raise ValueError("only counts of the same bins can be added.")
        self.counts = self.counts + other.counts

    def value(self, level: float = 0.95) -> Area:
        """The area so far, with DeLong's interval."""
        if not self.counts.sum(axis=1).all():
            raise ValueError("an area under the ROC curve needs both classes.")
        return _normal_interval(*_delong(self.counts[1], self.counts[0]), level)


def _area(positives: np.ndarray, negatives: np.ndarray) -> float:
    """The area from counts at ascending scores."""
    beaten = np.cumsum(negatives) - 0.5 * negatives
    return float(positives @ beaten / (positives.sum() * float(negatives.sum())))


def _delong(positives: np.ndarray, negatives: np.ndarray) -> tuple[float, float]:
    """The area and its variance, from counts at ascending scores."""
    n, m = float(positives.sum()), float(negatives.sum())
    beaten = (np.cumsum(negatives) - 0.5 * negatives) / m  # by a positive of this score
    beating = 1 - (np.cumsum(positives) - 0.5 * positives) / n  # a negative of this score
    area = float(positives @ beaten / n)
    if min(n, m) < 2:
        return area, float("inf")
    variance = positives @ (beaten - area) ** 2 / (n * (n - 1))
    variance += negatives @ (beating - area) ** 2 / (m * (m - 1))
    return area, float(variance)


def _normal_interval(area: float, variance: float, level: float) -> Area:
    from scipy.stats import norm

    half = norm.ppf((1 + level) / 2) * np.sqrt(variance)
    return Area(area, float(max(0.0, area - half)), float(min(1.0, area + half)))


# -- calibration ----------------------------------------------------------------------------------


def calibration_error(probabilities: ArrayLike, labels: ArrayLike, *, bins: int = 15) -> float:
    """Expected calibration error: mean |mean probability - mean label| over bins of equal width.

    Args:
      probabilities: [N] in [0, 1].
      labels: [N] in [0, 1]: outcomes, or known probabilities.
      bins: of the probabilities; weighted by how many examples they hold.

    Raises:
      ValueError: shapes differ, or a probability outside [0, 1].
    """
    probabilities, labels = _pair(probabilities, labels, (1,))
    if probabilities.min() < 0 or probabilities.max() > 1:
        raise ValueError(
            f"probabilities reach from {probabilities.min()} to {probabilities.max()}; they must "
            "be in [0, 1]."
        )
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    gaps = np.bincount(place, probabilities.astype(np.float64) - labels, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def _two_classes(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = _pair(scores, labels, (1,))
    if set(np.unique(labels)) != {0, 1}:
        raise ValueError(
            f"an area under the ROC curve needs labels 0 and 1, both; there are "
            f"{np.unique(labels)[:5].tolist()}."
        )
    return scores, labels.astype(int)


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
