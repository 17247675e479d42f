"""scikit-learn's bundled handwritten digits: 1,797 images of 8 x 8, ten classes, no download.

They are the test part of the UCI set "Optical Recognition of Handwritten Digits": each pixel counts
the ink in a 4 x 4 block of a 32 x 32 bitmap, 0..16. Here pixels are divided by 16, to [0, 1].
"""

import numpy as np

from transfer_jax.data.bundle import DataBundle, DatasetInfo
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
