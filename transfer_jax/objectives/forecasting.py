"""Forecasting: the error of a network that maps a context window to a horizon."""

import inspect
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np

from transfer_jax.objectives.base import Array, Aux, Batch, Mean, Variables
from transfer_jax.objectives.tasks import ModuleObjective, example_mask

LOSSES = ("mse", "mae", "huber", "pinball")


class Forecasting(ModuleObjective):
    """The mean error over windows, steps and channels, observed entries only.

    The module maps ``batch["inputs"]`` [B, sl, C] to forecasts [B, fl, C']; where its ``__call__``
    takes them it is also given ``freq_token`` [B], ``observed`` [B, sl, C] and ``static`` [B, S] of
    the batch, and as ``future`` the batch's ``targets`` [B, >= fl, C], of which it may read known
    channels only. Targets are compared with forecasts at ``channels``; entries of ``known``
    ([B, >= fl, C], 1 = observed) that are 0 do not count and may hold anything.

    Metrics: ``mse`` and ``mae``.

    Attributes:
      channels: those of ``targets`` that are forecast; () = all.
      loss_name: 'mse', 'mae', 'huber' or 'pinball', max(q e, (q - 1) e) with e = target - forecast.
      delta: of 'huber', where it turns from quadratic to linear.
      quantile: q of 'pinball'.
    """

    channels: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    loss_name: str = flax.struct.field(pytree_node=False, default="mse")
    delta: float = 1.0
    quantile: float = 0.5

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        outputs, state = self.apply(variables, batch, rng)
        targets = self._select(batch["targets"], outputs)
        if targets.shape != outputs.shape:
            raise ValueError(
                f"forecasts of shape {outputs.shape} do not fit targets of shape "
                f"{batch['targets'].shape} at channels={self.channels or 'all'}."
            )
        weights = example_mask(batch, len(outputs))[:, None, None]
        if "known" in batch:
            known = self._select(batch["known"], outputs)
            targets = jnp.where(known > 0, targets, 0.0)
            weights = weights * known
        error = targets - outputs
        squared, absolute = jnp.square(error), jnp.abs(error)
        metrics = {"mse": Mean.of(squared, weights), "mae": Mean.of(absolute, weights)}
        if self.loss_name in metrics:
            mean = metrics[self.loss_name]
        elif self.loss_name == "huber":
            linear = self.delta * (absolute - 0.5 * self.delta)
            mean = Mean.of(jnp.where(absolute < self.delta, 0.5 * squared, linear), weights)
        elif self.loss_name == "pinball":
            values = jnp.maximum(self.quantile * error, (self.quantile - 1.0) * error)
            mean = Mean.of(values, weights)
        else:
            raise ValueError(f"loss_name={self.loss_name!r}; choose one of {LOSSES}.")
        return mean.value(), Aux(state, metrics, mean.weight, outputs)

    def _select(self, x: Array, outputs: Array) -> Array:
        x = x[:, : outputs.shape[1]]
        return x[..., np.array(self.channels)] if self.channels else x

    def _arguments(self, batch: Batch, train: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super()._arguments(batch, train)
        accepted = inspect.signature(type(self.module).__call__).parameters
        given = {**batch, "future": batch.get("targets")}
        for name in ("freq_token", "observed", "static", "future"):
            if name in accepted and given.get(name) is not None:
                kwargs[name] = given[name]
        return args, kwargs
