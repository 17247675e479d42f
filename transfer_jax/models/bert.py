"""BERT and RoBERTa (Devlin et al. 2019; Liu et al. 2019)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from transfer_jax.nn.blocks import ACTIVATIONS
from transfer_jax.nn.transformer import TransformerConfig, TransformerStack, make_norm

Array = jax.Array

HEADS = (None, "masked_lm", "classification")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """An encoder of tokens.

    Attributes:
      vocab_size: V.
      stack: the layers; ``norm_first=False`` and ``final_norm=False`` for BERT and RoBERTa.
      max_positions: rows of the position table.
      position_offset: the position of the first token; 2 for RoBERTa.
      token_types: rows of the segment table.
      roberta: heads as RoBERTa has them, else as BERT.
      head: None (features), 'masked_lm' or 'classification'.
      pooler: with ``head=None``, hold the (unused) parameters of BERT's pooler.
      num_classes: of the classification head.
      classifier_dropout: rate before the classifier.
    """

    vocab_size: int
    stack: TransformerConfig
    max_positions: int = 512
    position_offset: int = 0
    token_types: int = 2
    roberta: bool = False
    head: str | None = None
    pooler: bool = False
    num_classes: int = 2
    classifier_dropout: float = 0.1

    def __post_init__(self):
        if self.head not in HEADS:
            raise ValueError(f"head={self.head!r}; choose one of {HEADS}")


def bert_stack(**fields: Any) -> TransformerConfig:
    """The layers of BERT-base, with ``fields`` changed."""
    base = {
        "features": 768, "num_layers": 12, "num_heads": 12, "norm_first": False,
        "final_norm": False, "norm_eps": 1e-12, "dropout": 0.1, "attention_dropout": 0.1,
    }  # fmt: skip
    return TransformerConfig(**{**base, **fields})


class Bert(nn.Module):
    """Tokens to features, to token logits or to class logits, by ``config.head``.

    Attributes:
      config: see ``BertConfig``.
    """

    config: BertConfig

    def setup(self):
        c, s = self.config, self.config.stack
        init = nn.initializers.normal(s.init_scale)

        def embed(rows: int) -> nn.Embed:
            return nn.Embed(rows, s.features, embedding_init=init, dtype=s.dtype)

        def dense(width: int) -> nn.Dense:
            return nn.Dense(width, kernel_init=init, dtype=s.dtype)

        self.tokens = embed(c.vocab_size)
        self.positions = embed(c.max_positions)
        self.token_types = embed(c.token_types)
        self.embedding_norm = make_norm(s)
        self.drop = nn.Dropout(s.dropout)
        self.stack = TransformerStack(s)
        if c.head == "masked_lm":
            self.transform = dense(s.features)
            self.transform_norm = make_norm(s)
            self.output_bias = self.param("output_bias", nn.initializers.zeros, (c.vocab_size,))
        elif c.head == "classification":
            self.pooler = dense(s.features)
            self.drop_pooled = nn.Dropout(c.classifier_dropout)
            self.classifier = dense(c.num_classes)
        elif c.pooler:
            self.pooler = dense(s.features)

    def embed(
        self, inputs: Array, token_types: Array | None = None, *, train: bool = False
    ) -> Array:
        """Embedded tokens [B, L, H] of int [B, L]."""
        types = jnp.zeros_like(inputs) if token_types is None else token_types
        return self.placed(self.tokens(inputs) + self.token_types(types), train=train)

    def placed(self, x: Array, *, train: bool = False) -> Array:
        """Sums of embeddings [B, L, H] with that of their positions; norm and dropout."""
        c = self.config
        length = x.shape[1]
        if length + c.position_offset > c.max_positions:
            raise ValueError(
                f"{length} tokens do not fit: the position table has {c.max_positions} rows, of "
                f"which the first {c.position_offset} are not used."
            )
        x = self.embedding_norm(x + self.positions(c.position_offset + jnp.arange(length)))
        return self.drop(x, deterministic=False) if train else x

    def features(
        self,
        inputs: Array,
        *,
        lengths: Array | None = None,
        token_types: Array | None = None,
        hidden_states: bool = False,
        train: bool = False,
    ) -> Any:
        """Features [B, L, H]; with ``hidden_states`` also the tuple of all layers' states."""
        x = self.embed(inputs, token_types, train=train)
        return self.stack(x, lengths=lengths, hidden_states=hidden_states, train=train)

    def __call__(
        self,
        inputs: Array,
        *,
        lengths: Array | None = None,
        token_types: Array | None = None,
        train: bool = False,
    ) -> Array:
        """Maps tokens to what the head gives.

        Args:
          inputs: int [B, L].
          lengths: int [B], valid tokens; None = all.
          token_types: int [B, L], segments; None = 0.
          train: dropout on.

        Returns:
          Features [B, L, H], or float32 logits [B, L, V] or [B, num_classes].
        """
        return self.head(
            self.features(inputs, lengths=lengths, token_types=token_types, train=train), train
        )

    def head(self, x: Array, train: bool = False) -> Array:
        """What the head gives for features [B, L, H]."""
        c = self.config
        if c.head == "masked_lm":
            activate = ACTIVATIONS["gelu" if c.roberta else c.stack.activation]
            x = self.transform_norm(activate(self.transform(x)))
            return self.tokens.attend(x).astype(jnp.float32) + self.output_bias
        if c.head == "classification":
            x = x[:, 0]
            if c.roberta and train:
                x = self.drop_pooled(x, deterministic=False)
            x = jnp.tanh(self.pooler(x))
            if train:
                x = self.drop_pooled(x, deterministic=False)
            return self.classifier(x).astype(jnp.float32)
        if c.pooler and self.is_initializing():
            self.pooler(x[:, 0])
        return x

    def pooled(self, features: Array) -> Array:
        """BERT's pooled first token [B, H] of features [B, L, H]."""
        return jnp.tanh(self.pooler(features[:, 0]))
