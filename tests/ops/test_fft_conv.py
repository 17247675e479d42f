"""The FFT convolution against the definition, numpy, and itself under every transformation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from transfer_jax.ops import fast_length, fft_convolve, irfft, rfft


def test_fast_length_is_the_smallest_even_5_smooth_number():
    def smooth(n):
        for prime in (2, 3, 5):
            while n % prime == 0:
                n //= prime
        return n == 1

    for minimum in [*range(1, 200), 2049, 4001, 31_999]:
        expected = next(n for n in range(minimum, 3 * minimum + 2) if n % 2 == 0 and smooth(n))
        assert fast_length(minimum) == expected


@pytest.mark.parametrize("n", [7, 10, 11, 16])
def test_transforms_equal_numpy_with_both_derivatives(n):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(3, 10)))
        np.testing.assert_allclose(rfft(x, n), np.fft.rfft(x, n), atol=1e-12)
        y = jnp.asarray(np.fft.rfft(rng.normal(size=(3, n))))
        np.testing.assert_allclose(irfft(y, n), np.fft.irfft(y, n), atol=1e-12)
        np.testing.assert_allclose(jax.vmap(lambda x: rfft(x, n), 1)(x.T), rfft(x, n))
        for ours, theirs, at in (
            (lambda x: rfft(x, n), lambda x: jnp.fft.rfft(x, n), x),
            (lambda y: irfft(y, n), lambda y: jnp.fft.irfft(y, n), y),
        ):
            primal, pull = jax.vjp(ours, at)
            noise = jnp.asarray(rng.normal(size=primal.shape)).astype(primal.dtype)
            if jnp.iscomplexobj(primal):
                noise = noise + 1j * jnp.asarray(rng.normal(size=primal.shape))
            np.testing.assert_allclose(pull(noise)[0], jax.vjp(theirs, at)[1](noise)[0], atol=1e-12)
            np.testing.assert_allclose(jax.jvp(ours, (at,), (at,))[1], primal, atol=1e-12)


def test_irfft_names_the_lengths_that_do_not_fit():
    with pytest.raises(ValueError, match="needs 5 frequencies, got 4"):
        irfft(jnp.zeros((2, 4), jnp.complex64), 8)


@pytest.mark.parametrize("length,taps", [(16, 16), (13, 13), (13, 5), (9, 20)])
def test_convolution_is_the_linear_one(length, taps):
    rng = np.random.default_rng(1)
    u, k, r = rng.normal(size=(3, length)), rng.normal(size=taps), rng.normal(size=taps)
    expected = np.stack([np.convolve(x, k)[:length] for x in u])
    np.testing.assert_allclose(fft_convolve(u, k[None]), expected, atol=1e-5)
    for i in range(length):
        for j in range(i + 1, min(length, i + 1 + taps)):
            expected[:, i] += r[j - i - 1] * u[:, j]
    np.testing.assert_allclose(fft_convolve(u, k[None], r[None]), expected, atol=1e-5)


def test_causal_and_no_wrap_around():
    rng = np.random.default_rng(2)
    u, k = rng.normal(size=(2, 12)), rng.normal(size=12)
    changed = u.copy()
    changed[:, 7:] += 3.0
    y = fft_convolve(u, k[None])
    np.testing.assert_allclose(fft_convolve(changed, k[None])[:, :7], y[:, :7], atol=1e-5)
    padded = np.concatenate([u, np.zeros_like(u)], axis=1)
    np.testing.assert_allclose(fft_convolve(padded, k[None])[:, :12], y, atol=1e-5)


def test_reversal_swaps_the_two_kernels_up_to_the_one_step_offset():
    rng = np.random.default_rng(3)
    u, k, r = (jnp.asarray(rng.normal(size=(2, 10)), jnp.float32) for _ in range(3))
    shift = jnp.pad(k, ((0, 0), (0, 1)))[:, 1:]  # k without its tap at lag 0
    y = fft_convolve(u, k, r) - k[:, :1] * u
    flipped = fft_convolve(u[:, ::-1], jnp.pad(r, ((0, 0), (1, 0)))[:, :-1], shift)
    np.testing.assert_allclose(flipped[:, ::-1], y, atol=1e-5)


def test_features_on_many_devices_do_not_communicate():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))

    def place(shape, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    u, k = place((2, 16, 32), None, "model"), place((16, 32), "model")

    def square(u, k):
        return jnp.sum(fft_convolve(u, k, k) ** 2)

    for function in (fft_convolve, jax.grad(square, (0, 1))):
        compiled = jax.jit(function).lower(u, k).compile()
        collectives = re.findall(r"all-\w+|collective-\w+|reduce-scatter", compiled.as_text())
        assert not collectives
        for sharding in jax.tree.leaves(compiled.output_shardings):
            assert "model" in sharding.spec
