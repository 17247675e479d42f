"""Towards a Unified View of Parameter-Efficient Transfer Learning (He et al., ICLR 2022).

The methods are in ``transfer_jax.nn.petl``. ``recipe`` runs one of these, by ``config.task``:

* ``markov`` compares the methods on a generated task: an encoder learns to fill the gaps of
  sentences from a Markov chain, then to translate them word for word into another vocabulary, with
  some pairs of words exchanged. Embeddings and output stay frozen, so that all of the new
  vocabulary must go through what a method adds.
* ``sentences`` compares them on the classification of real sentences: an encoder learns the classes
  of some data sets, then the methods learn another.
* ``multi30k`` compares them on translation: an encoder-decoder learns to restore corrupted captions
  in two languages, as mBART does; then the methods learn to translate.
* ``classify`` and ``generate`` are the published settings: one method on a pretrained model, read
  from ``config.pretrained``, and tables in ``config.data.directory``. ``plan`` gives their training
  steps without either.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from transfer_jax.configuration import ConfigError
from transfer_jax.data import texts
from transfer_jax.data.padding import bucketed
from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.sources import ArraySource, Source
from transfer_jax.interop import Tokenizer, from_pretrained, load_tokenizer, train_tokenizer
from transfer_jax.metrics import text as metrics
from transfer_jax.models import (
    Bart,
    BartConfig,
    Bert,
    BertConfig,
    Decoding,
    bart_stack,
    bert_stack,
    generate_targets,
)
from transfer_jax.nn import petl
from transfer_jax.objectives import (
    Adapted,
    Aux,
    Classification,
    Mean,
    ModuleObjective,
    Objective,
    Seq2Seq,
    Variables,
    WarmStart,
    example_mask,
    losses,
)
from transfer_jax.objectives.base import Array, Batch
from transfer_jax.training import Experiment, FitConfig, Fitted
from transfer_jax.training.config import from_dict


class TokenLabels(ModuleObjective):
    """Cross-entropy on ``batch["labels"]``, int [B, L]; the module gives logits [B, L, V].

    Where ``batch["weights"]`` [B, L] is given, positions of weight 0 do not count. Metrics: ``nll``
    and ``accuracy`` per token.
    """

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        logits, state = self.apply(variables, batch, rng)
        labels = batch["labels"]
        weights = jnp.broadcast_to(example_mask(batch, len(labels))[:, None], labels.shape)
        weights = weights * batch.get("weights", 1.0)
        nll = Mean.of(losses.cross_entropy(logits, labels), weights)
        accuracy = Mean.of(jnp.argmax(logits, axis=-1) == labels, weights)
        return nll.value(), Aux(state, {"nll": nll, "accuracy": accuracy}, nll.weight, logits)


class Language:
    """Sentences of a Markov chain, and their translation.

    Args:
      vocabulary: V; the token V is the gap.
      length: of a sentence.
      concentration: of the Dirichlet distribution of each row of the transition matrix.
      seed: of the chain and of the translation.
    """

    def __init__(self, vocabulary: int, length: int, concentration: float, seed: int):
        rng = np.random.default_rng(seed)
        rows = rng.dirichlet(np.full(vocabulary, concentration), size=vocabulary)
        self.cumulative = rows.cumsum(axis=1)
        self.vocabulary, self.length = vocabulary, length
        self.words = rng.permutation(vocabulary)
        self.exchanging = rng.permutation(vocabulary) < vocabulary // 2

    def sentences(self, count: int, seed: int) -> np.ndarray:
        """int32 [count, length]; the first token is uniform."""
        rng = np.random.default_rng(seed)
        tokens = np.empty((count, self.length), np.int32)
        tokens[:, 0] = rng.integers(0, self.vocabulary, count)
        for i in range(1, self.length):
            below = self.cumulative[tokens[:, i - 1]] < rng.random((count, 1))
            tokens[:, i] = np.minimum(below.sum(axis=1), self.vocabulary - 1)
        return tokens

    def translate(self, tokens: np.ndarray) -> np.ndarray:
        """Exchanges the pairs (0, 1), (2, 3), ... whose first token is of one half; maps words."""
        pairs = tokens.reshape(len(tokens), -1, 2)
        swapped = np.where(self.exchanging[pairs[..., :1]], pairs[..., ::-1], pairs)
        return self.words[swapped.reshape(tokens.shape)].astype(np.int32)

    def gaps(self, tokens: np.ndarray, share: float, seed: int) -> dict[str, np.ndarray]:
        """Examples for ``TokenLabels``: a share of the tokens is hidden, and only they count."""
        hidden = np.random.default_rng(seed).random(tokens.shape) < share
        inputs = np.where(hidden, self.vocabulary, tokens).astype(np.int32)
        return {"inputs": inputs, "labels": tokens, "weights": hidden.astype(np.float32)}


def recipe(exp: Experiment) -> None:
    tasks = {
        "markov": markov, "sentences": sentences, "multi30k": multi30k, "classify": classify,
        "generate": generate,
    }  # fmt: skip
    if exp.config.task not in tasks:
        raise ConfigError(f"config.task={exp.config.task!r}; choose one of {', '.join(tasks)}.")
    tasks[exp.config.task](exp)


# -- comparisons ----------------------------------------------------------------------------------


def _train(exp: Experiment, name: str, source: Source) -> Pipeline:
    return Pipeline(source, exp.config.batch_size, shuffle=True, seed=exp.seed(name), repeat=True)


def _held_out(exp: Experiment, source: Source) -> Pipeline:
    return Pipeline(source, exp.config.eval_batch_size)


class Result(NamedTuple):
    """The better of a method's learning rates.

    Attributes:
      objective: what was trained.
      fitted: the stage.
      rate: the learning rate.
      values: the validation metric at every rate.
    """

    objective: Objective
    fitted: Fitted
    rate: float
    values: list[float]


def compare(
    exp: Experiment,
    objective: Callable[[Any], Objective],
    train: Pipeline,
    validation: Pipeline,
    *,
    metric: str = "accuracy",
) -> dict[str, Result]:
    """Trains the methods of ``config.methods``, each at all of its learning rates.

    Args:
      exp: the experiment.
      objective: maps an entry of ``config.methods`` to what is trained.
      train: training data, in the same order for all of them.
      validation: chooses the learning rate.
      metric: which is the largest there; ``nll``, the smallest.
    """
    settings = from_dict(FitConfig, exp.config.transfer)
    results = {}
    for name, entry in exp.config.methods.items():
        goal, fits = objective(entry), []
        for rate in entry.learning_rates:
            optimizer = dataclasses.replace(settings.optimizer, learning_rate=rate)
            stage = dataclasses.replace(settings, optimizer=optimizer)
            fits.append(
                exp.fit(f"{name}-{rate:g}", goal, train, stage, evaluate={"validation": validation})
            )
        values = [fitted.metrics[f"validation/{metric}"] for fitted in fits]
        best = int(np.argmin(values) if metric == "nll" else np.argmax(values))
        results[name] = Result(goal, fits[best], entry.learning_rates[best], values)
    return results


def _rates(exp: Experiment, results: Mapping[str, Result], metric: str = "accuracy") -> None:
    rows: list[list[Any]] = [
        [name, *(round(value, 4) for value in r.values)] for name, r in results.items()
    ]
    columns = ["first rate", "second rate"][: max(len(row) for row in rows) - 1]
    exp.table(f"Validation {metric} by learning rate", ["method", *columns], rows)


def _size(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def markov(exp: Experiment) -> None:
    cfg = exp.config
    language = Language(
        cfg.data.vocabulary, cfg.data.length, cfg.data.concentration, exp.seed("language")
    )
    module = encoder(cfg.model, cfg.data.vocabulary + 1, cfg.data.length, head="masked_lm")
    task = TokenLabels(module=module)

    def gaps(name: str, count: int) -> ArraySource:
        tokens = language.sentences(count, exp.seed(f"{name} sentences"))
        return ArraySource(language.gaps(tokens, cfg.data.hidden, exp.seed(f"{name} gaps")))

    def translations(name: str, count: int) -> ArraySource:
        tokens = language.sentences(count, exp.seed(f"{name} originals"))
        return ArraySource({"inputs": tokens, "labels": language.translate(tokens)})

    source = exp.fit(
        "pretrain", task, _train(exp, "pretrain", gaps("train", cfg.data.source)), cfg.pretrain,
        evaluate={"validation": _held_out(exp, gaps("validation", cfg.data.held_out))},
    )  # fmt: skip
    exp.record("gaps filled", source.metrics["validation/accuracy"])

    validation, test = (
        _held_out(exp, translations(name, cfg.data.held_out)) for name in ("validation", "test")
    )
    start = WarmStart(inner=task, params=source.params)
    body = _size(source.params["stack"])
    results = compare(
        exp, lambda entry: Adapted.of(start, source.params, build(entry)),
        _train(exp, "translate", translations("train", cfg.data.target)), validation,
    )  # fmt: skip
    rows: list[list[Any]] = []
    for name, r in results.items():
        accuracy = exp.evaluate(r.objective, r.fitted.variables, test)["accuracy"]
        count = _size(r.fitted.params)
        rows.append([name, round(accuracy, 4), count, round(count / body, 4), r.rate])
    exp.table(
        "Token accuracy of the translation (test)",
        ["method", "accuracy", "trained parameters", "share of the layers", "learning rate"], rows,
    )  # fmt: skip
    _rates(exp, results)
    exp.bars("Token accuracy", [row[0] for row in rows], {"": [row[1] for row in rows]})


# -- sentences ------------------------------------------------------------------------------------

HEAD = "^(pooler|classifier)/"
BODY = ("tokens", "positions", "token_types", "embedding_norm", "stack")


def sentences(exp: Experiment) -> None:
    """Learns ``config.data.sources`` with one classifier of all their classes, then another set."""
    cfg = exp.config
    sources = {name: texts.sentence_task(name, seed=cfg.seed) for name in cfg.data.sources}
    target = texts.sentence_task(cfg.data.target, seed=cfg.seed)
    known = [text for task in sources.values() for text in task["train"].texts]
    tokenizer = train_tokenizer(known, cfg.data.vocabulary, max_length=cfg.data.length)

    def arrays(labelled: texts.Labelled, first: int = 0) -> dict[str, np.ndarray]:
        tokens = tokenizer(labelled.texts, length=cfg.data.length)
        labels = labelled.labels + np.int32(first)
        return {"inputs": tokens.inputs, "lengths": tokens.lengths, "labels": labels}

    starts = np.cumsum([0, *(texts.SENTENCE_CLASSES[name] for name in sources)])
    pool = {
        split: _joined([arrays(task[split], at) for task, at in zip(sources.values(), starts)])
        for split in ("train", "validation")
    }

    def classifier(classes: int) -> Classification:
        module = encoder(
            cfg.model, cfg.data.vocabulary, cfg.data.length, head="classification",
            num_classes=classes,
        )  # fmt: skip
        return Classification(module=module)

    source = exp.fit(
        "pretrain", classifier(int(starts[-1])),
        _train(exp, "pretrain", ArraySource(pool["train"])), cfg.pretrain,
        evaluate={"validation": _held_out(exp, ArraySource(pool["validation"]))},
    )  # fmt: skip
    exp.record("classes of the sources", source.metrics["validation/accuracy"])

    body = {k: v for k, v in source.params.items() if k in BODY}
    task = classifier(texts.SENTENCE_CLASSES[cfg.data.target])
    data = {split: ArraySource(arrays(part)) for split, part in target.items()}
    train = _train(exp, "target", data["train"])
    drawn = jax.eval_shape(task.init, jax.random.key(0), train.example_batch()).params
    start, params = WarmStart(inner=task, params=body), {**drawn, **body}

    def objective(entry: Any) -> Objective:
        if entry.method == "scratch":
            return task
        return Adapted.of(start, params, build(entry), train=HEAD)

    results = compare(exp, objective, train, _held_out(exp, data["validation"]))
    test = _held_out(exp, data["test"])
    rows: list[list[Any]] = []
    head = _size({k: v for k, v in drawn.items() if k not in BODY})
    layers = _size(body["stack"])
    for name, r in results.items():
        accuracy = exp.evaluate(r.objective, r.fitted.variables, test)["accuracy"]
        count = _size(r.fitted.params) - head
        rows.append([name, round(accuracy, 4), count, round(count / layers, 4), r.rate])
    exp.table(
        f"Accuracy on {cfg.data.target} (test)",
        ["method", "accuracy", "trained beside the head", "share of the layers", "learning rate"],
        rows,
    )  # fmt: skip
    _rates(exp, results)
    exp.bars("Accuracy", [row[0] for row in rows], {"": [row[1] for row in rows]})


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


# -- translation ----------------------------------------------------------------------------------

LANGUAGES = ("en", "de")


def multi30k(exp: Experiment) -> None:
    """Restores corrupted captions in both languages, and compares on translation into German.

    As in mBART, the source ends with its language and the target begins with its own.
    """
    cfg = exp.config
    pairs = texts.multi30k()
    tokenizer = train_tokenizer(
        [text for pair in pairs["train"] for text in pair], cfg.data.vocabulary,
        specials=[f"<{name}>" for name in LANGUAGES],
    )  # fmt: skip
    end, mask, length = tokenizer.token("</s>"), tokenizer.token("<mask>"), cfg.data.length
    english, german = (tokenizer.token(f"<{name}>") for name in LANGUAGES)
    module = encoder_decoder(cfg.model, cfg.data.vocabulary, length)
    task = Seq2Seq(module=module, label_smoothing=cfg.label_smoothing, start_id=end)

    def examples(inputs: list[np.ndarray], targets: list[np.ndarray]) -> dict[str, np.ndarray]:
        a, b = (padded(rows, length, tokenizer.pad) for rows in (inputs, targets))
        return {"inputs": a[0], "lengths": a[1], "targets": b[0], "target_lengths": b[1]}

    def translation(split: str) -> ArraySource:
        sources, targets = zip(*pairs[split])
        inputs = encode(tokenizer, sources, (), (english, end), length)
        return ArraySource(examples(inputs, encode(tokenizer, targets, (german,), (end,), length)))

    def corrupted(split: str) -> ArraySource:
        """The captions of both languages, with gaps and whole."""
        rng, parts = np.random.default_rng(exp.seed(f"{split} gaps")), []
        for language, captions in zip((english, german), zip(*pairs[split])):
            inputs = [
                np.append(infill(row, cfg.data.hidden, cfg.data.span, mask, rng), (language, end))
                for row in encode(tokenizer, captions, (), (), length - 2)
            ]
            targets = encode(tokenizer, captions, (language,), (end,), length)
            parts.append(examples(inputs, targets))
        return ArraySource(_joined(parts))

    source = exp.fit(
        "pretrain", task, _train(exp, "pretrain", corrupted("train")), cfg.pretrain,
        evaluate={"validation": _held_out(exp, corrupted("validation"))},
    )  # fmt: skip
    exp.record("tokens restored", source.metrics["validation/accuracy"])
    start = WarmStart(inner=task, params=source.params)

    def objective(entry: Any) -> Objective:
        if entry.method == "scratch":
            return task
        return Adapted.of(start, source.params, build(entry))

    validation, test = (_held_out(exp, translation(split)) for split in ("validation", "test_2016"))
    results = compare(
        exp, objective, _train(exp, "translate", translation("train")), validation, metric="nll"
    )
    decoding = Decoding(
        max_tokens=length, start_id=end, eos_id=end, pad_id=tokenizer.pad, forced_bos_id=german,
        num_beams=cfg.decode.num_beams, length_penalty=cfg.decode.length_penalty,
    )  # fmt: skip
    references = [target for _, target in pairs["test_2016"]]
    layers = sum(_size(source.params[name]) for name in ("encoder", "decoder"))
    rows: list[list[Any]] = []
    for name, r in results.items():
        translate = functools.partial(
            write, exp, module, r.objective, r.fitted.variables, test, tokenizer, decoding
        )
        bleu = metrics.bleu(exp.artifact(f"translations-{name}", translate), references)
        count = _size(r.fitted.params)
        rows.append(
            [name, round(100 * bleu["bleu_4"], 2), round(bleu["brevity_penalty"], 3),
             round(min(r.values), 3), count, round(count / layers, 4), r.rate]
        )  # fmt: skip
    exp.table(
        "English to German, test_2016",
        ["method", "BLEU", "brevity penalty", "validation nll", "trained", "share of the layers",
         "learning rate"], rows,
    )  # fmt: skip
    _rates(exp, results, "nll")
    exp.bars("BLEU", [row[0] for row in rows], {"": [row[1] for row in rows]})


def encode(
    tokenizer: Tokenizer,
    many: Sequence[str],
    before: Sequence[int],
    after: Sequence[int],
    length: int,
) -> list[np.ndarray]:
    """The tokens of texts between others, int32 [<= length] each; longer texts are cut."""
    room = length - len(before) - len(after)
    encoded = tokenizer.backend.encode_batch(list(many), add_special_tokens=False)
    return [np.array([*before, *e.ids[:room], *after], np.int32) for e in encoded]


def padded(rows: Sequence[np.ndarray], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens as int32 [N, length], and their lengths [N]."""
    filled = np.full((len(rows), length), pad, np.int32)
    for row, values in zip(filled, rows):
        row[: len(values)] = values
    return filled, np.array([len(row) for row in rows], np.int32)


