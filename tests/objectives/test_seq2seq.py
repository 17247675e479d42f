"""Sequence to sequence: the loss by hand, padding, smoothing, Fisher information."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax import trees
from transfer_jax.objectives import Seq2Seq, Variables

VOCAB, KEY = 7, jax.random.key(0)


class Reader(nn.Module):
    """The mean of the valid inputs, and of the decoder's inputs so far, to logits."""

    @nn.compact
    def __call__(self, inputs, decoder_inputs, *, lengths=None, train=False):
        embed = nn.Embed(VOCAB, 5)
        valid = jnp.arange(inputs.shape[1]) < (
            jnp.full(len(inputs), inputs.shape[1]) if lengths is None else lengths
        )[:, None]  # fmt: skip
        valid = valid[..., None].astype(jnp.float32)
        source = (embed(inputs) * valid).sum(1, keepdims=True) / valid.sum(1, keepdims=True)
        so_far = jnp.arange(1, decoder_inputs.shape[1] + 1)[:, None]
        target = jnp.cumsum(embed(decoder_inputs), axis=1) / so_far
        return nn.Dense(VOCAB)(jnp.tanh(source + target))


RNG = np.random.default_rng(0)
LENGTHS, TARGET_LENGTHS = np.array([4, 2, 3, 4]), np.array([3, 1, 2, 3])


def padded(width, target_width, fill=0):
    inputs = np.full((4, width), fill)
    targets = np.full((4, target_width), fill)
    rng = np.random.default_rng(1)
    for i, (s, t) in enumerate(zip(LENGTHS, TARGET_LENGTHS)):
        inputs[i, :s], targets[i, :t] = rng.integers(2, VOCAB, s), rng.integers(1, VOCAB, t)
    return {"inputs": inputs, "targets": targets, "lengths": LENGTHS,
            "target_lengths": TARGET_LENGTHS}  # fmt: skip


BATCH = padded(4, 3)
TASK = Seq2Seq(module=Reader())
VARIABLES = TASK.init(KEY, BATCH)


def by_hand(task=TASK):
    """-log p of every target token that counts, one at a time; and its distribution."""
    nll, everywhere = [], []
    for i, count in enumerate(TARGET_LENGTHS):
        source = BATCH["inputs"][i : i + 1, : LENGTHS[i]]
        for t in range(count):
            before = np.array([[0, *BATCH["targets"][i, :t]]])
            logits = Reader().apply({"params": VARIABLES.params}, source, before)[0, -1]
            log_p = jax.nn.log_softmax(logits)
            nll.append(-float(log_p[BATCH["targets"][i, t]]))
            everywhere.append(-float(log_p.mean()))
    return np.array(nll), np.array(everywhere)


def test_the_loss_is_the_mean_over_all_tokens():
    nll, everywhere = by_hand()
    loss, aux = TASK.loss(VARIABLES, BATCH, None)
    assert float(loss) == pytest.approx(nll.mean(), rel=1e-5)
    assert float(aux.weight) == len(nll) == 9
    assert float(aux.metrics["nll"].value()) == pytest.approx(nll.mean(), rel=1e-5)
    assert aux.outputs.shape == (4, 3, VOCAB)
    for epsilon in (0.0, 0.1, 1.0):
        smoothed = TASK.replace(label_smoothing=epsilon)
        loss, aux = smoothed.loss(VARIABLES, BATCH, KEY)
        expected = (1 - epsilon) * nll.mean() + epsilon * everywhere.mean()
        assert float(loss) == pytest.approx(expected, rel=1e-5)
        # Evaluation, and the metric, are without it.
        assert float(aux.metrics["nll"].value()) == pytest.approx(nll.mean(), rel=1e-5)
        assert float(smoothed.loss(VARIABLES, BATCH, None)[0]) == pytest.approx(nll.mean())


def test_padding_changes_neither_the_loss_nor_the_fisher_information():
    longer = padded(9, 8, fill=5)

    def fisher(batch, unit="token_mean"):
        return trees.fisher_diagonal(
            lambda p, b: TASK.example_nll(Variables(p, {}), b, unit=unit), VARIABLES.params, batch,
            kind="empirical",
        )  # fmt: skip

    for a, b in zip(jax.tree.leaves(fisher(BATCH)), jax.tree.leaves(fisher(longer)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    loss = TASK.loss(VARIABLES, BATCH, KEY)[0]
    np.testing.assert_allclose(TASK.loss(VARIABLES, longer, KEY)[0], loss, rtol=1e-6)
    rows = jax.tree.map(lambda x: np.concatenate([x, x[:2]]), BATCH)
    rows["mask"] = np.array([1, 1, 1, 1, 0, 0])
    np.testing.assert_allclose(TASK.loss(VARIABLES, rows, KEY)[0], loss, rtol=1e-6)
    # Where padding is counted it does change the loss.
    counting = TASK.replace(count_padding=True)
    assert float(counting.loss(VARIABLES, longer, KEY)[1].weight) == 32
    assert abs(float(counting.loss(VARIABLES, longer, KEY)[0] - loss)) > 1e-3


def test_the_unit_of_the_likelihood():
    nll, _ = by_hand()
    per_example = [part.sum() for part in np.split(nll, np.cumsum(TARGET_LENGTHS)[:-1])]
    np.testing.assert_allclose(TASK.example_nll(VARIABLES, BATCH), per_example, rtol=1e-5)
    np.testing.assert_allclose(
        TASK.example_nll(VARIABLES, BATCH, unit="token_mean"),
        np.array(per_example) / TARGET_LENGTHS, rtol=1e-5,
    )  # fmt: skip
    with pytest.raises(ValueError, match="'sequence' or 'token_mean'"):
        TASK.example_nll(VARIABLES, BATCH, unit="token")


def test_drawn_labels_have_the_fisher_information_of_the_tokens_that_count():
    one = jax.tree.map(lambda x: x[:1], padded(4, 5, fill=3))  # three of five positions count
    params = VARIABLES.params
    logits = TASK.predict(VARIABLES, one)[0, :3]
    exact = jnp.zeros(VOCAB)
    for row in jax.nn.softmax(logits):
        exact = exact + row * (1 - row)  # of the output bias; scores of tokens are independent
    for unit, scale in (("sequence", 1.0), ("token_mean", 1 / 9)):
        sampled = trees.fisher_diagonal(
            lambda p, b: TASK.choices(Variables(p, {}), b, unit=unit), params, one,  # noqa: B023
            kind="mc", num_samples=4000, key=KEY,
        )  # fmt: skip
        bias = sampled["Dense_0"]["bias"]
        np.testing.assert_allclose(bias, scale * exact, rtol=0.15)
    np.testing.assert_array_equal(TASK.choices(VARIABLES, one), TASK.predict(VARIABLES, one))


def test_a_batch_without_targets_is_named():
    with pytest.raises(ValueError, match=r"batch\['targets'\]; the batch has \['inputs'\]"):
        TASK.init(KEY, {"inputs": BATCH["inputs"]})
