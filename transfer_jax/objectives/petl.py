"""The activations are modified: parameter-efficient transfer of a frozen network."""

import flax.struct
import jax

from transfer_jax import trees
from transfer_jax.nn import petl
from transfer_jax.objectives.base import (
    Array,
    Aux,
    Batch,
    Objective,
    PyTree,
    Transformed,
    Variables,
)
from transfer_jax.objectives.reparameterize import _without
from transfer_jax.trees.paths import Where


class Adapted(Transformed):
    """Trains what a method of ``transfer_jax.nn.petl`` adds to a network that stays as it is.

    The parameters are ``{"added": ..., "full": ...}``: the method's own, and those of the network
    that are trained in full (a new head, the biases of BitFit), None elsewhere. What is frozen is
    carried: it has no gradient, no optimiser slot and no weight decay. Any objective that runs
    Linen modules can be inside. Build with ``Adapted.of``.

    Attributes:
      inner: the objective, which initialises the leaves trained in full.
      frozen: the tree of its parameters with None at the leaves trained in full.
      method: see ``transfer_jax.nn.petl``.
    """

    frozen: PyTree
    method: petl.Method = flax.struct.field(pytree_node=False)

    @classmethod
    def of(
        cls, inner: Objective, params: PyTree, method: petl.Method, *, train: Where | None = None
    ) -> "Adapted":
        """Freezes ``params`` except for what the method and ``train`` name.

        Args:
          inner: the objective; a ``WarmStart`` if the leaves trained in full start from ``params``
            too, as BitFit's do.
          params: a full tree of its parameters.
          method: see ``transfer_jax.nn.petl``.
          train: leaves to train in full besides, such as a new head; see ``trees.paths``.

        Raises:
          ValueError: ``train`` or the method's patterns match nothing.
        """
        chosen = [list(p.where) for p in method if isinstance(p, petl.Unfrozen)]
        frozen = params
        for where in chosen + ([] if train is None else [train]):
            trees.select(params, where)  # each must match something, though maybe the same
            frozen = trees.partition(frozen, where, allow_empty=True)[1]
        return cls(inner=inner, frozen=frozen, method=method)

    def init(self, rng: Array, batch: Batch) -> Variables:
        inner_key, own_key = jax.random.split(rng)
        drawn = self.inner.init(inner_key, batch)
        full = _without(drawn.params, self.frozen)
        variables = Variables(trees.combine(full, self.frozen), drawn.state)
        run = lambda variables, batch: self.inner.loss(variables, batch, None)[0]  # noqa: E731
        added = petl.init(self.method, own_key, run, variables, batch)
        return Variables({"added": added, "full": full}, drawn.state)

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        with petl.adapted(self.method, variables.params["added"]):
            return self.inner.loss(self.backbone(variables), batch, rng)

    def predict(self, variables: Variables, batch: Batch) -> PyTree:
        with petl.adapted(self.method, variables.params["added"]):
            return self.inner.predict(self.backbone(variables), batch)

    def proximal(self, params: PyTree, learning_rate: Array) -> PyTree:
        """The identity: the inner objective's map acts on other parameters."""
        del learning_rate
        return params

    def backbone(self, variables: Variables) -> Variables:
        """The inner objective's variables, which without the method's changes are the network."""
        return Variables(trees.combine(variables.params["full"], self.frozen), variables.state)

    def merge(self, variables: Variables) -> Variables:
        """The inner objective's variables with the changes in the weights; see ``petl.merge``.

        Raises:
          ValueError: the method has changes that no weights can stand for.
        """
        inner = self.backbone(variables)
        return inner._replace(
            params=petl.merge(self.method, variables.params["added"], inner.params)
        )

    def fold(self, variables: Variables) -> tuple["Adapted", Variables]:
        """The same predictions without the networks that make prefixes; see ``petl.fold``."""
        method, added = petl.fold(self.method, variables.params["added"])
        folded = variables._replace(params={**variables.params, "added": added})
        return self.replace(method=method), folded
