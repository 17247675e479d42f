"""Masks by magnitude, and gradients straight through them."""

import concurrent.futures
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transfer_jax.trees.arithmetic import wide
from transfer_jax.trees.paths import Array, PyTree, check_same


class Difference(NamedTuple):
    """The numbers ``model - base`` of two arrays of one shape, to be formed a block at a time."""

    base: Array
    model: Array


Numbers = Array | Difference


def order_statistics(arrays: Sequence[Numbers], ranks: Sequence[int]) -> list[Array]:
    """Returns the magnitudes that would be at ``ranks`` if all of them were sorted, ascending.

    Exact, and without a sort: by selection for arrays in host memory; elsewhere, and under
    ``jit``, by 31 passes that count (the bits of a positive float32 are ordered as it is).

    Args:
      arrays: arrays, or ``Difference``s of arrays, taken together as one list of numbers.
      ranks: counted from 0.

    >>> [float(x) for x in order_statistics([jnp.array([3.0, -1.0]), jnp.array([2.0])], [0, 2])]
    [1.0, 3.0]
    """
    if all(_on_host(x) for x in arrays):
        return [jnp.asarray(_select_on_host(arrays, rank)) for rank in ranks]
    parts = [_magnitudes(x) for x in arrays]
    if any(x.dtype != jnp.float32 for x in parts):
        ordered = jnp.sort(jnp.concatenate([x.ravel() for x in parts]))
        return [ordered[r] for r in ranks]
    bits = [jax.lax.bitcast_convert_type(x, jnp.int32) for x in parts]

    def search(rank: int) -> Array:
        def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            middle = low + (high - low) // 2
            count = sum(jnp.sum(b <= middle, dtype=jnp.int32) for b in bits)
            enough = count > rank
            return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

        infinity = 0x7F800000
        low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.int32(0), jnp.int32(infinity)))
        return jax.lax.bitcast_convert_type(low, jnp.float32)

    return [search(r) for r in ranks]


def _magnitudes(x: Numbers) -> Array:
    if isinstance(x, Difference):
        return jnp.abs(wide(x.model) - wide(x.base))
    return jnp.abs(wide(x))


def _size(x: Numbers) -> int:
    return jnp.size(x.model if isinstance(x, Difference) else x)


def _on_host(x: Numbers) -> bool:
    if isinstance(x, Difference):
        return _on_host(x.base) and _on_host(x.model)
    if isinstance(x, jax.core.Tracer):
        return False
    if isinstance(x, jax.Array):
        devices: Any = x.sharding.device_set
        return len(devices) == 1 and next(iter(devices)).platform == "cpu"
    return True


_BLOCK = 1 << 16  # Numbers that are worked on at a time: they stay in the cache.


def _select_on_host(arrays: Sequence[Numbers], rank: int) -> np.ndarray:
    size = sum(_size(x) for x in arrays)
    # As many samples as make sorting them and selecting between the bounds cost about the same; an
    # odd step wanders over the rows of a matrix.
    step = int(size ** (1 / 3)) | 1
    sample = np.sort(np.concatenate([_host_magnitudes(x, step=step) for x in arrays]))
    # Bounds that the sought number is almost certainly between, by the spread of a binomial.
    fraction = rank / size
    margin = 4 * np.sqrt(sample.size * fraction * (1 - fraction)) + 2
    first, last = int(fraction * sample.size - margin), int(fraction * sample.size + margin)
    low = sample[first] if first >= 0 else 0.0
    high = sample[last] if last < sample.size else np.inf
    below, between = 0, []
    for x in arrays:
        for start in range(0, _size(x), _BLOCK):
            magnitudes = _host_magnitudes(x, start, start + _BLOCK)
            below += int(np.count_nonzero(magnitudes < low))
            between.append(magnitudes[(magnitudes >= low) & (magnitudes <= high)])
    candidates = np.concatenate(between)
    if not below <= rank < below + candidates.size:  # The sample misled, or there are NaNs.
        below, candidates = 0, np.concatenate([_host_magnitudes(x) for x in arrays])
    return np.partition(candidates, rank - below)[rank - below]


