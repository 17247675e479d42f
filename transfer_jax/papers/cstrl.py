"""CSTRL: sequential transfer for radiology report summarisation (2025).

A small encoder-decoder learns to fill in key sentences of the Findings, then to write the
Impression, and is held near the first skill by its Fisher information. The recipe's
``config.task`` is one of

* ``reports``: the stages of the paper on radiology reports, against other ways to the same end and
  against summaries that need no training;
* ``fisher``: what the estimators of the Fisher information do in elastic weight consolidation, on
  a sequence of tasks made from digits by permuting their pixels.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from transfer_jax import trees
from transfer_jax.configuration import ConfigError
from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.registry import load
from transfer_jax.data.reports import (
    Lexicon,
    PretrainedTokenizer,
    Report,
    Tokenizer,
    WordTokenizer,
    encode_pairs,
    gap_pairs,
    generated_reports,
    open_i,
    read_reports,
    split_reports,
    summary_pairs,
)
from transfer_jax.data.sources import ArraySource, take
from transfer_jax.data.splits import Subset
from transfer_jax.metrics import continual, text
from transfer_jax.models.generation import Decoding, generate_targets
from transfer_jax.models.t5 import T5, t5_config
from transfer_jax.objectives import (
    Aux,
    Classification,
    Distilled,
    LinearFloor,
    Mean,
    Objective,
    Penalized,
    Seq2Seq,
    Transformed,
    Variables,
    WarmStart,
    losses,
)
from transfer_jax.training import Experiment, FitConfig, NonFiniteError
from transfer_jax.training.config import from_dict
from transfer_jax.trees import Consolidated
from transfer_jax.trees.paths import PyTree

Array = jax.Array
Batch = Any


def recipe(exp: Experiment) -> None:
    tasks = {"reports": reports, "fisher": fisher_on_digits}
    if exp.config.task not in tasks:
        raise ConfigError(
            f"config.task={exp.config.task!r}; choose one of {', '.join(sorted(tasks))}."
        )
    tasks[exp.config.task](exp)


def _require(exp: Experiment, requirements: Mapping[str, tuple[float, str, float]]) -> None:
    """Keeps a table of what should hold, and stops the run if ``config.enforce`` and it does not.

    Args:
      exp: the experiment.
      requirements: what -> (measured, ">=" or "<=", bound).
    """
    rows, failed = [], []
    for name, (measured, relation, bound) in requirements.items():
        holds = measured >= bound if relation == ">=" else measured <= bound
        rows.append(
            [name, round(float(measured), 4), f"{relation} {bound:g}", "yes" if holds else "no"]
        )
        if not holds:
            failed.append(f"{name}: {measured:.4f}, not {relation} {bound:g}")
    exp.table("Required", ["what", "measured", "bound", "holds"], rows)
    if failed and exp.config.enforce:
        raise RuntimeError(
            f"required of this run and not reached: {'; '.join(failed)}. Set config.enforce=False "
            "to report it only."
        )


# -- objectives ------------------------------------------------------------------------------------


class TokenDistilled(Distilled):
    """Distillation at each target token: ``(1 - weight) loss + weight T^2 KL(teacher || student)``.

    The divergence is summed over the vocabulary and averaged over all tokens of the batch that
    count. ``inner`` is a ``Seq2Seq``; the teacher runs without dropout.

    Attributes:
      released: as in the published code: padding counts, and the term is divided by the square of
        the batch size, which leaves little of it.
    """

    released: bool = flax.struct.field(pytree_node=False, default=False)

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        loss, aux = self.inner.loss(variables, batch, rng)
        target = jax.lax.stop_gradient(self.teacher.predict(self.teacher_variables, batch))
        kl = losses.temperature_kl(aux.outputs, target, temperature=self.temperature)
        task = cast(Seq2Seq, self.inner)
        if self.released:
            task = task.replace(count_padding=True)
        mean = Mean.of(kl, task.weights(batch))
        size = len(batch["targets"]) ** 2 if self.released else 1
        total = (1.0 - self.weight) * loss + self.weight * mean.value() / size
        return total, aux._replace(metrics={**aux.metrics, "distance": mean})


class Unfreezing(Transformed):
    """Progressive unfreezing: some parameters stay as they are until their time comes.

    Frozen parameters have no gradient and no weight decay. Build with ``Unfreezing.of``.

    Attributes:
      inner: the objective.
      start: values that frozen parameters keep, None where a parameter is always trained.
      thaw: int32 scalars in the structure of ``start``: the step from which each is trained.
      step: the step now.
    """

    start: PyTree
    thaw: PyTree
    step: Array | int = 0

    @classmethod
    def of(
        cls, inner: Objective, params: PyTree, steps_per_epoch: int, epochs: int,
        where: str = "^encoder/",
    ) -> "Unfreezing":  # fmt: skip
        """Freezes ``where`` and thaws it tensor by tensor, in the order of definition.

        Args:
          inner: the objective, which starts from ``params``.
          params: its parameters.
          steps_per_epoch: training steps.
          epochs: of the stage.
          where: regular expression of the parameters that are frozen at first.
        """
        order = definition_order(trees.paths(trees.partition(params, where)[0]))
        when = dict(zip(order, thaw_epochs(len(order), epochs)))
        start = trees.partition(params, where)[0]
        thaw = trees.map_with_path(lambda path, _: jnp.int32(when[path] * steps_per_epoch), start)
        return cls(inner=inner, start=start, thaw=thaw)

    def at(self, step: Array) -> Objective:
        return self.replace(inner=self.inner.at(step), step=step)

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        fixed = jax.lax.stop_gradient(variables.params)
        params = self._where_frozen(fixed, variables.params)
        return self.inner.loss(Variables(params, variables.state), batch, rng)

    def proximal(self, params: PyTree, learning_rate: Array) -> PyTree:
        """Undoes what weight decay did to frozen parameters."""
        return self._where_frozen(self.start, self.inner.proximal(params, learning_rate))

    def _where_frozen(self, fixed: PyTree, params: PyTree) -> PyTree:
        def choose(thaw: Array | None, f: Array, p: Array) -> Array:
            return p if thaw is None else jnp.where(self.step < thaw, f, p)

        return jax.tree.map(choose, self.thaw, fixed, params, is_leaf=lambda x: x is None)


def thaw_epochs(count: int, epochs: int) -> list[int]:
    """The epoch in which each of ``count`` tensors begins to be trained.

    A tenth of them at the start, and after each epoch ``count * 0.9 / ((E - 1) - 0.2 E)`` more.
    """
    first = int(0.1 * count)
    each = max(1, int(0.9 * count / max((epochs - 1) - 0.2 * epochs, 1.0)))
    return [0 if i < first else 1 + (i - first) // each for i in range(count)]


def definition_order(paths: Sequence[str]) -> list[str]:
    """Sorts parameters of a Transformer stack as T5 defines them: by layer, attention first."""
    ranks = (
        "attention/query", "attention/key", "attention/value", "attention/out", "relative_bias",
        "attention_norm", "mlp/(gate|up)", "mlp/down", "mlp_norm",
    )  # fmt: skip

    def position(path: str) -> tuple:
        layer = re.search(r"layers_(\d+)", path)
        rank = next((i for i, r in enumerate(ranks) if re.search(r, path)), len(ranks))
        # The table of relative positions belongs to the first layer, the last norm to none.
        depth = float(layer[1]) if layer else (0.0 if "relative_bias" in path else math.inf)
        return depth, rank, path

    return sorted(paths, key=position)


# -- the network ----------------------------------------------------------------------------------


def network(fields: Mapping[str, Any], vocab_size: int) -> T5:
    """Builds the T5 of ``config.model``, of which students replace some fields.

    Args:
      fields: of ``t5_config``; one ``dropout`` for all its rates, and ``dtype`` by name.
      vocab_size: number of token ids, at most; a multiple of 128 above it where the config has
        ``vocab_size``.

    Raises:
      ConfigError: the table of embeddings given is too small.
    """
    fields = dict(fields)
    given = fields.pop("vocab_size", 0) or vocab_size
    if given < vocab_size:
        raise ConfigError(f"config.model.vocab_size={given} is below the tokeniser's {vocab_size}.")
    rate = fields.pop("dropout")
    dtype = jnp.dtype(fields.pop("dtype"))
    rates = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), rate)
    return T5(t5_config(vocab_size=given, dtype=dtype, **rates, **fields))


# -- reports --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Reports, split once, and what turns them into examples.

    Attributes:
      splits: "train", "validation", "test".
      tokenizer: built from the training part, or that of a pretrained model.
      lexicon: terms of the tags that training reports have, or of the file given.
      config: of the experiment.
    """

    splits: Mapping[str, tuple[Report, ...]]
    tokenizer: Tokenizer
    lexicon: Lexicon
    config: Any

    @classmethod
    def of(cls, config: Any) -> "Corpus":
        """Reads what ``config.data`` names.

        Raises:
          ConfigError: an unknown name.
        """
        data = config.data
        readers = {
            "generated": lambda: generated_reports(data.count, data.seed),
            "open_i": open_i,
            "csv": lambda: read_reports(
                data.path, findings=data.findings, impression=data.impression,
                concepts=data.concepts,
            ),
        }  # fmt: skip
        if data.name not in readers:
            raise ConfigError(
                f"config.data.name={data.name!r}; choose one of {', '.join(sorted(readers))}."
            )
        if data.name == "csv" and not data.path:
            raise ConfigError(
                "config.data.path is empty: give a CSV file with a row per report. MIMIC-CXR's "
                "reports need credentials; write their sections into the columns "
                f"{data.findings!r} and {data.impression!r}."
            )
        splits = split_reports(readers[data.name](), data.seed)
        train = splits["train"]
        lexicon = Lexicon.from_tsv(data.lexicon) if data.lexicon else Lexicon.from_reports(train)
        if data.tokenizer:
            tokenizer: Tokenizer = PretrainedTokenizer.from_file(data.tokenizer)
        else:
            texts = [
                f"{r.findings} {r.impression} {' '.join(lexicon.tags(r.findings))}" for r in train
            ]
            tokenizer = WordTokenizer.build(texts, data.min_freq)
        return cls(splits, tokenizer, lexicon, config)

    def gaps(self, split: str) -> ArraySource:
        """Examples of gap sentence generation."""
        options = self.config.gsg
        pairs = gap_pairs(
            self.splits[split], text.importance, reference=options.reference, target=options.target
        )
        return encode_pairs(pairs, self.tokenizer, options.source_length, options.target_length)

    def summaries(self, split: str, size: int = 0, tags: bool = False) -> ArraySource:
        """Examples of summarisation, the first ``size`` of a split or all."""
        options = self.config.summary
        chosen = self.splits[split][: size or None]
        pairs = summary_pairs(chosen, self.lexicon if tags else None)
        return encode_pairs(pairs, self.tokenizer, options.source_length, options.target_length)


