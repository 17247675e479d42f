"""Interactions to the batches of sequential recommenders, and the logs that recipes know by name.

What a user did last is never trained on: windows are cut from the training part of a
``LeaveOneOut``, histories end before what is to be predicted, and negatives exclude everything that
the user has ever seen, the right item included.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from transfer_jax.data import interactions, named
from transfer_jax.data.interactions import Interactions, LeaveOneOut, Sequences
from transfer_jax.data.paths import require, require_file
from transfer_jax.data.sources import ArraySource, Example

SPLITS = ("validation", "test")
SAMPLERS = ("popularity", "uniform")


# -- training -------------------------------------------------------------------------------------


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where the windows of a sequence begin, newest first (BERT4Rec's released code).

    A sequence that fits is one window. Of a longer one, windows end at its end, ``stride`` before
    it, and so on, and one begins at its beginning: ``ceil((length - window) / stride) + 1``.
    """
    if length <= window:
        return [0]
    return [*range(length - window, 0, -stride), 0]


def windows(
    sequences: Sequences,
    length: int,
    *,
    stride: int | None = None,
    side: str = "left",
    minimum: int = 1,
) -> ArraySource:
    """Cuts training windows.

    Args:
      sequences: of every user.
      length: N, of the windows.
      stride: between windows of one sequence; None = N, so that they hardly overlap.
      side: where shorter sequences are aligned, ``left`` or ``right``; the rest is 0.
      minimum: shorter sequences are left out; a next-item loss needs two items.

    Returns:
      Examples ``{"inputs": int32 [N], "user": int32}``.

    Raises:
      ValueError: a stride below 1, an unknown side, or no sequence is long enough.
    """
    stride = length if stride is None else stride
    if stride < 1:
        raise ValueError(f"stride={stride}: windows must move by at least 1.")
    starts, owners = [], []
    for user, size in enumerate(sequences.lengths):
        if size >= minimum:
            found = window_starts(int(size), length, stride)
            starts += [int(sequences.offsets[user]) + s for s in found]
            owners += [user] * len(found)
    if not owners:
        raise ValueError(f"no sequence has {minimum} items: there is nothing to train on.")
    begin, users = np.array(starts), np.array(owners, np.int32)
    # Every window is a list of its own.
    ends = np.minimum(begin + length, sequences.offsets[1:][users])
    inputs = _rows(sequences.items, begin, ends, length, side)
    return ArraySource({"inputs": inputs, "user": users})


def prefixes(sequences: Sequences, length: int, *, side: str = "right") -> ArraySource:
    """Every item but each user's first, with what came before it: m - 1 examples of m items.

    Args:
      sequences: of every user, what is trained on.
      length: N, the newest items that are kept of a history.
      side: where histories are aligned, ``left`` or ``right``; the rest is 0.

    Returns:
      Examples ``{"inputs": int32 [N], "labels": int32, "user": int32, "prefix": int32}``, those of
      a user together and in order of time; ``prefix`` numbers the M examples.

    Raises:
      ValueError: an unknown side, or nobody has two items.
    """
    users = np.repeat(np.arange(len(sequences)), sequences.lengths)
    first = sequences.offsets[:-1][users]
    target = np.flatnonzero(np.arange(len(users)) > first)
    if not len(target):
        raise ValueError("no sequence has 2 items: there is nothing to train on.")
    begin = np.maximum(first[target], target - length)
    return ArraySource(
        {
            "inputs": _rows(sequences.items, begin, target, length, side),
            "labels": sequences.items[target].astype(np.int32),
            "user": users[target].astype(np.int32),
            "prefix": np.arange(len(target), dtype=np.int32),
        }
    )


def _rows(
    items: np.ndarray, begin: np.ndarray, end: np.ndarray, length: int, side: str
) -> np.ndarray:
    """``items[begin:end]`` as rows int32 [W, length], padded with 0."""
    if side not in ("left", "right"):
        raise ValueError(f"side={side!r}; choose 'left' or 'right'.")
    shift = 0 if side == "left" else (length - (end - begin))[:, None]
    source = begin[:, None] + np.arange(length) - shift
    valid = (source >= begin[:, None]) & (source < end[:, None])
    return np.where(valid, items[np.where(valid, source, 0)], 0).astype(np.int32)


