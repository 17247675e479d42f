"""Tiny Time Mixers in the layout of granite-tsfm (``TinyTimeMixerForPrediction``)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transfer_jax.interop.family import Family, unsupported
from transfer_jax.interop.layouts import SAME, Tensor, attention, dense, embedding, norm
from transfer_jax.models.ttm import TTM, TTMConfig, level_factors

# Their name of each of our settings that is read and written as it is.
_SAME = {
    "context_length": "context_length",
    "prediction_length": "prediction_length",
    "patch_length": "patch_length",
    "patch_stride": "patch_stride",
    "channels": "num_input_channels",
    "d_model": "d_model",
    "expansion": "expansion_factor",
    "num_layers": "num_layers",
    "adaptive_patching_levels": "adaptive_patching_levels",
    "gated": "gated_attn",
    "mode": "mode",
    "self_attn": "self_attn",
    "self_attn_heads": "self_attn_heads",
    "dropout": "dropout",
    "head_dropout": "head_dropout",
    "rpt": "resolution_prefix_tuning",
    "rpt_vocab": "frequency_token_vocab_size",
    "use_decoder": "use_decoder",
    "decoder_layers": "decoder_num_layers",
    "decoder_d_model": "decoder_d_model",
    "decoder_levels": "decoder_adaptive_patching_levels",
    "decoder_mode": "decoder_mode",
    "decoder_raw_residual": "decoder_raw_residual",
    "fcm": "enable_forecast_channel_mixing",
    "fcm_context": "fcm_context_length",
    "fcm_use_mixer": "fcm_use_mixer",
    "fcm_layers": "fcm_mix_layers",
    "fcm_gated": "fcm_gated_attn",
    "fcm_prepend_past": "fcm_prepend_past",
}
# Lists there, tuples here; None there is () here.
_LISTS = {
    "prediction_channels": "prediction_channel_indices",
    "exogenous_channels": "exogenous_channel_indices",
    "static_vocab": "categorical_vocab_size_list",
}
_SCALING = {"std": "std", True: "std", "mean": "mean", None: "none", False: "none"}


def _build(config: dict[str, Any], head: str | None, options: dict[str, Any]) -> TTM:
    unsupported(
        config, norm_mlp="LayerNorm", norm_eps=1e-5, multi_scale=False, register_tokens=0,
        fft_length=0, multi_quantile_head=False, decompose=False, enable_base_norm_always=False,
        gate_mode="softmax", loss=("mse", "mae", "pinball", "huber", None),
    )  # fmt: skip
    fields: dict[str, Any] = {
        ours: config[theirs] for ours, theirs in _SAME.items() if theirs in config
    }
    fields |= {ours: tuple(config.get(theirs) or ()) for ours, theirs in _LISTS.items()}
    for name in ("prediction_channels", "exogenous_channels"):
        fields[name] = tuple(sorted(fields[name]))
    positional = "none"
    if config.get("use_positional_encoding", False):
        positional = config.get("positional_encoding_type", "sincos")
    fields |= {
        "prediction_filter_length": config.get("prediction_filter_length") or 0,
        "scaling": _SCALING[config.get("scaling", "std")],
        "positional": positional,
        "masked_context": head == "masked",
    }
    dtype = options.pop("dtype", jnp.float32)
    return TTM(TTMConfig(**{**fields, **options}), dtype)


def _config(module: TTM) -> dict[str, Any]:
    if not isinstance(module, TTM):
        raise TypeError("no Tiny Time Mixer")
    c = module.config
    if c.norm != "layer" or c.fcm_normalise or c.positional == "zero":
        raise ValueError(
            "norm='batch', fcm_normalise and positional='zero' have no form in this layout."
        )
    sincos = c.positional in ("none", "sincos")
    return {
        "model_type": "tinytimemixer",
        **{theirs: getattr(c, ours) for ours, theirs in _SAME.items()},
        **{theirs: list(getattr(c, ours)) or None for ours, theirs in _LISTS.items()},
        "prediction_filter_length": c.prediction_filter_length or None,
        "scaling": None if c.scaling == "none" else c.scaling,
        "use_positional_encoding": c.positional != "none",
        "positional_encoding_type": "sincos" if sincos else c.positional,
        "norm_mlp": "LayerNorm",
        "norm_eps": 1e-5,
        "loss": "mse",
        "post_init": False,
    }


def _mixing(theirs: str, ours: str, gated: bool, heads: int = 0) -> list[Tensor]:
    tensors = [
        *norm(f"{theirs}.norm.norm", f"{ours}/norm/norm"),
        *dense(f"{theirs}.mlp.fc1", f"{ours}/up"),
        *dense(f"{theirs}.mlp.fc2", f"{ours}/down"),
    ]
    if gated:
        tensors += dense(f"{theirs}.gating_block.attn_layer", f"{ours}/gate/logits")
    if heads:
        parts = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
        names = {part: f"{theirs}.self_attn_layer.{name}" for part, name in parts.items()}
        tensors += attention(names, f"{ours}/attention", heads)
        tensors += norm(f"{theirs}.norm_attn.norm", f"{ours}/attention_norm/norm")
    return tensors


def _mixer(
    theirs: str, ours: str, config: TTMConfig, *, levels: int, layers: int, mode: str,
    gated: bool, patches: int, features: int,
) -> list[Tensor]:  # fmt: skip
    tensors: list[Tensor] = []
    for i, factor in enumerate(level_factors(features, levels)):
        for j in range(layers):
            layer = f"{theirs}.{i}.mixer_layers.{j}" if levels else f"{theirs}.{j}"
            name = f"{ours}/level_{i}_layer_{j}"
            if mode == "mix_channel":
                tensors += _mixing(f"{layer}.channel_feature_mixer", f"{name}_channels", gated)
            if patches * factor > 1:
                heads = config.self_attn_heads if config.self_attn else 0
                tensors += _mixing(f"{layer}.patch_mixer", f"{name}_patches", gated, heads)
            tensors += _mixing(f"{layer}.feature_mixer", f"{name}_features", gated)
    return tensors


def _tensors(module: TTM) -> list[Tensor]:
    c = module.config
    encoder = "backbone.encoder"
    tensors = dense(f"{encoder}.patcher", "backbone/patch")
    if c.rpt:
        tensors += [
            *embedding(f"{encoder}.freq_mod.0", "backbone/prefix_table"),
            *dense(f"{encoder}.freq_mod.1", "backbone/prefix_hidden"),
            *dense(f"{encoder}.freq_mod.3", "backbone/prefix_out"),
        ]
    if c.positional == "random":
        name = f"{encoder}.positional_encoder.position_enc"
        tensors.append(Tensor(name, ("backbone/positions",), SAME))
    tensors += _mixer(
        f"{encoder}.mlp_mixer_encoder.mixers", "backbone/mixer", c,
        levels=c.adaptive_patching_levels, layers=c.num_layers, mode=c.mode, gated=c.gated,
        patches=c.num_patches, features=c.d_model,
    )  # fmt: skip
    if c.use_decoder:
        if c.d_model != c.decoder_d_model:
            tensors += dense("decoder.adapter", "decoder/adapter")
        if c.decoder_raw_residual:
            tensors += dense("decoder.decoder_raw_embedding", "decoder/raw")
        for i in range(len(c.static_vocab)):
            name = f"decoder.decoder_cat_embedding_layer.embedding_layers.{i}"
            tensors += embedding(name, f"decoder/static_{i}")
        tensors += _mixer(
            "decoder.decoder_block.mixers", "decoder/mixer", c, levels=c.decoder_levels,
            layers=c.decoder_layers, mode=c.decoder_mode, gated=c.gated, patches=c.num_patches,
            features=c.decoder_d_model,
        )  # fmt: skip
    tensors += dense("head.base_forecast_block", "head")
    if c.fcm:
        if c.fcm_context and c.fcm_use_mixer:
            total = len(c.targets or range(c.channels)) + len(c.exogenous_channels)
            tensors += dense("head.fcm_block.fcm_embedding", "exogenous/embed")
            tensors += _mixer(
                "head.fcm_block.exog_mixer.mixers", "exogenous/mixer", c, levels=0,
                layers=c.fcm_layers, mode="common_channel", gated=c.fcm_gated, patches=total,
                features=2 * (2 * c.fcm_context + 1),
            )  # fmt: skip
        if c.fcm_gated:
            tensors += dense("head.fcm_block.fcm_gating_block.attn_layer", "exogenous/gate/logits")
        tensors += dense("head.fcm_block.mlp", "exogenous/out")
    return tensors


def _inputs(module: TTM) -> tuple[tuple[Any, ...], dict[str, Any]]:
    c = module.config
    kwargs: dict[str, Any] = {}
    if c.rpt:
        kwargs["freq_token"] = np.zeros((1,), np.int32)
    if c.exogenous_channels:
        kwargs["future"] = np.zeros((1, c.horizon, c.channels), np.float32)
    if c.static_vocab:
        kwargs["static"] = np.zeros((1, len(c.static_vocab)), np.int32)
    return (jax.ShapeDtypeStruct((1, c.context_length, c.channels), jnp.float32),), kwargs


TTM_FAMILY = Family(
    name="tinytimemixer",
    architectures={
        "TinyTimeMixerForPrediction": None,
        "TinyTimeMixerForMaskedPrediction": "masked",
    },
    base="",
    build=_build,
    config=_config,
    tensors=_tensors,
    # A fixed table, which we compute.
    ignored=(r"positional_encoder\.position_enc$",),
    inputs=_inputs,
)
