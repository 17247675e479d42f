"""The optimiser sees other, fewer numbers: ``inner_params = f(params, carried)``."""

import flax.struct
import jax

from transfer_jax import trees
from transfer_jax.objectives.base import Array, Aux, Batch, PyTree, Transformed, Variables
from transfer_jax.trees.paths import Where


class ReparameterizedObjective(Transformed):
    """Base of objectives whose parameters are mapped to those of an inner objective.

    Subclasses give ``initial_params`` and ``inner_params``; the state is the inner one's.
    """

    def initial_params(self, rng: Array, inner_params: PyTree) -> PyTree:
        """Returns the first parameters, given those that the inner objective initialises."""
        raise NotImplementedError

    def inner_params(self, params: PyTree) -> PyTree:
        """Returns the inner objective's parameters: the map itself, differentiable."""
        raise NotImplementedError

    def inner_variables(self, variables: Variables) -> Variables:
        """Returns the variables with which the inner objective gives the same predictions."""
        return Variables(self.inner_params(variables.params), variables.state)

    def init(self, rng: Array, batch: Batch) -> Variables:
        inner_key, own_key = jax.random.split(rng)
        variables = self.inner.init(inner_key, batch)
        return Variables(self.initial_params(own_key, variables.params), variables.state)

    def proximal(self, params: PyTree, learning_rate: Array) -> PyTree:
        """The identity: the inner objective's map acts on other coordinates."""
        del learning_rate
        return params

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        return self.inner.loss(self.inner_variables(variables), batch, rng)

    def predict(self, variables: Variables, batch: Batch) -> PyTree:
        return self.inner.predict(self.inner_variables(variables), batch)


class Trainable(ReparameterizedObjective):
    """Trains some parameters and freezes the others.

    Frozen leaves are carried, not optimised: they get no gradient, no optimiser slot, no weight
    decay and no share in the gradient norm. Build with ``Trainable.of``.

    Attributes:
      inner: the objective, which initialises the trained leaves.
      frozen: the tree of its parameters with None at the trained leaves.
    """

    frozen: PyTree

    @classmethod
    def of(cls, inner: Transformed, params: PyTree, where: Where) -> "Trainable":
        """Freezes everything but ``where`` at the values in ``params``.

        Args:
          inner: the objective; a ``WarmStart`` if the trained leaves too start from ``params``.
          params: a full tree of its parameters.
          where: the leaves to train, see ``trees.paths``; it must choose some.
        """
        return cls(inner=inner, frozen=trees.partition(params, where)[1])

    def initial_params(self, rng: Array, inner_params: PyTree) -> PyTree:
        return _without(inner_params, self.frozen)

    def inner_params(self, params: PyTree) -> PyTree:
        return trees.combine(params, self.frozen)

    def proximal(self, params: PyTree, learning_rate: Array) -> PyTree:
        """The inner objective's map; what it does to frozen leaves is left out."""
        return _without(self.inner.proximal(self.inner_params(params), learning_rate), self.frozen)


class LowRank(ReparameterizedObjective):
    """LoRA in weight space: ``W = W0 + (alpha / rank) a b`` (Hu et al. 2022, section 4.1).

    The parameters are ``{"factors": ..., "full": ...}``: the factors of the adapted matrices, and
    leaves trained in full, such as a new head. ``b`` starts at zero, so training starts at
    ``base``. Build with ``LowRank.of``.

    Attributes:
      inner: the objective.
      base: its parameters W0, carried, with None at the leaves trained in full.
      scale: alpha / rank.
      where: regular expressions of the adapted leaves.
      rank: of the change.
    """

    base: PyTree
    scale: Array | float = 1.0
    where: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    rank: int = flax.struct.field(pytree_node=False, default=4)

    @classmethod
    def of(
        cls,
        inner: Transformed,
        params: PyTree,
        where: str | list[str] | tuple[str, ...],
        *,
        rank: int = 4,
        alpha: float | None = None,
        train: Where | None = None,
    ) -> "LowRank":
        """Adapts ``params`` at ``where``.

        Args:
          inner: the objective; it initialises the leaves in ``train``.
          params: a full tree of its parameters.
          where: regular expression(s) of the matrices to adapt.
          rank: rank of the change.
          alpha: the change is scaled by ``alpha / rank``; default ``rank``.
          train: leaves to train in full besides.

        Raises:
          ValueError: ``where`` or ``train`` match nothing, they overlap, or a matched leaf is no
            matrix.
        """
        patterns = (where,) if isinstance(where, str) else tuple(where)
        adapted = trees.select(params, list(patterns))
        base = params
        if train is not None:
            full, base = trees.partition(params, train)
            both = sorted(
                set(trees.paths(full)) & set(trees.paths(trees.partition(params, adapted)[0]))
            )
            if both:
                raise ValueError(
                    f"{both[:5]} are both adapted (where) and trained in full (train)."
                )
        scale = 1.0 if alpha is None else alpha / rank
        return cls(inner=inner, base=base, scale=scale, where=patterns, rank=rank)

    def initial_params(self, rng: Array, inner_params: PyTree) -> PyTree:
        factors = trees.lora_init(self.base, list(self.where), self.rank, rng)
        return {"factors": factors, "full": _without(inner_params, self.base)}

    def inner_params(self, params: PyTree) -> PyTree:
        merged = trees.lora_merge(self.base, params["factors"], self.scale)
        return trees.combine(params["full"], merged)


def _without(tree: PyTree, carried: PyTree) -> PyTree:
    """Returns ``tree`` with None at the leaves that ``carried`` has.

    Raises:
      ValueError: ``carried`` has leaves that ``tree`` does not have.
    """
    known, held = trees.paths(tree), set(trees.paths(carried))
    if unknown := sorted(held - set(known)):
        raise ValueError(
            f"the carried leaves {unknown[:5]} are not parameters of the inner objective, which "
            f"has {known[:8]}."
        )
    return jax.tree_util.tree_map_with_path(
        lambda kp, x: None if trees.path_str(kp) in held else x, tree
    )
