"""SRA-CL: contrastive regularisers from retrieved meaning, for sequential recommenders (2025).

The recipe trains ``config.models`` on the prefixes of a log and ranks every user's last item among
all items. Each model is the backbone ``config.backbone`` with the terms of ``config.cl``, changed
as ``MODELS`` says: ``no_cl`` has none, ``full`` is the paper's method, the others its ablations,
CL4SRec's altered histories, and DuoRec. The report tests ``full`` against each other model, paired
over users, and shows users with few training items apart.

Meaning is read from ``config.vectors`` once, before training: items' nearest neighbours by their
vectors, histories' by means of their items' vectors (or vectors of their own). A run keeps the hash
of these tables; it cannot go on with others. Recommending needs none of them.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transfer_jax.configuration import ConfigError
from transfer_jax.data import item_texts, recommend, semantic
from transfer_jax.data.interactions import Interactions, LeaveOneOut, leave_one_out
from transfer_jax.data.paths import require
from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.semantic import Tables
from transfer_jax.data.sources import ArraySource
from transfer_jax.metrics import ranking
from transfer_jax.metrics.ranking import Protocol
from transfer_jax.models import counting
from transfer_jax.models.recommender import SequentialRecommender, encoder_stack
from transfer_jax.objectives import Variables
from transfer_jax.objectives.recommend import NextOfPrefix
from transfer_jax.objectives.recommend_contrastive import Contrasted
from transfer_jax.training import Experiment, FitConfig, read_metrics
from transfer_jax.training.config import from_dict

# What each model changes in ``config.cl``.
MODELS: dict[str, dict[str, Any]] = {
    "no_cl": {"inter": "none", "intra": "none"},
    "full": {},
    "no_inter": {"inter": "none"},
    "no_intra": {"intra": "none"},
    "k1": {"k": 1},
    "random_retrieval": {"source": "random"},
    "collaborative_retrieval": {"source": "collaborative"},
    "random_neighbour": {"inter": "random_neighbour"},
    "mean_neighbours": {"inter": "mean_neighbours"},
    "top1": {"inter": "top1"},
    "random_sub": {"intra": "random_sub"},
    "one_way": {"form": "one_way"},
    "released": {"allow_padding": True, "allow_same_user": True},
    "cl4srec_mask": {"inter": "none", "intra": "mask", "rate": 0.3},
    "cl4srec_crop": {"inter": "none", "intra": "crop", "rate": 0.6},
    "cl4srec_reorder": {"inter": "none", "intra": "reorder", "rate": 0.6},
    "duorec": {"inter": "same_target", "intra": "dropout_twice"},
}
BACKBONES = ("sasrec_ce", "gru4rec", "bert4rec")
SOURCES = ("semantic", "collaborative", "random")
VECTORS = ("none", "texts", "file", "clip")


def settings(config: Any, name: str) -> dict[str, Any]:
    """``config.cl`` as a model has it; a term of strength 0 is none.

    Raises:
      ConfigError: no such model; has the nearest names.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=2) or list(MODELS)
        raise ConfigError(f"there is no model {name!r}; nearest: {', '.join(near)}.")
    cl = {**config.cl.to_dict(), **MODELS[name]}
    for strength, term in (("alpha", "inter"), ("beta", "intra")):
        if not cl[strength]:
            cl[term] = "none"
    return cl


def retrieves(cl: Mapping[str, Any]) -> bool:
    """Whether a model's terms need neighbours."""
    return cl["inter"] not in ("none", "same_target") or cl["intra"] == "semantic_sub"


# -- objectives -----------------------------------------------------------------------------------


