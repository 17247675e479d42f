"""Tiny Time Mixers: forecasting with gated MLPs over patches (Ekambaram et al. 2024).

A context window of every channel is normalised by its own mean and deviation and cut into patches;
a backbone mixes patches and features at several patch lengths, a small decoder may mix channels,
and one linear layer gives the whole horizon. Nothing in the backbone knows of other channels, so
that one network is pre-trained on many unrelated series.

Axes: B windows, C channels, n patches, d features.
"""

import dataclasses
import math
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from transfer_jax.nn.attention import Attention
from transfer_jax.nn.initializers import torch_uniform

Array = jax.Array
PyTree = Any

_CHOICES = {
    "norm": ("layer", "batch"),
    "mode": ("common_channel", "mix_channel"),
    "decoder_mode": ("common_channel", "mix_channel"),
    "positional": ("none", "zero", "random", "sincos"),
    "scaling": ("std", "mean", "none"),
}


@dataclasses.dataclass(frozen=True)
class TTMConfig:
    """Sizes and options; the defaults are TTM-B without resolution prefix.

    Attributes:
      context_length: sl, steps that are read.
      prediction_length: fl, steps that the head gives.
      prediction_filter_length: only the first so many of them are returned (0 = all): how a
        network for a long horizon serves a short one.
      patch_length, patch_stride: steps of a patch and between patches.
      channels: C, where something mixes them; otherwise any number goes.
      prediction_channels: sorted channels to forecast (() = all that are not exogenous).
      exogenous_channels: sorted channels whose future is known.
      d_model: features of a patch.
      expansion: hidden features of an MLP, as a multiple.
      num_layers: M, mixer layers of a level.
      adaptive_patching_levels: L; level K = 2^(L-1), ..., 1 sees K times as many patches with
        d / K features. 0 and 1 are the same.
      gated: gates after the MLPs.
      norm: 'layer', or 'batch' over windows, channels and patches.
      mode: whether the backbone mixes channels; pre-training does not.
      positional: added to the patches: 'none', learned from 'zero' or 'random' values, 'sincos'.
      self_attn, self_attn_heads: attention beside the patch MLP.
      dropout, head_dropout: of the backbone, and of decoder and head.
      scaling: of a window: 'std', 'mean' (of absolute values; no shift) or 'none'.
      rpt, rpt_vocab: resolution prefix tuning: a patch that says how long a step is.
      use_decoder, decoder_layers, decoder_d_model, decoder_levels, decoder_mode: the decoder.
      decoder_raw_residual: adds an embedding of the raw patches to the decoder's input.
      static_vocab: sizes of static categorical variables; they become channels of the decoder.
      fcm: the exogenous mixer after the head.
      fcm_context: its lags l on either side of a step.
      fcm_use_mixer, fcm_layers, fcm_gated: its mixer layers and gates.
      fcm_prepend_past: the lags before the first step are the last of the context, else zeros.
      fcm_normalise: given values enter it normalised as the window is, not as they are given.
      masked_context: the horizon is appended to the context, hidden but for exogenous channels.

    Raises:
      ValueError: an unknown choice or sizes that do not fit each other.
    """

    context_length: int = 512
    prediction_length: int = 96
    prediction_filter_length: int = 0
    patch_length: int = 64
    patch_stride: int = 64
    channels: int = 1
    prediction_channels: tuple[int, ...] = ()
    exogenous_channels: tuple[int, ...] = ()
    d_model: int = 192
    expansion: int = 2
    num_layers: int = 2
    adaptive_patching_levels: int = 3
    gated: bool = True
    norm: str = "layer"
    mode: str = "common_channel"
    positional: str = "none"
    self_attn: bool = False
    self_attn_heads: int = 1
    dropout: float = 0.2
    head_dropout: float = 0.2
    scaling: str = "std"
    rpt: bool = False
    rpt_vocab: int = 8
    use_decoder: bool = True
    decoder_layers: int = 2
    decoder_d_model: int = 128
    decoder_levels: int = 0
    decoder_mode: str = "common_channel"
    decoder_raw_residual: bool = False
    static_vocab: tuple[int, ...] = ()
    fcm: bool = False
    fcm_context: int = 1
    fcm_use_mixer: bool = False
    fcm_layers: int = 2
    fcm_gated: bool = True
    fcm_prepend_past: bool = True
    fcm_normalise: bool = False
    masked_context: bool = False

    def __post_init__(self):
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; choose one of {allowed}.")
        if not 0 <= self.prediction_filter_length <= self.prediction_length:
            raise ValueError(
                f"prediction_filter_length={self.prediction_filter_length} is not in "
                f"0 .. prediction_length={self.prediction_length}."
            )
        if self.context_length <= self.patch_length:
            raise ValueError(
                f"context_length={self.context_length} must exceed "
                f"patch_length={self.patch_length}."
            )
        if self.static_vocab and self.decoder_mode != "mix_channel":
            raise ValueError("static_vocab needs decoder_mode='mix_channel'.")
        both = set(self.prediction_channels) & set(self.exogenous_channels)
        if both:
            raise ValueError(f"channels {sorted(both)} are both forecast and exogenous.")
        for name in ("prediction_channels", "exogenous_channels"):
            value = getattr(self, name)
            if list(value) != sorted(set(value)) or not set(value) <= set(range(self.channels)):
                raise ValueError(
                    f"{name}={value} must be sorted and in 0 .. {self.channels - 1} (channels)."
                )
        level_factors(self.d_model, self.adaptive_patching_levels)

    @property
    def head(self) -> str | None:
        """Which of the two published classes it is: None, or 'masked'."""
        return "masked" if self.masked_context else None

    @property
    def horizon(self) -> int:
        """Steps that are returned."""
        return self.prediction_filter_length or self.prediction_length

    @property
    def targets(self) -> tuple[int, ...]:
        """The channels that are forecast; () = all."""
        if self.prediction_channels or not self.exogenous_channels:
            return self.prediction_channels
        return tuple(sorted(set(range(self.channels)) - set(self.exogenous_channels)))

    @property
    def num_patches(self) -> int:
        """n, with the prefix."""
        length = self.context_length + (self.horizon if self.masked_context else 0)
        return (length - self.patch_length) // self.patch_stride + 1 + self.rpt


