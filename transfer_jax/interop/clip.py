"""CLIP in the layout of Hugging Face."""

from typing import Any

import jax
import jax.numpy as jnp

from transfer_jax.interop.family import Family, activation, activation_name, unsupported
from transfer_jax.interop.layouts import CONV, SAME, Tensor, attention, dense, embedding, norm
from transfer_jax.models.clip import Clip, ClipConfig, ClipTextConfig
from transfer_jax.models.vit import ViTConfig
from transfer_jax.nn.transformer import TransformerConfig

# What transformers sets where config.json says nothing.
_TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
_IMAGE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
_BOTH = {
    "num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0, "initializer_range": 0.02,
}  # fmt: skip

# An end token of 2 in config.json stands for the largest token: the first files had it by mistake.
_LARGEST = 2


def _stack(tower: dict[str, Any], options: dict[str, Any], **fields: Any) -> TransformerConfig:
    return TransformerConfig(**{
        "features": tower["hidden_size"], "num_layers": tower["num_hidden_layers"],
        "num_heads": tower["num_attention_heads"], "hidden": tower["intermediate_size"],
        "activation": activation(tower["hidden_act"]), "norm_eps": tower["layer_norm_eps"],
        "attention_dropout": tower["attention_dropout"],
        "init_scale": tower["initializer_range"], **fields, **options,
    })  # fmt: skip


def _build(config: dict[str, Any], head: str | None, options: dict[str, Any]) -> Clip:
    del head
    text = {**_BOTH, **_TEXT, **config.get("text_config", {})}
    image = {**_BOTH, **_IMAGE, **config.get("vision_config", {})}
    unsupported(text, model_type="clip_text_model")
    unsupported(image, model_type="clip_vision_model")
    width = config.get("projection_dim", 512)
    end = text.get("eos_token_id", 49_407)
    return Clip(ClipConfig(
        image=ViTConfig(
            stack=_stack(image, options), image_size=image.get("image_size", 224),
            patch_size=image.get("patch_size", 32), channels=image.get("num_channels", 3),
            patch_bias=False, norm_before=True, head="projection", projection=width,
        ),
        text=ClipTextConfig(
            vocab_size=text.get("vocab_size", 49_408), stack=_stack(text, options, causal=True),
            max_positions=text.get("max_position_embeddings", 77),
            end_token=None if end == _LARGEST else end, projection=width,
        ),
        logit_scale=config.get("logit_scale_init_value", 2.6592),
    ))  # fmt: skip


def _tower(s: TransformerConfig) -> dict[str, Any]:
    return {
        "hidden_size": s.features, "num_hidden_layers": s.num_layers,
        "num_attention_heads": s.num_heads, "intermediate_size": s.hidden or 4 * s.features,
        "hidden_act": activation_name(s.activation), "layer_norm_eps": s.norm_eps,
        "attention_dropout": s.attention_dropout, "initializer_range": s.init_scale,
    }  # fmt: skip


def _config(module: Clip) -> dict[str, Any]:
    c, image, text = module.config, module.config.image, module.config.text
    return {
        "model_type": "clip",
        "projection_dim": text.projection,
        "logit_scale_init_value": c.logit_scale,
        "text_config": {
            "model_type": "clip_text_model", **_tower(text.stack),
            "vocab_size": text.vocab_size, "max_position_embeddings": text.max_positions,
            "eos_token_id": _LARGEST if text.end_token is None else text.end_token,
            "projection_dim": text.projection,
        },
        "vision_config": {
            "model_type": "clip_vision_model", **_tower(image.stack),
            "image_size": image.image_size, "patch_size": image.patch_size,
            "num_channels": image.channels, "projection_dim": image.projection,
        },
    }  # fmt: skip


def _layers(theirs: str, ours: str, s: TransformerConfig) -> list[Tensor]:
    tensors = []
    for i in range(s.num_layers):
        a, b = f"{theirs}.encoder.layers.{i}", f"{ours}/stack/layers_{i}"
        parts = {p: f"{a}.self_attn.{p[0]}_proj" for p in ("query", "key", "value")}
        parts["out"] = f"{a}.self_attn.out_proj"
        tensors += [
            *attention(parts, f"{b}/attention", s.num_heads),
            *norm(f"{a}.layer_norm1", f"{b}/attention_norm"),
            *dense(f"{a}.mlp.fc1", f"{b}/mlp/up"),
            *dense(f"{a}.mlp.fc2", f"{b}/mlp/down"),
            *norm(f"{a}.layer_norm2", f"{b}/mlp_norm"),
        ]
    return tensors


def _tensors(module: Clip) -> list[Tensor]:
    c = module.config
    inputs = "vision_model.embeddings"
    return [
        Tensor(f"{inputs}.class_embedding", ("image/class_token",), SAME),
        Tensor(f"{inputs}.patch_embedding.weight", ("image/patches/kernel",), CONV),
        Tensor(f"{inputs}.position_embedding.weight", ("image/positions",), SAME),
        *norm("vision_model.pre_layrnorm", "image/norm_before"),
        *_layers("vision_model", "image", c.image.stack),
        *norm("vision_model.post_layernorm", "image/stack/norm"),
        *dense("visual_projection", "image/projection", bias=False),
        *embedding("text_model.embeddings.token_embedding", "text/tokens"),
        *embedding("text_model.embeddings.position_embedding", "text/positions"),
        *_layers("text_model", "text", c.text.stack),
        *norm("text_model.final_layer_norm", "text/stack/norm"),
        *dense("text_projection", "text/projection", bias=False),
        Tensor("logit_scale", ("logit_scale",), SAME),
    ]


def _inputs(module: Clip) -> tuple[tuple[Any, ...], dict[str, Any]]:
    image = module.config.image
    images = jax.ShapeDtypeStruct((1, *image.size, image.channels), jnp.float32)
    return (images, jax.ShapeDtypeStruct((1, 2), jnp.int32)), {}


CLIP = Family(
    name="clip",
    architectures={"CLIPModel": None},
    base="",
    build=_build,
    config=_config,
    tensors=_tensors,
    ignored=(r"embeddings\.position_ids$",),
    inputs=_inputs,
)
