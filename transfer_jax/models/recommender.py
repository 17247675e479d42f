"""Sequential recommenders: BERT4Rec, SASRec and GRU4Rec are one network with different fields.

BERT4Rec (Sun et al. 2019) is a bidirectional post-norm Transformer over item embeddings whose head
scores items by the same table; SASRec's is causal; GRU4Rec has recurrent layers in its place.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from transfer_jax.nn.blocks import ACTIVATIONS
from transfer_jax.nn.recurrent import GRU
from transfer_jax.nn.transformer import TransformerConfig, TransformerStack, make_norm, take_at

Array = jax.Array

ENCODERS = ("transformer", "gru")
HEADS = ("bert", "dot")
ALIGNMENTS = ("left", "right")

# The item table and the items' biases are split over the axis ``model``, all else stays whole.
PARTITION_RULES = (
    (r"(^|/)items/embedding$", PartitionSpec("model")),
    (r"(^|/)output_bias$", PartitionSpec("model")),
)


def encoder_stack(features: int, **fields: Any) -> TransformerConfig:
    """The layers of BERT4Rec: post-norm, exact GELU, heads of width 32, two layers.

    ``causal=True`` makes them SASRec's in all that matters here: the mask.
    """
    base = {
        "features": features, "num_layers": 2, "num_heads": max(1, features // 32),
        "norm_first": False, "final_norm": False, "norm_eps": 1e-12,
    }  # fmt: skip
    return TransformerConfig(**{**base, **fields})


class SequentialRecommender(nn.Module, kw_only=True):
    """Sequences of items to vectors whose dot products with the item table score the next item.

    Rows of the table: 0 is padding, 1 … n are the items, n + 1 is [MASK]; further rows are never
    fed. Padding is what is 0, so ``lengths`` are not needed.

    Attributes:
      num_items: n.
      max_length: N, rows of the position table and the longest sequence.
      stack: layers; ``causal`` tells SASRec from BERT4Rec. Of a GRU ``features``, ``num_layers``,
        ``dropout`` and ``dtype`` are read.
      encoder: one of ``ENCODERS``.
      positions: learned positions, counted from the left end of the row; False = none.
      norm_embeddings: a norm after the embeddings, as BERT has; GRU4Rec has none.
      alignment: where sequences that are shorter than their row begin (``left``) or end
        (``right``).
      head: ``bert``: dense, GELU, norm, dot product, bias; ``dot``: dot product alone.
      special_rows: rows besides the items that a softmax over all rows sees: padding, [MASK], and
        in the released code two more.
      round_rows_to: the table is filled up to a multiple of this, to be split evenly; such rows
        never score.
    """

    num_items: int
    max_length: int
    stack: TransformerConfig
    encoder: str = "transformer"
    positions: bool = True
    norm_embeddings: bool = True
    alignment: str = "left"
    head: str = "bert"
    special_rows: int = 2
    round_rows_to: int = 1

    @property
    def mask_id(self) -> int:
        """The row of [MASK]."""
        return self.num_items + 1

    @property
    def rows(self) -> int:
        """Rows of the item table."""
        return -(-(self.num_items + self.special_rows) // self.round_rows_to) * self.round_rows_to

    def setup(self):
        s = self.stack
        for field, allowed in (("encoder", ENCODERS), ("head", HEADS), ("alignment", ALIGNMENTS)):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field}={getattr(self, field)!r}; choose one of {', '.join(allowed)}"
                )
        if self.special_rows < 2:
            raise ValueError(f"special_rows={self.special_rows}: padding and [MASK] need two")
        if self.encoder == "gru" and self.alignment == "right":
            raise ValueError("encoder='gru' reads from the left: alignment must be 'left'")
        init = nn.initializers.truncated_normal(0.02)
        self.items = nn.Embed(self.rows, s.features, embedding_init=init, dtype=s.dtype)
        if self.positions:
            self.position_table = nn.Embed(
                self.max_length, s.features, embedding_init=init, dtype=s.dtype
            )
        if self.norm_embeddings:
            self.embedding_norm = make_norm(s)
        self.drop = nn.Dropout(s.dropout)
        if self.encoder == "transformer":
            self.body: Any = TransformerStack(s)
        else:
            self.body = [GRU(s.features, dtype=s.dtype) for _ in range(s.num_layers)]
        if self.head == "bert":
            self.transform = nn.Dense(s.features, kernel_init=init, dtype=s.dtype)
            self.transform_norm = make_norm(s)
            self.output_bias = self.param("output_bias", nn.initializers.zeros, (self.rows,))

    def embed(self, inputs: Array, *, train: bool = False) -> Array:
        """Items int [B, L] to [B, L, d], with positions, norm and dropout."""
        length = inputs.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"sequences of {length} items; this model has positions for {self.max_length}"
            )
        x = self.items(inputs)
        if self.positions:
            x = x + self.position_table(jnp.arange(length))
        if self.norm_embeddings:
            x = self.embedding_norm(x)
        return self.drop(x, deterministic=False) if train else x

    def encode(self, inputs: Array, where: Array | None = None, *, train: bool = False) -> Array:
        """Hidden states [B, L, d] of items int [B, L]; or [B, P, d] at ``where``, int [B, P]."""
        x = self.embed(inputs, train=train)
        return self.encode_embedded(x, inputs > 0, where, train=train)

    def encode_embedded(
        self, x: Array, valid: Array, where: Array | None = None, *, train: bool = False
    ) -> Array:
        """As ``encode`` for embeddings [B, L, d], of which those of ``valid`` [B, L] are items."""
        if self.encoder == "gru":
            for layer in self.body:
                x = layer(x)  # padding comes last, and is read by nothing before it
                x = self.drop(x, deterministic=False) if train else x
            return x if where is None else take_at(x, where)
        if self.alignment == "left":
            lengths = jnp.maximum(valid.sum(axis=1), 1)  # a row of padding sees something too
            return self.body(x, lengths=lengths, where=where, train=train)
        seen = valid[:, None, :] | jnp.eye(x.shape[1], dtype=bool)
        return self.body(x, mask=seen[:, None], where=where, train=train)

    def queries(self, hidden: Array) -> Array:
        """The head: hidden states [..., d] to what the items are multiplied with, [..., d]."""
        if self.head == "dot":
            return hidden
        return self.transform_norm(ACTIVATIONS["gelu"](self.transform(hidden)))

    def queries_at(self, inputs: Array, where: Array, *, train: bool = False) -> Array:
        """Queries [B, P, d] at positions ``where``, int [B, P], of items int [B, L]."""
        return self.queries(self.encode(inputs, where, train=train))

    def represent(self, inputs: Array, *, train: bool = False) -> Array:
        """The hidden state of the last item, [B, d]: what stands for the sequence."""
        return self.encode(inputs, last_position(inputs)[:, None], train=train)[:, 0]

    def __call__(
        self, inputs: Array, *, lengths: Array | None = None, train: bool = False
    ) -> Array:
        """Queries [B, L, d] at all positions of items int [B, L]; see ``output``.

        Args:
          inputs: int [B, L], 0 = padding.
          lengths: not used.
          train: dropout on.
        """
        del lengths
        return self.queries(self.encode(inputs, train=train))

    def output(self) -> tuple[Array, Array | None]:
        """What scores rows, ``queries @ table.T + bias``: table [rows, d], bias [rows] or None."""
        return self.items.embedding, self.output_bias if self.head == "bert" else None


def last_position(inputs: Array) -> Array:
    """Where the last item of each row is, int32 [B], for either alignment; 0 in rows of padding."""
    places = jnp.arange(inputs.shape[1], dtype=jnp.int32)
    return jnp.max(jnp.where(inputs > 0, places, 0), axis=1)
