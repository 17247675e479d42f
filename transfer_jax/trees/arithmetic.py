"""Vector arithmetic on pytrees.

The trees of a call must agree in paths and shapes. Leaves narrower than float32 are computed in
float32; results have the dtype of the leaf (of the first tree), and keep its sharding.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from transfer_jax.trees.blocks import block_coefficients, expand
from transfer_jax.trees.paths import Array, PyTree, check_same


def wide(x: Array) -> Array:
    """Returns ``x`` in the dtype it is computed in: at least float32."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def sharded_like(x: Array, leaf: Array) -> Array:
    """Puts ``x`` where ``leaf`` is, if that is a layout over several devices."""
    if isinstance(x, jax.core.Tracer) or not isinstance(leaf, jax.Array):
        return x
    several = len(leaf.sharding.device_set) > 1
    return jax.device_put(x, leaf.sharding) if several and x.sharding != leaf.sharding else x


def _like(value: Array, leaf: Array) -> Array:
    return value.astype(jnp.result_type(leaf))


def add(a: PyTree, b: PyTree) -> PyTree:
    """Returns ``a + b``.

    Raises:
      ValueError: the trees differ in paths or shapes.

    >>> add({"w": 1.0}, {"w": 2.0})
    {'w': Array(3., dtype=float32)}
    """
    check_same(a, b)
    return jax.tree.map(lambda x, y: _like(wide(x) + wide(y), x), a, b)


def sub(a: PyTree, b: PyTree) -> PyTree:
    """Returns ``a - b``.

    Raises:
      ValueError: the trees differ in paths or shapes.

    >>> sub({"w": 1.0}, {"w": 2.0})
    {'w': Array(-1., dtype=float32)}
    """
    check_same(a, b)
    return jax.tree.map(lambda x, y: _like(wide(x) - wide(y), x), a, b)


def scale(tree: PyTree, factor: Array | float | PyTree) -> PyTree:
    """Returns ``factor * tree``.

    Args:
      tree: any pytree of numbers.
      factor: a scalar, or per-block factors (see ``block_coefficients``; no axis of trees).

    >>> scale({"w": 2.0, "b": 1.0}, 3.0)
    {'b': Array(3., dtype=float32), 'w': Array(6., dtype=float32)}
    """
    check_same(tree)
    factors = block_coefficients(tree, factor)
    return jax.tree.map(lambda x, f: _like(expand(f, jnp.ndim(x)) * wide(x), x), tree, factors)


def lerp(a: PyTree, b: PyTree, t: Array | float | PyTree) -> PyTree:
    """Linear interpolation ``(1 - t) a + t b``: ``a`` at 0, ``b`` at 1, extrapolation outside.

    Args:
      a: the tree at ``t = 0``.
      b: the tree at ``t = 1``.
      t: a scalar, or per-block values (see ``block_coefficients``; no axis of trees).

    Raises:
      ValueError: the trees differ in paths or shapes.

    >>> lerp({"w": 0.0}, {"w": 8.0}, 0.25)
    {'w': Array(2., dtype=float32)}
    """
    check_same(a, b)
    ts = block_coefficients(a, t)
    return jax.tree.map(lambda x, y, s: lerp_leaf(x, y, expand(s, jnp.ndim(x))), a, b, ts)


def lerp_leaf(a: Array, b: Array, t: Array | float) -> Array:
    """``lerp`` of two arrays of one shape; ``t`` broadcasts to them."""
    return _like((1 - t) * wide(a) + t * wide(b), a)


def slerp(a: PyTree, b: PyTree, t: Array | float | PyTree) -> PyTree:
    """Spherical interpolation of each leaf, taken as one vector.

    ``sin((1-t) w)/sin(w) a + sin(t w)/sin(w) b`` with ``w`` the angle between the leaves
    (Shoemake 1985). Leaves that are almost parallel (``|cos w| > 0.9995``) are interpolated
    linearly, as sin(w) is almost zero there.

    Args:
      a: the tree at ``t = 0``.
      b: the tree at ``t = 1``.
      t: a scalar, or one value per leaf (see ``block_coefficients``; no axis of trees).

    Raises:
      ValueError: the trees differ in paths or shapes.

    >>> slerp({"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([0.0, 2.0])}, 0.5)["w"].round(3)
    Array([1.414, 1.414], dtype=float32)
    """
    check_same(a, b)
    ts = block_coefficients(a, t)
    return jax.tree.map(lambda x, y, s: slerp_leaf(x, y, expand(s, jnp.ndim(x))), a, b, ts)


