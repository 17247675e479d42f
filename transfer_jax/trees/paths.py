"""Leaves by name: paths, selections, partitions.

A *path* is the sequence of keys that leads to a leaf, joined by ``/``: ``layers_0/attention/kernel``.
A ``where`` chooses leaves. It is one of

* a regular expression, searched for in the path (``re.search``),
* a list of regular expressions, of which at least one must be found,
* a predicate ``(path, leaf) -> bool``,
* a tree of booleans with the structure of the tree itself.

Everything here works on any pytree.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

PyTree = Any
Where = str | Sequence[str] | Callable[[str, Any], bool] | PyTree


def _is_none(x: Any) -> bool:
    return x is None


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
        patterns = [re.compile(w) for w in ([where] if isinstance(where, str) else where)]
        mask = jax.tree_util.tree_map_with_path(
            lambda kp, _: any(p.search(path_str(kp)) for p in patterns), tree
        )
    elif callable(where):
        mask = jax.tree_util.tree_map_with_path(
            lambda kp, leaf: bool(where(path_str(kp), leaf)), tree
        )
    else:
        given, wanted = jax.tree.structure(where), jax.tree.structure(tree)
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