def static_copies(source: ArraySource, copies: int = 11) -> ArraySource:
    """Repeats every window, with the number of the copy as ``draw``, for masks that never change.

    The released files of BERT4Rec have ten copies of each window with random masks and one whose
    last item is masked; see ``objectives.recommend.Cloze``.
    """
    arrays = {name: np.repeat(a, copies, axis=0) for name, a in source.arrays.items()}
    return ArraySource({**arrays, "draw": np.arange(len(source) * copies, dtype=np.int32)})


# -- evaluation -----------------------------------------------------------------------------------


class EvaluationSource:
    """One example per user: the history, the right item, and what is not to be recommended.

    Rows are made when they are read: the histories of long logs do not fit memory when padded.

    Args:
      history: of every user.
      labels: int [U], the right items; users with 0 are left out.
      length: N, of ``inputs``: the newest items, and [MASK] after them where there is one.
      side: where the items are aligned, ``left`` or ``right``.
      mask_id: [MASK]; None for models that predict from the last item.
      seen: add ``seen``, the whole history, padded with -1.
      negatives: int [U, C], or None.

    Raises:
      ValueError: nobody has a right item.
    """

    def __init__(
        self,
        history: Sequences,
        labels: np.ndarray,
        length: int,
        *,
        side: str = "left",
        mask_id: int | None = None,
        seen: bool = True,
        negatives: np.ndarray | None = None,
    ):
        self.users = np.flatnonzero(labels)
        if not len(self.users):
            raise ValueError("no user has an item to be predicted.")
        self.history, self.labels, self.length, self.side = history, labels, length, side
        self.mask_id, self.negatives = mask_id, negatives
        self.seen = max(1, int(history.lengths.max())) if seen else 0

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int, /) -> Example:
        return {name: a[0] for name, a in self.take(np.array([index])).items()}

    def take(self, indices: np.ndarray) -> Example:
        users = self.users[indices]
        history = select(self.history, users)
        example = {
            "inputs": histories(history, self.length, side=self.side, mask_id=self.mask_id),
            "labels": self.labels[users].astype(np.int32),
            "user": users.astype(np.int32),
        }
        if self.seen:
            example["seen"] = history.padded(self.seen, fill=-1)
        if self.negatives is not None:
            example["negatives"] = self.negatives[users]
        return example


def select(sequences: Sequences, users: np.ndarray) -> Sequences:
    """The sequences of some users, int [K], in their order."""
    return Sequences.of([sequences[user] for user in users])


def histories(
    sequences: Sequences, length: int, *, side: str = "left", mask_id: int | None = None
) -> np.ndarray:
    """What a model reads to predict what comes after each sequence, int32 [U, length].

    The newest items, or the newest ``length - 1`` and [MASK] where there is one.
    """
    lists = sequences
    if mask_id is not None:
        lists = Sequences.of([np.append(s[-(length - 1) :], mask_id) for s in sequences])
    return lists.padded(length, side="right" if side == "left" else "left")


def evaluation(split: LeaveOneOut, name: str, length: int, **options: Any) -> EvaluationSource:
    """The users of a split with what they did before it.

    Args:
      split: the log.
      name: ``validation`` or ``test``.
      length: see ``EvaluationSource``.
      **options: its further arguments.
    """
    labels = split.test if name == "test" else split.validation
    return EvaluationSource(split.history(name), labels, length, **options)


