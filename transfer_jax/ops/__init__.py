"""Numerical kernels: long convolutions, state space models, recurrences."""

from transfer_jax.ops import hippo, ssm
from transfer_jax.ops.fft_conv import fast_length, fft_convolve, irfft, rfft
from transfer_jax.ops.scan import associative_linear_scan, linear_scan

__all__ = [
    "associative_linear_scan", "fast_length", "fft_convolve", "hippo", "irfft", "linear_scan",
    "rfft", "ssm",
]  # fmt: skip
