"""Pairs of images and texts that should be nearest to each other."""

import flax.struct
import jax.numpy as jnp

from transfer_jax.objectives.base import Array, Aux, Batch, Mean, PyTree, Variables
from transfer_jax.objectives.contrastive import image_cross_entropy, text_cross_entropy
from transfer_jax.objectives.tasks import ModuleObjective, example_mask

# Instead of -inf, whose products with 0 are NaN.
_NEVER = -1e9


def ranking_hinge(
    similarity: Array, margin: Array | float = 0.2, *, hardest: bool, mask: Array | None = None
) -> Array:
    """``max(0, margin + s(wrong) - s(right))`` in both directions (Faghri et al. 2018, VSE++).

    Row i of one view belongs to row i of the other.

    Args:
      similarity: [B, B] of images and texts.
      margin: by how much the right one should win.
      hardest: count only the nearest wrong one of each row and column, else the sum over all.
      mask: [B], 0 = padding row; None = all count.

    Returns:
      [B] float32: what row i and column i give together.
    """
    scores = similarity.astype(jnp.float32)
    right = jnp.diagonal(scores)
    counted = ~jnp.eye(len(scores), dtype=bool)
    if mask is not None:
        counted = counted & (mask[:, None] > 0) & (mask > 0)
    of_images = jnp.where(counted, jnp.maximum(margin + scores - right[:, None], 0.0), 0.0)
    of_texts = jnp.where(counted, jnp.maximum(margin + scores - right, 0.0), 0.0)
    if hardest:
        return of_images.max(axis=1) + of_texts.max(axis=0)
    return of_images.sum(axis=1) + of_texts.sum(axis=0)


class PairMatching(ModuleObjective):
    """Pairs of an image and a text: each should be nearest to the other among those of the batch.

    The module maps ``(inputs, images, lengths=...)``, texts and what stands for the images at
    ``batch["images"]``, to unit vectors of both, ``(images [B, D], texts [B, D])``, and so does
    ``predict``. The loss is one of

    * ``info_nce``: the mean of the cross-entropies of rows and columns of ``scale`` times the
      cosines, over the batch (CLIP; CLIP4Clip);
    * ``hinge``: the sum of ``ranking_hinge`` over the batch. As in VSE++, all wrong ones count in
      the first epoch and the nearest alone afterwards; in the second epoch the loss is multiplied
      by the share of that epoch that is over. Evaluation is as after these.

    Both depend on the batch as a whole, hence on its size and on the number of microbatches.

    Metrics: ``loss``; ``image_to_text`` and ``text_to_image``, the share of the batch for which
    the right one is nearest.

    Attributes:
      kind: ``info_nce`` or ``hinge``.
      scale: of the cosines, for ``info_nce``; not trained.
      margin: for ``hinge``.
      epoch_steps: steps of an epoch, for ``hinge``; 0 = the nearest alone from the first step.
      step: optimiser steps taken; set by ``at``.
    """

    kind: str = flax.struct.field(pytree_node=False, default="info_nce")
    scale: Array | float = 100.0
    margin: Array | float = 0.2
    epoch_steps: int = flax.struct.field(pytree_node=False, default=0)
    step: Array | None = None

    def __post_init__(self):
        if self.kind not in ("info_nce", "hinge"):
            raise ValueError(f"kind={self.kind!r}; choose 'info_nce' or 'hinge'.")

    def init(self, rng: Array, batch: Batch) -> Variables:
        return self._initialise(rng, batch, batch["images"])

    def at(self, step: Array) -> "PairMatching":
        return self.replace(step=step)

    def predict(self, variables: Variables, batch: Batch) -> PyTree:
        return self.apply(variables, batch, None, batch["images"])[0]

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        outputs, state = self.apply(variables, batch, rng, batch["images"])
        images, texts = outputs
        similarity = images.astype(jnp.float32) @ texts.astype(jnp.float32).T
        size, mask = len(similarity), batch.get("mask")
        weights = example_mask(batch, size)
        labels = jnp.arange(size)
        seen = None if mask is None else mask > 0
        if self.kind == "info_nce":
            scaled = self.scale * similarity
            of_images = image_cross_entropy(scaled, labels, seen)
            of_texts = text_cross_entropy(scaled, labels, mask)
            mean = Mean.of((of_images + of_texts) / 2, weights)
            loss = mean.value()
        else:
            mean = Mean.of(self._hinge(similarity, mask), weights)
            loss = mean.total
        rows = similarity if seen is None else jnp.where(seen, similarity, _NEVER)
        columns = similarity if seen is None else jnp.where(seen[:, None], similarity, _NEVER)
        metrics = {
            "loss": Mean(loss * mean.weight, mean.weight),
            "image_to_text": Mean.of(jnp.argmax(rows, axis=1) == labels, weights),
            "text_to_image": Mean.of(jnp.argmax(columns, axis=0) == labels, weights),
        }
        return loss, Aux(state, metrics, mean.weight, outputs)

    def _hinge(self, similarity: Array, mask: Array | None) -> Array:
        nearest = ranking_hinge(similarity, self.margin, hardest=True, mask=mask)
        if self.step is None or not self.epoch_steps:
            return nearest
        everything = ranking_hinge(similarity, self.margin, hardest=False, mask=mask)
        epoch, within = jnp.divmod(self.step, self.epoch_steps)
        share = jnp.where(epoch == 1, within / self.epoch_steps, 1.0)
        return jnp.where(epoch == 0, everything, share * nearest)