def reports(exp: Experiment) -> None:
    """Gap sentences, Fisher information, summaries by every method, students; then the tables."""
    cfg = exp.config
    if cfg.kd.scale != "none" and (
        cfg.kd.teacher not in cfg.methods or cfg.method[cfg.kd.teacher].tags
    ):
        raise ConfigError(
            f"config.kd.teacher={cfg.kd.teacher!r} must be one of config.methods={cfg.methods}, "
            "without tags: students read plain reports."
        )
    corpus = Corpus.of(cfg)
    module = network(cfg.model, len(corpus.tokenizer))
    task = Seq2Seq(module=module)
    first = _pretrained(cfg)
    gaps = {name: corpus.gaps(name) for name in ("train", "validation")}
    for name, split in corpus.splits.items():
        exp.record(f"{name} reports", len(split))
    exp.record("vocabulary", len(corpus.tokenizer))

    def held_out(source: ArraySource) -> Pipeline:
        return Pipeline(source, cfg.eval_batch_size)

    # 1. Gap sentences.
    gap_task = task.replace(count_padding=cfg.gsg.count_padding)
    source = exp.fit(
        "gap-sentences", gap_task if first is None else WarmStart(inner=gap_task, params=first),
        _training(exp, "gap-sentences", gaps["train"], cfg.gsg.batch_size), cfg.gsg.fit,
        evaluate={"validation": held_out(gaps["validation"])},
    ).params  # fmt: skip

    # 2. Fisher information, where stage 1 ended.
    compute = functools.partial(report_fisher, exp, gap_task, source, gaps["train"])
    fisher = exp.artifact("fisher", compute)
    leaves = jax.tree.leaves(fisher)
    mean = sum(float(x.sum()) for x in leaves) / sum(x.size for x in leaves)
    exp.record("mean of the Fisher diagonal", mean)

    # 3. Summaries.
    rows, texts, fitted = [], {}, {}
    for size in cfg.sizes:
        everything = size == cfg.sizes[-1]
        for name in cfg.methods if everything else cfg.few_methods:
            method = cfg.method[name]
            train = corpus.summaries("train", size, method.tags)
            per_epoch = max(1, len(train) // cfg.summary.batch_size)
            objective = transferred(
                task, method, source, fisher, mean, per_epoch, cfg.summary.fit.steps, first
            )
            stage = f"{name}-{len(train)}"
            data = _training(exp, f"summaries-{size}", train, cfg.summary.batch_size)
            result = fitted[name] = exp.fit(
                stage, objective, data, cfg.summary.fit,
                evaluate={"validation": held_out(corpus.summaries("validation", 0, method.tags))},
            )  # fmt: skip
            kept = exp.artifact(
                f"kept-{stage}",
                functools.partial(
                    exp.evaluate, task, result.variables, held_out(gaps["validation"])
                ),
            )
            rows.append([name, len(train), result.metrics["validation/nll"], kept["nll"],
                         result.metrics["validation/accuracy"]])  # fmt: skip
            if everything:
                texts[name] = exp.artifact(
                    f"texts-{stage}",
                    functools.partial(summarise, exp, corpus, module, result.params, method.tags),
                )
    columns = ["method", "pairs", "summary nll", "gap sentence nll", "summary accuracy"]
    exp.table("Validation, nats per token", columns, rows)

    # 4. Students of the teacher with all pairs.
    if cfg.kd.scale != "none":
        texts |= students(exp, corpus, task, fitted[cfg.kd.teacher].variables)

    _compare_texts(exp, corpus, texts)
    if len(cfg.required):
        _require(exp, _report_requirements(cfg, {(row[0], row[1]): row[2:4] for row in rows}))


def _training(exp: Experiment, name: str, source: ArraySource, batch_size: int) -> Pipeline:
    return Pipeline(source, batch_size, shuffle=True, seed=exp.seed(name), repeat=True)


def _pretrained(config: Any) -> PyTree | None:
    """The parameters that ``config.pretrained`` names, or None where they are to be drawn."""
    if not config.pretrained:
        return None
    if not config.data.tokenizer:
        raise ConfigError(
            "config.pretrained needs the model's own tokens: set config.data.tokenizer to its "
            "tokenizer.json."
        )
    from transfer_jax.interop import from_pretrained

    return from_pretrained(config.pretrained, architecture="T5ForConditionalGeneration").params


def plan(config: Any) -> tuple[Objective, dict[str, jax.ShapeDtypeStruct], FitConfig]:
    """What stage 3 of a full-scale config would run, without its data and parameters.

    Returns:
      The objective of ``config.method.ewc``, a batch of the configured shapes, and the settings of
      the stage, for ``training.aot.lower_step``.
    """
    options = config.summary
    task = Seq2Seq(module=network(config.model, config.model.vocab_size))
    size = options.batch_size
    shapes = {
        "inputs": (size, options.source_length), "lengths": (size,),
        "targets": (size, options.target_length), "target_lengths": (size,),
    }  # fmt: skip
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}
    params = jax.eval_shape(lambda k, b: task.init(k, b).params, jax.random.key(0), batch)
    objective = jax.eval_shape(
        lambda p: transferred(task, config.method.ewc, p, p, 1.0, 1, 1), params
    )
    return objective, batch, from_dict(FitConfig, options.fit, "summary.fit")


