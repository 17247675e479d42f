"""Who used what, and when: readers, k-core, splits, sequences and negatives for recommenders.

Items are numbered from 1, so that 0 is padding; users from 0.
"""

import csv
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from transfer_jax.data.texts import open_text, records


@dataclasses.dataclass(frozen=True, eq=False)
class Interactions:
    """A log, sorted by user and within a user by time.

    Attributes:
      users: int32 [N], 0 .. U - 1.
      items: int32 [N], 1 .. n.
      times: float64 [N].
      ratings: float32 [N]; ones where the log has none.
      user_names: [U], the users' names in the file.
      item_names: [n + 1], the items' names; of the padding, "".
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    ratings: np.ndarray
    user_names: np.ndarray
    item_names: np.ndarray

    @classmethod
    def of(
        cls,
        users: ArrayLike,
        items: ArrayLike,
        times: ArrayLike | None = None,
        ratings: ArrayLike | None = None,
    ) -> "Interactions":
        """Numbers users and items by first appearance, and sorts stably.

        Args:
          users, items: [N], any names.
          times: [N] numbers; None = the order is the time.
          ratings: [N] numbers, or None.

        Raises:
          ValueError: nothing is given, columns of different lengths, or a time that is no number.
        """
        users, items = np.asarray(users).astype(str), np.asarray(items).astype(str)
        count = len(users)
        times = np.arange(count) if times is None else times
        ratings = np.ones(count) if ratings is None else ratings
        times, ratings = np.asarray(times, np.float64), np.asarray(ratings, np.float32)
        lengths = {len(users), len(items), len(times), len(ratings)}
        if lengths != {count} or not count:
            raise ValueError(f"columns of one length, at least 1, are needed; got {lengths}.")
        if np.isnan(times).any():
            row = int(np.flatnonzero(np.isnan(times))[0])
            raise ValueError(f"row {row} (of user {users[row]}) has no time.")
        user_names, user_ids = _numbered(users)
        item_names, item_ids = _numbered(items)
        order = np.lexsort((times, user_ids))  # stable: rows of one time stay in order
        return cls(
            user_ids[order].astype(np.int32),
            (item_ids[order] + 1).astype(np.int32),
            times[order],
            ratings[order],
            user_names,
            np.concatenate([[""], item_names]),
        )

    def __len__(self) -> int:
        return len(self.users)

    @property
    def num_users(self) -> int:
        return len(self.user_names)

    @property
    def num_items(self) -> int:
        """n, without the padding."""
        return len(self.item_names) - 1

    def where(self, keep: np.ndarray) -> "Interactions":
        """Returns the rows of a mask [N], users and items renumbered in their old order."""
        users, items = self.users[keep], self.items[keep]
        known_users, new_users = np.unique(users, return_inverse=True)
        known_items, new_items = np.unique(items, return_inverse=True)
        return Interactions(
            new_users.astype(np.int32),
            (new_items + 1).astype(np.int32),
            self.times[keep],
            self.ratings[keep],
            self.user_names[known_users],
            np.concatenate([[""], self.item_names[known_items]]),
        )

    def by_frequency(self) -> "Interactions":
        """Returns the log with items numbered from the most to the least frequent."""
        counts = np.bincount(self.items, minlength=self.num_items + 1)[1:]
        order = np.argsort(-counts, kind="stable")
        number = np.empty(self.num_items + 1, np.int32)
        number[0], number[order + 1] = 0, np.arange(1, self.num_items + 1)
        names = np.concatenate([[""], self.item_names[order + 1]])
        return dataclasses.replace(self, items=number[self.items], item_names=names)

    def sequences(self) -> "Sequences":
        """The items of every user in order of time."""
        counts = np.bincount(self.users, minlength=self.num_users)
        return Sequences(self.items, np.concatenate([[0], np.cumsum(counts)]))


def _numbered(names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known, first, ids = np.unique(names, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    place = np.empty(len(known), np.int64)
    place[order] = np.arange(len(known))
    return known[order], place[ids]


@dataclasses.dataclass(frozen=True, eq=False)
class Sequences:
    """Lists of unequal length end to end, one per user.

    Attributes:
      items: int32 [N].
      offsets: int64 [U + 1]; user u has ``items[offsets[u]:offsets[u + 1]]``.
    """

    items: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, lists: Iterable[ArrayLike]) -> "Sequences":
        """Lays lists of items end to end."""
        arrays = [np.asarray(x, np.int32).reshape(-1) for x in lists]
        items = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
        return cls(items, np.concatenate([[0], np.cumsum([len(x) for x in arrays])]).astype(int))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, user: int) -> np.ndarray:
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[user] for user in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """int64 [U]."""
        return np.diff(self.offsets)

    def padded(self, length: int, *, side: str = "right", fill: int = 0) -> np.ndarray:
        """Returns the last ``length`` items of every user as int32 [U, length].

        Args:
          length: of the rows.
          side: where the padding stands.
          fill: the padding.

        Raises:
          ValueError: an unknown side.
        """
        if side not in ("left", "right"):
            raise ValueError(f"side={side!r}; choose 'left' or 'right'.")
        kept = np.minimum(self.lengths, length)
        columns = np.arange(length)
        if side == "right":
            place, valid = columns, columns < kept[:, None]
            source = (self.offsets[1:] - kept)[:, None] + place
        else:
            valid = columns >= length - kept[:, None]
            source = self.offsets[1:, None] - length + columns
        return np.where(valid, self.items[np.where(valid, source, 0)], fill).astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """Each user's last item is for testing, the one before for validation, the rest for training.

    Attributes:
      train: [U] lists; of users with too few items, all of them.
      validation: int32 [U], 0 for users with too few items.
      test: int32 [U], alike.
      num_items: n.
    """

    train: Sequences
    validation: np.ndarray
    test: np.ndarray
    num_items: int

    def history(self, split: str) -> Sequences:
        """What is known of each user when ``split`` is predicted.

        Args:
          split: ``validation``: the training items; ``test``: and the validation item.

        Raises:
          ValueError: an unknown split.
        """
        if split == "validation":
            return self.train
        if split != "test":
            raise ValueError(f"split={split!r}; choose 'validation' or 'test'.")
        pairs = zip(self.train, self.validation)
        return Sequences.of([np.append(known, item) if item else known for known, item in pairs])

    def evaluated(self) -> np.ndarray:
        """int64: the users that have a test item."""
        return np.flatnonzero(self.test)


def leave_one_out(log: Interactions, *, minimum: int = 3) -> LeaveOneOut:
    """Splits every user's sequence; users with fewer than ``minimum`` items only train."""
    sequences = log.sequences()
    held_out = sequences.lengths >= max(minimum, 3)
    last = sequences.offsets[1:] - 1
    test = np.where(held_out, sequences.items[last], 0).astype(np.int32)
    validation = np.where(held_out, sequences.items[last - 1], 0).astype(np.int32)
    train = [s[:-2] if out else s for s, out in zip(sequences, held_out)]
    return LeaveOneOut(Sequences.of(train), validation, test, log.num_items)


