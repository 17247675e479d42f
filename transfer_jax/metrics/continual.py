"""Continual learning from an accuracy matrix: transfer, average, last, forgetting.

``accuracy[t, k]`` is the accuracy on task k after training on task t; the tasks are in training
order, so that entries above the diagonal are of tasks not learned yet.
"""

import numpy as np
from numpy.typing import ArrayLike


def transfer(accuracy: ArrayLike) -> float:
    """Accuracy on tasks not learned yet: the mean over k >= 1 of ``mean_{t<k} accuracy[t, k]``.

    Args:
      accuracy: [N, N], N >= 2.

    Raises:
      ValueError: the matrix is not square, or too small; so too below.
    """
    matrix = _square(accuracy, 2)
    return float(np.mean([matrix[:k, k].mean() for k in range(1, len(matrix))]))


def average(accuracy: ArrayLike) -> float:
    """The mean of all entries: every task, at every time."""
    return float(_square(accuracy, 1).mean())


def last(accuracy: ArrayLike) -> float:
    """The mean accuracy over all tasks after the last one."""
    return float(_square(accuracy, 1)[-1].mean())


def forgetting(accuracy: ArrayLike, *, since_learned: bool = False) -> float:
    """How far accuracies fell: the mean over k < N - 1 of ``max_{t<N-1} accuracy[t, k]`` minus
    ``accuracy[N-1, k]``.

    Args:
      accuracy: [N, N], N >= 2.
      since_learned: the maximum is over ``k <= t <= N - 1`` instead: it leaves out the accuracies
        before the task was learned, and is never negative.
    """
    matrix = _square(accuracy, 2)
    end = len(matrix) - 1
    best = [matrix[k:, k].max() if since_learned else matrix[:end, k].max() for k in range(end)]
    return float(np.mean(np.asarray(best) - matrix[-1, :end]))


def _square(accuracy: ArrayLike, smallest: int) -> np.ndarray:
    matrix = np.asarray(accuracy, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < smallest:
        raise ValueError(
            f"an accuracy matrix is [N, N] with N >= {smallest}, rows = after which task, columns "
            f"= on which; got shape {matrix.shape}."
        )
    return matrix
