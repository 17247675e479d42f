"""BART and mBART (Lewis et al. 2020; Liu et al. 2020)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from transfer_jax.models.encoder_decoder import EncoderDecoder
from transfer_jax.nn.transformer import StackState, TransformerConfig, TransformerStack, make_norm

Array = jax.Array

HEADS = (None, "lm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BartConfig:
    """An encoder of tokens and a decoder of others that attends to it.

    Attributes:
      vocab_size: V, one table for both sides and for the logits.
      encoder: its layers; ``norm_first=False`` and ``final_norm=False`` for BART, both True for
        mBART.
      decoder: its layers, causal and with cross-attention.
      max_positions: rows of each side's position table.
      position_offset: the position of the first token.
      scale_embeddings: multiply the embedded tokens by sqrt(H).
      head: 'lm' for logits, None for the decoder's features.
    """

    vocab_size: int
    encoder: TransformerConfig
    decoder: TransformerConfig
    max_positions: int = 1026
    position_offset: int = 2
    scale_embeddings: bool = False
    head: str | None = "lm"

    def __post_init__(self):
        if self.head not in HEADS:
            raise ValueError(f"head={self.head!r}; choose one of {HEADS}")
        if not (self.decoder.causal and self.decoder.cross_attention):
            raise ValueError("the decoder needs causal=True and cross_attention=True")
        for field in ("features", "norm_first"):
            if getattr(self.encoder, field) != getattr(self.decoder, field):
                raise ValueError(f"encoder and decoder differ in {field}")

    @property
    def embedding_scale(self) -> float:
        """The standard deviation of the embeddings' initial values."""
        return 0.02 if self.encoder.init_scale is None else self.encoder.init_scale


def bart_stack(**fields: Any) -> TransformerConfig:
    """The encoder's layers of BART-base, with ``fields`` changed.

    mBART has ``norm_first=True`` and ``final_norm=True``; a decoder ``causal=True`` and
    ``cross_attention=True``.
    """
    base = {
        "features": 768, "num_layers": 6, "num_heads": 12, "norm_first": False,
        "final_norm": False, "dropout": 0.1,
    }  # fmt: skip
    return TransformerConfig(**{**base, **fields})


class Bart(EncoderDecoder):
    """Tokens, and the target's tokens so far, to logits of the target's next ones.

    Attributes:
      config: see ``BartConfig``.
    """

    config: BartConfig

    def setup(self):
        c, e = self.config, self.config.encoder
        init = nn.initializers.normal(c.embedding_scale)

        def embed(rows: int) -> nn.Embed:
            return nn.Embed(rows, e.features, embedding_init=init, dtype=e.dtype)

        self.tokens = embed(c.vocab_size)
        self.encoder_positions = embed(c.max_positions)
        self.decoder_positions = embed(c.max_positions)
        self.encoder_embedding_norm = make_norm(e)
        self.decoder_embedding_norm = make_norm(c.decoder)
        self.encoder = TransformerStack(e)
        self.decoder = TransformerStack(c.decoder)
        self.drop = nn.Dropout(e.dropout)
        if c.head == "lm":
            self.output_bias = self.param("output_bias", nn.initializers.zeros, (c.vocab_size,))

    def _check(self, length: int) -> None:
        c = self.config
        if length + c.position_offset > c.max_positions:
            raise ValueError(
                f"{length} tokens do not fit: the position table has {c.max_positions} rows, of "
                f"which the first {c.position_offset} are not used."
            )

    def _embed(
        self, tokens: Array, table: nn.Module, norm: nn.Module, start: Array | int, train: bool
    ) -> Array:
        """Embedded tokens [B, L, H] of int [B, L], the first of which is number ``start``."""
        c = self.config
        self._check(tokens.shape[1])
        x = self.tokens(tokens)
        if c.scale_embeddings:
            x = x * c.encoder.features**0.5
        x = norm(x + table(c.position_offset + start + jnp.arange(tokens.shape[1])))
        return self.drop(x, deterministic=False) if train else x

    def embed_target(self, tokens: Array, start: Array | int, train: bool = False) -> Array:
        """Embedded tokens [B, T, H] of a target, of which the first is at position ``start``."""
        return self._embed(
            tokens, self.decoder_positions, self.decoder_embedding_norm, start, train
        )

    def encode(
        self,
        inputs: Array,
        *,
        lengths: Array | None = None,
        hidden_states: bool = False,
        train: bool = False,
    ) -> Any:
        """Features [B, S, H] of int [B, S]; with ``hidden_states`` also all layers' states."""
        x = self._embed(inputs, self.encoder_positions, self.encoder_embedding_norm, 0, train)
        return self.encoder(x, lengths=lengths, hidden_states=hidden_states, train=train)

    def decode(
        self,
        decoder_inputs: Array,
        context: Array,
        *,
        context_lengths: Array | None = None,
        lengths: Array | None = None,
        hidden_states: bool = False,
        train: bool = False,
    ) -> Any:
        """Features of a target under teacher forcing.

        Args:
          decoder_inputs: int [B, T], the target shifted right.
          context: [B, S, H] of ``encode``.
          context_lengths: int [B].
          lengths: int [B], valid positions of the target; what comes after reaches none of them
            anyway.
          hidden_states: also return all layers' states.
          train: dropout on.

        Returns:
          [B, T, H].
        """
        x = self.embed_target(decoder_inputs, 0, train)
        return self.decoder(
            x, lengths=lengths, context=context, context_lengths=context_lengths,
            hidden_states=hidden_states, train=train,
        )  # fmt: skip

    def logits(self, features: Array) -> Array:
        """Float32 logits [..., V] of the decoder's features [..., H]; the bias is not trained."""
        bias = jax.lax.stop_gradient(self.output_bias)
        return self.tokens.attend(features).astype(jnp.float32) + bias

    def start(self, inputs: Array, *, lengths: Array | None = None, max_length: int) -> StackState:
        """As ``EncoderDecoder.start``; the positions must suffice for ``max_length``."""
        self._check(max_length)
        return super().start(inputs, lengths=lengths, max_length=max_length)
