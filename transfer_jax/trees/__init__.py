"""Framework-free pytree tools. Needs jax and numpy only, and knows nothing of models.

A model is a tree of arrays: nested dictionaries, FrozenDict, Linen params, ``nnx.State``, Haiku
params and Equinox modules alike. See ``docs/trees.md``.
"""

from transfer_jax.trees.arithmetic import (
    add,
    cosine,
    dot,
    lerp,
    norm,
    scale,
    slerp,
    stack,
    sub,
    unstack,
    weighted_sum,
)
from transfer_jax.trees.blocks import block_coefficients, group_paths
from transfer_jax.trees.files import load_safetensors, save_safetensors
from transfer_jax.trees.fisher import (
    Consolidated,
    KroneckerBlock,
    consolidate,
    ewc_penalty,
    ewc_proximal,
    fisher_diagonal,
    kfac_blocks,
    kfac_penalty,
    merge_fisher,
    merge_kronecker,
)
from transfer_jax.trees.low_rank import (
    extract_lora,
    lora_delta,
    lora_init,
    lora_merge,
    svd_truncate,
)
from transfer_jax.trees.masks import apply_mask, magnitude_mask
from transfer_jax.trees.merging import METHODS, merge, merge_leaf
from transfer_jax.trees.paths import (
    check_same,
    combine,
    is_floating,
    leaf_key,
    map_with_path,
    partition,
    path_str,
    paths,
    select,
)
from transfer_jax.trees.task_vectors import (
    Linearized,
    apply_task_vectors,
    linearize,
    task_vector,
)

__all__ = [
    "METHODS",
    "Consolidated",
    "KroneckerBlock",
    "Linearized",
    "add",
    "apply_mask",
    "apply_task_vectors",
    "block_coefficients",
    "check_same",
    "combine",
    "consolidate",
    "cosine",
    "dot",
    "ewc_penalty",
    "ewc_proximal",
    "extract_lora",
    "fisher_diagonal",
    "group_paths",
    "is_floating",
    "kfac_blocks",
    "kfac_penalty",
    "leaf_key",
    "lerp",
    "linearize",
    "load_safetensors",
    "lora_delta",
    "lora_init",
    "lora_merge",
    "magnitude_mask",
    "map_with_path",
    "merge",
    "merge_fisher",
    "merge_kronecker",
    "merge_leaf",
    "norm",
    "partition",
    "path_str",
    "paths",
    "save_safetensors",
    "scale",
    "select",
    "slerp",
    "stack",
    "sub",
    "svd_truncate",
    "task_vector",
    "unstack",
    "weighted_sum",
]  # fmt: skip
