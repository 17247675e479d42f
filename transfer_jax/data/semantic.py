"""Histories and items that mean alike: vectors, exact nearest neighbours, tables for training.

Vectors of items come from any text encoder, [n + 1, D] with a row of padding first. Of a history
there is a vector of its own (a summary's), or the mean of its items'. Neighbours are found once,
before training; the tables are never trained.
"""

import functools
import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from transfer_jax.data.interactions import Sequences

Array = Any  # NumPy's while tables are built, JAX's inside a step


class Tables(NamedTuple):
    """What a training step looks up of M histories (``data.recommend.prefixes``) and n items.

    Attributes:
      histories: int32 [M, N].
      by_target: int32 [M], the histories' numbers, those before the same item together.
      starts: int32 [n + 2]; those before item v are ``by_target[starts[v]:starts[v + 1]]``.
      user_vectors: float [M, D], or None where nothing is retrieved.
      user_neighbours: int32 [M, k], or None.
      item_neighbours: int32 [n + 1, k], row 0 being the padding's; or None.
    """

    histories: Array
    by_target: Array
    starts: Array
    user_vectors: Array | None = None
    user_neighbours: Array | None = None
    item_neighbours: Array | None = None

    @classmethod
    def of(cls, histories: np.ndarray, targets: np.ndarray, num_items: int) -> "Tables":
        """Tables without retrieval, of histories int [M, N] and what follows them, int [M]."""
        order = np.argsort(targets, kind="stable").astype(np.int32)
        counts = np.bincount(targets, minlength=num_items + 1)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        return cls(histories.astype(np.int32), order, starts)

    def fingerprint(self, **others: np.ndarray) -> str:
        """SHA-256 of all that is in the tables and of ``others``: equal only for equal numbers."""
        digest = hashlib.sha256()
        for name, value in {**self._asdict(), **others}.items():
            if value is not None:
                value = np.ascontiguousarray(value)
                digest.update(f"{name} {value.dtype} {value.shape} ".encode())
                digest.update(value.tobytes())
        return digest.hexdigest()


# -- neighbours -----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="k")
def _best(
    queries: jax.Array, own: jax.Array, vectors: jax.Array, owners: jax.Array, k: int
) -> jax.Array:
    similarity = jnp.matmul(queries, vectors.T, precision=lax.Precision.HIGHEST)
    return lax.top_k(jnp.where(own[:, None] == owners, -jnp.inf, similarity), k)[1]


def nearest(
    vectors: np.ndarray, k: int, *, owners: np.ndarray | None = None, block: int = 512
) -> np.ndarray:
    """The k rows with the largest cosine to each row, exactly, the nearest first.

    Args:
      vectors: float [M, D].
      k: how many.
      owners: int [M]; rows of one owner are no neighbours. None = only the row itself is none.
      block: rows compared at a time; memory is [block, M] beside the vectors.

    Returns:
      int32 [M, k].

    Raises:
      ValueError: some row has fewer than k candidates.
    """
    count = len(vectors)
    owners = np.arange(count) if owners is None else np.asarray(owners)
    fewest = count - int(np.unique(owners, return_counts=True)[1].max())
    if not 1 <= k <= fewest:
        raise ValueError(f"k={k} neighbours: some of the {count} rows have {fewest} candidates.")
    unit = np.asarray(vectors, np.float32)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    on_device, all_owners = jnp.asarray(unit), jnp.asarray(owners)
    found = np.empty((count, k), np.int32)
    for start in range(0, count, block):
        rows = np.minimum(np.arange(start, start + block), count - 1)  # one shape for all blocks
        best = np.asarray(_best(unit[rows], owners[rows], on_device, all_owners, k))
        found[start : start + block] = best[: count - start]
    return found


def nearest_items(vectors: np.ndarray, k: int, *, allow_padding: bool = False) -> np.ndarray:
    """``nearest`` among the items of a table [n + 1, D]; int32 [n + 1, k], row 0 never used.

    Args:
      vectors: of the padding (row 0) and the items.
      k: how many.
      allow_padding: the padding is a candidate like any item (SRA-CL's released code).
    """
    if allow_padding:
        return nearest(vectors, k)
    return np.concatenate([np.zeros((1, k), np.int32), nearest(vectors[1:], k) + 1])


# -- vectors --------------------------------------------------------------------------------------


def centred(vectors: np.ndarray) -> np.ndarray:
    """A table [n + 1, D] of items minus their mean; the padding's row becomes zero."""
    moved = np.asarray(vectors, np.float32)
    moved = moved - moved[1:].mean(axis=0)
    moved[0] = 0.0
    return moved


def recency_means(vectors: np.ndarray, histories: np.ndarray, decay: float = 0.8) -> np.ndarray:
    """Means of the histories' items, the a-th before the last with weight ``decay**a``.

    Args:
      vectors: float [n + 1, D].
      histories: int [M, N], padded with 0 at either end.
      decay: in (0, 1].

    Returns:
      float32 [M, D]; zero for a history of padding only.
    """
    from scipy import sparse

    rows, columns = np.nonzero(histories)
    valid = histories > 0
    age = valid[:, ::-1].cumsum(axis=1)[:, ::-1] - 1
    weights = np.where(valid, decay**age, 0.0)
    weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)
    shape = (len(histories), len(vectors))
    entries = (weights[rows, columns], (rows, histories[rows, columns]))
    mixture = sparse.csr_matrix(entries, shape, dtype=np.float32)
    return np.asarray(mixture @ np.asarray(vectors, np.float32))


def collaborative_vectors(
    train: Sequences, num_items: int, *, dim: int = 64, seed: int = 0
) -> np.ndarray:
    """Items as the leading singular vectors of who used them, times the singular values.

    Their cosines approximate those of the items' sets of users.

    Args:
      train: of every user.
      num_items: n.
      dim: at most how many; fewer where the matrix has fewer.
      seed: of the iteration's first vector.

    Returns:
      float32 [n + 1, D]; zero for the padding and for items that nobody used.
    """
    from scipy import sparse
    from scipy.sparse.linalg import svds

    owners = np.repeat(np.arange(len(train)), train.lengths)
    shape = (num_items + 1, len(train))
    used = sparse.csr_matrix((np.ones(len(owners), np.float32), (train.items, owners)), shape)
    used.data[:] = 1.0  # a set: repeats count once
    first = np.random.default_rng(seed).standard_normal(min(shape)).astype(np.float32)
    left, values, _ = svds(used, k=min(dim, min(shape) - 1), v0=first)
    vectors = (left * values).astype(np.float32)
    vectors[np.bincount(train.items, minlength=num_items + 1) == 0] = 0.0
    return vectors
