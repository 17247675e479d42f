"""aTLAS: task vectors composed with one learned coefficient per vector and parameter block.

``digits`` runs on scikit-learn's bundled images.
"""

from typing import Any

import ml_collections

from transfer_jax.training import base_config, fit_config

VARIANTS = {
    "digits": "handwritten digits in six domains; about two minutes on two cores",
    "vit": "the same with a small Vision Transformer",
    "clip_vit_b32": "the published setting on CLIP ViT-B/32, as data: shapes and schedules",
}


def get_config(variant: str = "digits") -> ml_collections.ConfigDict:
    if variant == "clip_vit_b32":
        return _clip_vit_b32()
    config = _digits()
    if variant == "vit":
        config.model = ml_collections.ConfigDict(
            {
                "kind": "vit", "embedding": 64, "patch_size": 2, "features": 48, "depth": 3,
                "num_heads": 4, "expand": 2, "dtype": "float32",
            }
        )  # fmt: skip
        config.parts = ("addition",)
    return config


def _digits() -> ml_collections.ConfigDict:
    config = base_config("atlas")
    config.parts = ("addition", "few_shot", "test_time", "negation")
    config.batch_size = 60
    config.eval_batch_size = 360
    config.logit_scale = 20.0
    config.data = ml_collections.ConfigDict(
        {
            "name": "digits",
            "options": {"fractions": (0.6, 0.2, 0.2)},
            "sources": ("plain", "inverted_rotated", "blocks", "flipped", "checkered"),
        }
    )
    config.model = ml_collections.ConfigDict(
        {
            "kind": "residual_mlp", "embedding": 64, "features": 96, "depth": 3, "expand": 2,
            "dtype": "float32",
        }
    )  # fmt: skip
    config.base = _fit(40, 1e-3)
    config.finetune = _fit(300, 1e-3)
    chosen = {
        "monitor": "validation/normalised", "monitor_mode": "max", "select_best": True,
    }  # fmt: skip
    config.addition = ml_collections.ConfigDict(
        {
            "alphas": tuple(round(0.05 * i, 2) for i in range(21)),
            "ties": tuple(round(0.8 + 0.1 * i, 1) for i in range(11)),
            "fit": _fit(300, 1e-2, eval_every=50, **chosen),
        }
    )
    chosen = {**chosen, "monitor": "validation/accuracy", "eval_every": 30}
    cosine = {"schedule": "cosine"}
    config.few_shot = ml_collections.ConfigDict(
        {
            "targets": ("faded", "rotated"),
            "shots": (1,),
            "num_parts": 20,
            "budgets": (),
            "rates": (1e-3, 3e-3),
            "coefficients": _fit(150, 1e-1, **cosine, **chosen),
            "weights": _fit(150, 1e-3, **cosine, **chosen),
            "adapter": _fit(150, 1e-3, groups=_tip_groups(), **cosine, **chosen),
            "joint": _fit(150, 1e-1, groups={**_tip_groups(), **_keys(1e-3)}, **cosine, **chosen),
        }
    )
    config.test_time = ml_collections.ConfigDict(
        {
            "target": "sheared", "norms": "norm_", "epochs": 2, "power": 0.5, "threshold": 0.9,
            "final_threshold": 1.0, "limit": 100, "share": 0.1, "fit": _fit(40, 1e-2),
        }
    )  # fmt: skip
    config.negation = ml_collections.ConfigDict(
        {
            "target": "plain", "control": "checkered", "keep": 0.95,
            "alphas": tuple(round(0.05 * i, 2) for i in range(21)),
            "base": _fit(200, 1e-3),
            "fit": _fit(100, 1e-2, checkpoint_every=10, keep=10),
        }
    )  # fmt: skip
    return config


def _clip_vit_b32() -> ml_collections.ConfigDict:
    """Section 4 and 5 on CLIP ViT-B/32 with 21 task vectors (the target's own is left out).

    Only data: running it needs CLIP's weights and text embeddings, and the 22 data sets. The
    encoder has the tower's shapes; query, key and value, one matrix in CLIP, share coefficients, so
    that there are 21 x 152 = 3,192.
    """
    config = base_config("atlas")
    config.parts = ("addition", "few_shot")
    config.batch_size = 128
    config.eval_batch_size = 512
    config.logit_scale = 100.0
    config.data = ml_collections.ConfigDict(
        {
            "name": "", "options": {},
            "sources": (
                "Cars", "DTD", "EuroSAT", "GTSRB", "MNIST", "RESISC45", "SUN397", "SVHN",
            ),
        }
    )  # fmt: skip
    config.model = ml_collections.ConfigDict(
        {
            "kind": "vit", "embedding": 512, "patch_size": 32, "features": 768, "depth": 12,
            "num_heads": 12, "expand": 4, "dtype": "bfloat16",
        }
    )  # fmt: skip
    config.image_size = 224
    config.num_vectors = 21
    config.tie = ((r"/(query|key|value)/", "/in_proj/"),)
    decay = {"weight_decay": 0.1, "clip_norm": 1.0}
    # Epochs differ from set to set; steps are those of 10 epochs of 50,000 images.
    config.finetune = _fit(3_900, 1e-5, schedule="cosine", warmup_steps=500, **decay)
    config.addition = ml_collections.ConfigDict({"fit": _fit(20 * 125, 1e-3, **decay)})
    config.few_shot = ml_collections.ConfigDict(
        {
            "shots": (1, 2, 4, 8, 16),
            "coefficients": _fit(10 * 125, 1e-1, schedule="cosine", **decay),
        }
    )
    return config


def _fit(steps: int, learning_rate: float, **options: Any) -> ml_collections.ConfigDict:
    """A stage of Adam; options of the optimiser and of the stage together."""
    own = ("schedule", "warmup_steps", "weight_decay", "clip_norm", "groups")
    optimizer = {k: options.pop(k) for k in own if k in options}
    stage = {"log_every": 50, **options}
    return fit_config(
        steps=steps, optimizer={"name": "adam", "learning_rate": learning_rate, **optimizer},
        **stage,
    )  # fmt: skip


def _tip_groups() -> dict[str, Any]:
    return {"blend": {"where": "^(alpha|beta)$", "learning_rate": 1e-1, "weight_decay": 0.0}}


def _keys(learning_rate: float) -> dict[str, Any]:
    return {"keys": {"where": "^keys$", "learning_rate": learning_rate, "weight_decay": 0.0}}
