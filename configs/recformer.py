"""Recformer (Li et al. 2023): sequential recommendation from the items' text alone.

For the names of runs and baselines see ``transfer_jax/papers/recformer.py``. Measured on one CPU
core that other jobs shared, ``transfer-jax run recformer:VARIANT --config.seed=0`` and on; leave
one out, all items ranked, seen items removed, ties against the right item. "Cold": users whose
right item is in no training history, as a fifth of the items is hidden from all of them.

``generated`` (200 items), three seeds, mean and standard deviation; two minutes of CPU time each:

===============  =============  =============  =============  =============
model            HR@10, warm    NDCG@10, warm  HR@10, cold    NDCG@10, cold
===============  =============  =============  =============  =============
two_stage        0.724 (0.035)  0.558 (0.041)  0.685 (0.047)  0.506 (0.045)
frozen_items     0.730 (0.026)  0.584 (0.019)  0.678 (0.034)  0.487 (0.059)
trainable_items  0.762 (0.014)  0.621 (0.010)  0.519 (0.049)  0.224 (0.051)
scratch          0.699 (0.041)  0.507 (0.038)  0.639 (0.018)  0.430 (0.009)
zero_shot        0.679 (0.010)  0.536 (0.015)  0.688 (0.013)  0.540 (0.034)
random           0.132 (0.014)  0.061 (0.012)  0.216 (0.078)  0.113 (0.029)
pop              0.191 (0.006)  0.084 (0.004)  0              0
item_knn         0.779 (0.015)  0.597 (0.019)  0              0
tfidf            0.643 (0.024)  0.375 (0.018)  0.640 (0.047)  0.291 (0.033)
sasrec_ce        0.806 (0.018)  0.660 (0.016)  0              0
===============  =============  =============  =============  =============

* Items that nobody has used are found nearly as well as known ones, and better than by TF-IDF;
  models of item numbers cannot find them. For warm items SASRec stays best.
* Pre-training helps: ``two_stage`` is above ``scratch`` with every seed (warm, paired over users:
  +0.034, +0.074, +0.047, p <= 0.0015; cold: +0.030, +0.066, +0.135, the first not significant).
  What is pre-trained has taken more steps, however.
* That stage 1 renews the items' vectors does not pay here: for warm items ``frozen_items`` is as
  good or better with all three seeds (by 0.023, 0.004 and 0.052).
* A trainable matrix is best of the text models for warm items and loses half of NDCG for cold ones:
  only the softmax's denominator moves their rows. Cold items are best left alone (``zero_shot``).

``scientific`` (1,585 items), three seeds, all values; about four minutes each:

===============  =================  =================  =================  =================
model            HR@10, warm        NDCG@10, warm      HR@10, cold        NDCG@10, cold
===============  =================  =================  =================  =================
two_stage        0.089 0.095 0.116  0.053 0.058 0.071  0.072 0.055 0.059  0.039 0.024 0.028
frozen_items     0.094 0.107 0.119  0.056 0.068 0.074  0.068 0.050 0.062  0.033 0.023 0.028
scratch          0.097 0.097 0.096  0.055 0.061 0.063  0.065 0.056 0.054  0.037 0.024 0.023
zero_shot        0.079 0.093 0.097  0.043 0.054 0.054  0.079 0.062 0.084  0.043 0.029 0.045
random           0.026 0.034 0.016  0.013 0.016 0.007  0.061 0.039 0.025  0.031 0.020 0.013
pop              0.062 0.060 0.070  0.029 0.029 0.032  0.000 0.000 0.000  0.000 0.000 0.000
item_knn         0.146 0.140 0.163  0.095 0.093 0.110  0.006 0.005 0.005  0.005 0.005 0.003
tfidf            0.139 0.140 0.155  0.084 0.085 0.097  0.175 0.134 0.114  0.115 0.083 0.065
sasrec_ce        0.142 0.155 0.165  0.089 0.096 0.109  0.000 0.000 0.000  0.000 0.000 0.000
===============  =================  =================  =================  =================

* On cold items the text is worth something and item numbers nothing (``two_stage`` above SASRec,
  p < 1e-7). Nothing else of the paper is seen at this size: TF-IDF is far better throughout, SASRec
  on warm items.
* ``two_stage`` is not above ``scratch`` with two of the seeds (p >= 0.3) and is with the third (by
  0.008 warm, p = 0.017; by 0.006 cold, p = 0.08). ``frozen_items`` is better on warm items with
  all (by 0.003, 0.009 and 0.003; p = 0.1, 1e-4, 0.1), and fine-tuning takes from cold items what it
  gives to warm ones.
* The mean of a drawn encoder's states is a noisy bag of words: without any training (``random``) it
  finds cold items at 0.03 to 0.06, as the draw will have it, so that training gains little there
  with two seeds and much with the third.
* Fine-tuning at the rate of pre-training, 3e-3, was tried first, with seed 0: its training loss
  did not fall in stage 1; test NDCG@10 0.051 warm and 0.033 cold. 1e-3 is what is set.

Another domain. ``generated`` with ``--config.categories.attribute=category --config.cold=0.0
--config.tokenizer.kind=bpe --config.tokenizer.size=400 --config.tokenizer.limits="(12,6,12)"
--config.buckets="(121,)" --config.runs="('two_stage','scratch','zero_shot','random')"`` pre-trains
on one half of the groups, everything else happens in the other half. They share words of titles,
not of categories and brands. NDCG@10, seeds 0 / 1 / 2:

    two_stage    0.646 / 0.641 / 0.655      zero_shot    0.204 / 0.148 / 0.166
    scratch      0.642 / 0.579 / 0.615      random       0.196 / 0.089 / 0.072
    tfidf        0.620 / 0.618 / 0.613      sasrec_ce    0.777 / 0.736 / 0.779

What was learned elsewhere helps: ``two_stage`` is above ``scratch`` by 0.003, 0.062 and 0.039
(paired over users p = 0.8, 2e-6, 3e-4), and is a little above TF-IDF; it is below item numbers.

With a tenth of the other half's users to fine-tune on (the same with ``--config.user_share=0.1``)
it does harm: ``two_stage`` 0.427 / 0.431 / 0.337, ``scratch`` 0.535 / 0.519 / 0.390 (p <= 0.003).

``zero_shot``, halves of the categories of Scientific, seeds 0 / 1 / 2, 1,622, 1,404 and 1,558 users
with a warm right item (13 to 38 cold ones are too few to compare), NDCG@10, the same runs:

    two_stage    0.077 / 0.075 / 0.062      zero_shot    0.033 / 0.025 / 0.013
    scratch      0.077 / 0.075 / 0.058      random       0.017 / 0.019 / 0.013
    tfidf        0.133 / 0.136 / 0.114      sasrec_ce    0.124 / 0.113 / 0.095
    item_knn     0.145 / 0.141 / 0.107      pop          0.045 / 0.051 / 0.048

Pre-trained on some 5,000 interactions of the first half, the network is above its first draw with
one seed (p < 1e-4; the others 0.05 and 0.9) and below popularity with all; nothing of it is left
after fine-tuning (``two_stage`` less ``scratch``: p >= 0.4). So few interactions teach nothing that
lasts.

The variants of full scale (``pretrain_amazon7``, ``finetune_…``) were not run: they need the files
of Amazon's reviews and a Longformer. Two are lowered for eight devices in the tests.
"""

