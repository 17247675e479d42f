"""ViT and DeiT in the layout of Hugging Face, and images of another size."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transfer_jax.interop.family import (
    Family,
    activation,
    activation_name,
    labels,
    num_labels,
    unsupported,
)
from transfer_jax.interop.layouts import CONV, SAME, Layout, Tensor, attention, dense, norm
from transfer_jax.models.clip import Clip
from transfer_jax.models.vit import VisionTransformer, ViTConfig, vit_stack

PyTree = Any

_TOKEN = Layout(lambda x: (x[0, 0],), lambda x: x[None, None])  # [1, 1, H] <-> [H]
_POSITIONS = Layout(lambda x: (x[0],), lambda x: x[None])  # [1, N, H] <-> [N, H]


def _build(config: dict[str, Any], head: str | None, options: dict[str, Any]) -> VisionTransformer:
    unsupported(config, qkv_bias=True, pooler_act="tanh")
    stack = vit_stack(**{
        "features": config["hidden_size"], "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"], "hidden": config["intermediate_size"],
        "activation": activation(config["hidden_act"]), "norm_eps": config["layer_norm_eps"],
        "dropout": config["hidden_dropout_prob"],
        "attention_dropout": config["attention_probs_dropout_prob"],
        "init_scale": config["initializer_range"], **options,
    })  # fmt: skip
    size = config["image_size"]
    return VisionTransformer(ViTConfig(
        stack=stack, image_size=size if isinstance(size, int) else tuple(size),
        patch_size=config["patch_size"], channels=config["num_channels"],
        distillation_token=config["model_type"] == "deit", head=head, pooler=head is None,
        num_classes=num_labels(config),
    ))  # fmt: skip


def _config(module: VisionTransformer) -> dict[str, Any]:
    c, s = module.config, module.config.stack
    if c.norm_before or not c.patch_bias:
        raise TypeError("an image tower of CLIP")
    return {
        "model_type": "deit" if c.distillation_token else "vit",
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "num_channels": c.channels,
        "hidden_size": s.features,
        "num_hidden_layers": s.num_layers,
        "num_attention_heads": s.num_heads,
        "intermediate_size": s.hidden or 4 * s.features,
        "hidden_act": activation_name(s.activation),
        "layer_norm_eps": s.norm_eps,
        "hidden_dropout_prob": s.dropout,
        "attention_probs_dropout_prob": s.attention_dropout,
        "initializer_range": s.init_scale,
        "qkv_bias": True,
        **labels(c.num_classes),
    }


def _tensors(module: VisionTransformer) -> list[Tensor]:
    c, s = module.config, module.config.stack
    base = "deit." if c.distillation_token else "vit."
    inputs = f"{base}embeddings"
    tensors = [
        Tensor(f"{inputs}.cls_token", ("class_token",), _TOKEN),
        Tensor(f"{inputs}.position_embeddings", ("positions",), _POSITIONS),
        Tensor(f"{inputs}.patch_embeddings.projection.weight", ("patches/kernel",), CONV),
        Tensor(f"{inputs}.patch_embeddings.projection.bias", ("patches/bias",), SAME),
    ]
    if c.distillation_token:
        tensors.append(Tensor(f"{inputs}.distillation_token", ("distillation_token",), _TOKEN))
    for i in range(s.num_layers):
        theirs, ours = f"{base}encoder.layer.{i}", f"stack/layers_{i}"
        parts = {p: f"{theirs}.attention.attention.{p}" for p in ("query", "key", "value")}
        parts["out"] = f"{theirs}.attention.output.dense"
        tensors += [
            *norm(f"{theirs}.layernorm_before", f"{ours}/attention_norm"),
            *attention(parts, f"{ours}/attention", s.num_heads),
            *norm(f"{theirs}.layernorm_after", f"{ours}/mlp_norm"),
            *dense(f"{theirs}.intermediate.dense", f"{ours}/mlp/up"),
            *dense(f"{theirs}.output.dense", f"{ours}/mlp/down"),
        ]
    tensors += norm(f"{base}layernorm", "stack/norm")
    if c.head == "classification":
        tensors += dense("classifier", "classifier")
    elif c.head == "distilled":
        tensors += dense("cls_classifier", "classifier")
        tensors += dense("distillation_classifier", "distillation_classifier")
    elif c.pooler:
        tensors += dense(f"{base}pooler.dense", "pooler")
    return tensors


def _inputs(module: VisionTransformer) -> tuple[tuple[Any, ...], dict[str, Any]]:
    c = module.config
    return (jax.ShapeDtypeStruct((1, *c.size, c.channels), jnp.float32),), {}


def _family(name: str, architectures: dict[str, str | None]) -> Family:
    return Family(
        name=name,
        architectures=architectures,
        base=f"{name}.",
        build=_build,
        config=_config,
        tensors=_tensors,
        heads=(r"^((cls_|distillation_)?classifier)\.", rf"^({name}\.)?pooler\."),
        inputs=_inputs,
    )


VIT = _family("vit", {"ViTModel": None, "ViTForImageClassification": "classification"})
DEIT = _family(
    "deit",
    {
        "DeiTModel": None,
        "DeiTForImageClassification": "classification",
        "DeiTForImageClassificationWithTeacher": "distilled",
    },
)


def _cubic(old: int, new: int) -> np.ndarray:
    """Weights [new, old] of cubic interpolation between the centres of cells.

    Keys' kernel with a = -0.75 and repeated borders, as in torch; ``jax.image`` has a = -0.5.
    """
    a = -0.75
    at = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(at).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        d = np.abs(at - first - tap)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((d - 5) * d + 8) * a * d - 4 * a
        index = np.clip(first + tap, 0, old - 1)
        np.add.at(weights, (np.arange(new), index), np.where(d <= 1, near, far))
    return weights


def resize_images(
    module: Any, params: PyTree, image_size: int | tuple[int, int]
) -> tuple[Any, PyTree]:
    """Changes the size of the images that a model takes; bicubic interpolation of its positions.

    The patches stay as they are, so that there are more or fewer of them (Dosovitskiy et al. 2021,
    section 3.2).

    Args:
      module: a ``VisionTransformer`` or a ``Clip``.
      params: its parameters.
      image_size: (height, width) or the side of a square, multiples of the patches' side.

    Returns:
      The module and the parameters.
    """
    if isinstance(module, Clip):
        image, tower = resize_images(
            VisionTransformer(module.config.image), params["image"], image_size
        )
        config = dataclasses.replace(module.config, image=image.config)
        return module.clone(config=config), {**params, "image": tower}
    old = module.config
    new = dataclasses.replace(old, image_size=image_size)
    positions = np.asarray(params["positions"], np.float64)
    extra, patches = np.split(positions, [old.extra_tokens])
    patches = np.einsum(
        "hi,wj,ijf->hwf", _cubic(old.grid[0], new.grid[0]), _cubic(old.grid[1], new.grid[1]),
        patches.reshape(*old.grid, -1), optimize=True,
    )  # fmt: skip
    positions = np.concatenate([extra, patches.reshape(-1, positions.shape[-1])])
    resized = jnp.asarray(positions, params["positions"].dtype)
    return module.clone(config=new), {**params, "positions": resized}