def temporal_split(
    log: Interactions, *, validation: float = 0.1, test: float = 0.1
) -> dict[str, Interactions]:
    """Splits at two moments that are the same for all users: nothing of the future is trained on.

    Users and items keep their numbers, also those that occur in one part only.

    Args:
      log: the interactions.
      validation: the share of all interactions between the moments.
      test: the share after the second one.

    Raises:
      ValueError: shares that leave nothing to train on, or moments that coincide.
    """
    if min(validation, test) <= 0 or validation + test >= 1:
        raise ValueError(f"validation={validation} and test={test} must be > 0 and sum to < 1.")
    first, second = np.quantile(log.times, [1 - validation - test, 1 - test])
    parts = {
        "train": log.times < first,
        "validation": (log.times >= first) & (log.times < second),
        "test": log.times >= second,
    }
    if empty := [name for name, rows in parts.items() if not rows.any()]:
        raise ValueError(f"too many interactions happen at one time: no {' and no '.join(empty)}.")
    return {
        name: dataclasses.replace(
            log,
            users=log.users[rows],
            items=log.items[rows],
            times=log.times[rows],
            ratings=log.ratings[rows],
        )
        for name, rows in parts.items()
    }


def k_core(log: Interactions, *, users: int = 5, items: int = 5) -> Interactions:
    """Removes users and items with too few interactions, until none is left.

    Args:
      log: the interactions.
      users: each user has at least so many; 0 = any.
      items: each item has at least so many; 0 = any.

    Raises:
      ValueError: nothing is left.
    """
    keep = np.ones(len(log), bool)
    while True:
        of_users = np.bincount(log.users[keep], minlength=log.num_users)[log.users]
        of_items = np.bincount(log.items[keep], minlength=log.num_items + 1)[log.items]
        kept = keep & (of_users >= users) & (of_items >= items)
        if not kept.any():
            raise ValueError(
                f"no interaction is in the core of {users} per user, {items} per item."
            )
        if kept.sum() == keep.sum():
            return log.where(kept)
        keep = kept


