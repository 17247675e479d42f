"""Coefficients per block of parameters.

A *block* is a leaf, or the part of a leaf that one coefficient scales: with layers stacked along
a leading axis by a scan, coefficients of shape [layers] make every layer a block of its own.
"""

import difflib
import re
from collections.abc import Mapping

import jax.numpy as jnp

from transfer_jax.trees.paths import Array, PyTree, map_with_path, paths, structure


def expand(coefficient: Array, ndim: int) -> Array:
    """Appends axes of size 1 until ``coefficient`` has ``ndim`` axes, so that it broadcasts.

    >>> expand(jnp.ones(3), 2).shape
    (3, 1)
    """
    coefficient = jnp.asarray(coefficient)
    return coefficient.reshape(coefficient.shape + (1,) * (ndim - coefficient.ndim))


def group_paths(tree: PyTree, groups: Mapping[str, object]) -> PyTree:
    """Returns, for every leaf, the first pattern of ``groups`` that is found in its path.

    Args:
      tree: any pytree.
      groups: its keys are regular expressions (``re.search``), tried in order.

    Raises:
      ValueError: a leaf that no pattern matches, or a pattern that matches no leaf.

    >>> group_paths({"dense": {"kernel": 1.0, "bias": 0.0}}, {"bias": 0, ".*": 1})
    {'dense': {'bias': 'bias', 'kernel': '.*'}}
    """
    known = paths(tree)
    for pattern in groups:
        if not any(re.search(pattern, path) for path in known):
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3) or known[:3]
            raise ValueError(f"group {pattern!r} matches no leaf. Nearest: {', '.join(near)}.")

    return map_with_path(lambda path, _: first_match(groups, path), tree)


def first_match(groups: Mapping[str, object], path: str) -> str:
    """Returns the first pattern of ``groups`` that is found in ``path``.

    Raises:
      ValueError: none is.

    >>> first_match({"bias": 0, ".*": 1}, "dense/kernel")
    '.*'
    """
    for pattern in groups:
        if re.search(pattern, path):
            return pattern
    raise ValueError(
        f"no group matches leaf {path!r}; the groups are {', '.join(map(repr, groups))}. "
        "End with '.*' for all other leaves."
    )


def block_coefficients(
    tree: PyTree, coefficients: Array | float | PyTree, num: int | None = None
) -> PyTree:
    """Returns a tree with the coefficients of each leaf, from any of the forms accepted.

    Args:
      tree: the parameters.
      coefficients: one of

        * a scalar, for everything,
        * one value per tree, [num] (only if ``num`` is given),
        * per path group: a mapping from regular expressions (the first that is found in the
          leaf's path counts) to a scalar or [num],
        * per block: a tree of the structure of ``tree`` with leaves [num, ...], where ``...`` are
          leading axes of the parameter: none for a coefficient per leaf, [layers] for
          scan-stacked layers, or sizes that broadcast to its shape, such as [1, columns].

      num: how many trees the coefficients combine; None if there is no such axis.

    Returns:
      A tree of the structure of ``tree``. Leaves are float32 (or wider), [num, ...].

    Raises:
      ValueError: a shape that fits none of these, naming the leaf.

    >>> block_coefficients({"kernel": 1.0, "bias": 0.0}, {"kernel": [1.0, 2.0], ".*": 0.0}, 2)
    {'bias': Array([0., 0.], dtype=float32), 'kernel': Array([1., 2.], dtype=float32)}
    """
    lead = () if num is None else (num,)

    def leaf(path: str, x: Array, c: Array) -> Array:
        c = jnp.asarray(c)
        c = c.astype(jnp.promote_types(c.dtype, jnp.float32))
        if c.ndim == 0 and num is not None:
            c = jnp.broadcast_to(c, lead)
        shape = jnp.shape(x)
        inner = c.shape[len(lead) :]
        fits = len(inner) <= len(shape) and all(k in (1, n) for k, n in zip(inner, shape))
        if c.shape[: len(lead)] != lead or not fits:
            each = f"{num} values per block: shape [{num}, ...]" if lead else "shape [...]"
            raise ValueError(
                f"coefficients of shape {c.shape} for leaf {path!r} of shape {shape}; expected "
                f"{each} with the leading axes of the leaf, or 1, for '...'."
            )
        return c

    if structure(coefficients) == structure(tree):
        return map_with_path(leaf, tree, coefficients)
    if isinstance(coefficients, Mapping) and all(isinstance(k, str) for k in coefficients):
        return map_with_path(
            lambda path, x, group: leaf(path, x, coefficients[group]),
            tree,
            group_paths(tree, coefficients),
        )
    try:
        shared = jnp.asarray(coefficients)
    except (TypeError, ValueError):
        raise ValueError(
            "coefficients must be a scalar, one value per tree, a mapping from path patterns, or "
            f"a tree of the structure of the parameters, not {structure(coefficients)} "
            f"for {structure(tree)}."
        ) from None
    if shared.ndim > len(lead):
        raise ValueError(
            f"coefficients of shape {shared.shape}; expected a scalar"
            + (f" or one value for each of the {num} trees." if lead else ".")
        )
    return map_with_path(lambda path, x: leaf(path, x, shared), tree)
