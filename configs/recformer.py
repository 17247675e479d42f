"""Recformer (Li et al. 2023): sequential recommendation from the items' text alone.

For the names of runs and baselines see ``transfer_jax/papers/recformer.py``.
"""

import ml_collections

from transfer_jax.configuration import get_config as other_config
from transfer_jax.training import base_config, fit_config

VARIANTS = {
    "generated": "made-up items and users, every run; two minutes on two cores",
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
