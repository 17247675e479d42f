"""Recformer: sequential recommendation from the items' text alone (Li et al. 2023).

The recipe's ``config.task`` is one of

* ``recommend``: pre-trains on the training histories of a log (or starts from weights of elsewhere,
  ``config.start``), fine-tunes as ``config.runs`` says, and ranks all items for every user, those
  whose right item is *warm* (it occurs in a training history) and *cold* apart;
* ``pretrain``: pre-trains on logs of other catalogues, for a later ``config.start.run``.

Runs: ``two_stage`` is Algorithm 1: the matrix of the items' vectors is encoded anew before every
epoch until validation stops improving, then the best pair of parameters and matrix is taken and the
parameters are trained on against that matrix, with new moments and a new schedule (the released
code carries both over, so that its rate may reach 0). ``frozen_items`` keeps the first matrix,
``trainable_items`` makes it a parameter, ``zero_shot`` does not fine-tune. ``scratch`` is
``two_stage`` and ``random`` is ``zero_shot`` of an encoder that was not pre-trained.

Baselines: ``pop``, ``markov1`` and ``item_knn`` count; ``tfidf`` sums the similarities of text to
the newest items; ``sasrec_ce`` knows items by number.

With ``config.categories`` the catalogue is halved by category: the encoder is pre-trained on the
users' items of one half, and everything else happens in the other half.
"""

import dataclasses
import difflib
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transfer_jax import interop
from transfer_jax.configuration import ConfigError
from transfer_jax.data import interactions, item_texts, recommend
from transfer_jax.data import recformer as tokens
from transfer_jax.data.interactions import Interactions, LeaveOneOut, Sequences, leave_one_out
from transfer_jax.data.item_texts import ItemTexts
from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.recformer import Catalogue, ItemTokenizer
from transfer_jax.metrics import ranking
from transfer_jax.metrics.ranking import Protocol
from transfer_jax.models import counting
from transfer_jax.models.longformer import longformer_config, longformer_stack
from transfer_jax.models.recformer import TOKEN_TYPES, Recformer
from transfer_jax.objectives import Objective, Trainable, Variables, WarmStart
from transfer_jax.objectives.recformer import ONCE, FineTuning, PreTraining
from transfer_jax.papers import bert4rec
from transfer_jax.recommendation import Served
from transfer_jax.training import Experiment, FitConfig, Layout, load_variables, read_metrics
from transfer_jax.training.checkpoint import read_tree
from transfer_jax.training.config import from_dict

# Run -> what it starts from, and how it is fine-tuned.
RUNS = {
    "two_stage": ("pretrained", "two_stage"),
    "frozen_items": ("pretrained", "frozen_items"),
    "trainable_items": ("pretrained", "trainable_items"),
    "zero_shot": ("pretrained", ""),
    "scratch": ("start", "two_stage"),
    "random": ("start", ""),
}
BASELINES = (*counting.SCORERS, "tfidf", "sasrec_ce")
MONITOR = "validation/ndcg@10"
SAVED = "model-"  # artifacts with the variables of a run
# What predicts masked words, which fine-tuning does not do.
HEAD = "transform|transform_norm|decoder|output_bias"

PyTree = Any
# Metric -> one number for each evaluated user, in the order of their numbers.
PerUser = Mapping[str, np.ndarray]


def recipe(exp: Experiment) -> None:
    tasks = {"recommend": compare, "pretrain": pretrain_only}
    if exp.config.task not in tasks:
        raise ConfigError(f"config.task={exp.config.task!r}; choose one of {', '.join(tasks)}.")
    tasks[exp.config.task](exp)


# -- data -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Domain:
    """A log with text.

    Attributes:
      split: leave one out; items that are to be cold occur as test items alone.
      names: of the items, [n + 1]; of the padding, "".
      items: attributes of the items 1 … n.
      warm: bool [n + 1], items that occur in a training history.
    """

    split: LeaveOneOut
    names: list[str]
    items: list[dict[str, str]]
    warm: np.ndarray

    @classmethod
    def of(
        cls, log: Interactions, texts: ItemTexts, *, cold: float = 0.0, seed: int = 0
    ) -> "Domain":
        """Splits a log.

        Args:
          log: users with fewer than three items only train.
          texts: of its items.
          cold: share of the items that are taken out of all histories.
          seed: of their choice.
        """
        split = hide_items(leave_one_out(log), cold, seed)
        counts = interactions.item_counts(split.train, split.num_items)
        names = [str(name) for name in log.item_names]
        return cls(split, names, item_texts.of_items(texts, names[1:]), counts > 0)

    def sentences(self, warm: bool = False) -> list[str]:
        """The items' texts, or those of warm items alone, names of attributes included."""
        chosen = zip(self.items, self.warm[1:])
        return [" ".join(sum(item.items(), ())) for item, known in chosen if known or not warm]


