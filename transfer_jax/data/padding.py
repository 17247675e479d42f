"""Sequences of different lengths in batches of few static shapes.

``pad_to`` brings every example to one length; ``bucketed`` sorts examples by length into buckets
and pads each batch to the boundary of its bucket only. Both add ``lengths``, int32: the number of
valid positions, before padding.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from transfer_jax.data.pipeline import Pipeline, Rows
from transfer_jax.data.sources import Example, Source, read, stack

_INPUTS: Mapping[str, float] = {"inputs": 0}


def pad_to(
    max_length: int,
    values: Mapping[str, float] = _INPUTS,
    *,
    lengths: str = "lengths",
    truncate: bool = False,
) -> Callable[[Mapping[str, Any]], Example]:
    """Returns a transform that pads sequences at their end to ``max_length`` positions.

    Args:
      max_length: length of axis 0 of the results.
      values: name of a sequence ([T, ...]) -> what it is padded with.
      lengths: name of the new entry: int32, T of the first sequence (at most ``max_length``).
      truncate: whether to cut longer sequences; else they are an error.

    Raises (the transform):
      ValueError: a sequence longer than ``max_length`` without ``truncate``.
    """
    first = next(iter(values))

    def transform(example: Mapping[str, Any]) -> Example:
        result = dict(example)
        for name, value in values.items():
            sequence = np.asarray(example[name])
            if len(sequence) > max_length and not truncate:
                raise ValueError(
                    f"{name!r} has {len(sequence)} positions, more than max_length={max_length}; "
                    "raise max_length or pass truncate=True"
                )
            sequence = sequence[:max_length]
            padded = np.full((max_length, *sequence.shape[1:]), value, sequence.dtype)
            padded[: len(sequence)] = sequence
            result[name] = padded
        result[lengths] = np.int32(min(len(example[first]), max_length))
        return result

    return transform


def pad_batch(
    examples: Sequence[Mapping[str, Any]],
    max_length: int | None = None,
    values: Mapping[str, float] = _INPUTS,
) -> Example:
    """Pads examples as ``pad_to`` does and stacks them.

    Args:
      examples: K examples.
      max_length: as in ``pad_to``; by default the longest sequence among ``examples``.
      values: as in ``pad_to``.
    """
    if max_length is None:
        max_length = max(len(example[name]) for example in examples for name in values)
    return stack([pad_to(max_length, values)(example) for example in examples])


def bucketed(
    source: Source,
    lengths: Sequence[int] | np.ndarray,
    boundaries: Sequence[int],
    batch_size: int,
    seed: int = 0,
    *,
    values: Mapping[str, float] = _INPUTS,
    shuffle: bool = True,
    repeat: bool = True,
    remainder: str = "pad",
    transforms: tuple[Any, ...] = (),
) -> Pipeline:
    """Returns a pipeline whose batches hold sequences of similar lengths.

    An example of length T belongs to the bucket of the smallest boundary >= T, and every batch
    comes from one bucket and is padded to its boundary. In each epoch the examples of each bucket
    are shuffled and cut into batches, and the batches are shuffled: a pure function of (seed,
    epoch). Every example occurs exactly once per epoch; the last batch of a bucket is filled up
    with rows of mask 0 (``remainder="pad"``; all batches carry ``mask``), or left out
    (``remainder="drop"``; which examples are left out changes from epoch to epoch).

    Args:
      source: of examples with sequences of varying length.
      lengths: [N] lengths of the first sequence named in ``values``, after ``transforms``.
      boundaries: increasing padded lengths; the last must hold the longest example.
      batch_size: global number of rows.
      seed: see above.
      values: as in ``pad_to``.
      shuffle: False keeps source order within buckets, and buckets in increasing length.
      repeat: infinite, or one pass.
      remainder: "pad" or "drop".
      transforms: as in ``Pipeline``.

    Raises:
      ValueError: lengths and source disagree, boundaries do not increase or are too short.
    """
    lengths = np.asarray(lengths)
    if lengths.shape != (len(source),):
        raise ValueError(f"lengths must have shape ({len(source)},); got {lengths.shape}")
    if list(boundaries) != sorted(set(boundaries)):
        raise ValueError(f"boundaries must increase; got {tuple(boundaries)}")
    if lengths.max() > boundaries[-1]:
        raise ValueError(
            f"the longest example has length {lengths.max()}, above the last boundary "
            f"{boundaries[-1]}; add a boundary or truncate"
        )
    return _Bucketed(
        source=source,
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        repeat=repeat,
        remainder=remainder,
        transforms=transforms,
        bucket_of=np.searchsorted(boundaries, lengths),
        boundaries=tuple(int(b) for b in boundaries),
        values=tuple(values.items()),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Bucketed(Pipeline):
    """See ``bucketed``.

    Attributes:
      bucket_of: [N] int, bucket of each example.
      boundaries: padded length of each bucket.
      values: items of ``pad_to``'s ``values``.
    """

    bucket_of: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, int))
    boundaries: tuple[int, ...] = ()
    values: tuple[tuple[str, float], ...] = ()

    def __len__(self) -> int:
        sizes = np.bincount(self.bucket_of, minlength=len(self.boundaries))
        if self.remainder == "pad":
            sizes = sizes + self.batch_size - 1
        return int((sizes // self.batch_size).sum())

    def rows(self) -> Callable[[int], Rows]:
        epoch_plan = functools.lru_cache(maxsize=2)(self._epoch_plan)
        per_epoch = len(self)

        def plan(step: int) -> Rows:
            epoch, i = divmod(step, per_epoch)
            bucket, indices = epoch_plan(epoch)[i]
            missing = self.batch_size - len(indices)
            mask = np.ones(self.batch_size, np.float32)
            mask[len(indices) :] = 0.0
            return Rows(
                np.pad(indices, (0, missing), mode="edge"),
                np.arange(step * self.batch_size, (step + 1) * self.batch_size),
                mask if self.remainder == "pad" or not self.repeat else None,
                self.boundaries[bucket],
            )

        return plan

    def _epoch_plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        sequence = np.random.SeedSequence(self.seed, spawn_key=(epoch,))
        rng = np.random.Generator(np.random.Philox(sequence))
        batches = []
        for bucket in range(len(self.boundaries)):
            members = np.flatnonzero(self.bucket_of == bucket)
            if self.shuffle:
                members = rng.permutation(members)
            stop = len(members)
            if self.remainder == "drop":
                stop -= stop % self.batch_size
            for start in range(0, stop, self.batch_size):
                batches.append((bucket, members[start : start + self.batch_size]))
        if self.shuffle:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return batches

    def collate(self, rows: Rows) -> Example:
        examples = [
            self._transform(example, int(ordinal))
            for example, ordinal in zip(read(self.source, rows.indices), rows.ordinals)
        ]
        batch = pad_batch(examples, rows.length, dict(self.values))
        return batch if rows.mask is None else {**batch, "mask": rows.mask}
