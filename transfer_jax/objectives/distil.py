"""A term in the predictions of a teacher is added to the loss."""

import jax

from transfer_jax.objectives import losses
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
from transfer_jax.objectives.tasks import example_mask


class DistilledObjective(Transformed):
    """Base of objectives that pull predictions towards a teacher's.

    ``loss = (1 - weight) * inner + weight * mean distance``. The student's predictions come from
    the inner objective's own forward pass (``Aux.outputs``), so there is only one. No gradient
    reaches the teacher.

    Metric: ``distance``.

    Attributes:
      inner: the student's objective.
      teacher: any objective whose ``predict`` gives what the distance compares.
      teacher_variables: its variables, carried.
      weight: share of the distillation term, in [0, 1].
    """

    teacher: Objective
    teacher_variables: Variables
    weight: Array | float = 0.5

    def distance(self, outputs: PyTree, teacher_outputs: PyTree, batch: Batch) -> Array:
        """Returns the distance for each example, [B] float32."""
        raise NotImplementedError

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        loss, aux = self.inner.loss(variables, batch, rng)
        if aux.outputs is None:
            raise ValueError(
                f"{type(self.inner).__name__} does not return Aux.outputs, which a distillation "
                "compares with the teacher's predictions."
            )
        target = jax.lax.stop_gradient(self.teacher.predict(self.teacher_variables, batch))
        distance = self.distance(aux.outputs, target, batch)
        mean = Mean.of(distance, example_mask(batch, distance.shape[0]))
        total = (1.0 - self.weight) * loss + self.weight * mean.value()
        return total, aux._replace(metrics={**aux.metrics, "distance": mean})

    def release(self) -> Objective:
        return self.replace(inner=self.inner.release(), teacher=self.teacher.release())


class Distilled(DistilledObjective):
    """Distillation of softened class probabilities (Hinton et al. 2015, section 2).

    The distance is ``T^2 KL(teacher || student)`` at temperature T, averaged over any axes between
    the batch and the classes.

    Attributes:
      temperature: T.
    """

    temperature: Array | float = 1.0

    def distance(self, outputs: PyTree, teacher_outputs: PyTree, batch: Batch) -> Array:
        if outputs.shape != teacher_outputs.shape:
            raise ValueError(
                f"the student's logits have shape {outputs.shape} and the teacher's "
                f"{teacher_outputs.shape}; they must agree."
            )
        kl = losses.temperature_kl(outputs, teacher_outputs, temperature=self.temperature)
        return kl.reshape(kl.shape[0], -1).mean(axis=-1)