def ttm_b(**changes: Any) -> TTMConfig:
    """TTM-B: 805,280 parameters at a horizon of 96; 854,972 with ``rpt=True``."""
    return TTMConfig(**changes)


def ttm_e(**changes: Any) -> TTMConfig:
    """TTM-E: 2,964,960 parameters; 3,126,076 with ``rpt=True``."""
    sizes = dict(
        context_length=1024, patch_length=128, patch_stride=128, d_model=384, decoder_d_model=256
    )
    return TTMConfig(**{**sizes, **changes})


def ttm_a(**changes: Any) -> TTMConfig:
    """TTM-A: 3,081,120 parameters; 3,243,996 with ``rpt=True``."""
    return ttm_e(**{"context_length": 1536, **changes})


def level_factors(features: int, levels: int) -> tuple[int, ...]:
    """Returns K of each level, from fine to coarse.

    Raises:
      ValueError: the features do not divide by K.
    """
    factors = []
    for level in reversed(range(max(1, levels))):
        factor = 2**level
        if features // factor <= 4 and factor > 1:
            warnings.warn(
                f"{features} features leave at most 4 at level {level}, which therefore keeps the "
                "patches as they are; lower adaptive_patching_levels.",
                stacklevel=3,
            )
            factor = 1
        if features % factor:
            raise ValueError(
                f"{features} features do not divide by {factor}, as "
                f"adaptive_patching_levels={levels} needs."
            )
        factors.append(factor)
    return tuple(factors)