def recommender(
    config: Any, name: str, num_items: int, tables: Tables | None = None
) -> NextOfPrefix | Contrasted:
    """Builds a model of a config with its loss; ``transfer-jax recommend`` calls it too.

    Args:
      config: of ``configs/sra_cl.py``.
      name: a key of ``MODELS``.
      num_items: n.
      tables: for training; prediction needs none.

    Raises:
      ConfigError: no such model or backbone.
    """
    cl = settings(config, name)
    if config.backbone not in BACKBONES:
        raise ConfigError(
            f"config.backbone={config.backbone!r}; choose one of {', '.join(BACKBONES)}."
        )
    m = config.model
    stack = encoder_stack(
        m.features, num_layers=m.num_layers, num_heads=m.num_heads, dropout=m.dropout,
        attention_dropout=m.attention_dropout, causal=config.backbone != "bert4rec",
        hidden=m.hidden, dtype=jnp.dtype(m.dtype) if m.dtype else None,
    )  # fmt: skip
    gru = config.backbone == "gru4rec"
    module = SequentialRecommender(
        num_items=num_items, max_length=m.length, stack=stack, positions=not gru,
        encoder="gru" if gru else "transformer", alignment="left" if gru else m.alignment,
        head="dot", round_rows_to=m.round_rows_to,
    )  # fmt: skip
    inner = NextOfPrefix(
        module=module, ks=tuple(config.ks), ties=config.ties, block=config.block
    )  # fmt: skip
    if cl["inter"] == cl["intra"] == "none":
        return inner
    return Contrasted(
        inner=inner, tables=tables, alpha=cl["alpha"], beta=cl["beta"],
        temperature=cl["temperature"], rate=cl["rate"], inter=cl["inter"], intra=cl["intra"],
        form=cl["form"], similarity=cl["similarity"], synthesis_dropout=cl["synthesis_dropout"],
    )  # fmt: skip


