"""Recurrent networks (Lipton, Berkowitz and Elkan 2015, "A Critical Review of Recurrent Neural
Networks for Sequence Learning"): the tasks, models and claims of the survey.

The recipe's ``config.task`` is one of

* ``compare``: several networks on one of the classic generated tasks;
* ``gradient_flow``: how fast gradients vanish or explode through time, without training;
* ``language_model``: characters or words by truncated back-propagation, beside n-grams;
* ``spoken_digits``: recorded digits, in one direction and in both;
* ``translate``: an encoder-decoder, its source reversed or not, judged by BLEU;
* ``label``: labels without an alignment (CTC), such as handwriting;
* ``caption``: sentences about vectors, such as the features of images.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transfer_jax.configuration import ConfigError
from transfer_jax.data import sequence_tasks
from transfer_jax.data.padding import bucketed, pad_batch
from transfer_jax.data.paths import require, require_file
from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.registry import load
from transfer_jax.data.sources import ArraySource, IndexSource, take
from transfer_jax.data.splits import Subset
from transfer_jax.data.text import (
    EOS,
    PAD,
    UNKNOWN,
    Vocabulary,
    evaluation_windows,
    stream_windows,
)
from transfer_jax.data.texts import multi30k, read_parallel
from transfer_jax.metrics.text import bleu, label_error_rate
from transfer_jax.models.generation import Decoding, generate_targets
from transfer_jax.models.recurrent import RecurrentLanguageModel, RecurrentNetwork
from transfer_jax.models.recurrent_seq2seq import Captioner, RecurrentSeq2Seq
from transfer_jax.nn.memory import NTM
from transfer_jax.nn.recurrent import LSTM, Elman, Recurrent, gradient_flow, identity_gates
from transfer_jax.objectives import (
    Classification,
    Generated,
    NextToken,
    Objective,
    Regression,
    Seq2Seq,
    Transformed,
    UniformInit,
    WarmStart,
)
from transfer_jax.objectives.carried import TruncatedBPTT
from transfer_jax.objectives.ctc import CTC, best_path, prefix_beam
from transfer_jax.objectives.labelling import BitLabelling, SequenceLabelling
from transfer_jax.training import Experiment, FitConfig, NonFiniteError
from transfer_jax.training.config import from_dict
from transfer_jax.training.loop import Fitted
from transfer_jax.training.writers import read_metrics

Array = jax.Array
Batch = Any


def recipe(exp: Experiment) -> None:
    tasks = {
        "compare": compare, "gradient_flow": vanishing, "language_model": language_model,
        "spoken_digits": spoken_digits, "translate": translate, "label": label,
        "caption": caption,
    }  # fmt: skip
    if exp.config.task not in tasks:
        raise ConfigError(
            f"config.task={exp.config.task!r}; choose one of {', '.join(sorted(tasks))}."
        )
    tasks[exp.config.task](exp)


# -- networks -------------------------------------------------------------------------------------


@functools.lru_cache
def _orthogonal(scale: float) -> Any:
    """One function for each scale, so that equal networks are equal."""
    return jax.nn.initializers.orthogonal(scale)


def body(section: Any, streams: int | None = None) -> Any:
    """The part of a network that runs over time: ``Recurrent`` layers, or one ``NTM``.

    Args:
      section: of the config: ``cell``, ``features``, ``layers``, ``bidirectional``, ``dropout``,
        ``dtype``, ``options`` of the cell, and ``radius``, what the recurrent kernel's orthogonal
        initial value is multiplied by (0 = the cell's own initial value).
      streams: rows whose state is carried from batch to batch; None = it is not.
    """
    options = dict(section.options)
    if section.radius:
        options["hidden_init"] = _orthogonal(float(section.radius))
    if section.cell == "ntm":
        return NTM(section.features, dtype=section.dtype, **options)
    return Recurrent(
        section.features, section.layers, section.cell, options, section.bidirectional,
        dropout=section.dropout, dtype=section.dtype, streams=streams,
    )  # fmt: skip


def _uniform(config: Any, task: Objective) -> Objective:
    return UniformInit(inner=task, scale=config.uniform_init) if config.uniform_init else task


# -- generated tasks (demonstrations A and C) -----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """How a generated task is learned.

    Attributes:
      generate: makes the task of its options.
      objective: of a network, made with ``module=``.
      outputs: their number, of a task.
      head: of the network.
      metric: what is reported.
      baseline: what a network without any knowledge of a task gets, and why.
    """

    generate: Callable[..., Any]
    objective: Callable[..., Objective]
    outputs: Callable[[Any], int]
    head: str
    metric: str
    baseline: Callable[[Any], tuple[float, str]]


PROBLEMS = {
    "adding": Problem(
        sequence_tasks.Adding, Regression, lambda task: 1, "last", "mse",
        lambda task: (1 / 6, "constant 1"),
    ),
    "copy": Problem(
        sequence_tasks.Copy, BitLabelling, lambda task: task.width, "steps", "wrong_bits",
        lambda task: (task.width * (task.shortest + task.longest) / 4, "chance"),
    ),
    "temporal_order": Problem(
        sequence_tasks.TemporalOrder, Classification, lambda task: 4, "last", "accuracy",
        lambda task: (0.25, "chance"),
    ),
    "reber": Problem(
        sequence_tasks.Reber, BitLabelling, lambda task: task.vocab_size, "steps", "accuracy",
        lambda task: (0.5, "chance"),
    ),
    "parity": Problem(
        sequence_tasks.Parity, Classification, lambda task: 2, "last", "accuracy",
        lambda task: (0.5, "chance"),
    ),
    "delayed_xor": Problem(
        sequence_tasks.DelayedXor, SequenceLabelling, lambda task: 2, "steps", "accuracy",
        lambda task: (0.5, "chance"),
    ),
}  # fmt: skip

# Examples beyond any that training reaches.
_HELD_OUT = 2**30


def compare(exp: Experiment) -> None:
    """Trains each of ``config.networks`` on ``config.problem``, and tests it on new examples."""
    cfg = exp.config
    if cfg.problem.name not in PROBLEMS:
        raise ConfigError(
            f"config.problem.name={cfg.problem.name!r}; choose one of {', '.join(PROBLEMS)}."
        )
    problem = PROBLEMS[cfg.problem.name]
    example = problem.generate(**cfg.problem.options)
    held_out = Subset(IndexSource(), np.arange(_HELD_OUT, _HELD_OUT + cfg.problem.test_examples))
    test = {"test": Pipeline(held_out, cfg.problem.test_batch)}
    train = Pipeline(IndexSource(), cfg.batch_size, repeat=True)
    metric = problem.metric
    rows, curves, steps = [], {}, [0]
    for name, section in sorted(cfg.networks.items()):
        network = RecurrentNetwork(
            body=body(section), outputs=problem.outputs(example), head=problem.head,
            vocab_size=getattr(example, "vocab_size", None),
        )  # fmt: skip
        seed = jnp.uint32(exp.seed("examples"))
        task = Generated(problem.objective(module=network), seed, generate=example)
        fitted = exp.fit(name, task, train, _fit(section.get("train", cfg.train)), evaluate=test)
        history = _history(exp, name, f"test/{metric}")
        if len(history[0]) > len(steps):
            steps = history[0]
        curves[name] = history[1]
        score = fitted.metrics[f"test/{metric}"]
        rows.append([name, score, fitted.summary["parameters"], fitted.summary["seconds"]])
        exp.record(f"{name}: test {metric}", score)
    value, why = problem.baseline(example)
    rows.append([why, value, 0, 0.0])
    curves[why] = [value] * len(steps)
    exp.table(f"{cfg.problem.name}", ["network", f"test {metric}", "parameters", "seconds"], rows)
    exp.curve(
        f"Test {metric} during training", steps,
        {name: [*c, *[c[-1]] * (len(steps) - len(c))] for name, c in curves.items()},
        xlabel="step", ylabel=metric,
    )  # fmt: skip


def _fit(section: Any) -> FitConfig:
    return from_dict(FitConfig, section, "train")


def _history(exp: Experiment, stage: str, metric: str) -> tuple[list[int], list[float]]:
    """The steps at which a stage was evaluated, and what came out."""
    lines = read_metrics(exp.workdir / "stages" / stage / "metrics.jsonl")
    found = [(line["step"], line[metric]) for line in lines if metric in line]
    return [step for step, _ in found], [value for _, value in found]


# -- gradient flow (demonstration B) --------------------------------------------------------------


def vanishing(exp: Experiment) -> None:
    """Spectral norms of the Jacobian of the state at time t by the first state, untrained.

    Elman networks whose recurrent matrix is a multiple of an orthogonal one, and the path through
    an LSTM's cell for several initial biases of the forget gate. Inputs are noise.
    """
    cfg = exp.config.flow
    size, steps = cfg.features, cfg.length
    noise = cfg.noise * jax.random.normal(exp.key("inputs"), (steps, size))
    layers: dict[str, tuple[Any, int | None]] = {}
    for radius in cfg.radii:
        init = {"kernel_init": identity_gates, "hidden_init": _orthogonal(float(radius))}
        layers[f"linear, {radius:g}"] = Elman(size, activation="identity", **init), None
        layers[f"tanh, {radius:g}"] = Elman(size, **init), None
    for bias in cfg.forget_biases:
        layers[f"LSTM cell, forget bias {bias:g}"] = LSTM(size, forget_bias=float(bias)), 0

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def norms(layer: Any, variables: Any, inputs: Array, part: int | None) -> Array:
        return gradient_flow(layer, variables, inputs, part)

    def compute() -> dict[str, list[float]]:
        found = {}
        for name, (layer, part) in layers.items():
            variables = layer.init(exp.key(name), noise[None])
            found[name] = np.asarray(norms(layer, variables, noise, part), float).tolist()
        return found

    found = exp.artifact("norms", compute)
    shown = [t for t in (1, 10, 50, 100, 200) if t <= steps]
    exp.table(
        "How much of the first state's gradient is left",
        ["network", *(f"after {t} steps" for t in shown)],
        [[name, *(values[t - 1] for t in shown)] for name, values in found.items()],
    )
    exp.curve(
        "Norm of ds(t)/ds(0), logarithm to base 10", list(range(1, steps + 1)),
        {
            name: np.log10(np.maximum(values, 1e-30)).tolist()
            for name, values in found.items() if not name.startswith("linear")
        },
        xlabel="t", ylabel="log10",
    )  # fmt: skip
    for radius in cfg.radii:  # the closed form: radius ** t
        exact = float(radius) ** np.arange(1, steps + 1)
        error = np.abs(np.array(found[f"linear, {radius:g}"]) / exact - 1).max()
        exp.record(f"linear, {radius:g}: largest relative error against radius^t", error)
        bounded = (np.array(found[f"tanh, {radius:g}"]) <= exact * (1 + 1e-3)).all()
        exp.record(f"tanh, {radius:g}: within the bound radius^t", str(bool(bounded)))


# -- language modelling (demonstration D) ---------------------------------------------------------


def language_model(exp: Experiment) -> None:
    """Trains each of ``config.networks`` on a text, and compares them with n-grams.

    Networks are tested twice: on windows of ``config.long_window`` tokens, where a state has time
    to form, and on windows as long as in training. Windows start from the state zero.
    """
    cfg = exp.config
    texts, vocabulary = read_text(cfg.data)
    windows = {"long": cfg.long_window, "short": cfg.window}
    tests = {
        name: Pipeline(evaluation_windows(texts["test"], length), 64)
        for name, length in windows.items()
    }
    validation = {
        "validation": Pipeline(evaluation_windows(texts["validation"], cfg.long_window), 64)
    }
    stream = stream_windows(texts["train"], cfg.window, cfg.batch_size)
    rows, curves, bars = [], {}, {}
    steps: list[int] = []
    for name, section in sorted(cfg.networks.items()):
        task = _next_token(cfg, section, len(vocabulary))
        settings = _fit(section.get("train", cfg.train))
        try:
            fitted = _train(
                exp, name, task, lambda _: Pipeline(stream, cfg.batch_size, repeat=True),
                settings, validation,
            )  # fmt: skip
        except NonFiniteError as error:
            rows.append([name, "diverged", "diverged", 0])
            exp.record(f"{name}: diverged", str(error))
            continue
        bits = exp.artifact(f"test-{name}", functools.partial(_bits, exp, task, fitted, tests))
        rows.append([name, bits["long"], bits["short"], fitted.summary["parameters"]])
        exp.record(f"{name}: test bits per token", bits["long"])
        if "train" in section:  # another experiment, on another scale
            continue
        bars[name] = bits["long"]
        now, curve = _history(exp, name, "validation/bits")
        if not steps or now == steps:
            steps, curves[name] = now, curve

    def baselines() -> dict[str, float]:
        found = {}
        for order in cfg.ngrams:
            model = KneserNey(texts["train"], order, len(vocabulary))
            found[str(order)] = float(-model.log_prob(texts["test"]).mean() / np.log(2))
        return found

    for order, value in exp.artifact("ngrams", baselines).items():
        rows.append([f"{order}-gram, Kneser-Ney", value, value, 0])
        bars[f"{order}-gram"] = value
        exp.record(f"{order}-gram: test bits per token", value)
    columns = ["model", f"windows of {cfg.long_window}", f"windows of {cfg.window}", "parameters"]
    exp.table("Test bits per token", columns, rows)
    exp.bars("Test bits per token", list(bars), {"": list(bars.values())})
    if curves:
        exp.curve("Validation bits per token", steps, curves, xlabel="step", ylabel="bits")


def _bits(
    exp: Experiment, task: Objective, fitted: Fitted, tests: Mapping[str, Pipeline]
) -> dict[str, float]:
    return {k: exp.evaluate(task, fitted.variables, test)["bits"] for k, test in tests.items()}


def _next_token(config: Any, section: Any, vocab_size: int) -> Objective:
    network = RecurrentLanguageModel(
        body=body(section, streams=config.batch_size if section.carried else None),
        outputs=vocab_size, vocab_size=vocab_size, embedding=section.embedding,
        dropout=section.dropout, dtype=section.dtype,
    )  # fmt: skip
    task: Objective = NextToken(module=network)
    if section.carried:
        task = TruncatedBPTT(inner=task)
    return _uniform(config, task)


def read_text(data: Any) -> tuple[dict[str, np.ndarray], Vocabulary]:
    """Tokens of "train", "validation" and "test", and their vocabulary.

    Args:
      data: ``unit`` ('character' or 'word') and ``directory``: '' for tinyshakespeare, in
        characters, cut 90/5/5 in the order of the file; else it holds ``train.txt``, ``valid.txt``
        and ``test.txt``, whose lines end in ``<eos>`` where units are words.

    Raises:
      ConfigError: an unknown unit.
      FileNotFoundError: a file is missing.
    """
    if data.unit not in ("character", "word"):
        raise ConfigError(f"data.unit={data.unit!r}; choose 'character' or 'word'.")
    if data.directory:
        how = "Give the directory of train.txt, valid.txt and test.txt as config.data.directory."
        files = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}
        parts = {
            name: require_file(Path(data.directory) / file, how).read_text(encoding="utf-8")
            for name, file in files.items()
        }
    else:
        text = require("tinyshakespeare", "input.txt").read_text(encoding="utf-8")
        first, second = round(0.9 * len(text)), round(0.95 * len(text))
        parts = {"train": text[:first], "validation": text[first:second], "test": text[second:]}
    units: Callable[[str], Iterable[str]] = list
    if data.unit == "word":

        def units(text: str) -> Iterable[str]:
            return [word for line in text.splitlines() for word in (*line.split(), EOS)]

    vocabulary = Vocabulary.build(units(parts["train"]), specials=(UNKNOWN,))
    return {name: vocabulary.encode(units(text)) for name, text in parts.items()}, vocabulary


class KneserNey:
    """An interpolated n-gram model (Kneser and Ney 1995; Chen and Goodman 1999, section 4.1.6).

    Below the highest order, an n-gram counts as often as there are different tokens before it. One
    discount for each order, ``n1 / (n1 + 2 n2)`` of the n-grams that occur once and twice.

    Args:
      tokens: training text, int [N].
      order: n, so that ``vocab_size ** n`` fits into 63 bits.
      vocab_size: V.

    Raises:
      ValueError: too high an order.
    """

    def __init__(self, tokens: np.ndarray, order: int, vocab_size: int):
        if order < 1 or vocab_size**order >= 2**63:
            raise ValueError(f"order={order} does not suit a vocabulary of {vocab_size}.")
        self.order, self.vocab_size = order, vocab_size
        self.levels: list[tuple[Any, ...]] = []
        grams, counts = np.unique(_codes(tokens, order, vocab_size), return_counts=True)
        for size in range(order, 0, -1):
            ones, twos = (counts == 1).sum(), (counts == 2).sum()
            discount = ones / (ones + 2 * twos) if ones else 0.5
            contexts, where = np.unique(grams // vocab_size, return_inverse=True)
            totals, kinds = np.bincount(where, counts), np.bincount(where)
            self.levels.insert(0, (grams, counts, discount, contexts, totals, kinds))
            grams, counts = np.unique(grams % vocab_size ** (size - 1), return_counts=True)

    def log_prob(self, tokens: np.ndarray) -> np.ndarray:
        """Natural logarithms of the probabilities of all tokens but the first ``order - 1``."""
        size = len(tokens) - self.order + 1
        p = np.full(size, 1 / self.vocab_size)
        for k, (grams, counts, discount, contexts, totals, kinds) in enumerate(self.levels, 1):
            codes = _codes(tokens, k, self.vocab_size)[-size:]
            count = _look_up(grams, counts, codes)
            total, kind = (_look_up(contexts, x, codes // self.vocab_size) for x in (totals, kinds))
            seen = np.maximum(total, 1)
            mixed = np.maximum(count - discount, 0) / seen + discount * kind / seen * p
            p = np.where(total > 0, mixed, p)
        return np.log(p)


def _codes(tokens: np.ndarray, size: int, vocab_size: int) -> np.ndarray:
    """The n-grams of a text as numbers with the base ``vocab_size``."""
    tokens = np.asarray(tokens, np.int64)
    codes = np.zeros(len(tokens) - size + 1, np.int64)
    for i in range(size):
        codes = codes * vocab_size + tokens[i : i + len(codes)]
    return codes


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The values of sorted keys, 0 for those that are not there."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)


def _train(
    exp: Experiment,
    name: str,
    task: Objective,
    train: Callable[[int], Pipeline],
    settings: FitConfig,
    evaluate: Mapping[str, Pipeline],
) -> Fitted:
    """A stage, and with ``config.decay`` further ones, each at a fraction of the rate before."""
    fitted = exp.fit(name, task, train(exp.seed(name)), settings, evaluate=evaluate)
    decay = exp.config.get("decay")
    for k in range(1, decay.times + 1 if decay else 1):
        optimizer = settings.optimizer
        optimizer = dataclasses.replace(
            optimizer, learning_rate=optimizer.learning_rate * decay.factor**k
        )
        fitted = exp.fit(
            f"{name}-{k}", WarmStart(inner=task, params=fitted.params),
            train(exp.seed(f"{name}-{k}")),
            dataclasses.replace(settings, steps=decay.every, optimizer=optimizer),
            evaluate=evaluate,
        )  # fmt: skip
    return fitted


# -- spoken digits --------------------------------------------------------------------------------


def log_mel(waves: np.ndarray, rate: float, *, bands: int = 24, step: float = 0.01) -> np.ndarray:
    """Logarithms of the energies in bands of equal width on the mel scale.

    Args:
      waves: [N, L].
      rate: samples per second.
      bands: M.
      step: seconds from frame to frame; a frame is 2.5 times as long, under a Hann window.

    Returns:
      float32 [N, T, M], T = 1 + (L - frame) // step.
    """
    hop, size = round(rate * step), round(2.5 * rate * step)
    frames = np.lib.stride_tricks.sliding_window_view(waves, size, axis=1)[:, ::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(size), axis=-1)) ** 2
    mel = np.linspace(0, 2595 * np.log10(1 + rate / 2 / 700), bands + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    hertz = np.linspace(0, rate / 2, power.shape[-1])[:, None]
    rise = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    filters = np.maximum(np.minimum(rise, fall), 0)
    return np.log(power @ filters + 1e-6).astype(np.float32)


def _digit_frames(config: Any) -> dict[str, dict[str, np.ndarray]]:
    """Splits of the spoken digits: ``inputs`` [N, T, M] normalised, ``lengths``, ``labels``."""
    bundle = load("fsdd", average=1, length=config.samples)
    arrays, rate = {}, 8000
    for name, source in bundle.splits.items():
        rows = take(source, np.arange(len(source)))
        frames = log_mel(rows["inputs"][..., 0], rate, bands=config.bands)
        valid = np.clip((rows["lengths"] - 200) // 80 + 1, 1, frames.shape[1]).astype(np.int32)
        arrays[name] = {"inputs": frames, "lengths": valid, "labels": rows["labels"]}
    inside = np.arange(frames.shape[1]) < arrays["train"]["lengths"][:, None]
    known = arrays["train"]["inputs"][inside]
    for split in arrays.values():
        split["inputs"] = (split["inputs"] - known.mean(0)) / known.std(0)
    return arrays


def spoken_digits(exp: Experiment) -> None:
    """Which digit is spoken: networks that read forward only, and in both directions."""
    cfg = exp.config
    splits = {name: ArraySource(arrays) for name, arrays in _digit_frames(cfg.frames).items()}
    rows = []
    for name, section in sorted(cfg.networks.items()):
        network = RecurrentNetwork(body=body(section), outputs=10, head=section.head)
        task = Classification(module=network)
        evaluate = {part: Pipeline(splits[part], 300) for part in ("validation", "test")}
        train = Pipeline(
            splits["train"], cfg.batch_size, shuffle=True, seed=exp.seed("train"), repeat=True
        )
        fitted = exp.fit(name, task, train, _fit(cfg.train), evaluate=evaluate)
        accuracy = fitted.metrics["test/accuracy"]
        rows.append([name, fitted.metrics["validation/accuracy"], accuracy,
                     fitted.summary["parameters"]])  # fmt: skip
        exp.record(f"{name}: test accuracy", accuracy)
    columns = ["network", "validation accuracy", "test accuracy", "parameters"]
    exp.table("Spoken digits", columns, rows)
    exp.bars("Test accuracy", [row[0] for row in rows], {"": [row[2] for row in rows]})


# -- labels without an alignment ------------------------------------------------------------------


def _arrays(directory: str) -> dict[str, ArraySource]:
    """The splits of a directory with ``train.npz``, ``validation.npz`` and ``test.npz``."""
    how = "Give the directory of train.npz, validation.npz and test.npz as config.data.directory."
    sources = {}
    for name in ("train", "validation", "test"):
        with np.load(require_file(Path(directory) / f"{name}.npz", how)) as file:
            sources[name] = ArraySource(dict(file))
    return sources


def digit_strings(config: Any, seed: int) -> dict[str, ArraySource]:
    """Spoken digits one after the other, and which they are: CTC must find where each begins.

    Args:
      config: ``samples`` and ``bands`` of a recording, ``digits`` in a string at most, and
        ``strings``: how many for training, of recordings of the training part.
      seed: of what is put together.

    Returns:
      "train", "validation" and "test" (a tenth as many each) with ``inputs`` [T, M], ``lengths``,
      ``targets`` [digits] (a digit plus one, 0 is the blank) and ``target_lengths``.
    """
    rng = np.random.default_rng(seed)
    sources = {}
    for name, rows in _digit_frames(config).items():
        count = config.strings if name == "train" else config.strings // 10
        longest = int(np.sort(rows["lengths"])[-5]) * config.digits
        inputs = np.zeros((count, longest, config.bands), np.float32)
        targets = np.zeros((count, config.digits), np.int32)
        lengths, target_lengths = np.zeros(count, np.int32), np.zeros(count, np.int32)
        for i in range(count):
            chosen = rng.integers(0, len(rows["labels"]), rng.integers(1, config.digits + 1))
            whole = np.concatenate([rows["inputs"][r, : rows["lengths"][r]] for r in chosen])
            lengths[i] = min(len(whole), longest)
            inputs[i, : lengths[i]] = whole[:longest]
            targets[i, : len(chosen)] = rows["labels"][chosen] + 1
            target_lengths[i] = len(chosen)
        sources[name] = ArraySource(
            {
                "inputs": inputs, "lengths": lengths, "targets": targets,
                "target_lengths": target_lengths,
            }
        )  # fmt: skip
    return sources


def label(exp: Experiment) -> None:
    """Trains ``config.networks`` by CTC; label error rates of two ways to decode."""
    cfg = exp.config
    if cfg.data.directory:
        splits = _arrays(cfg.data.directory)
    else:
        splits = digit_strings(cfg.data, exp.seed("strings"))
    rows = []
    for name, section in sorted(cfg.networks.items()):
        task = _labeller(cfg, section)
        fitted = exp.fit(
            name, task,
            Pipeline(splits["train"], cfg.batch_size, shuffle=True, seed=exp.seed("train"),
                     repeat=True),
            _fit(cfg.train),
            evaluate={"validation": Pipeline(splits["validation"], cfg.test_batch)},
        )  # fmt: skip
        rate = exp.artifact(
            f"rates-{name}", functools.partial(_error_rates, cfg, task, fitted, splits["test"])
        )
        rows.append([name, rate["best path"], rate["prefix beam"], fitted.summary["parameters"]])
        exp.record(f"{name}: test label error rate, best path", rate["best path"])
    columns = ["network", "best path", "prefix beam", "parameters"]
    exp.table("Test label error rate", columns, rows)
    exp.bars(
        "Test label error rate", [row[0] for row in rows],
        {way: [row[i] for row in rows] for i, way in ((1, "best path"), (2, "prefix beam"))},
    )  # fmt: skip


def _error_rates(
    config: Any, task: Objective, fitted: Fitted, source: ArraySource
) -> dict[str, float]:
    """Label error rates of the two ways to decode."""
    run = jax.jit(task.predict)
    found: dict[str, list[list[int]]] = {"best path": [], "prefix beam": []}
    truth = []
    for batch in Pipeline(source, config.test_batch).iterator():
        kept = int(batch["mask"].sum())
        logits = np.asarray(run(fitted.variables, batch))[:kept]
        lengths = batch["lengths"][:kept]
        found["best path"] += best_path(logits, lengths)
        found["prefix beam"] += prefix_beam(logits, lengths, beams=config.beams)
        targets = zip(batch["targets"][:kept], batch["target_lengths"])
        truth += [row[:length].tolist() for row, length in targets]
    return {way: label_error_rate(labels, truth) for way, labels in found.items()}


def _labeller(config: Any, section: Any) -> Objective:
    network = RecurrentNetwork(body=body(section), outputs=config.data.labels + 1)
    return _uniform(config, CTC(module=network))


# -- encoder and decoder --------------------------------------------------------------------------

_START = 0  # the padding token, which no target contains


def words_of(text: str) -> list[str]:
    """Lower-case words and marks of punctuation."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _pairs(data: Any) -> dict[str, list[tuple[str, str]]]:
    """Pairs of sentences: Multi30K, or the parallel files of ``data.directory``."""
    if not data.directory:
        pairs = multi30k()
        return {"test": pairs["test_2016"], **pairs}
    found = {}
    for name in ("train", "validation", "test"):
        stem = Path(data.directory) / name
        found[name] = read_parallel(f"{stem}.{data.source}", f"{stem}.{data.target}")
    return found


def translate(exp: Experiment) -> None:
    """Trains a translator for each of ``config.orders`` of the source, and scores it by BLEU."""
    cfg = exp.config
    text = {
        name: [(words_of(a), words_of(b)) for a, b in part]
        for name, part in _pairs(cfg.data).items()
    }
    sides = []
    for side, size in ((0, cfg.vocabulary.source), (1, cfg.vocabulary.target)):
        every = Vocabulary.build(
            (word for pair in text["train"] for word in pair[side]),
            specials=(PAD, UNKNOWN, EOS), min_freq=cfg.vocabulary.min_count,
        )  # fmt: skip
        sides.append(Vocabulary(every.tokens[:size]))

    def encode(part: str, longest: int | None) -> list[dict[str, Any]]:
        rows = []
        for pair in text[part]:
            if longest is not None and max(map(len, pair)) > longest:
                continue
            source, target = (
                v.encode([*words[: cfg.max_length], EOS]) for v, words in zip(sides, pair)
            )
            lengths = {"target_lengths": np.int32(len(target))}
            rows.append({"inputs": source, "targets": target, **lengths})
        return rows

    train, validation = encode("train", cfg.max_length), encode("validation", cfg.max_length)

    def batches(rows: list[dict[str, Any]], seed: int | None = None) -> Pipeline:
        longest = [max(len(row["inputs"]), len(row["targets"])) for row in rows]
        return bucketed(
            rows, longest, cfg.boundaries, cfg.batch_size, seed or 0,
            values={"inputs": 0, "targets": 0}, shuffle=seed is not None, repeat=seed is not None,
        )  # fmt: skip

    rows = []
    for order in cfg.orders:
        task = _translator(cfg, order, len(sides[0]), len(sides[1]))
        fitted = _train(
            exp, order, task, lambda seed: batches(train, seed), _fit(cfg.train),
            {"validation": batches(validation)},
        )  # fmt: skip
        scores, examples = _bleu(
            exp, order, task, fitted, encode("test", None), sides[1],
            [" ".join(target) for _, target in text["test"]],
        )  # fmt: skip
        nll = fitted.metrics["validation/nll"]
        rows.append([order, float(np.exp(nll)), 100 * scores["bleu_4"],
                     scores["mean_length"] / scores["reference_length"],
                     fitted.summary["parameters"]])  # fmt: skip
        exp.record(f"{order}: BLEU", 100 * scores["bleu_4"])
        exp.record(f"{order}: the first test sentences", " | ".join(examples))
    columns = ["source", "validation perplexity", "BLEU", "length / reference", "parameters"]
    exp.table("Translation of the test set", columns, rows)
    exp.bars("BLEU", [row[0] for row in rows], {"": [row[2] for row in rows]})


def _translator(config: Any, order: str, source_size: int, target_size: int) -> Objective:
    if order not in ("natural", "reversed"):
        raise ConfigError(f"config.orders has {order!r}; choose among 'natural', 'reversed'.")
    module = RecurrentSeq2Seq(
        vocab_size=target_size, source_vocab_size=source_size, reverse_source=order == "reversed",
        **config.model.to_dict(),
    )  # fmt: skip
    return _uniform(config, Seq2Seq(module=module, start_id=_START))


def _module(task: Objective) -> Any:
    """The network of an objective, perhaps a transformed one."""
    inner: Any = task
    while isinstance(inner, Transformed):
        inner = inner.inner
    return inner.module


def _bleu(
    exp: Experiment,
    name: str,
    task: Objective,
    fitted: Fitted,
    examples: Sequence[Mapping[str, Any]],
    vocabulary: Vocabulary,
    references: list[str],
) -> tuple[dict[str, float], list[str]]:
    """BLEU of what is written for all examples, and the first three of it."""
    cfg = exp.config
    decoding = Decoding(
        max_tokens=cfg.max_length + 1, start_id=_START, eos_id=vocabulary.ids[EOS],
        num_beams=cfg.beams, length_penalty=cfg.length_penalty,
    )  # fmt: skip

    def write() -> dict[str, Any]:
        written = []
        params = {"params": fitted.params}
        tokens = np.issubdtype(examples[0]["inputs"].dtype, np.integer)
        for start in range(0, len(examples), cfg.test_batch):
            rows = list(examples[start : start + cfg.test_batch])
            count = len(rows)
            rows += [rows[-1]] * (cfg.test_batch - count)  # one shape, one program
            lengths = None
            if tokens:
                batch = pad_batch([{"inputs": row["inputs"]} for row in rows], cfg.max_length + 1)
                inputs, lengths = batch["inputs"], jnp.asarray(batch["lengths"])
            else:
                inputs = np.stack([row["inputs"] for row in rows])
            found = generate_targets(
                _module(task), params, jnp.asarray(inputs), decoding, lengths=lengths
            )
            for row, length in zip(np.asarray(found.tokens)[:count], np.asarray(found.lengths)):
                words = vocabulary.decode(row[:length])
                written.append(" ".join(word for word in words if word != EOS))
        return {"scores": bleu(written, references), "examples": written[:3]}

    result = exp.artifact(f"written-{name}", write)
    return result["scores"], result["examples"]


def caption(exp: Experiment) -> None:
    """Trains a captioner on vectors and tokens from files, and scores it by BLEU.

    ``config.data.directory`` holds ``{train,validation,test}.npz`` with ``inputs`` [N, D],
    ``targets`` [N, T] (``<pad>`` = 0, ``<unk>`` = 1, ``<eos>`` = 2 at the end of each) and
    ``target_lengths`` [N]; and ``vocabulary.txt`` with a token in each line.
    """
    cfg = exp.config
    splits = _arrays(cfg.data.directory)
    how = "It has one token in each line, <pad>, <unk> and <eos> first."
    path = require_file(Path(cfg.data.directory) / "vocabulary.txt", how)
    vocabulary = Vocabulary(tuple(path.read_text(encoding="utf-8").splitlines()))
    task = _captioner(cfg, len(vocabulary))
    fitted = _train(
        exp, "train", task,
        lambda seed: Pipeline(
            splits["train"], cfg.batch_size, shuffle=True, seed=seed, repeat=True
        ),
        _fit(cfg.train), {"validation": Pipeline(splits["validation"], cfg.test_batch)},
    )  # fmt: skip
    test = [splits["test"][i] for i in range(len(splits["test"]))]
    references = [
        " ".join(vocabulary.decode(row["targets"][: row["target_lengths"] - 1])) for row in test
    ]
    scores, examples = _bleu(exp, "test", task, fitted, test, vocabulary, references)
    nll = fitted.metrics["validation/nll"]
    exp.table(
        "Captions of the test set", ["validation perplexity", *(f"BLEU-{n}" for n in range(1, 5))],
        [[float(np.exp(nll)), *(100 * scores[f"bleu_{n}"] for n in range(1, 5))]],
    )  # fmt: skip
    exp.record("BLEU", 100 * scores["bleu_4"])
    exp.record("the first test captions", " | ".join(examples))


def _captioner(config: Any, vocab_size: int) -> Objective:
    module = Captioner(vocab_size=vocab_size, **config.model.to_dict())
    return _uniform(config, Seq2Seq(module=module, start_id=_START))


# -- plans ----------------------------------------------------------------------------------------


def plan(config: Any) -> tuple[Objective, dict[str, jax.ShapeDtypeStruct], FitConfig]:
    """What the first training stage of a config would run, without its data.

    Returns:
      The objective, a batch of the shapes that ``config.expected`` gives, and the settings, for
      ``training.aot.lower_step``.

    Raises:
      ConfigError: a task that needs no plan, as it runs anywhere.
    """
    size, expected = config.batch_size, config.get("expected")

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *shape), jnp.int32)

    def reals(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *shape), jnp.float32)

    if config.task == "language_model":
        _, section = sorted(config.networks.items())[0]
        task = _next_token(config, section, expected.vocab_size)
        reset = jax.ShapeDtypeStruct((size,), jnp.bool_)
        batch = {"inputs": ints(config.window + 1), "reset": reset}
    elif config.task == "translate":
        task = _translator(config, config.orders[0], config.vocabulary.source,
                           config.vocabulary.target)  # fmt: skip
        longest = max(config.boundaries)
        batch = {
            "inputs": ints(longest), "targets": ints(longest), "lengths": ints(),
            "target_lengths": ints(), "mask": reals(),
        }  # fmt: skip
    elif config.task == "label":
        task = _labeller(config, sorted(config.networks.items())[0][1])
        batch = {
            "inputs": reals(expected.steps, expected.features), "lengths": ints(),
            "targets": ints(expected.labels), "target_lengths": ints(),
        }  # fmt: skip
    elif config.task == "caption":
        task = _captioner(config, expected.vocab_size)
        batch = {
            "inputs": reals(expected.features), "targets": ints(config.max_length + 1),
            "target_lengths": ints(),
        }  # fmt: skip
    else:
        raise ConfigError(f"config.task={config.task!r} has no full-scale plan; just run it.")
    return task, batch, _fit(config.train)
