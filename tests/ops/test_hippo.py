"""HiPPO matrices against closed forms, and their normal-plus-low-rank structure."""

import numpy as np
import pytest
import scipy.linalg
import scipy.special

from transfer_jax.ops import hippo


def test_legs_is_the_legendre_memory():
    # (e^{tA} B)_n = sqrt(2n+1) e^{-t} P_n(2 e^{-t} - 1).
    a, b, _ = hippo.legs(8)
    for t in (0.1, 1.0, 3.0):
        n = np.arange(8)
        expected = (
            np.sqrt(2 * n + 1) * np.exp(-t) * scipy.special.eval_legendre(n, 2 * np.exp(-t) - 1)
        )
        np.testing.assert_allclose(scipy.linalg.expm(t * a) @ b, expected, atol=1e-12)
    golden = {
        0.1: [0.90483742, 1.26894214, 0.97797166, 0.26930023],
        1.0: [0.36787944, -0.16837071, -0.3251463, 0.34089099],
    }
    for t, values in golden.items():
        np.testing.assert_allclose((scipy.linalg.expm(t * a) @ b)[:4], values, atol=5e-9)


def test_legt_holds_a_constant():
    a, b, _ = hippo.legt(16)
    x = np.linalg.solve(-a, b)  # the fixed point for u = 1
    np.testing.assert_allclose(x, np.eye(16)[0], atol=1e-10)


@pytest.mark.parametrize("k", [0, 1, 5])
def test_fout_follows_a_periodic_signal_exactly(k):
    # The window has length 2: u = sqrt(2) cos(pi k t) has x = (cos, sin) in its own pair of states.
    a, b, _ = hippo.fout(16)
    t = 0.37
    x, velocity = np.zeros(16), np.zeros(16)
    x[2 * k : 2 * k + 2] = np.cos(np.pi * k * t), np.sin(np.pi * k * t)
    velocity[2 * k : 2 * k + 2] = (
        np.pi * k * np.array([-np.sin(np.pi * k * t), np.cos(np.pi * k * t)])
    )
    u = (np.sqrt(2) if k else 1.0) * np.cos(np.pi * k * t)
    np.testing.assert_allclose(a @ x + b * u, velocity, atol=1e-10)


SYSTEMS = {
    **{name: hippo.measure(name, 16) for name in hippo.MEASURES},
    "legs64": hippo.legs(64),
    "random": hippo.random_nplr(16, 3, np.random.default_rng(0)),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_dplr_form_is_the_same_system(name):
    a, b, _ = SYSTEMS[name]
    lam, p_, b_, v = hippo.to_dplr(SYSTEMS[name])
    full = np.concatenate([v, v.conj()], axis=1)
    diagonal = np.diag(np.concatenate([lam, lam.conj()]))
    low = np.concatenate([p_, p_.conj()], axis=1)
    np.testing.assert_allclose(full.conj().T @ full, np.eye(len(a)), atol=1e-10)
    rebuilt = full @ (diagonal - low.T @ low.conj()) @ full.conj().T
    np.testing.assert_allclose(rebuilt, a, atol=1e-10)
    np.testing.assert_allclose(2 * (v @ b_).real, b, atol=1e-10)
    assert (lam.imag <= 0).all()


def test_legs_spectrum():
    for size, largest in ((4, 4.60329301), (64, 1303.27384)):
        lam = hippo.to_dplr(hippo.legs(size)).lam
        np.testing.assert_allclose(lam.real, -0.5, atol=1e-10)
        np.testing.assert_allclose(np.abs(lam.imag).max(), largest, rtol=1e-8)
    np.testing.assert_allclose(
        sorted(np.abs(hippo.to_dplr(hippo.legs(4)).lam.imag)), [0.55650112, 4.60329301], atol=5e-9
    )


def test_diagonal_initialisations():
    lam, b = hippo.diagonal("lin", 8)
    np.testing.assert_allclose(lam, -0.5 + 1j * np.pi * np.arange(4))
    np.testing.assert_allclose(b, 1)
    lam, _ = hippo.diagonal("inv", 4)
    np.testing.assert_allclose(lam.imag, [4 / np.pi * 3, 4 / np.pi * (4 / 3 - 1)])
    np.testing.assert_allclose(hippo.diagonal("real", 6)[0], [-1, -2, -3])
    np.testing.assert_allclose(hippo.diagonal("legs-diag", 8)[0], hippo.to_dplr(hippo.legs(8)).lam)


def test_errors_name_what_is_allowed():
    with pytest.raises(ValueError, match="legs, legt, fout"):
        hippo.measure("lags", 8)
    with pytest.raises(ValueError, match="lin, inv, real, legs-diag"):
        hippo.diagonal("linear", 8)
    with pytest.raises(ValueError, match="even"):
        hippo.legs(7)
    with pytest.raises(ValueError, match="not normal"):
        hippo.to_dplr(hippo.legs(8)._replace(p=np.zeros((1, 8))))
