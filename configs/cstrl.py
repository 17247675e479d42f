"""CSTRL: sequential transfer for radiology reports, held by the Fisher information.

Measured on 2 CPU cores that other jobs shared.

``fisher_optdigits``: five tasks of permuted optdigits, one after the other; accuracy over the five
at the end, mean and standard deviation over the seeds 0, 1, 2, and mean forgetting, of

    python -m launch.local --config=configs/cstrl.py:fisher_optdigits --workdir=DIR \\
      --config.seed=SEED --config.enforce=False

with TRANSFER_JAX_DATA set; about 2.5 minutes of processor time each.

    Fisher information   lambda   gradient step            proximal step
    none                    0     0.363 +- 0.022  0.735
    L2 (F = 1)           0.03     0.579 +- 0.076  0.406
    L2 (F = 1)            0.3     0.580 +- 0.037  0.222
    exact                   1     0.633 +- 0.051  0.387
    exact                  10     0.783 +- 0.026  0.191    0.636 +- 0.009  0.383
    exact                 100     0.773 +- 0.031  0.189
    exact                 300     diverged (3 of 3)        0.824 +- 0.012  0.129
    empirical              10     0.769 +- 0.026  0.221
    empirical             100     0.771 +- 0.064  0.196
    empirical            1000     diverged (3 of 3)        0.780 +- 0.039  0.185
    batched, 32            10     0.501 +- 0.013  0.558
    batched, 32           100     0.720 +- 0.023  0.277
    batched, 32          1000     0.769 +- 0.026  0.206
    batched, 32         10000     diverged (3 of 3)        0.789 +- 0.050  0.184

Required, and held with every seed: EWC (exact or empirical, lambda 10) >= 0.70, >= fine-tuning
+ 0.30, >= the better L2 + 0.08; the proximal step stays finite where the gradient step diverges.
Held with two of three seeds: the trace of the empirical diagonal is 20 to 60 times that of the
batched one (25.3, 18.0, 28.5). With lambda chosen anew the batched shortcut is as good; what it
breaks is the meaning of lambda, which then depends on the batch size. The proximal step is the
weaker one at lambda 10 (the momentum does not see the penalty) and the best one at 300.
``fisher``, with scikit-learn's digits, seed 0: fine-tuning 0.372, the better L2 0.618, exact at
lambda 10 0.873; one minute of processor time.

``open_i``, with fewer steps than the variant has so that three seeds took 20 minutes of processor
time, of

    python -m launch.local --config=configs/cstrl.py:open_i --workdir=DIR --config.seed=SEED \\
      --config.gsg.fit.steps=1200 --config.gsg.fit.eval_every=200 --config.summary.fit.steps=400

Validation, nats per token: of summaries, and of gap sentences (what is left of stage 1). Mean and
standard deviation over the seeds 0, 1, 2; without a deviation, seed 0 alone:

                             300 pairs                     2106 pairs
                             summary        gaps           summary        gaps
    from scratch             4.12                          3.49 +- 0.06
    fine-tuning              4.07 +- 0.01   4.19 +- 0.09   2.98 +- 0.03   3.39 +- 0.08
    L2, 100 x mean of F      4.12           3.87           3.12 +- 0.03   3.07 +- 0.13
    EWC, lambda 100          4.04           3.72           3.05 +- 0.03   3.00 +- 0.13
    EWC, 100 falling to 22   4.06           3.89           3.00           3.16
    EWC, lambda 1000         3.85 +- 0.01   2.83 +- 0.11   3.33           2.71

Required, and held with every seed (means in brackets): fine-tuning after gap sentences beats
scratch by 0.3 (0.52); EWC at lambda 100 keeps gap sentences 0.2 below fine-tuning (0.39) for at
most 0.15 in summaries (0.07), and is better than the matched L2 on both (0.08 and 0.07); with 300
pairs EWC at lambda 1000 lowers the loss of summaries itself by 0.1 (0.22).

None of this makes a good summariser. ROUGE-1 on the 263 test reports (means): nearest neighbour
by TF-IDF 0.542, EWC 0.484, fine-tuning 0.484, L2 0.478, scratch 0.461, constant 0.416, LexRank
0.114, first sentence 0.104. Every network is below retrieval, EWC does not differ from fine-tuning,
and the paper's gain of 2.3 points does not show at this size. The label F1 of networks (0.69) is
that of the constant sentence. Precision of single words without the brevity penalty, the paper's
"BLEU-1", would rank the constant sentence (0.58) above retrieval (0.56) and fine-tuning (0.55).

``grammar``, seed 0, two minutes of processor time: gap sentences do not help there (its conclusions
are in other words than its findings): loss of summaries from scratch 0.40, fine-tuning 0.45, EWC
0.45; ROUGE-1 0.92, 0.75, 0.75, retrieval 0.89. EWC and L2 keep gap sentences alike (1.85,
fine-tuning 2.00). The student alone is better than the distilled one (0.35 and 0.49). It shows that
the stages run, nothing more. ``t5_small`` and ``released`` have not been trained: they are lowered
at full size in the tests.
"""

