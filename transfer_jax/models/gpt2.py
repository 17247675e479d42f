"""GPT-2 (Radford et al. 2019)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from transfer_jax.nn.transformer import StackState, TransformerConfig, TransformerStack

Array = jax.Array

HEADS = (None, "lm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """A causal language model.

    Attributes:
      vocab_size: V.
      stack: the layers; ``causal=True``.
      max_positions: rows of the position table.
      embedding_dropout: rate on the embedded tokens.
      head: 'lm' for logits, None for features.
    """

    vocab_size: int
    stack: TransformerConfig
    max_positions: int = 1024
    embedding_dropout: float = 0.1
    head: str | None = "lm"

    def __post_init__(self):
        if self.head not in HEADS:
            raise ValueError(f"head={self.head!r}; choose one of {HEADS}")
        if not self.stack.causal:
            raise ValueError("the stack of a language model needs causal=True")


def gpt2_stack(**fields: Any) -> TransformerConfig:
    """The layers of GPT-2 small, with ``fields`` changed."""
    base = {
        "features": 768, "num_layers": 12, "num_heads": 12, "activation": "gelu_tanh",
        "causal": True, "dropout": 0.1, "attention_dropout": 0.1,
    }  # fmt: skip
    return TransformerConfig(**{**base, **fields})


class GPT2(nn.Module):
    """Tokens to the logits of the next ones, or to features, by ``config.head``.

    ``transfer_jax.models.generate`` continues prompts with it.

    Attributes:
      config: see ``GPT2Config``.
    """

    config: GPT2Config

    def setup(self):
        c, s = self.config, self.config.stack
        init = nn.initializers.normal(s.init_scale)
        self.tokens = nn.Embed(c.vocab_size, s.features, embedding_init=init, dtype=s.dtype)
        self.positions = nn.Embed(c.max_positions, s.features, embedding_init=init, dtype=s.dtype)
        self.drop = nn.Dropout(c.embedding_dropout)
        self.stack = TransformerStack(s)

    def _check(self, length: int) -> None:
        if length > self.config.max_positions:
            raise ValueError(
                f"{length} tokens do not fit: the position table has "
                f"{self.config.max_positions} rows."
            )

    def features(
        self,
        inputs: Array,
        *,
        lengths: Array | None = None,
        hidden_states: bool = False,
        train: bool = False,
    ) -> Any:
        """Features [B, L, H]; with ``hidden_states`` also the tuple of all layers' states.

        Padding after ``lengths`` reaches no valid position in any case.
        """
        del lengths
        self._check(inputs.shape[1])
        x = self.tokens(inputs) + self.positions(jnp.arange(inputs.shape[1]))
        if train:
            x = self.drop(x, deterministic=False)
        return self.stack(x, hidden_states=hidden_states, train=train)

    def logits(self, features: Array) -> Array:
        """Logits float32 [..., V] of features [..., H]; the table is that of the embeddings."""
        return self.tokens.attend(features).astype(jnp.float32)

    def __call__(
        self, inputs: Array, *, lengths: Array | None = None, train: bool = False
    ) -> Array:
        """Maps tokens to what the head gives.

        Args:
          inputs: int [B, L].
          lengths: int [B], valid tokens; None = all.
          train: dropout on.

        Returns:
          Features [B, L, H], or float32 logits [B, L, V] of the token after each.
        """
        x = self.features(inputs, lengths=lengths, train=train)
        return self.logits(x) if self.config.head == "lm" else x

    def discretise(self, mode: str | None = None) -> tuple[()]:
        """No matrices to prepare for decoding; see ``SequenceModel.discretise``."""
        del mode
        return ()

    def prefill_logits(
        self, tokens: Array, systems: tuple[()] = (), max_length: int = 0
    ) -> tuple[Array, StackState]:
        """Logits [B, V] of the token after the prompt, and the state.

        Args:
          tokens: int [B, P].
          systems: from ``discretise``.
          max_length: how long the sequence will become: the size of the cache.
        """
        self._check(max(max_length, tokens.shape[1]))
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        x, state = self.stack.decode(x, max_length=max_length)
        return self.logits(x[:, -1]), state

    def step_logits(
        self, tokens: Array, state: StackState, systems: tuple[()] = ()
    ) -> tuple[Array, StackState]:
        """Logits [B, V] after one more token, int [B], and the next state."""
        x = self.tokens(tokens) + self.positions(state.position)
        x, state = self.stack.decode(x[:, None], state)
        return self.logits(x[:, 0]), state
