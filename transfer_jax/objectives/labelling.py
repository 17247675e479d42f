"""A label at every step of a sequence."""

import jax.numpy as jnp
import optax

from transfer_jax.objectives import losses
from transfer_jax.objectives.base import Array, Aux, Batch, Mean, Variables
from transfer_jax.objectives.tasks import ModuleObjective, example_mask


def step_weights(batch: Batch, length: int) -> Array:
    """Returns float32 [B, T]: 1 where a step counts.

    Args:
      batch: with ``inputs`` [B, ...] and, where there are any, ``weights`` [B, T], ``lengths`` [B]
        and ``mask`` [B]; a step counts where none of them excludes it.
      length: T.
    """
    size = len(batch["inputs"])
    weights = jnp.broadcast_to(example_mask(batch, size)[:, None], (size, length))
    if "weights" in batch:
        weights = weights * batch["weights"]
    if "lengths" in batch:
        weights = weights * (jnp.arange(length) < batch["lengths"][:, None])
    return weights


class SequenceLabelling(ModuleObjective):
    """Softmax cross-entropy at each step: ``labels`` int [B, T], the module gives [B, T, C] logits.

    The mean is over the steps that count, see ``step_weights``. Metrics: ``nll`` and ``accuracy``.
    """

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        logits, state = self.apply(variables, batch, rng)
        labels = batch["labels"]
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"logits of shape {logits.shape} do not fit labels of shape {labels.shape}: "
                "sequence labelling needs one row of class scores at every step."
            )
        weights = step_weights(batch, labels.shape[1])
        nll = Mean.of(losses.cross_entropy(logits, labels), weights)
        correct = Mean.of(jnp.argmax(logits, axis=-1) == labels, weights)
        return nll.value(), Aux(state, {"nll": nll, "accuracy": correct}, nll.weight, logits)


class BitLabelling(ModuleObjective):
    """Binary cross-entropy of D bits at each step: ``labels`` [B, T, D] of 0 and 1.

    The module gives logits of the same shape. The mean is over the bits of the steps that count,
    see ``step_weights``. Metrics: ``nll`` in nats per bit, ``accuracy`` of bits, and ``wrong_bits``
    per sequence.
    """

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        logits, state = self.apply(variables, batch, rng)
        labels = batch["labels"]
        if logits.shape != labels.shape:
            raise ValueError(
                f"logits of shape {logits.shape} do not fit labels of shape {labels.shape}: one "
                "logit is needed for each bit."
            )
        weights = step_weights(batch, labels.shape[1])[..., None]
        nll = Mean.of(optax.sigmoid_binary_cross_entropy(logits, labels), weights)
        wrong = (logits > 0) != (labels > 0.5)
        per_sequence = jnp.where(weights > 0, wrong, 0).sum((1, 2))
        metrics = {
            "nll": nll,
            "accuracy": Mean.of(~wrong, weights),
            "wrong_bits": Mean.of(per_sequence, example_mask(batch, len(labels))),
        }
        return nll.value(), Aux(state, metrics, nll.weight, logits)
