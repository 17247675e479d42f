"""Recommenders that only count: popularity, transitions between items, items of the same users.

The honest floor of every comparison. A scorer maps histories to scores float32 [U, n + 1]; column 0
is the padding.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from transfer_jax.data.interactions import Sequences, item_counts
from transfer_jax.data.recommend import EvaluationSource, select
from transfer_jax.metrics import ranking

Scorer = Callable[[Sequences], np.ndarray]


def popularity(train: Sequences, num_items: int) -> Scorer:
    """Everybody gets the items that occur most often."""
    counts = item_counts(train, num_items).astype(np.float32)
    return lambda history: np.tile(counts, (len(history), 1))


def markov(train: Sequences, num_items: int) -> Scorer:
    """How often each item has followed the user's last one; ties go to the more popular item."""
    from scipy import sparse

    first, second = train.items[:-1], train.items[1:]
    inside = np.ones(len(first), bool)
    ends = train.offsets[1:-1]
    inside[ends[(ends > 0) & (ends < len(train.items))] - 1] = False  # two users' items
    ones = np.ones(int(inside.sum()), np.float32)
    shape = (num_items + 1, num_items + 1)
    follows = sparse.csr_matrix((ones, (first[inside], second[inside])), shape)
    counts = item_counts(train, num_items)
    tie = (0.5 * counts / (1 + counts.max())).astype(np.float32)  # less than one transition

    def score(history: Sequences) -> np.ndarray:
        last = [s[-1] if len(s) else 0 for s in history]
        return follows[last].toarray() + tie

    return score


def item_knn(train: Sequences, num_items: int, *, last: int = 5) -> Scorer:
    """Cosine of the sets of users of two items, summed over the user's last items.

    The r-th newest item counts 1 / r.

    Args:
      train: of every user.
      num_items: n.
      last: how many of the newest items count.
    """
    from scipy import sparse

    owners = np.repeat(np.arange(len(train)), train.lengths)
    shape = (len(train), num_items + 1)
    users = sparse.csr_matrix((np.ones(len(owners), np.float32), (owners, train.items)), shape)
    users.data[:] = 1.0  # a set: repeats count once
    norms = np.sqrt(np.maximum(users.sum(axis=0).A1, 1.0)).astype(np.float32)
    users = users @ sparse.diags(1.0 / norms)
    similar = (users.T @ users).tocsr()
    similar.setdiag(0.0)

    def score(history: Sequences) -> np.ndarray:
        recent = Sequences.of([s[-last:] for s in history])
        rows = np.repeat(np.arange(len(recent)), recent.lengths)
        age = recent.offsets[1:][rows] - np.arange(len(rows))
        weights = (1.0 / age).astype(np.float32)
        chosen = sparse.csr_matrix((weights, (rows, recent.items)), (len(recent), num_items + 1))
        return (chosen @ similar).toarray()

    return score


SCORERS: dict[str, Callable[[Sequences, int], Scorer]] = {
    "pop": popularity,
    "markov1": markov,
    "item_knn": item_knn,
}


def check(names: Iterable[str]) -> None:
    """Raises ``ValueError`` if one of ``names`` is no scorer; it has those there are."""
    for name in names:
        if name not in SCORERS:
            raise ValueError(f"there is no baseline {name!r}; choose from {', '.join(SCORERS)}.")


@functools.partial(jax.jit, static_argnames=("ks", "ties"))
def _ranked(
    scores: jax.Array, labels: jax.Array, seen: jax.Array | None, negatives: jax.Array | None,
    ks: tuple[int, ...], ties: str,
) -> dict[str, jax.Array]:  # fmt: skip
    scores = scores.at[:, 0].set(-jnp.inf)
    values = ranking.metrics(ranking.ranks(scores, labels, excluded=seen), ks, ties=ties)
    if negatives is not None:
        among = jnp.concatenate([labels[:, None], negatives], axis=1)
        where = ranking.ranks(jnp.take_along_axis(scores, among, axis=1), jnp.zeros_like(labels))
        found = ranking.metrics(where, ks, ties=ties)
        values |= {f"sampled_{name}": value for name, value in found.items()}
    return values


def rank_scorer(
    scorer: Scorer,
    source: EvaluationSource,
    *,
    ks: Sequence[int] = (1, 5, 10, 20),
    ties: str = "worst",
    block: int = 512,
) -> dict[str, float]:
    """Evaluates a scorer as ``objectives.recommend.Recommendation`` evaluates a network.

    Args:
      scorer: see the module.
      source: users, their histories and right items.
      ks, ties: see ``metrics.ranking.metrics``.
      block: users at a time.

    Returns:
      The metrics of the full ranking, and with the prefix ``sampled_`` of that among negatives.
    """

    totals: dict[str, float] = {}
    for start in range(0, len(source), block):
        indices = np.arange(start, min(start + block, len(source)))
        batch = source.take(indices)
        scores = scorer(select(source.history, source.users[indices]))
        values = _ranked(
            scores, batch["labels"], batch.get("seen"), batch.get("negatives"), tuple(ks), ties
        )
        for name, value in values.items():
            totals[name] = totals.get(name, 0.0) + float(value.sum())
    return {name: total / len(source) for name, total in totals.items()}