import ml_collections

from transfer_jax.configuration import get_config as other_config
from transfer_jax.training import base_config, fit_config

VARIANTS = {
    "generated": "made-up items and users, every run; two to three minutes on two cores",
    "scientific": "Amazon Scientific, a part, a fifth of the items cold (needs TRANSFER_JAX_DATA)",
    "zero_shot": "the same, pre-trained on one half of the categories, tested on the other",
    "pretrain_amazon7": "as published: seven Amazon categories at 768 x 12 from a Longformer",
    "finetune_scientific": "as published: Industrial and Scientific, after pretrain_amazon7",
    "finetune_instruments": "as published: Musical Instruments, after pretrain_amazon7",
    "finetune_arts": "as published: Arts, Crafts and Sewing, after pretrain_amazon7",
    "finetune_office": "as published: Office Products, after pretrain_amazon7",
    "finetune_games": "as published: Video Games, after pretrain_amazon7",
    "finetune_pet": "as published: Pet Supplies, after pretrain_amazon7",
}

# Category of the files, items, share of the users that the published counts suggest.
FINE_TUNED = {
    "finetune_scientific": ("Industrial_and_Scientific", 5_327, 1.0),
    "finetune_instruments": ("Musical_Instruments", 10_611, 1.0),
    "finetune_arts": ("Arts_Crafts_and_Sewing", 22_855, 1.0),
    "finetune_office": ("Office_Products", 27_932, 1.0),
    "finetune_games": ("Video_Games", 15_402, 0.2),
    "finetune_pet": ("Pet_Supplies", 37_970, 0.2),
}
PRETRAINED = (
    "Automotive", "Cell_Phones_and_Accessories", "Clothing_Shoes_and_Jewelry", "Electronics",
    "Grocery_and_Gourmet_Food", "Home_and_Kitchen", "Movies_and_TV",
)  # fmt: skip


