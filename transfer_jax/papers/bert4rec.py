"""BERT4Rec: sequential recommendation with bidirectional encoders (Sun et al. 2019).

The recipe's ``config.task`` is one of

* ``recommend``: trains ``config.models`` on a log, leaving out each user's last two items, and
  ranks them beside ``config.baselines`` under four protocols: all items with and without those
  already seen, and 100 negatives drawn by popularity or uniformly. Where two protocols put two
  models in different orders, a table says so;
* ``ring``: random walks on a ring, of which the best possible accuracy is known: 1/3 for the next
  item, 5/9 for one between two known ones.

Models: ``bert4rec`` (Cloze); ``bert4rec_1mask`` (one mask per row, the paper's Table 3); with the
same layers under a causal mask and a plain dot product, ``sasrec_ce`` (softmax over all items),
``sasrec_bce`` (SASRec's own loss), ``sasrec_gbce``, ``sasrec_sampled``; ``gru4rec`` (a GRU in place
of the Transformer's layers, with positions, the norm of embeddings, and softmax over all items) and
``gru4rec_plus`` (as published in 2018, what the paper compares with: one layer, neither of the two,
BPR-max among sampled items, no biases of items).
"""

import difflib
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transfer_jax.configuration import ConfigError
from transfer_jax.data import recommend
from transfer_jax.data.interactions import LeaveOneOut, Sequences, leave_one_out
from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.sources import ArraySource
from transfer_jax.metrics.ranking import Protocol
from transfer_jax.models import counting
from transfer_jax.models.recommender import SequentialRecommender, encoder_stack
from transfer_jax.objectives import Variables
from transfer_jax.objectives.recommend import Cloze, NextItem, Recommendation
from transfer_jax.training import Experiment, FitConfig, read_metrics
from transfer_jax.training.config import from_dict

# What each model changes in the objective.
MODELS: dict[str, dict[str, Any]] = {
    "bert4rec": {"objective": Cloze},
    "bert4rec_1mask": {"objective": Cloze, "share": 0.0, "maximum": 1},
    "sasrec_ce": {"objective": NextItem, "kind": "ce"},
    "sasrec_bce": {"objective": NextItem, "kind": "bce", "negatives": 1},
    "sasrec_gbce": {"objective": NextItem, "kind": "gbce"},
    "sasrec_sampled": {"objective": NextItem, "kind": "sampled"},
    "gru4rec": {"objective": NextItem, "kind": "ce"},
    "gru4rec_plus": {"objective": NextItem, "kind": "bpr_max"},
}


def recipe(exp: Experiment) -> None:
    tasks = {"recommend": compare, "ring": ring}
    if exp.config.task not in tasks:
        raise ConfigError(f"config.task={exp.config.task!r}; choose one of {', '.join(tasks)}.")
    tasks[exp.config.task](exp)


# -- objectives and data --------------------------------------------------------------------------


def recommender(config: Any, name: str, num_items: int) -> Recommendation:
    """Builds a model of a config with its loss; ``transfer-jax recommend`` calls it too.

    Args:
      config: of ``configs/bert4rec.py``.
      name: a key of ``MODELS``.
      num_items: n.

    Raises:
      ConfigError: no such model; has the nearest names.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=2) or list(MODELS)
        raise ConfigError(f"there is no model {name!r}; nearest: {', '.join(near)}.")
    fields = dict(MODELS[name])
    cls = fields.pop("objective")
    m = config.model
    gru, published = name.startswith("gru4rec"), name == "gru4rec_plus"
    stack = encoder_stack(
        m.features, num_layers=1 if published else m.num_layers, num_heads=m.num_heads,
        dropout=m.dropout, attention_dropout=m.attention_dropout, causal=cls is NextItem,
        hidden=m.hidden, dtype=jnp.dtype(m.dtype) if m.dtype else None,
    )  # fmt: skip
    module = SequentialRecommender(
        num_items=num_items, max_length=m.length, stack=stack,
        positions=m.positions and not published, norm_embeddings=not published,
        encoder="gru" if gru else "transformer", alignment="left" if gru else m.alignment,
        head=m.head if cls is Cloze else "dot", special_rows=m.special_rows,
        round_rows_to=m.round_rows_to,
    )  # fmt: skip
    section = config.cloze.to_dict() if cls is Cloze else config.next_item.to_dict()
    section.pop("static_masks", None)
    common = {"module": module, "ks": tuple(config.ks), "ties": config.ties, "block": config.block}
    return cls(**{**common, **section, **fields})


def training_data(config: Any, objective: Recommendation, train: Sequences, seed: int) -> Pipeline:
    """Endless shuffled windows, one item longer where the next item is to be predicted."""
    m = objective.module
    cloze = isinstance(objective, Cloze)
    source = recommend.windows(
        train, m.max_length + (not cloze), stride=max(1, int(config.stride * m.max_length)),
        side=m.alignment, minimum=1 if cloze else 2,
    )  # fmt: skip
    if cloze and config.cloze.static_masks:
        source = recommend.static_copies(source)
    return Pipeline(source, config.batch_size, shuffle=True, seed=seed, repeat=True)


def evaluation_data(
    config: Any, objective: Recommendation, split: LeaveOneOut, name: str, **options: Any
) -> Pipeline:
    """Each user's history and right item, as the objective reads them."""
    m = objective.module
    source = recommend.evaluation(
        split, name, m.max_length, side=m.alignment, mask_id=objective.mask_id, **options
    )
    return Pipeline(source, config.evaluation_batch_size)


