"""CoDyRA: continual learning of an image-text model with low-rank changes of selected ranks.

Test accuracy, mean and standard deviation over the seeds 0, 1, 2, of

    python -m launch.local --config=configs/codyra.py:VARIANT --workdir=DIR --config.seed=SEED

on 2 shared CPU cores: 145 s (digits) and 110 s (handwriting, with
--config.methods=zero_shot,full,lora,codyra) of processor time each with a compilation cache
(JAX_COMPILATION_CACHE_DIR, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0). ``current`` is the
accuracy on each task right after it, ``retained`` that on the base's two sets at the end. CoDyRA's
number is the largest threshold kappa_max; the thresholds 0.0025, 0.005, 0.012, 0.024 add up to
0.13, 0.26, 0.62, 1.25. Ranks are of 8; without any gradient 7.2, 6.3, 4.2, 1.6 would be left.

handwriting (image tower alone, fixed prototypes):

    method              current          retained         forgetting       drift           ranks
    zero-shot           0.064 +- 0.010   0.746 +- 0.008   0                0
    full fine-tuning    0.793 +- 0.004   0.191 +- 0.029   0.384 +- 0.033   10.97 +- 0.10
    LoRA r = 1          0.677 +- 0.009   0.247 +- 0.048   0.527 +- 0.012   13.17 +- 0.19
    LoRA r = 2          0.713 +- 0.008   0.272 +- 0.035   0.481 +- 0.038   13.83 +- 0.39
    LoRA r = 4          0.737 +- 0.009   0.231 +- 0.004   0.426 +- 0.036   14.61 +- 0.28
    LoRA r = 8          0.755 +- 0.012   0.251 +- 0.036   0.478 +- 0.032   15.65 +- 0.22
    gated LoRA          0.737 +- 0.008   0.229 +- 0.040   0.482 +- 0.046   16.59 +- 0.61   8
    CoDyRA 0.0025       0.739 +- 0.008   0.317 +- 0.082   0.423 +- 0.144   14.79 +- 0.35   7.9
    CoDyRA 0.005        0.715 +- 0.017   0.388 +- 0.055   0.336 +- 0.099   12.51 +- 0.44   7.1
    CoDyRA 0.012        0.542 +- 0.045   0.576 +- 0.025   0.157 +- 0.025   8.62 +- 0.52    4.6
    CoDyRA 0.024        0.178 +- 0.022   0.725 +- 0.021   -0.009 +- 0.026  4.17 +- 0.50    1.9

digits (two towers, both adapted):

    zero-shot           0.093 +- 0.021   0.984 +- 0.007   0                0
    full fine-tuning    0.900 +- 0.010   0.290 +- 0.131   0.502 +- 0.095   8.25 +- 0.25
    WiSE-FT             0.889 +- 0.010   0.445 +- 0.154   0.412 +- 0.042   6.32 +- 0.24
    LwF                 0.852 +- 0.020   0.270 +- 0.081   0.467 +- 0.059   8.41 +- 0.20
    LoRA r = 1          0.776 +- 0.054   0.533 +- 0.093   0.454 +- 0.136   8.71 +- 0.34
    LoRA r = 2          0.857 +- 0.019   0.474 +- 0.078   0.504 +- 0.048   9.29 +- 0.33
    LoRA r = 4          0.866 +- 0.009   0.387 +- 0.092   0.533 +- 0.065   10.09 +- 0.55
    LoRA r = 8          0.877 +- 0.017   0.311 +- 0.144   0.554 +- 0.057   11.18 +- 0.73
    gated LoRA          0.881 +- 0.013   0.274 +- 0.121   0.518 +- 0.040   11.46 +- 0.32   8
    CoDyRA 0.0025       0.872 +- 0.017   0.427 +- 0.111   0.482 +- 0.064   10.43 +- 0.51   7.6
    CoDyRA 0.005        0.853 +- 0.013   0.467 +- 0.185   0.439 +- 0.062   8.84 +- 0.68    6.7
    CoDyRA 0.012        0.641 +- 0.058   0.779 +- 0.038   0.211 +- 0.036   5.99 +- 0.72    4.4
    CoDyRA 0.024        0.200 +- 0.014   0.963 +- 0.016   0.010 +- 0.023   3.12 +- 0.38    1.8
    L1 penalty          0.863 +- 0.016   0.460 +- 0.111   0.448 +- 0.082   9.53 +- 0.08    8

Joint training of all tasks of digits reaches 0.911 +- 0.009 on them (Last) and retains 0.673.

What was required, and whether it held:

* With the threshold, forgetting and drift fall and retention rises. All of the means do, and drift
  in every seed. Retention does in every seed but one (digits, seed 1: 0.48, then 0.39); forgetting
  rises from one threshold to the next in single seeds.
* A sum of 0.26 against LoRA of the same rank: at least 8 points more are retained for at most 5
  points of current accuracy. Means: 13.7 for 4.0 (handwriting), 15.6 for 2.5 (digits). Seed 1 of
  handwriting pays 5.5. Drift is lower in every seed.
* It is better than LoRA r = 1 in both. Yes in every seed of handwriting; on digits it learns more,
  and retains less in two seeds of three.
* The curve over thresholds lies above the curve over LoRA's ranks. **It did not hold**: 7 of 12
  points of LoRA lie below on handwriting (the others above by 0.03 or less) and 6 of 12 on digits.
  What thresholds do add is the part of the curve beyond LoRA's: no rank retains as much as 0.012.
* Ranks adapt to the matrix. **Not claimed**: their spread between matrices is that of the null
  model, 0.83 (0.71) at 0.012 and 0.53 (0.57) at 0.024 on digits, 0.83 (0.71) and 0.70 (0.57) on
  handwriting. The mean rank exceeds the null's by 0.2 to 0.8: initialisation and schedule make most
  of it, as they do in the published numbers (8.3 and 8.2 of 16).

On digits WiSE-FT is better than CoDyRA at equal retention, and the L1 penalty, which leaves no
weight at zero, is no worse. Transfer to tasks not learned yet is chance for every method: so
small a base has no zero-shot ability on them. LwF's weight and the penalty's strength are the
better of two values by test accuracy on seed 7, which is in no table; the threshold 0.0025 was
added after seed 0.

``xtail`` and ``mtil`` are the published settings: 4,425,984 trained parameters on CLIP ViT-B/16.
``xtail`` is traced, sharded and lowered in the tests, and their recipe runs there on a small CLIP;
no published number was reproduced.
"""

