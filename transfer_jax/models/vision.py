"""Small image encoders: a Vision Transformer in CLIP's layout, and a residual perceptron."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from transfer_jax.nn import Attention, FeedForward

Array = jax.Array


class VisionBlock(nn.Module):
    """A pre-norm Transformer block: ``x += attention(norm(x)); x += mlp(norm(x))``.

    Attributes:
      features: H.
      num_heads: divides H.
      expand: the hidden width of the MLP is ``expand * H``.
      dtype: compute dtype.
    """

    features: int
    num_heads: int = 4
    expand: int = 4
    dtype: Any = None

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Maps [B, L, H] to [B, L, H]."""
        y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm_1")(inputs)
        x = inputs + Attention(self.features, self.num_heads, dtype=self.dtype, name="attention")(y)
        y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm_2")(x)
        return x + FeedForward(self.features, self.expand, dtype=self.dtype, name="mlp")(y)


class VisionTransformer(nn.Module):
    """Images to embeddings, with the parameters of CLIP's image tower (Radford et al. 2021).

    Patches without a bias, a class token, learned positions, a norm before and after the blocks,
    and a projection of the class token without a bias. With features 768, depth 12, 12 heads,
    patches of 32 and embeddings of 512 it has the shapes of CLIP ViT-B/32 (there, query, key and
    value are one matrix, and the GELU is approximated by ``x sigmoid(1.702 x)``).

    Attributes:
      embedding: width of the output, D.
      patch_size: side of the square patches, in pixels.
      features: H.
      depth: number of blocks.
      num_heads: divides H.
      expand: the hidden width of the MLPs is ``expand * H``.
      dtype: compute dtype.
    """

    embedding: int
    patch_size: int = 2
    features: int = 48
    depth: int = 4
    num_heads: int = 4
    expand: int = 4
    dtype: Any = None

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> Array:
        """Maps images [B, height, width, channels] to embeddings [B, D], not normalised.

        Raises:
          ValueError: the patches do not tile the image.
        """
        del train
        side = self.patch_size
        if inputs.ndim != 4 or inputs.shape[1] % side or inputs.shape[2] % side:
            raise ValueError(
                f"patches of {side} x {side} pixels do not tile images of shape {inputs.shape}; "
                "[B, height, width, channels] is needed, with sides that patch_size divides."
            )
        patches = nn.Conv(
            self.features, (side, side), (side, side), padding="VALID", use_bias=False,
            dtype=self.dtype, name="patches",
        )(inputs)  # fmt: skip
        x = patches.reshape(inputs.shape[0], -1, self.features)
        normal = nn.initializers.normal(self.features**-0.5)
        token = self.param("class_token", normal, (self.features,))
        positions = self.param("positions", normal, (x.shape[1] + 1, self.features))
        token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.features))
        x = jnp.concatenate([token, x], axis=1) + positions.astype(x.dtype)
        x = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm_before")(x)
        for i in range(self.depth):
            x = VisionBlock(
                self.features, self.num_heads, self.expand, dtype=self.dtype, name=f"blocks_{i}"
            )(x)
        x = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm_after")(x[:, 0])
        return nn.Dense(self.embedding, use_bias=False, dtype=self.dtype, name="projection")(x)


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