def plan(config: Any) -> tuple[Recommendation, dict[str, jax.ShapeDtypeStruct], FitConfig]:
    """What a config would train first, without its data, for ``training.aot.lower_step``."""
    objective = recommender(config, config.models[0], config.data.expected_items)
    length = config.model.length + (not isinstance(objective, Cloze))
    shape = (config.batch_size, length)
    batch = {
        "inputs": jax.ShapeDtypeStruct(shape, jnp.int32),
        "user": jax.ShapeDtypeStruct(shape[:1], jnp.int32),
    }
    return objective, batch, from_dict(FitConfig, config.train, "train")


# -- comparison -----------------------------------------------------------------------------------


def compare(exp: Experiment) -> None:
    """Trains and ranks every model, and says under which protocol."""
    cfg = exp.config
    counting.check(cfg.baselines)
    log = recommend.load_log(cfg.data.name, **cfg.data.options).by_frequency()
    split = leave_one_out(log)
    exp.artifact("items", lambda: [str(name) for name in log.item_names])
    train = split.history("test") if cfg.train_on_validation else split.train
    drawn = {
        sampler: recommend.negatives(
            split, cfg.negatives, sampler=sampler, seed=exp.seed("negatives")
        )
        for sampler in recommend.SAMPLERS
    }
    # Two passes give four protocols.
    passes: dict[str, dict[str, Any]] = {
        "removed": {"seen": True, "negatives": drawn["popularity"]},
        "kept": {"seen": False, "negatives": drawn["uniform"]},
    }

    found: dict[str, dict[str, dict[str, float]]] = {}
    history: dict[str, list[tuple[int, float]]] = {}
    objectives = {name: recommender(cfg, name, split.num_items) for name in cfg.models}
    for name, objective in objectives.items():
        validation = evaluation_data(cfg, objective, split, "validation")
        fitted = exp.fit(
            name, objective, training_data(cfg, objective, train, exp.seed("train")), cfg.train,
            evaluate={"validation": validation},
        )  # fmt: skip
        found[name] = _protocols(exp, name, passes, objective, fitted.variables, split)
        monitored = cfg.train.monitor or "validation/ndcg@10"
        lines = read_metrics(exp.workdir / "stages" / name / "metrics.jsonl")
        history[name] = [(r["step"], r[monitored]) for r in lines if monitored in r]
        exp.record(f"{name}: parameters", fitted.summary["parameters"])
        exp.record(f"{name}: seconds", round(fitted.summary["seconds"], 1))
    known = split.history("test")
    for name in cfg.baselines:

        def measure(name: str = name) -> dict[str, dict[str, float]]:
            scorer = counting.SCORERS[name](known, split.num_items)
            sources = {
                key: recommend.evaluation(split, "test", cfg.model.length, **options)
                for key, options in passes.items()
            }
            results = {
                key: counting.rank_scorer(scorer, source, ks=cfg.ks, ties=cfg.ties)
                for key, source in sources.items()
            }
            return _by_protocol(results)

        found[name] = exp.artifact(f"test-{name}", measure)
    _report(exp, split, found, history)


def _protocols(
    exp: Experiment, name: str, passes: Mapping[str, Mapping[str, Any]],
    objective: Recommendation, variables: Variables, split: LeaveOneOut,
) -> dict[str, dict[str, float]]:  # fmt: skip
    def measure() -> dict[str, dict[str, float]]:
        return _by_protocol(
            {
                key: exp.evaluate(
                    objective, variables,
                    evaluation_data(exp.config, objective, split, "test", **options),
                )
                for key, options in passes.items()
            }
        )  # fmt: skip

    return exp.artifact(f"test-{name}", measure)


