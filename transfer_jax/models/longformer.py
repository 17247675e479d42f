"""Longformer (Beltagy et al. 2020): RoBERTa with attention within a window."""

from typing import Any

import jax
import jax.numpy as jnp

from transfer_jax.models.bert import Bert, BertConfig, bert_stack
from transfer_jax.nn.transformer import TransformerConfig

Array = jax.Array


def longformer_stack(**fields: Any) -> TransformerConfig:
    """The layers of Longformer-base, with ``fields`` changed."""
    return bert_stack(**{"norm_eps": 1e-5, "window": 256, **fields})


def longformer_config(**fields: Any) -> BertConfig:
    """Longformer-base for 4,096 tokens, with ``fields`` changed."""
    base = {
        "vocab_size": 50_265, "stack": longformer_stack(), "max_positions": 4_098,
        "position_offset": 2, "token_types": 1, "roberta": True,
    }  # fmt: skip
    return BertConfig(**{**base, **fields})


class Longformer(Bert):
    """Tokens to features, to token logits or to class logits, by ``config.head``.

    Memory and time grow linearly with the length. The parameters are those of RoBERTa, and the
    projections of the global tokens.

    Attributes:
      config: see ``longformer_config``; ``config.stack.window`` is what a token sees on either side
        of it (half of what Longformer's papers and files call the window).
    """

    def features(
        self,
        inputs: Array,
        *,
        lengths: Array | None = None,
        token_types: Array | None = None,
        global_mask: Array | None = None,
        hidden_states: bool = False,
        train: bool = False,
    ) -> Any:
        """Features [B, L, H]; with ``hidden_states`` also the tuple of all layers' states."""
        return self.stack(
            self.embed(inputs, token_types, train=train), lengths=lengths, global_mask=global_mask,
            hidden_states=hidden_states, train=train,
        )  # fmt: skip

    def __call__(
        self,
        inputs: Array,
        *,
        lengths: Array | None = None,
        token_types: Array | None = None,
        global_mask: Array | None = None,
        train: bool = False,
    ) -> Array:
        """Maps tokens to what the head gives.

        Args:
          inputs: int [B, L].
          lengths: int [B], valid tokens; None = all.
          token_types: int [B, L], segments; None = 0.
          global_mask: bool [B, L], tokens that see all and that all see, at most
            ``config.stack.max_global`` of an example; None = none, or the first one for
            classification.
          train: dropout on.

        Returns:
          Features [B, L, H], or float32 logits [B, L, V] or [B, num_classes].
        """
        if global_mask is None and self.config.head == "classification":
            global_mask = jnp.zeros(inputs.shape, bool).at[:, 0].set(True)
        x = self.features(
            inputs, lengths=lengths, token_types=token_types, global_mask=global_mask, train=train
        )
        return self.head(x, train)