def infill(
    tokens: np.ndarray, share: float, span: float, mask: int, rng: np.random.Generator
) -> np.ndarray:
    """BART's text infilling: spans of tokens each become one mask.

    Args:
      tokens: int [L].
      share: of the tokens to be hidden, at least.
      span: mean length of a span, Poisson but at least 1.
      mask: the token in their place.
      rng: of the spans.
    """
    hidden = np.zeros(len(tokens), bool)
    while hidden.sum() < share * len(tokens):
        start = rng.integers(len(tokens))
        hidden[start : start + max(1, rng.poisson(span))] = True
    first = hidden & ~np.append(False, hidden[:-1])
    return np.where(first, mask, tokens)[first | ~hidden]


def write(
    exp: Experiment,
    module: Bart,
    objective: Objective,
    variables: Variables,
    data: Pipeline,
    tokenizer: Tokenizer,
    decoding: Decoding,
) -> list[str]:
    """What an encoder-decoder writes for every example of ``data``, on all processes."""
    network: Any = module
    inner: dict[str, Any] = {"params": variables.params}
    if isinstance(objective, Adapted):
        network = petl.AdaptedModule(module, objective.method)
        inner = {
            "params": objective.backbone(variables).params, "added": variables.params["added"]
        }  # fmt: skip
    found: list[str] = []
    for batch in exp.batches(data):
        made = generate_targets(network, inner, batch["inputs"], decoding, lengths=batch["lengths"])
        tokens, mask = multihost_utils.process_allgather((made.tokens, batch["mask"]), tiled=True)
        found += [text.strip() for text in tokenizer.decode(tokens[mask > 0])]
    return found