def hide_items(split: LeaveOneOut, share: float, seed: int) -> LeaveOneOut:
    """Takes a random share of the items out of all histories and out of validation.

    What a user did last stays the test item; users without a history are not evaluated.
    """
    number = round(share * split.num_items)
    rng = np.random.Generator(np.random.Philox(seed))
    hidden = np.zeros(split.num_items + 1, bool)
    hidden[1 + rng.permutation(split.num_items)[:number]] = True
    train = Sequences.of([items[~hidden[items]] for items in split.train])
    validation = np.where(hidden[split.validation] | (train.lengths == 0), 0, split.validation)
    known = (train.lengths > 0) | (validation > 0)
    test = np.where(known, split.test, 0)
    return LeaveOneOut(train, validation.astype(np.int32), test.astype(np.int32), split.num_items)


def few_users(sequences: Sequences, share: float, seed: int) -> Sequences:
    """The histories of a random share of the users (low-resource training), those of others empty.

    A smaller share of the same seed is a part of a larger one.
    """
    number = round(share * len(sequences))
    chosen = np.random.Generator(np.random.Philox(seed)).permutation(len(sequences)) < number
    return Sequences.of([items if kept else [] for items, kept in zip(sequences, chosen)])


def halves(
    log: Interactions, texts: ItemTexts, *, attribute: str, skip: int, words: int, seed: int
) -> tuple[Interactions, Interactions]:
    """Two logs of different categories, and in each the users with three items of it.

    The categories go, in random order, to the side that has fewer interactions so far.

    Args:
      log: the whole.
      texts: of its items.
      attribute: whose words ``skip`` to ``skip + words`` are an item's category.
      skip, words: see there.
      seed: of the order.
    """
    items = item_texts.of_items(texts, log.item_names[1:])
    names = [" ".join(item[attribute].split()[skip : skip + words]) for item in items]
    known, category = np.unique(names, return_inverse=True)
    sizes = np.bincount(category[log.items - 1], minlength=len(known))
    totals, side = [0, 0], np.zeros(len(known), int)
    for number in np.random.Generator(np.random.Philox(seed)).permutation(len(known)):
        side[number] = int(totals[1] < totals[0])
        totals[side[number]] += sizes[number]
    where = side[category][log.items - 1]
    first, second = (
        interactions.k_core(log.where(where == half), users=3, items=0) for half in (0, 1)
    )
    return first, second


def amazon(
    reviews: Sequence[str], metadata: Sequence[str], *, core: int = 5, user_share: float = 1.0
) -> tuple[Interactions, ItemTexts]:
    """Reviews of some categories, each with the metadata of its items.

    Items without a title are dropped, then each category is reduced to its core. A user of two
    categories is two users.

    Args:
      reviews, metadata: files, see ``interactions.read_amazon_reviews`` and
        ``item_texts.amazon_metadata``.
      core: interactions of every user and item.
      user_share: share of the users that is kept, chosen at random (the released script keeps 1/5).

    Raises:
      ConfigError: a file of reviews without one of metadata.
    """
    if len(reviews) != len(metadata):
        raise ConfigError(f"{len(reviews)} files of reviews, but {len(metadata)} of metadata.")
    texts: ItemTexts = {}
    columns: list[list[np.ndarray]] = [[], [], []]
    for number, (log_path, text_path) in enumerate(zip(reviews, metadata)):
        log, own = interactions.read_amazon_reviews(log_path), item_texts.amazon_metadata(text_path)
        titled = np.array([str(name) in own for name in log.item_names])
        log = interactions.k_core(log.where(titled[log.items]), users=core, items=core)
        rng = np.random.Generator(np.random.Philox(number))
        log = log.where((rng.random(log.num_users) < user_share)[log.users])
        texts |= {str(name): own[str(name)] for name in log.item_names[1:]}
        users = np.char.add(f"{number}/", log.user_names[log.users].astype(str))
        for column, values in zip(columns, (users, log.item_names[log.items], log.times)):
            column.append(values)
    return Interactions.of(*map(np.concatenate, columns)), texts


