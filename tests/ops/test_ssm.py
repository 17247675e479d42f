"""State space kernels: golden numbers, scipy, slow oracles, gradients, limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.signal
from jax.test_util import check_grads

from transfer_jax.ops import associative_linear_scan, fft_convolve, hippo, ssm


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def dplr(name="legs", size=8, features=2, channels=1, seed=0, dtype=np.float64):
    """A DPLR system per feature, with its real dense original: (dt, lam, p, q, b, c), (A, B, C)."""
    rng = np.random.default_rng(seed)
    if name == "random":
        system = hippo.random_nplr(size, 2, rng)
    else:
        system = hippo.measure(name, size)
    if name == "fout":  # has modes without damping, for which w = 1 is a pole
        system = system._replace(a=system.a - 0.01 * np.eye(size))
    form = hippo.to_dplr(system)
    dt = np.exp(rng.uniform(np.log(1e-2), np.log(1e-1), features))
    c = rng.normal(size=(channels, features, size))
    cast = np.result_type(dtype, np.complex64)

    def each(x, axis):
        return jnp.asarray(np.repeat(np.expand_dims(x, axis), features, axis)).astype(cast)

    p = each(form.p, 1)
    arrays = (jnp.asarray(dt, dtype), each(form.lam, 0), p, p, each(form.b, 0))
    return (*arrays, jnp.asarray(c @ form.v).astype(cast)), (system.a, system.b, c)


@functools.partial(jax.jit, static_argnames=("length", "chunk_size"))
def fast_kernel(arrays, length, chunk_size=None):
    *matrices, c = arrays
    truncated = ssm.truncate_output(ssm.discretise_dplr(*matrices, c), length)
    return ssm.kernel_dplr(*matrices, truncated, length, chunk_size=chunk_size)


@functools.partial(jax.jit, static_argnames="length")
def power_kernel(system, length):
    return ssm.kernel_dense(*ssm.dense_form(system), length)


discretise_dplr = jax.jit(ssm.discretise_dplr)
diag_kernel = jax.jit(ssm.kernel_diag, static_argnames=("length", "method"))


def impulse_response(a, b, c, dt, length, method="bilinear"):
    """[V, H, L] by scipy; the input enters with the output step (y_k includes u_k)."""
    taps = np.empty((*c.shape[:2], length))
    zero = np.zeros((len(c), 1))
    for h in range(c.shape[1]):
        ab, bb, *_ = scipy.signal.cont2discrete((a, b[:, None], c[:, h], zero), dt[h], method)
        responses = scipy.signal.dimpulse((ab, bb, c[:, h], zero, dt[h]), n=length + 1)[1][0]
        taps[:, h] = responses[1:].T  # scipy's output lags its state by one step
    return taps


def test_golden_legs(x64):
    form = hippo.to_dplr(hippo.legs(4))
    c = jnp.asarray(np.array([1, -0.5, 0.25, -0.125]) @ form.v)[None, None]
    one = (jnp.array([0.1]), form.lam[None], form.p[:, None], form.p[:, None], form.b[None], c)
    golden = [
        0.04249951, 0.04975305, 0.04949163, 0.04635682,
        0.04265356, 0.03938532, 0.03686741, 0.03508097,
    ]  # fmt: skip
    kernel = fast_kernel(one, 8)[0, 0]
    np.testing.assert_allclose(kernel, golden, atol=5e-9)
    np.testing.assert_allclose(kernel.sum(), 0.3420882684, atol=5e-11)


def test_golden_s4d_lin(x64):
    lam, b = hippo.diagonal("lin", 4)
    c = jnp.array([[[1 + 0.5j, -0.25 + 1j]]])
    golden = [
        0.116959420, 0.0606905546, 0.0212597344, -1.27793515e-5, -0.00362523076, 0.00832425827,
    ]  # fmt: skip
    kernel = ssm.kernel_diag(jnp.array([0.1]), lam[None], b[None], c, 6)[0, 0]
    np.testing.assert_allclose(kernel, golden, rtol=1e-8)


@pytest.mark.parametrize("name", ["legs", "legt", "fout", "random"])
@pytest.mark.parametrize("length", [64, 65, 1024])
def test_fast_kernel_is_power_series_and_scipy_impulse_response(x64, name, length):
    arrays, (a, b, c) = dplr(name, 16, channels=2)
    fast = fast_kernel(arrays, length, chunk_size=48)
    dense = power_kernel(discretise_dplr(*arrays), length)
    expected = impulse_response(a, b, c, np.asarray(arrays[0]), length)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(dense, expected, atol=1e-10 * scale)
    np.testing.assert_allclose(fast, expected, atol=1e-10 * scale)
    assert fast.shape == (2, 2, length)


@pytest.mark.parametrize("length", [64, 1024])
def test_fast_kernel_in_single_precision(length):
    with jax.enable_x64(True):
        exact = np.asarray(fast_kernel(dplr("legs", 64, channels=1)[0], length))
    single = fast_kernel(dplr("legs", 64, channels=1, dtype=np.float32)[0], length)
    assert single.dtype == jnp.float32
    error = np.abs(np.asarray(single) - exact).max(-1) / np.abs(exact).max(-1)
    assert error.max() <= 1e-4


@pytest.mark.parametrize("length", [1, 2, 7])
def test_odd_and_tiny_lengths(x64, length):
    arrays, _ = dplr("legt", 8)
    dense = power_kernel(discretise_dplr(*arrays), length)
    np.testing.assert_allclose(fast_kernel(arrays, length), dense, atol=1e-10)


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_blocks_of_frequencies_do_not_matter(x64, chunk_size):
    arrays, _ = dplr("legs", 8)
    np.testing.assert_allclose(
        fast_kernel(arrays, 50, chunk_size=chunk_size), fast_kernel(arrays, 50), atol=1e-13
    )


def test_untied_low_rank_part(x64):
    arrays, _ = dplr("legt", 8)
    dt, lam, p, q, b, c = arrays
    rng = np.random.default_rng(1)
    q = q + 0.1 * jnp.asarray(rng.normal(size=q.shape) + 1j * rng.normal(size=q.shape))
    arrays = (dt, lam, p, q, b, c)
    dense = power_kernel(discretise_dplr(*arrays), 40)
    np.testing.assert_allclose(fast_kernel(arrays, 40), dense, atol=1e-10)
    # ... and the dense transition is the bilinear transform of Lambda - P Q^*.
    pair = functools.partial(np.concatenate, axis=-1)
    full = np.stack([
        np.diag(pair([lam[h], lam[h].conj()]))
        - pair([p[:, h], p[:, h].conj()]).T @ pair([q[:, h], q[:, h].conj()]).conj()
        for h in range(2)
    ])  # fmt: skip
    ab, bb = ssm.discretise_dense(dt, jnp.asarray(full), jnp.asarray(pair([b, b.conj()])))
    kernel = ssm.kernel_dense(ab, bb, jnp.asarray(pair([c, c.conj()])), 40)
    np.testing.assert_allclose(kernel.imag, 0, atol=1e-12)
    np.testing.assert_allclose(dense, kernel.real, atol=1e-10)


def test_gradients_equal_finite_differences(x64):
    arrays, _ = dplr("legt", 4, features=2, channels=2)
    target = jnp.asarray(np.random.default_rng(2).normal(size=(2, 2, 12)))

    @jax.jit
    def loss(*arrays):
        return jnp.sum(ssm.kernel_dplr(*arrays, 12, chunk_size=3) * target)

    check_grads(loss, arrays, order=1, modes=("rev",), rtol=1e-6, atol=1e-6, eps=1e-5)

    @jax.jit
    def loss_diag(*arrays):
        return jnp.sum(ssm.kernel_diag(*arrays, 12) * target)

    dt, lam, _, _, b, c = arrays
    check_grads(loss_diag, (dt, lam, b, c), order=1, modes=("rev",), rtol=1e-6, atol=1e-6, eps=1e-5)


def test_gradients_agree_with_those_through_the_power_series(x64):
    arrays, _ = dplr("legs", 8)
    *matrices, c = arrays

    def fast(matrices, c):
        return jnp.sum(jnp.sin(ssm.kernel_dplr(*matrices, c, 33)))

    def slow(matrices, c):
        system = ssm.discretise_dplr(*matrices, c)
        true = ssm.restore_output(system, 33)
        system = ssm.dense_form(ssm.discretise_dplr(*matrices, true))
        return jnp.sum(jnp.sin(ssm.kernel_dense(*system, 33)))

    ours, theirs = (jax.jit(jax.grad(f, (0, 1)))(matrices, c) for f in (fast, slow))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("length", [32, 33])
def test_no_pole_at_minus_one(length):
    *matrices, c = dplr("legs", 8, dtype=np.float32)[0]

    @jax.jit
    def kernel_and_gradients(*arrays):
        kernel, pull = jax.vjp(lambda *a: ssm.kernel_dplr(*a, length), *arrays)
        return kernel, *pull(jnp.ones_like(kernel))

    with jax.debug_nans(True):
        kernel, *gradients = kernel_and_gradients(*matrices, c)
    for x in (kernel, *gradients):
        assert np.isfinite(x).all()


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_diagonal_kernel_is_its_power_series_and_scipy(x64, method):
    arrays, _ = dplr("legs", 8, channels=2)
    dt, lam, _, _, b, c = arrays
    for length in (1, 300):
        kernel = diag_kernel(dt, lam, b, c, length, method=method)
        system = ssm.diagonal_system(dt, lam, b, c, method)
        dense = power_kernel(system, length)
        np.testing.assert_allclose(kernel, dense, atol=1e-10)
    # The real 2n x 2n form of x' = diag(lam) x + b u.
    for h in range(2):
        re, im = np.diag(lam[h].real), np.diag(lam[h].imag)
        a = np.block([[re, -im], [im, re]])
        drive = np.concatenate([b[h].real, b[h].imag])
        row = np.concatenate([2 * c[:, h].real, -2 * c[:, h].imag], -1)[:, None]
        expected = impulse_response(a, drive, row, np.asarray(dt[h : h + 1]), 300, method)
        np.testing.assert_allclose(kernel[:, h], expected[:, 0], atol=1e-9)


def test_solve_pivots_and_differentiates_as_linalg_does(x64):
    rng = np.random.default_rng(8)
    matrix = jnp.asarray(rng.normal(size=(3, 6, 6)))
    matrix = matrix.at[:, 0, 0].set(0)  # no pivot without a swap
    right = jnp.asarray(rng.normal(size=(3, 6, 2)))
    np.testing.assert_allclose(jax.jit(ssm.solve)(matrix, right), jnp.linalg.solve(matrix, right))
    ours, theirs = (
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1)))(matrix, right)
        for f in (ssm.solve, jnp.linalg.solve)
    )
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10)


def test_truncation_is_undone_and_length_doubled(x64):
    arrays, _ = dplr("legs", 8, channels=2)
    *matrices, c = arrays
    system = ssm.discretise_dplr(*matrices, c)
    truncated = ssm.discretise_dplr(*matrices, ssm.truncate_output(system, 30))
    np.testing.assert_allclose(ssm.restore_output(truncated, 30), c, atol=1e-9)
    doubled = ssm.double_length(truncated, 30)
    np.testing.assert_allclose(doubled, ssm.truncate_output(system, 60), atol=1e-10)


def test_step_of_twice_the_size_sums_two_taps_to_second_order(x64):
    (_, *matrices, c), _ = dplr("legs", 4, features=1)
    errors = []
    for dt in (0.01, 0.005, 0.0025):
        length = round(1 / dt)
        fine = fast_kernel((jnp.array([dt]), *matrices, c), length)[0, 0]
        coarse = fast_kernel((jnp.array([2 * dt]), *matrices, c), length // 2)[0, 0]
        errors.append(np.abs(coarse - fine[::2] - fine[1::2]).max() / dt)
    ratios = np.divide(errors[:-1], errors[1:])  # -> 4
    np.testing.assert_allclose(ratios, 4, rtol=0.1)


def test_convolution_recurrence_and_blocks_agree_at_length_4096():
    # N = 64 LegS in single precision, three evaluations of one layer.
    arrays, _ = dplr("legs", 64, features=2, channels=1, dtype=np.float32)
    rng = np.random.default_rng(3)
    u = jnp.asarray(rng.normal(size=(1, 4096, 2)), jnp.float32)
    *matrices, c = arrays
    system = ssm.discretise_dplr(*matrices, c)
    kernel = fast_kernel(arrays, 4096)
    convolved = jnp.moveaxis(fft_convolve(jnp.moveaxis(u, 1, -1)[:, None], kernel), -1, 1)
    zero = ssm.zero_state(system, 1)
    stepped, last = jax.jit(ssm.recurrence)(system, u, zero)
    blocked, handed_over = jax.jit(ssm.chunked)(system, u, zero)
    scale = np.abs(stepped).max()
    np.testing.assert_allclose(convolved, stepped, atol=1e-4 * scale)
    np.testing.assert_allclose(blocked, stepped, atol=1e-4 * scale)
    np.testing.assert_allclose(handed_over, last, atol=1e-4 * np.abs(last).max())


def test_parallel_scan_equals_the_diagonal_recurrence():
    dt, lam, _, _, b, c = dplr("legs", 8, dtype=np.float32)[0]
    system = ssm.diagonal_system(dt, lam, b, c)
    u = jnp.asarray(np.random.default_rng(4).normal(size=(2, 100, 2)), jnp.float32)
    start = ssm.zero_state(system, 2) + (0.3 - 0.2j)
    y, last = ssm.recurrence(system, u, start)
    states = associative_linear_scan(system.a, system.b * u[..., None], start, axis=1)
    np.testing.assert_allclose(states[:, -1], last, atol=1e-5)
    parallel = jnp.einsum("vhn,blhn->blvh", system.c, states).real
    np.testing.assert_allclose(parallel, y, atol=1e-5)
    kernel = ssm.kernel_diag(dt, lam, b, c, 100)
    from_zero, _ = ssm.recurrence(system, u, ssm.zero_state(system, 2))
    convolved = fft_convolve(jnp.moveaxis(u, 1, -1)[:, None], kernel)
    np.testing.assert_allclose(jnp.moveaxis(convolved, -1, 1), from_zero, atol=1e-5)


@pytest.mark.parametrize("kind", ["dplr", "dense", "taps"])
def test_chunks_with_carried_state_are_the_whole(kind):
    system = ssm.discretise_dplr(*dplr("legt", 8, channels=2, dtype=np.float32)[0])
    if kind == "dense":
        system = ssm.dense_form(system)
    if kind == "taps":
        system = ssm.Taps(power_kernel(system, 9))
    u = jnp.asarray(np.random.default_rng(5).normal(size=(3, 50, 2)), jnp.float32)
    zero = ssm.zero_state(system, 3)
    whole, last = jax.jit(ssm.recurrence)(system, u, zero)
    chunked = jax.jit(ssm.chunked, static_argnames="block")
    y, x = chunked(system, u[:, :17], zero, block=8)
    z, x = chunked(system, u[:, 17:20], x, block=8)
    w, x = chunked(system, u[:, 20:], x, block=5)
    np.testing.assert_allclose(jnp.concatenate([y, z, w], 1), whole, atol=2e-5)
    np.testing.assert_allclose(x, last, atol=2e-5)


def test_diagonal_mode_where_the_eigenbasis_is_sound_and_refused_where_not():
    system = ssm.discretise_dplr(*dplr("fout", 16, dtype=np.float32)[0])
    diagonal = ssm.diagonalise(system)
    assert diagonal.g.shape[0] == 0 and diagonal.a.shape[-1] == 16
    taps = power_kernel(diagonal, 200)
    expected = power_kernel(system, 200)
    np.testing.assert_allclose(taps, expected, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(ValueError, match=r"condition .* use the 'dplr' mode"):
        ssm.diagonalise(ssm.discretise_dplr(*dplr("legs", 32, dtype=np.float32)[0]))


def test_stable_whatever_the_parameters_if_tied(x64):
    rng = np.random.default_rng(6)

    def largest(re, im, p, q, dt):
        lam = jnp.asarray(-np.exp(re) + 1j * im)
        system = discretise_dplr(jnp.asarray(dt), lam, p, q, lam, lam[None])
        return np.abs(np.linalg.eigvals(np.asarray(ssm.dense_form(system).a))).max()

    re, im = np.full((8, 4), np.log(0.5)), rng.normal(size=(8, 4))
    p = rng.normal(size=(1, 8, 4)) + 0j
    log_dt = np.log(rng.uniform(1e-3, 0.1, 8))
    for _ in range(200):  # large random steps
        re, im = re + 0.3 * rng.normal(size=re.shape), im + rng.normal(size=im.shape)
        p = p + 0.5 * (rng.normal(size=p.shape) + 1j * rng.normal(size=p.shape))
        log_dt = log_dt + 0.1 * rng.normal(size=8)
    q = jnp.asarray(p)
    assert largest(re, im, q, q, np.exp(log_dt)) < 1
    # Untied, the low-rank part can push eigenvalues across the imaginary axis.
    assert largest(re, im, q, -q, np.exp(log_dt)) > 1


@pytest.mark.parametrize("kind", ["dplr", "diag"])
def test_memory_at_full_size(kind):
    # H=256, N=64, L=16384: compiled only. One (H, L/2, n) complex array would be 537 MB.
    features, modes, length = 256, 32, 16384
    real = jax.ShapeDtypeStruct((features,), jnp.float32)
    modal = jax.ShapeDtypeStruct((features, modes), jnp.complex64)
    row = jax.ShapeDtypeStruct((1, features, modes), jnp.complex64)
    kernel, shapes = {
        "dplr": (ssm.kernel_dplr, (real, modal, row, row, modal, row)),
        "diag": (ssm.kernel_diag, (real, modal, modal, row)),
    }[kind]

    def forward_and_backward(arrays, cotangent):
        out, pull = jax.vjp(lambda *a: kernel(*a, length), *arrays)
        return out, pull(cotangent)

    output = jax.ShapeDtypeStruct((1, features, length), jnp.float32)
    compiled = jax.jit(forward_and_backward).lower(shapes, output).compile()
    chunk = 8 * ssm.CHUNK_ELEMENTS
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * (4 * features * length) + chunk
