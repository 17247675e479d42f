"""Batches from a source: one deterministic order, whatever the number of processes.

Global batch s holds the examples s*B .. (s+1)*B - 1 of one fixed order; process p of n reads the
rows p*B/n .. (p+1)*B/n of it and nothing else. Hence the batches of the processes, put together in
the order of the processes, are exactly the batches of a single process; and the state of an
iterator is the number of batches consumed, which any other number of processes can resume from.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from transfer_jax.data.sources import Example, Source, read, stack, take

_INFINITE = 2**62


class Rows(NamedTuple):
    """Where the rows of one global batch come from.

    Attributes:
      indices: [B] int64, positions in the source.
      ordinals: [B] int64, positions in the order; they seed random transforms.
      mask: [B] float32, 0 for padding rows, or None where no row can be padding.
      length: static length that the sequences of this batch are padded to, or None.
    """

    indices: np.ndarray
    ordinals: np.ndarray
    mask: np.ndarray | None
    length: int | None = None


def epoch_permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """Returns the order of ``size`` examples in one epoch, [size] int64: a pure function."""
    sequence = np.random.SeedSequence(seed, spawn_key=(epoch,))
    return np.random.Generator(np.random.Philox(sequence)).permutation(size)


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A source, an order, and how examples become batches.

    Training reads with ``repeat=True``: infinite, reshuffled in every epoch, batches of full size
    that may span two epochs; no ``mask``. Evaluation reads with ``repeat=False``: one pass, and
    every batch carries ``mask`` ([B] float32, 1 = example, 0 = padding row). With
    ``remainder="pad"`` the last batch is filled up with copies of the last example, at mask 0.

    Attributes:
      source: see ``transfer_jax.data.sources``.
      batch_size: GLOBAL number of rows in a batch, over all processes.
      shuffle: whether to permute the examples, by (seed, epoch); else source order.
      seed: non-negative int; seeds the order and the random transforms.
      repeat: infinite, or one pass.
      transforms: applied to each example in turn. A callable ``example -> example``, or a
        ``grain.transforms.RandomMap``, whose generator is seeded by (seed, position in the order).
      batch_fn: makes a batch of a list of examples; by default stacks them.
      remainder: of the last batch of a single pass: "pad" or "drop".
      num_threads: threads that read ahead; 0 reads in the calling thread.
      read_ahead: number of batches kept ready.

    Raises:
      ValueError: an attribute out of range, or a source without examples.
    """

    source: Source
    batch_size: int
    shuffle: bool = False
    seed: int = 0
    repeat: bool = False
    transforms: tuple[Any, ...] = ()
    batch_fn: Callable[[Sequence[Example]], Example] | None = None
    remainder: str = "pad"
    num_threads: int = 2
    read_ahead: int = 4

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {self.batch_size}")
        if len(self.source) == 0:
            raise ValueError(f"the source {self.source!r} has no examples")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative; got {self.seed}")
        if self.remainder not in ("pad", "drop"):
            raise ValueError(f"remainder must be 'pad' or 'drop'; got {self.remainder!r}")
        if len(self) == 0:
            raise ValueError(
                f"{len(self.source)} examples make no batch of {self.batch_size} with "
                "remainder='drop'; use a smaller batch_size or remainder='pad'"
            )

    def __len__(self) -> int:
        """Batches per epoch; with ``repeat`` rounded down, but at least 1."""
        if self.repeat:
            return max(1, len(self.source) // self.batch_size)
        if self.remainder == "drop":
            return len(self.source) // self.batch_size
        return -(-len(self.source) // self.batch_size)

    def rows(self) -> Callable[[int], Rows]:
        """Returns the plan: number of a batch -> its ``Rows``."""
        size, batch_size = len(self.source), self.batch_size
        last = _INFINITE if self.repeat else size - 1
        permutation = functools.lru_cache(maxsize=2)(
            lambda epoch: epoch_permutation(self.seed, epoch, size)
        )

        def plan(step: int) -> Rows:
            ordinals = np.arange(step * batch_size, (step + 1) * batch_size)
            mask = None if self.repeat else (ordinals <= last).astype(np.float32)
            ordinals = np.minimum(ordinals, last)
            epochs, indices = np.divmod(ordinals, size)
            if self.shuffle:
                for epoch in range(epochs[0], epochs[-1] + 1):
                    now = epochs == epoch
                    indices[now] = permutation(epoch)[indices[now]]
            return Rows(indices, ordinals, mask)

        return plan

    def collate(self, rows: Rows) -> Example:
        """Reads, transforms and batches the examples of ``rows``; adds ``mask``."""
        if not self.transforms and self.batch_fn is None:
            batch = take(self.source, rows.indices)
        else:
            examples = [
                self._transform(example, int(ordinal))
                for example, ordinal in zip(read(self.source, rows.indices), rows.ordinals)
            ]
            batch = (self.batch_fn or stack)(examples)
        if rows.mask is None:
            return batch
        if "mask" in batch:
            raise ValueError(
                "the examples have an entry 'mask', the name of the padding rows' mask in "
                "evaluation batches; rename it with a transform"
            )
        return {**batch, "mask": rows.mask}

    def _transform(self, example: Mapping[str, Any], ordinal: int) -> Example:
        rng = None
        for transform in self.transforms:
            if isinstance(transform, grain.transforms.RandomMap):
                if rng is None:
                    key = np.array([self.seed, ordinal], np.uint64)
                    rng = np.random.Generator(np.random.Philox(key=key))
                example = transform.random_map(example, rng)
            else:
                example = transform(example)
        return dict(example)

    def dataset(self, process_index: int = 0, process_count: int = 1) -> grain.MapDataset:
        """Returns the local batches of one process as a ``grain.MapDataset``.

        Raises:
          ValueError: ``batch_size`` is not divisible by ``process_count``.
        """
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index {process_index} is not in 0..{process_count - 1}")
        if self.batch_size % process_count:
            below = self.batch_size // process_count * process_count
            near = [n for n in (below, below + process_count) if n]
            raise ValueError(
                f"batch_size={self.batch_size} is global and must be divisible by the "
                f"{process_count} processes; {' or '.join(map(str, near))} would do"
            )
        return _LocalBatches(self, process_index, process_count)

    def iterator(self, process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator:
        """Returns an iterator over the local batches of one process.

        Its ``get_state()`` is a small dictionary fit for JSON: the number of batches consumed. It
        may be given to ``set_state`` of an iterator of any process of any number of processes.
        ``close()`` ends the threads that read ahead.

        Raises:
          ValueError: ``batch_size`` is not divisible by ``process_count``.
        """
        options = grain.ReadOptions(
            num_threads=self.num_threads,
            prefetch_buffer_size=max(self.read_ahead, self.num_threads) if self.num_threads else 0,
        )
        return iter(self.dataset(process_index, process_count).to_iter_dataset(options))

    def example_batch(self) -> Example:
        """Returns the first global batch, read anew and apart from any iterator."""
        return self.collate(self.rows()(0))

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of the first global batch, as JAX will hold it."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.canonicalize_dtype(x.dtype)),
            self.example_batch(),
        )


class _LocalBatches(grain.MapDataset):
    """Element s: the rows of global batch s that belong to one process."""

    def __init__(self, pipeline: Pipeline, process_index: int, process_count: int):
        super().__init__()
        self._pipeline = pipeline
        self._plan = pipeline.rows()
        local = pipeline.batch_size // process_count
        self._local = slice(process_index * local, (process_index + 1) * local)

    def __len__(self) -> int:
        return _INFINITE if self._pipeline.repeat else len(self._pipeline)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        rows = self._plan(int(index))
        mask = None if rows.mask is None else rows.mask[self._local]
        return self._pipeline.collate(
            Rows(rows.indices[self._local], rows.ordinals[self._local], mask, rows.length)
        )
