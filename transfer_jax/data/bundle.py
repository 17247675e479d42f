"""What a dataset function returns: its splits and what a model must know of them."""

import dataclasses
from collections.abc import Mapping

from transfer_jax.data.sources import Source


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """Static facts of a dataset.

    Attributes:
      num_classes: classes of ``labels``; None where labels are no classes.
      vocab_size: number of token ids, where ``inputs`` are tokens.
      length: static length of the sequences in ``inputs``; None for images and unpadded sequences.
      features: size of the last axis of ``inputs``, where they are real-valued.
      vocabulary: the tokens by id, where they have names.
      sample_rate: positions per second, in Hz, where positions are moments.
    """

    num_classes: int | None = None
    vocab_size: int | None = None
    length: int | None = None
    features: int | None = None
    vocabulary: tuple[str, ...] = ()
    sample_rate: float | None = None


@dataclasses.dataclass(frozen=True)
class DataBundle:
    """The splits of a dataset by name ("train", "validation", "test") and its ``DatasetInfo``."""

    splits: Mapping[str, Source]
    info: DatasetInfo
