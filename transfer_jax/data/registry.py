"""Datasets by name, for configs."""

import difflib
from collections.abc import Callable
from typing import Any

from transfer_jax.data.bundle import DataBundle
from transfer_jax.data.digits import digits
from transfer_jax.data.listops import listops, listops_files
from transfer_jax.data.pathfinder import pathfinder, pathfinder_files

DATASETS: dict[str, Callable[..., DataBundle]] = {
    "digits": digits,
    "listops": listops,
    "listops_files": listops_files,
    "pathfinder": pathfinder,
    "pathfinder_files": pathfinder_files,
}


def load(name: str, **options: Any) -> DataBundle:
    """Returns a dataset by name.

    Args:
      name: a key of ``DATASETS``.
      **options: arguments of that function.

    Raises:
      ValueError: no such dataset; lists the nearest names.
      TypeError: an option that the dataset does not have; lists those it has.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.4) or sorted(DATASETS)
        raise ValueError(f"no dataset is named {name!r}; nearest: {', '.join(near)}")
    return DATASETS[name](**options)