class Linear(nn.Module):
    """A linear map of one axis, with PyTorch's default initial values: U(+-1/sqrt(fan_in)).

    Attributes:
      features: size of the axis afterwards.
      axis: negative.
      dtype: of the arithmetic.
    """

    features: int
    axis: int = -1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size = x.shape[self.axis]
        uniform = torch_uniform(size)
        kernel = self.param("kernel", uniform, (size, self.features)).astype(self.dtype)
        bias = self.param("bias", uniform, (self.features,)).astype(self.dtype)
        x = jnp.moveaxis(x.astype(self.dtype), self.axis, -1) @ kernel + bias
        return jnp.moveaxis(x, -1, self.axis)


class Gate(nn.Module):
    """``u * softmax(Linear(u))`` over one axis: the weights of an axis sum to one."""

    axis: int = -1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, u: Array) -> Array:
        logits = Linear(u.shape[self.axis], self.axis, self.dtype, name="logits")(u)
        return u * jax.nn.softmax(logits, axis=self.axis)


class Norm(nn.Module):
    """Layer normalisation of the features, or batch normalisation of each feature."""

    kind: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        if self.kind == "layer":
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x)
        return nn.BatchNorm(
            use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype, name="norm"
        )(x)


class Mixing(nn.Module):
    """``z + Gate(MLP(Norm(z)))`` along one axis of [B, C, n, d].

    Attributes:
      config: of the network.
      axis: -1 mixes features, -2 patches, -3 channels; for channels the gate comes before the MLP.
      dtype: of the arithmetic.
    """

    config: TTMConfig
    axis: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Array, train: bool) -> Array:
        c, axis, size = self.config, self.axis, z.shape[self.axis]
        attend = c.self_attn and axis == -2
        u = Norm(c.norm, self.dtype, name="norm")(z, train)
        v = u
        if c.gated and axis == -3:
            v = Gate(axis, self.dtype, name="gate")(v)
        v = Linear(c.expansion * size, axis, self.dtype, name="up")(v)
        v = nn.Dropout(c.dropout, deterministic=not train)(nn.gelu(v, approximate=False))
        v = Linear(size, axis, self.dtype, name="down")(v)
        v = nn.Dropout(c.dropout, deterministic=not train)(v)
        if c.gated and axis != -3:
            v = Gate(axis, self.dtype, name="gate")(v)
        if attend:
            heads = Attention(
                z.shape[-1], c.self_attn_heads, dropout=c.dropout, dtype=self.dtype,
                kernel_init=torch_uniform(z.shape[-1]), name="attention",
            )  # fmt: skip
            # The patches of each channel see one another.
            seen = heads(u.reshape(-1, *u.shape[-2:]), train=train).reshape(u.shape)
            v = Norm(c.norm, self.dtype, name="attention_norm")(v + seen, train)
        return z + v


class Mixer(nn.Module):
    """Levels of mixer layers over [B, C, n, d], from fine to coarse patches.

    Attributes:
      config: ``mode``, ``dropout``, ``gated`` and ``norm`` are read from it.
      levels: L.
      layers: M of each level.
      dtype: of the arithmetic.
    """

    config: TTMConfig
    levels: int
    layers: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Array, train: bool) -> Array:
        shape = batch, channels, n, d = z.shape
        for i, factor in enumerate(level_factors(d, self.levels)):
            z = z.reshape(batch, channels, n * factor, d // factor)
            for j in range(self.layers):
                name = f"level_{i}_layer_{j}"
                if self.config.mode == "mix_channel":
                    z = Mixing(self.config, -3, self.dtype, name=f"{name}_channels")(z, train)
                if z.shape[2] > 1:
                    z = Mixing(self.config, -2, self.dtype, name=f"{name}_patches")(z, train)
                z = Mixing(self.config, -1, self.dtype, name=f"{name}_features")(z, train)
            z = z.reshape(shape)
        return z


class Backbone(nn.Module):
    """Patches [B, C, n, pl] to features [B, C, n, d]; with a prefix, n grows by one."""

    config: TTMConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, patches: Array, freq_token: Array | None, train: bool) -> Array:
        c = self.config
        z = Linear(c.d_model, dtype=self.dtype, name="patch")(patches)
        if c.rpt:
            if freq_token is None:
                raise ValueError(
                    "this network has resolution prefix tuning (rpt): give freq_token, int [B]; 0 "
                    "where the resolution is unknown."
                )
            normal = nn.initializers.normal(1.0)
            e = nn.Embed(c.rpt_vocab, c.patch_length, embedding_init=normal, name="prefix_table")(
                freq_token
            )
            middle = (c.patch_length + c.d_model) // 2
            e = nn.gelu(Linear(middle, dtype=self.dtype, name="prefix_hidden")(e), False)
            e = Linear(c.d_model, dtype=self.dtype, name="prefix_out")(e)
            prefix = jnp.broadcast_to(e[:, None, None], (*z.shape[:2], 1, c.d_model))
            z = jnp.concatenate([prefix, z], axis=2)
        shape = z.shape[2:]
        if c.positional == "sincos":
            z = z + jnp.asarray(_sincos(*shape), z.dtype)
        elif c.positional != "none":
            scale = 0.1 if c.positional == "random" else 0.0
            z = z + self.param("positions", nn.initializers.normal(scale), shape).astype(z.dtype)
        return Mixer(c, c.adaptive_patching_levels, c.num_layers, self.dtype, name="mixer")(
            z, train
        )


