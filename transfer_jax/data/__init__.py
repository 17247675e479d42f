"""Data: sources, pipelines in one order for any number of processes, datasets by name."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transfer_jax.data.bundle import DataBundle, DatasetInfo
    from transfer_jax.data.padding import bucketed, pad_batch, pad_to
    from transfer_jax.data.pipeline import Pipeline
    from transfer_jax.data.registry import DATASETS, load
    from transfer_jax.data.sources import (
        ArraySource,
        CachedSource,
        GeneratedSource,
        IndexSource,
        Source,
    )
    from transfer_jax.data.splits import (
        Concatenation,
        Mapped,
        Subset,
        few_shot,
        select_classes,
        split,
        stratified_split,
    )
    from transfer_jax.data.tfds import tfds_source

# Resolved on first use, so that a part costs only what it needs.
_HOME = {
    "ArraySource": "sources",
    "CachedSource": "sources",
    "Concatenation": "splits",
    "DATASETS": "registry",
    "DataBundle": "bundle",
    "DatasetInfo": "bundle",
    "GeneratedSource": "sources",
    "IndexSource": "sources",
    "Mapped": "splits",
    "Pipeline": "pipeline",
    "Source": "sources",
    "Subset": "splits",
    "bucketed": "padding",
    "few_shot": "splits",
    "load": "registry",
    "pad_batch": "padding",
    "pad_to": "padding",
    "select_classes": "splits",
    "split": "splits",
    "stratified_split": "splits",
    "tfds_source": "tfds",
}

__all__ = [
    "DATASETS", "ArraySource", "CachedSource", "Concatenation", "DataBundle", "DatasetInfo",
    "GeneratedSource", "IndexSource", "Mapped", "Pipeline", "Source", "Subset", "bucketed",
    "few_shot", "load", "pad_batch", "pad_to", "select_classes", "split", "stratified_split",
    "tfds_source",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"transfer_jax.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'transfer_jax.data' has no attribute {name!r}")