from typing import Any

import ml_collections

from transfer_jax.training import base_config, fit_config

VARIANTS = {
    "digits": "scikit-learn's digits in several styles, a toy CLIP of two towers",
    "handwriting": "MNIST, Omniglot and the UCI digits from TRANSFER_JAX_DATA, fixed prototypes",
    "xtail": "CLIP ViT-B/16 on the ten sets of X-TAIL, 16 images per class, one label space",
    "mtil": "CLIP ViT-B/16 on the eleven sets of MTIL, 5 images per class",
}


def get_config(variant: str = "digits") -> ml_collections.ConfigDict:
    if variant in ("xtail", "mtil"):
        return _clip(variant)
    return {"digits": _digits, "handwriting": _handwriting}[variant]()


def _small() -> ml_collections.ConfigDict:
    config = base_config("codyra")
    config.methods = ("zero_shot", "full", "wise_ft", "lwf", "lora", "codyra", "l1", "joint")
    config.batch_size = 64
    config.eval_batch_size = 512
    config.text_chunk = 0
    config.keep_models = False
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
            "rank": 8, "largest": (0.0, 0.0025, 0.005, 0.012, 0.024), "prox": "released",
            "levels": 50, "dense": 0.5, "placement": "all",
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


# Name, data set, classes, template, training and test split.
_SETS = (
    ("Aircraft", "fgvc_aircraft", 100, "a photo of a {}, a type of aircraft.", "train", "test"),
    ("Caltech101", "caltech101", 102, "a photo of a {}.", "train", "test"),
    ("CIFAR100", "cifar100", 100, "a photo of a {}.", "train", "test"),
    ("DTD", "dtd", 47, "a photo of a {} texture.", "train", "test"),
    ("EuroSAT", "eurosat", 10, "a centered satellite photo of {}.", "train[:80%]", "train[80%:]"),
    ("Flowers", "oxford_flowers102", 102, "a photo of a {}, a type of flower.", "train", "test"),
    ("Food", "food101", 101, "a photo of {}, a type of food.", "train", "validation"),
    ("MNIST", "mnist", 10, 'a photo of the number: "{}".', "train", "test"),
    ("OxfordPet", "oxford_iiit_pet", 37, "a photo of a {}, a type of pet.", "train", "test"),
    ("Cars", "cars196", 196, "a photo of a {}.", "train", "test"),
    ("SUN397", "sun397", 397, "a photo of a {}.", "train", "test"),
)


