"""Towards a Unified View of Parameter-Efficient Transfer Learning (He et al., ICLR 2022).

The methods are in ``transfer_jax.nn.petl``. ``recipe`` compares them on a generated task: an
encoder learns to fill the gaps of sentences from a Markov chain, then to translate them word for
word into another vocabulary, with some pairs of words exchanged. Embeddings and output stay frozen,
so that all of the new vocabulary must go through what a method adds. ``plan`` has the published
settings.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transfer_jax.configuration import ConfigError
from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.sources import ArraySource
from transfer_jax.models import Bart, BartConfig, Bert, BertConfig, bart_stack, bert_stack
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
from transfer_jax.training import Experiment, FitConfig
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
    cfg = exp.config
    if cfg.task != "markov":
        raise ConfigError(
            f"config.task={cfg.task!r} is a published setting, its shapes and schedules, for "
            "`plan`; it has no data to run on. Run the variant 'markov'."
        )
    language = Language(
        cfg.data.vocabulary, cfg.data.length, cfg.data.concentration, exp.seed("language")
    )
    module = _encoder(cfg.model, cfg.data.vocabulary + 1, cfg.data.length)
    task = TokenLabels(module=module)

    def train(name: str, arrays: dict[str, np.ndarray]) -> Pipeline:
        source = ArraySource(arrays)
        return Pipeline(source, cfg.batch_size, shuffle=True, seed=exp.seed(name), repeat=True)

    def held_out(arrays: dict[str, np.ndarray]) -> Pipeline:
        return Pipeline(ArraySource(arrays), cfg.eval_batch_size)

    def gaps(name: str, count: int) -> dict[str, np.ndarray]:
        tokens = language.sentences(count, exp.seed(f"{name} sentences"))
        return language.gaps(tokens, cfg.data.hidden, exp.seed(f"{name} gaps"))

    def translations(name: str, count: int) -> dict[str, np.ndarray]:
        tokens = language.sentences(count, exp.seed(f"{name} originals"))
        return {"inputs": tokens, "labels": language.translate(tokens)}

    source = exp.fit(
        "pretrain", task, train("pretrain", gaps("train", cfg.data.source)), cfg.pretrain,
        evaluate={"validation": held_out(gaps("validation", cfg.data.held_out))},
    )  # fmt: skip
    exp.record("gaps filled", source.metrics["validation/accuracy"])

    data = translations("train", cfg.data.target)
    validation, test = (
        held_out(translations(name, cfg.data.held_out)) for name in ("validation", "test")
    )
    start = WarmStart(inner=task, params=source.params)
    body = sum(x.size for x in jax.tree.leaves(source.params["stack"]))
    settings = from_dict(FitConfig, cfg.transfer)
    rows, scales = [], []
    for name, entry in cfg.methods.items():
        objective = Adapted.of(start, source.params, build(entry))
        found = []
        for rate in entry.learning_rates:
            optimizer = dataclasses.replace(settings.optimizer, learning_rate=rate)
            fitted = exp.fit(
                f"{name}-{rate:g}", objective, train("translate", data),
                dataclasses.replace(settings, optimizer=optimizer),
                evaluate={"validation": validation},
            )  # fmt: skip
            found.append((fitted.metrics["validation/accuracy"], rate, fitted))
        _, rate, best = max(found, key=lambda each: each[0])
        accuracy = exp.evaluate(objective, best.variables, test)["accuracy"]
        count = sum(x.size for x in jax.tree.leaves(best.params))
        rows.append([name, round(accuracy, 4), count, round(count / body, 4), rate])
        scales.append([name, *(round(value, 4) for value, _, _ in found)])
    exp.table(
        "Token accuracy of the translation (test)",
        ["method", "accuracy", "trained parameters", "share of the layers", "learning rate"], rows,
    )  # fmt: skip
    exp.table(
        "Validation accuracy by learning rate", ["method", "first rate", "second rate"], scales
    )
    exp.bars("Token accuracy", [row[0] for row in rows], {"": [row[1] for row in rows]})


def build(entry: Any) -> petl.Method:
    """The method that an entry of ``config.methods`` names.

    Args:
      entry: ``method``, one of ``petl.METHODS``, and its ``options``.
    """
    return petl.named(entry.method, **entry.options.to_dict())


def _encoder(model: Any, vocabulary: int, length: int) -> Bert:
    stack = bert_stack(**model.to_dict())
    return Bert(
        BertConfig(
            vocab_size=vocabulary, stack=stack, max_positions=length, token_types=1,
            head="masked_lm",
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