def get_config(variant: str = "generated") -> ml_collections.ConfigDict:
    config = base_config("recformer")
    config.task = "recommend"
    config.data = _data("generated", {"seed": 0, "users": 600, "items": 200, "groups": 10})
    config.data.options.length = 16
    config.data.texts.options = {"seed": 0, "items": 200, "groups": 10}
    config.cold = 0.2  # share of the items that are in no history
    config.user_share = 1.0  # of the users that fine-tuning sees
    # Halves of the catalogue for zero-shot transfer; '' = none.
    config.categories = ml_collections.ConfigDict({"attribute": "", "skip": 0, "words": 2})
    # size: of words and bpe; path: of files. limits: tokens of an attribute with its name.
    config.tokenizer = ml_collections.ConfigDict(
        {"kind": "words", "size": 4096, "path": "", "limits": (3, 2, 3)}
    )
    # window: both sides together, 0 = dense layers.
    config.model = ml_collections.ConfigDict(
        {
            "features": 32, "num_layers": 1, "num_heads": 2, "hidden": 64, "window": 16,
            "dropout": 0.1, "positions": 4_098, "max_items": 4, "use_types": True,
            "use_items": True, "pooling": "avg", "tied": True, "scan": False, "remat": False,
            "dtype": "",
        }
    )  # fmt: skip
    # The directory of a Longformer, or the work directory of a run of pretrain_amazon7.
    config.start = ml_collections.ConfigDict({"longformer": "", "run": ""})
    config.freeze_words = False
    config.temperature, config.mlm_weight = 0.05, 0.1
    config.negatives = ml_collections.ConfigDict({"kind": "all", "count": 100})
    config.buckets = (33,)  # tokens of a sequence
    config.batch_size, config.evaluation_batch_size = 64, 128
    config.chunk, config.block = 64, 0
    config.runs = ("two_stage", "frozen_items", "trainable_items", "scratch", "zero_shot", "random")
    config.baselines = ("pop", "item_knn", "tfidf", "sasrec_ce")
    config.seen, config.ties, config.ks, config.shown = "removed", "worst", (1, 5, 10, 20), 10
    config.pretraining = True
    optimizer = {
        "learning_rate": 3e-3, "weight_decay": 0.01, "clip_norm": 1.0, "warmup_steps": 20,
        "schedule": "linear", "decay_mask": r"(kernel|embedding)$",
    }  # fmt: skip
    config.pretrain = fit_config(
        steps=300, optimizer=optimizer, log_every=25, eval_every=100, checkpoint_every=100,
        monitor="validation/accuracy", select_best=True,
    )  # fmt: skip
    # The steps of fine-tuning are epochs (of stages 1 and 2; their sum where there is one stage).
    config.tune = fit_config(optimizer={**optimizer, "warmup_steps": 5}, log_every=10)
    config.epochs, config.patience = (12, 6), (3, 3)
    config.sasrec = _sasrec()

    if variant in ("scientific", "zero_shot"):
        _scientific(config, variant)
    elif variant == "pretrain_amazon7":
        _published_pretraining(config)
    elif variant in FINE_TUNED:
        _published_fine_tuning(config, *FINE_TUNED[variant])
    elif variant != "generated":
        raise ValueError(f"variant={variant!r}; choose one of {', '.join(VARIANTS)}")
    return config


def _data(name: str, options: dict, texts: str = "") -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {"name": name, "options": options, "texts": {"name": texts or name, "options": {}}}
    )


def _sasrec() -> ml_collections.ConfigDict:
    """The parts of BERT4Rec's config that its SASRec reads."""
    peer = other_config("bert4rec:generated")
    names = (
        "model", "cloze", "next_item", "ks", "ties", "block", "stride", "batch_size",
        "evaluation_batch_size", "train",
    )  # fmt: skip
    return ml_collections.ConfigDict({name: peer[name] for name in names})