def _sincos(patches: int, features: int) -> np.ndarray:
    position = np.arange(patches)[:, None]
    rate = np.exp(np.arange(0, features, 2) * -(math.log(10000.0) / features))
    table = np.zeros((patches, features), np.float32)
    table[:, 0::2] = np.sin(position * rate)
    table[:, 1::2] = np.cos(position * rate)[:, : features // 2]
    table -= table.mean()
    return table / (table.std(ddof=1) * 10)


class Decoder(nn.Module):
    """Features [B, C, n, d] to [B, C, n, decoder_d_model]."""

    config: TTMConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Array, patches: Array, static: Array | None, train: bool) -> Array:
        c = self.config
        channels, d = z.shape[1], c.decoder_d_model
        if c.d_model != d:
            z = Linear(d, dtype=self.dtype, name="adapter")(z)
        if c.decoder_raw_residual:
            patches = jnp.pad(patches, ((0, 0), (0, 0), (int(c.rpt), 0), (0, 0)))
            z = z + Linear(d, dtype=self.dtype, name="raw")(patches)
        if c.static_vocab:
            if static is None or static.shape[-1] != len(c.static_vocab):
                raise ValueError(
                    f"this network has {len(c.static_vocab)} static variables: give static, int "
                    f"[B, {len(c.static_vocab)}]."
                )
            normal = nn.initializers.normal(1.0)
            rows = [
                nn.Embed(size, d, embedding_init=normal, name=f"static_{i}")(static[:, i])
                for i, size in enumerate(c.static_vocab)
            ]
            extra = jnp.stack(rows, axis=1)[:, :, None].astype(z.dtype)
            extra = jnp.broadcast_to(extra, (*extra.shape[:2], z.shape[2], d))
            z = jnp.concatenate([z, extra], axis=1)
        inner = dataclasses.replace(c, mode=c.decoder_mode, dropout=c.head_dropout)
        z = Mixer(inner, c.decoder_levels, c.decoder_layers, self.dtype, name="mixer")(z, train)
        return z[:, :channels]


