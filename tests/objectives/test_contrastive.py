"""Image-text losses: by hand, masks, seen classes, chunks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transfer_jax.objectives import Variables
from transfer_jax.objectives.contrastive import (
    ImageTextClassification,
    ZeroShotClassification,
    image_cross_entropy,
    text_cross_entropy,
    unit,
)


class Towers(nn.Module):
    """Two linear towers to four dimensions."""

    def setup(self):
        self.image = nn.Dense(4)
        self.text = nn.Embed(9, 4)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(1.0), ())

    def __call__(self, inputs, tokens, *, train=False):
        return self.encode_image(inputs, train=train), self.encode_text(tokens, train=train)

    def encode_image(self, inputs, *, train=False):
        return self.image(inputs)

    def encode_text(self, tokens, *, train=False):
        return self.text(tokens).sum(axis=1)


TEXTS = jnp.array([[1, 2], [3, 4], [5, 6], [7, 8]], jnp.int32)


@pytest.fixture(scope="module")
def world():
    task = ImageTextClassification(module=Towers(), texts=TEXTS)
    batch = {
        "inputs": jax.random.normal(jax.random.key(0), (6, 3)),
        "labels": jnp.array([0, 2, 2, 1, 2, 0]),  # labels repeat, and nothing is of class 3
    }
    return task, task.init(jax.random.key(1), batch), batch


@jax.jit
def jitted(task, variables, batch):
    value, aux = task.loss(variables, batch, None)
    return value, {name: mean.value() for name, mean in aux.metrics.items()}


def loss(task, variables, batch):
    value, metrics = jitted(task, variables, batch)
    return value, {name: float(x) for name, x in metrics.items()}


def test_both_cross_entropies_by_hand_with_labels_that_repeat(world):
    task, variables, batch = world
    z, e = (
        x / np.linalg.norm(x, axis=1, keepdims=True)
        for x in map(np.asarray, task.module.apply({"params": variables.params},
                                                   batch["inputs"], TEXTS))
    )  # fmt: skip
    logits = np.exp(1.0) * z @ e.T
    labels = np.asarray(batch["labels"])
    images = -np.log(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    texts = -np.log(np.exp(logits) / np.exp(logits).sum(axis=0, keepdims=True))
    by_class = [texts[labels == c, c].sum() for c in range(4)]
    assert (labels == 2).sum() == 3 and by_class[3] == 0  # a target of 3, and one of none
    value, metrics = loss(task, variables, batch)
    assert metrics["nll"] == pytest.approx(images[np.arange(6), labels].mean(), rel=1e-5)
    assert metrics["text_nll"] == pytest.approx(sum(by_class) / 4, rel=1e-5)
    assert float(value) == pytest.approx(metrics["nll"] + metrics["text_nll"], rel=1e-6)
    images_only, _ = loss(task.replace(text_weight=0.0), variables, batch)
    assert float(images_only) == pytest.approx(metrics["nll"], rel=1e-6)


def test_pairs_give_the_loss_of_clip():
    similarity = 5 * jax.random.normal(jax.random.key(0), (7, 7))
    pairs = jnp.arange(7)
    both = image_cross_entropy(similarity, pairs) + text_cross_entropy(similarity, pairs)
    reference = [
        optax.softmax_cross_entropy_with_integer_labels(x, pairs)
        for x in (similarity, similarity.T)
    ]
    np.testing.assert_allclose(both, sum(reference), rtol=1e-5)


def test_seen_classes_change_nothing_but_the_denominator_of_the_text_loss(world):
    task, variables, batch = world
    seen = unit(jax.random.normal(jax.random.key(3), (5, 4))).at[3:].set(0.0)  # three classes
    _, alone = loss(task, variables, batch)
    more = task.replace(seen=seen)
    _, both = loss(more, variables, batch)
    for name in ("nll", "accuracy"):
        assert both[name] == alone[name]
    assert both["text_nll"] == pytest.approx(alone["text_nll"] * 4 / (4 + 3), rel=1e-6)
    np.testing.assert_array_equal(more.predict(variables, batch), task.predict(variables, batch))


def test_rows_without_tokens_are_no_classes_and_padding_rows_no_images(world):
    task, variables, batch = world
    plain, metrics = loss(task, variables, batch)
    padded = task.replace(texts=jnp.pad(TEXTS, ((0, 3), (0, 0))))
    value, same = loss(padded, variables, batch)
    assert float(value) == pytest.approx(float(plain), rel=1e-6) and same == pytest.approx(metrics)
    assert np.all(np.asarray(padded.predict(variables, batch))[:, 4:] < -1e8)
    longer = {
        "inputs": jnp.concatenate([batch["inputs"], jnp.ones((2, 3))]),
        "labels": jnp.concatenate([batch["labels"], jnp.array([1, 3])]),
        "mask": jnp.array([1.0] * 6 + [0.0] * 2),
    }
    value, same = loss(task, variables, longer)
    assert float(value) == pytest.approx(float(plain), rel=1e-6) and same == pytest.approx(metrics)


def test_given_features_classify_as_the_texts_do_and_candidates_limit_the_choice(world):
    task, variables, batch = world
    features = task.text_features(variables)
    given = ZeroShotClassification(module=task.module, features=features)
    np.testing.assert_allclose(
        given.predict(variables, batch), task.predict(variables, batch), rtol=1e-6
    )
    _, everything = loss(task, variables, batch)
    few = given.replace(candidates=jnp.array([True, True, True, False]))
    _, metrics = loss(few, variables, batch)
    _, without = loss(task.replace(texts=TEXTS[:3]), variables, batch)
    assert metrics["nll"] == pytest.approx(without["nll"], rel=1e-6)
    assert metrics["accuracy"] == without["accuracy"]
    assert metrics["accuracy_all"] == everything["accuracy"]


def test_texts_in_chunks_give_the_same_loss_and_gradient_and_the_scale_none(world):
    task, variables, batch = world

    @jax.jit
    def gradient(task):
        return jax.value_and_grad(lambda p: task.loss(Variables(p, {}), batch, None)[0])(
            variables.params
        )

    value, grads = gradient(task)
    chunked, chunked_grads = gradient(task.replace(chunk=3))
    assert float(chunked) == pytest.approx(float(value), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, chunked_grads)
    assert float(grads["logit_scale"]) == 0.0
    assert all(np.any(grads[tower][leaf] != 0)
               for tower, leaf in (("image", "kernel"), ("text", "embedding")))  # fmt: skip