def negatives(split: LeaveOneOut, count: int, *, sampler: str, seed: int) -> np.ndarray:
    """Draws items that the user has never met, for rankings among samples.

    Args:
      split: the log; popularity is counted over all of it, as in BERT4Rec's code.
      count: per user.
      sampler: ``popularity`` or ``uniform``.
      seed: non-negative.

    Returns:
      int32 [U, count]; 0 for users that are not evaluated.

    Raises:
      ValueError: an unknown sampler, or a user has met too many items.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler!r}; choose one of {', '.join(SAMPLERS)}.")
    known = split.history("test")
    counts = interactions.item_counts(known, split.num_items)
    counts += np.bincount(split.test, minlength=split.num_items + 1)
    weights = counts if sampler == "popularity" else np.ones(split.num_items + 1)
    users = split.evaluated()
    drawn = np.zeros((len(known), count), np.int32)
    drawn[users] = interactions.sample_negatives(
        select(known, users), split.test[users], weights, count, seed=seed
    )
    return drawn


# -- logs by name ---------------------------------------------------------------------------------


def ml100k() -> Interactions:
    """MovieLens-100K in RecBole's format: 943 users, 1,682 items, 100,000 ratings."""
    path = require("ml100k", "ml-100k.inter.gz")
    return interactions.read_table(path, rating="rating")


def amazon_scientific_small() -> Interactions:
    """Amazon Industrial and Scientific, a part: 2,928 users, 1,585 items, 19,712 actions."""
    return interactions.read_lists(require("amazon_scientific_small", "sequences.txt.gz"))


def amazon_beauty_bert4rec() -> Interactions:
    """Amazon Beauty as BERT4Rec has it: 40,226 users, 54,542 items, 353,962 actions."""
    return interactions.read_pairs(require("amazon_beauty_bert4rec", "beauty.txt.gz"))


def amazon_office_5core() -> Interactions:
    """Amazon Office Products, 5-core: 4,905 users, 2,420 items, 53,258 actions."""
    return interactions.read_pairs(require("amazon_office_5core", "Office.txt.gz"))


def movielens_files(path: str) -> Interactions:
    """``ratings.dat``, ``u.data`` or ``ratings.csv`` of any MovieLens release."""
    return interactions.read_movielens(_file(path))


def pairs_file(path: str, minimum: int = 0) -> Interactions:
    """Lines ``user item`` in order of time; users with fewer than ``minimum`` items are dropped."""
    log = interactions.read_pairs(_file(path))
    return interactions.k_core(log, users=minimum, items=0) if minimum else log


def table_file(
    path: str, user: str = "user_id", item: str = "item_id", time: str = "timestamp"
) -> Interactions:
    """A CSV, TSV or ``.inter`` file with a header; ``time=""``: rows are in order of time."""
    return interactions.read_table(_file(path), user=user, item=item, time=time or None)


def _file(path: str) -> Any:
    return require_file(path, "Give the file as --config.data.options.path=FILE.")


def random_walks(
    seed: int = 0, users: int = 4000, items: int = 50, length: int = 20
) -> Interactions:
    """Walks on a ring of items, each step one back, none or one on, with equal probability.

    The best guess of the item after a walk is right with probability 1/3. Of an item between two
    that are known it is 5/9: the two steps around it are 9 equally likely pairs with 5 different
    sums, and for every sum one pair is guessed.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    steps = rng.integers(-1, 2, (users, length))
    steps[:, 0] = rng.integers(0, items, users)
    walks = steps.cumsum(axis=1) % items
    owners = np.repeat(np.arange(users), length)
    return Interactions.of(owners, walks.reshape(-1))


LOGS: dict[str, Callable[..., Interactions]] = {
    # Built in.
    "generated": interactions.generated,
    "random_walks": random_walks,
    # Files in the directory named by TRANSFER_JAX_DATA.
    "amazon_beauty_bert4rec": amazon_beauty_bert4rec,
    "amazon_office_5core": amazon_office_5core,
    "amazon_scientific_small": amazon_scientific_small,
    "ml100k": ml100k,
    # Files whose place is an option.
    "movielens_files": movielens_files,
    "pairs_file": pairs_file,
    "table_file": table_file,
}


def load_log(name: str, **options: Any) -> Interactions:
    """Returns a log by name.

    Args:
      name: a key of ``LOGS``.
      **options: arguments of that function; None = not given.

    Raises:
      ValueError: no such log; has the nearest names.
      TypeError: an option that it does not have; has those there are.
    """
    given = {option: value for option, value in options.items() if value is not None}
    return named.call("interaction log", LOGS, name, **given)
