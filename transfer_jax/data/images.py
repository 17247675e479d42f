"""Images, whole or as pixel sequences in raster order: CIFAR-10, MNIST and Omniglot."""

import gzip
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from transfer_jax.data.bundle import DataBundle, DatasetInfo
from transfer_jax.data.paths import require
from transfer_jax.data.sources import ArraySource, CachedSource, Example, Source
from transfer_jax.data.splits import Mapped, Subset, split
from transfer_jax.data.tfds import tfds_source

CIFAR_MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32)
CIFAR_DEVIATION = np.array([0.247, 0.243, 0.261], np.float32)


def grey(image: np.ndarray) -> np.ndarray:
    """Returns the luma (ITU-R 601) of uint8 images [..., 3] as uint8 [..., 1]."""
    red, green, blue = np.moveaxis(image.astype(np.int64), -1, 0)
    return ((19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16).astype(np.uint8)[..., None]


def _named(example: Mapping[str, np.ndarray]) -> Example:
    return {"inputs": example["image"], "labels": np.int32(example["label"])}


def _with_validation(
    name: str, validation_fraction: float, seed: int, data_dir: str | os.PathLike[str] | None
) -> dict[str, Source]:
    """The splits of a prepared data set, with images cached as uint8 once decoded."""
    train = CachedSource(Mapped(tfds_source(name, "train", data_dir), _named))
    fractions = {"train": 1 - validation_fraction, "validation": validation_fraction}
    test = CachedSource(Mapped(tfds_source(name, "test", data_dir), _named))
    return {**split(train, fractions, seed=seed), "test": test}


def cifar10(
    *,
    greyscale: bool = False,
    sequence: bool = True,
    validation_fraction: float = 0.1,
    seed: int = 0,
    data_dir: str | os.PathLike[str] | None = None,
) -> DataBundle:
    """Returns CIFAR-10 from TensorFlow Datasets, normalised, without augmentation.

    Args:
      greyscale: one channel, (x - 122.6 / 255) / (61 / 255) of the luma x in [0, 1] (Image of the
        Long Range Arena); else three, by the means and standard deviations of the channels.
      sequence: ``inputs`` [1024, 1 or 3], else [32, 32, 1 or 3].
      validation_fraction: of the 50,000 training images that become "validation".
      seed: of that split.
      data_dir: see ``tfds_source``.

    Returns:
      Examples with ``inputs`` float32 and ``labels`` int32 0..9.

    Raises:
      FileNotFoundError: not prepared; says how to.
    """

    def normalise(example: Example) -> Example:
        image = example["inputs"]
        if greyscale:
            inputs = (grey(image).astype(np.float32) - np.float32(122.6)) / np.float32(61)
        else:
            inputs = (image.astype(np.float32) / np.float32(255) - CIFAR_MEAN) / CIFAR_DEVIATION
        if sequence:
            inputs = inputs.reshape(*inputs.shape[:-3], 1024, inputs.shape[-1])
        return {**example, "inputs": inputs}

    splits = {
        name: Mapped(source, normalise, batched=True)
        for name, source in _with_validation("cifar10", validation_fraction, seed, data_dir).items()
    }
    info = DatasetInfo(
        num_classes=10, length=1024 if sequence else None, features=1 if greyscale else 3
    )
    return DataBundle(splits, info)


def _mnist(
    splits: Mapping[str, Source], sequence: bool, permutation_seed: int | None
) -> DataBundle:
    if permutation_seed is not None and not sequence:
        raise ValueError("permutation_seed permutes pixel sequences; it needs sequence=True")
    order = np.arange(784)
    if permutation_seed is not None:
        order = np.random.default_rng(permutation_seed).permutation(order)

    def normalise(example: Example) -> Example:
        inputs = example["inputs"].astype(np.float32) / np.float32(255)
        if sequence:
            inputs = inputs.reshape(*inputs.shape[:-3], 784, 1)[..., order, :]
        return {**example, "inputs": inputs}

    info = DatasetInfo(num_classes=10, length=784 if sequence else None, features=1)
    return DataBundle(
        {name: Mapped(source, normalise, batched=True) for name, source in splits.items()}, info
    )


def mnist(
    *,
    sequence: bool = True,
    permutation_seed: int | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    data_dir: str | os.PathLike[str] | None = None,
) -> DataBundle:
    """Returns MNIST from TensorFlow Datasets, pixels in [0, 1].

    Args:
      sequence: ``inputs`` [784, 1] (sequential MNIST), else [28, 28, 1].
      permutation_seed: of one fixed permutation of the pixels (permuted MNIST), or None.
      validation_fraction: of the 60,000 training images that become "validation".
      seed: of that split.
      data_dir: see ``tfds_source``.

    Returns:
      Examples with ``inputs`` float32 and ``labels`` int32 0..9.

    Raises:
      FileNotFoundError: not prepared; says how to.
    """
    splits = _with_validation("mnist", validation_fraction, seed, data_dir)
    return _mnist(splits, sequence, permutation_seed)


def _idx(path: Path) -> np.ndarray:
    """Reads an array of bytes in the gzipped IDX format."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is no gzipped IDX file of bytes")
    dimensions = data[3]
    shape = np.frombuffer(data, ">u4", dimensions, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(tuple(shape))


def mnist_t10k(
    *, sequence: bool = True, permutation_seed: int | None = None, seed: int = 0
) -> DataBundle:
    """Returns the 10,000 images of MNIST's official test part, in a split of their own.

    Read from ``mnist_t10k`` in the directory TRANSFER_JAX_DATA; 8,000 / 1,000 / 1,000 by a
    permutation. Accuracies on it are not "MNIST test accuracies".

    Args:
      sequence: as in ``mnist``.
      permutation_seed: as in ``mnist``.
      seed: of the split.

    Returns:
      As ``mnist``.

    Raises:
      FileNotFoundError: the files are missing.
    """
    source = ArraySource(
        {
            "inputs": _idx(require("mnist_t10k", "t10k-images-idx3-ubyte.gz"))[..., None],
            "labels": _idx(require("mnist_t10k", "t10k-labels-idx1-ubyte.gz")).astype(np.int32),
        }
    )
    order = np.random.default_rng(seed).permutation(len(source))
    cuts = {"train": order[:8000], "validation": order[8000:9000], "test": order[9000:]}
    splits = {name: Subset(source, indices) for name, indices in cuts.items()}
    return _mnist(splits, sequence, permutation_seed)


def omniglot8(*, alphabet: str, test_drawers: int = 5) -> DataBundle:
    """Returns the characters of one of eight Omniglot alphabets, each drawn by 20 people.

    Read from ``omniglot8`` in the directory TRANSFER_JAX_DATA, where drawings are 35 x 35 pixels of
    0..9; these become 28 x 28 by averages over areas.

    Args:
      alphabet: such as "Greek".
      test_drawers: of the 20 people, the last, whose drawings are "test"; the others' are "train".
        0 = there is no "test".

    Returns:
      Examples with ``inputs`` [28, 28, 1] float32 in [0, 1], ink = 1, and ``labels`` int32, the
      number of the character in the alphabet.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: no such alphabet; lists them.
    """
    with np.load(require("omniglot8", "omniglot8_35.npz")) as file:
        names = file["alphabet_names"].tolist()
        if alphabet not in names:
            raise ValueError(f"omniglot8 has no alphabet {alphabet!r}; there are {names}")
        rows = file["alphabet"] == names.index(alphabet)
        drawings, characters, drawers = (file[key][rows] for key in ("x", "char", "drawer"))
    fine = (drawings / 9.0).repeat(4, axis=1).repeat(4, axis=2)  # 140 x 140: 28 blocks of 5 x 5
    images = fine.reshape(-1, 28, 5, 28, 5).mean(axis=(2, 4))[..., None].astype(np.float32)
    kinds, labels = np.unique(characters, return_inverse=True)
    parts = {"train": drawers <= 20 - test_drawers, "test": drawers > 20 - test_drawers}
    splits = {
        name: ArraySource({"inputs": images[part], "labels": labels[part].astype(np.int32)})
        for name, part in parts.items()
        if part.any()
    }
    return DataBundle(splits, DatasetInfo(num_classes=len(kinds), features=1))