# -- published settings ---------------------------------------------------------------------------


def _needed(config: Any, what: str) -> None:
    """Says what a published setting needs to run."""
    if not (config.pretrained and config.data.directory):
        tables = [config.data[s] for s in ("train", "validation", "test") if s in config.data]
        raise ConfigError(
            f"config.pretrained={config.pretrained!r} and config.data.directory="
            f"{config.data.directory!r}: a published setting needs both. The first is a directory "
            f"with {what} in the files of Hugging Face (config.json, model.safetensors, "
            f"tokenizer.json), the second one with {', '.join(tables)}. The variants markov, "
            "sentences and multi30k need neither; `plan` gives the shapes."
        )


def _buckets(exp: Experiment, name: str, examples: list[dict[str, Any]], pad: int) -> Pipeline:
    """Batches of examples whose ``inputs`` int32 [L] differ in length; see ``data.bucketed``."""
    cfg, train = exp.config, name == "train"
    return bucketed(
        examples, [len(example["inputs"]) for example in examples], cfg.data.boundaries,
        cfg.batch_size, exp.seed(name), values={"inputs": pad}, shuffle=train, repeat=train,
    )  # fmt: skip


def classify(exp: Experiment) -> None:
    """One method on a pretrained RoBERTa and a task in the layout of GLUE's files."""
    cfg = exp.config
    _needed(cfg, "RoBERTa")
    tokenizer = load_tokenizer(cfg.pretrained, max_length=cfg.length)

    def data(split: str) -> Pipeline:
        rows = texts.read_labelled(
            Path(cfg.data.directory) / cfg.data[split], cfg.data.texts, cfg.data.label,
            cfg.data.classes,
        )  # fmt: skip
        both = rows.texts if rows.pairs is None else list(zip(rows.texts, rows.pairs))
        examples = [
            {"inputs": np.array(e.ids, np.int32), "labels": label}
            for e, label in zip(tokenizer.backend.encode_batch(both), rows.labels)
        ]
        return _buckets(exp, split, examples, tokenizer.pad)

    model = from_pretrained(
        cfg.pretrained, architecture="RobertaForSequenceClassification", fresh=(HEAD,),
        scan=True, remat=True, compute_dtype=jnp.bfloat16,
    )  # fmt: skip
    module = Bert(dataclasses.replace(model.module.config, num_classes=len(cfg.data.classes)))
    task, train = Classification(module=module), data("train")
    body = {k: v for k, v in model.params.items() if k in BODY}

    def head(key: Array, batch: Batch) -> Any:
        return {k: v for k, v in task.init(key, batch).params.items() if k not in BODY}

    params = {**jax.jit(head)(exp.key("head"), train.example_batch()), **body}
    fitted = exp.fit(
        "train", _published(cfg, task, params), train, cfg.train,
        evaluate={"validation": data("validation")},
    )  # fmt: skip
    exp.record("validation accuracy", fitted.metrics["validation/accuracy"])


