"""Leaves by name: paths, selections, partitions.

A *path* is the sequence of keys that leads to a leaf, joined by ``/``, such as
``layers_0/attention/kernel``. A ``where`` chooses leaves. It is one of

* a regular expression, searched for in the path (``re.search``),
* a list of regular expressions, of which at least one must be found,
* a predicate ``(path, leaf) -> bool``,
* a tree of booleans with the structure of the tree itself.

Everything here works on any pytree.
"""

import difflib
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any
Where = str | Sequence[str] | Callable[[str, Any], bool] | PyTree


def _is_none(x: Any) -> bool:
    return x is None


def structure(tree: PyTree) -> Any:
    """``jax.tree.structure``, typed so that structures can be compared."""
    return jax.tree.structure(tree)


def path_str(key_path: tuple[Any, ...]) -> str:
    """Returns the key path that ``jax.tree_util`` hands out as ``a/b/0``."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def paths(tree: PyTree) -> list[str]:
    """Returns the path of every leaf, in the order of ``jax.tree.leaves``.

    >>> paths({"dense": {"kernel": 1.0, "bias": 0.0}})
    ['dense/bias', 'dense/kernel']
    """
    return [path_str(kp) for kp, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _no_match(where: Any, known: list[str]) -> ValueError:
    text = where if isinstance(where, str) else " ".join(where) if _is_patterns(where) else ""
    near = difflib.get_close_matches(text, known, n=5, cutoff=0.3) or known[:5]
    shown = ", ".join(near) if near else "none: the tree has no leaves"
    return ValueError(
        f"where={where!r} matches none of the {len(known)} leaves. Nearest paths: {shown}. "
        "A string is a regular expression searched for in paths such as these."
    )


def _is_patterns(where: Any) -> bool:
    return (
        isinstance(where, (list, tuple)) and len(where) > 0
        and all(isinstance(w, str) for w in where)
    )  # fmt: skip


def select(tree: PyTree, where: Where, *, allow_empty: bool = False) -> PyTree:
    """Returns a tree of booleans: True at the leaves that ``where`` chooses.

    Args:
      tree: any pytree.
      where: see the module docstring.
      allow_empty: accept a ``where`` that chooses nothing.

    Raises:
      ValueError: nothing is chosen and ``allow_empty`` is false (the message lists the nearest
        paths), or a boolean tree has another structure than ``tree``.

    >>> select({"dense": {"kernel": 1.0, "bias": 0.0}}, "kernel")
    {'dense': {'bias': False, 'kernel': True}}
    """
    if isinstance(where, str) or _is_patterns(where):
        listed: Any = [where] if isinstance(where, str) else where
        patterns = [re.compile(w) for w in listed]
        mask = jax.tree_util.tree_map_with_path(
            lambda kp, _: any(p.search(path_str(kp)) for p in patterns), tree
        )
    elif callable(where):
        mask = jax.tree_util.tree_map_with_path(
            lambda kp, leaf: bool(where(path_str(kp), leaf)), tree
        )
    else:
        given, wanted = structure(where), structure(tree)
        if given != wanted:
            raise ValueError(
                f"where is a tree of another structure than the tree it selects from: {given} "
                f"instead of {wanted}."
            )
        mask = jax.tree.map(bool, where)
    if not allow_empty and not any(jax.tree.leaves(mask)):
        raise _no_match(where, paths(tree))
    return mask


def partition(tree: PyTree, where: Where, *, allow_empty: bool = False) -> tuple[PyTree, PyTree]:
    """Splits a tree in two of the same shape, each with ``None`` where the other has the leaf.

    ``None`` is a pytree without leaves, so a part can be differentiated, optimised and saved as
    it is. ``combine`` is the inverse.

    >>> partition({"kernel": 1.0, "bias": 0.0}, "kernel")
    ({'bias': None, 'kernel': 1.0}, {'bias': 0.0, 'kernel': None})
    """
    mask = select(tree, where, allow_empty=allow_empty)
    chosen = jax.tree.map(lambda m, x: x if m else None, mask, tree)
    rest = jax.tree.map(lambda m, x: None if m else x, mask, tree)
    return chosen, rest


def combine(chosen: PyTree, rest: PyTree) -> PyTree:
    """Puts the two parts that ``partition`` made together again.

    Raises:
      ValueError: a leaf is present in both parts (the message names it).

    >>> combine({"bias": None, "kernel": 1.0}, {"bias": 0.0, "kernel": None})
    {'bias': 0.0, 'kernel': 1.0}
    """

    def pick(kp: tuple[Any, ...], a: Any, b: Any) -> Any:
        if a is not None and b is not None:
            raise ValueError(f"both parts hold the leaf {path_str(kp)!r}; parts must be disjoint.")
        return b if a is None else a

    return jax.tree_util.tree_map_with_path(pick, chosen, rest, is_leaf=_is_none)


def is_floating(path: str, leaf: Any) -> bool:
    """A ``where``: the leaves that arithmetic is for, which are real or complex numbers.

    Use it to split a tree that also holds counters, keys or functions, such as an Equinox module.

    >>> partition({"kernel": 1.0, "step": 3}, is_floating)
    ({'kernel': 1.0, 'step': None}, {'kernel': None, 'step': 3})
    """
    del path
    if isinstance(leaf, (float, complex)):
        return True
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def leaf_key(key: Array, path: str) -> Array:
    """Returns the random key of one leaf, which depends on ``key`` and the leaf's path alone.

    So a leaf gets the same random numbers alone as in its tree, and under the name that a
    checkpoint file gives it: ``a.b`` and ``a/b`` are one path.
    """
    return jax.random.fold_in(key, zlib.crc32(path.replace("/", ".").encode()))


def map_with_path(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """``jax.tree.map`` of ``function(path, leaf, *leaves_of_rest)`` with the path as text.

    >>> map_with_path(lambda path, x: f"{path}={x}", {"a": {"b": 1}})
    {'a': {'b': 'a/b=1'}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda kp, *leaves: function(path_str(kp), *leaves), tree, *rest
    )