def _host_magnitudes(
    x: Numbers, start: int = 0, stop: int | None = None, step: int = 1
) -> np.ndarray:
    """Magnitudes of some of the numbers, float32 or wider."""
    chosen = []
    for part in x if isinstance(x, Difference) else (x,):
        flat = np.asarray(part).reshape(-1)[start:stop:step]
        chosen.append(flat.astype(np.float32) if flat.dtype.itemsize < 4 else flat)
    if len(chosen) == 1:
        return np.abs(chosen[0])
    difference = chosen[1] - chosen[0]
    return np.abs(difference, out=None if np.iscomplexobj(difference) else difference)


def map_on_host(function: Callable[[int], Array], num: int, arrays: Sequence[Array]) -> list[Array]:
    """Maps ``function`` over ``range(num)``, on all cores if ``arrays`` are in host memory."""
    if num == 1 or not all(_on_host(x) for x in arrays):
        return [function(i) for i in range(num)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, range(num)))


def num_kept(keep: float, size: int) -> int:
    """Returns how many of ``size`` entries a fraction ``keep`` is: rounded down, but at least 1."""
    return size if keep >= 1 else max(1, int(keep * size))


def magnitude_mask(tree: PyTree, keep: float, scope: Literal["leaf", "global"] = "leaf") -> PyTree:
    """Returns a mask of the entries of largest magnitude.

    Args:
      tree: any pytree of floating leaves.
      keep: the fraction to keep, in (0, 1]; rounded down to a number of entries, at least one.
        Entries that equal the smallest one kept are all kept.
      scope: the fraction of every ``leaf``, or of all leaves together (``global``).

    Returns:
      A tree of booleans like ``tree``.

    Raises:
      ValueError: ``keep`` is out of range, or ``scope`` unknown.

    >>> magnitude_mask({"w": jnp.array([3.0, -1.0]), "b": jnp.array([2.0, 0.5])}, 0.25, "global")
    {'b': Array([False, False], dtype=bool), 'w': Array([ True, False], dtype=bool)}
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep}: give a fraction above 0 and up to 1.")
    if scope not in ("leaf", "global"):
        raise ValueError(f"scope={scope!r} is not one of 'leaf', 'global'.")
    check_same(tree)
    if scope == "leaf":
        return jax.tree.map(lambda x: jnp.abs(wide(x)) >= smallest_kept([x], keep), tree)
    smallest = smallest_kept(jax.tree.leaves(tree), keep)
    return jax.tree.map(lambda x: jnp.abs(wide(x)) >= smallest, tree)


def smallest_kept(arrays: Sequence[Numbers], keep: float) -> Array:
    """Returns the smallest magnitude among the fraction ``keep`` of largest ones.

    Args:
      arrays: as for ``order_statistics``.
      keep: as for ``magnitude_mask``.

    >>> smallest_kept([jnp.array([3.0, -1.0]), jnp.array([2.0])], 0.7)
    Array(2., dtype=float32)
    """
    size = sum(_size(x) for x in arrays)
    if keep >= 1 or size == 0:
        return jnp.float32(0)
    return order_statistics(arrays, [size - num_kept(keep, size)])[0]


def apply_mask(tree: PyTree, mask: PyTree, *, straight_through: bool = False) -> PyTree:
    """Returns ``tree`` with zeros where ``mask`` is False.

    Args:
      tree: any pytree of arrays.
      mask: a tree like it, of booleans or of 0 and 1.
      straight_through: let gradients through as if nothing were masked, so that masked entries
        keep learning (Bengio et al. 2013); otherwise their gradient is zero.

    Raises:
      ValueError: the trees differ in paths or shapes.

    >>> apply_mask({"w": jnp.array([3.0, -1.0])}, {"w": jnp.array([True, False])})
    {'w': Array([3., 0.], dtype=float32)}
    """
    check_same(tree, mask, names=("tree", "mask"), floating=False)
    masked = _masked_straight_through if straight_through else _masked
    return jax.tree.map(lambda x, m: masked(jnp.asarray(x), m), tree, mask)


def _masked(x: Array, mask: Array) -> Array:
    return jnp.where(mask, x, jnp.zeros_like(x))


@jax.custom_vjp
def _masked_straight_through(x: Array, mask: Array) -> Array:
    return _masked(x, mask)


def _forward(x: Array, mask: Array) -> tuple[Array, None]:
    return _masked(x, mask), None


def _backward(_: None, gradient: Array) -> tuple[Array, None]:
    return gradient, None


_masked_straight_through.defvjp(_forward, _backward)
