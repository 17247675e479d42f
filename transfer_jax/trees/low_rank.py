"""Low-rank changes of matrices: LoRA factors, truncated singular value decompositions.

The factors of a leaf of shape [..., m, n] are ``{"a": [..., m, rank], "b": [..., rank, n]}`` and
stand for the change ``scale * a @ b``. Leading axes are batched: layers that a scan stacked have
factors of their own. Matrices are not transposed, so for Linen kernels, [in, out], ``a`` is the
down-projection and ``b`` the up-projection.

Kernels with several input or output axes, such as Linen's attention projections [embed, heads,
head_dim], are matrices in which these axes are merged. With ``in_axes`` leading axes that index
the input, the factors are ``{"a": [*inputs, rank], "b": [rank, *outputs]}``.
"""

import re
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from transfer_jax.trees.arithmetic import wide
from transfer_jax.trees.paths import (
    Array,
    PyTree,
    Where,
    check_same,
    is_floating,
    leaf_key,
    map_with_path,
    path_str,
    select,
)


def is_factors(node: Any) -> bool:
    """Whether a node of a tree is a pair of factors ``{"a": array, "b": array}``."""
    return (
        isinstance(node, dict)
        and node.keys() == {"a", "b"}
        and all(hasattr(x, "ndim") for x in node.values())
    )


def lora_init(
    params: PyTree,
    where: Where,
    rank: int,
    key: Array,
    *,
    in_axes: int | Mapping[str, int] | None = None,
) -> PyTree:
    """Draws factors whose product is zero, for the chosen leaves (Hu et al. 2022, section 4.1).

    ``a`` is normal with variance 1/m (m = size of the input) and ``b`` is zero. Each leaf draws
    from a key of its own, which depends on its path alone.

    Args:
      params: any pytree.
      where: the matrices to adapt, see ``paths``.
      rank: the rank of the change, at least 1 and at most min(m, n).
      key: a typed key.
      in_axes: how many leading axes of a chosen leaf index the input, all others the output; or a
        mapping from path patterns to that number. By default, and for leaves that no pattern
        matches, the last two axes are the matrix and axes before them are batched.

    Returns:
      The tree with factors at the chosen leaves and None elsewhere. Factors have the leaf's dtype.

    Raises:
      ValueError: a chosen leaf is no matrix, or the rank does not fit it; the message names it.

    >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
    >>> factors = lora_init(params, "kernel", 2, jax.random.key(0))
    >>> jax.tree.map(jnp.shape, factors["kernel"]), factors["bias"]
    ({'a': (4, 2), 'b': (2, 3)}, None)
    """
    mask = select(params, where)

    def leaf(path: str, x: Array, chosen: bool) -> dict[str, Array] | None:
        if not chosen:
            return None
        shape = jnp.shape(x)
        inputs: int | None
        if isinstance(in_axes, Mapping):
            inputs = next((n for pattern, n in in_axes.items() if re.search(pattern, path)), None)
        else:
            inputs = in_axes
        split = _matrix_axes(path, shape, inputs)
        m, n = shape[-2:] if inputs is None else (prod(shape[:split]), prod(shape[split:]))
        if not 1 <= rank <= min(m, n):
            raise ValueError(
                f"rank {rank} for leaf {path!r}, a {m} by {n} matrix: give 1 to {min(m, n)}."
            )
        b_shape = (*shape[:-2], rank, n) if inputs is None else (rank, *shape[split:])
        a = jax.random.normal(leaf_key(key, path), (*shape[:split], rank), wide(x).dtype)
        dtype = jnp.result_type(x)
        return {"a": (a / m**0.5).astype(dtype), "b": jnp.zeros(b_shape, dtype)}

    return map_with_path(leaf, params, mask)


def _matrix_axes(path: str, shape: tuple[int, ...], in_axes: int | None) -> int:
    """Returns where the input axes of a leaf end."""
    if len(shape) < 2:
        raise ValueError(
            f"leaf {path!r} of shape {shape} is no matrix; choose leaves with two or more axes."
        )
    if in_axes is None:
        return len(shape) - 1
    if not 1 <= in_axes < len(shape):
        raise ValueError(
            f"in_axes={in_axes} for leaf {path!r} of shape {shape}: give 1 to {len(shape) - 1}."
        )
    if in_axes > 1 and len(shape) - in_axes > 1:
        raise ValueError(
            f"leaf {path!r} of shape {shape} has several input and several output axes "
            f"(in_axes={in_axes}); its factors could not be told from batched ones. Reshape it."
        )
    return in_axes


def _product(factors: dict[str, Array], scale: Array | float) -> Array:
    a, b = wide(factors["a"]), wide(factors["b"])
    if a.ndim == b.ndim:
        return scale * jnp.matmul(a, b, precision="highest")
    return scale * jnp.tensordot(a, b, 1, precision="highest")