from typing import Any

import ml_collections

from transfer_jax.training import base_config, fit_config

VARIANTS = {
    "grammar": "all stages on reports from a grammar; no files, two minutes of processor time",
    "open_i": "the stages on Open-I, with all pairs and with 300 (needs TRANSFER_JAX_DATA)",
    "t5_small": "the published setting on reports from a CSV file such as MIMIC-CXR's: "
    "--config.data.path=FILE --config.data.tokenizer=FILE --config.pretrained=DIRECTORY",
    "released": "the same with the conventions of the published code",
    "fisher": "elastic weight consolidation on permuted digits (scikit-learn's), by estimator",
    "fisher_optdigits": "the same with optdigits' own training images (needs TRANSFER_JAX_DATA)",
}


def get_config(variant: str = "grammar") -> ml_collections.ConfigDict:
    if variant.startswith("fisher"):
        return _fisher(variant)
    config = _reports()
    if variant == "open_i":
        _open_i(config)
    elif variant in ("t5_small", "released"):
        _t5_small(config, released=variant == "released")
    return config


def _method(start: str = "gsg", regulariser: str = "none", **changes: Any) -> dict[str, Any]:
    """A way to stage 3; see ``transfer_jax.papers.cstrl.transferred``."""
    method = {
        "start": start, "regulariser": regulariser, "strength": 0.0, "floor": 1.0,
        "penalty_step": "gradient", "tags": False,
    }  # fmt: skip
    return {**method, **changes}


def _reports() -> ml_collections.ConfigDict:
    """The stages of the paper, small."""
    config = base_config("cstrl")
    config.task = "reports"
    config.eval_batch_size = 64
    config.pretrained = ""
    config.data = ml_collections.ConfigDict(
        {
            "name": "generated", "seed": 0, "count": 3000, "path": "", "findings": "findings",
            "impression": "impression", "concepts": (), "lexicon": "", "tokenizer": "",
            "min_freq": 3,
        }
    )  # fmt: skip
    config.model = ml_collections.ConfigDict(
        {
            "features": 64, "num_layers": 2, "num_heads": 4, "head_dim": 16, "hidden": 192,
            "decoder_layers": 2, "dropout": 0.0, "dtype": "float32",
        }
    )  # fmt: skip
    lengths = {"source_length": 56, "target_length": 32, "batch_size": 16}
    best = {"monitor": "validation/nll", "monitor_mode": "min", "select_best": True}
    config.gsg = ml_collections.ConfigDict(
        {
            "reference": "rest", "target": "sentinel", "count_padding": False,
            **lengths, "fit": _fit(600, 2e-3, eval_every=200, **best),
        }
    )  # fmt: skip
    config.fisher = ml_collections.ConfigDict(
        {
            "kind": "empirical", "unit": "token_mean", "examples": 512, "batch_size": 64,
            "num_samples": 1, "chunk_size": 0,
        }
    )  # fmt: skip
    config.summary = ml_collections.ConfigDict({**lengths, "fit": _fit(200, 1e-3)})
    config.sizes = (0,)
    config.methods = ("scratch", "fine-tuning", "l2", "ewc", "unfreezing", "tags")
    config.few_methods = ()
    config.method = ml_collections.ConfigDict(
        {
            "scratch": _method("none"),
            "fine-tuning": _method(),
            "l2": _method("gsg", "l2_matched", strength=100.0),
            "ewc": _method("gsg", "ewc", strength=100.0),
            "ewc-falling": _method("gsg", "ewc", strength=100.0, floor=2 / 9),
            "ewc-strong": _method("gsg", "ewc", strength=1000.0),
            "ewc-proximal": _method("gsg", "ewc", strength=100.0, penalty_step="proximal"),
            "unfreezing": _method("gsg", "unfreeze"),
            "tags": _method(tags=True),
        }
    )
    config.kd = ml_collections.ConfigDict(
        {
            "scale": "paper", "teacher": "fine-tuning", "temperature": 20.0, "weight": 0.7,
            "batch_size": 16, "fit": _fit(200, 3e-3, schedule="constant"),
            "students": {"x8": {"num_layers": 1, "features": 32, "hidden": 64, "num_heads": 4}},
        }
    )  # fmt: skip
    config.decode = ml_collections.ConfigDict(
        {"max_new_tokens": 32, "num_beams": 1, "length_penalty": 1.0, "no_repeat_ngram": 0}
    )
    config.required = ml_collections.ConfigDict()
    config.enforce = False
    return config


def _open_i(config: ml_collections.ConfigDict) -> None:
    config.data.name = "open_i"
    config.gsg.source_length = config.summary.source_length = 72
    config.gsg.fit.steps = 1500
    config.summary.fit.steps = 500
    config.sizes = (300, 0)
    config.methods = ("scratch", "fine-tuning", "l2", "ewc", "ewc-falling", "ewc-strong")
    config.few_methods = config.methods
    config.kd.scale = "none"
    # Of means over seeds, so a single run only reports them.
    config.required = ml_collections.ConfigDict(
        {"transfer": 0.3, "kept": 0.2, "cost": 0.15, "few": 0.1}
    )


