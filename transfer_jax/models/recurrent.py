"""Plain recurrent networks: embedded or real inputs, a body that runs over time, a linear head.

No residuals and no norms, as in the systems of Lipton, Berkowitz and Elkan (2015); for stacks of
residual blocks see ``models.sequence``.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any

HEADS = ("steps", "last", "mean")


class RecurrentNetwork(nn.Module, kw_only=True):
    """Sequences to one output per step, or per sequence.

    Attributes:
      body: maps [B, L, F] to [B, L, H] and takes ``lengths`` and ``train``: ``nn.Recurrent`` or any
        other mixer.
      outputs: width O of the output.
      head: 'steps' (one output at each step), 'last' (after the last valid step) or 'mean' (of the
        features of the valid steps). For a body in both directions, 'last' is what each direction
        knows after its last step.
      vocab_size: inputs are int tokens [B, L] below this; None = real inputs [B, L, F].
      embedding: width of embedded tokens; None = one-hot tokens.
      dropout: rate on the body's inputs and outputs.
      dtype: of the head's arithmetic.
    """

    body: Any
    outputs: int
    head: str = "steps"
    vocab_size: int | None = None
    embedding: int | None = None
    dropout: float = 0.0
    dtype: Any = None

    def setup(self):
        if self.head not in HEADS:
            raise ValueError(f"head={self.head!r}; choose one of {', '.join(HEADS)}")
        if self.embedding is not None:
            if self.vocab_size is None:
                raise ValueError("embedding is the width of tokens: give vocab_size")
            self.embed = nn.Embed(self.vocab_size, self.embedding, dtype=self.dtype)
        self.output = nn.Dense(self.outputs, dtype=self.dtype)
        self.drop = nn.Dropout(self.dropout)

    def encode(self, inputs: Array, train: bool = False) -> Array:
        """What the body reads, [B, L, F]."""
        tokens = jnp.issubdtype(inputs.dtype, jnp.integer)
        if tokens != (self.vocab_size is not None):
            wanted = "real inputs" if self.vocab_size is None else "int tokens"
            raise ValueError(
                f"vocab_size={self.vocab_size} means {wanted}, got {inputs.dtype}{inputs.shape}"
            )
        if self.embedding is not None:
            inputs = self.embed(inputs)
        elif self.vocab_size is not None:
            return jax.nn.one_hot(inputs, self.vocab_size, dtype=self.dtype or jnp.float32)
        return self.drop(inputs, deterministic=not train)

    def __call__(
        self, inputs: Array, *, lengths: Array | None = None, train: bool = False
    ) -> Array:
        """Maps sequences to float32 [B, L, O] or [B, O].

        Args:
          inputs: int [B, L] or real [B, L, F].
          lengths: int [B], valid steps; None = all.
          train: dropout on.
        """
        x = self.body(self.encode(inputs, train), lengths=lengths, train=train)
        if self.head == "last":
            x = self._last(x, lengths)
        elif self.head == "mean":
            valid = jnp.full(x.shape[:1], x.shape[1]) if lengths is None else lengths
            inside = (jnp.arange(x.shape[1]) < valid[:, None])[..., None]
            x = jnp.where(inside, x, 0).sum(1) / jnp.maximum(valid, 1)[:, None]
        return self.read(x, train)

    def read(self, features: Array, train: bool = False) -> Array:
        """The head: float32 [..., O] of features [..., H]."""
        return self.output(self.drop(features, deterministic=not train)).astype(jnp.float32)

    def _last(self, x: Array, lengths: Array | None) -> Array:
        if lengths is None:
            last = x[:, -1]
        else:
            index = jnp.maximum(lengths - 1, 0)[:, None, None]
            last = jnp.take_along_axis(x, index, axis=1)[:, 0]
        if not getattr(self.body, "bidirectional", False):
            return last
        if self.body.merge != "concat":
            raise ValueError("head='last' of two directions needs merge='concat'")
        half = x.shape[-1] // 2
        return jnp.concatenate([last[:, :half], x[:, 0, half:]], axis=-1)


class RecurrentLanguageModel(RecurrentNetwork, kw_only=True):
    """Next-token logits; ``outputs`` is the vocabulary, and the body reads forward only.

    Generates with ``generate_continuations``.
    """

    def setup(self):
        super().setup()
        if self.head != "steps" or self.outputs != self.vocab_size:
            raise ValueError(
                f"a language model needs head='steps' and outputs = vocab_size; got "
                f"{self.head!r}, {self.outputs} and {self.vocab_size}"
            )
        self.body.discretise()  # refuses a body that reads the future

    def discretise(self, mode: str | None = None) -> tuple[()]:
        """No matrices to prepare for decoding."""
        return ()

    def prefill_logits(
        self, tokens: Array, systems: tuple[()] = (), max_length: int = 0
    ) -> tuple[Array, PyTree]:
        """Logits [B, V] of the token after the prompt [B, P], and the state."""
        del systems, max_length
        x, state = self.body.prefill(self.encode(tokens))
        return self.read(x[:, -1]), state

    def step_logits(
        self, tokens: Array, state: PyTree, systems: tuple[()] = ()
    ) -> tuple[Array, PyTree]:
        """Logits [B, V] after one more token [B], and the next state."""
        del systems
        x, state = self.body.step(self.encode(tokens[:, None])[:, 0], state)
        return self.read(x), state
