"""Sequence to sequence: the likelihood of a target sequence given an input sequence."""

import flax.struct
import jax
import jax.numpy as jnp

from transfer_jax.objectives import losses
from transfer_jax.objectives.base import Array, Aux, Batch, Mean, PyTree, Variables
from transfer_jax.objectives.tasks import ModuleObjective, example_mask


def shift_right(targets: Array, start_id: int) -> Array:
    """The decoder's inputs [B, T] under teacher forcing: ``start_id``, then all targets but one."""
    start = jnp.full_like(targets[:, :1], start_id)
    return jnp.concatenate([start, targets[:, :-1]], axis=1)


def _check_unit(unit: str) -> None:
    if unit not in ("sequence", "token_mean"):
        raise ValueError(f"unit={unit!r}; choose 'sequence' or 'token_mean'.")


class Seq2Seq(ModuleObjective):
    """The mean negative log-likelihood of target tokens, each given those before it.

    ``batch["inputs"]`` int [B, S] and ``batch["targets"]`` int [B, T] are padded; ``lengths`` and
    ``target_lengths`` ([B], counting the end token) say how far, and default to all. The module is
    called as ``module(inputs, decoder_inputs, lengths=..., train=...)`` and gives logits [B, T, V].

    Metrics: ``nll`` in nats per token (without smoothing) and ``accuracy``.

    Attributes:
      label_smoothing: epsilon of ``(1 - epsilon) nll + epsilon mean_v(-log p_v)``; training only.
      start_id: the decoder's first input.
      count_padding: padding counts as tokens to be predicted, as in some published code.
    """

    label_smoothing: Array | float = 0.0
    start_id: int = flax.struct.field(pytree_node=False, default=0)
    count_padding: bool = flax.struct.field(pytree_node=False, default=False)

    def init(self, rng: Array, batch: Batch) -> Variables:
        return self._initialise(rng, batch, self._decoder_inputs(batch))

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        logits, state = self.apply(variables, batch, rng, self._decoder_inputs(batch))
        targets, weights = batch["targets"], self.weights(batch)
        nll = Mean.of(losses.cross_entropy(logits, targets), weights)
        smoothing = 0.0 if rng is None else self.label_smoothing
        smoothed = losses.cross_entropy(logits, targets, label_smoothing=smoothing)
        correct = jnp.argmax(logits, axis=-1) == targets
        metrics = {"nll": nll, "accuracy": Mean.of(correct, weights)}
        return Mean.of(smoothed, weights).value(), Aux(state, metrics, nll.weight, logits)

    def predict(self, variables: Variables, batch: Batch) -> PyTree:
        """Returns logits [B, T, V] given the true targets before each position."""
        return self.apply(variables, batch, None, self._decoder_inputs(batch))[0]

    def example_nll(self, variables: Variables, batch: Batch, *, unit: str = "sequence") -> Array:
        """The negative log-likelihood of each example, [B] float32, for ``trees.fisher_diagonal``.

        Args:
          variables: of the objective.
          batch: see the class.
          unit: ``sequence``: of the whole target; ``token_mean``: divided by its tokens.

        Raises:
          ValueError: an unknown unit.
        """
        _check_unit(unit)
        nll = losses.cross_entropy(self.predict(variables, batch), batch["targets"])
        weights = self._token_weights(batch)
        total = jnp.where(weights > 0, nll * weights, 0.0).sum(axis=1)
        return total / jnp.maximum(weights.sum(axis=1), 1.0) if unit == "token_mean" else total

    def choices(self, variables: Variables, batch: Batch, *, unit: str = "sequence") -> Array:
        """Logits [B, T, V] for the Fisher information over labels drawn from the model.

        For ``trees.fisher_diagonal`` with ``kind="mc"`` or ``"argmax"``: each token is drawn given
        the true tokens before it. Positions that do not count have no gradient; with the unit
        ``token_mean`` gradients, not values, are divided by the number of tokens.
        """
        _check_unit(unit)
        logits = self.predict(variables, batch)
        weights = self._token_weights(batch)
        if unit == "token_mean":
            weights = weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)
        fixed = jax.lax.stop_gradient(logits)
        return fixed + weights[..., None] * (logits - fixed)

    def weights(self, batch: Batch) -> Array:
        """[B, T] float32: 1 where a target token counts."""
        size, length = batch["targets"].shape
        mask = jnp.broadcast_to(example_mask(batch, size)[:, None], (size, length))
        if self.count_padding or "target_lengths" not in batch:
            return mask
        return mask * (jnp.arange(length) < batch["target_lengths"][:, None])

    def _token_weights(self, batch: Batch) -> Array:
        """As ``weights``, of rows that all count."""
        return self.weights({k: v for k, v in batch.items() if k != "mask"})

    def _decoder_inputs(self, batch: Batch) -> Array:
        if "targets" not in batch:
            raise ValueError(f"Seq2Seq reads batch['targets']; the batch has {sorted(batch)}.")
        return shift_right(batch["targets"], self.start_id)
