"""Two ways to run a diagonal recurrence agree with the definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.ops import associative_linear_scan, linear_scan


def by_hand(a, b, initial, reset, valid):
    x, out = initial.copy(), []
    for l in range(b.shape[1]):
        previous = np.where(reset[:, l], 0, x)
        x = np.where(valid[:, l], a * previous + b[:, l], x)
        out.append(x)
    return np.stack(out, 1)


@pytest.mark.parametrize("scan", [linear_scan, associative_linear_scan])
def test_recurrence_with_initial_state_resets_and_mask(scan):
    rng = np.random.default_rng(0)
    a = 0.9 * np.exp(1j * rng.normal(size=(2, 3)))
    b = rng.normal(size=(2, 11, 3))
    initial = rng.normal(size=(2, 3)) + 0j
    reset, valid = rng.random((2, 11, 1)) < 0.2, np.arange(11)[None, :, None] < [[[11]], [[6]]]
    reset = reset & valid  # a padded step does nothing at all
    out = scan(
        jnp.asarray(a)[:, None],
        jnp.asarray(b),
        jnp.asarray(initial),
        reset=reset,
        valid=valid,
        axis=1,
    )
    np.testing.assert_allclose(out, by_hand(a, b, initial, reset, valid), rtol=1e-5, atol=1e-5)
    plain = scan(jnp.asarray(a)[:, None], jnp.asarray(b), axis=1)
    no, yes = np.zeros((2, 11, 1), bool), np.ones((2, 11, 1), bool)
    np.testing.assert_allclose(plain, by_hand(a, b, 0 * a, no, yes), rtol=1e-5, atol=1e-5)
