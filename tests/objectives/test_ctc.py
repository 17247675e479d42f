"""CTC: the loss is the sum over all paths; decoding; labels at every step."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transfer_jax.metrics.text import edit_distance, label_error_rate
from transfer_jax.objectives import Variables
from transfer_jax.objectives.ctc import CTC, best_path, collapse, feasible, prefix_beam
from transfer_jax.objectives.labelling import BitLabelling, SequenceLabelling

T, K = 4, 3


class Given(nn.Module):
    """The inputs, plus a parameter."""

    @nn.compact
    def __call__(self, inputs, *, lengths=None):
        return inputs + self.param("shift", nn.initializers.zeros, inputs.shape[-1:])


VARIABLES = Variables({"shift": jnp.zeros(K)}, {})
LOGITS = 2 * jax.random.normal(jax.random.key(0), (6, T, K))


def labellings(log_p):
    """The probability of every labelling, by all K^T paths."""
    found: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(log_p.shape[1]), repeat=len(log_p)):
        p = np.exp(sum(step[symbol] for step, symbol in zip(log_p, path)))
        found[tuple(collapse(path))] = found.get(tuple(collapse(path)), 0.0) + p
    return found


@pytest.fixture(scope="module")
def every():
    return [labellings(row) for row in np.asarray(jax.nn.log_softmax(LOGITS), np.float64)]


BATCH = {
    "inputs": LOGITS,
    # Fits in T; a repetition; one label; none; too long by the blank between equals; padding.
    "targets": jnp.array([[1, 2, 1], [1, 1, 0], [2, 0, 0], [0, 0, 0], [2, 2, 2], [1, 2, 0]]),
    "target_lengths": jnp.array([3, 2, 1, 0, 3, 2]),
    "lengths": jnp.array([4, 3, 4, 2, 4, 4]),
    "mask": jnp.array([1.0, 1, 1, 1, 1, 0]),
}


def test_the_loss_is_the_sum_over_all_paths(every):
    loss, aux = CTC(module=Given()).loss(VARIABLES, BATCH, None)
    expected = []
    for row in range(4):
        steps = np.asarray(jax.nn.log_softmax(LOGITS[row]), np.float64)[: BATCH["lengths"][row]]
        target = BATCH["targets"][row, : BATCH["target_lengths"][row]]
        expected.append(-np.log(labellings(steps)[tuple(target.tolist())]))
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-6)
    assert float(aux.weight) == 4  # neither the padding row nor the one that cannot be
    assert float(aux.metrics["infeasible"].value()) == pytest.approx(1 / 5)
    assert (2, 2, 2) not in every[4] and (2, 2) in every[4]
    # optax gives the same, row by row.
    peer = optax.ctc_loss(LOGITS[:1], jnp.zeros((1, T)), BATCH["targets"][:1], jnp.zeros((1, 3)))
    np.testing.assert_allclose(peer[0], expected[0], rtol=1e-6)


def test_what_cannot_be_has_no_gradient():
    def loss(logits, row):
        one = {k: v[row : row + 1] for k, v in BATCH.items()} | {"inputs": logits[None]}
        return CTC(module=Given()).loss(VARIABLES, one, None)[0]

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    assert (gradient(LOGITS[4], 4) == 0).all()
    assert np.isfinite(gradient(LOGITS[1], 1)).all() and (gradient(LOGITS[1], 1)[:3] != 0).all()
    assert (gradient(LOGITS[1], 1)[3:] == 0).all()  # beyond its length
    lengths = jnp.arange(1, 7)
    fits = feasible(jnp.tile(jnp.array([1, 1, 2, 2]), (6, 1)), jnp.full(6, 4), lengths)
    assert fits.tolist() == [False] * 5 + [True]


def test_decoding(every):
    best = [max(row, key=row.get) for row in every]
    assert prefix_beam(LOGITS, beams=K**T) == [list(labels) for labels in best]
    paths = np.argmax(LOGITS, axis=-1)
    assert best_path(LOGITS) == [collapse(path) for path in paths]
    assert collapse([0, 1, 1, 0, 1, 2, 2, 0]) == [1, 1, 2]
    assert best_path(LOGITS, jnp.full(6, 1)) == [[p] if p else [] for p in paths[:, 0].tolist()]
    # Two blanks of 0.6 against 0.4: the likeliest path is empty, the likeliest labelling is not.
    logits = jnp.log(jnp.array([[[0.6, 0.4], [0.6, 0.4]]]))
    assert best_path(logits) == [[]] and prefix_beam(logits) == [[1]]
    assert prefix_beam(logits, beams=1, lengths=jnp.array([1])) == [[]]


def test_label_error_rate():
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "ab") == 2
    assert label_error_rate([[1, 2, 3], [4]], [[1, 3], [5, 6]]) == (1 + 2) / 4
    with pytest.raises(ValueError, match="no labels"):
        label_error_rate([[1]], [[]])


def test_steps_that_do_not_count_do_not_count():
    labels = jnp.array([[0, 1, 2, 0], [2, 2, 0, 0]])
    batch = {"inputs": LOGITS[:2], "labels": labels, "lengths": jnp.array([4, 2])}
    loss, aux = SequenceLabelling(module=Given()).loss(VARIABLES, batch, None)
    log_p = jax.nn.log_softmax(LOGITS[:2])
    chosen = [
        -log_p[b, t, labels[b, t]] for b, t in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1))
    ]
    assert float(loss) == pytest.approx(float(np.mean(chosen)), rel=1e-6)
    weights = jnp.array([[0.0, 1, 1, 0], [1, 0, 1, 0]])
    weighted = SequenceLabelling(module=Given()).loss(
        VARIABLES, {**batch, "weights": weights}, None
    )
    assert float(weighted[0]) == pytest.approx(
        float(np.mean([chosen[i] for i in (1, 2, 4)])), rel=1e-6
    )
    assert float(weighted[1].weight) == 3
    bits = {**batch, "labels": (LOGITS[:2] > 0.5).astype(float), "weights": weights}
    loss, aux = BitLabelling(module=Given()).loss(VARIABLES, bits, None)
    x, y = (np.array([a[0, 1], a[0, 2], a[1, 0]]) for a in (LOGITS, bits["labels"]))
    p = 1 / (1 + np.exp(-x))
    np.testing.assert_allclose(loss, -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(), rtol=1e-5)
    wrong = ((x > 0) != (y > 0.5)).sum()
    assert float(aux.metrics["wrong_bits"].value()) == wrong / 2 > 0
    assert float(aux.metrics["accuracy"].value()) == pytest.approx(1 - wrong / 9)