def _t5_small(config: ml_collections.ConfigDict, released: bool) -> None:
    """T5-small on 100,229 training pairs, the size that one log of the authors gives."""
    pairs = 100_229
    config.data.name = "csv"
    config.eval_batch_size = 128
    config.model = ml_collections.ConfigDict(
        {
            "vocab_size": 32_128, "features": 512, "num_layers": 6, "num_heads": 8, "head_dim": 64,
            "hidden": 2048, "decoder_layers": 6, "dropout": 0.1, "dtype": "bfloat16",
        }
    )  # fmt: skip
    config.gsg.update(
        source_length=256, target_length=256, batch_size=32, reference="impression",
        target="joined" if released else "sentinel", count_padding=released,
    )  # fmt: skip
    epoch = pairs // 32
    published = {"name": "adamw", "weight_decay": 0.01, "clip_norm": 1.0}
    config.gsg.fit = fit_config(
        steps=30 * epoch, eval_every=epoch, checkpoint_every=epoch, monitor="validation/nll",
        monitor_mode="min", select_best=True,
        optimizer={**published, "learning_rate": 3e-3, "schedule": "linear"},
    )  # fmt: skip
    config.fisher.update(kind="batched" if released else "empirical", examples=pairs, batch_size=32)
    config.summary.update(source_length=512, target_length=256, batch_size=16)
    epoch = pairs // 16
    config.summary.fit = fit_config(
        steps=20 * epoch, eval_every=epoch, checkpoint_every=epoch,
        optimizer={**published, "learning_rate": 2e-3, "schedule": "linear"},
    )  # fmt: skip
    config.methods = ("scratch", "fine-tuning", "ewc", "unfreezing")
    # The published code has no factor 1/2, and a strength that stays as it is.
    strength, floor = (1.8, 1.0) if released else (0.9, 0.2 / 0.9)
    config.method.ewc.update(strength=strength, floor=floor)
    epoch = pairs // 32
    config.kd.update(batch_size=32, scale="released" if released else "paper", teacher="ewc")
    config.kd.fit = fit_config(
        steps=20 * epoch,
        checkpoint_every=epoch,
        optimizer={"name": "adamw", "weight_decay": 0.01, "learning_rate": 3e-3},
    )
    config.kd.students = ml_collections.ConfigDict(
        {
            "x8": {"num_layers": 4, "features": 181, "hidden": 256, "num_heads": 6},
            "x16": {"num_layers": 3, "features": 128, "hidden": 128, "num_heads": 4},
            "x32": {"num_layers": 2, "features": 90, "hidden": 64, "num_heads": 2},
        }
    )
    config.decode.max_new_tokens = 20 if released else 64


def _fit(steps: int, learning_rate: float, schedule: str = "linear", **changes: Any) -> Any:
    """A stage of Adam whose rate falls to 0."""
    optimizer = {"name": "adam", "learning_rate": learning_rate, "schedule": schedule}
    return fit_config(steps=steps, optimizer=optimizer, log_every=100, **changes)


def _fisher(variant: str) -> ml_collections.ConfigDict:
    config = base_config("cstrl")
    config.task = "fisher"
    full = variant == "fisher_optdigits"
    config.data = ml_collections.ConfigDict({"name": "optdigits" if full else "digits", "seed": 0})
    config.tasks = 5
    config.batch_size = 32
    config.model = ml_collections.ConfigDict({"hidden": (128, 128)})
    # 5 epochs of 3,823 images, or 10 of 1,437.
    config.train = fit_config(
        steps=597 if full else 449,
        optimizer={"name": "sgd", "learning_rate": 0.05, "b1": 0.9},
        log_every=100,
    )
    config.fisher = ml_collections.ConfigDict(
        {"examples": 1024, "batch": 32, "mode": "sum", "decay": 1.0}
    )
    plain = [("none", 0.0), ("l2", 0.03), ("l2", 0.3), ("exact", 10.0), ("empirical", 10.0),
             ("batched", 10.0), ("batched", 1000.0), ("exact", 300.0)]  # fmt: skip
    if full:
        plain += [("exact", 1.0), ("exact", 100.0), ("empirical", 100.0), ("batched", 100.0),
                  ("empirical", 1000.0), ("batched", 10000.0)]  # fmt: skip
    proximal = [("exact", 10.0), ("exact", 300.0)]
    if full:
        proximal += [("empirical", 1000.0), ("batched", 10000.0)]
    config.arms = (
        *((kind, strength, "gradient") for kind, strength in plain),
        *((kind, strength, "proximal") for kind, strength in proximal),
    )
    config.required = ml_collections.ConfigDict(
        {
            "accuracy": 0.7, "over_fine_tuning": 0.3, "over_l2": 0.08,
            "trace_ratio": (20.0, 60.0) if full else (10.0, 60.0),
        }
    )  # fmt: skip
    config.enforce = True
    return config
