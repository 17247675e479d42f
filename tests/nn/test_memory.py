"""Neural Turing Machine and Hopfield network: closed forms, and copying with parameters by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.nn import memory
from transfer_jax.nn.memory import NTM

RNG = np.random.default_rng(0)
N, W = 6, 3
MEMORY = RNG.normal(size=(2, N, W)).astype(np.float32)
WEIGHTS = RNG.dirichlet(np.ones(N), 2).astype(np.float32)


def test_addressing():
    key, strength = MEMORY[:, 2] * 3, jnp.array([500.0, 0.0])
    content = memory.content_weights(MEMORY, key, strength)
    np.testing.assert_allclose(content[0], np.eye(N)[2], atol=1e-3)  # only the direction counts
    np.testing.assert_allclose(content[1], np.full(N, 1 / N), atol=1e-6)
    gate = jnp.array([1.0, 0.25])
    expected = gate[:, None] * content + (1 - gate[:, None]) * WEIGHTS
    np.testing.assert_allclose(memory.interpolate(content, WEIGHTS, gate), expected, atol=1e-7)
    forward = jnp.tile(jnp.array([0.0, 0.0, 1.0]), (2, 1))
    np.testing.assert_array_equal(memory.shift_weights(WEIGHTS, forward), np.roll(WEIGHTS, 1, -1))
    shift = RNG.dirichlet(np.ones(3), 2).astype(np.float32)
    loop = np.zeros_like(WEIGHTS)
    for b in range(2):
        for i in range(N):
            loop[b, i] = sum(WEIGHTS[b, (i - d) % N] * shift[b, d + 1] for d in (-1, 0, 1))
    np.testing.assert_allclose(memory.shift_weights(WEIGHTS, shift), loop, atol=1e-6)
    power = WEIGHTS**2.5 / (WEIGHTS**2.5).sum(-1, keepdims=True)
    np.testing.assert_allclose(memory.sharpen(WEIGHTS, jnp.full(2, 2.5)), power, atol=1e-6)
    # beta = 0, g = 1, gamma = 1: uniform, whatever the shift.
    even = memory.address(
        MEMORY, WEIGHTS, key, jnp.zeros(2), jnp.ones(2), shift, jnp.ones(2)
    )  # fmt: skip
    np.testing.assert_allclose(even, np.full((2, N), 1 / N), atol=1e-6)


def test_reading_and_writing():
    heads = RNG.dirichlet(np.ones(N), (2, 2)).astype(np.float32)
    erase, add = RNG.random((2, 2, 2, W)).astype(np.float32)
    expected = MEMORY.copy()
    for k in range(2):  # all heads erase, then all add
        expected *= 1 - heads[:, k, :, None] * erase[:, k, None]
    for k in range(2):
        expected += heads[:, k, :, None] * add[:, k, None]
    np.testing.assert_allclose(memory.write(MEMORY, heads, erase, add), expected, atol=1e-6)
    where = np.eye(N, dtype=np.float32)[[3, 5]]
    np.testing.assert_array_equal(memory.read(MEMORY[0], where), MEMORY[0, [3, 5]])


@pytest.mark.parametrize("controller", ["lstm", "mlp"])
def test_weights_stay_distributions_and_gradients_are_differences(controller):
    with jax.enable_x64():
        module = NTM(
            4, outputs=2, slots=N, width=W, read_heads=2, write_heads=2, controller=controller
        )
        x = jnp.asarray(RNG.normal(size=(2, 5, 3)))
        lengths = jnp.array([5, 2])
        shapes = jax.eval_shape(module.init, jax.random.key(0), x)
        variables = jax.tree.map(lambda p: jnp.asarray(RNG.normal(size=p.shape)), shapes)

        @jax.jit
        @functools.partial(jax.value_and_grad, has_aux=True)
        def run(variables, x, lengths):
            y, state = module.apply(variables, x, lengths=lengths, method="run")
            return jnp.sum(y[0] ** 2) + jnp.sum(y[1, :2] ** 2), state

        (_, state), gradient = run(variables, x, lengths)
        np.testing.assert_allclose(state[2].sum(-1), 1, atol=1e-12)
        assert (state[2] >= 0).all()
        # Padding leaves no trace in any part of the state.
        other = run(variables, x.at[1, 2:].set(9.0), lengths)[0][1]
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), state, other)
        direction = jax.tree.map(lambda p: RNG.normal(size=p.shape), variables)

        def value(by):
            moved = jax.tree.map(lambda p, d: p + by * d, variables, direction)
            return run(moved, x, lengths)[0][0]

        slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, direction)))
        np.testing.assert_allclose(slope, (value(1e-5) - value(-1e-5)) / 2e-5, rtol=1e-6)


def copier(width):
    """A machine that copies: its heads move by one slot in the phase in which they act."""
    module = NTM(width + 1, outputs=width, slots=8, width=width, controller="mlp")
    big, read_at = 30.0, width + 6
    zeros = jax.tree.map(
        lambda x: np.zeros(x.shape, np.float32),
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, width + 1))),
    )
    p = zeros["params"]
    last = np.where(np.arange(8) == 7, big, 0)  # both heads start before the first slot
    p["first_weights"] = np.stack([last, last])
    p["input"]["kernel"] = big * np.eye(width + 1)  # hidden: the bits, and the phase as -1 or 1
    p["input"]["bias"][width] = -big / 2
    kernel, bias = p["heads"]["kernel"], p["heads"]["bias"]
    for head in (0, 1):
        at = head * read_at
        bias[at + width + 1] = -big  # keep the weights
        bias[at + width + 2] = big  # sharp
    # The reading head waits while it is told the bits (phase 1), and moves on after that.
    kernel[width, width + 3 : width + 6] = [0, big, -big]
    bias[read_at + width + 3 : read_at + width + 6] = [0, 0, big]  # the writing head moves on
    erase = 2 * read_at
    kernel[width, erase : erase + width] = big
    kernel[:width, erase + width :] = big * np.eye(width)
    p["output"]["kernel"][width + 1 :] = big * np.eye(width)
    p["output"]["bias"][:] = -big / 2
    return module, zeros


def test_parameters_set_by_hand_copy():
    width, length = 4, 6
    module, variables = copier(width)
    bits = RNG.integers(0, 2, (5, length, width)).astype(np.float32)
    inputs = np.zeros((5, 2 * length, width + 1), np.float32)
    inputs[:, :length, :width], inputs[:, :length, width] = bits, 1
    logits = module.apply(variables, inputs)[:, length:]
    np.testing.assert_array_equal(logits > 0, bits > 0)
    assert np.abs(logits).min() > 10


def test_hopfield_recalls_and_its_energy_never_rises():
    n, count = 200, 10  # 0.05 n patterns
    patterns = RNG.choice([-1.0, 1.0], (count, n))
    weights = memory.hopfield_store(patterns)
    assert (jnp.diag(weights) == 0).all()
    flips = np.array([RNG.permutation(n) < n // 10 for _ in range(count)])
    recall = jax.vmap(memory.hopfield_recall, in_axes=(None, 0, 0, None))
    noisy = np.where(flips, -patterns, patterns)
    found, energies = recall(weights, noisy, jax.random.split(jax.random.key(0), count), 1000)
    assert (found == patterns).mean() > 0.99
    energies = np.concatenate([memory.hopfield_energy(weights, noisy)[:, None], energies], axis=1)
    assert (np.diff(energies) <= 0).all()
    np.testing.assert_allclose(energies[:, -1], memory.hopfield_energy(weights, found), rtol=1e-4)
    assert (energies[:, -1] < energies[:, 0] - 1).all()
