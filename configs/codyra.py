"""CoDyRA: continual learning of an image-text model with low-rank changes of selected ranks."""

from typing import Any

import ml_collections

from transfer_jax.training import base_config, fit_config

VARIANTS = {
    "digits": "scikit-learn's digits in several styles, a toy CLIP of two towers",
    "handwriting": "MNIST, Omniglot and the UCI digits from TRANSFER_JAX_DATA, fixed prototypes",
}


def get_config(variant: str = "digits") -> ml_collections.ConfigDict:
    return {"digits": _digits, "handwriting": _handwriting}[variant]()


def _small() -> ml_collections.ConfigDict:
    config = base_config("codyra")
    config.methods = ("zero_shot", "full", "wise_ft", "lwf", "lora", "codyra", "l1", "joint")
    config.batch_size = 64
    config.eval_batch_size = 500
    config.text_chunk = 0
    config.adapted = ml_collections.ConfigDict(
        {
            "image": r"^image/.*kernel$",
            "text": r"^text/.*/(query|key|value|out|up|down)/kernel$",
            "axes": ((r"/(query|key|value)/kernel$", "ioo"), (r"/out/kernel$", "iio")),
        }
    )
    config.base = _fit(700, 1e-3)
    config.full = _fit(200, 1e-3, schedule="cosine")
    config.adapt = _fit(200, 3e-3, schedule="cosine")
    config.joint = _fit(800, 1e-3, schedule="cosine")
    config.wise_ft = ml_collections.ConfigDict({"share": 0.8})
    config.lwf = ml_collections.ConfigDict({"weight": 0.1, "temperature": 2.0})
    config.lora = ml_collections.ConfigDict({"ranks": (1, 2, 4, 8), "placement": "all"})
    config.codyra = ml_collections.ConfigDict(
        {
            "rank": 8, "largest": (0.0, 0.0025, 0.005, 0.012, 0.024), "prox": "released", "levels": 50,
            "dense": 0.5, "placement": "all",
        }
    )  # fmt: skip
    config.l1 = ml_collections.ConfigDict({"strength": 0.2})
    return config


def _digits() -> ml_collections.ConfigDict:
    config = _small()
    config.data = ml_collections.ConfigDict(
        {
            "kind": "digits", "base": ("plain", "mirrored"),
            "tasks": ("inverted", "turned", "shuffled", "checkered"), "shots": 16,
        }
    )  # fmt: skip
    config.model = ml_collections.ConfigDict(
        {
            "kind": "two_tower", "scale": 20.0, "embedding": 64,
            "image": {"features": 96, "depth": 3, "expand": 2},
            "text": {"features": 32, "depth": 1, "num_heads": 4, "expand": 2},
        }
    )  # fmt: skip
    return config


def _handwriting() -> ml_collections.ConfigDict:
    config = _small()
    config.data = ml_collections.ConfigDict({"kind": "handwriting", "shots": 16})
    config.adapted.text = ""
    config.model = ml_collections.ConfigDict(
        {
            "kind": "prototypes",
            "scale": 20.0,
            "embedding": 64,
            "image": {"features": 128, "depth": 4, "expand": 2},
        }
    )
    return config


def _fit(steps: int, learning_rate: float, **options: Any) -> ml_collections.ConfigDict:
    """A stage of Adam without weight decay, with the paper's second moment."""
    optimizer = {"name": "adam", "learning_rate": learning_rate, "b2": 0.9999, **options}
    return fit_config(steps=steps, optimizer=optimizer, log_every=50)
