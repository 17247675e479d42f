"""Task vectors: what fine-tuning changed, added, subtracted and scaled."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from transfer_jax.trees.arithmetic import sub, wide
from transfer_jax.trees.blocks import block_coefficients, expand
from transfer_jax.trees.paths import Array, PyTree, check_same, map_with_path, structure


def task_vector(finetuned: PyTree, base: PyTree) -> PyTree:
    """Returns ``finetuned - base`` (Ilharco et al. 2023, section 2).

    Raises:
      ValueError: the trees differ in paths or shapes.

    >>> task_vector({"w": 3.0}, {"w": 1.0})
    {'w': Array(2., dtype=float32)}
    """
    check_same(finetuned, base, names=("finetuned", "base"))
    return sub(finetuned, base)


def apply_task_vectors(
    base: PyTree,
    vectors: Sequence[PyTree] | PyTree,
    coefficients: Array | float | PyTree = 1.0,
) -> PyTree:
    """Returns ``base + sum_i coefficients_i vectors_i``, block by block.

    A coefficient of -1 negates a task; the analogy "a is to b as c is to d" is
    ``apply_task_vectors(base, [b, a, c], [1, -1, 1])`` (Ilharco et al. 2023, section 2). With one
    coefficient per vector and leaf this is the anisotropic scaling of aTLAS (Zhang et al. 2024,
    equation 3). Differentiable in the coefficients; the backward pass holds one model, not n.

    Args:
      base: the parameters at which all coefficients are 0.
      vectors: n task vectors: a list (or tuple) of trees like ``base``, or one tree like ``base``
        with a leading axis n on every leaf (see ``stack``), of any floating dtype.
      coefficients: a scalar, [n], a mapping from path patterns to these, or a tree like ``base``
        with leaves [n, ...] (see ``block_coefficients``).

    Raises:
      ValueError: the trees differ in paths or shapes, or coefficients do not fit.

    >>> base, vectors = {"w": 1.0, "b": 0.0}, [{"w": 2.0, "b": 1.0}, {"w": 4.0, "b": 1.0}]
    >>> apply_task_vectors(base, vectors, jnp.array([0.5, -1.0]))
    {'b': Array(-0.5, dtype=float32), 'w': Array(-2., dtype=float32)}
    >>> apply_task_vectors(base, vectors, {"w": [0.5, 0.0], "b": 0.0})
    {'b': Array(0., dtype=float32), 'w': Array(2., dtype=float32)}
    """
    if structure(vectors) == structure(base):
        return _apply_stacked(base, vectors, coefficients)
    if not isinstance(vectors, (list, tuple)):
        check_same(base, vectors, names=("base", "vectors"))
    vectors = list(vectors)
    if not vectors:
        raise ValueError("no task vectors: give at least one.")
    check_same(base, *vectors, names=["base", *(f"vector {i}" for i in range(len(vectors)))])
    per_block = block_coefficients(base, coefficients, len(vectors))

    def leaf(x: Array, c: Array, *deltas: Array) -> Array:
        total = wide(x)
        for i, delta in enumerate(deltas):
            total = total + expand(c[i], jnp.ndim(x)) * wide(delta)
        return total.astype(jnp.result_type(x))

    return jax.tree.map(leaf, base, per_block, *vectors)


def _apply_stacked(base: PyTree, bank: PyTree, coefficients: Any) -> PyTree:
    check_same(base)
    counts = {jnp.shape(x)[:1] for x in jax.tree.leaves(bank)}
    if len(counts) != 1 or () in counts:
        raise ValueError(
            "stacked task vectors need one leading axis of a common size n on every leaf, not "
            f"{sorted(counts)}."
        )
    (num,) = counts.pop()
    per_block = block_coefficients(base, coefficients, num)

    def leaf(path: str, x: Array, c: Array, deltas: Array) -> Array:
        if jnp.shape(deltas)[1:] != jnp.shape(x):
            raise ValueError(
                f"stacked task vectors at {path!r} have shape {jnp.shape(deltas)}; expected "
                f"{(num, *jnp.shape(x))}."
            )
        # Not a matrix product: its backward pass would hold the bank a second time.
        change = jnp.sum(expand(c, jnp.ndim(x) + 1) * wide(deltas), axis=0)
        return (wide(x) + change).astype(jnp.result_type(x))

    return map_with_path(leaf, base, per_block, bank)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linearized:
    """The tangent model that ``linearize`` returns: call it as the function it linearises.

    A pytree whose leaves are those of ``base``: pass it to jitted code as an argument.
    """

    base: PyTree
    apply_fn: Callable[..., Any] = dataclasses.field(metadata={"static": True})

    def __call__(self, params: PyTree, *args: Any, **kwargs: Any) -> Any:
        check_same(self.base, params, names=("base", "params"))
        values, change = jax.jvp(
            lambda p: self.apply_fn(p, *args, **kwargs), (self.base,), (sub(params, self.base),)
        )
        return jax.tree.map(jnp.add, values, change)


def linearize(apply_fn: Callable[..., Any], base: PyTree) -> Linearized:
    """Returns the first-order Taylor expansion of ``apply_fn`` in its parameters around ``base``.

    ``g(params, x) = f(base, x) + J(base, x) (params - base)``, by one Jacobian-vector product:
    about the cost of two forward passes (Ortiz-Jimenez et al. 2023, equation 4; aTLAS, section 3).
    It is affine in ``params`` and can be differentiated in them.

    Args:
      apply_fn: ``apply_fn(params, *args, **kwargs)``, with any pytree of floating arrays as result.
      base: the parameters to expand around.

    Returns:
      A callable ``(params, *args, **kwargs)``, itself a pytree.

    >>> tangent = linearize(lambda p, x: p["w"] ** 2 * x, {"w": 3.0})
    >>> tangent({"w": 4.0}, 1.0)
    Array(15., dtype=float32, weak_type=True)
    """
    return Linearized(base, apply_fn)
