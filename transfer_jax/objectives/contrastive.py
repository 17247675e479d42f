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

    Metrics: ``nll``, ``accuracy``, ``text_nll``.

    Attributes:
      texts: int32 [C, L] tokens; rows of zeros are no classes (so that tasks of unequal size share
        one compiled step).
      seen: [S, D] unit features of earlier classes, rows of zeros being none; or None.
      text_weight: 1, or 0 where only the text tower is adapted.
      chunk: encode so many texts at a time and recompute them in the backward pass (0 = all at
        once).
    """

    texts: Array
    seen: Array | None = None
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
        candidates = present & (jnp.arange(len(present)) >= first)
        nll = Mean.of(image_cross_entropy(similarity, labels, candidates), mask)
        text_nll = Mean.of(text_cross_entropy(similarity, labels, batch.get("mask")), present)
        logits = jnp.where(candidates, similarity, _NEVER)
        correct = Mean.of(jnp.argmax(logits, axis=-1) == labels, mask)
        metrics = {"nll": nll, "text_nll": text_nll, "accuracy": correct}
        total = nll.value() + self.text_weight * text_nll.value()
        return total, Aux(state, metrics, nll.weight, logits[:, first:])

    def predict(self, variables: Variables, batch: Batch) -> Array:
        """Returns similarities to ``texts``, [B, C] float32; -1e9 where there is no class."""
        similarity, present, _ = self.replace(seen=None)._similarity(variables, batch, None)
        return jnp.where(present, similarity, _NEVER)


class ZeroShotClassification(ModuleObjective):
    """Classification of images by given features of texts: what is computed once is not repeated.

    Metrics: ``nll`` and ``accuracy`` among the candidates, ``accuracy_all`` among all.

    Attributes:
      features: [N, D] unit features of texts, from ``ImageTextClassification.text_features``.
      candidates: [N] bool, the classes that images choose among; None = all.
    """

    features: Array
    candidates: Array | None = None

    def predict(self, variables: Variables, batch: Batch) -> Array:
        """Returns similarities to all texts, [B, N] float32."""
        return self._similarity(variables, batch, None)[0]

    def _similarity(
        self, variables: Variables, batch: Batch, rng: Array | None
    ) -> tuple[Array, PyTree]:
        images, state = self.apply(variables, batch, rng, method="encode_image")
        scale = jnp.exp(jax.lax.stop_gradient(variables.params["logit_scale"]))
        return scale * unit(images.astype(jnp.float32)) @ self.features.T, state

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        similarity, state = self._similarity(variables, batch, rng)
        labels, mask = batch["labels"], example_mask(batch, len(similarity))
        among = similarity
        if self.candidates is not None:
            among = jnp.where(self.candidates, similarity, _NEVER)
        nll = Mean.of(image_cross_entropy(among, labels), mask)
        metrics = {"nll": nll}
        for name, logits in (("accuracy", among), ("accuracy_all", similarity)):
            metrics[name] = Mean.of(jnp.argmax(logits, axis=-1) == labels, mask)
        return nll.value(), Aux(state, metrics, nll.weight, among)