def generate(exp: Experiment) -> None:
    """One method on a pretrained BART or mBART and tables of pairs of texts."""
    cfg = exp.config
    _needed(cfg, "BART or mBART")
    tokenizer = load_tokenizer(cfg.pretrained)

    def data(split: str) -> tuple[Pipeline, list[str]]:
        columns = (cfg.data.source, cfg.data.target)
        rows = texts.read_columns(Path(cfg.data.directory) / cfg.data[split], columns)
        sources, references = (list(column) for column in zip(*rows))
        (before, after), (first, last) = cfg.data.around_source, cfg.data.around_target
        inputs = encode(tokenizer, sources, before, after, cfg.length)
        targets = encode(tokenizer, references, first, last, cfg.target_length)
        examples = [
            {"inputs": row, "targets": target, "target_lengths": length}
            for row, target, length in zip(
                inputs, *padded(targets, cfg.target_length, tokenizer.pad)
            )
        ]
        return _buckets(exp, split, examples, tokenizer.pad), references

    model = from_pretrained(
        cfg.pretrained, architecture=cfg.architecture, fresh=("^output_bias$",), scan=True,
        remat=True, compute_dtype=jnp.bfloat16,
    )  # fmt: skip
    task = Seq2Seq(module=model.module, label_smoothing=cfg.label_smoothing, start_id=cfg.start_id)
    objective = _published(cfg, task, model.params)
    fitted = exp.fit(
        "train", objective, data("train")[0], cfg.train,
        evaluate={"validation": data("validation")[0]},
    )  # fmt: skip
    decoding = Decoding(start_id=cfg.start_id, pad_id=tokenizer.pad, **cfg.decode.to_dict())
    test, references = data("test")
    written = exp.artifact(
        "written",
        lambda: write(exp, model.module, objective, fitted.variables, test, tokenizer, decoding),
    )
    scores = {**metrics.rouge(written, references), **metrics.bleu(written, references)}
    for name in cfg.metrics:
        exp.record(f"test {name}", round(100 * scores[name], 2))


