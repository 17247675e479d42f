"""A small problem that many tests share: two-layer network, four classes, learnable labels."""

import flax.linen as nn
import jax
import numpy as np

from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.sources import ArraySource
from transfer_jax.objectives import Classification


class Net(nn.Module):
    """Dense 16 -> 32 -> 4 with dropout."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(32, name="body")(x))
        x = nn.Dropout(self.rate, deterministic=not train)(x)
        return nn.Dense(4, name="head")(x)


class Normed(nn.Module):
    """With batch statistics: state besides parameters."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(
            nn.Dense(8, use_bias=False)(x)
        )
        return nn.Dense(4, name="head")(x)


def source(size=256, seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(size, 16)).astype(np.float32)
    labels = np.abs(inputs[:, :4]).argmax(axis=1).astype(np.int32)
    return ArraySource({"inputs": inputs, "labels": labels})


def train_data(batch_size=32, seed=0, size=256):
    return Pipeline(source(size, seed), batch_size, shuffle=True, seed=seed, repeat=True)


def eval_data(batch_size=32, size=100, seed=1):
    return Pipeline(source(size, seed), batch_size)


def classifier(rate=0.0):
    return Classification(module=Net(rate=rate))


def leaves_equal(a, b):
    return all(
        np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