def check_same(
    tree: PyTree, *others: PyTree, names: Sequence[str] | None = None, floating: bool = True
) -> None:
    """Checks that trees agree leaf by leaf in path and shape, so that they can be combined.

    Args:
      tree: the tree that the others are compared with.
      others: the other trees.
      names: what to call the trees in messages, ``tree`` first.
      floating: check too that every leaf is a real or complex number.

    Raises:
      ValueError: the structure or a shape differs; the message names the first differing path.
      TypeError: a leaf is no real or complex number.

    >>> check_same({"a": 1.0}, {"b": 1.0})
    Traceback (most recent call last):
      ...
    ValueError: the trees differ at 'a': tree 0 has it, tree 1 does not. First paths of tree 1: b.
    """
    labels = list(names) if names else [f"tree {i}" for i in range(len(others) + 1)]
    if floating:
        for label, t in zip(labels, (tree, *others)):
            for kp, leaf in jax.tree_util.tree_leaves_with_path(t):
                if not is_floating("", leaf):
                    kind = getattr(leaf, "dtype", type(leaf).__name__)
                    raise TypeError(
                        f"leaf {path_str(kp)!r} of {label} is {kind}; arithmetic needs real or "
                        "complex numbers. Split such leaves off: "
                        "numbers, rest = partition(tree, is_floating)."
                    )
    for label, other in zip(labels[1:], others):
        if structure(other) != structure(tree):
            raise ValueError(_first_difference(tree, other, labels[0], label))
        for path, a, b in zip(paths(tree), jax.tree.leaves(tree), jax.tree.leaves(other)):
            if jnp.shape(a) != jnp.shape(b):
                raise ValueError(
                    f"shapes differ at {path!r}: {jnp.shape(a)} in {labels[0]}, "
                    f"{jnp.shape(b)} in {label}."
                )


def _first_difference(tree: PyTree, other: PyTree, label: str, other_label: str) -> str:
    here, there = paths(tree), paths(other)
    for a, b in zip([*here, *there], [*there, *here]):
        for path, known, has, lacks in ((a, there, label, other_label),
                                        (b, here, other_label, label)):  # fmt: skip
            if path not in known:
                near = difflib.get_close_matches(path, known, n=3) or known[:3]
                hint = f" First paths of {lacks}: {', '.join(near)}." if near else ""
                return f"the trees differ at {path!r}: {has} has it, {lacks} does not.{hint}"
    return (
        f"{label} and {other_label} have the same paths in different containers: "
        f"{structure(tree)} and {structure(other)}."
    )
