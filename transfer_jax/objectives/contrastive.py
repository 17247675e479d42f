"""Images against texts: the two cross-entropies of CLIP, and ranking hinges."""

import flax.struct
import jax
import jax.numpy as jnp

from transfer_jax.objectives import losses
from transfer_jax.objectives.base import Array, Aux, Batch, Mean, PyTree, Variables
from transfer_jax.objectives.tasks import ModuleObjective, example_mask

# Instead of -inf, whose products with 0 are NaN; its exponential is 0 all the same.
_NEVER = -1e9


def unit(x: Array) -> Array:
    """Divides by the L2 norm over the last axis; zero vectors stay zero, with zero gradient."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def image_cross_entropy(similarity: Array, labels: Array, candidates: Array | None = None) -> Array:
    """The cross-entropy of every image with the texts as classes.

    Args:
      similarity: [B, N], scaled cosines of images and texts.
      labels: [B] integer in [0, N): the text of each image.
      candidates: [N] bool, the texts that the softmax is over; None = all.

    Returns:
      [B] float32, in nats.
    """
    if candidates is not None:
        similarity = jnp.where(candidates, similarity, _NEVER)
    return losses.cross_entropy(similarity, labels)


def text_cross_entropy(similarity: Array, labels: Array, mask: Array | None = None) -> Array:
    """The cross-entropy of every text with the images of the batch as classes.

    The target of a text is 1 at each of its images and is not normalised: a text with p images
    counts p times, a text without images has loss 0. With a batch of pairs (``labels`` 0 to N - 1)
    it is the usual loss. It depends on the batch as a whole, hence on its size.

    Args:
      similarity: [B, N].
      labels: [B] integer in [0, N); they may repeat.
      mask: [B], 0 = padding row; None = all count.

    Returns:
      [N] float32, in nats.
    """
    scores = similarity.astype(jnp.float32).T
    positive = labels == jnp.arange(len(scores))[:, None]
    if mask is not None:
        scores = jnp.where(mask > 0, scores, _NEVER)
        positive = positive & (mask > 0)
    log_probs = jax.nn.log_softmax(scores, axis=-1)
    return -jnp.sum(jnp.where(positive, log_probs, 0.0), axis=-1)


class ImageTextClassification(ModuleObjective):
    """Classification of images by the texts that name the classes, both towers being trained.

    ``loss = image cross-entropy + text_weight * text cross-entropy`` with similarities
    ``exp(logit_scale) z E^T`` of unit features. E holds the features ``seen`` of earlier classes,
    which are given, and those of ``texts``, which the text tower computes in every step. The image
    cross-entropy is over the classes of ``texts`` alone. The text cross-entropy is the mean over
    all rows of E: seen classes have no images in a batch, so they only enter the denominator.

    The module has methods ``encode_image(inputs, train)`` and ``encode_text(tokens, train)`` to
    features [., D] and is called with ``(inputs, tokens, train=...)`` to be initialised; its
    parameter ``logit_scale`` is not trained. ``batch["labels"]`` are positions in ``texts``.

    Metrics: ``nll`` and ``accuracy`` among the candidates, ``accuracy_all`` among all ``texts``,
    ``text_nll``.

    Attributes:
      texts: int32 [C, L] tokens; rows of zeros are no classes (so that tasks of unequal size share
        one compiled step).
      seen: [S, D] unit features of earlier classes, rows of zeros being none; or None.
      candidates: [C] bool, the classes that images choose among; None = all of ``texts``.
      text_weight: 1, or 0 where only the text tower is adapted.
      chunk: encode so many texts at a time and recompute them in the backward pass (0 = all at
        once).
    """

    texts: Array
    seen: Array | None = None
    candidates: Array | None = None
    text_weight: Array | float = 1.0
    chunk: int = flax.struct.field(pytree_node=False, default=0)

    def init(self, rng: Array, batch: Batch) -> Variables:
        return self._initialise(rng, batch, self.texts[:1])

    def present(self) -> Array:
        """[C] bool: which rows of ``texts`` are classes."""
        return jnp.any(self.texts != 0, axis=-1)

    def text_features(self, variables: Variables, rng: Array | None = None) -> Array:
        """Unit features of ``texts``, [C, D] float32; zeros where there is no class."""
        collections = {"params": variables.params, **variables.state}
        rngs = {} if rng is None else {"dropout": rng}

        def encode(tokens: Array) -> Array:
            features = self.module.apply(
                collections, tokens, train=rng is not None, rngs=rngs, method="encode_text"
            )
            return jnp.asarray(features)

        count = len(self.texts)
        if self.chunk and count > self.chunk:
            padded = jnp.pad(self.texts, ((0, -count % self.chunk), (0, 0)))
            chunks = padded.reshape(-1, self.chunk, padded.shape[-1])
            features = jax.lax.map(jax.checkpoint(encode), chunks)
            features = features.reshape(len(padded), -1)[:count]
        else:
            features = encode(self.texts)
        return jnp.where(self.present()[:, None], unit(features.astype(jnp.float32)), 0.0)

    def _similarity(
        self, variables: Variables, batch: Batch, rng: Array | None
    ) -> tuple[Array, Array, PyTree]:
        """Similarities [B, S + C], which of their columns are classes, and the state."""
        keys = (None, None) if rng is None else jax.random.split(rng)
        images, state = self.apply(variables, batch, keys[0], method="encode_image")
        texts, present = self.text_features(variables, keys[1]), self.present()
        if self.seen is not None:
            texts = jnp.concatenate([jax.lax.stop_gradient(self.seen), texts])
            present = jnp.concatenate([jnp.any(self.seen != 0, axis=-1), present])
        scale = jnp.exp(jax.lax.stop_gradient(variables.params["logit_scale"]))
        return scale * unit(images.astype(jnp.float32)) @ texts.T, present, state

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        similarity, present, state = self._similarity(variables, batch, rng)
        first = 0 if self.seen is None else len(self.seen)
        labels = batch["labels"] + first
        mask = example_mask(batch, len(similarity))
        everything = present & (jnp.arange(len(present)) >= first)
        candidates = everything
        if self.candidates is not None:
            candidates = candidates.at[first:].set(candidates[first:] & self.candidates)

        nll = Mean.of(image_cross_entropy(similarity, labels, candidates), mask)
        text_nll = Mean.of(text_cross_entropy(similarity, labels, batch.get("mask")), present)
        among, all_texts = (jnp.where(c, similarity, _NEVER) for c in (candidates, everything))
        metrics = {
            "nll": nll,
            "text_nll": text_nll,
            "accuracy": Mean.of(jnp.argmax(among, axis=-1) == labels, mask),
            "accuracy_all": Mean.of(jnp.argmax(all_texts, axis=-1) == labels, mask),
        }
        total = nll.value() + self.text_weight * text_nll.value()
        return total, Aux(state, metrics, nll.weight, among[:, first:])

    def predict(self, variables: Variables, batch: Batch) -> Array:
        """Returns similarities to ``texts``, [B, C] float32; -1e9 where no candidate is."""
        similarity, present, _ = self.replace(seen=None)._similarity(variables, batch, None)
        if self.candidates is not None:
            present = present & self.candidates
        return jnp.where(present, similarity, _NEVER)


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
