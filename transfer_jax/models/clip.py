"""CLIP: images and texts in one space (Radford et al. 2021)."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from transfer_jax.models.vit import VisionTransformer, ViTConfig
from transfer_jax.nn.transformer import TransformerConfig, TransformerStack

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipTextConfig:
    """The text tower.

    Attributes:
      vocab_size: V.
      stack: the layers; ``causal=True``.
      max_positions: rows of the position table.
      end_token: a text's features are those of its first token with this number; None = of its
        largest number, which in CLIP's vocabulary is the end of the text.
      projection: width of the embedding.
    """

    vocab_size: int
    stack: TransformerConfig
    max_positions: int = 77
    end_token: int | None = None
    projection: int = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Two towers.

    Attributes:
      image: with ``head='projection'``.
      text: of the same ``projection``.
      logit_scale: the logarithm of the scale of the cosines, at first.
    """

    image: ViTConfig
    text: ClipTextConfig
    logit_scale: float = math.log(1 / 0.07)

    def __post_init__(self):
        if self.image.head != "projection" or self.image.projection != self.text.projection:
            raise ValueError(
                f"the towers must project to one space: the image tower has "
                f"head={self.image.head!r} and projection={self.image.projection}, the text tower "
                f"projection={self.text.projection}."
            )


def clip_vit_b(patch_size: int = 16, **fields: Any) -> ClipConfig:
    """CLIP ViT-B/16 or ViT-B/32, with ``fields`` of both towers' layers changed."""
    base = {"num_layers": 12, "activation": "quick_gelu"}
    image = TransformerConfig(**{**base, "features": 768, "num_heads": 12, **fields})
    text = TransformerConfig(**{**base, "features": 512, "num_heads": 8, "causal": True, **fields})
    return ClipConfig(
        image=ViTConfig(
            stack=image, patch_size=patch_size, patch_bias=False, norm_before=True,
            head="projection",
        ),
        text=ClipTextConfig(vocab_size=49_408, stack=text),
    )  # fmt: skip


class ClipText(nn.Module):
    """Texts to embeddings.

    Attributes:
      config: see ``ClipTextConfig``.
    """

    config: ClipTextConfig

    def setup(self):
        c, s = self.config, self.config.stack
        init = nn.initializers.normal(s.init_scale)
        self.tokens = nn.Embed(c.vocab_size, s.features, embedding_init=init, dtype=s.dtype)
        self.positions = nn.Embed(c.max_positions, s.features, embedding_init=init, dtype=s.dtype)
        self.stack = TransformerStack(s)
        self.projection = nn.Dense(c.projection, use_bias=False, kernel_init=init, dtype=s.dtype)

    def features(self, inputs: Array, *, hidden_states: bool = False, train: bool = False) -> Any:
        """Features [B, L, H]; with ``hidden_states`` also the tuple of all layers' states."""
        length = inputs.shape[1]
        if length > self.config.max_positions:
            raise ValueError(
                f"{length} tokens do not fit: the position table has "
                f"{self.config.max_positions} rows."
            )
        x = self.tokens(inputs) + self.positions(jnp.arange(length))
        return self.stack(x, hidden_states=hidden_states, train=train)

    def __call__(
        self, inputs: Array, *, lengths: Array | None = None, train: bool = False
    ) -> Array:
        """Maps texts to embeddings, not normalised.

        Args:
          inputs: int [B, L], each row with an end token.
          lengths: not needed: the tower is causal, and what follows the end token reaches nothing.
          train: dropout on.

        Returns:
          [B, projection].
        """
        del lengths
        token = self.config.end_token
        ends = jnp.argmax(inputs if token is None else inputs == token, axis=1)
        x = self.features(inputs, train=train)
        return self.projection(jnp.take_along_axis(x, ends[:, None, None], axis=1)[:, 0])


class Clip(nn.Module):
    """Images and texts to their scaled cosines.

    Submodules ``image`` and ``text``, and the parameter ``logit_scale``.

    Attributes:
      config: see ``ClipConfig``.
    """

    config: ClipConfig

    def setup(self):
        self.image = VisionTransformer(self.config.image)
        self.text = ClipText(self.config.text)
        constant = nn.initializers.constant(self.config.logit_scale)
        self.logit_scale = self.param("logit_scale", constant, ())

    def encode_image(self, inputs: Array, *, train: bool = False) -> Array:
        """Embeddings [B, D] of images [B, height, width, channels], not normalised."""
        return self.image(inputs, train=train)

    def encode_text(self, tokens: Array, *, train: bool = False) -> Array:
        """Embeddings [B, D] of texts int [B, L], not normalised."""
        return self.text(tokens, train=train)

    def __call__(self, inputs: Array, tokens: Array, *, train: bool = False) -> Array:
        """``exp(logit_scale)`` times the cosine of every image with every text.

        Args:
          inputs: images [B, height, width, channels].
          tokens: texts, int [N, L], each with an end token.
          train: dropout on.

        Returns:
          float32 [B, N]; the transpose are the logits of the texts.
        """
        images = self.encode_image(inputs, train=train).astype(jnp.float32)
        texts = self.encode_text(tokens, train=train).astype(jnp.float32)
        images = images / jnp.linalg.norm(images, axis=-1, keepdims=True)
        texts = texts / jnp.linalg.norm(texts, axis=-1, keepdims=True)
        return jnp.exp(self.logit_scale) * images @ texts.T
