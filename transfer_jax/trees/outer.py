"""Sums over examples of squared gradients, without the gradients where they are outer products.

The gradient of one example in the matrix of a dense layer is ``x d^T``, with x what goes into the
layer and d the derivative in what comes out. Its square is ``x^2 (d^2)^T``, so the sum over
examples is one product of two small matrices, and no gradient of the size of the matrix is ever
formed. Which gradients have this form is read off the program of the gradients: they come out of a
``dot_general`` with a batch dimension over the examples that sums over nothing.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import lax

from transfer_jax.trees.paths import Array, PyTree

Jaxpr = Any
Var = Any


class Outer(NamedTuple):
    """A gradient [B, ...] that is an outer product for each example.

    Attributes:
      left: the operand [B, ...] of the product.
      right: the other.
      dimensions: of the ``dot_general``.
      permutations: transpositions that follow it, the last first.
    """

    left: Var
    right: Var
    dimensions: Any
    permutations: tuple[tuple[int, ...], ...]


class Program(NamedTuple):
    """A function ``i -> (gradients, weights)`` of a chunk of examples, taken apart.

    Attributes:
      closed: its program.
      outers: for each gradient, an ``Outer``, or None where it has no such form.
      structure: of the gradients.
    """

    closed: Any
    outers: tuple[Outer | None, ...]
    structure: Any

    def held_bytes(self) -> int:
        """Bytes of the gradients of one example that must be formed."""
        shapes = [v.aval for v in self.closed.jaxpr.outvars[:-1]]
        return sum(
            math.prod(aval.shape[1:]) * aval.dtype.itemsize
            for aval, outer in zip(shapes, self.outers)
            if outer is None
        )


def trace(function: Callable[..., tuple[PyTree, Array]], *args: Any) -> Program:
    """Takes ``function`` apart.

    Args:
      function: returns gradients, a tree of [B, ...], and weights [B].
      *args: of it, arrays or shapes; the last is the index i.

    >>> def gradients(x, d, i):  # of a dense layer, for three examples
    ...     return {"kernel": x[:, :, None] * d[:, None, :], "bias": d}, jnp.ones(3)
    >>> def outer_gradients(x, d, i):
    ...     return {"kernel": jnp.einsum("ba,bc->bac", x, d), "bias": d}, jnp.ones(3)
    >>> args = jnp.ones((3, 5)), jnp.ones((3, 4)), jnp.int32(0)
    >>> [trace(f, *args).held_bytes() for f in (gradients, outer_gradients)]
    [96, 16]
    """
    closed, (gradients, _) = jax.make_jaxpr(function, return_shape=True)(*args)
    made_by = {v: eqn for eqn in closed.jaxpr.eqns for v in eqn.outvars}
    outers = tuple(_outer(v, made_by) for v in closed.jaxpr.outvars[:-1])
    return Program(closed, outers, jax.tree.structure(gradients))


def _outer(var: Var, made_by: dict[Var, Any]) -> Outer | None:
    permutations: list[tuple[int, ...]] = []
    eqn = None if isinstance(var, jax.extend.core.Literal) else made_by.get(var)
    while eqn is not None and eqn.primitive.name == "transpose":
        permutations.append(tuple(eqn.params["permutation"]))
        source = eqn.invars[0]
        eqn = made_by.get(source) if not isinstance(source, jax.extend.core.Literal) else None
    if eqn is None or eqn.primitive.name != "dot_general":
        return None
    (contract, _), (batch, other_batch) = eqn.params["dimension_numbers"]
    left, right = eqn.invars
    real = all(
        hasattr(v, "aval") and jnp.issubdtype(v.aval.dtype, jnp.floating) for v in (left, right)
    )
    # One batch dimension, first in all arrays up to the result, and nothing summed over.
    if not real or tuple(batch) != (0,) or tuple(other_batch) != (0,):
        return None
    if any(p[0] != 0 for p in permutations):
        return None
    if math.prod(left.aval.shape[d] for d in contract) != 1:
        return None
    return Outer(left, right, eqn.params["dimension_numbers"], tuple(permutations))


def sum_of_squares(program: Program, args: tuple[Any, ...], count: int, weights: Array) -> PyTree:
    """Returns the sum over ``i < count`` and examples b of ``weights_b * w_ib * g_ib^2``.

    Args:
      program: of ``(*args, i) -> (g_i, w_i)``.
      args: its arguments but the last.
      count: how many i.
      weights: [B]; where they are 0 the gradients may be anything.

    Returns:
      A tree like one example's gradients, float32 or wider.
    """
    jaxpr = program.closed.jaxpr
    *gradients, own = jaxpr.outvars
    needed = [own]
    for var, outer in zip(gradients, program.outers):
        needed += [var] if outer is None else [outer.left, outer.right]
    flat = [*jax.tree.leaves(args)]
    once, again = _split(jaxpr, needed, jaxpr.invars[-1])
    known = _run(once, program.closed.consts, flat)

    def squares(i: Array) -> list[Array]:
        values = iter(_run(again, program.closed.consts, [*known, i]))
        w = jnp.where(weights > 0, weights * next(values), 0.0)
        result = []
        for outer in program.outers:
            if outer is None:
                result.append(_sum_squares(next(values), w))
            else:
                result.append(_sum_outer(outer, next(values), next(values), w))
        return result

    if count == 1:
        total = squares(jnp.int32(0))
    else:
        zeros = [
            jnp.zeros(v.aval.shape[1:], jnp.promote_types(_real(v.aval.dtype), jnp.float32))
            for v in gradients
        ]
        total = lax.scan(
            lambda t, i: ([a + b for a, b in zip(t, squares(i))], None), zeros, jnp.arange(count)
        )[0]
    return jax.tree.unflatten(program.structure, total)


def _real(dtype: Any) -> Any:
    return jnp.zeros((), dtype).real.dtype


def _along(w: Array, ndim: int) -> Array:
    return w.reshape(-1, *(1,) * (ndim - 1))


def _sum_squares(x: Array, w: Array) -> Array:
    square = jnp.square(jnp.abs(x.astype(jnp.promote_types(x.dtype, jnp.float32))))
    w = _along(w, x.ndim)
    return jnp.sum(jnp.where(w > 0, w * square, 0.0), axis=0)


def _sum_outer(outer: Outer, left: Array, right: Array, w: Array) -> Array:
    def squared(x: Array) -> Array:
        square = jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        return jnp.where(_along(w, x.ndim) > 0, square, 0.0)

    (contract, other), _ = outer.dimensions
    dimensions = (((0, *contract), (0, *other)), ((), ()))
    result = lax.dot_general(
        squared(left) * _along(w, left.ndim), squared(right), dimensions,
        precision=lax.Precision.HIGHEST,
    )  # fmt: skip
    for permutation in reversed(outer.permutations):
        result = jnp.transpose(result, [d - 1 for d in permutation[1:]])
    return result


def _split(jaxpr: Jaxpr, needed: list[Var], index: Var) -> tuple[Jaxpr, Jaxpr]:
    """Splits a program into what does not depend on ``index``, and the rest.

    The first maps all inputs but the last to values that the second takes before ``index``.
    """
    depends, early, late = {index}, [], []
    for eqn in jaxpr.eqns:
        inputs = [v for v in eqn.invars if not isinstance(v, jax.extend.core.Literal)]
        if any(v in depends for v in inputs):
            late.append(eqn)
            depends.update(eqn.outvars)
        else:
            early.append(eqn)
    given = {*jaxpr.constvars, index}
    used = [v for eqn in late for v in eqn.invars] + needed
    passed = [
        v for v in dict.fromkeys(v for v in used if not isinstance(v, jax.extend.core.Literal))
        if v not in depends and v not in given
    ]  # fmt: skip
    return (
        jaxpr.replace(invars=jaxpr.invars[:-1], outvars=passed, eqns=early),
        jaxpr.replace(invars=[*passed, index], outvars=needed, eqns=late),
    )


def _run(jaxpr: Jaxpr, consts: list[Any], args: list[Any]) -> list[Any]:
    return jax.core.eval_jaxpr(jaxpr, consts, *args)
