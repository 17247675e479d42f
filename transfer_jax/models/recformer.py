"""Recformer (Li et al. 2023, "Text Is All You Need"): a Longformer that reads items as text."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from transfer_jax.models.longformer import Longformer
from transfer_jax.nn.blocks import ACTIVATIONS

Array = jax.Array

POOLINGS = ("cls", "avg")
TOKEN_TYPES = 4  # <s>, the name of an attribute, its value, padding


class Recformer(Longformer):
    """Sequences of items, newest first, as tokens of their attributes; to one vector each.

    An item alone is a sequence of one. Nothing depends on the catalogue. The parameters are those
    of ``Longformer`` with four token types, and ``item_positions``.

    Attributes:
      config: with ``head="masked_lm"`` and ``token_types=4``; ``config.stack.window`` None gives
        dense layers without projections for the global token.
      max_items: the most items of a sequence; rows of ``item_positions`` less one.
      use_types: embed the token types.
      use_items: embed the items' positions.
      pooling: ``cls``: the vector is the state of <s>; ``avg``: the mean over the tokens.
      tied: masked tokens are scored by the token table, else by a ``decoder`` of its own.
    """

    max_items: int = 50
    use_types: bool = True
    use_items: bool = True
    pooling: str = "cls"
    tied: bool = True

    def setup(self):
        super().setup()
        c, s = self.config, self.config.stack
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling={self.pooling!r}; choose one of {', '.join(POOLINGS)}")
        if c.head != "masked_lm" or c.token_types != TOKEN_TYPES:
            raise ValueError(
                f"a Recformer has head='masked_lm' and token_types={TOKEN_TYPES}, not "
                f"head={c.head!r} and token_types={c.token_types}"
            )
        init = nn.initializers.normal(s.init_scale)
        self.item_positions = nn.Embed(
            self.max_items + 1, s.features, embedding_init=init, dtype=s.dtype
        )
        if not self.tied:
            self.decoder = self.param("decoder", init, (c.vocab_size, s.features))

    def embed(
        self,
        inputs: Array,
        token_types: Array | None = None,
        *,
        item_positions: Array | None = None,
        train: bool = False,
    ) -> Array:
        """``LN(token + position + type + item position)`` (equation 2), [B, L, d], and dropout.

        Args:
          inputs: int [B, L].
          token_types: int [B, L], 0 … 3; None = 0.
          item_positions: int [B, L], 0 for <s>, k for tokens of the k-th newest item; None = 0.
          train: dropout on.
        """
        x = self.tokens(inputs)
        if self.use_types:
            x = x + self.token_types(jnp.zeros_like(inputs) if token_types is None else token_types)
        if self.use_items:
            places = jnp.zeros_like(inputs) if item_positions is None else item_positions
            x = x + self.item_positions(places)
        return self.placed(x, train=train)

    def states(
        self,
        inputs: Array,
        *,
        lengths: Array | None = None,
        token_types: Array | None = None,
        item_positions: Array | None = None,
        train: bool = False,
    ) -> Array:
        """States [B, L, d] of the last layer; the first token is global."""
        x = self.embed(inputs, token_types, item_positions=item_positions, train=train)
        first = None
        if self.config.stack.window is not None:
            first = jnp.zeros(inputs.shape, bool).at[:, 0].set(True)
        return self.stack(x, lengths=lengths, global_mask=first, train=train)

    def encode(
        self,
        inputs: Array,
        *,
        lengths: Array | None = None,
        token_types: Array | None = None,
        item_positions: Array | None = None,
        train: bool = False,
    ) -> Array:
        """The vectors h of sequences or of items, float32 [B, d].

        Args:
          inputs: int [B, L], <s> and the items' tokens.
          lengths: int [B], valid tokens, at least 1; None = all.
          token_types, item_positions: see ``embed``.
          train: dropout on.
        """
        x = self.states(
            inputs, lengths=lengths, token_types=token_types, item_positions=item_positions,
            train=train,
        )  # fmt: skip
        if self.is_initializing():
            self.queries(x[:, :1])
        if self.pooling == "cls":
            return x[:, 0].astype(jnp.float32)
        if lengths is None:
            return x.mean(axis=1, dtype=jnp.float32)
        valid = jnp.arange(inputs.shape[1]) < lengths[:, None]
        total = jnp.where(valid[..., None], x, 0).sum(axis=1, dtype=jnp.float32)
        return total / lengths[:, None]

    def queries(self, x: Array) -> Array:
        """What scores tokens of states [..., d]: their products with ``output``, [..., d]."""
        return self.transform_norm(ACTIVATIONS["gelu"](self.transform(x)))

    def masked_queries(
        self,
        inputs: Array,
        where: Array,
        *,
        lengths: Array | None = None,
        token_types: Array | None = None,
        item_positions: Array | None = None,
        train: bool = False,
    ) -> Array:
        """``queries`` [B, P, d] at positions ``where``, int [B, P]."""
        x = self.states(
            inputs, lengths=lengths, token_types=token_types, item_positions=item_positions,
            train=train,
        )  # fmt: skip
        return self.queries(jnp.take_along_axis(x, where[..., None], axis=1))

    def output(self) -> tuple[Array, Array]:
        """The table [V, d] and bias float32 [V] that score masked tokens."""
        return self.tokens.embedding if self.tied else self.decoder, self.output_bias
