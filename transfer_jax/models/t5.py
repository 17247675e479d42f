"""T5 (Raffel et al. 2020), versions 1.0 and 1.1."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from transfer_jax.models.encoder_decoder import EncoderDecoder
from transfer_jax.nn.transformer import TransformerConfig, TransformerStack

Array = jax.Array

HEADS = (None, "lm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """An encoder of tokens and a decoder of others that attends to it.

    Attributes:
      vocab_size: V, one table for both sides.
      encoder: its layers.
      decoder: its layers, causal and with cross-attention.
      tie_embeddings: logits are products with the embeddings, of features times H^-0.5 (version
        1.0); else there is an output layer of its own (1.1).
      head: 'lm' for logits, None for the decoder's features.
    """

    vocab_size: int
    encoder: TransformerConfig
    decoder: TransformerConfig
    tie_embeddings: bool = True
    head: str | None = "lm"

    def __post_init__(self):
        if self.head not in HEADS:
            raise ValueError(f"head={self.head!r}; choose one of {HEADS}")
        if not (self.decoder.causal and self.decoder.cross_attention):
            raise ValueError("the decoder needs causal=True and cross_attention=True")

    @property
    def embedding_scale(self) -> float:
        """The standard deviation of the embeddings' initial values."""
        return 1.0


def t5_config(
    *,
    vocab_size: int = 32_128,
    decoder_layers: int | None = None,
    tie_embeddings: bool = True,
    head: str | None = "lm",
    **fields: Any,
) -> T5Config:
    """T5-small, with some of it changed.

    Args:
      vocab_size: see ``T5Config``.
      decoder_layers: depth of the decoder; None = that of the encoder.
      tie_embeddings: see ``T5Config``; version 1.1 also has ``activation='gelu_tanh'`` and
        ``gated=True``.
      head: see ``T5Config``.
      **fields: of ``TransformerConfig``, for both stacks.
    """
    base = {
        "features": 512, "num_layers": 6, "num_heads": 8, "head_dim": 64, "hidden": 2048,
        "activation": "relu", "use_bias": False, "norm": "rms", "norm_eps": 1e-6,
        "attention_scale": 1.0, "relative_buckets": 32, "dropout": 0.1, "attention_dropout": 0.1,
        "activation_dropout": 0.1, "init_scale": None,
    }  # fmt: skip
    encoder = TransformerConfig(**{**base, **fields})
    decoder = dataclasses.replace(
        encoder, num_layers=decoder_layers or encoder.num_layers, causal=True, cross_attention=True
    )
    return T5Config(
        vocab_size=vocab_size, encoder=encoder, decoder=decoder,
        tie_embeddings=tie_embeddings, head=head,
    )  # fmt: skip


class T5(EncoderDecoder):
    """Tokens, and the target's tokens so far, to logits of the target's next ones.

    Attributes:
      config: see ``T5Config``.
    """

    config: T5Config

    def setup(self):
        c = self.config
        init = nn.initializers.normal(c.embedding_scale)
        features, dtype = c.encoder.features, c.encoder.dtype
        self.tokens = nn.Embed(c.vocab_size, features, embedding_init=init, dtype=dtype)
        self.encoder = TransformerStack(c.encoder)
        self.decoder = TransformerStack(c.decoder)
        self.drop = nn.Dropout(c.encoder.dropout)
        if c.head == "lm" and not c.tie_embeddings:
            init = nn.initializers.normal(features**-0.5)
            self.lm_head = nn.Embed(c.vocab_size, features, embedding_init=init, dtype=dtype)

    def _run(self, stack: nn.Module, tokens: Array, train: bool, **options: Any) -> Any:
        """The stack on embedded tokens, with dropout before and after."""

        def drop(x: Array) -> Array:
            return self.drop(x, deterministic=False) if train else x

        y = stack(drop(self.tokens(tokens)), train=train, **options)
        if not options["hidden_states"]:
            return drop(y)
        x = drop(y[0])
        return x, (*y[1][:-1], x)

    def encode(
        self,
        inputs: Array,
        *,
        lengths: Array | None = None,
        hidden_states: bool = False,
        train: bool = False,
    ) -> Any:
        """Features [B, S, H] of int [B, S]; with ``hidden_states`` also all layers' states."""
        return self._run(self.encoder, inputs, train, lengths=lengths, hidden_states=hidden_states)

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
        return self._run(
            self.decoder, decoder_inputs, train, lengths=lengths, context=context,
            context_lengths=context_lengths, hidden_states=hidden_states,
        )  # fmt: skip

    def logits(self, features: Array) -> Array:
        """Float32 logits [..., V] of the decoder's features [..., H]."""
        if self.config.tie_embeddings:
            features = features * self.config.decoder.features**-0.5
            return self.tokens.attend(features).astype(jnp.float32)
        return self.lm_head.attend(features).astype(jnp.float32)

    def embed_target(self, tokens: Array, start: Array | int) -> Array:
        """Embedded tokens [B, T, H] of a target; positions are relative."""
        del start
        return self.tokens(tokens)