def lora_delta(factors: PyTree, scale: Array | float = 1.0) -> PyTree:
    """Returns the change ``scale * a @ b`` that each pair of factors stands for.

    Args:
      factors: what ``lora_init`` returned, trained.
      scale: alpha / rank in the paper's terms.

    Returns:
      The tree with a matrix (float32 or wider) for each pair, None elsewhere.

    >>> lora_delta({"kernel": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}, 0.5)["kernel"].sum()
    Array(2., dtype=float32)
    """
    return jax.tree.map(lambda f: _product(f, scale), factors, is_leaf=is_factors)


def lora_merge(params: PyTree, factors: PyTree, scale: Array | float = 1.0) -> PyTree:
    """Returns ``params + scale * a @ b``, in the dtype of each leaf.

    Args:
      params: the parameters that the factors were made for.
      factors: pairs at some leaves, None at the others.
      scale: alpha / rank in the paper's terms.

    Raises:
      ValueError: factors at a path that ``params`` does not have, or of another shape.

    >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
    >>> factors = lora_init(params, "kernel", 2, jax.random.key(0))
    >>> bool((lora_merge(params, factors)["kernel"] == params["kernel"]).all())
    True
    """
    pairs = {
        path_str(kp): pair
        for kp, pair in jax.tree_util.tree_leaves_with_path(factors, is_leaf=is_factors)
    }

    def leaf(path: str, x: Array) -> Array:
        pair = pairs.pop(path, None)
        if pair is None:
            return x
        change = _product(pair, scale)
        if change.shape != jnp.shape(x):
            raise ValueError(
                f"the factors of {path!r} make a change of shape {change.shape}; the leaf has "
                f"shape {jnp.shape(x)}."
            )
        return (wide(x) + change).astype(jnp.result_type(x))

    merged = map_with_path(leaf, params)
    if pairs:
        raise ValueError(f"params has no leaf {next(iter(pairs))!r}, for which there are factors.")
    return merged


def _svd(x: Array, rank: int) -> tuple[Array, Array, Array]:
    u, s, v = jnp.linalg.svd(x, full_matrices=False)
    return u[..., :rank], s[..., :rank], v[..., :rank, :]


def svd_truncate(tree: PyTree, rank: int) -> PyTree:
    """Returns the nearest matrices of rank ``rank`` (Eckart and Young 1936).

    Args:
      tree: leaves [..., m, n] are truncated in their last two axes; scalars and vectors, and
        matrices whose smaller side is at most ``rank``, are returned as they are.
      rank: at least 1.

    >>> svd_truncate({"w": jnp.diag(jnp.array([3.0, 2.0]))}, 1)["w"].tolist()
    [[3.0, 0.0], [0.0, 0.0]]
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: give at least 1.")
    check_same(tree)

    def leaf(x: Array) -> Array:
        if jnp.ndim(x) < 2 or min(jnp.shape(x)[-2:]) <= rank:
            return x
        u, s, v = _svd(wide(x), rank)
        return ((u * s[..., None, :]) @ v).astype(jnp.result_type(x))

    return jax.tree.map(leaf, tree)


def extract_lora(
    finetuned: PyTree,
    base: PyTree,
    rank: int,
    where: Where | Callable[[str, Any], bool] | None = None,
) -> PyTree:
    """Returns the factors of rank ``rank`` nearest to what fine-tuning changed.

    The singular values are shared evenly: ``a = U sqrt(S)``, ``b = sqrt(S) V^T``. Merging them
    into ``base`` restores ``finetuned`` in the chosen leaves if their change has that rank.

    Args:
      finetuned: the fine-tuned parameters.
      base: the parameters fine-tuning started from.
      rank: at least 1; a smaller matrix gets factors of its full rank.
      where: which matrices, see ``paths``; by default every leaf with two or more axes. What
        changed in other leaves is not represented.

    Returns:
      A tree as of ``lora_init``, with float32 (or wider) factors.

    Raises:
      ValueError: the trees differ, or a chosen leaf is no matrix.

    >>> base = {"w": jnp.zeros((3, 2))}
    >>> factors = extract_lora({"w": jnp.outer(jnp.arange(3.0), jnp.ones(2))}, base, 1)
    >>> bool(jnp.allclose(lora_merge(base, factors)["w"][2], 2.0))
    True
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: give at least 1.")
    check_same(finetuned, base, names=("finetuned", "base"), floating=False)
    if where is None:
        where = _is_matrix
    mask = select(base, where)

    def leaf(path: str, x: Array, y: Array, chosen: bool) -> dict[str, Array] | None:
        if not chosen:
            return None
        _matrix_axes(path, jnp.shape(x), None)
        u, s, v = _svd(wide(x) - wide(y), rank)
        root = jnp.sqrt(s)
        return {"a": u * root[..., None, :], "b": root[..., :, None] * v}

    return map_with_path(leaf, finetuned, base, mask)


def _is_matrix(path: str, leaf: Any) -> bool:
    return is_floating(path, leaf) and jnp.ndim(leaf) >= 2
