"""Parts and unions of sources: splits by fraction, class filters, few-shot sets, concatenation."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from transfer_jax.data.sources import ArraySource, Example, Source, read, stack, take


class Subset:
    """The examples of ``source`` at ``indices`` ([K] ints), in that order.

    Raises:
      ValueError: an index outside the source.
    """

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
        self.source = source
        self.indices = np.asarray(indices, np.int64)
        if len(self.indices) and not 0 <= self.indices.min() <= self.indices.max() < len(source):
            raise ValueError(
                f"indices {self.indices.min()}..{self.indices.max()} reach outside a source of "
                f"{len(source)} examples"
            )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        return self.source[int(self.indices[index])]

    def take(self, indices: np.ndarray) -> Example:
        return take(self.source, self.indices[indices])


class Concatenation:
    """The examples of several sources, one source after the other; all with the same keys."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = tuple(sources)
        self.ends = np.cumsum([len(source) for source in self.sources])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} outside a concatenation of {len(self)} examples")
        which = int(np.searchsorted(self.ends, index, side="right"))
        start = int(self.ends[which - 1]) if which else 0
        return self.sources[which][int(index) - start]

    def take(self, indices: np.ndarray) -> Example:
        return stack([self[int(i)] for i in indices])


class Mapped:
    """The examples of ``source``, each given through ``fn`` (``example -> example``).

    Args:
      source: a source, or any other sequence of what ``fn`` takes.
      fn: must be deterministic and safe to call from several threads.
      batched: whether ``fn`` may as well be given a dictionary of stacked examples, and then
        returns what it would for each of them, stacked; saves the per-example work.
    """

    def __init__(self, source: Any, fn: Callable[[Any], Example], *, batched: bool = False):
        self.source = source
        self.fn = fn
        self.batched = batched

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Example:
        return self.fn(self.source[int(index)])

    def take(self, indices: np.ndarray) -> Example:
        if self.batched:
            return self.fn(take(self.source, indices))
        return stack([self.fn(example) for example in read(self.source, indices)])


def labels_of(source: Source, key: str = "labels") -> np.ndarray:
    """Returns the labels of all examples, [N]; from arrays where they lie in memory, else by
    reading every example."""
    if isinstance(source, ArraySource):
        return source.arrays[key]
    if isinstance(source, Subset):
        return labels_of(source.source, key)[source.indices]
    if isinstance(source, Concatenation):
        return np.concatenate([labels_of(part, key) for part in source.sources])
    return np.array([source[i][key] for i in range(len(source))])


def _counts(size: int, fractions: Sequence[float]) -> np.ndarray:
    """Cuts ``size`` into parts by rounding the cumulative fractions: parts always sum to it."""
    edges = np.rint(np.cumsum([0.0, *fractions]) * size).astype(int)
    return np.diff(edges)


def _check_fractions(fractions: Mapping[str, float]) -> None:
    if any(f < 0 for f in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ValueError(f"fractions must not be negative and must sum to 1; got {fractions}")


def split(
    source: Source, fractions: Mapping[str, float], seed: int | None = None
) -> dict[str, Source]:
    """Splits a source into disjoint parts that together hold every example.

    Args:
      source: N examples.
      fractions: name of the part -> fraction of the examples; they sum to 1.
      seed: of the permutation before the cut; None cuts in the order of the source.

    Raises:
      ValueError: fractions negative or not summing to 1.
    """
    _check_fractions(fractions)
    order = np.arange(len(source))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(order)
    cuts = np.cumsum(_counts(len(source), list(fractions.values())))[:-1]
    return {name: Subset(source, part) for name, part in zip(fractions, np.split(order, cuts))}


def stratified_split(
    source: Source, fractions: Mapping[str, float], seed: int, key: str = "labels"
) -> dict[str, Source]:
    """As ``split``, class by class, so that every part has the class proportions of the whole.

    Args:
      source: N examples.
      fractions: as in ``split``.
      seed: of the permutation.
      key: entry of the examples that holds the class.
    """
    _check_fractions(fractions)
    labels = labels_of(source, key)
    rng = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[] for _ in fractions]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(_counts(len(members), list(fractions.values())))[:-1]
        for part, indices in zip(parts, np.split(members, cuts)):
            part.append(indices)
    return {
        name: Subset(source, rng.permutation(np.concatenate(part)))
        for name, part in zip(fractions, parts)
    }


def select_classes(source: Source, classes: Iterable[int], key: str = "labels") -> Subset:
    """Returns the examples whose class is among ``classes``, in order and with labels unchanged.

    Raises:
      ValueError: a class that no example has.
    """
    labels = labels_of(source, key)
    wanted = sorted(set(classes))
    present = np.unique(labels).tolist()
    absent = [c for c in wanted if c not in present]
    if absent:
        raise ValueError(f"no example has class {absent}; there are the classes {present}")
    return Subset(source, np.flatnonzero(np.isin(labels, wanted)))


def few_shot(source: Source, per_class: int, seed: int, key: str = "labels") -> Subset:
    """Returns ``per_class`` examples of every class, drawn without replacement by ``seed``.

    Raises:
      ValueError: a class with fewer examples.
    """
    labels = labels_of(source, key)
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < per_class:
            raise ValueError(
                f"class {label} has {len(members)} examples, fewer than per_class={per_class}"
            )
        chosen.append(rng.choice(members, per_class, replace=False))
    return Subset(source, rng.permutation(np.concatenate(chosen)))
