"""A small image encoder: a residual perceptron."""

from typing import Any

import flax.linen as nn
import jax

from transfer_jax.nn import FeedForward

Array = jax.Array


class ResidualMLP(nn.Module):
    """Images to embeddings by a perceptron with pre-norm residual blocks: small and quick.

    Attributes:
      embedding: width of the output, D.
      features: H.
      depth: number of blocks.
      expand: the hidden width of a block is ``expand * H``.
      dtype: compute dtype.
    """

    embedding: int
    features: int = 128
    depth: int = 8
    expand: int = 2
    dtype: Any = None

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> Array:
        """Maps images [B, ...] to embeddings [B, D], not normalised."""
        del train
        x = inputs.reshape(inputs.shape[0], -1)
        x = nn.Dense(self.features, dtype=self.dtype, name="stem")(x)
        for i in range(self.depth):
            y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=f"norm_{i}")(x)
            x += FeedForward(self.features, self.expand, dtype=self.dtype, name=f"blocks_{i}")(y)
        x = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm_after")(x)
        return nn.Dense(self.embedding, use_bias=False, dtype=self.dtype, name="projection")(x)
