"""Chains of events of which each needs the one before: impression, click, conversion, ...

Stage k has the probability ``s_k = sigmoid(l_k)`` given that all stages before it happened; the
event k has ``p_k = s_1 ... s_k`` over all impressions. Training the events, not the conditional
probabilities, uses every impression (Ma et al. 2018, equations 2 to 4; there K = 2).
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from transfer_jax.objectives.base import Array, Aux, Batch, Mean, Variables
from transfer_jax.objectives.tasks import ModuleObjective, example_mask


def event_log_probs(logits: Array) -> tuple[Array, Array]:
    """Logarithms of ``p_k`` and of ``1 - p_k``, without cancellation.

    Args:
      logits: [..., K], any float dtype; the arithmetic is float32 at least.

    Returns:
      [..., K] and [..., K].
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return jnp.cumsum(jax.nn.log_sigmoid(logits), axis=-1), _log_complement(logits)


@jax.custom_jvp
def _log_complement(logits: Array) -> Array:
    """``log(1 - p_k)``, where ``1 - p_k = (1 - p_{k-1}) + p_{k-1} (1 - s_k)`` adds positives."""
    log_p = jnp.cumsum(jax.nn.log_sigmoid(logits), axis=-1)
    last = jax.nn.log_sigmoid(-logits[..., 0])
    out = [last]
    for k in range(1, logits.shape[-1]):
        last = jnp.logaddexp(last, log_p[..., k - 1] + jax.nn.log_sigmoid(-logits[..., k]))
        out.append(last)
    # The recursion is exact where p_k is near 1; where it is small, this is.
    return jnp.where(log_p < -1.0, jnp.log1p(-jnp.exp(log_p)), jnp.stack(out, axis=-1))


@_log_complement.defjvp
def _log_complement_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Array, Array]:
    """``d log(1 - p_k) / d l_j = -p_k (1 - s_j) / (1 - p_k)`` for j <= k.

    In closed form because the derivative of the recursion subtracts nearly equal numbers where the
    probabilities are small.
    """
    (logits,), (change,) = primals, tangents
    out = _log_complement(logits)
    log_p = jnp.cumsum(jax.nn.log_sigmoid(logits), axis=-1)
    # [..., k, j]; at most 1, because 1 - p_k >= 1 - s_j.
    slope = jnp.exp((log_p - out)[..., :, None] + jax.nn.log_sigmoid(-logits)[..., None, :])
    return out, -jnp.sum(jnp.tril(slope) * change[..., None, :], axis=-1)


def event_labels(labels: Array) -> Array:
    """Whether the events happened, [..., K] float32: a stage counts only if all before it did."""
    return jnp.cumprod(labels.astype(jnp.float32), axis=-1)


def chain_nll(logits: Array, labels: Array) -> Array:
    """Binary cross-entropy of every event, over all impressions.

    Args:
      logits: [..., K], of the stages.
      labels: [..., K], 0 or 1, of the stages; multiplied up by ``event_labels``.

    Returns:
      [..., K] in nats.
    """
    log_p, log_not = event_log_probs(logits)
    events = event_labels(labels)
    return -(events * log_p + (1.0 - events) * log_not)


class EntireSpace(ModuleObjective):
    """``sum_k w_k mean_i BCE(event_k, p_k) + sum_k c_k mean_i r_ik BCE(label_k, s_k)``.

    ``r_ik`` is 1 where all stages before k happened. With ``w = (1, 1)`` and ``c = 0`` it is ESMM;
    with one stage it is the logistic loss. The module gives logits [B, K] of its ``stages``.
    ``batch["labels"]`` is [B, K]; ``batch["weights"]`` ([B], optional) weights the examples,
    besides ``mask``. Means are over weights.

    Metrics, for each stage: ``<stage>_nll`` of its event, ``<stage>_rate``, the mean of ``s_k``
    over all impressions. Predictions are the logits.

    Attributes:
      event_weights: w, [K]; empty = ones.
      stage_weights: c, [K]; empty = zeros.
    """

    event_weights: tuple[float, ...] = flax.struct.field(pytree_node=False, default=())
    stage_weights: tuple[float, ...] = flax.struct.field(pytree_node=False, default=())

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        logits, state = self.apply(variables, batch, rng)
        labels = batch["labels"]
        if logits.shape != labels.shape:
            raise ValueError(
                f"logits of shape {logits.shape} do not fit labels of shape {labels.shape}: both "
                "have one column per stage."
            )
        stages = getattr(self.module, "stages", tuple(map(str, range(1, logits.shape[-1] + 1))))
        event_weights = self.event_weights or (1.0,) * len(stages)
        stage_weights = self.stage_weights or (0.0,) * len(stages)
        if {len(event_weights), len(stage_weights)} != {len(stages)}:
            raise ValueError(
                f"event_weights={event_weights} and stage_weights={stage_weights} need one number "
                f"for each of the stages {stages}."
            )
        weights = example_mask(batch, len(labels))
        if "weights" in batch:
            weights = weights * batch["weights"]
        nll = chain_nll(logits, labels)
        rates = jax.nn.sigmoid(logits)
        total = jnp.float32(0.0)
        metrics: dict[str, Mean] = {}
        for k, stage in enumerate(stages):
            mean = Mean.of(nll[:, k], weights)
            metrics[f"{stage}_nll"] = mean
            metrics[f"{stage}_rate"] = Mean.of(rates[:, k], weights)
            total += event_weights[k] * mean.value()
            if stage_weights[k]:
                reached = event_labels(labels)[:, k - 1] if k else 1.0
                alone = chain_nll(logits[:, k : k + 1], labels[:, k : k + 1])[:, 0]
                total += stage_weights[k] * Mean.of(reached * alone, weights).value()
        return total, Aux(state, metrics, weights.sum(), logits)