class ExogenousMixer(nn.Module):
    """Mixes forecasts with each other and with known future values, step by step.

    Step t sees steps t - l .. t + l of all forecasts and exogenous channels, and nothing else.
    """

    config: TTMConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, base: Array, past: Array, exogenous: Array | None, train: bool) -> Array:
        """Returns forecasts [B, fl, c'].

        Args:
          base: forecasts [B, fl, c'], normalised.
          past: the last l steps of the context, [B, l, c' + e], forecast channels first.
          exogenous: [B, fl, e], or None.
          train: dropout.
        """
        c, lag = self.config, self.config.fcm_context
        x = base if exogenous is None else jnp.concatenate([base, exogenous], axis=-1)
        batch, steps, channels = x.shape
        if lag:
            zeros = jnp.zeros((batch, lag, channels), x.dtype)
            x = jnp.concatenate([past if c.fcm_prepend_past else zeros, x, zeros], axis=1)
            # [B, fl, ct, w]: the window around every step.
            x = jnp.stack([x[:, i : i + steps] for i in range(2 * lag + 1)], axis=-1)
            if c.fcm_use_mixer:
                x = Linear(2 * x.shape[-1], dtype=self.dtype, name="embed")(x)
                inner = dataclasses.replace(
                    c, mode="common_channel", dropout=c.head_dropout, gated=c.fcm_gated
                )
                x = Mixer(inner, 0, c.fcm_layers, self.dtype, name="mixer")(x, train)
            x = x.reshape(batch, steps, -1)
        if c.fcm_gated:
            x = Gate(dtype=self.dtype, name="gate")(x)
        return base + Linear(base.shape[-1], dtype=self.dtype, name="out")(x)


class TTM(nn.Module):
    """The network: a context in, a forecast out, both in the units of the data.

    Attributes:
      config: sizes and options.
      dtype: of the arithmetic; windows are normalised in float32.
    """

    config: TTMConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        inputs: Array,
        *,
        freq_token: Array | None = None,
        future: Array | None = None,
        observed: Array | None = None,
        static: Array | None = None,
        train: bool = False,
    ) -> Array:
        """Forecasts the horizon.

        Args:
          inputs: [B, >= context_length, C]; the last ``context_length`` steps count.
          freq_token: int [B], the resolution (``data.forecasting.TOKENS``), for ``rpt``.
          future: [B, >= horizon, C], of which only exogenous channels are read.
          observed: [B, as inputs, C], 1 = known, 0 = missing; missing inputs must be finite.
          static: int [B, S], for ``static_vocab``.
          train: dropout on.

        Returns:
          float32 [B, horizon, forecast channels].

        Raises:
          ValueError: too short a context, or an argument that this network needs is missing.
        """
        c = self.config
        if inputs.ndim != 3 or inputs.shape[1] < c.context_length:
            raise ValueError(
                f"inputs of shape {inputs.shape}: [B, steps, C] with at least "
                f"context_length={c.context_length} steps are needed."
            )
        x = inputs[:, -c.context_length :].astype(jnp.float32)
        known = jnp.ones_like(x) if observed is None else observed[:, -c.context_length :]
        known = known.astype(jnp.float32)
        outside = np.array(c.exogenous_channels, int)
        if outside.size and (c.fcm or c.masked_context):
            if future is None:
                raise ValueError(
                    "this network has exogenous channels: give future, [B, horizon, C], with their "
                    "known values."
                )
            future = future[:, : c.horizon].astype(jnp.float32)
        given: Any = future
        past = x
        if c.masked_context:
            shape = (x.shape[0], c.horizon, x.shape[2])
            tail, tail_known = jnp.zeros(shape), jnp.zeros(shape)
            if outside.size:
                tail = tail.at[..., outside].set(given[..., outside])
                tail_known = tail_known.at[..., outside].set(1.0)
            x = jnp.concatenate([x, tail], axis=1)
            known = jnp.concatenate([known, tail_known], axis=1)
        x, loc, scale = normalise(x, known, c.scaling)
        patches = patchify(x, c.patch_length, c.patch_stride).astype(self.dtype)
        z = Backbone(c, self.dtype, name="backbone")(patches, freq_token, train)
        if c.use_decoder:
            z = Decoder(c, self.dtype, name="decoder")(z, patches, static, train)
        z = z.reshape(*z.shape[:2], -1)
        z = nn.Dropout(c.head_dropout, deterministic=not train)(z)
        y = Linear(c.prediction_length, dtype=self.dtype, name="head")(z)
        y = jnp.swapaxes(y, 1, 2)[:, : c.horizon].astype(jnp.float32)
        targets = np.array(c.targets or range(x.shape[2]))
        y = y[..., targets]
        if c.fcm:
            order = np.concatenate([targets, outside])
            if c.fcm_normalise:
                past = (past - loc) / scale
                given = None if given is None else (given - loc) / scale
            y = ExogenousMixer(c, self.dtype, name="exogenous")(
                y,
                past[:, past.shape[1] - c.fcm_context :, order],
                given[..., outside] if outside.size else None,
                train,
            ).astype(jnp.float32)
        return y * scale[..., targets] + loc[..., targets]