def _by_protocol(results: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    sampled = {"removed": "popularity", "kept": "uniform"}
    found: dict[str, dict[str, float]] = {}
    for key, values in results.items():
        found[key] = {k: v for k, v in values.items() if not k.startswith("sampled_")}
        found[sampled[key]] = {
            k.removeprefix("sampled_"): v for k, v in values.items() if k.startswith("sampled_")
        }
    return found


def _report(
    exp: Experiment, split: LeaveOneOut, found: Mapping[str, Mapping[str, Mapping[str, float]]],
    history: Mapping[str, list[tuple[int, float]]],
) -> None:  # fmt: skip
    cfg = exp.config
    protocols = {
        "removed": Protocol("full", split.num_items, "removed", cfg.ties),
        "kept": Protocol("full", split.num_items, "kept", cfg.ties),
        "popularity": Protocol("popularity", cfg.negatives, "removed", cfg.ties),
        "uniform": Protocol("uniform", cfg.negatives, "removed", cfg.ties),
    }
    exp.record("users evaluated", len(split.evaluated()))
    exp.record("items", split.num_items)
    metrics = [f"{metric}@{k}" for k in cfg.shown for metric in ("hr", "ndcg")] + ["mrr"]
    for key, protocol in protocols.items():
        rows = [
            [name, *(round(values[key][m], 4) for m in metrics)] for name, values in found.items()
        ]
        exp.table(f"Test: {protocol}", ["model", *(m.upper() for m in metrics)], rows)
    exp.record(
        "what the models know",
        "networks are trained without the validation items"
        if not cfg.train_on_validation
        else "networks are trained with the validation items, as in the released code",
    )
    if cfg.baselines:
        exp.record("what the baselines know", "everything but the test items")
    flips = rank_flips(found, f"ndcg@{cfg.shown[0]}")
    if len(found) > 1:
        exp.record("pairs in another order under a sampled metric", len(flips))
    if flips:
        exp.table(
            f"Sampled metrics reorder models (NDCG@{cfg.shown[0]})",
            ["better in the full ranking", "than", "full", "full (other)", "negatives", "sampled",
             "sampled (other)"],
            flips,
        )  # fmt: skip
    steps = [[step for step, _ in line] for line in history.values()]
    if steps and len(steps[0]) > 1 and all(s == steps[0] for s in steps):
        lines = {name: [value for _, value in line] for name, line in history.items()}
        exp.curve(
            "Validation while training", steps[0], lines, xlabel="steps",
            ylabel=f"{cfg.train.monitor or 'validation/ndcg@10'} ({protocols['removed']})",
        )  # fmt: skip


def rank_flips(
    found: Mapping[str, Mapping[str, Mapping[str, float]]], metric: str
) -> list[list[str | float]]:
    """Pairs of models that sampled negatives put in another order than the full ranking.

    Args:
      found: model -> protocol (``removed``, ``popularity``, ``uniform``) -> metric -> value.
      metric: such as ``ndcg@10``.

    Returns:
      Rows: better model, other model, their full metrics, the sampler, their sampled metrics.
    """
    rows: list[list[str | float]] = []
    for a, b in itertools.permutations(found, 2):
        full_a, full_b = found[a]["removed"][metric], found[b]["removed"][metric]
        for sampler in recommend.SAMPLERS:
            own, other = found[a][sampler][metric], found[b][sampler][metric]
            if full_a > full_b and own < other:
                numbers = [round(v, 4) for v in (full_a, full_b)]
                rows.append([a, b, *numbers, sampler, round(own, 4), round(other, 4)])
    return rows


# -- ring -----------------------------------------------------------------------------------------


def ring(exp: Experiment) -> None:
    """Random walks on a ring: what both sides of a mask are worth, against the Bayes accuracy."""
    cfg = exp.config
    users = cfg.data.options.users
    log = recommend.load_log(cfg.data.name, **cfg.data.options).by_frequency()
    walks = log.sequences().items.reshape(users, -1)
    train, test = walks[: -cfg.test_users], walks[-cfg.test_users :]
    length = walks.shape[1]
    rows, lines = [], {}
    for name in cfg.models:
        objective = recommender(cfg, name, log.num_items)
        data = training_data(cfg, objective, Sequences.of(train), exp.seed("train"))
        fitted = exp.fit(name, objective, data, cfg.train)

        def measure(
            objective: Recommendation = objective, variables: Variables = fitted.variables
        ) -> list[float]:
            def accuracy(place: int) -> float:
                source = walk_source(test, place, objective.mask_id)
                batches = Pipeline(source, cfg.evaluation_batch_size)
                return exp.evaluate(objective, variables, batches)["hr@1"]

            return [accuracy(place) for place in range(1, length)]

        lines[name] = exp.artifact(f"test-{name}", measure)
        middle = float(np.mean(lines[name][:-1]))
        rows.append([name, middle, max(lines[name][:-1]), lines[name][-1]])
    rows.append(["Bayes, both sides", 5 / 9, 5 / 9, 1 / 3])
    rows.append(["Bayes, left side only", 1 / 3, 1 / 3, 1 / 3])
    exp.table(
        f"Accuracy on {len(test):,} new walks, one item missing",
        ["model", "inside, mean", "inside, best place", "at the end"],
        rows,
    )
    exp.curve(
        "Accuracy by place", list(range(1, length)), lines, xlabel="place of the missing item",
        ylabel="accuracy",
    )  # fmt: skip


def walk_source(walks: np.ndarray, place: int, mask_id: int | None) -> ArraySource:
    """Walks [U, L] whose item at ``place`` is to be found.

    It is replaced by [MASK]; a model that predicts the next item instead is read one place before,
    and sees what it may.
    """
    inputs = walks.astype(np.int32)
    if mask_id is not None:
        inputs = inputs.copy()
        inputs[:, place] = mask_id
    at = place if mask_id is not None else place - 1
    return ArraySource(
        {
            "inputs": inputs,
            "labels": walks[:, place].astype(np.int32),
            "positions": np.full(len(walks), at, np.int32),
        }
    )
