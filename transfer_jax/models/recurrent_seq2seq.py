"""Recurrent encoder-decoders: translation and image captions.

Trained by ``objectives.Seq2Seq``, decoded by ``generate_targets``.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.linen.recurrent import flip_sequences

from transfer_jax.nn.recurrent import Recurrent

Array = jax.Array
PyTree = Any


class DecoderState(NamedTuple):
    """What a recurrent decoder keeps between tokens.

    Attributes:
      layers: the state of each layer.
      beside: [B, F], what is fed beside the next token: the features before it (input feeding), or
        the image; None = nothing.
      context: [B, S, H], what attention averages; None = no attention.
      keys: [B, S, H], what it compares with.
      lengths: int [B], valid positions of the context; None = all.
    """

    layers: tuple[PyTree, ...]
    beside: Array | None = None
    context: Array | None = None
    keys: Array | None = None
    lengths: Array | None = None


class RecurrentDecoder(nn.Module, kw_only=True):
    """Base of models that write tokens, starting from a ``DecoderState``.

    Dropout is on the inputs of each layer and before the softmax, never on what is fed back.

    Attributes:
      vocab_size: V, of the target.
      features: H, cells of a layer.
      layers: number of layers.
      cell: one of ``nn.recurrent.CELLS``.
      options: fields of the cell; a mapping, stored frozen.
      embedding: width of embedded tokens; None = H.
      dropout: rate.
      dtype: of the arithmetic.
    """

    vocab_size: int
    features: int
    layers: int = 1
    cell: str = "lstm"
    options: Mapping[str, Any] = FrozenDict()
    embedding: int | None = None
    dropout: float = 0.0
    dtype: Any = None

    def __post_init__(self):
        object.__setattr__(self, "options", FrozenDict(self.options))  # hashable
        super().__post_init__()

    def setup(self):
        self.embed = nn.Embed(self.vocab_size, self.width, dtype=self.dtype)
        self.decoder = self.stack()
        self.head = nn.Dense(self.vocab_size, dtype=self.dtype)
        self.drop = nn.Dropout(self.dropout)

    @property
    def width(self) -> int:
        return self.embedding or self.features

    def stack(self) -> Recurrent:
        """New layers."""
        return Recurrent(
            self.features,
            self.layers,
            self.cell,
            self.options,
            dropout=self.dropout,
            dtype=self.dtype,
        )

    def attend(self, hidden: Array, state: DecoderState) -> Array:
        """Features [B, T, H] of the last layer's outputs [B, T, H]; here the same."""
        return hidden

    def decode(
        self, decoder_inputs: Array, state: DecoderState, *, train: bool = False
    ) -> tuple[Array, DecoderState]:
        """Logits [B, T, V] after each of the tokens int [B, T], and the state after the last."""
        x = self.embed(decoder_inputs)
        if state.beside is not None:
            beside = state.beside[:, None].astype(x.dtype)
            x = jnp.concatenate([x, jnp.broadcast_to(beside, (*x.shape[:2], beside.shape[-1]))], -1)
        x = self.drop(x, deterministic=not train)
        hidden, layers = self.decoder.run(x, state.layers, train=train)
        features = self.attend(hidden, state)
        return self.logits(features, train), state._replace(layers=layers)

    def logits(self, features: Array, train: bool = False) -> Array:
        """Float32 [..., V] of features [..., H]."""
        return self.head(self.drop(features, deterministic=not train)).astype(jnp.float32)

    def step_logits(self, tokens: Array, state: DecoderState) -> tuple[Array, DecoderState]:
        """Logits [B, V] after one more token int [B], and the next state."""
        logits, state = self.decode(tokens[:, None], state)
        return logits[:, 0], state


