"""A term in the parameters is added to the loss."""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from transfer_jax import trees
from transfer_jax.objectives.base import (
    Array,
    Aux,
    Batch,
    Mean,
    Objective,
    PyTree,
    Transformed,
    Variables,
)


@dataclasses.dataclass(frozen=True)
class LinearFloor:
    """A strength that falls at the end of each epoch: ``max(floor, initial (1 - epoch / epochs))``.

    Attributes:
      initial: in the first epoch.
      floor: where it stays.
      steps_per_epoch: training steps.
      epochs: after which it would be 0.
    """

    initial: float
    floor: float
    steps_per_epoch: int
    epochs: int

    def __call__(self, step: Array) -> Array:
        epoch = jnp.asarray(step) // self.steps_per_epoch
        return jnp.maximum(self.floor, self.initial * (1.0 - epoch / self.epochs))


class PenalizedObjective(Transformed):
    """Base of objectives that add ``strength * penalty(params)`` to an inner loss.

    Metric: ``penalty``, before the strength is applied.

    Attributes:
      inner: the objective.
      strength: the coefficient; a leaf, so that another value needs no new compilation.
      schedule: gives the strength at a training step, such as ``LinearFloor``; ``strength`` is then
        what evaluation uses.
    """

    strength: Array | float = 1.0
    schedule: Callable[[Array], Array] | None = flax.struct.field(pytree_node=False, default=None)

    def penalty(self, params: PyTree) -> Array:
        """Returns the scalar float32 penalty."""
        raise NotImplementedError

    def at(self, step: Array) -> Objective:
        now = self.replace(inner=self.inner.at(step))
        return now if self.schedule is None else now.replace(strength=self.schedule(step))

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        loss, aux = self.inner.loss(variables, batch, rng)
        penalty = self.penalty(variables.params)
        metrics = {**aux.metrics, "penalty": Mean.of(penalty)}
        return loss + self.strength * penalty, aux._replace(metrics=metrics)


class Penalized(PenalizedObjective):
    """A quadratic anchor: ``strength / 2 * sum_i F_i (theta_i - anchor_i)^2``.

    With a Fisher diagonal F it is elastic weight consolidation (Kirkpatrick et al. 2017,
    equation 3); without one (F = 1) it is L2-SP (Li et al. 2018, equation 1).

    Attributes:
      inner: the objective.
      strength: lambda.
      anchor: parameters to stay near, None at leaves that are free (a new head).
      fisher: Fisher diagonal, of the anchor's structure; or None.
      penalty_step: ``gradient``: the term is part of the gradient, which plain gradient descent
        follows stably only while ``learning_rate * strength * max(F) < 2``. ``proximal``: the
        optimiser sees the inner loss alone, and each of its steps is followed by the exact
        minimising step ``trees.ewc_proximal`` at the learning rate, stable at any strength. The
        value of the loss is the same.
    """

    anchor: PyTree = None
    fisher: PyTree = None
    penalty_step: str = flax.struct.field(pytree_node=False, default="gradient")

    def penalty(self, params: PyTree) -> Array:
        penalty = trees.ewc_penalty(params, self.anchor, self._weights())
        return jax.lax.stop_gradient(penalty) if self._is_proximal() else penalty

    def proximal(self, params: PyTree, learning_rate: Array) -> PyTree:
        params = self.inner.proximal(params, learning_rate)
        if not self._is_proximal():
            return params
        return trees.ewc_proximal(
            params, self.anchor, self._weights(), learning_rate * self.strength
        )

    def _is_proximal(self) -> bool:
        if self.penalty_step not in ("gradient", "proximal"):
            raise ValueError(
                f"Penalized.penalty_step={self.penalty_step!r}; choose 'gradient' or 'proximal'."
            )
        return self.penalty_step == "proximal"

    def _weights(self) -> PyTree:
        if not jax.tree.leaves(self.anchor):
            raise ValueError("Penalized.anchor holds no array: nothing would be protected.")
        return jax.tree.map(jnp.ones_like, self.anchor) if self.fisher is None else self.fisher
