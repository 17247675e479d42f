"""Structured state matrices in float64 on the host: HiPPO measures, NPLR and DPLR forms.

A state matrix is *normal plus low rank* (NPLR) if ``A = S - sum_r P_r P_r^T`` with ``S`` normal.
All matrices here have ``S = alpha I + (real skew-symmetric)``, which ``eigh`` diagonalises
accurately; ``A`` itself must never be diagonalised (LegS at N=16: eigenvectors of condition 8e10).
Gu, Goel and Re (2021), section 3 and appendix C.
"""

from typing import NamedTuple

import numpy as np

MEASURES = ("legs", "legt", "fout")


class NPLR(NamedTuple):
    """``x' = A x + B u`` with ``A + P^T P`` normal.

    Attributes:
      a: float64 [N, N].
      b: float64 [N].
      p: float64 [R, N], the low-rank correction.
    """

    a: np.ndarray
    b: np.ndarray
    p: np.ndarray


class DPLR(NamedTuple):
    """The same system in the eigenbasis, one mode of each conjugate pair kept.

    ``V (diag(lam) - p p^*) V^* = A`` when the modes are completed by their conjugates.

    Attributes:
      lam: complex128 [N/2], imaginary parts <= 0.
      p: complex128 [R, N/2].
      b: complex128 [N/2].
      v: complex128 [N, N/2], the kept eigenvectors.
    """

    lam: np.ndarray
    p: np.ndarray
    b: np.ndarray
    v: np.ndarray


def _check_size(size: int) -> None:
    if size < 2 or size % 2:
        raise ValueError(f"the state size must be even and at least 2, got {size}")


def legs(size: int) -> NPLR:
    """Scaled Legendre measure (HiPPO-LegS), rank 1."""
    _check_size(size)
    n = np.arange(size)
    root = np.sqrt(2.0 * n + 1)
    a = -np.tril(np.outer(root, root), -1) - np.diag(n + 1.0)
    return NPLR(a, root, np.sqrt(n + 0.5)[None])


def legt(size: int) -> NPLR:
    """Translated Legendre measure (HiPPO-LegT, the Legendre memory unit), rank 2."""
    _check_size(size)
    n = np.arange(size)
    root = np.sqrt(2.0 * n + 1)
    sign = np.where(n[:, None] >= n[None], 1.0, (-1.0) ** (n[:, None] - n[None]))
    even = np.where(n % 2 == 0, root, 0)
    odd = root - even
    return NPLR(-0.5 * np.outer(root, root) * sign, 0.5 * root, np.stack([even, odd]) / np.sqrt(2))


def fout(size: int) -> NPLR:
    """Truncated Fourier measure (HiPPO-FouT), rank 1."""
    _check_size(size)
    frequencies = np.zeros(size - 1)
    frequencies[2::2] = np.arange(1, size // 2)
    b = np.zeros(size)
    b[::2] = np.sqrt(2)
    b[0] = 1.0
    skew = np.pi * (np.diag(frequencies, -1) - np.diag(frequencies, 1))
    return NPLR(skew - np.outer(b, b), b, b[None])


def random_nplr(size: int, rank: int, rng: np.random.Generator) -> NPLR:
    """``K - I/2 - P^T P`` with Gaussian skew ``K``, P and B: structure without HiPPO values."""
    _check_size(size)
    gaussian = rng.normal(size=(size, size))
    p = rng.normal(size=(rank, size))
    a = (gaussian - gaussian.T) / np.sqrt(2) - 0.5 * np.eye(size) - p.T @ p
    return NPLR(a, rng.normal(size=size), p)


def random_dense(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian ``A = G / sqrt(N) - I`` (spectrum in the unit disc around -1) and Gaussian B."""
    return rng.normal(size=(size, size)) / np.sqrt(size) - np.eye(size), rng.normal(size=size)


def measure(name: str, size: int) -> NPLR:
    """The NPLR form of the measure ``name``, one of ``MEASURES``."""
    if name not in MEASURES:
        raise ValueError(f"unknown measure {name!r}; choose one of {', '.join(MEASURES)}")
    return {"legs": legs, "legt": legt, "fout": fout}[name](size)


def to_dplr(system: NPLR) -> DPLR:
    """Diagonalises the normal part and keeps one mode of each conjugate pair.

    Raises:
      ValueError: ``A + P^T P`` is not a multiple of the identity plus a skew-symmetric matrix.
    """
    a, b, p = system
    size = len(a)
    normal = a + p.T @ p
    real = np.trace(normal) / size
    skew = normal - real * np.eye(size)
    if np.abs(skew + skew.T).max() > 1e-8 * max(1.0, np.abs(skew).max()):
        raise ValueError("A + P^T P is not normal of the form alpha I + skew-symmetric")
    frequency, v = np.linalg.eigh(-1j * skew)
    keep = size // 2
    tiny = 1e-9 * max(1.0, np.abs(frequency).max())
    null = np.abs(frequency) <= tiny
    v = v[:, :keep].copy()
    if null.any():
        # Eigenvectors of a zero eigenvalue are no conjugates of each other; pair a real basis up.
        basis = np.linalg.svd(skew)[2][size - null.sum() :]
        pairs = (basis[0::2] + 1j * basis[1::2]) / np.sqrt(2)
        v[:, keep - len(pairs) :] = pairs.T
    lam = real + 1j * np.where(null, 0.0, frequency)[:keep]
    return DPLR(lam, p @ v.conj(), v.conj().T @ b, v)


def diagonal(name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Initial ``Lambda`` and ``B`` of a diagonal state space (S4D).

    Args:
      name: 'lin' (-1/2 + i pi k), 'inv' (-1/2 + i N/pi (N/(2k+1) - 1)), 'real' (-(k+1)), or
        'legs-diag' (the normal part of LegS).
      size: N, even; N/2 modes are returned.

    Returns:
      complex128 [N/2] twice.
    """
    _check_size(size)
    k = np.arange(size // 2)
    ones = np.ones(size // 2, np.complex128)
    if name == "lin":
        return -0.5 + 1j * np.pi * k, ones
    if name == "inv":
        return -0.5 + 1j * size / np.pi * (size / (2 * k + 1) - 1), ones
    if name == "real":
        return -(k + 1) + 0j, ones
    if name == "legs-diag":
        system = to_dplr(legs(size))
        return system.lam, system.b
    raise ValueError(
        f"unknown diagonal initialisation {name!r}; choose one of lin, inv, real, legs-diag"
    )