def report_fisher(exp: Experiment, task: Seq2Seq, params: PyTree, source: ArraySource) -> PyTree:
    """The diagonal at ``params`` on the first examples, as ``config.fisher`` says.

    It covers all parameters; tied embeddings are one leaf, so they count once.
    """
    options = exp.config.fisher
    unit = options.unit

    def nll(p: PyTree, batch: Batch) -> Array:
        return task.example_nll(Variables(p, {}), batch, unit=unit)

    def choices(p: PyTree, batch: Batch) -> Array:
        return task.choices(Variables(p, {}), batch, unit=unit)

    first = Pipeline(
        Subset(source, np.arange(min(options.examples, len(source)))), options.batch_size
    )
    return trees.fisher_diagonal(
        choices if options.kind in ("mc", "argmax") else nll, params, exp.batches(first),
        kind=options.kind, num_samples=options.num_samples, key=exp.key("fisher"),
        chunk_size=options.chunk_size or None,
    )  # fmt: skip


def transferred(
    task: Seq2Seq, method: Any, source: PyTree, fisher: PyTree, mean: float,
    steps_per_epoch: int, steps: int, first: PyTree | None = None,
) -> Objective:  # fmt: skip
    """The objective of stage 3 for one entry of ``config.method``.

    Args:
      task: summarisation.
      method: ``start`` ('none' or 'gsg'), ``regulariser`` ('none', 'l2_sp', 'l2_matched', with
        the strength multiplied by ``mean``, 'ewc' or 'unfreeze'), ``strength``, ``floor`` (the
        strength falls linearly to this share; 1 = constant), ``penalty_step``.
      source: the parameters after stage 1.
      fisher: the diagonal there.
      mean: of the diagonal.
      steps_per_epoch, steps: of the stage.
      first: pretrained parameters from which ``start='none'`` starts, or None to draw them.

    Raises:
      ConfigError: an unknown start or regulariser, or one that needs a start.
    """
    for name, allowed in (
        ("start", ("none", "gsg")),
        ("regulariser", ("none", "l2_sp", "l2_matched", "ewc", "unfreeze")),
    ):
        if method[name] not in allowed:
            raise ConfigError(f"config.method.….{name}={method[name]!r}; choose one of {allowed}.")
    if method.start == "none":
        if method.regulariser != "none":
            raise ConfigError(
                f"regulariser={method.regulariser!r} holds parameters near those of stage 1; it "
                "needs start='gsg'."
            )
        return task if first is None else WarmStart(inner=task, params=first)
    start = WarmStart(inner=task, params=source)
    epochs = max(1, -(-steps // steps_per_epoch))
    if method.regulariser == "none":
        return start
    if method.regulariser == "unfreeze":
        return Unfreezing.of(start, source, steps_per_epoch, epochs)
    strength = method.strength * (mean if method.regulariser == "l2_matched" else 1.0)
    schedule = None
    if method.floor < 1.0:
        schedule = LinearFloor(strength, method.floor * strength, steps_per_epoch, epochs)
    return Penalized(
        inner=start, anchor=source, fisher=fisher if method.regulariser == "ewc" else None,
        strength=strength, schedule=schedule, penalty_step=method.penalty_step,
    )  # fmt: skip


def students(
    exp: Experiment, corpus: Corpus, task: Seq2Seq, teacher: Variables
) -> dict[str, list[str]]:
    """Distils the teacher into each network of ``config.kd.students``; returns their summaries."""
    cfg = exp.config
    if cfg.kd.scale not in ("paper", "released"):
        raise ConfigError(f"config.kd.scale={cfg.kd.scale!r}; choose none, paper or released.")
    released = cfg.kd.scale == "released"
    train = corpus.summaries("train")
    held_out = {"validation": Pipeline(corpus.summaries("validation"), cfg.eval_batch_size)}
    rows, texts = [], {}
    for name in sorted(cfg.kd.students):
        fields = {**cfg.model.to_dict(), **cfg.kd.students[name].to_dict()}
        module = network(fields, len(corpus.tokenizer))
        student = Seq2Seq(module=module, count_padding=released)
        ways = {
            f"{name}, alone": student,
            f"{name}, distilled": TokenDistilled(
                inner=student, teacher=task, teacher_variables=teacher, weight=cfg.kd.weight,
                temperature=cfg.kd.temperature, released=released,
            ),
        }  # fmt: skip
        for way, objective in ways.items():
            stage = way.replace(", ", "-")
            result = exp.fit(
                stage, objective, _training(exp, name, train, cfg.kd.batch_size), cfg.kd.fit,
                evaluate=held_out,
            )  # fmt: skip
            rows.append([way, result.summary["parameters"], result.metrics["validation/nll"]])
            texts[way] = exp.artifact(
                f"texts-{stage}",
                functools.partial(summarise, exp, corpus, module, result.params, False),
            )
    exp.table("Students, validation", ["student", "parameters", "summary nll"], rows)
    return texts


def summarise(exp: Experiment, corpus: Corpus, module: T5, params: PyTree, tags: bool) -> list[str]:
    """Summaries of the test reports, as text."""
    options = exp.config.decode
    summaries = []
    pipeline = Pipeline(corpus.summaries("test", tags=tags), exp.config.eval_batch_size)
    for batch in exp.batches(pipeline):
        tokens = write(module, params, batch["inputs"], batch["lengths"], options)
        tokens, mask = multihost_utils.process_allgather((tokens, batch["mask"]), tiled=True)
        summaries += [corpus.tokenizer.decode(row) for row in tokens[mask > 0].tolist()]
    return summaries


def write(module: T5, params: PyTree, inputs: Array, lengths: Array, options: Any) -> Array:
    """Target tokens int32 [B, ``options.max_new_tokens``], padded after the end token.

    Args:
      module: the network.
      params: its parameters.
      inputs: int [B, S].
      lengths: int [B].
      options: ``config.decode``.
    """
    decoding = Decoding(
        max_tokens=options.max_new_tokens, eos_id=1, num_beams=options.num_beams,
        length_penalty=options.length_penalty, no_repeat_ngram=options.no_repeat_ngram,
    )  # fmt: skip
    return generate_targets(module, {"params": params}, inputs, decoding, lengths=lengths).tokens


def _compare_texts(exp: Experiment, corpus: Corpus, texts: Mapping[str, list[str]]) -> None:
    """Scores summaries of the test reports beside summaries that need no training."""
    train, test = corpus.splits["train"], corpus.splits["test"]
    findings = [r.findings for r in test]
    known = [r.impression for r in train]
    floors = {
        "constant": [text.most_common(known)] * len(test),
        "lead-1": text.lead(findings),
        "LexRank-1": text.lex_rank(findings),
        "nearest neighbour": text.nearest_neighbour(findings, [r.findings for r in train], known),
    }
    references = [_normalised(r.impression) for r in test]
    terms = corpus.lexicon.terms or text.chexpert_lexicon()
    overlap, counts = [], []
    for name, answers in {**floors, **texts}.items():
        answers = [_normalised(answer) for answer in answers]
        rouge, bleu = text.rouge(answers, references), text.bleu(answers, references)
        facts = text.entity_f1(answers, references, terms)
        facts |= text.label_agreement(answers, references)
        overlap.append([name, *(rouge[k] for k in text.ROUGE), facts["entity_f1"],
                        facts["label_f1"], facts["label_accuracy"]])  # fmt: skip
        counts.append([name, *(bleu[f"bleu_precision_{n}"] for n in (1, 2, 3, 4)),
                       *(bleu[f"bleu_{n}"] for n in (1, 4)), bleu["brevity_penalty"],
                       bleu["mean_length"]])  # fmt: skip
    rounded = lambda rows: [[r[0], *(round(x, 4) for x in r[1:])] for r in rows]  # noqa: E731
    exp.table(
        f"Summaries of {len(test)} test reports",
        ["summary", "ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum", "entity F1", "label F1",
         "label agreement"],
        rounded(overlap),
    )  # fmt: skip
    exp.table(
        "Precisions of n-grams, and BLEU",
        ["summary", "precision 1", "precision 2", "precision 3", "precision 4", "BLEU-1", "BLEU-4",
         "brevity penalty", "mean length"],
        rounded(counts),
    )  # fmt: skip
    for name, answers in texts.items():
        exp.record(f"{name}: first test summary", answers[0])
    exp.record("reference of the first test report", test[0].impression)


def _normalised(answer: str) -> str:
    """Lower case and no marks but full stops, so that words alone are compared."""
    return " ".join(re.findall(r"[a-z0-9]+|\.", answer.lower())).replace(" .", ".")


def _report_requirements(
    cfg: Any, nll: Mapping[tuple[str, int], Sequence[float]]
) -> dict[str, tuple[float, str, float]]:
    """What the paper's idea implies, of the methods that were run; see ``config.required``."""
    found: dict[str, tuple[float, str, float]] = {}
    pairs = sorted({size for _, size in nll})
    for size in pairs:

        def of(name: str) -> np.ndarray | None:
            return np.array(nll[name, size]) if (name, size) in nll else None  # noqa: B023

        tuned, scratch, ewc, l2 = (of(n) for n in ("fine-tuning", "scratch", "ewc", "l2"))
        strong = of("ewc-strong")
        if size == pairs[-1]:
            if tuned is not None and scratch is not None:
                found["gap sentences: gain over scratch"] = (
                    scratch[0] - tuned[0], ">=", cfg.required.transfer,
                )  # fmt: skip
            if tuned is not None and ewc is not None:
                found["EWC: gap sentence loss below fine-tuning's"] = (
                    tuned[1] - ewc[1], ">=", cfg.required.kept,
                )  # fmt: skip
                found["EWC: summary loss above fine-tuning's"] = (
                    ewc[0] - tuned[0], "<=", cfg.required.cost,
                )  # fmt: skip
            if ewc is not None and l2 is not None:
                found["EWC: summary loss below matched L2's"] = (l2[0] - ewc[0], ">=", 0.0)
                found["EWC: gap sentence loss below matched L2's"] = (l2[1] - ewc[1], ">=", 0.0)
        elif tuned is not None and strong is not None:
            found[f"strong EWC with {size} pairs: summary loss below fine-tuning's"] = (
                tuned[0] - strong[0], ">=", cfg.required.few,
            )  # fmt: skip
    return found


# -- the Fisher information in elastic weight consolidation (demonstration A) ---------------------


class Perceptron(nn.Module):
    """Inputs [B, D] to ten logits, through hidden layers with ReLU."""

    hidden: tuple[int, ...] = (128, 128)

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        for width in self.hidden:
            inputs = nn.relu(nn.Dense(width)(inputs))
        return nn.Dense(10)(inputs)


def pixels(name: str) -> dict[str, dict[str, np.ndarray]]:
    """Handwritten digits as rows of 64 pixels in [0, 1], "train" and "test".

    Args:
      name: ``digits``, scikit-learn's 1,797 images, of which a fifth is the test part; or
        ``optdigits``, of which they are the test part, with the 3,823 training images of other
        writers, read from files under ``TRANSFER_JAX_DATA``.

    Raises:
      ConfigError: another name.
    """
    options = {"digits": {"fractions": (0.8, 0.0, 0.2)}, "optdigits": {}}
    if name not in options:
        raise ConfigError(f"config.data.name={name!r}; choose 'digits' or 'optdigits'.")
    splits = load(name, **options[name]).splits
    parts = {k: take(splits[k], np.arange(len(splits[k]))) for k in ("train", "test")}
    return {k: {**v, "inputs": v["inputs"].reshape(-1, 64)} for k, v in parts.items()}


def permuted(data: Mapping[str, np.ndarray], count: int, seed: int = 0) -> list[ArraySource]:
    """Tasks that differ by a fixed permutation of the inputs' columns; the first by none."""
    rng = np.random.default_rng(seed)
    width = data["inputs"].shape[1]
    orders = [np.arange(width), *(rng.permutation(width) for _ in range(count - 1))]
    return [ArraySource({**data, "inputs": data["inputs"][:, order]}) for order in orders]


def consolidating(
    inner: Objective, state: Consolidated | None, strength: float, penalty_step: str = "gradient"
) -> Objective:
    """The objective with a penalty for each pair of anchor and Fisher diagonal."""
    for anchor, fisher in () if state is None else zip(state.anchors, state.fishers):
        inner = Penalized(
            inner=inner, anchor=anchor, fisher=fisher, strength=strength, penalty_step=penalty_step
        )
    return inner


def fisher_on_digits(exp: Experiment) -> None:
    """Learns permuted digits one after the other with each regulariser of ``config.arms``."""
    cfg = exp.config
    data = pixels(cfg.data.name)
    train = permuted(data["train"], cfg.tasks, cfg.data.seed)
    test = [Pipeline(source, 512) for source in permuted(data["test"], cfg.tasks, cfg.data.seed)]
    task = Classification(module=Perceptron(cfg.model.hidden))

    def logits(params: PyTree, batch: Any) -> Array:
        return task.predict(Variables(params, {}), batch)

    def nll(params: PyTree, batch: Any) -> Array:
        return losses.cross_entropy(logits(params, batch), batch["labels"])

    def fisher(kind: Any, params: PyTree, t: int) -> PyTree:
        """The diagonal of task t on its first training rows."""
        rows = train[t].take(np.arange(min(cfg.fisher.examples, len(train[t]))))
        size = cfg.fisher.batch
        batches = [{k: v[i : i + size] for k, v in rows.items()}
                   for i in range(0, len(rows["labels"]), size)]  # fmt: skip
        function = logits if kind in ("exact", "mc", "argmax") else nll
        return trees.fisher_diagonal(
            function, params, batches, kind=kind, key=exp.key(f"fisher-{t}")
        )

    def batches(t: int) -> Pipeline:
        seed = exp.seed(f"task-{t}")
        return Pipeline(train[t], cfg.batch_size, shuffle=True, seed=seed, repeat=True)

    def accuracies(params: PyTree) -> list[float]:
        return [exp.evaluate(task, Variables(params, {}), data)["accuracy"] for data in test]

    first = exp.fit("task-0", task, batches(0), cfg.train).params
    first_row = accuracies(first)
    traces = exp.artifact(
        "traces",
        lambda: {
            kind: float(sum(x.sum() for x in jax.tree.leaves(fisher(kind, first, 0))))
            for kind in ("exact", "empirical", "batched")
        },
    )

    def run(kind: str, strength: float, step: str) -> list[list[float]] | None:
        """Accuracies [after task, on task], or None if training diverged."""
        name = f"{kind}-{strength:g}-{step}".replace("+", "")
        params, matrix, state = first, [first_row], None
        for t in range(1, cfg.tasks):
            if kind == "l2":
                state = Consolidated((params,), (jax.tree.map(jnp.ones_like, params),))
            elif kind != "none":
                compute = functools.partial(fisher, kind, params, t - 1)
                latest = exp.artifact(f"fisher-{name}-{t - 1}", compute)
                state = trees.consolidate(
                    state, params, latest, mode=cfg.fisher.mode, decay=cfg.fisher.decay
                )
            start = WarmStart(inner=task, params=params)
            objective = consolidating(start, state, strength, step)
            try:
                params = exp.fit(f"{name}-{t}", objective, batches(t), cfg.train).params
            except NonFiniteError:
                return None
            matrix.append(accuracies(params))
        return matrix

    rows, accuracy = [], {}
    for kind, strength, step in cfg.arms:
        matrix = run(kind, strength, step)
        last, forgot = (
            (float("nan"), float("nan")) if matrix is None
            else (continual.last(matrix), continual.forgetting(matrix, since_learned=True))
        )  # fmt: skip
        accuracy[kind, strength, step] = last
        rows.append([kind, strength, step, *(
            ("diverged", "diverged") if matrix is None else (round(last, 4), round(forgot, 4))
        )])  # fmt: skip
    columns = ["Fisher information", "lambda", "penalty step", "accuracy", "forgetting"]
    exp.table(f"{cfg.tasks} tasks of permuted digits, at the end", columns, rows)
    exp.table("Trace of the diagonal after the first task", ["kind", "trace"], list(traces.items()))
    _require(exp, _fisher_requirements(cfg, accuracy, traces))


def _fisher_requirements(
    cfg: Any, accuracy: Mapping[tuple[str, float, str], float], traces: Mapping[str, float]
) -> dict[str, tuple[float, str, float]]:
    """What should hold of those arms that were run."""
    found: dict[str, tuple[float, str, float]] = {}
    ten = [accuracy[k, 10.0, "gradient"] for k in ("exact", "empirical")
           if (k, 10.0, "gradient") in accuracy]  # fmt: skip
    if ten:
        best = max(ten)
        found["EWC, lambda 10"] = (best, ">=", cfg.required.accuracy)
        if ("none", 0.0, "gradient") in accuracy:
            gain = best - accuracy["none", 0.0, "gradient"]
            found["EWC minus fine-tuning"] = (gain, ">=", cfg.required.over_fine_tuning)
        l2 = [value for (kind, _, _), value in accuracy.items() if kind == "l2"]
        if l2:
            found["EWC minus the best L2"] = (best - max(l2), ">=", cfg.required.over_l2)
    ratio = traces["empirical"] / traces["batched"]
    found["trace of empirical / trace of batched"] = (ratio, ">=", cfg.required.trace_ratio[0])
    found["the same ratio, from above"] = (ratio, "<=", cfg.required.trace_ratio[1])
    proximal = [value for (_, _, step), value in accuracy.items() if step == "proximal"]
    if proximal:
        finite = float(np.isfinite(proximal).mean())
        found["share of proximal runs that stay finite"] = (finite, ">=", 1.0)
    return found
