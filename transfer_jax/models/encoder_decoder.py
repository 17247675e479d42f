"""What encoder-decoders have in common: teacher forcing, and decoding token by token."""

from typing import Any

import flax.linen as nn
import jax

from transfer_jax.nn.transformer import StackState

Array = jax.Array


class EncoderDecoder(nn.Module):
    """Base of models that map a source and a target's tokens so far to logits of its next ones.

    Subclasses have ``config.head``, a ``decoder`` stack and the methods ``encode``, ``decode``,
    ``logits`` and ``embed_target``.
    """

    def embed_target(self, tokens: Array, start: Array | int) -> Array:
        """Embedded tokens [B, T, H] of a target, of which the first is at position ``start``."""
        raise NotImplementedError

    def __call__(
        self,
        inputs: Array,
        decoder_inputs: Array,
        *,
        lengths: Array | None = None,
        decoder_lengths: Array | None = None,
        train: bool = False,
    ) -> Array:
        """Maps a source and a shifted target to what the head gives.

        Args:
          inputs: int [B, S].
          decoder_inputs: int [B, T].
          lengths: int [B], valid tokens of ``inputs``; None = all.
          decoder_lengths: int [B], valid tokens of ``decoder_inputs``.
          train: dropout on.

        Returns:
          float32 logits [B, T, V], or features [B, T, H].
        """
        model: Any = self
        context = model.encode(inputs, lengths=lengths, train=train)
        x = model.decode(
            decoder_inputs, context, context_lengths=lengths, lengths=decoder_lengths, train=train
        )
        return model.logits(x) if model.config.head == "lm" else x

    def start(self, inputs: Array, *, lengths: Array | None = None, max_length: int) -> StackState:
        """The state before a target's first token.

        Args:
          inputs: int [B, S].
          lengths: int [B], valid tokens of ``inputs``.
          max_length: how many tokens the decoder will be given.
        """
        model: Any = self
        context = model.encode(inputs, lengths=lengths)
        nothing = self.embed_target(inputs[:, :0], 0)
        return model.decoder.decode(
            nothing, max_length=max_length, context=context, context_lengths=lengths
        )[1]

    def step_logits(self, tokens: Array, state: StackState) -> tuple[Array, StackState]:
        """Logits [B, V] after one more token [B] of the target, and the next state."""
        model: Any = self
        x = self.embed_target(tokens[:, None], state.position)
        x, state = model.decoder.decode(x, state)
        return model.logits(x[:, 0]), state