def slerp_leaf(a: Array, b: Array, t: Array | float) -> Array:
    """``slerp`` of two arrays of one shape."""
    x, y = wide(a), wide(b)
    norms = jnp.sqrt(jnp.sum(x * x) * jnp.sum(y * y))
    cosine_ = jnp.sum(x * y) / jnp.where(norms == 0, 1.0, norms)
    parallel = (jnp.abs(cosine_) > 0.9995) | (norms == 0)
    # The inner where keeps the unused branch, and its gradient, finite.
    angle = jnp.arccos(jnp.where(parallel, 0.0, cosine_))
    spherical = (jnp.sin((1 - t) * angle) * x + jnp.sin(t * angle) * y) / jnp.sin(angle)
    return _like(jnp.where(parallel, (1 - t) * x + t * y, spherical), a)


def dot(a: PyTree, b: PyTree) -> Array:
    """Inner product over all leaves, ``sum conj(a) b``: a float32 scalar (or wider).

    Raises:
      ValueError: the trees differ in paths or shapes.

    >>> dot({"w": 2.0, "b": 1.0}, {"w": 3.0, "b": 4.0})
    Array(10., dtype=float32)
    """
    check_same(a, b)
    parts = jax.tree.map(lambda x, y: jnp.sum(jnp.conj(wide(x)) * wide(y)), a, b)
    return sum(jax.tree.leaves(parts), start=jnp.float32(0))


def norm(tree: PyTree) -> Array:
    """Euclidean norm over all leaves: a float32 scalar (or wider).

    >>> norm({"w": 3.0, "b": 4.0})
    Array(5., dtype=float32)
    """
    return jnp.sqrt(dot(tree, tree).real)


def cosine(a: PyTree, b: PyTree) -> Array:
    """Cosine of the angle between two trees, 0 if one of them is zero.

    Raises:
      ValueError: the trees differ in paths or shapes.

    >>> cosine({"w": 1.0, "b": 0.0}, {"w": 0.0, "b": 1.0})
    Array(0., dtype=float32)
    """
    norms = norm(a) * norm(b)
    return jnp.where(norms == 0, 0.0, dot(a, b) / jnp.where(norms == 0, 1.0, norms))


def weighted_sum(trees: Sequence[PyTree], weights: Array | Sequence[float] | PyTree) -> PyTree:
    """Returns ``sum_i weights_i trees_i``.

    Args:
      trees: n trees.
      weights: [n], or per-block weights with a leading axis n (see ``block_coefficients``).

    Raises:
      ValueError: there are no trees, the trees differ in paths or shapes, or the number of
        weights is another one.

    >>> weighted_sum([{"w": 1.0}, {"w": 2.0}], [10.0, 1.0])
    {'w': Array(12., dtype=float32)}
    """
    if not trees:
        raise ValueError("weighted_sum of no trees: give at least one.")
    check_same(*trees)
    coefficients = block_coefficients(trees[0], weights, len(trees))

    def leaf(c: Array, *xs: Array) -> Array:
        total = sum(expand(c[i], jnp.ndim(x)) * wide(x) for i, x in enumerate(xs))
        return _like(jnp.asarray(total), xs[0])

    return jax.tree.map(lambda x, c, *xs: leaf(c, x, *xs), trees[0], coefficients, *trees[1:])


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Stacks the leaves of n trees along a new leading axis; leaves may be of any dtype.

    Raises:
      ValueError: there are no trees, or they differ in paths or shapes.

    >>> stack([{"w": jnp.float32(1)}, {"w": jnp.float32(2)}])
    {'w': Array([1., 2.], dtype=float32)}
    """
    if not trees:
        raise ValueError("stack of no trees: give at least one.")
    check_same(*trees, floating=False)
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def unstack(tree: PyTree) -> list[PyTree]:
    """The inverse of ``stack``: one tree per index of the leading axis.

    Raises:
      ValueError: the leading axes of the leaves differ in size.

    >>> [t["w"].item() for t in unstack({"w": jnp.arange(2)})]
    [0, 1]
    """
    leaves = jax.tree.leaves(tree)
    sizes = {jnp.shape(x)[:1] for x in leaves}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"unstack needs leaves with one leading axis of a common size, not {sorted(sizes)}."
        )
    (size,) = sizes.pop()
    return [jax.tree.map(lambda x: x[i], tree) for i in range(size)]  # noqa: B023