def plan(config: Any) -> tuple[NextOfPrefix | Contrasted, dict[str, Any], FitConfig]:
    """What a config would train last, without its data, for ``training.aot.lower_step``."""
    n, m, k = config.data.expected_items, config.data.expected_prefixes, config.cl.k

    def shape(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    tables = Tables(
        histories=shape(m, config.model.length), by_target=shape(m), starts=shape(n + 2),
        user_vectors=shape(m, config.vectors.dim, dtype=jnp.dtype(config.vectors.dtype)),
        user_neighbours=shape(m, k), item_neighbours=shape(n + 1, k),
    )  # fmt: skip
    objective = recommender(config, config.models[-1], n, tables)
    batch = {name: shape(config.batch_size) for name in ("labels", "user", "prefix")}
    batch["inputs"] = shape(config.batch_size, config.model.length)
    return objective, batch, from_dict(FitConfig, config.train, "train")


# -- data -----------------------------------------------------------------------------------------


def item_vectors(config: Any, log: Interactions) -> tuple[np.ndarray, str]:
    """The items' vectors [n + 1, D], row 0 being zero, and in words what they are.

    Raises:
      ConfigError: an unknown kind; an item without a row.
    """
    v = config.vectors
    names = [str(name) for name in log.item_names[1:]]
    if v.kind == "texts":
        texts = item_texts.load_item_texts(v.name, **v.options.to_dict())
        found = item_texts.tfidf_vectors(item_texts.sentences(texts, names), v.dim)
        what = f"TF-IDF/SVD ({v.dim}) of item texts {v.name!r}, in place of a language model"
    elif v.kind in ("file", "clip"):
        path = v.path if v.kind == "file" else require(v.name, "item_emb_clip512.npz")
        rows = item_texts.read_vectors(path, v.key)
        # Items of such logs are called by numbers.
        wrong = [n for n in names if not n.isdecimal() or not 0 <= int(n) - v.first < len(rows)]
        if wrong:
            raise ConfigError(
                f"{path} has {len(rows)} rows, of the items {v.first} to "
                f"{v.first + len(rows) - 1}; none of {len(wrong)} items, such as {wrong[0]!r}."
            )
        found = rows[[int(name) - v.first for name in names]]
        what = "CLIP's text features" if v.kind == "clip" else f"vectors of {v.path}"
    else:
        raise ConfigError(
            f"config.vectors.kind={v.kind!r}: semantic retrieval needs vectors; choose one of "
            f"{', '.join(VECTORS[1:])}."
        )
    table = np.concatenate([np.zeros((1, found.shape[1]), np.float32), found])
    return (semantic.centred(table) if v.centre else table), what


def history_vectors(config: Any, items: np.ndarray, histories: np.ndarray) -> np.ndarray:
    """The histories' vectors [M, D]: of ``config.vectors.users_path``, or means of their items'."""
    v = config.vectors
    if not v.users_path:
        return semantic.recency_means(items, histories, v.decay)
    found = item_texts.read_vectors(v.users_path, v.key)
    if len(found) != len(histories):
        raise ConfigError(
            f"{v.users_path} has {len(found)} rows; one for each of {len(histories)} prefixes is "
            "needed, user by user, oldest first (data.recommend.prefixes)."
        )
    return found


class Retrieval:
    """Builds the tables of models; what two models share is searched once.

    Args:
      exp: of its config ``cl``, ``vectors`` and the seed are read.
      log: the interactions.
      split: of it; only training items are used.
      source: of ``data.recommend.prefixes``.
    """

    def __init__(self, exp: Experiment, log: Interactions, split: LeaveOneOut, source: ArraySource):
        self.exp, self.log, self.split = exp, log, split
        self.arrays = source.arrays
        self.bare = Tables.of(self.arrays["inputs"], self.arrays["labels"], log.num_items)
        self.what = "none"
        self._vectors: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._neighbours: dict[tuple[Any, ...], dict[str, np.ndarray]] = {}

    def vectors(self, source: str) -> tuple[np.ndarray, np.ndarray]:
        """Of items [n + 1, D] and of histories [M, D]."""
        if source not in self._vectors:
            cfg, histories = self.exp.config, self.arrays["inputs"]
            if source == "semantic":
                items, self.what = item_vectors(cfg, self.log)
                users = history_vectors(cfg, items, histories)
            elif source == "collaborative":
                items = semantic.collaborative_vectors(self.split.train, self.log.num_items)
                users = semantic.recency_means(items, histories, cfg.vectors.decay)
            elif source == "random":
                rng = np.random.default_rng(self.exp.seed("random retrieval"))
                items, users = (
                    rng.standard_normal((rows, 64), np.float32)
                    for rows in (self.log.num_items + 1, len(histories))
                )
            else:
                raise ConfigError(f"cl.source={source!r}; choose one of {', '.join(SOURCES)}.")
            self._vectors[source] = items, users
        return self._vectors[source]

    def tables(self, name: str) -> Tables:
        """The tables of a model.

        Under random retrieval the neighbours are random, and what the synthesiser reads is not.
        """
        cl = settings(self.exp.config, name)
        if not retrieves(cl):
            return self.bare
        key = (cl["source"], cl["k"], cl["allow_padding"], cl["allow_same_user"])
        items, users = self.vectors(cl["source"])
        if key not in self._neighbours:
            self._neighbours[key] = self._search(key, items, users)
        if cl["source"] == "random":
            users = self.vectors("semantic")[1]
        return self.bare._replace(
            user_vectors=users.astype(self.exp.config.vectors.dtype), **self._neighbours[key]
        )

    def _search(
        self, key: tuple[Any, ...], items: np.ndarray, users: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Neighbours of both kinds: an artifact, for large logs take long."""
        from jax.experimental.multihost_utils import process_allgather

        _, k, allow_padding, allow_same_user = key
        owners = None if allow_same_user else self.arrays["user"]
        found = self.exp.artifact(
            "-".join(map(str, ("neighbours", *key))),
            lambda: {
                "user_neighbours": semantic.nearest(users, k, owners=owners),
                "item_neighbours": semantic.nearest_items(items, k, allow_padding=allow_padding),
            },
        )
        return process_allgather(found, tiled=True)

    def fingerprint(self, name: str) -> str:
        """Of a model's tables and of the vectors that its neighbours were found with."""
        cl = settings(self.exp.config, name)
        searched = self.vectors(cl["source"]) if retrieves(cl) else ()
        return self.tables(name).fingerprint(**dict(zip(("items", "users"), searched)))


def guard(exp: Experiment, retrieval: Retrieval, names: Sequence[str]) -> None:
    """Keeps hashes of the models' tables in the work directory.

    Raises:
      ConfigError: the directory's earlier run had other tables.
    """
    now = {name: retrieval.fingerprint(name) for name in names}
    then = exp.artifact("tables", lambda: now)
    if other := [name for name in now if then.get(name) != now[name]]:
        raise ConfigError(
            f"the semantic tables of {', '.join(other)} are not those that this run began with: "
            "the vectors or the log have changed. Restore them, or give a new --workdir."
        )


# -- recipe ---------------------------------------------------------------------------------------


def recipe(exp: Experiment) -> None:
    cfg = exp.config
    counting.check(cfg.baselines)
    log = recommend.load_log(cfg.data.name, **cfg.data.options).by_frequency()
    split = leave_one_out(log)
    exp.artifact("items", lambda: [str(name) for name in log.item_names])
    module = recommender(cfg, cfg.models[0], log.num_items).module
    side = module.alignment
    source = recommend.prefixes(split.train, module.max_length, side=side)
    retrieval = Retrieval(exp, log, split, source)
    guard(exp, retrieval, cfg.models)

    def held_out(name: str) -> Pipeline:
        rows = recommend.evaluation(split, name, module.max_length, side=side, seen=False)
        return Pipeline(rows, cfg.evaluation_batch_size)

    ranks: dict[str, np.ndarray] = {}
    history: dict[str, list[tuple[int, float]]] = {}
    for name in cfg.models:
        objective = recommender(cfg, name, log.num_items, retrieval.tables(name))
        batches = Pipeline(
            source, cfg.batch_size, shuffle=True, seed=exp.seed("train"), repeat=True
        )
        fitted = exp.fit(
            name, objective, batches, cfg.train, evaluate={"validation": held_out("validation")}
        )

        def measure(
            objective: NextOfPrefix | Contrasted = objective,
            variables: Variables = fitted.variables,
        ) -> list[int]:
            return user_ranks(exp, objective, variables, held_out("test")).tolist()

        ranks[name] = np.array(exp.artifact(f"ranks-{name}", measure))
        lines = read_metrics(exp.workdir / "stages" / name / "metrics.jsonl")
        monitor = cfg.train.monitor
        history[name] = [(r["step"], r[monitor]) for r in lines if monitor in r]
        exp.record(f"{name}: parameters", fitted.summary["parameters"])
        exp.record(f"{name}: seconds", round(fitted.summary["seconds"], 1))

    floors = {}
    for name in cfg.baselines:

        def count(name: str = name) -> dict[str, float]:
            known = split.history("test")
            test = recommend.evaluation(split, "test", module.max_length, seen=False)
            scorer = counting.SCORERS[name](known, log.num_items)
            return counting.rank_scorer(scorer, test, ks=cfg.ks, ties=cfg.ties)

        floors[name] = exp.artifact(f"test-{name}", count)
    exp.record("vectors", retrieval.what)
    exp.record("prefixes", len(source))
    exp.record("items", log.num_items)
    _report(exp, split, ranks, floors, history)


@jax.jit
def _ranked(objective: Any, variables: Any, batch: Any) -> dict[str, Any]:
    where = ranking.ranks(objective.predict(variables, batch), batch["labels"])
    return {"rank": where.higher + where.equal, "mask": batch["mask"]}


def user_ranks(exp: Experiment, objective: Any, variables: Variables, data: Pipeline) -> np.ndarray:
    """The rank of each user's right item, from 0, ties against it: int [U], on all processes."""
    from jax.experimental.multihost_utils import process_allgather

    parts = []
    for batch in exp.batches(data):
        found = process_allgather(_ranked(objective, variables, batch), tiled=True)
        parts.append(found["rank"][found["mask"] > 0])
    return np.concatenate(parts)


def user_metrics(ranks: np.ndarray, ks: tuple[int, ...]) -> dict[str, np.ndarray]:
    """``hr@k``, ``ndcg@k`` and ``mrr`` of every user, float64 [U]."""
    where = ranking.Ranks(jnp.asarray(ranks), jnp.zeros(len(ranks), jnp.int32))
    return {name: np.asarray(v, np.float64) for name, v in ranking.metrics(where, ks).items()}


def paired(better: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """Relative gain of the mean, and how likely it is by chance.

    Args:
      better, other: a metric of the same users, [U].

    Returns:
      ``mean(better) / mean(other) - 1``, and one-sided p values of the paired t test and of
      Wilcoxon's signed ranks; 1 where nobody differs.
    """
    from scipy import stats

    gain = float(better.mean() / other.mean() - 1) if other.mean() else float("nan")
    if (better == other).all():
        return gain, 1.0, 1.0
    t = stats.ttest_rel(better, other, alternative="greater").pvalue
    signed = stats.wilcoxon(better, other, alternative="greater").pvalue
    return gain, float(t), float(signed)


def _report(
    exp: Experiment, split: LeaveOneOut, ranks: Mapping[str, np.ndarray],
    floors: Mapping[str, Mapping[str, float]], history: Mapping[str, list[tuple[int, float]]],
) -> None:  # fmt: skip
    cfg = exp.config
    found = {name: user_metrics(r, tuple(cfg.ks)) for name, r in ranks.items()}
    columns = [f"{metric}@{k}" for k in cfg.shown for metric in ("hr", "ndcg")] + ["mrr"]
    protocol = Protocol("full", split.num_items, "kept", cfg.ties)
    rows = [[name, *(round(float(v[c].mean()), 4) for c in columns)] for name, v in found.items()]
    rows += [[name, *(round(v[c], 4) for c in columns)] for name, v in floors.items()]
    exp.table(f"Test: {protocol}", ["model", *(c.upper() for c in columns)], rows)
    if floors:
        exp.record("what the baselines know", "everything but the test items; models do not know "
                   "the validation items")  # fmt: skip

    few = split.train.lengths[split.evaluated()] < cfg.few
    groups = {
        f"fewer than {cfg.few} training items ({few.sum():,} users)": few,
        f"{cfg.few} or more ({(~few).sum():,} users)": ~few,
        f"all ({len(few):,} users)": np.ones(len(few), bool),
    }
    metric = f"ndcg@{max(cfg.shown)}"
    others = [name for name in found if name != "full"]
    if "full" in found and others:
        rows = []
        for group, chosen in groups.items():
            for name in others if chosen.any() else ():
                full, other = (found[n][metric][chosen] for n in ("full", name))
                gain, t, signed = paired(full, other)
                means = [round(float(x.mean()), 4) for x in (full, other)]
                rows.append(
                    [group, name, *means, round(100 * gain, 1), f"{t:.3g}", f"{signed:.3g}"]
                )
        exp.table(
            f"{metric.upper()} of full against the others, paired over users",
            ["users", "other", "full", "other's", "gain in %", "p (t, one-sided)", "p (Wilcoxon)"],
            rows,
        )
    steps = [[step for step, _ in line] for line in history.values()]
    if steps and len(steps[0]) > 1 and all(s == steps[0] for s in steps):
        lines = {name: [value for _, value in line] for name, line in history.items()}
        exp.curve(
            "Validation while training", steps[0], lines, xlabel="steps", ylabel=cfg.train.monitor
        )
