"""Framework-free pytree tools. Needs jax and numpy only, and knows nothing of models."""

from transfer_jax.trees.paths import combine, partition, path_str, paths, select

__all__ = ["combine", "partition", "path_str", "paths", "select"]
