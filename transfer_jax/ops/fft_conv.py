"""Long convolutions by FFT, causal and bidirectional, that partition over every axis but time.

The two transforms are JAX primitives of their own because the SPMD partitioner gathers the operands
of an FFT although its leading axes are independent. Ours declare that, so a convolution whose
features live on several devices needs no communication. They differentiate in both modes, to any
order, and vectorise.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

Array = jax.Array


def fast_length(minimum: int) -> int:
    """The smallest even FFT length >= ``minimum`` whose prime factors are 2, 3 and 5."""
    best = 1 << max(minimum - 1, 1).bit_length()
    for five in range(14):
        for three in range(21):
            odd = 5**five * 3**three
            if odd >= best:
                break
            quotient = -(-minimum // odd)
            best = min(best, odd << max((quotient - 1).bit_length(), 1))
    return best


def _along_last_axis(transform) -> custom_partitioning:
    """Declares that ``transform(x, n)`` mixes nothing but the last axis of ``x``."""
    partitioned = custom_partitioning(transform, static_argnums=(1,))

    def partition(n, mesh, arg_shapes, result_shape):
        rank = len(arg_shapes[0].shape)
        spec = (*arg_shapes[0].sharding.spec, *[None] * rank)[: rank - 1]
        sharding = NamedSharding(mesh, PartitionSpec(*spec, None))
        return mesh, functools.partial(transform, n=n), sharding, (sharding,)

    partitioned.def_partition(
        partition,
        sharding_rule="... time -> ... frequency",
        need_replication_factors=("time", "frequency"),
    )
    return partitioned


def _of_rows(transform, x: Array, n: int) -> Array:
    # As a matrix of rows: a shard with an axis of size 1 may get a layout that XLA's FFT on CPUs
    # refuses, although the memory is in order.
    y = transform(x.reshape(-1, x.shape[-1]), n=n)
    return y.reshape(*x.shape[:-1], y.shape[-1])


_local_rfft = _along_last_axis(functools.partial(_of_rows, jnp.fft.rfft))
_local_irfft = _along_last_axis(functools.partial(_of_rows, jnp.fft.irfft))


def _multiplicity(n: int) -> np.ndarray:
    """How often each kept frequency of a real length-``n`` signal occurs in its full spectrum."""
    counts = np.full(n // 2 + 1, 2.0)
    counts[0] = 1.0
    if n % 2 == 0:
        counts[-1] = 1.0
    return counts


def _linear_primitive(name: str, local, transpose) -> Primitive:
    """A linear primitive over the last axis.

    Its parameter ``call`` is the jaxpr of ``local``: jax looks for the custom partitioning there.

    Args:
      name: of the primitive.
      local: ``(x, n) -> y``.
      transpose: ``(cotangent of y, n) -> cotangent of x``.
    """
    primitive = Primitive(name)

    def batch(args, dims, *, n, call):
        del call
        return _bind(primitive, local, jnp.moveaxis(args[0], dims[0], 0), n), 0

    def abstract(x, *, n, call):
        del n
        return x.update(shape=call.out_avals[0].shape, dtype=call.out_avals[0].dtype)

    @functools.partial(jax.jit, static_argnames=("n", "call"))
    def run(x, *, n, call):
        del call
        return local(x, n)

    def lower(x, *, n, call):
        del n
        return jaxpr_as_fun(call)(x)[0]

    primitive.def_impl(run)
    primitive.def_abstract_eval(abstract)
    ad.deflinear2(primitive, lambda cotangent, x, *, n, call: [transpose(cotangent, n)])
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(lower, multiple_results=False))
    return primitive


def _bind(primitive: Primitive, local, x: Array, n: int) -> Array:
    call = jax.make_jaxpr(lambda x: local(x, n))(jax.ShapeDtypeStruct(x.shape, x.dtype))
    return primitive.bind(x, n=n, call=call)


def _rfft_transpose(cotangent: Array, n: int) -> Array:
    weights = (n / _multiplicity(n)).astype(cotangent.real.dtype)
    return irfft(jnp.conj(cotangent) * weights, n)


def _irfft_transpose(cotangent: Array, n: int) -> Array:
    weights = (_multiplicity(n) / n).astype(cotangent.dtype)
    return jnp.conj(rfft(cotangent, n)) * weights


_rfft_p = _linear_primitive("rfft_last_axis", _local_rfft, _rfft_transpose)
_irfft_p = _linear_primitive("irfft_last_axis", _local_irfft, _irfft_transpose)


def rfft(x: Array, n: int | None = None) -> Array:
    """``numpy.fft.rfft`` over the last axis, partitionable over all others.

    Args:
      x: real float32 or float64 [..., L].
      n: length of the transform; ``x`` is zero padded or cut to it. None = L.

    Returns:
      [..., n // 2 + 1], complex64 or complex128.
    """
    n = x.shape[-1] if n is None else operator.index(n)
    x = x[..., :n]
    padding = [(0, 0)] * (x.ndim - 1) + [(0, n - x.shape[-1])]
    return _bind(_rfft_p, _local_rfft, jnp.pad(x, padding), n)


def irfft(x: Array, n: int) -> Array:
    """``numpy.fft.irfft`` over the last axis, partitionable over all others.

    Args:
      x: complex [..., n // 2 + 1].
      n: length of the real result.

    Raises:
      ValueError: the last axis of ``x`` does not fit ``n``.
    """
    n = operator.index(n)
    if x.shape[-1] != n // 2 + 1:
        raise ValueError(
            f"irfft to length {n} needs {n // 2 + 1} frequencies, got {x.shape[-1]} in {x.shape}"
        )
    return _bind(_irfft_p, _local_irfft, x, n)


def fft_convolve(u: Array, kernel: Array, reverse_kernel: Array | None = None) -> Array:
    """Linear convolution of long signals along the last axis, time.

    Causal: ``y[l] = sum_{j<=l} kernel[l-j] u[j]``. With ``reverse_kernel`` bidirectional:
    ``y[l] += sum_{j>l} reverse_kernel[j-l-1] u[j]``; the reverse half starts one step ahead so that
    ``u[l]`` is counted once. The FFT length is at least ``2 L``, so nothing wraps around.

    Args:
      u: real [..., L].
      kernel: real [..., K], leading axes broadcast against those of ``u``; taps from L on are not
        used.
      reverse_kernel: like ``kernel``, or None.

    Returns:
      real [..., L] with the broadcast leading axes.
    """
    length = u.shape[-1]
    size = fast_length(2 * length)
    kernel = kernel[..., :length]
    if reverse_kernel is not None:
        # Negative lags live at the end of the circular buffer; lag -L meets no input.
        reverse_kernel = jnp.flip(reverse_kernel[..., :length], -1)
        gap = size - kernel.shape[-1] - reverse_kernel.shape[-1]
        padding = [(0, 0)] * (kernel.ndim - 1) + [(0, gap)]
        kernel = jnp.concatenate([jnp.pad(kernel, padding), reverse_kernel], axis=-1)
    return irfft(rfft(u, size) * rfft(kernel, size), size)[..., :length]