def read_data(section: Any) -> tuple[Interactions, ItemTexts]:
    """The log and the texts of a config's section ``data``."""
    if section.name == "amazon":
        return amazon(**{name: v for name, v in section.options.items() if v is not None})
    log = recommend.load_log(section.name, **section.options)
    return log, item_texts.load_item_texts(section.texts.name, **section.texts.options)


def read_tokenizer(kind: str, trained: Any = None, path: str = "") -> ItemTokenizer:
    """The tokeniser of a run.

    Args:
      kind: ``words``, ``bpe`` or ``files``.
      trained: of the first two, what ``train_tokenizer`` gave.
      path: of ``files``, the directory of a model with <s>, <pad> and <mask> (RoBERTa, Longformer).

    Raises:
      ConfigError: an unknown kind.
    """
    if kind == "words":
        return tokens.word_tokenizer(trained)
    if kind == "bpe":
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(json.dumps(trained))
    elif kind == "files":
        backend = interop.load_tokenizer(path).backend
    else:
        raise ConfigError(f"config.tokenizer.kind={kind!r}; choose words, bpe or files.")
    tokenizer = interop.Tokenizer(backend)
    names = sorted((number, name) for name, number in backend.get_vocab().items())
    # Tokens of bytes begin with a blank where a word does.
    begins = np.array([name.startswith("Ġ") for _, name in names])
    return ItemTokenizer(
        encode=lambda texts: [
            e.ids for e in backend.encode_batch(list(texts), add_special_tokens=False)
        ],
        vocab_size=tokenizer.vocab_size, start=tokenizer.token("<s>"),
        pad=tokenizer.token("<pad>"), mask=tokenizer.token("<mask>"), begins=begins,
    )  # fmt: skip


def train_tokenizer(kind: str, texts: Sequence[str], size: int) -> Any:
    """Learns a tokeniser of at most ``size`` tokens; something that JSON can hold."""
    if kind == "words":
        return list(tokens.frequent_words(texts, size))
    if kind == "bpe":
        return json.loads(interop.train_tokenizer(texts, size, template="$A").backend.to_str())
    return None


def tokenizer_of(exp: Experiment, domain: Domain) -> ItemTokenizer:
    """The config's tokeniser, learned from the warm items, or that of ``config.start.run``."""
    cfg = exp.config
    if cfg.start.run:
        path = Path(cfg.start.run) / "artifacts" / "tokenizer.json"
        trained = exp.artifact("tokenizer", lambda: json.loads(path.read_text()))
    else:
        trained = exp.artifact(
            "tokenizer",
            lambda: train_tokenizer(
                cfg.tokenizer.kind, domain.sentences(warm=True), cfg.tokenizer.size
            ),
        )
    return read_tokenizer(cfg.tokenizer.kind, trained, cfg.tokenizer.path)


def catalogue_of(config: Any, domain: Domain, tokenizer: ItemTokenizer) -> Catalogue:
    """The tokens of a domain's items."""
    limits = config.tokenizer.limits
    return tokens.tokenize_items(
        domain.items, tokenizer, limits=limits if isinstance(limits, int) else tuple(limits)
    )


# -- objectives -----------------------------------------------------------------------------------


def encoder(config: Any, vocab_size: int) -> Recformer:
    """The network of a config."""
    m = config.model
    stack = longformer_stack(
        features=m.features, num_layers=m.num_layers, num_heads=m.num_heads, hidden=m.hidden,
        window=m.window // 2 or None, max_global=1, dropout=m.dropout,
        attention_dropout=m.dropout, scan=m.scan, remat=m.remat,
        dtype=jnp.dtype(m.dtype) if m.dtype else None,
    )  # fmt: skip
    return Recformer(
        longformer_config(
            vocab_size=vocab_size, stack=stack, max_positions=m.positions, head="masked_lm",
            token_types=TOKEN_TYPES,
        ),
        max_items=m.max_items, use_types=m.use_types, use_items=m.use_items, pooling=m.pooling,
        tied=m.tied,
    )  # fmt: skip


def pretraining(config: Any, module: Recformer, begins: Any, mask_id: int) -> PreTraining:
    """The objective of pre-training."""
    return PreTraining(
        module=module, starts=begins, mask_id=mask_id, temperature=config.temperature,
        mlm_weight=config.mlm_weight, block=config.block,
    )  # fmt: skip


