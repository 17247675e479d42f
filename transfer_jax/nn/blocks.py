"""Residual blocks that mix a sequence: one interface, many mixers.

A mixer maps ``[B, L, H]`` to ``[B, L, H]``. Causal mixers also decode: ``discretise(mode)`` gives
constant matrices to be computed once, ``prefill(inputs, system, state, max_length)`` runs a prefix
or chunk and hands over its state, ``step(inputs, state, system)`` runs one token.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from transfer_jax.nn.attention import Attention, Initializer, LinearAttention
from transfer_jax.nn.recurrent import CELLS, Recurrent
from transfer_jax.nn.s4 import S4Layer

Array = jax.Array

MIXERS = ("s4", "s4d", "conv", "attention", "linear_attention", *CELLS, "recurrent", "ffn")


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": jnp.tanh,
}


class FeedForward(nn.Module):
    """Position-wise two-layer perceptron.

    Attributes:
      features: H.
      expand: the hidden width is ``expand * H``, unless ``hidden`` is given.
      hidden: the hidden width.
      activation: one of ``ACTIVATIONS``; 'gelu' is the exact one.
      gated: multiply the activation by a second projection (GLU variants, Shazeer 2020).
      use_bias: in the projections.
      dropout: rate on the hidden layer.
      tie_dropout: one mask per (example, feature), shared over time.
      kernel_init: of the projections.
      dtype: of the arithmetic.
    """

    features: int
    expand: int = 4
    hidden: int | None = None
    activation: str = "gelu"
    gated: bool = False
    use_bias: bool = True
    dropout: float = 0.0
    tie_dropout: bool = True
    kernel_init: Initializer = nn.linear.default_kernel_init
    dtype: Any = None

    def setup(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}; choose one of {sorted(ACTIVATIONS)}")
        hidden = self.hidden or self.expand * self.features
        options: dict[str, Any] = {"use_bias": self.use_bias, "dtype": self.dtype}
        options["kernel_init"] = self.kernel_init
        self.up = nn.Dense(hidden, **options)
        if self.gated:
            self.gate = nn.Dense(hidden, **options)
        self.down = nn.Dense(self.features, **options)
        self.drop = nn.Dropout(self.dropout, broadcast_dims=(1,) if self.tie_dropout else ())

    def __call__(
        self, inputs: Array, *, lengths: Array | None = None, train: bool = False
    ) -> Array:
        """Maps [..., H] to [..., H]."""
        del lengths
        activate = ACTIVATIONS[self.activation]
        if self.gated:
            hidden = activate(self.gate(inputs)) * self.up(inputs)
        else:
            hidden = activate(self.up(inputs))
        if train:
            hidden = self.drop(hidden, deterministic=False)
        return self.down(hidden)

    def discretise(self, mode: str | None = None) -> None:
        """No matrices to prepare for decoding."""

    def prefill(
        self, inputs: Array, system: None = None, state: tuple = (), max_length: int = 0
    ) -> tuple[Array, tuple]:
        """The layer itself; there is no state."""
        return self(inputs), ()

    def step(self, inputs: Array, state: tuple = (), system: None = None) -> tuple[Array, tuple]:
        """The layer itself; there is no state."""
        return self(inputs), ()


def _mixer(
    name: str,
    features: int,
    options: Mapping[str, Any],
    *,
    l_max: int | None,
    rate: float,
    dropout: float,
    tie_dropout: bool,
    dtype: Any,
) -> nn.Module:
    """Builds the mixer ``name`` of ``MIXERS``."""
    long = {"l_max": l_max, "dropout": dropout, "tie_dropout": tie_dropout}
    if name in ("s4", "s4d", "conv"):
        kernel = {"s4": {}, "s4d": {"kernel": "diag"}, "conv": {"kernel": "free"}}[name]
        return S4Layer(features, rate=rate, dtype=dtype, **{**long, **kernel, **options})
    if name == "ffn":
        drops = {"dropout": dropout, "tie_dropout": tie_dropout}
        return FeedForward(features, dtype=dtype, **{**drops, **options})
    if name == "attention":
        return Attention(features, dtype=dtype, **{"causal": True, **options})
    if name == "linear_attention":
        return LinearAttention(features, dtype=dtype, **options)
    if name in CELLS:
        return CELLS[name](features, dtype=dtype, **options)
    if name == "recurrent":  # both directions must fit into the width of the block
        fields = {"dropout": dropout, "tie_dropout": tie_dropout, "merge": "sum", **options}
        return Recurrent(features, dtype=dtype, **fields)
    raise ValueError(f"unknown mixer {name!r}; choose one of {', '.join(MIXERS)}")


class SequenceBlock(nn.Module):
    """A residual block: prenorm ``x + dropout(mixer(norm(x)))``, else ``norm(x + ...)``.

    Attributes:
      features: H.
      mixer: one of ``MIXERS``.
      options: fields of the mixer's module; a mapping, stored frozen.
      norm: 'layer' (over features) or 'batch' (over batch and time, padding excluded).
      prenorm: normalise before the mixer, else after the sum.
      dropout: rate, inside the mixer where it has one and on its output.
      tie_dropout: one mask per (example, feature), shared over time.
      l_max: length of the S4 and free convolution kernels.
      rate: sampling interval relative to training (S4, S4D).
      dtype: compute dtype.
    """

    features: int
    mixer: str = "s4"
    options: Mapping[str, Any] = FrozenDict()
    norm: str = "layer"
    prenorm: bool = True
    dropout: float = 0.0
    tie_dropout: bool = True
    l_max: int | None = None
    rate: float = 1.0
    dtype: Any = None

    def __post_init__(self):
        object.__setattr__(self, "options", FrozenDict(self.options))  # hashable
        super().__post_init__()

    def setup(self):
        self.layer = _mixer(
            self.mixer,
            self.features,
            self.options,
            l_max=self.l_max,
            rate=self.rate,
            dropout=self.dropout,
            tie_dropout=self.tie_dropout,
            dtype=self.dtype,
        )
        self.normalise: Any
        if self.norm == "layer":
            self.normalise = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)
        elif self.norm == "batch":
            self.normalise = nn.BatchNorm(momentum=0.9, epsilon=1e-5, dtype=self.dtype)
        else:
            raise ValueError(f"norm={self.norm!r}; choose 'layer' or 'batch'")
        self.drop = nn.Dropout(self.dropout, broadcast_dims=(1,) if self.tie_dropout else ())

    def _norm(self, x: Array, lengths: Array | None = None, train: bool = False) -> Array:
        if self.norm == "layer":
            return self.normalise(x)
        mask = None
        if lengths is not None and train:
            mask = (jnp.arange(x.shape[1]) < lengths[:, None])[..., None]
        return self.normalise(x, use_running_average=not train, mask=mask)

    def __call__(
        self, inputs: Array, *, lengths: Array | None = None, train: bool = False
    ) -> Array:
        """Maps [B, L, H] to [B, L, H].

        Args:
          inputs: [B, L, H].
          lengths: int [B], valid positions.
          train: dropout on, batch statistics of this batch.
        """
        x = self._norm(inputs, lengths, train) if self.prenorm else inputs
        x = self.layer(x, lengths=lengths, train=train)
        if train:
            x = self.drop(x, deterministic=False)
        x = inputs + x
        return x if self.prenorm else self._norm(x, lengths, train)

    def discretise(self, mode: str | None = None) -> Any:
        """Matrices for decoding, computed once; see ``S4Layer.discretise``."""
        return self.layer.discretise(mode)

    def _decode(self, inputs: Array, run) -> tuple[Array, Any]:
        y, state = run(self._norm(inputs) if self.prenorm else inputs)
        y = inputs + y
        return (y if self.prenorm else self._norm(y)), state

    def prefill(
        self, inputs: Array, system: Any, state: Any = None, max_length: int = 0
    ) -> tuple[Array, Any]:
        """Outputs for a prefix or chunk [B, L, H], and the state after it."""
        return self._decode(inputs, lambda x: self.layer.prefill(x, system, state, max_length))

    def step(self, inputs: Array, state: Any, system: Any) -> tuple[Array, Any]:
        """One token: [B, H] to [B, H] and the next state."""
        return self._decode(inputs, lambda x: self.layer.step(x, state, system))

    def double_length(self) -> None:
        """Grows the S4 and free kernels to ``2 l_max``; see ``SSMKernel.double_length``."""
        if isinstance(self.layer, S4Layer):
            self.layer.double_length()