def _published(config: Any, task: Objective, params: Any) -> Adapted:
    """The method of a published setting, from pretrained ``params`` and a head drawn anew."""
    start = WarmStart(inner=task, params=params)
    train = config.head if config.train_head else None
    return Adapted.of(start, params, build(config.method), train=train)


def build(entry: Any) -> petl.Method:
    """The method that an entry of ``config.methods`` names.

    Args:
      entry: ``method``, one of ``petl.METHODS``, and its ``options``.
    """
    return petl.named(entry.method, **entry.options.to_dict())


def encoder(model: Any, vocabulary: int, length: int, *, head: str, num_classes: int = 2) -> Bert:
    """The small encoder of ``config.model``."""
    return Bert(
        BertConfig(
            vocab_size=vocabulary, stack=bert_stack(**model.to_dict()), max_positions=length,
            token_types=1, head=head, num_classes=num_classes,
        )
    )  # fmt: skip


def encoder_decoder(model: Any, vocabulary: int, length: int) -> Bart:
    """The small encoder-decoder of ``config.model``."""
    layers = bart_stack(**model.to_dict())
    decoder = dataclasses.replace(layers, causal=True, cross_attention=True)
    return Bart(
        BartConfig(
            vocab_size=vocabulary, encoder=layers, decoder=decoder, max_positions=length,
            position_offset=0,
        )
    )  # fmt: skip


