"""Diagonal linear recurrences ``x[l] = a[l] x[l-1] + b[l]``, step by step and in parallel."""

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def _prepare(a: Array, b: Array, reset: Array | None, valid: Array | None, axis: int):
    """Broadcasts the coefficients, moves time to the front, applies resets and the mask."""
    shape = jnp.broadcast_shapes(a.shape, b.shape)
    dtype = jnp.result_type(a, b)
    a = jnp.moveaxis(jnp.broadcast_to(a, shape).astype(dtype), axis, 0)
    b = jnp.moveaxis(jnp.broadcast_to(b, shape).astype(dtype), axis, 0)
    if reset is not None:
        a = jnp.where(jnp.moveaxis(jnp.broadcast_to(reset, shape), axis, 0), 0, a)
    if valid is not None:
        keep = jnp.moveaxis(jnp.broadcast_to(valid, shape), axis, 0)
        a, b = jnp.where(keep, a, 1), jnp.where(keep, b, 0)
    return a, b


def _start(initial: Array | None, b: Array) -> Array:
    return jnp.zeros_like(b[0]) if initial is None else jnp.broadcast_to(initial, b[0].shape)


def linear_scan(
    a: Array,
    b: Array,
    initial: Array | None = None,
    *,
    reset: Array | None = None,
    valid: Array | None = None,
    axis: int = 0,
) -> Array:
    """All states of ``x[l] = a[l] x[l-1] + b[l]``, elementwise, one step after the other.

    Args:
      a: decay, real or complex, broadcastable against ``b``.
      b: drive.
      initial: the state before the first step, the shape of ``b`` without ``axis``; None = 0.
      reset: bool, broadcastable; where true the state before that step is forgotten.
      valid: bool, broadcastable; where false the step leaves the state as it is (padding).
      axis: the time axis of the broadcast shape.

    Returns:
      The states, in the broadcast shape of ``a`` and ``b``.
    """
    a, b = _prepare(a, b, reset, valid, axis)

    def step(x, coefficients):
        decay, drive = coefficients
        x = decay * x + drive
        return x, x

    return jnp.moveaxis(lax.scan(step, _start(initial, b).astype(b.dtype), (a, b))[1], 0, axis)


def associative_linear_scan(
    a: Array,
    b: Array,
    initial: Array | None = None,
    *,
    reset: Array | None = None,
    valid: Array | None = None,
    axis: int = 0,
) -> Array:
    """As ``linear_scan``, in logarithmic depth by ``lax.associative_scan``."""
    a, b = _prepare(a, b, reset, valid, axis)
    b = b.at[0].add(a[0] * _start(initial, b))

    def combine(left, right):
        (a1, b1), (a2, b2) = left, right
        return a1 * a2, a2 * b1 + b2

    return jnp.moveaxis(lax.associative_scan(combine, (a, b))[1], 0, axis)