def normalise(x: Array, observed: Array, scaling: str) -> tuple[Array, Array, Array]:
    """Normalises windows [B, T, C] over time; returns them, ``loc`` and ``scale`` ([B, 1, C]).

    'std': scale = sqrt(var + 1e-5), so that a constant window stays finite.
    """
    if scaling == "none":
        return x, jnp.zeros_like(x[:, :1]), jnp.ones_like(x[:, :1])
    count = jnp.maximum(observed.sum(axis=1, keepdims=True), 1.0)
    if scaling == "mean":
        scale = jnp.maximum((jnp.abs(x) * observed).sum(axis=1, keepdims=True) / count, 1e-10)
        return x / scale, jnp.zeros_like(scale), scale
    loc = (x * observed).sum(axis=1, keepdims=True) / count
    variance = jnp.square((x - loc) * observed).sum(axis=1, keepdims=True) / count
    scale = jnp.sqrt(variance + 1e-5)
    return (x - loc) / scale, loc, scale


def patchify(x: Array, length: int, stride: int) -> Array:
    """Cuts the end of [B, T, C] into patches [B, C, n, length], n = (T - length) // stride + 1."""
    n = (x.shape[1] - length) // stride + 1
    x = jnp.swapaxes(x[:, x.shape[1] - length - stride * (n - 1) :], 1, 2)
    if stride == length:
        return x.reshape(*x.shape[:2], n, length)
    return x[..., np.arange(n)[:, None] * stride + np.arange(length)]


def forecast(
    module: TTM,
    variables: PyTree,
    inputs: Array,
    horizon: int,
    *,
    future: Array | None = None,
    observed: Array | None = None,
    freq_token: Array | None = None,
    static: Array | None = None,
) -> Array:
    """Forecasts any number of steps: the first ones of the network's horizon, or several horizons.

    A longer horizon feeds forecasts back as observed values (recursion); each pass normalises its
    context anew. Recommended for small extensions only.

    Args:
      module: the network.
      variables: its variables.
      inputs: [B, >= context_length, C].
      horizon: steps to forecast.
      future: [B, horizon, C], where exogenous channels, or channels that are not forecast, exist.
      observed, freq_token, static: see ``TTM``.

    Returns:
      float32 [B, horizon, forecast channels].

    Raises:
      ValueError: ``future`` is needed and missing.
    """
    step = module.config.horizon
    targets = np.array(module.config.targets or range(inputs.shape[2]))
    passes = -(-horizon // step)
    if passes > 1 and future is None and len(targets) < inputs.shape[2]:
        raise ValueError(
            f"a horizon of {horizon} steps needs {passes} passes of {step}, and channels that are "
            "not forecast: give future, [B, horizon, C], with their values."
        )
    if future is not None:
        future = jnp.pad(
            future[:, :horizon], ((0, 0), (0, passes * step - horizon), (0, 0)), mode="edge"
        )
    known = jnp.ones_like(inputs) if observed is None else observed
    outputs: list[Array] = []
    for i in range(passes):
        ahead: Any = None if future is None else future[:, i * step : (i + 1) * step]
        y: Any = module.apply(
            variables, inputs, freq_token=freq_token, future=ahead, observed=known, static=static
        )
        outputs.append(y)
        rows = y if len(targets) == inputs.shape[2] else ahead.at[..., targets].set(y)
        inputs = jnp.concatenate([inputs[:, step:], rows.astype(inputs.dtype)], axis=1)
        known = jnp.concatenate([known[:, step:], jnp.ones_like(rows, known.dtype)], axis=1)
    return jnp.concatenate(outputs, axis=1)[:, :horizon]