class RecurrentSeq2Seq(RecurrentDecoder, kw_only=True):
    """Reads a source, then writes a target from the final state of every layer.

    ``attention`` adds a context to the decoder's outputs, as in Luong et al. (2015) and with the
    additive score of Bahdanau et al. (2015):

        a_ts = softmax_s(v . tanh(W h_t + U e_s)),   c_t = sum_s a_ts e_s,
        features_t = tanh(W_c [h_t, c_t]).

    Attributes:
      source_vocab_size: of the source.
      reverse_source: read each source from its last token to its first; padding stays at the end.
      attention: see above.
      input_feeding: feed ``features_{t-1}`` beside token t; needs attention.
    """

    source_vocab_size: int
    reverse_source: bool = False
    attention: bool = False
    input_feeding: bool = False

    def setup(self):
        super().setup()
        if self.input_feeding and not self.attention:
            raise ValueError("input_feeding=True feeds what attention found: set attention=True.")
        self.embed_source = nn.Embed(self.source_vocab_size, self.width, dtype=self.dtype)
        self.encoder = self.stack()
        if self.attention:
            dense = {"use_bias": False, "dtype": self.dtype}
            self.query = nn.Dense(self.features, **dense)
            self.key = nn.Dense(self.features, **dense)
            self.score = nn.Dense(1, **dense)
            self.combine = nn.Dense(self.features, **dense)

    def encode(
        self, inputs: Array, *, lengths: Array | None = None, train: bool = False
    ) -> DecoderState:
        """The decoder's state before the first token, of sources int [B, S]."""
        if self.reverse_source:
            inputs = flip_sequences(inputs, lengths, num_batch_dims=1, time_major=False)
        x = self.drop(self.embed_source(inputs), deterministic=not train)
        x, layers = self.encoder.run(x, lengths=lengths, train=train)
        if not self.attention:
            return DecoderState(layers)
        beside = jnp.zeros((len(x), self.features), x.dtype) if self.input_feeding else None
        return DecoderState(layers, beside, x, self.key(x), lengths)

    def attend(self, hidden: Array, state: DecoderState) -> Array:
        """See ``RecurrentDecoder.attend``; with attention to the source."""
        if state.context is None or state.keys is None:
            return hidden
        query = self.query(hidden)
        scores = self.score(jnp.tanh(query[:, :, None] + state.keys[:, None]))[..., 0]
        scores = scores.astype(jnp.float32)
        if state.lengths is not None:
            valid = jnp.arange(scores.shape[-1]) < state.lengths[:, None, None]
            scores = jnp.where(valid, scores, -jnp.inf)
        weights = nn.softmax(scores).astype(hidden.dtype)
        context = jnp.einsum("bts,bsh->bth", weights, state.context)
        return jnp.tanh(self.combine(jnp.concatenate([hidden, context], axis=-1)))

    def decode(
        self, decoder_inputs: Array, state: DecoderState, *, train: bool = False
    ) -> tuple[Array, DecoderState]:
        """As ``RecurrentDecoder.decode``; token by token where features are fed back."""
        if not self.input_feeding:
            return super().decode(decoder_inputs, state, train=train)

        def body(module: Any, carry: tuple, x: Array) -> tuple[tuple, Array]:
            layers, beside = carry
            x = jnp.concatenate([x, beside], axis=-1)[:, None]
            x = module.drop(x, deterministic=not train)
            hidden, layers = module.decoder.run(x, layers, train=train)
            features = module.attend(hidden, state)[:, 0]
            return (layers, features), features

        scan = nn.scan(
            body,
            variable_broadcast="params",
            split_rngs={"params": False, "dropout": True},
            in_axes=1,
            out_axes=1,
        )
        x = self.embed(decoder_inputs)
        (layers, beside), features = scan(self, (state.layers, state.beside), x)
        return self.logits(features, train), state._replace(layers=layers, beside=beside)

    def __call__(
        self,
        inputs: Array,
        decoder_inputs: Array,
        *,
        lengths: Array | None = None,
        train: bool = False,
    ) -> Array:
        """Logits float32 [B, T, V] of a target under teacher forcing.

        Args:
          inputs: int [B, S].
          decoder_inputs: int [B, T], the target shifted right.
          lengths: int [B], valid tokens of ``inputs``; None = all.
          train: dropout on.
        """
        state = self.encode(inputs, lengths=lengths, train=train)
        return self.decode(decoder_inputs, state, train=train)[0]

    def start(
        self, inputs: Array, *, lengths: Array | None = None, max_length: int = 0
    ) -> DecoderState:
        """The state before the first token; ``max_length`` is not needed."""
        del max_length
        return self.encode(inputs, lengths=lengths)


class Captioner(RecurrentDecoder, kw_only=True):
    """Writes about a vector, such as the features of an image, which is its first input.

    Attributes:
      every_step: feed the vector beside every token as well, which overfits (Vinyals et al.).
    """

    every_step: bool = False

    def setup(self):
        super().setup()
        self.embed_image = nn.Dense(self.width, dtype=self.dtype)

    def encode(self, inputs: Array, *, train: bool = False) -> DecoderState:
        """The state after the vectors [B, D]."""
        x = self.embed_image(inputs)
        # In every_step, tokens have the vector beside them; the image itself has it twice.
        first = jnp.concatenate([x, x], axis=-1) if self.every_step else x
        first = self.drop(first, deterministic=not train)
        _, layers = self.decoder.run(first[:, None], train=train)
        return DecoderState(layers, x if self.every_step else None)

    def __call__(
        self,
        inputs: Array,
        decoder_inputs: Array,
        *,
        lengths: Array | None = None,
        train: bool = False,
    ) -> Array:
        """Logits float32 [B, T, V] of captions under teacher forcing.

        Args:
          inputs: [B, D].
          decoder_inputs: int [B, T], the caption shifted right.
          lengths: not used.
          train: dropout on.
        """
        del lengths
        return self.decode(decoder_inputs, self.encode(inputs, train=train), train=train)[0]

    def start(
        self, inputs: Array, *, lengths: Array | None = None, max_length: int = 0
    ) -> DecoderState:
        """The state before the first token; only ``inputs`` [B, D] are needed."""
        del lengths, max_length
        return self.encode(inputs)