def _clip(benchmark: str) -> ml_collections.ConfigDict:
    """The released settings (section 4) on data sets that TensorFlow Datasets prepares.

    ``model.path`` is a directory of Hugging Face's openai/clip-vit-base-patch16 with its
    tokenizer.json. FGVC-Aircraft is not in the catalogue and has to be prepared in the same format.
    TFDS splits differ from those of the paper where it has its own: numbers are near, not equal.
    The flowers' training split has 10 images per class.
    """
    config = base_config("codyra")
    config.methods = ("zero_shot", "codyra")
    config.batch_size = 64
    config.eval_batch_size = 256
    config.text_chunk = 64
    config.keep_models = True
    config.seed = 8
    shots = {"xtail": 16, "mtil": 5}[benchmark]
    sets = tuple(s for s in _SETS if benchmark == "mtil" or s[0] != "CIFAR100")
    config.data = ml_collections.ConfigDict(
        {"kind": "published", "sets": sets, "shots": shots, "directory": ""}
    )
    config.model = ml_collections.ConfigDict(
        {
            "kind": "clip", "path": "clip-vit-base-patch16", "patch_size": 16, "image_size": 224,
            "scan": True, "remat": True, "dtype": "bfloat16",
        }
    )  # fmt: skip
    config.adapted = ml_collections.ConfigDict(
        {
            "image": r"^image/stack/.*kernel$",
            "text": r"^text/stack/.*kernel$",
            # Twelve layers in one leaf: [layer, in, heads, width] and [layer, heads, width, out].
            "axes": ((r"/(query|key|value)/kernel$", "bioo"), (r"/out/kernel$", "biio")),
        }
    )
    config.adapt = fit_config(
        steps=500, log_every=50,
        optimizer={
            "name": "adamw", "learning_rate": 5e-4, "schedule": "cosine", "b1": 0.9, "b2": 0.9999,
        },
    )  # fmt: skip
    config.full = _fit(1000, 1e-5, schedule="cosine", warmup_steps=100)
    config.joint = _fit(10_000, 1e-5, schedule="cosine", warmup_steps=100)
    config.wise_ft = ml_collections.ConfigDict({"share": 0.8})
    config.lwf = ml_collections.ConfigDict({"weight": 0.5, "temperature": 2.0})
    config.lora = ml_collections.ConfigDict({"ranks": (4, 16), "placement": "all"})
    config.codyra = ml_collections.ConfigDict(
        {
            "rank": 16, "largest": (0.005,), "prox": "released", "levels": 50, "dense": 0.5,
            "placement": "all",
        }
    )  # fmt: skip
    config.l1 = ml_collections.ConfigDict({"strength": 0.01})
    return config


def _fit(steps: int, learning_rate: float, **options: Any) -> ml_collections.ConfigDict:
    """A stage of Adam without weight decay, with the paper's second moment."""
    optimizer = {"name": "adam", "learning_rate": learning_rate, "b2": 0.9999, **options}
    return fit_config(steps=steps, optimizer=optimizer, log_every=50)
