"""Sources: what a pipeline reads examples from.

A source has ``len(source)`` and ``source[i] -> dict`` of NumPy arrays and scalars, so that a
``tfds.data_source``, a list of dictionaries and the classes below are all sources. A source may
also have ``take(indices) -> dict`` of stacked arrays, which saves the per-example work.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

Example = dict[str, Any]


class Source(Protocol):
    """Random access to examples; must be safe to read from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


def stack(examples: Sequence[Mapping[str, Any]]) -> Example:
    """Stacks examples of equal structure and shapes along a new leading axis.

    Raises:
      ValueError: naming the key whose shapes differ.
    """
    batch = {}
    for key in examples[0]:
        values = [np.asarray(example[key]) for example in examples]
        try:
            batch[key] = np.stack(values)
        except ValueError as e:
            shapes = sorted({v.shape for v in values})
            raise ValueError(
                f"examples of one batch have different shapes of {key!r}: {shapes}. Bring them to "
                "one shape with a transform such as padding.pad_to, or use padding.bucketed."
            ) from e
    return batch


def take(source: Source, indices: np.ndarray) -> Example:
    """Reads the examples at ``indices`` ([K] ints) as one dictionary of stacked arrays [K, ...]."""
    if hasattr(source, "take"):
        return source.take(indices)
    return stack(read(source, indices))


def read(source: Source, indices: np.ndarray) -> list[Mapping[str, Any]]:
    """Reads the examples at ``indices`` ([K] ints) one by one, as a list of K dictionaries."""
    if hasattr(source, "__getitems__"):  # tfds data sources read many records at once
        return list(source.__getitems__([int(i) for i in indices]))
    return [source[int(i)] for i in indices]


class ArraySource:
    """Examples that lie stacked in memory.

    Args:
      arrays: name -> array [N, ...], all of one length N.

    Raises:
      ValueError: no arrays, or different lengths.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = {name: np.asarray(a) for name, a in arrays.items()}
        lengths = {name: len(a) for name, a in self.arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"ArraySource needs arrays of one length; got lengths {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int, /) -> Example:
        return {name: a[index] for name, a in self.arrays.items()}

    def take(self, indices: np.ndarray) -> Example:
        return {name: a[indices] for name, a in self.arrays.items()}

    def __repr__(self) -> str:
        shapes = ", ".join(f"{k}: {a.dtype}{list(a.shape)}" for k, a in self.arrays.items())
        return f"ArraySource({shapes})"


class GeneratedSource:
    """Examples made when they are read; example i is a pure function of (seed, i).

    Args:
      fn: ``fn(rng, index) -> example`` with a NumPy generator seeded by (seed, index).
      length: number of examples.
      seed: non-negative int, or a tuple of them (such as (seed, number of the split)).
    """

    def __init__(
        self,
        fn: Callable[[np.random.Generator, int], Example],
        length: int,
        seed: int | tuple[int, ...],
    ):
        if length < 1:
            raise ValueError(f"length must be at least 1; got {length}")
        self.fn = fn
        self.length = length
        self.seed = tuple(seed) if isinstance(seed, tuple) else (int(seed),)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Example:
        index = int(index)
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} outside a generated source of {self.length} examples")
        # The index goes into the spawn key: appended to the entropy, (1, 0) would equal (1,).
        sequence = np.random.SeedSequence(self.seed, spawn_key=(index,))
        return self.fn(np.random.Generator(np.random.Philox(sequence)), index)


class IndexSource:
    """The numbers 0 .. length - 1 of examples that are made on the device, as ``{"index": i}``.

    Args:
      length: number of examples; by default as many as int32 can number, for training that never
        sees an example twice (with ``repeat=True`` and no shuffling).
    """

    def __init__(self, length: int = 2**31 - 1):
        if not 1 <= length < 2**31:
            raise ValueError(f"length must be in 1 .. 2**31 - 1; got {length}")
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Example:
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} outside {self.length} examples")
        return {"index": np.int32(index)}

    def take(self, indices: np.ndarray) -> Example:
        return {"index": indices.astype(np.int32)}


class CachedSource:
    """Keeps every example of ``source`` in memory once it has been read.

    For sources that are slow to read and of one shape per key. Batches are then fancy indexing.
    Memory: as much as all the examples stacked.
    """

    def __init__(self, source: Source):
        self.source = source
        self._arrays: dict[str, np.ndarray] | None = None
        self._present = np.zeros(len(source), bool)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Example:
        return {name: a[0] for name, a in self.take(np.array([index])).items()}

    def take(self, indices: np.ndarray) -> Example:
        arrays = self._allocated()
        # Two threads may read one example twice; both write the same values.
        for i in np.unique(indices[~self._present[indices]]):
            for name, value in self.source[int(i)].items():
                arrays[name][i] = value
            self._present[i] = True
        return {name: a[indices] for name, a in arrays.items()}

    def _allocated(self) -> dict[str, np.ndarray]:
        with self._lock:
            if self._arrays is None:
                first = {name: np.asarray(v) for name, v in self.source[0].items()}
                self._arrays = {
                    name: np.empty((len(self), *v.shape), v.dtype) for name, v in first.items()
                }
            return self._arrays