def plan(config: Any) -> tuple[Adapted, dict[str, jax.ShapeDtypeStruct], FitConfig]:
    """What a published setting would train, for ``training.aot.lower_step``.

    Returns:
      The objective (its frozen parameters are shapes), a batch of shapes, the stage's settings.
    """
    size, model = config.batch_size, config.model.to_dict()
    kind = model.pop("kind")
    stack = bert_stack if kind == "bert" else bart_stack
    layers = stack(**model.pop("stack"), dtype=jnp.bfloat16, scan=True, remat=True)
    if kind == "bert":
        task: Objective = Classification(module=Bert(BertConfig(stack=layers, **model)))
        batch = {"inputs": _tokens(size, config.length), "labels": _tokens(size)}
        batch["lengths"] = _tokens(size)
    else:
        decoder = dataclasses.replace(layers, causal=True, cross_attention=True)
        module = Bart(BartConfig(encoder=layers, decoder=decoder, **model))
        task = Seq2Seq(
            module=module, label_smoothing=config.label_smoothing, start_id=config.start_id
        )
        batch = {"inputs": _tokens(size, config.length), "lengths": _tokens(size)}
        batch["targets"] = _tokens(size, config.target_length)
        batch["target_lengths"] = _tokens(size)
    params = jax.eval_shape(task.init, jax.random.key(0), batch).params
    train = config.head if config.train_head else None
    objective = Adapted.of(task, params, build(config.method), train=train)
    return objective, batch, from_dict(FitConfig, config.train)


def _tokens(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