def fine_tuning(
    config: Any, module: Recformer, catalogue: Any, num_items: int, **fields: Any
) -> FineTuning:
    """The objective of fine-tuning, and of ranking; ``catalogue`` as ``FineTuning`` has it."""
    return FineTuning(
        module=module, catalogue=catalogue, num_items=num_items, temperature=config.temperature,
        chunk=config.chunk, negatives=config.negatives.kind, count=config.negatives.count,
        ks=tuple(config.ks), ties=config.ties, block=config.block, **fields,
    )  # fmt: skip


def trained(config: Any, objective: Objective, params: PyTree) -> Objective:
    """``objective`` without what it does not train: frozen words, and a head that is not used.

    Args:
      config: says whether words are frozen.
      objective: of pre-training or fine-tuning.
      params: all its parameters, or their shapes.
    """
    inner = objective.inner if isinstance(objective, WarmStart) else objective
    frozen = [HEAD] if isinstance(inner, FineTuning) else []
    frozen += ["tokens"] if config.freeze_words else []
    if not frozen:
        return objective
    return Trainable.of(objective, params, rf"^(?!(encoder/)?({'|'.join(frozen)})(/|$))")  # type: ignore[arg-type]


def started(config: Any, objective: Objective, params: PyTree, state: PyTree = None) -> Objective:
    """``objective`` from ``params``; see ``trained``."""
    return trained(config, WarmStart(inner=objective, params=params, state=state), params)


def all_params(objective: Objective, variables: Variables) -> Variables:
    """Variables with the frozen parameters among them."""
    if isinstance(objective, Trainable):
        return objective.inner_variables(variables)
    return variables


def longformer_params(path: str, module: Recformer) -> PyTree:
    """Parameters from a Longformer in the files of Hugging Face.

    What Longformer does not have (token types and item positions) is left out; a decoder of its own
    begins as the token table.

    Raises:
      ConfigError: it has other sizes than ``config.model`` or another vocabulary.
    """
    stack = module.config.stack
    read = interop.from_pretrained(
        path, architecture="LongformerForMaskedLM", window=stack.window,
        max_global=stack.max_global, scan=stack.scan,
    )  # fmt: skip
    for name in ("features", "num_layers", "num_heads"):
        there, here = (getattr(m.config.stack, name) for m in (read.module, module))
        if there != here:
            raise ConfigError(f"{path} has {name}={there}, but config.model.{name}={here}.")
    if read.module.config.vocab_size != module.config.vocab_size:
        raise ConfigError(
            f"{path} has {read.module.config.vocab_size} tokens, the tokeniser "
            f"{module.config.vocab_size}: give its own with config.tokenizer.kind=files."
        )
    params = {name: tree for name, tree in read.params.items() if name != "token_types"}
    if not module.tied:
        params["decoder"] = params["tokens"]["embedding"]
    return params


def start_params(exp: Experiment, objective: Objective, batch: Any) -> PyTree:
    """The parameters that everything starts from: drawn, read, or those of an earlier run."""
    cfg = exp.config
    given = None
    if cfg.start.longformer:
        given = longformer_params(cfg.start.longformer, objective.module)  # type: ignore[attr-defined]
    elif cfg.start.run:
        stage = Path(cfg.start.run) / "stages" / "pretrain"
        given = load_variables(stage).params
        if not jax.tree.leaves(given.get("tokens")):  # frozen there: as that run started
            words = read_tree(Path(cfg.start.run) / "artifacts" / "start")["tokens"]
            given = {**given, "tokens": words}

    def draw() -> PyTree:
        chosen = objective if given is None else WarmStart(inner=objective, params=given)
        return jax.jit(lambda o, k, b: o.init(k, b))(chosen, exp.key("start"), batch).params

    return exp.artifact("start", draw)


