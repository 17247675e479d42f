"""The UCI set "Optical Recognition of Handwritten Digits": images of 8 x 8, ten classes.

Each pixel counts the ink in a 4 x 4 block of a 32 x 32 bitmap, 0..16. Here pixels are divided by
16, to [0, 1]. scikit-learn bundles the 1,797 images of the test part, so that ``digits`` needs no
download; ``optdigits`` has the 3,823 training images too, of other writers.
"""

import numpy as np

from transfer_jax.data.bundle import DataBundle, DatasetInfo
from transfer_jax.data.paths import require
from transfer_jax.data.sources import ArraySource
from transfer_jax.data.splits import stratified_split


def digits(
    *,
    sequence: bool = False,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
) -> DataBundle:
    """Returns the digits in "train", "validation" and "test", split class by class.

    Args:
      sequence: ``inputs`` as pixel sequences [64, 1] in raster order, instead of images [8, 8, 1].
      seed: of the split.
      fractions: of "train", "validation" and "test"; they sum to 1.

    Returns:
      Examples with ``inputs`` float32 in [0, 1] and ``labels`` int32 in 0..9.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    shape = (64, 1) if sequence else (8, 8, 1)
    source = ArraySource(
        {
            "inputs": (images / 16.0).astype(np.float32).reshape(-1, *shape),
            "labels": labels.astype(np.int32),
        }
    )
    names = ("train", "validation", "test")
    splits = stratified_split(source, dict(zip(names, fractions)), seed=seed)
    info = DatasetInfo(num_classes=10, length=64 if sequence else None, features=1)
    return DataBundle(splits, info)


def optdigits(*, enlarged: bool = False) -> DataBundle:
    """Returns the digits in their official parts, "train" of 30 writers and "test" of 13 others.

    Read from ``optdigits`` in the directory TRANSFER_JAX_DATA. "test" has the images of ``digits``.

    Args:
      enlarged: ``inputs`` [28, 28, 1], each pixel repeated three times either way, with a margin
        of 2 as MNIST's images have one; else [8, 8, 1].

    Returns:
      Examples with ``inputs`` float32 in [0, 1] and ``labels`` int32 in 0..9.

    Raises:
      FileNotFoundError: the files are missing.
    """
    splits = {}
    for name, part in (("train", "tra"), ("test", "tes")):
        path = require("optdigits", f"optdigits.{part}.csv.gz")
        rows = np.loadtxt(path, np.float32, delimiter=",", skiprows=1)
        images = (rows[:, :64] / 16).reshape(-1, 8, 8, 1)
        if enlarged:
            images = images.repeat(3, axis=1).repeat(3, axis=2)
            images = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
        splits[name] = ArraySource({"inputs": images, "labels": rows[:, 64].astype(np.int32)})
    return DataBundle(splits, DatasetInfo(num_classes=10, features=1))
