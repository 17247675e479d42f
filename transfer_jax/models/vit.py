"""Vision Transformers: ViT, DeiT, and the image tower of CLIP.

Dosovitskiy et al. (2021), Touvron et al. (2021), Radford et al. (2021).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from transfer_jax.nn.transformer import TransformerConfig, TransformerStack, make_norm

Array = jax.Array

HEADS = (None, "projection", "classification", "distilled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """An encoder of images.

    Attributes:
      stack: the layers.
      image_size: (height, width) in pixels, or the side of a square.
      patch_size: side of the square patches, in pixels.
      channels: of the images.
      patch_bias: the embedding of the patches has a bias; not in CLIP.
      norm_before: a norm before the first layer (CLIP).
      distillation_token: a second token after the class token (DeiT).
      head: None (features of all tokens), 'projection' (of the class token, without a bias: CLIP),
        'classification' (of the class token), or 'distilled' (the mean of a classifier of the class
        token and one of the distillation token).
      pooler: with ``head=None``, hold the (unused) parameters of a pooler.
      projection: width of the projection.
      num_classes: of the classifiers.

    Raises:
      ValueError: the patches do not tile the image, or the head is unknown or lacks its token.
    """

    stack: TransformerConfig
    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    channels: int = 3
    patch_bias: bool = True
    norm_before: bool = False
    distillation_token: bool = False
    head: str | None = None
    pooler: bool = False
    projection: int = 512
    num_classes: int = 1000

    def __post_init__(self):
        if self.head not in HEADS:
            raise ValueError(f"head={self.head!r}; choose one of {HEADS}")
        if self.head == "distilled" and not self.distillation_token:
            raise ValueError("head='distilled' needs distillation_token=True")
        if any(side % self.patch_size for side in self.size):
            raise ValueError(
                f"patches of {self.patch_size} x {self.patch_size} pixels do not tile images of "
                f"{self.size[0]} x {self.size[1]}: patch_size must divide both sides."
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.size[0] // self.patch_size, self.size[1] // self.patch_size

    @property
    def extra_tokens(self) -> int:
        """Tokens before the patches."""
        return 1 + self.distillation_token


def vit_stack(**fields: Any) -> TransformerConfig:
    """The layers of ViT-B and DeiT-B, with ``fields`` changed."""
    base = {"features": 768, "num_layers": 12, "num_heads": 12, "norm_eps": 1e-12}
    return TransformerConfig(**{**base, **fields})


class VisionTransformer(nn.Module):
    """Images to features, to an embedding or to class logits, by ``config.head``.

    Attributes:
      config: see ``ViTConfig``.
    """

    config: ViTConfig

    def setup(self):
        c, s = self.config, self.config.stack
        init = nn.initializers.normal(s.init_scale)

        def dense(width: int, use_bias: bool = True) -> nn.Dense:
            return nn.Dense(width, use_bias=use_bias, kernel_init=init, dtype=s.dtype)

        side = (c.patch_size, c.patch_size)
        self.patches = nn.Conv(
            s.features, side, side, padding="VALID", use_bias=c.patch_bias, kernel_init=init,
            dtype=s.dtype,
        )  # fmt: skip
        self.class_token = self.param("class_token", init, (s.features,))
        if c.distillation_token:
            self.distillation_token = self.param("distillation_token", init, (s.features,))
        rows = c.extra_tokens + c.grid[0] * c.grid[1]
        self.positions = self.param("positions", init, (rows, s.features))
        if c.norm_before:
            self.norm_before = make_norm(s)
        self.drop = nn.Dropout(s.dropout)
        self.stack = TransformerStack(s)
        if c.head == "projection":
            self.projection = dense(c.projection, use_bias=False)
        elif c.head is not None:
            self.classifier = dense(c.num_classes)
            if c.head == "distilled":
                self.distillation_classifier = dense(c.num_classes)
        elif c.pooler:
            self.pooler = dense(s.features)

    def embed(self, inputs: Array, *, train: bool = False) -> Array:
        """Tokens [B, N, H] of images [B, height, width, channels]: class, distillation, patches.

        Raises:
          ValueError: images of another size than ``config.image_size``.
        """
        c = self.config
        if inputs.shape[1:] != (*c.size, c.channels):
            raise ValueError(
                f"images of shape {inputs.shape} were given; this model takes "
                f"[B, {c.size[0]}, {c.size[1]}, {c.channels}]. Its positions can be changed to "
                "another size with transfer_jax.interop.resize_images."
            )
        x = self.patches(inputs)
        x = x.reshape(inputs.shape[0], -1, c.stack.features)
        first = [self.class_token]
        if c.distillation_token:
            first.append(self.distillation_token)
        tokens = jnp.stack(first).astype(x.dtype)
        tokens = jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape))
        x = jnp.concatenate([tokens, x], axis=1) + self.positions.astype(x.dtype)
        if train:
            x = self.drop(x, deterministic=False)
        return self.norm_before(x) if c.norm_before else x

    def features(self, inputs: Array, *, hidden_states: bool = False, train: bool = False) -> Any:
        """Features [B, N, H] of all tokens; with ``hidden_states`` also all layers' states."""
        x = self.embed(inputs, train=train)
        return self.stack(x, hidden_states=hidden_states, train=train)

    def __call__(
        self, inputs: Array, *, lengths: Array | None = None, train: bool = False
    ) -> Array:
        """Maps images to what the head gives.

        Args:
          inputs: [B, height, width, channels].
          lengths: None; images have no padding.
          train: dropout on.

        Returns:
          Features [B, N, H], embeddings [B, projection] (not normalised), or float32 logits
          [B, num_classes].
        """
        del lengths
        c = self.config
        x = self.features(inputs, train=train)
        if c.head == "projection":
            return self.projection(x[:, 0])
        if c.head == "distilled":
            logits, distilled = self._classify(x)
            return (logits + distilled) / 2
        if c.head == "classification":
            return self.classifier(x[:, 0]).astype(jnp.float32)
        if c.pooler and self.is_initializing():
            self.pooler(x[:, 0])
        return x

    def both_logits(self, inputs: Array, *, train: bool = False) -> tuple[Array, Array]:
        """With ``head='distilled'``: logits of the classifier and of the distillation classifier.

        In training, the first learn from the labels and the second from a teacher.
        """
        return self._classify(self.features(inputs, train=train))

    def _classify(self, x: Array) -> tuple[Array, Array]:
        logits, distilled = self.classifier(x[:, 0]), self.distillation_classifier(x[:, 1])
        return logits.astype(jnp.float32), distilled.astype(jnp.float32)

    def pooled(self, features: Array) -> Array:
        """The pooler's first token [B, H] of features [B, N, H]."""
        return jnp.tanh(self.pooler(features[:, 0]))
