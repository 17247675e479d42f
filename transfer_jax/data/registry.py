"""Datasets by name, for configs."""

from collections.abc import Callable
from typing import Any

from transfer_jax.data import digits, images, listops, named, pathfinder, speech, text
from transfer_jax.data.bundle import DataBundle

DATASETS: dict[str, Callable[..., DataBundle]] = {
    # Built in: no files, no network.
    "arithmetic_text": text.arithmetic_text,
    "digits": digits.digits,
    "listops": listops.listops,
    "pathfinder": pathfinder.pathfinder,
    # Files in the directory named by TRANSFER_JAX_DATA.
    "fsdd": speech.fsdd,
    "mnist_t10k": images.mnist_t10k,
    "omniglot8": images.omniglot8,
    "optdigits": digits.optdigits,
    "tinyshakespeare": text.tinyshakespeare,
    # Prepared by TensorFlow Datasets.
    "cifar10": images.cifar10,
    "mnist": images.mnist,
    # Files whose place is an option.
    "aan_files": text.aan_files,
    "character_text": text.character_text,
    "imdb_files": text.imdb_files,
    "listops_files": listops.listops_files,
    "pathfinder_files": pathfinder.pathfinder_files,
    "speech_commands": speech.speech_commands,
    "wikitext103": text.wikitext103,
}


def load(name: str, **options: Any) -> DataBundle:
    """Returns a dataset by name.

    Args:
      name: a key of ``DATASETS``.
      **options: arguments of that function.

    Raises:
      ValueError: no such dataset; has the nearest names.
      TypeError: an option that the dataset does not have; has the nearest names.
    """
    return named.call("dataset", DATASETS, name, **options)
