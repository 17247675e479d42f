"""Linear state space models: discretisation, convolution kernels, recurrences.

Notation: H features, N state size, n = N/2 stored complex modes (each stands for itself and its
conjugate), R rank, V output channels. A diagonal-plus-low-rank (DPLR) system is
``A = diag(lam) - sum_r p_r q_r^*``; row vectors ``c`` act without conjugation, ``y = C x``.
Arithmetic is in the precision of the arguments (float32/complex64, or double under x64).
Gu, Goel and Re (2021), sections 3.2-3.4 and appendix C; the diagonal kernel is that of S4D.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from transfer_jax.ops.fft_conv import fft_convolve, irfft

Array = jax.Array

HIGHEST = lax.Precision.HIGHEST
CHUNK_ELEMENTS = 2**18  # features x modes x frequencies held at once by default


# Kernels -----------------------------------------------------------------------------------------


def _cauchy_rows(z: Array, numerators: Array) -> Array:
    """Real coefficients [H, 2K, n] of the paired Cauchy sums of ``numerators`` [H, K, n].

    ``v/(i s - c z) + conj(v)/(i s - c conj(z)) = (i s r1 - c r2) / ((i s - c z)(i s - c conj(z)))``
    with ``r1 = 2 Re v`` and ``r2 = 2 Re(v conj(z))``: two real numbers per mode and sum.
    """
    r1 = 2 * numerators.real
    r2 = 2 * (numerators.real * z.real[:, None] + numerators.imag * z.imag[:, None])
    return jnp.concatenate([r1, r2], axis=1)


def _cauchy_block(z: Array, rows: Array, s: Array, c: Array) -> Array:
    """Paired Cauchy sums on one block of frequencies, in real arithmetic.

    Args:
      z: complex [H, n].
      rows: what ``_cauchy_rows`` returned, [H, 2K, n].
      s: sin(theta/2) of each frequency, [F].
      c: cos(theta/2), [F].

    Returns:
      complex [H, K, F].
    """
    damped, turned = z.real[..., None] * c, z.imag[..., None] * c
    # The denominator (i s - c z)(i s - c conj z), factored so that it is exact near resonance.
    real = (turned - s) * (turned + s) + damped * damped
    imag = -2 * s * damped
    scale = 1 / jnp.maximum(real * real + imag * imag, jnp.finfo(real.dtype).tiny)
    by_real = jnp.einsum("hkn,hnf->hkf", rows, real * scale, precision=HIGHEST)
    by_imag = jnp.einsum("hkn,hnf->hkf", rows, imag * scale, precision=HIGHEST)
    (r1_re, r2_re), (r1_im, r2_im) = jnp.split(by_real, 2, axis=1), jnp.split(by_imag, 2, axis=1)
    return lax.complex(s * r1_im - c * r2_re, s * r1_re + c * r2_im)


def _solve_small(matrix: list[list[Array]], right: list[Array]) -> list[Array]:
    """Solves R x R systems whose entries are whole arrays, by elimination unrolled over R.

    No pivoting: with q = p and Re(lam) < 0 the Hermitian part of the matrix is at least the
    identity, and so is that of every Schur complement.
    """
    rank = len(right)
    matrix, right = [list(row) for row in matrix], list(right)
    for i in range(rank):
        for j in range(i + 1, rank):
            factor = matrix[j][i] / matrix[i][i]
            matrix[j] = [a - factor * b for a, b in zip(matrix[j], matrix[i])]
            right[j] = right[j] - factor * right[i]
    for i in reversed(range(rank)):
        for j in range(i + 1, rank):
            right[i] = right[i] - matrix[i][j] * right[j]
        right[i] = right[i] / matrix[i][i]
    return right


def kernel_dplr(
    dt: Array,
    lam: Array,
    p: Array,
    q: Array,
    b: Array,
    c: Array,
    length: int,
    *,
    chunk_size: int | None = None,
) -> Array:
    """Convolution kernel of a bilinearly discretised DPLR system, by its generating function.

    Evaluates ``sum_l K_l w^l`` at the ``length``-th roots of unity w with the Woodbury identity and
    Cauchy sums, in a form without the pole at w = -1, then inverts by FFT (section 3.3).
    Frequencies are processed in blocks that are recomputed in the backward pass: working memory
    is O(H n chunk_size + V H length).

    Args:
      dt: step, real [H].
      lam: complex [H, n]; none may be 0 (that mode has a pole at w = 1).
      p: complex [R, H, n].
      q: complex [R, H, n].
      b: complex [H, n].
      c: truncated output row ``C (I - Ab^length)``, complex [V, H, n].
      length: L >= 1, the length for which ``c`` was truncated.
      chunk_size: frequencies per block; None = about ``CHUNK_ELEMENTS / (H n)``.

    Returns:
      real [V, H, L] with ``K_l = C Ab^l Bb``.
    """
    features, modes = lam.shape
    channels, rank = c.shape[0], p.shape[0]
    z = 0.5 * dt[:, None] * lam
    p, q_star, c = (jnp.moveaxis(x, 1, 0) for x in (p, q.conj(), c))  # [H, K, n]
    numerators = [c * b[:, None], q_star * b[:, None]]
    numerators += [(c[:, :, None] * p[:, None]).reshape(features, channels * rank, modes)]
    numerators += [(q_star[:, :, None] * p[:, None]).reshape(features, rank * rank, modes)]
    rows = _cauchy_rows(z, jnp.concatenate(numerators, axis=1))
    half_dt = 0.5 * dt[:, None]

    count = length // 2 + 1
    if chunk_size is None:
        chunk_size = max(16, CHUNK_ELEMENTS // (features * modes))
    chunk_size = min(chunk_size, count)
    blocks = -(-count // chunk_size)
    # w = exp(-i theta). Host double precision; the padding repeats the harmless w = -1.
    half_theta = np.pi * np.minimum(np.arange(blocks * chunk_size) / length, 0.5)
    shape = (blocks, chunk_size)
    s = jnp.asarray(np.sin(half_theta).reshape(shape), half_dt.dtype)
    cos = jnp.asarray(np.where(half_theta < np.pi / 2, np.cos(half_theta), 0).reshape(shape))
    cos = cos.astype(half_dt.dtype)

    @jax.checkpoint
    def spectrum(z, rows, half_dt, s, c):
        sums = _cauchy_block(z, rows, s, c)
        cb, qb, cp, qp = jnp.split(sums, np.cumsum([channels, rank, channels * rank]), axis=1)
        gain = half_dt * c
        matrix = [[gain * qp[:, i * rank + j] + (i == j) for j in range(rank)] for i in range(rank)]
        solved = _solve_small(matrix, [gain * qb[:, i] for i in range(rank)])
        out = cb
        for i in range(rank):
            out = out - cp[:, i::rank] * solved[i][:, None]
        return out * half_dt[:, None] * lax.complex(c, s)

    _, spectra = lax.scan(lambda _, x: (None, spectrum(z, rows, half_dt, *x)), None, (s, cos))
    spectra = spectra.transpose(2, 1, 0, 3).reshape(channels, features, -1)[..., :count]
    return irfft(spectra, length)


def discretise_diagonal(
    dt: Array, lam: Array, b: Array, method: str = "zoh"
) -> tuple[Array, Array, Array]:
    """Discretises a diagonal system.

    Args:
      dt: real [H].
      lam: complex [H, n].
      b: complex [H, n].
      method: 'zoh' (zero-order hold) or 'bilinear'.

    Returns:
      ``(log Ab, Ab, Bb)``, complex [H, n] each.

    Raises:
      ValueError: the method is unknown.
    """
    step = dt[:, None] * lam
    if method == "zoh":
        # (exp(x) - 1) / x -> 1 as x -> 0.
        small = jnp.abs(step) < 1e-4
        safe = jnp.where(small, 1, step)
        ratio = jnp.where(small, 1 + step / 2, jnp.expm1(safe) / safe)
        return step, jnp.exp(step), dt[:, None] * ratio * b
    if method == "bilinear":
        ab = (1 + step / 2) / (1 - step / 2)
        return jnp.log(ab), ab, dt[:, None] * b / (1 - step / 2)
    raise ValueError(f"unknown discretisation {method!r}; choose 'zoh' or 'bilinear'")


def kernel_diag(
    dt: Array, lam: Array, b: Array, c: Array, length: int, *, method: str = "zoh"
) -> Array:
    """Convolution kernel of a diagonal system, ``K_l = 2 Re sum_k C_k Bb_k Ab_k^l``.

    The Vandermonde matrix is factored as ``Ab^(aT + r) = Ab^(aT) Ab^r``: O(n (L/T + T))
    exponentials and a real matrix product per feature replace O(n L) exponentials. Blocks of a are
    recomputed in the backward pass.

    Args:
      dt: real [H].
      lam: complex [H, n].
      b: complex [H, n].
      c: complex [V, H, n].
      length: L.
      method: 'zoh' or 'bilinear'.

    Returns:
      real [V, H, L].
    """
    log_ab, _, bb = discretise_diagonal(dt, lam, b, method)
    weights = 2 * c * bb
    channels, features, modes = weights.shape
    inner = max(1, min(64, round(np.sqrt(length))))
    outer = -(-length // inner)
    rows = min(outer, max(1, CHUNK_ELEMENTS // (channels * features * modes)))
    blocks = -(-outer // rows)
    real = log_ab.real.dtype

    def powers(log_ab, exponents):  # real and imaginary part of Ab^exponents, [H, n, T]
        size = jnp.exp(log_ab.real[..., None] * exponents)
        angle = log_ab.imag[..., None] * exponents
        return size * jnp.cos(angle), size * jnp.sin(angle)

    @jax.checkpoint
    def fine_powers(log_ab):
        return jnp.concatenate(powers(log_ab, jnp.arange(inner, dtype=real)), axis=1)

    @jax.checkpoint
    def evaluate(log_ab, weights, fine, exponents):
        re, im = powers(log_ab, exponents)
        w_re, w_im = weights.real[..., None], weights.imag[..., None]
        coarse = jnp.concatenate([w_re * re - w_im * im, -(w_re * im + w_im * re)], axis=2)
        return jnp.einsum("vhna,hnr->vhar", coarse, fine, precision=HIGHEST)

    fine = fine_powers(log_ab)
    exponents = inner * jnp.arange(blocks * rows, dtype=real).reshape(blocks, rows)
    _, kernel = lax.scan(lambda _, x: (None, evaluate(log_ab, weights, fine, x)), None, exponents)
    kernel = jnp.moveaxis(kernel, 0, 2)  # [V, H, blocks, rows, inner]
    return kernel.reshape(channels, features, -1)[..., :length]


def kernel_dense(ab: Array, bb: Array, c: Array, length: int) -> Array:
    """The slow way that needs no structure: ``K_l = C Ab^l Bb`` by repeated multiplication.

    Args:
      ab: real [H, N, N].
      bb: real [H, N].
      c: real [V, H, N].
      length: L.

    Returns:
      real [V, H, L].
    """

    def step(x, _):
        y = jnp.einsum("vhn,hn->vh", c, x, precision=HIGHEST)
        return jnp.einsum("hnm,hm->hn", ab, x, precision=HIGHEST), y

    return jnp.moveaxis(lax.scan(step, bb, None, length=length)[1], 0, -1)


# Discrete systems --------------------------------------------------------------------------------


def _eliminate(matrix: Array, right: Array) -> Array:
    """Gauss-Jordan elimination with partial pivoting over leading batch axes."""
    size = matrix.shape[-1]
    rows = jnp.arange(size)

    def body(i, work):
        column = lax.dynamic_index_in_dim(work, i, axis=-1, keepdims=False)
        pivot = jnp.argmax(jnp.where(rows >= i, jnp.abs(column), -1), axis=-1)[..., None]
        order = jnp.where(rows == i, pivot, jnp.where(rows == pivot, i, rows))
        work = jnp.take_along_axis(work, order[..., None], axis=-2)
        row = lax.dynamic_index_in_dim(work, i, axis=-2)
        row = row / lax.dynamic_index_in_dim(row, i, axis=-1)
        factor = lax.dynamic_index_in_dim(work, i, axis=-1)
        return jnp.where(rows[:, None] == i, row, work - factor * row)

    work = jnp.concatenate([matrix, right], axis=-1)
    return lax.fori_loop(0, size, body, work)[..., size:]


def solve(matrix: Array, right: Array) -> Array:
    """Solves ``matrix x = right`` for many small systems with array operations alone.

    Used in place of ``jnp.linalg.solve``: its batched LAPACK calls block a host's threads, and
    those of several layers at once can wait for each other for ever (jaxlib 0.10.2, two cores).

    Args:
      matrix: [..., N, N].
      right: [..., N, K].

    Returns:
      [..., N, K].
    """

    def product(x):
        return jnp.matmul(matrix, x, precision=HIGHEST)

    return lax.custom_linear_solve(
        product,
        right,
        solve=lambda _, b: _eliminate(matrix, b),
        transpose_solve=lambda _, b: _eliminate(jnp.swapaxes(matrix, -1, -2), b),
    )


def discretise_dense(dt: Array, a: Array, b: Array) -> tuple[Array, Array]:
    """Bilinear discretisation of ``x' = A x + B u`` for any A.

    Args:
      dt: real [H].
      a: [H, N, N].
      b: [H, N].

    Returns:
      ``Ab`` [H, N, N] and ``Bb`` [H, N].
    """
    eye = jnp.eye(a.shape[-1], dtype=a.dtype)
    step = dt[:, None, None] * a
    right = jnp.concatenate([eye + step / 2, dt[:, None, None] * b[..., None]], axis=-1)
    solved = solve(eye - step / 2, right)
    return solved[..., :-1], solved[..., -1]


class Discrete(NamedTuple):
    """A discrete system whose step costs O(N R): ``x <- a x - sum_r g_r Re(q_r . x) + b u``,
    ``y = Re(c . x)``.

    Attributes:
      a: complex [H, M].
      b: complex [H, M].
      c: complex [V, H, M], true output rows (twice those of stored modes, which stand for pairs).
      g: complex [R, H, M]; R = 0 for diagonal systems.
      q: complex [R, H, M].
    """

    a: Array
    b: Array
    c: Array
    g: Array
    q: Array


def discretise_dplr(dt: Array, lam: Array, p: Array, q: Array, b: Array, c: Array) -> Discrete:
    """Bilinear discretisation of a DPLR system, again diagonal plus rank R (appendix C.2).

    With ``D = 1 / (2/dt - lam)`` and ``G = D p (I + q^* D p)^{-1}``:
    ``Ab = (2/dt + lam) D - (4/dt) G (q^* D)`` and ``Bb = 2 (D b - G (q^* D b))``.

    Args:
      dt: real [H].
      lam: complex [H, n].
      p: complex [R, H, n].
      q: complex [R, H, n].
      b: complex [H, n].
      c: the true (not truncated) output row, complex [V, H, n].
    """
    two_over_dt = (2 / dt)[:, None]
    d = 1 / (two_over_dt - lam)
    dp, qd = d * p, q.conj() * d
    rank = p.shape[0]
    # Every product runs over all modes: twice the real part over the stored ones.
    matrix = [
        [2 * jnp.sum(qd[i] * p[j], -1).real + (i == j) for j in range(rank)] for i in range(rank)
    ]
    # G = D p matrix^{-1}: solve with the transpose.
    transposed = [[matrix[j][i][:, None] for j in range(rank)] for i in range(rank)]
    g = jnp.stack(_solve_small(transposed, [dp[i] for i in range(rank)]))
    qdb = 2 * jnp.sum(qd * b, -1).real
    bb = 2 * (d * b - jnp.sum(g * qdb[..., None], axis=0))
    return Discrete((two_over_dt + lam) * d, bb, 2 * c, 2 * two_over_dt * g, 2 * qd)


def diagonal_system(dt: Array, lam: Array, b: Array, c: Array, method: str = "zoh") -> Discrete:
    """The discrete form of a diagonal system, arguments as in ``kernel_diag``."""
    _, ab, bb = discretise_diagonal(dt, lam, b, method)
    none = jnp.zeros((0, *ab.shape), ab.dtype)
    return Discrete(ab, bb, 2 * c, none, none)


class Dense(NamedTuple):
    """A discrete system in real coordinates: ``x <- a x + b u``, ``y = c x``.

    Attributes:
      a: real [H, N, N].
      b: real [H, N].
      c: real [V, H, N].
    """

    a: Array
    b: Array
    c: Array


class Taps(NamedTuple):
    """A kernel without state space; its state is the last K inputs, newest first.

    Attributes:
      k: real [V, H, K].
    """

    k: Array


System = Discrete | Dense | Taps


def zero_state(system: System, batch: int) -> Array:
    """The state before the first input: [B, H, M] complex, or real for ``Dense`` and ``Taps``."""
    if isinstance(system, Taps):
        return jnp.zeros((batch, *system.k.shape[1:]), system.k.dtype)
    return jnp.zeros((batch, *system.b.shape), system.b.dtype)


def step(system: System, x: Array, u: Array) -> tuple[Array, Array]:
    """One step of the recurrence.

    Args:
      system: the discrete matrices.
      x: state, as ``zero_state`` shapes it.
      u: real [B, H].

    Returns:
      ``y`` [B, V, H] and the next state.
    """
    if isinstance(system, Taps):
        new = jnp.concatenate([u[..., None], x[..., :-1]], axis=-1)
        return jnp.einsum("vhk,bhk->bvh", system.k, new, precision=HIGHEST), new
    if isinstance(system, Dense):
        new = jnp.einsum("hnm,bhm->bhn", system.a, x, precision=HIGHEST)
        new = new + system.b * u[..., None]
        return jnp.einsum("vhn,bhn->bvh", system.c, new, precision=HIGHEST), new
    new = system.a * x + system.b * u[..., None]
    for g, q in zip(system.g, system.q):
        new = new - g * jnp.sum(q * x, axis=-1, keepdims=True).real
    return jnp.sum(system.c * new[:, None], axis=-1).real, new


def recurrence(system: System, u: Array, x: Array) -> tuple[Array, Array]:
    """Runs ``step`` over a whole signal with ``lax.scan``.

    Args:
      system: the discrete matrices.
      u: real [B, L, H].
      x: the state before the first step.

    Returns:
      ``y`` [B, L, V, H] and the last state.
    """

    def body(x, u):
        y, x = step(system, x, u)
        return x, y

    x, y = lax.scan(body, x, jnp.moveaxis(u, 1, 0))
    return jnp.moveaxis(y, 0, 1), x


def to_real(x: Array) -> Array:
    """A complex state [..., M] as real coordinates [..., 2M]: real parts, then imaginary parts."""
    return jnp.concatenate([x.real, x.imag], axis=-1)


def to_complex(x: Array) -> Array:
    """The inverse of ``to_real``."""
    real, imag = jnp.split(x, 2, axis=-1)
    return lax.complex(real, imag)


def dense_form(system: Discrete) -> Dense:
    """The same system with a real [H, 2M, 2M] transition matrix, for powers and blocks."""
    modes = system.a.shape[-1]
    basis = to_complex(jnp.eye(2 * modes, dtype=system.a.real.dtype))  # [2M, M]
    columns = basis[:, None] * system.a  # [2M, H, M]
    for g, q in zip(system.g, system.q):
        columns = columns - g * jnp.sum(basis[:, None] * q, axis=-1, keepdims=True).real
    c = jnp.concatenate([system.c.real, -system.c.imag], axis=-1)
    return Dense(jnp.transpose(to_real(columns), (1, 2, 0)), to_real(system.b), c)


def _row_from_real(c: Array) -> Array:
    """Stored-mode row ``c`` with ``2 Re(c . x) = row . to_real(x)``."""
    real, imag = jnp.split(c, 2, axis=-1)
    return lax.complex(real, -imag) / 2


def truncate_output(system: Discrete, length: int) -> Array:
    """``C (I - Ab^length)`` [V, H, n], what ``kernel_dplr`` takes; ``system.c`` is the true C."""
    dense = dense_form(system)
    power = jnp.linalg.matrix_power(dense.a, length)
    row = dense.c - jnp.einsum("vhn,hnm->vhm", dense.c, power, precision=HIGHEST)
    return _row_from_real(row)


def restore_output(system: Discrete, length: int) -> Array:
    """Undoes ``truncate_output``: the true C [V, H, n] where ``system.c`` is the truncated one."""
    dense = dense_form(system)
    eye = jnp.eye(dense.a.shape[-1], dtype=dense.a.dtype)
    matrix = eye - jnp.linalg.matrix_power(dense.a, length)
    solved = solve(jnp.swapaxes(matrix, -1, -2), jnp.moveaxis(dense.c, 0, -1))
    return _row_from_real(jnp.moveaxis(solved, -1, 0))


def double_length(system: Discrete, length: int) -> Array:
    """The output row truncated for ``2 length``: ``Ct (I + Ab^length)``, complex [V, H, n].

    Args:
      system: its ``c`` is the row truncated for ``length``.
      length: the present length.
    """
    dense = dense_form(system)
    power = jnp.linalg.matrix_power(dense.a, length)
    row = dense.c + jnp.einsum("vhn,hnm->vhm", dense.c, power, precision=HIGHEST)
    return _row_from_real(row)


def diagonalise(system: Discrete, *, length: int = 256, tolerance: float = 1e-3) -> Discrete:
    """Rewrites a system in the eigenbasis of its transition matrix, on the host.

    A step is then elementwise. Systems close to normal (FouT, most random ones) survive this; the
    LegS matrix does not, its eigenvectors are too ill-conditioned, and is refused.

    Args:
      system: any discrete system (concrete arrays).
      length: how many kernel taps must be reproduced in single precision.
      tolerance: largest allowed error relative to the largest tap of each feature.

    Returns:
      A system with M = N modes and R = 0.

    Raises:
      ValueError: the eigenbasis is too ill-conditioned for the tolerance.
    """
    exact = dense_form(jax.tree.map(np.asarray, system))
    a, b, c = (np.asarray(x, np.float64) for x in exact)
    values, vectors = np.linalg.eig(a)
    inverse = np.linalg.inv(vectors)
    # Eigenvectors may be scaled at will: let Bb be all ones, so that C alone carries the size.
    new_b = np.einsum("hnm,hm->hn", inverse, b)
    new_c = np.einsum("vhn,hnm->vhm", c, vectors) * new_b
    dtype = np.asarray(system.a).dtype
    none = jnp.zeros((0, *values.shape), dtype)
    values, new_c = values.astype(dtype), new_c.astype(dtype)
    x, power = b, np.ones_like(values)
    scale, errors = np.zeros(c.shape[:2]), np.zeros(c.shape[:2])
    for _ in range(length):
        tap = np.einsum("vhn,hn->vh", c, x)
        errors = np.maximum(errors, np.abs(tap - (new_c * power).sum(-1).real))
        scale = np.maximum(scale, np.abs(tap))
        x, power = np.einsum("hnm,hm->hn", a, x), power * values
    worst = float((errors / np.maximum(scale, np.finfo(np.float32).tiny)).max())
    if not worst <= tolerance:
        condition = float(np.linalg.cond(vectors).max())
        raise ValueError(
            f"the eigenbasis of the transition matrix has condition {condition:.1e}: the diagonal "
            f"kernel would be off by {worst:.1e} > {tolerance:.1e}; use the 'dplr' mode instead"
        )
    ones = jnp.ones(values.shape, dtype)
    return Discrete(jnp.asarray(values), ones, jnp.asarray(new_c), none, none)


class Blocks(NamedTuple):
    """A discrete system lifted to blocks of T steps.

    Attributes:
      toeplitz: real [V, H, T, T], ``toeplitz[t, j] = K_{t-j}``.
      observe: real [V, H, T, N], ``C Ab^{t+1}``.
      drive: real [H, N, T], ``Ab^{T-1-j} Bb``.
      power: real [H, N, N], ``Ab^T``.
    """

    toeplitz: Array
    observe: Array
    drive: Array
    power: Array


def to_blocks(dense: Dense, block: int) -> Blocks:
    """Lifts a system to blocks of ``block`` steps with O(log block) matrix products."""
    reach, power, size = dense.b[..., None], dense.a, 1  # Bb, Ab Bb, ...
    watch = jnp.einsum("vhn,hnm->vhm", dense.c, dense.a, precision=HIGHEST)[:, :, None]
    while size < block:
        reach = jnp.concatenate([reach, jnp.matmul(power, reach, precision=HIGHEST)], -1)
        watch = jnp.concatenate([watch, jnp.matmul(watch, power, precision=HIGHEST)], -2)
        power = jnp.matmul(power, power, precision=HIGHEST)
        size *= 2
    reach, watch = reach[..., :block], watch[..., :block, :]
    kernel = jnp.einsum("vhn,hnt->vht", dense.c, reach, precision=HIGHEST)
    lag = np.arange(block)[:, None] - np.arange(block)[None]
    toeplitz = jnp.where(lag >= 0, kernel[..., np.maximum(lag, 0)], 0)
    return Blocks(toeplitz, watch, jnp.flip(reach, -1), jnp.linalg.matrix_power(dense.a, block))


def _chunked_dense(dense: Dense, u: Array, x: Array, block: int) -> tuple[Array, Array]:
    batch, length, features = u.shape
    block = min(block, length)
    count, rest = divmod(length, block)
    lifted = to_blocks(dense, block)

    def apply(lifted: Blocks, x: Array, u: Array) -> tuple[Array, Array]:
        y = jnp.einsum("vhtj,bjh->bvht", lifted.toeplitz, u, precision=HIGHEST)
        y += jnp.einsum("vhtn,bhn->bvht", lifted.observe, x, precision=HIGHEST)
        new = jnp.einsum("hnm,bhm->bhn", lifted.power, x, precision=HIGHEST)
        new += jnp.einsum("hnj,bjh->bhn", lifted.drive, u, precision=HIGHEST)
        return new, jnp.moveaxis(y, -1, 1)

    whole = u[:, : count * block].reshape(batch, count, block, features)
    x, y = lax.scan(lambda x, u: apply(lifted, x, u), x, jnp.moveaxis(whole, 1, 0))
    y = jnp.moveaxis(y, 0, 1).reshape(batch, count * block, -1, features)
    if rest:
        x, tail = apply(to_blocks(dense, rest), x, u[:, count * block :])
        y = jnp.concatenate([y, tail], axis=1)
    return y, x


def chunked(system: System, u: Array, x: Array, *, block: int = 64) -> tuple[Array, Array]:
    """Convolves a signal block by block, carrying the state: outputs and state hand-over in one.

    Equal to ``recurrence``, with matrix products over ``block`` steps in place of single steps.

    Args:
      system: the discrete matrices.
      u: real [B, L, H], L >= 1.
      x: the state before the first step, as ``zero_state`` shapes it.
      block: steps per block.

    Returns:
      ``y`` [B, L, V, H] and the state after L steps.
    """
    if isinstance(system, Taps):
        size = x.shape[-1]
        signal = jnp.concatenate([jnp.flip(x, -1), jnp.moveaxis(u, 1, -1)], axis=-1)
        y = fft_convolve(signal[:, None], system.k)[..., size:]
        return jnp.moveaxis(y, -1, 1), jnp.flip(signal[..., -size:], -1)
    if isinstance(system, Dense):
        return _chunked_dense(system, u, x, block)
    y, x = _chunked_dense(dense_form(system), u, to_real(x), block)
    return y, to_complex(x)
