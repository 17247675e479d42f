"""Initial values that neither jax nor flax has."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Initializer = Callable[..., Array]


def torch_uniform(fan_in: int) -> Initializer:
    """U(+-1 / sqrt(fan_in)): how PyTorch draws the weights and biases of linear layers.

    It is Kaiming's uniform with a = sqrt(5). Biases need the inputs of their layer, which their
    shape does not tell.

    Args:
      fan_in: inputs of the layer.
    """
    bound = fan_in**-0.5

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