def item_counts(sequences: Sequences, num_items: int) -> np.ndarray:
    """How often each item occurs, int64 [n + 1]; index 0 is the padding."""
    return np.bincount(sequences.items, minlength=num_items + 1)


def sample_negatives(
    known: Sequences,
    targets: np.ndarray,
    weights: np.ndarray,
    count: int,
    *,
    seed: int,
) -> np.ndarray:
    """Draws items for each user that are neither known nor the target, without replacement.

    The draws of a user depend on the seed and the user's number alone.

    Args:
      known: the items of every user, of all splits.
      targets: int [U].
      weights: [n + 1], in proportion to which items are drawn: ``item_counts`` for popularity, ones
        for uniform. Index 0 is ignored, and an item of weight 0 is never drawn.
      count: how many per user.
      seed: non-negative.

    Returns:
      int32 [U, count].

    Raises:
      ValueError: a user has fewer than ``count`` items to draw from.
    """
    weights = np.asarray(weights, np.float64)
    with np.errstate(divide="ignore"):
        log_weights = np.log(weights)
    log_weights[0] = -np.inf
    drawn = np.empty((len(known), count), np.int32)
    for user, items in enumerate(known):
        sequence = np.random.SeedSequence(seed, spawn_key=(user,))
        rng = np.random.Generator(np.random.Philox(sequence))
        # Gumbel noise on log weights: the largest are a draw without replacement.
        scores = log_weights + rng.gumbel(size=len(weights))
        scores[items] = -np.inf
        scores[targets[user]] = -np.inf
        best = np.argpartition(-scores, count - 1)[:count] if count < len(scores) else None
        if best is None or not np.isfinite(scores[best]).all():
            raise ValueError(
                f"user {user} knows {len(items)} items; fewer than {count} others can be drawn."
            )
        drawn[user] = best[np.argsort(-scores[best])]
    return drawn


# -- readers --------------------------------------------------------------------------------------


def read_table(
    path: str | Path,
    *,
    user: str = "user_id",
    item: str = "item_id",
    time: str | None = "timestamp",
    rating: str | None = None,
    delimiter: str | None = None,
) -> Interactions:
    """Reads a CSV or TSV file with a header, or a RecBole ``.inter`` file; ``.gz`` too.

    A header such as ``user_id:token`` (RecBole) names the column ``user_id``.

    Args:
      path: of the file.
      user, item: names of the columns.
      time: name of the column of numbers; None = rows are in order of time.
      rating: name of the column, or None.
      delimiter: between fields; None = a tab if the header has one, else a comma.

    Raises:
      ValueError: a column is missing (names those there), or a field is no number (names the row).
    """
    path = Path(path)
    with open_text(path) as file:
        first = file.readline().rstrip("\r\n")
        delimiter = delimiter or ("\t" if "\t" in first else ",")
        header = [name.split(":")[0] for name in next(csv.reader([first], delimiter=delimiter))]
        wanted = [name for name in (user, item, time, rating) if name is not None]
        if missing := [name for name in wanted if name not in header]:
            raise ValueError(
                f"{path} has no column {', '.join(map(repr, missing))}; its columns are "
                f"{', '.join(header)}."
            )
        columns: dict[str, list[str]] = {name: [] for name in wanted}
        places = [(columns[name], header.index(name)) for name in wanted]
        for number, row in enumerate(csv.reader(file, delimiter=delimiter), start=2):
            if len(row) < len(header):
                raise ValueError(f"{path}, line {number}: {len(row)} fields, not {len(header)}.")
            for values, place in places:
                values.append(row[place])

    def numbers(name: str | None) -> np.ndarray | None:
        if name is None:
            return None
        try:
            return np.array(columns[name], np.float64)
        except ValueError:
            bad = next(i for i, value in enumerate(columns[name]) if not _is_number(value))
            raise ValueError(
                f"{path}, line {bad + 2}: {name}={columns[name][bad]!r} is no number."
            ) from None

    return Interactions.of(columns[user], columns[item], numbers(time), numbers(rating))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_pairs(path: str | Path) -> Interactions:
    """Reads lines ``user item`` in order of time, as the files of BERT4Rec and SASRec."""
    rows = _rows(Path(path), None, 2)
    return Interactions.of([r[0] for r in rows], [r[1] for r in rows])


