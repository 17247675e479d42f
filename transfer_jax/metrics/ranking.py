"""Ranking one right item among many: ranks, hit rate, NDCG and MRR, with ties; top-k lists.

Everything here is jittable and works on blocks of users, so that an evaluation is a mean over
batches. A rank is kept as two counts, how many other items score higher and how many score the
same; what ties are worth is decided when a metric is computed from them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import digamma

Array = jax.Array

TIES = ("worst", "best", "average")


class Ranks(NamedTuple):
    """Where the right items stand.

    Attributes:
      higher: int32 [U], candidates that score higher than the right one.
      equal: int32 [U], other candidates that score the same.
    """

    higher: Array
    equal: Array


@dataclass(frozen=True)
class Protocol:
    """What a ranking metric was computed over; numbers of different protocols do not compare.

    Attributes:
      candidates: ``full`` (every item), or how negatives were drawn: ``popularity`` or ``uniform``.
      items: how many items there are to rank, or negatives per user.
      seen: items that the user has seen are ``removed`` from the candidates, or ``kept``.
      ties: one of ``TIES``.
      split: such as ``leave one out``.
    """

    candidates: str
    items: int
    seen: str
    ties: str = "worst"
    split: str = "leave one out"

    def __str__(self) -> str:
        among = (
            f"full ranking of {self.items:,} items"
            if self.candidates == "full"
            else f"among {self.items} sampled negatives ({self.candidates})"
        )
        ties = {"worst": "against", "best": "for", "average": "half for"}[self.ties]
        return f"{self.split}, {among}, seen items {self.seen}, ties count {ties} the right item"


def ranks(scores: Array, targets: Array, *, excluded: Array | None = None) -> Ranks:
    """Ranks the right item of each user among all columns.

    Args:
      scores: [U, n], larger is better. A NaN never ranks below anything.
      targets: int [U], columns.
      excluded: int [U, S], columns that are no candidates (items already seen), padded with -1; the
        target stays a candidate even if it is among them.
    """
    own = jnp.take_along_axis(jnp.asarray(scores), targets[:, None], axis=1)
    candidate = _candidates(scores.shape, targets, excluded)
    higher = jnp.sum(~(scores <= own) & candidate, axis=1, dtype=jnp.int32)
    equal = jnp.sum((scores == own) & candidate, axis=1, dtype=jnp.int32)
    return Ranks(higher, equal)


def ranks_by_blocks(
    users: Array,
    items: Array,
    targets: Array,
    *,
    block: int,
    bias: Array | None = None,
    excluded: Array | None = None,
) -> Ranks:
    """As ``ranks`` of ``users @ items.T + bias``, holding [U, block] scores at a time.

    Every score is computed twice, once to find the right item's and once to compare, by the same
    product: so ties are exact. A table that is sharded over devices needs no blocks.

    Args:
      users: [U, d].
      items: [n, d].
      targets: int [U].
      block: items per block.
      bias: [n], or None.
      excluded: see ``ranks``.
    """
    count = len(items)
    blocks = -(-count // block)
    padding = blocks * block - count
    table = jnp.pad(items, ((0, padding), (0, 0))).reshape(blocks, block, -1)
    offset = jnp.zeros(count, users.dtype) if bias is None else bias
    offset = jnp.pad(offset, (0, padding)).reshape(blocks, block)
    starts = jnp.arange(blocks) * block

    def own_score(own: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        table, offset, start = part
        scores = users @ table.T + offset
        column = targets - start
        found = jnp.take_along_axis(scores, jnp.clip(column, 0, block - 1)[:, None], axis=1)[:, 0]
        return jnp.where((column >= 0) & (column < block), found, own), None

    def compare(total: Ranks, part: tuple[Array, Array, Array]) -> tuple[Ranks, None]:
        table, offset, start = part
        scores = users @ table.T + offset
        candidate = _candidates(scores.shape, targets - start, _shifted(excluded, start))
        candidate &= start + jnp.arange(block) < count
        higher = jnp.sum(~(scores <= own[:, None]) & candidate, axis=1, dtype=jnp.int32)
        equal = jnp.sum((scores == own[:, None]) & candidate, axis=1, dtype=jnp.int32)
        return Ranks(total.higher + higher, total.equal + equal), None

    own, _ = lax.scan(own_score, jnp.zeros(len(users), users.dtype), (table, offset, starts))
    zeros = jnp.zeros(len(users), jnp.int32)
    return lax.scan(compare, Ranks(zeros, zeros), (table, offset, starts))[0]


def _shifted(excluded: Array | None, start: Array) -> Array | None:
    return None if excluded is None else jnp.where(excluded < 0, -1, excluded - start)


def _candidates(shape: tuple[int, ...], targets: Array, excluded: Array | None) -> Array:
    """[U, n] bool: the columns that the target is compared with."""
    rows = jnp.arange(shape[0])[:, None]
    candidate = jnp.ones(shape, bool)
    for columns in (targets[:, None], excluded):
        if columns is not None:
            # Negative indices would count from the end; those past the end are dropped.
            columns = jnp.where(columns < 0, shape[1], columns)
            candidate = candidate.at[rows, columns].set(False, mode="drop")
    return candidate


def metrics(
    where: Ranks, ks: Sequence[int] = (5, 10, 20), *, ties: str = "worst"
) -> dict[str, Array]:
    """Hit rate, NDCG and MRR of each user, to be averaged over users.

    With one right item per user, HR@k is also the recall at k. NDCG@k is ``1 / log2(rank + 2)``
    within the first k (ranks count from 0), MRR ``1 / (rank + 1)`` without a cut-off.

    Args:
      where: of U users.
      ks: lengths of the list.
      ties: what an item with the same score is: ``worst``: before the right one, so that a constant
        score earns nothing; ``best``: behind it; ``average``: the mean over all orders of the tied
        items, as scikit-learn's ``ndcg_score``.

    Returns:
      ``hr@<k>``, ``ndcg@<k>`` and ``mrr``, float32 [U].

    Raises:
      ValueError: an unknown name for ties.
    """
    if ties not in TIES:
        raise ValueError(f"ties={ties!r}; choose one of {', '.join(TIES)}.")
    first = where.higher + (where.equal if ties == "worst" else 0)
    last = where.higher + (0 if ties == "best" else where.equal)
    places = (last - first + 1).astype(jnp.float32)
    result = {}
    for k in ks:
        gains = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(np.arange(k) + 2.0))])
        begin, end = jnp.minimum(first, k), jnp.minimum(last + 1, k)
        result[f"hr@{k}"] = (end - begin) / places
        result[f"ndcg@{k}"] = jnp.asarray(gains, jnp.float32)[end] / places
        result[f"ndcg@{k}"] -= jnp.asarray(gains, jnp.float32)[begin] / places
    begin, end = first.astype(jnp.float32), last.astype(jnp.float32)
    many = (digamma(end + 2.0) - digamma(begin + 1.0)) / places
    result["mrr"] = jnp.where(places == 1, 1.0 / (begin + 1.0), many)
    return result


def top_k(
    scores: Array, k: int, *, excluded: Array | None = None, groups: int = 1
) -> tuple[Array, Array]:
    """The best k columns of each row, best first; of equal ones the lower column first.

    Args:
      scores: [U, n].
      k: how many, at most n.
      excluded: see ``ranks``; where fewer than k columns are left, scores of -inf fill the list.
      groups: take the best k of so many groups of columns first. With columns sharded over as many
        devices, only ``groups * k`` scores per row leave theirs.

    Returns:
      Scores and columns, [U, k].
    """
    scores = jnp.asarray(scores)
    rows, count = scores.shape
    if excluded is not None:
        columns = jnp.where(excluded < 0, count, excluded)
        scores = scores.at[jnp.arange(rows)[:, None], columns].set(-jnp.inf, mode="drop")
    size = -(-count // groups)
    if groups == 1 or size < k:
        return lax.top_k(scores, k)
    scores = jnp.pad(scores, ((0, 0), (0, size * groups - count)), constant_values=-jnp.inf)
    best, column = lax.top_k(scores.reshape(rows, groups, size), k)
    column = (column + jnp.arange(groups)[:, None] * size).reshape(rows, -1)
    best, place = lax.top_k(best.reshape(rows, -1), k)
    return best, jnp.minimum(jnp.take_along_axis(column, place, axis=1), count - 1)


def list_metrics(
    lists: Array, relevant: Array, ks: Sequence[int] = (5, 10, 20)
) -> dict[str, Array]:
    """Metrics of top-k lists against several right items per user, as in temporal splits.

    Args:
      lists: int [U, K], items, best first; K at least the largest k.
      relevant: int [U, R], the right items, padded with -1; at least one per user.
      ks: lengths of the list.

    Returns:
      ``recall@<k>`` (share of the right items in the list), ``hr@<k>`` (any of them), ``ndcg@<k>``
      (DCG over that of the best possible list) and ``mrr@<k>`` (1 / place of the first), [U].
    """
    hits = (lists[:, :, None] == relevant[:, None, :]) & (relevant >= 0)[:, None, :]
    hit = hits.any(axis=2).astype(jnp.float32)
    number = jnp.sum(relevant >= 0, axis=1)
    discount = 1.0 / np.log2(np.arange(lists.shape[1]) + 2.0)
    ideal = jnp.asarray(np.concatenate([[0.0], np.cumsum(discount)]), jnp.float32)
    result = {}
    for k in ks:
        found = hit[:, :k]
        first = 1.0 / (jnp.argmax(found, axis=1) + 1.0)
        result[f"recall@{k}"] = found.sum(axis=1) / number
        result[f"hr@{k}"] = found.max(axis=1)
        result[f"ndcg@{k}"] = (found * discount[:k]).sum(axis=1) / ideal[jnp.minimum(number, k)]
        result[f"mrr@{k}"] = jnp.where(found.any(axis=1), first, 0.0)
    return result