def _scientific(config: ml_collections.ConfigDict, variant: str) -> None:
    config.data = _data("amazon_scientific_small", {})
    config.tokenizer.limits = (9, 3, 9)
    config.model.update({"features": 64, "num_layers": 2, "hidden": 256, "window": 32})
    config.model.max_items = 3
    config.buckets = (64,)
    config.pretrain.steps = 240
    config.pretrain.eval_every = config.pretrain.checkpoint_every = 80
    config.tune.optimizer.learning_rate = 1e-3
    config.epochs, config.patience = (5, 2), (2, 2)
    config.runs = ("two_stage", "frozen_items", "scratch", "zero_shot", "random")
    config.sasrec.model.update({"features": 64, "hidden": 256, "num_heads": 2})
    config.sasrec.batch_size = 128
    config.sasrec.train.steps = 600
    if variant == "zero_shot":
        # "Industrial & Scientific" begins every path of categories.
        config.categories = {"attribute": "category", "skip": 3, "words": 2}
        config.cold = 0.0
        config.tokenizer.kind = "bpe"
        config.tokenizer.limits = (12, 3, 12)
        config.buckets = (82,)
        config.runs = ("zero_shot", "random")
        config.baselines = ("pop", "item_knn", "tfidf")


def _files(categories: tuple[str, ...], core: bool = True) -> dict:
    kind = "_5" if core else ""
    return {
        "reviews": tuple(f"data/amazon2018/{name}{kind}.json.gz" for name in categories),
        "metadata": tuple(f"data/amazon2018/meta_{name}.json.gz" for name in categories),
    }


def _published(config: ml_collections.ConfigDict) -> None:
    from transfer_jax.nn.transformer import transformer_rules

    config.cold = 0.0
    config.tokenizer = {"kind": "files", "size": 0, "path": "models/longformer", "limits": 32}
    config.model.update(
        {
            "features": 768, "num_layers": 12, "num_heads": 12, "hidden": 3072, "window": 64,
            "max_items": 50, "pooling": "cls", "tied": False, "scan": True, "remat": True,
            "dtype": "bfloat16",
        }
    )  # fmt: skip
    config.buckets = (64, 128, 256, 512, 1024)
    config.block, config.chunk = 8192, 256
    config.expected = {"vocab_size": 50_265, "num_items": 1_000}  # for plans
    # The published vocabulary is an odd number: the embeddings are split by features alone.
    config.sharding.rules = (
        (r"(^|/)catalogue/", (("data", "fsdp"),)),
        (r"(^|/)table$", ("model",)),
        (r"(tokens/embedding|decoder)$", (None, "fsdp")),
        *((pattern, tuple(spec)) for pattern, spec in transformer_rules(scan=True)),
    )


def _published_pretraining(config: ml_collections.ConfigDict) -> None:
    """The released script: 64 pairs see one another, 8 such microbatches make a step.

    The paper finds that zero-shot ranking is best near step 4,000 and falls later.
    """
    _published(config)
    config.task = "pretrain"
    config.data = _data("amazon", _files(PRETRAINED))
    config.validation = _data("amazon", _files(("CDs_and_Vinyl",)))
    config.start.longformer = "models/longformer"
    config.freeze_words = True
    config.batch_size = config.evaluation_batch_size = 512
    config.pretrain = fit_config(
        steps=32 * 3_501_527 // 512, accumulate=8, log_every=100, eval_every=2_000,
        checkpoint_every=2_000, monitor="validation/accuracy", select_best=True,
        optimizer={"learning_rate": 5e-5, "clip_norm": 1.0, "schedule": "linear"},
    )  # fmt: skip


def _published_fine_tuning(
    config: ml_collections.ConfigDict, category: str, items: int, user_share: float
) -> None:
    _published(config)
    config.data = _data("amazon", {**_files((category,)), "user_share": user_share})
    config.start.run = "runs/recformer-pretrain_amazon7"
    config.expected.num_items = items
    config.pretraining = False
    config.block = 0
    config.seen, config.ties = "kept", "best"
    config.batch_size = 16
    config.runs = ("two_stage", "frozen_items", "trainable_items", "zero_shot")
    config.epochs, config.patience = (128, 128), (5, 5)
    config.tune = fit_config(
        log_every=100,
        optimizer={"learning_rate": 5e-5, "warmup_steps": 100, "schedule": "linear"},
    )
    config.sasrec.train.steps = 20_000
