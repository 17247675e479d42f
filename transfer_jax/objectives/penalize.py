"""A term in the parameters is added to the loss."""

import jax
import jax.numpy as jnp

from transfer_jax import trees
from transfer_jax.objectives.base import Array, Aux, Batch, Mean, PyTree, Transformed, Variables


class PenalizedObjective(Transformed):
    """Base of objectives that add ``strength * penalty(params)`` to an inner loss.

    Metric: ``penalty``, before the strength is applied.

    Attributes:
      inner: the objective.
      strength: the coefficient; a leaf, so that another value needs no new compilation.
    """

    strength: Array | float = 1.0

    def penalty(self, params: PyTree) -> Array:
        """Returns the scalar float32 penalty."""
        raise NotImplementedError

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
    """

    anchor: PyTree = None
    fisher: PyTree = None

    def penalty(self, params: PyTree) -> Array:
        if not jax.tree.leaves(self.anchor):
            raise ValueError("Penalized.anchor holds no array: nothing would be protected.")
        fisher = self.fisher
        if fisher is None:
            fisher = jax.tree.map(jnp.ones_like, self.anchor)
        return trees.ewc_penalty(params, self.anchor, fisher)