def read_lists(path: str | Path) -> Interactions:
    """Reads one user per line: the items in order of time, between spaces; users are numbered."""
    with open_text(Path(path)) as file:
        lists = [line.split() for line in file if line.strip()]
    owners = np.repeat(np.arange(len(lists)), [len(items) for items in lists])
    return Interactions.of(owners, [item for items in lists for item in items])


def read_movielens(path: str | Path) -> Interactions:
    """Reads MovieLens' ``ratings.dat`` (fields between ``::``), ``u.data`` or ``ratings.csv``."""
    path = Path(path)
    if path.suffix == ".csv":
        return read_table(path, user="userId", item="movieId", rating="rating")
    rows = _rows(path, "::" if path.suffix == ".dat" else None, 4)
    users, items, ratings, times = zip(*rows)
    return Interactions.of(users, items, np.array(times, np.float64), np.array(ratings, np.float32))


def _rows(path: Path, delimiter: str | None, fields: int) -> list[list[str]]:
    with open_text(path) as file:
        rows = [line.split(delimiter) for line in file if line.strip()]
    if bad := [number for number, row in enumerate(rows, start=1) if len(row) != fields]:
        raise ValueError(f"{path}, line {bad[0]}: {len(rows[bad[0] - 1])} fields, not {fields}.")
    return [[field.strip() for field in row] for row in rows]


def read_amazon_reviews(path: str | Path) -> Interactions:
    """Reads Amazon reviews, one JSON object per line: of 2014 and 2018, or of 2023."""
    users, items, times, ratings = [], [], [], []
    for _, record in records(Path(path)):
        new = "user_id" in record  # the release of 2023, in milliseconds
        users.append(record["user_id" if new else "reviewerID"])
        items.append(record["parent_asin" if new else "asin"])
        times.append(record["timestamp"] / 1000 if new else record["unixReviewTime"])
        ratings.append(record["rating" if new else "overall"])
    return Interactions.of(users, items, times, ratings)


# -- generated ------------------------------------------------------------------------------------


def generated(
    seed: int = 0, *, users: int = 600, items: int = 200, groups: int = 10, length: int = 24
) -> Interactions:
    """A log with structure to be learned: users walk through groups of items that they like.

    Items of a group follow one another on a ring, with popular ones more often: from item k of a
    group, the next is k + 1 with probability 0.6, another popular item of the user's groups
    otherwise.

    Args:
      seed: non-negative.
      users, items, groups: how many; items divide into groups.
      length: the mean number of items of a user, at least 5.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    size = items // groups
    popularity = 1.0 / np.arange(1, size + 1)
    popularity /= popularity.sum()
    lists = []
    for _ in range(users):
        liked = rng.choice(groups, 2, replace=False)
        group, place = rng.choice(liked), rng.choice(size, p=popularity)
        walk = []
        for _ in range(5 + rng.poisson(length - 5)):
            walk.append(group * size + place + 1)
            if rng.random() < 0.6:
                place = (place + 1) % size
            else:
                group, place = rng.choice(liked), rng.choice(size, p=popularity)
        lists.append(walk)
    owners = np.repeat(np.arange(users), [len(walk) for walk in lists])
    return Interactions.of(owners, np.concatenate(lists))