def plan(config: Any) -> tuple[Objective, dict[str, jax.ShapeDtypeStruct], FitConfig]:
    """What a config would train first, without its data, for ``training.aot.lower_step``."""
    vocab, length = config.expected.vocab_size, config.buckets[-1]
    rows = config.batch_size

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    limits = config.tokenizer.limits
    width = 1 + (3 * limits if isinstance(limits, int) else sum(limits))
    names = ("inputs", "token_types", "item_positions")
    batch = {**{name: ints(rows, length) for name in names}, "lengths": ints(rows)}
    batch["mask"] = jax.ShapeDtypeStruct((rows,), jnp.float32)
    module = encoder(config, vocab)
    objective: Objective
    if config.task == "pretrain":
        batch |= {"item_inputs": ints(rows, width), "item_token_types": ints(rows, width)}
        batch |= {"item_lengths": ints(rows)}
        begins = jax.ShapeDtypeStruct((vocab,), jnp.bool_)
        objective = pretraining(config, module, begins, vocab - 1)
        settings = from_dict(FitConfig, config.pretrain, "pretrain")
    else:
        items = config.expected.num_items
        padded = -(-(items + 1) // config.chunk) * config.chunk
        catalogue = {name: ints(padded, width) for name in names[:2]} | {"lengths": ints(padded)}
        batch |= {"labels": ints(rows), "user": ints(rows)}
        objective = fine_tuning(config, module, catalogue, items, every=1000)
        settings = from_dict(FitConfig, config.tune, "tune")
    shapes = jax.eval_shape(lambda o, b: o.init(jax.random.key(0), b), objective, batch)
    return trained(config, objective, shapes.params), batch, settings


# -- stages ---------------------------------------------------------------------------------------


def pretrain(
    exp: Experiment, module: Recformer, tokenizer: ItemTokenizer, source: Domain,
    validation: Domain,
) -> dict[str, PyTree]:  # fmt: skip
    """The parameters before and after pre-training, ``start`` and ``pretrained``."""
    cfg = exp.config
    objective = pretraining(cfg, module, jnp.asarray(tokenizer.begins), tokenizer.mask)
    catalogue = catalogue_of(cfg, source, tokenizer)
    data = tokens.training_pairs(
        source.split.train, catalogue, cfg.batch_size, buckets=cfg.buckets,
        max_items=cfg.model.max_items, seed=exp.seed("pretrain-data"), pretraining=True,
    )  # fmt: skip
    start = start_params(exp, objective, data.example_batch())
    if not cfg.pretraining:
        return {"start": start, "pretrained": start}
    held_out = tokens.evaluation_histories(
        recommend.evaluation(validation.split, "validation", 1, seen=False),
        catalogue if validation is source else catalogue_of(cfg, validation, tokenizer),
        cfg.evaluation_batch_size, buckets=cfg.buckets, max_items=cfg.model.max_items,
        pretraining=True,
    )  # fmt: skip
    chosen = started(cfg, objective, start)
    fitted = exp.fit("pretrain", chosen, data, cfg.pretrain, evaluate={"validation": held_out})
    exp.record("pre-training: seconds", round(fitted.summary["seconds"], 1))
    for name, value in fitted.metrics.items():
        exp.record(f"pre-training: {name}", round(value, 4))
    return {"start": start, "pretrained": all_params(chosen, fitted.variables).params}


def pretrain_only(exp: Experiment) -> None:
    """Pre-trains on ``config.data``, chosen by the in-batch accuracy on ``config.validation``."""
    cfg = exp.config
    source, validation = (Domain.of(*read_data(s)) for s in (cfg.data, cfg.validation))
    tokenizer = tokenizer_of(exp, source)
    module = encoder(cfg, tokenizer.vocab_size)
    pretrain(exp, module, tokenizer, source, validation)


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """What fine-tuning and ranking have in common.

    Attributes:
      exp: the experiment.
      module: the network.
      domain: the users and items.
      catalogue: the items' tokens.
    """

    exp: Experiment
    module: Recformer
    domain: Domain
    catalogue: Catalogue

    def objective(self, **fields: Any) -> FineTuning:
        cfg = self.exp.config
        rows = jax.tree.map(jnp.asarray, self.catalogue.rows(cfg.chunk))
        return fine_tuning(cfg, self.module, rows, self.catalogue.num_items, **fields)

    def histories(self, name: str, seen: bool) -> Pipeline:
        """The users of a split."""
        cfg = self.exp.config
        return tokens.evaluation_histories(
            recommend.evaluation(self.domain.split, name, 1, seen=seen), self.catalogue,
            cfg.evaluation_batch_size, buckets=cfg.buckets, max_items=cfg.model.max_items,
        )  # fmt: skip

    def encoded(self, name: str, params: PyTree) -> PyTree:
        """The state with the matrix of the items' vectors under ``params``."""
        objective = self.exp.layout.place(self.objective())

        def encode() -> PyTree:
            return {"table": jax.jit(FineTuning.encode_items)(objective, params)}

        return {**self.exp.artifact(f"items-{name}", encode), "epoch": jnp.int32(0)}

    def tune(self, name: str, mode: str, params: PyTree) -> Variables:
        """Fine-tunes and returns the variables of ``objective`` that are to be evaluated.

        Args:
          name: of the run.
          mode: '' (no training), ``frozen_items``, ``trainable_items`` or ``two_stage``.
          params: of the encoder.
        """
        exp, cfg = self.exp, self.exp.config
        if not mode:
            return Variables(params, self.encoded(name, params))
        train = few_users(self.domain.split.train, cfg.user_share, exp.seed("few"))
        data = tokens.training_pairs(
            train, self.catalogue, cfg.batch_size, buckets=cfg.buckets,
            max_items=cfg.model.max_items, seed=exp.seed("tune-data"), pretraining=False,
        )  # fmt: skip
        epoch = len(data)

        def fit(
            stage: str, chosen: Objective, epochs: int, patience: int
        ) -> tuple[Variables, float]:
            settings = dataclasses.replace(
                from_dict(FitConfig, cfg.tune, "tune"), steps=epochs * epoch, eval_every=epoch,
                checkpoint_every=epoch, monitor=MONITOR, select_best=True, patience=patience,
            )  # fmt: skip
            validation = self.histories("validation", cfg.seen == "removed")
            fitted = exp.fit(stage, chosen, data, settings, evaluate={"validation": validation})
            return all_params(chosen, fitted.variables), fitted.metrics[MONITOR]

        epochs, patience = sum(cfg.epochs), cfg.patience
        if mode == "frozen_items":
            state = self.encoded(name, params)
            chosen = started(cfg, self.objective(), params, state)
            return fit(name, chosen, epochs, patience[0])[0]
        if mode == "trainable_items":
            first = {"encoder": params, "table": self.encoded(name, params)["table"]}
            chosen = started(cfg, self.objective(trainable=True), first)
            trained = fit(name, chosen, epochs, patience[0])[0].params
            state = {"table": trained["table"], "epoch": jnp.int32(0)}
            return Variables(trained["encoder"], state)
        # Algorithm 1: what is returned is the best pair of stage 1, (M', I').
        chosen = started(cfg, self.objective(every=epoch), params)
        first_best, value = fit(f"{name}-stage1", chosen, cfg.epochs[0], patience[0])
        state = {**first_best.state, "epoch": jnp.int32(0)}
        chosen = started(cfg, self.objective(every=ONCE), first_best.params, state)
        second_best, later = fit(f"{name}-stage2", chosen, cfg.epochs[1], patience[1])
        return second_best if later > value else first_best._replace(state=state)

    def history(self, name: str) -> list[float]:
        """Best validation NDCG@10 after each epoch, over the stages of a run."""
        found: list[float] = []
        for stage in (name, f"{name}-stage1", f"{name}-stage2"):
            lines = read_metrics(self.exp.workdir / "stages" / stage / "metrics.jsonl")
            found += [line[MONITOR] for line in lines if MONITOR in line]
        return np.maximum.accumulate(found).tolist() if found else []


# -- ranking --------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("ks", "ties"))
def _ranked(
    objective: Objective, variables: Variables, batch: Any, ks: tuple[int, ...], ties: str
) -> tuple[Any, ...]:
    scores = objective.predict(variables, batch)
    where = ranking.ranks(scores, batch["labels"], excluded=batch.get("seen"))
    mask = batch.get("mask", jnp.ones(len(scores)))
    return batch["user"], mask, ranking.metrics(where, ks, ties=ties)


def rank_users(
    exp: Experiment, name: str, objective: Objective, variables: Variables, data: Pipeline
) -> PerUser:
    """Metrics of every user under a network, kept as an artifact."""
    from jax.experimental.multihost_utils import process_allgather

    def measure() -> dict[str, list[float]]:
        users, values = [], []
        placed = exp.layout.place((objective, variables))
        for batch in exp.batches(data):
            found = _ranked(*placed, batch, tuple(exp.config.ks), exp.config.ties)
            user, mask, metrics = process_allgather(found, tiled=True)
            users.append(user[mask > 0])
            values.append({key: value[mask > 0] for key, value in metrics.items()})
        order = np.argsort(np.concatenate(users))
        return {
            key: np.concatenate([v[key] for v in values])[order].astype(float).tolist()
            for key in values[0]
        }

    found = exp.artifact(f"test-{name}", measure)
    return {key: np.array(value) for key, value in found.items()}


def rank_scores(config: Any, scorer: counting.Scorer, source: Any) -> PerUser:
    """Metrics of every user under a scorer."""
    parts = []
    for start in range(0, len(source), 512):
        indices = np.arange(start, min(start + 512, len(source)))
        batch = source.take(indices)
        scores = scorer(recommend.select(source.history, source.users[indices]))
        scores[:, 0] = -np.inf
        where = ranking.ranks(
            jnp.asarray(scores), jnp.asarray(batch["labels"]), excluded=batch.get("seen")
        )
        parts.append(ranking.metrics(where, tuple(config.ks), ties=config.ties))
    return {key: np.concatenate([np.asarray(p[key]) for p in parts]) for key in parts[0]}


def text_neighbours(sentences: Sequence[str], last: int = 5) -> counting.Scorer:
    """Cosines of TF-IDF weights to the user's newest items; the r-th newest counts 1 / r.

    Args:
      sentences: of items 1 … n.
      last: how many of the newest items count.
    """
    from scipy import sparse
    from sklearn.feature_extraction.text import TfidfVectorizer

    weights = TfidfVectorizer(sublinear_tf=True).fit_transform(sentences).astype(np.float32)
    vectors = sparse.vstack([sparse.csr_matrix((1, weights.shape[1]), dtype=np.float32), weights])
    vectors = vectors.tocsr()

    def score(history: Sequences) -> np.ndarray:
        recent = Sequences.of([s[-last:] for s in history])
        rows = np.repeat(np.arange(len(recent)), recent.lengths)
        age = recent.offsets[1:][rows] - np.arange(len(rows))
        chosen = sparse.csr_matrix(
            ((1.0 / age).astype(np.float32), (rows, recent.items)),
            (len(recent), vectors.shape[0]),
        )
        return (chosen @ vectors @ vectors.T).toarray()

    return score


def rank_sasrec(exp: Experiment, domain: Domain) -> PerUser:
    """SASRec with a softmax over all items, which it knows by number."""
    cfg = exp.config.sasrec
    objective = bert4rec.recommender(cfg, "sasrec_ce", domain.split.num_items)
    train = few_users(domain.split.train, exp.config.user_share, exp.seed("few"))
    data = bert4rec.training_data(cfg, objective, train, exp.seed("sasrec-data"))
    seen = exp.config.seen == "removed"
    validation = bert4rec.evaluation_data(cfg, objective, domain.split, "validation", seen=seen)
    fitted = exp.fit("sasrec_ce", objective, data, cfg.train, evaluate={"validation": validation})
    test = bert4rec.evaluation_data(cfg, objective, domain.split, "test", seen=seen)
    return rank_users(exp, "sasrec_ce", objective, fitted.variables, test)


# -- comparison -----------------------------------------------------------------------------------


def check_names(config: Any) -> None:
    """Refuses runs and baselines that there are not."""
    for option, allowed in (("runs", tuple(RUNS)), ("baselines", BASELINES)):
        for name in config[option]:
            if name not in allowed:
                near = difflib.get_close_matches(name, allowed, n=2) or allowed
                raise ConfigError(f"config.{option} has {name!r}; nearest: {', '.join(near)}.")


def domains(exp: Experiment) -> tuple[Domain, Domain]:
    """What is pre-trained on, and what is fine-tuned and tested on; often the same."""
    cfg = exp.config
    log, texts = read_data(cfg.data)
    cold = {"cold": cfg.cold, "seed": exp.seed("cold")}
    if not cfg.categories.attribute:
        domain = Domain.of(log, texts, **cold)
        return domain, domain
    source, target = halves(log, texts, **cfg.categories, seed=exp.seed("halves"))
    return Domain.of(source, texts), Domain.of(target, texts, **cold)


def compare(exp: Experiment) -> None:
    """Pre-trains, fine-tunes and ranks."""
    cfg = exp.config
    check_names(cfg)
    source, domain = domains(exp)
    tokenizer = tokenizer_of(exp, source)
    module = encoder(cfg, tokenizer.vocab_size)
    params = pretrain(exp, module, tokenizer, source, source)
    target = Target(exp, module, domain, catalogue_of(cfg, domain, tokenizer))
    exp.artifact("items", lambda: domain.names)
    exp.artifact("catalogue", lambda: dataclasses.asdict(target.catalogue))
    exp.record("parameters of the encoder", sum(x.size for x in jax.tree.leaves(params["start"])))
    exp.record("pre-trained on interactions", len(source.split.train.items))

    seen = cfg.seen == "removed"
    found: dict[str, PerUser] = {}
    curves: dict[str, list[float]] = {}
    test = target.histories("test", seen)
    for name in cfg.runs:
        start, mode = RUNS[name]
        variables = target.tune(name, mode, params[start])
        exp.artifact(f"{SAVED}{name}", variables._asdict)
        found[name] = rank_users(exp, name, target.objective(), variables, test)
        if line := target.history(name):
            curves[name] = line
    known = domain.split.history("test")
    sentences = [" ".join(item.values()) for item in domain.items]
    for name in cfg.baselines:
        if name == "sasrec_ce":
            found[name] = rank_sasrec(exp, domain)
            continue
        scorer = (
            text_neighbours(sentences)
            if name == "tfidf"
            else counting.SCORERS[name](known, domain.split.num_items)
        )
        histories = recommend.evaluation(domain.split, "test", 1, seen=seen)
        found[name] = rank_scores(cfg, scorer, histories)
    _report(exp, domain, found, curves)


def saved_models(config: Any, workdir: Path) -> dict[str, Path]:
    """The finished runs that ``transfer-jax recommend`` can use, and where they are kept."""
    paths = {name: workdir / "artifacts" / f"{SAVED}{name}" for name in config.get("runs", ())}
    return {name: path for name, path in paths.items() if path.exists()}


def serve(config: Any, path: Path, layout: Layout) -> Served:
    """A finished run with the catalogue that it was tested on, for ``transfer-jax recommend``.

    Args:
      config: of the run.
      path: see ``saved_models``.
      layout: where its arrays go.
    """
    variables = Variables(**read_tree(path, layout))
    saved = read_tree(path.parent / "catalogue")
    catalogue = Catalogue(
        np.asarray(saved["tokens"]), np.asarray(saved["types"]), np.asarray(saved["lengths"]),
        start=int(saved["start"]), pad=int(saved["pad"]),
    )  # fmt: skip
    module = encoder(config, len(variables.params["tokens"]["embedding"]))
    rows = catalogue.rows(config.chunk)
    objective = layout.place(fine_tuning(config, module, rows, catalogue.num_items))
    options = {"length": config.buckets[-1], "max_items": config.model.max_items}
    return Served(
        objective, variables, lambda history: tokens.pack_histories(catalogue, history, **options)
    )


def paired(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Mean difference of two metrics over the same users, and the p-value of a paired t-test."""
    from scipy import stats

    if len(first) < 2 or np.all(first == second):
        return float(np.mean(first - second)) if len(first) else 0.0, 1.0
    return float(np.mean(first - second)), float(stats.ttest_rel(first, second).pvalue)


def _report(
    exp: Experiment, domain: Domain, found: Mapping[str, PerUser],
    curves: Mapping[str, list[float]],
) -> None:  # fmt: skip
    cfg, split = exp.config, domain.split
    users = split.evaluated()
    warm = domain.warm[split.test[users]]
    protocol = Protocol("full", split.num_items, cfg.seen, cfg.ties)
    k = cfg.shown
    metrics = (f"hr@{k}", f"ndcg@{k}", "mrr")
    groups = {"warm": warm, "cold": ~warm}
    groups = {name: rows for name, rows in groups.items() if rows.any()}
    for name, rows in groups.items():
        exp.record(f"users with a {name} right item", int(rows.sum()))
        exp.table(
            f"Test, {name} right items ({int(rows.sum()):,} users): {protocol}",
            ["model", *(m.upper() for m in metrics)],
            [[n, *(round(float(v[m][rows].mean()), 4) for m in metrics)] for n, v in found.items()],
        )
    rows = []
    for first, second in (
        ("two_stage", "scratch"), ("two_stage", "frozen_items"), ("two_stage", "sasrec_ce"),
        ("zero_shot", "random"), ("two_stage", "tfidf"),
    ):  # fmt: skip
        if first in found and second in found:
            for name, chosen in groups.items():
                pair = [found[n][f"ndcg@{k}"][chosen] for n in (first, second)]
                difference, p = paired(*pair)
                rows.append([first, second, name, round(difference, 4), f"{p:.2g}"])
    if rows:
        exp.table(
            f"Differences of NDCG@{k} over the same users (paired t-test; training noise, which is "
            "between seeds, is not in p)",
            ["model", "less", "right items", "difference", "p"],
            rows,
        )
    if curves:
        longest = max(map(len, curves.values()))
        lines = {name: line + line[-1:] * (longest - len(line)) for name, line in curves.items()}
        exp.curve(
            "Fine-tuning", list(range(1, longest + 1)), lines, xlabel="epoch",
            ylabel="best validation NDCG@10 so far",
        )  # fmt: skip
    exp.record(
        "what is known",
        "networks are trained without validation and test items; counts (pop, markov1, item_knn) "
        "know the validation items; cold items are in no history, and tfidf has read their text",
    )
