"""Retrieval across two views, in both directions, with several captions per image."""

from collections.abc import Sequence

import numpy as np


def ranks(similarity: np.ndarray, owner: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """How many candidates stand before the right one; 0 is the best.

    A wrong candidate as similar as the right one stands before it, so that equal similarities are
    worth nothing.

    Args:
      similarity: [I, T] of images and captions, larger is nearer.
      owner: int [T], the image of each caption; None = caption t belongs to image ``t // (T / I)``.

    Returns:
      For images [I], the rank of the best of their captions; for captions [T], that of the image.

    Raises:
      ValueError: an image without a caption, owners that are no images, or NaN.
    """
    similarity = np.asarray(similarity)
    images, captions = similarity.shape
    if owner is None:
        if captions % images:
            raise ValueError(
                f"{captions} captions are not equally many for each of {images} images: give owner."
            )
        owner = np.arange(captions) // (captions // images)
    owner = np.asarray(owner)
    if owner.shape != (captions,) or set(owner.tolist()) != set(range(images)):
        raise ValueError(
            f"owner must name an image in 0..{images - 1} for each of the {captions} captions, and "
            "every image at least once."
        )
    if np.isnan(similarity).any():
        raise ValueError("some similarities are NaN.")
    own = similarity[owner, np.arange(captions)]
    of_captions = (similarity >= own).sum(axis=0) - 1  # without itself
    best = np.full(images, -np.inf)
    np.maximum.at(best, owner, own)
    of_images = np.empty(images, np.int64)
    for image in range(images):  # a row at a time: all captions of COCO are 5,000 x 25,000
        of_images[image] = np.sum((similarity[image] >= best[image]) & (owner != image))
    return of_images, of_captions


def retrieval(
    similarity: np.ndarray, owner: np.ndarray | None = None, *, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall at K in per cent and median rank.

    Args:
      similarity, owner: see ``ranks``.
      ks: how many candidates are looked at.

    Returns:
      ``i2t_r<K>``: images of which a caption is among the first K; ``t2i_r<K>``: captions whose
      image is; ``rsum``, the sum of all these; ``i2t_median`` and ``t2i_median``, counted from 1.
    """
    of_images, of_captions = ranks(similarity, owner)
    result = {}
    for name, values in (("i2t", of_images), ("t2i", of_captions)):
        for k in ks:
            result[f"{name}_r{k}"] = 100.0 * float(np.mean(values < k))
    result["rsum"] = sum(result.values())
    result["i2t_median"] = float(np.median(of_images)) + 1
    result["t2i_median"] = float(np.median(of_captions)) + 1
    return result


def folded_retrieval(
    similarity: np.ndarray, owner: np.ndarray, folds: int, *, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """The mean of ``retrieval`` over consecutive parts of the images (MSCOCO: 5 folds of 1,000).

    Args:
      similarity, ks: as in ``retrieval``.
      owner: int [T].
      folds: number of parts.

    Raises:
      ValueError: the images do not divide by ``folds``.
    """
    images = len(similarity)
    if images % folds:
        raise ValueError(f"{images} images do not divide into {folds} folds.")
    size, owner = images // folds, np.asarray(owner)
    results = []
    for start in range(0, images, size):
        own = np.flatnonzero((owner >= start) & (owner < start + size))
        part = similarity[start : start + size][:, own]
        results.append(retrieval(part, owner[own] - start, ks=ks))
    return {name: float(np.mean([r[name] for r in results])) for name in results[0]}
