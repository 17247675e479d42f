"""Deep sequence models over any mixer: features, classifiers, forecasters, language models.

Every model maps a batch of sequences in one call; causal ones also generate, with a state per layer
(constant in size for S4, linear attention and recurrent networks, a KV cache for attention).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax import lax
from jax.sharding import PartitionSpec

from transfer_jax.models.generation import Decoding, generate_continuations
from transfer_jax.nn import AdaptiveSoftmax, SequenceBlock

Array = jax.Array
PyTree = Any


class DecodeState(NamedTuple):
    """What generation carries from token to token.

    Attributes:
      position: int32 scalar, tokens seen so far.
      blocks: the state of every block.
    """

    position: Array
    blocks: tuple[PyTree, ...]


class SequenceModel(nn.Module, kw_only=True):
    """Encoder, residual blocks, final norm.

    Attributes:
      features: H.
      depth: how often ``pattern`` is repeated.
      mixer: what mixes the sequence, one of ``transfer_jax.nn.MIXERS``.
      mixer_options: fields of the mixer's module (a mapping, stored frozen).
      pattern: blocks of one repeat: 'mixer' and 'ffn'. ('mixer', 'ffn') is a Transformer layer,
        ('mixer', 'mixer', 'ffn') the stack of the WikiText-103 model.
      ffn_options: fields of ``FeedForward``.
      vocab_size: inputs are int tokens [B, L] below this; None = real inputs [B, L, D].
      max_positions: learned absolute positions for up to this many; None = none (S4, rotary).
      norm: 'layer' or 'batch'.
      prenorm: normalise before each mixer and once at the end, else after each sum.
      dropout: rate inside the mixers and on their outputs.
      tie_dropout: one dropout mask per (example, feature), shared over time.
      l_max: longest sequence of S4 and free convolution kernels.
      rate: sampling interval relative to training (S4, S4D).
      remat: recompute each block in the backward pass.
      dtype: compute dtype; parameters and state space arithmetic stay float32.
    """

    features: int
    depth: int = 4
    mixer: str = "s4"
    mixer_options: Mapping[str, Any] = FrozenDict()
    pattern: tuple[str, ...] = ("mixer",)
    ffn_options: Mapping[str, Any] = FrozenDict()
    vocab_size: int | None = None
    max_positions: int | None = None
    norm: str = "layer"
    prenorm: bool = True
    dropout: float = 0.0
    tie_dropout: bool = True
    l_max: int | None = None
    rate: float = 1.0
    remat: bool = False
    dtype: Any = None

    def __post_init__(self):
        for field in ("mixer_options", "ffn_options"):  # frozen = hashable
            object.__setattr__(self, field, FrozenDict(getattr(self, field)))
        super().__post_init__()

    def _encoder(self) -> nn.Module:
        if self.vocab_size is None:
            return nn.Dense(self.features, dtype=self.dtype)
        init = nn.initializers.normal(1.0)
        return nn.Embed(self.vocab_size, self.features, embedding_init=init, dtype=self.dtype)

    def setup(self):
        if unknown := set(self.pattern) - {"mixer", "ffn"}:
            raise ValueError(f"pattern holds 'mixer' and 'ffn', got {sorted(unknown)}")
        self.encoder = self._encoder()
        self.blocks = [
            SequenceBlock(
                features=self.features,
                mixer=self.mixer if kind == "mixer" else "ffn",
                options=self.mixer_options if kind == "mixer" else self.ffn_options,
                norm=self.norm,
                prenorm=self.prenorm,
                dropout=self.dropout,
                tie_dropout=self.tie_dropout,
                l_max=self.l_max,
                rate=self.rate,
                dtype=self.dtype,
            )
            for kind in self.pattern * self.depth
        ]
        if self.max_positions is not None:
            shape = (self.max_positions, self.features)
            self.positions = self.param("positions", nn.initializers.normal(0.02), shape)
        self.final_norm: Any = None
        if self.prenorm and self.norm == "layer":
            self.final_norm = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)
        elif self.prenorm:
            self.final_norm = nn.BatchNorm(momentum=0.9, epsilon=1e-5, dtype=self.dtype)

    def _embed(self, inputs: Array, start: Array | int = 0) -> Array:
        """Encodes [B, L] tokens or [B, L, D] reals that begin at position ``start``."""
        if self.vocab_size is not None and not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(
                f"vocab_size={self.vocab_size} means int tokens, got {inputs.dtype}{inputs.shape}"
            )
        if self.vocab_size is None and inputs.ndim != 3:
            raise ValueError(f"real inputs must be [B, L, D], got {inputs.shape}")
        x = self.encoder(inputs)
        if self.max_positions is not None:
            if x.shape[1] > self.max_positions:
                raise ValueError(f"length {x.shape[1]} > max_positions={self.max_positions}")
            positions = lax.dynamic_slice_in_dim(self.positions, start, x.shape[1])
            x = x + positions.astype(x.dtype)
        return x

    def _finish(self, x: Array, lengths: Array | None = None, train: bool = False) -> Array:
        if self.final_norm is None:
            return x
        if self.norm == "layer":
            return self.final_norm(x)
        mask = None
        if lengths is not None and train:
            mask = (jnp.arange(x.shape[1]) < lengths[:, None])[..., None]
        return self.final_norm(x, use_running_average=not train, mask=mask)

    def _blocks(self, x: Array, lengths: Array | None, train: bool) -> Array:
        def run(block, x, lengths):
            return block(x, lengths=lengths, train=train)

        run = nn.remat(run) if self.remat else run
        for block in self.blocks:
            x = run(block, x, lengths)
        return x

    def encode(self, inputs: Array, *, lengths: Array | None = None, train: bool = False) -> Array:
        """Features [B, L, H] of every position; beyond ``lengths`` they mean nothing."""
        return self._finish(self._blocks(self._embed(inputs), lengths, train), lengths, train)

    def __call__(
        self, inputs: Array, *, lengths: Array | None = None, train: bool = False
    ) -> Array:
        """As ``encode``.

        Args:
          inputs: int [B, L] or real [B, L, D], see ``vocab_size``.
          lengths: int [B], valid positions; None = all.
          train: dropout on, batch statistics of this batch.
        """
        return self.encode(inputs, lengths=lengths, train=train)

    def discretise(self, mode: str | None = None) -> tuple[PyTree, ...]:
        """Per block, the constant matrices that ``prefill`` and ``step`` take.

        Args:
          mode: None = O(N) steps in each kernel's own form; 'diagonal': see
            ``SSMKernel.discretise``.

        Raises:
          ValueError: a block is not causal.
        """
        return tuple(block.discretise(mode) for block in self.blocks)

    def prefill(
        self,
        inputs: Array,
        systems: tuple[PyTree, ...],
        state: DecodeState | None = None,
        max_length: int = 0,
    ) -> tuple[Array, DecodeState]:
        """Runs a prefix, or the next chunk of a sequence, and hands over the state.

        Args:
          inputs: int [B, L] or real [B, L, D].
          systems: from ``discretise``.
          state: the state before the chunk; None = start of the sequence.
          max_length: how long the sequence will become (the size of a KV cache).

        Returns:
          Features [B, L, H] and the state after the chunk.
        """
        start = jnp.int32(0) if state is None else state.position
        old = [None] * len(self.blocks) if state is None else state.blocks
        x = self._embed(inputs, start)
        new = []
        for block, system, before in zip(self.blocks, systems, old):
            x, after = block.prefill(x, system, before, max_length)
            new.append(after)
        return self._finish(x), DecodeState(start + inputs.shape[1], tuple(new))

    def step(
        self, inputs: Array, state: DecodeState, systems: tuple[PyTree, ...]
    ) -> tuple[Array, DecodeState]:
        """One position: int [B] or real [B, D] to features [B, H] and the next state."""
        x = self._embed(inputs[:, None], state.position)[:, 0]
        new = []
        for block, system, before in zip(self.blocks, systems, state.blocks):
            x, after = block.step(x, before, system)
            new.append(after)
        return self._finish(x), DecodeState(state.position + 1, tuple(new))

    def double_length(self) -> None:
        """Rewrites the parameters for ``2 l_max`` without changing the model's function.

        _, grown = model.apply(variables, method="double_length", mutable=["params"])
        model = model.clone(l_max=2 * model.l_max)
        """
        for block in self.blocks:
            block.double_length()


class SequenceClassifier(SequenceModel, kw_only=True):
    """One label per sequence.

    Attributes:
      num_classes: how many labels.
      pool: 'mean' over the valid positions, or the 'last' valid one.
    """

    num_classes: int
    pool: str = "mean"

    def setup(self):
        super().setup()
        if self.pool not in ("mean", "last"):
            raise ValueError(f"pool={self.pool!r}; choose 'mean' or 'last'")
        self.head = nn.Dense(self.num_classes, dtype=self.dtype)

    def pooled(self, inputs: Array, *, lengths: Array | None = None, train: bool = False) -> Array:
        """One feature vector per sequence, float32 [B, H]."""
        x = self.encode(inputs, lengths=lengths, train=train).astype(jnp.float32)
        if lengths is None:
            return x.mean(1) if self.pool == "mean" else x[:, -1]
        if self.pool == "last":
            last = jnp.maximum(lengths - 1, 0)
            return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        valid = jnp.arange(x.shape[1]) < lengths[:, None]
        return jnp.where(valid[..., None], x, 0).sum(1) / jnp.maximum(lengths, 1)[:, None]

    def __call__(
        self, inputs: Array, *, lengths: Array | None = None, train: bool = False
    ) -> Array:
        """Logits float32 [B, num_classes]."""
        x = self.pooled(inputs, lengths=lengths, train=train)
        return self.head(x).astype(jnp.float32)


class SequencePairClassifier(SequenceClassifier, kw_only=True):
    """One label per pair of sequences, both through the same encoder (LRA Retrieval).

    The head sees ``[a, b, a - b, a * b]`` of the pooled features.
    """

    def setup(self):
        super().setup()
        self.hidden = nn.Dense(self.features, dtype=self.dtype)

    def __call__(
        self, inputs: Array, *, lengths: Array | None = None, train: bool = False
    ) -> Array:
        """Logits float32 [B, num_classes].

        Args:
          inputs: int [B, 2, L] or real [B, 2, L, D].
          lengths: int [B, 2].
          train: see ``SequenceModel``.
        """
        if inputs.shape[1] != 2:
            raise ValueError(f"pairs must be [B, 2, L, ...], got {inputs.shape}")
        flat = inputs.reshape(-1, *inputs.shape[2:])
        lengths = None if lengths is None else lengths.reshape(-1)
        x = self.pooled(flat, lengths=lengths, train=train)
        a, b = jnp.moveaxis(x.reshape(-1, 2, self.features), 1, 0)
        x = jnp.concatenate([a, b, a - b, a * b], axis=-1)
        x = nn.gelu(self.hidden(x), approximate=False)
        return self.head(x).astype(jnp.float32)


class SequenceForecaster(SequenceModel, kw_only=True):
    """Context and masked horizon in, the last ``horizon`` outputs out.

    Attributes:
      horizon: F, steps to forecast; the last F inputs carry no target (zeros by convention).
      targets: variables to forecast.
    """

    horizon: int
    targets: int = 1

    def setup(self):
        super().setup()
        self.head = nn.Dense(self.targets, dtype=self.dtype)

    def __call__(
        self, inputs: Array, *, lengths: Array | None = None, train: bool = False
    ) -> Array:
        """Forecasts float32 [B, F, targets] from real [B, C + F, D]."""
        if lengths is not None:
            raise ValueError("a forecaster takes whole windows: no lengths")
        x = self.encode(inputs, train=train)[:, -self.horizon :]
        return self.head(x).astype(jnp.float32)


class LanguageModel(SequenceModel, kw_only=True):
    """Next-token distributions; the mixer must be causal.

    Attributes:
      cutoffs: clusters of an adaptive embedding and softmax; None = plain ones.
      div_val: see ``AdaptiveSoftmax``.
      tie_embeddings: the output uses the input's token vectors (and adaptive projections).
    """

    cutoffs: tuple[int, ...] | None = None
    div_val: int = 4
    tie_embeddings: bool = True

    def _encoder(self) -> nn.Module:
        if self.vocab_size is None:
            raise ValueError("a language model needs vocab_size")
        if self.cutoffs is not None:
            return AdaptiveSoftmax(
                self.vocab_size,
                self.features,
                cutoffs=self.cutoffs,
                div_val=self.div_val,
                tie_weights=self.tie_embeddings,
                tie_projections=self.tie_embeddings,
                dtype=self.dtype,
            )
        init = nn.initializers.normal(self.features**-0.5)
        return nn.Embed(self.vocab_size, self.features, embedding_init=init, dtype=self.dtype)

    def setup(self):
        super().setup()
        if self.mixer_options.get("bidirectional") or self.mixer_options.get("reverse"):
            raise ValueError(
                f"mixer {self.mixer!r} with {dict(self.mixer_options)} reads the future, so a "
                "language model would see the token that it predicts; use a causal mixer"
            )
        self.drop_tokens = nn.Dropout(self.dropout, broadcast_dims=(1,) if self.tie_dropout else ())
        if self.cutoffs is None and not self.tie_embeddings:
            self.head = nn.Dense(self.vocab_size or 0, use_bias=False, dtype=self.dtype)

    def encode(self, inputs: Array, *, lengths: Array | None = None, train: bool = False) -> Array:
        """Features [B, L, H]; in training with dropout on the embedding and before the softmax."""
        x = self._embed(inputs)
        if train:
            x = self.drop_tokens(x, deterministic=False)
        x = self._finish(self._blocks(x, lengths, train), lengths, train)
        return self.drop_tokens(x, deterministic=False) if train else x

    def logits(self, features: Array) -> Array:
        """Logits float32 [..., V] (log-probabilities if adaptive) of features [..., H]."""
        if self.cutoffs is not None:
            return self.encoder.log_probs(features)
        if self.tie_embeddings:
            return self.encoder.attend(features).astype(jnp.float32)
        return self.head(features).astype(jnp.float32)

    def __call__(
        self, inputs: Array, *, lengths: Array | None = None, train: bool = False
    ) -> Array:
        """Logits float32 [B, L, V] of the token after each position of ``inputs`` [B, L]."""
        return self.logits(self.encode(inputs, lengths=lengths, train=train))

    def nll(
        self,
        inputs: Array,
        targets: Array,
        *,
        lengths: Array | None = None,
        train: bool = False,
    ) -> Array:
        """Negative log-likelihoods, float32 [B, L].

        With ``cutoffs`` the [B, L, V] logits never exist.

        Args:
          inputs: int [B, L].
          targets: int [B, L], the token after each input.
          lengths: int [B]; values beyond are 0.
          train: see ``SequenceModel``.
        """
        x = self.encode(inputs, lengths=lengths, train=train)
        if self.cutoffs is not None:
            nll = self.encoder.nll(x, targets)
        else:
            logits = self.logits(x)
            picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            nll = nn.logsumexp(logits, axis=-1) - picked
        if lengths is not None:
            nll = jnp.where(jnp.arange(nll.shape[1]) < lengths[:, None], nll, 0)
        return nll

    def prefill_logits(
        self, tokens: Array, systems: tuple[PyTree, ...], max_length: int = 0
    ) -> tuple[Array, DecodeState]:
        """Logits [B, V] of the token after the prompt [B, P], and the state."""
        x, state = self.prefill(tokens, systems, None, max_length)
        return self.logits(x[:, -1]), state

    def step_logits(
        self, tokens: Array, state: DecodeState, systems: tuple[PyTree, ...]
    ) -> tuple[Array, DecodeState]:
        """Logits [B, V] after one more token [B], and the next state."""
        x, state = self.step(tokens, state, systems)
        return self.logits(x), state


def generate(
    module: LanguageModel,
    variables: PyTree,
    prompt: Array,
    num_tokens: int,
    *,
    rng: Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    mode: str | None = None,
) -> Array:
    """Continues prompts, see ``generate_continuations``.

    Args:
      module: a causal language model.
      variables: its variables.
      prompt: int [B, P], P >= 1.
      num_tokens: how many tokens to add.
      rng: a typed key.
      temperature: divides the logits; 0 = always the likeliest token.
      top_k: sample among the k likeliest only; None = all.
      mode: see ``SequenceModel.discretise``.

    Returns:
      int32 [B, num_tokens].
    """
    decoding = Decoding(
        max_tokens=num_tokens, sample=temperature != 0, temperature=temperature, top_k=top_k
    )
    return generate_continuations(module, variables, prompt, decoding, rng=rng, mode=mode).tokens


def partition_rules(
    n_ssm: int | None = None, axis: str = "model"
) -> tuple[tuple[str, PartitionSpec], ...]:
    """Recommended layout over a mesh axis: state spaces by feature, everything else whole.

    Each device then generates and convolves its own features without communication; only the
    output projection of each S4 layer sums over devices.

    Args:
      n_ssm: the models' ``n_ssm``; shared (A, B) are small and stay whole.
      axis: mesh axis.
    """
    split = PartitionSpec(axis)
    second = PartitionSpec(None, axis)
    rules = [
        (r"(^|/)ssm/(c|taps)$", second),
        (r"(^|/)ssm/log_dt$", split),
        (r"(^|/)layer/d$", second),
        (r"(^|/)layer/out/kernel$", split),
    ]
    if n_ssm is None:
        rules += [(r"(^|/)ssm/(p|q)$", second), (r"(^|/)ssm/(lambda_re|lambda_im|a|b)$", split)]
    return tuple(rules)
