"""The protocol: what is trained is an ``Objective``, and a transfer method transforms one.

An objective is a pytree. The arrays it carries (a frozen backbone, a teacher, an anchor and its
Fisher diagonal, task vectors) are its leaves, so they enter the jitted step as sharded arguments
and are never baked into the compiled program as constants. What is no array (a Linen module, a
coefficient that selects code) is a static field, declared ``flax.struct.field(pytree_node=False)``,
and must be hashable.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any
Batch = Any


class Variables(NamedTuple):
    """What an objective needs besides itself and the batch.

    Attributes:
      params: what the optimiser updates, and the only thing it allocates moments for.
      state: what the forward pass updates: batch statistics, memory queues, prototypes.
    """

    params: PyTree
    state: PyTree


class Mean(NamedTuple):
    """A mean in two parts that can be added across batches, microbatches and devices.

    Attributes:
      total: scalar float32, the weighted sum.
      weight: scalar float32, the sum of the weights.
    """

    total: Array
    weight: Array

    @classmethod
    def of(cls, values: Array, weights: Array | None = None) -> "Mean":
        """The mean of ``values`` (any shape), weighted by ``weights`` that broadcast to them."""
        values = jnp.asarray(values, jnp.float32)
        if weights is None:
            return cls(values.sum(), jnp.float32(values.size))
        weights = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), values.shape)
        # A padded row may hold anything, NaN too: its value must not reach the sum.
        return cls(jnp.where(weights > 0, values * weights, 0.0).sum(), weights.sum())

    def value(self) -> Array:
        """``total / weight``, and 0 where nothing was counted (a batch of padding only)."""
        return self.total / jnp.where(self.weight == 0, 1.0, self.weight)


class Aux(NamedTuple):
    """What ``Objective.loss`` returns beside the loss.

    Attributes:
      state: the updated state, of the same structure as ``Variables.state``.
      metrics: name -> ``Mean``; ``fit`` adds them over steps and evaluation batches.
      weight: scalar; how many examples (or tokens) the loss is a mean over. Accumulated gradients
        are averaged with these weights, so that microbatches of unequal content add up exactly.
      outputs: what ``predict`` would return for this batch, from the same forward pass, for
        transformations that add a term in the predictions. Never leaves the step.
    """

    state: PyTree
    metrics: dict[str, Mean]
    weight: Array | float = 1.0
    outputs: PyTree = None


class Objective(flax.struct.PyTreeNode):
    """Something that can be initialised, trained and asked for predictions.

    Subclasses implement the three methods as pure functions. Batches are dictionaries of arrays
    with a leading batch axis; ``batch["mask"]`` ([B], 1 = real, 0 = padding; absent = all real)
    says which examples count.
    """

    def init(self, rng: Array, batch: Batch) -> Variables:
        """Draws initial variables.

        Args:
          rng: a typed key.
          batch: one batch (only shapes and dtypes matter to most objectives).
        """
        raise NotImplementedError

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        """Returns the scalar float32 loss and an ``Aux``.

        Args:
          variables: params and state.
          batch: see the class.
          rng: a typed key; or None for evaluation, where nothing is random (no dropout), running
            statistics are used instead of the batch's, and ``Aux.state`` is the state given.
        """
        raise NotImplementedError

    def predict(self, variables: Variables, batch: Batch) -> PyTree:
        """Returns the predictions for a batch (logits for classifiers), deterministically."""
        raise NotImplementedError

    def at(self, step: Array) -> "Objective":
        """Returns the objective as it is at a training step, inside the compiled step.

        Coefficients that change during training (a decaying penalty, a temperature, a threshold)
        are set here. Evaluation uses the objective as it was given.

        Args:
          step: scalar int32, optimiser steps taken before this one.
        """
        return self

    def proximal(self, params: PyTree, learning_rate: Array) -> PyTree:
        """Maps the parameters after each optimiser step, by default to themselves.

        For what no gradient does: a proximal operator, a projection onto a set.

        Args:
          params: after the optimiser's update.
          learning_rate: scalar float32, the main group's rate of this step.
        """
        del learning_rate
        return params

    def release(self) -> "Objective":
        """Returns the objective without arrays that only ``init`` needs; ``fit`` calls it once."""
        return self


class Transformed(Objective):
    """Base of all transformations: an objective around an ``inner`` one, by default unchanged."""

    inner: Objective

    def init(self, rng: Array, batch: Batch) -> Variables:
        return self.inner.init(rng, batch)

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        return self.inner.loss(variables, batch, rng)

    def predict(self, variables: Variables, batch: Batch) -> PyTree:
        return self.inner.predict(variables, batch)

    def at(self, step: Array) -> Objective:
        return self.replace(inner=self.inner.at(step))

    def proximal(self, params: PyTree, learning_rate: Array) -> PyTree:
        return self.inner.proximal(params, learning_rate)

    def release(self) -> Objective:
        return self.replace(inner=self.inner.release())


class MappedBatch(Transformed):
    """Base of transformations that give ``inner`` another batch than the pipeline's."""

    def batch(self, batch: Batch) -> Batch:
        """Returns what ``inner`` sees of a batch of the pipeline."""
        raise NotImplementedError

    def init(self, rng: Array, batch: Batch) -> Variables:
        return self.inner.init(rng, self.batch(batch))

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        return self.inner.loss(variables, self.batch(batch), rng)

    def predict(self, variables: Variables, batch: Batch) -> PyTree:
        return self.inner.predict(variables, self.batch(batch))
