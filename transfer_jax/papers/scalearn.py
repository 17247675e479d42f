"""ScaLearn: task transfer by learning to scale (Frohmann et al., Findings of ACL 2024).

Stage 1 trains one adapter per source task on a frozen network. Stage 2 learns a target with all of
them frozen: the adapters' outputs are multiplied by learned scales and added,
``o = u + sum_s w_s * e_s``, where w has an entry per site, source and dimension (ScaLearn), per
site and source (Uniform), or is shared by the sites (``++``). Trained are w and a new head.

The recipe trains a network on a mixture of the sources (images) or reads one (tokens), trains the
source adapters, and for every target and number of examples runs ``config.methods``:

* ``adapter``: an adapter of the target's own, which is then the last source;
* ``scalearn``, ``uniform``, ``scalearn++``, ``uniform++``, and with ``:mean`` or ``:softmax`` their
  ablations with scales that sum to one;
* ``fusion``, ``static_fusion``: AdapterFusion with and without a value projection;
* ``soup``: AdapterSoup, the average of the adapters most similar to the target;
* ``random``: ScaLearn on random adapters in place of the other sources, a control;
* ``head``, ``full``: only the head, all parameters;
* ``joint``: one adapter for sources and target together, sampled by temperature;
* ``probing``: fixed scales of two sources, on a grid (Figure 2).

Stage 2 reads stage 1 from its checkpoints, in this work directory or in another (``config.bank``).
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from transfer_jax import trees
from transfer_jax.configuration import ConfigError
from transfer_jax.data.paths import require_file
from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.registry import load
from transfer_jax.data.sources import ArraySource, Source, take
from transfer_jax.data.splits import Subset, few_shot, stratified_split
from transfer_jax.metrics import classification
from transfer_jax.models import Bert, BertConfig, ResidualMLP, bert_stack
from transfer_jax.nn import adapter_fusion, petl
from transfer_jax.nn.adapter_fusion import Sources
from transfer_jax.objectives import (
    Aux,
    Classification,
    Mean,
    ModuleObjective,
    Objective,
    PenalizedObjective,
    Regression,
    ReparameterizedObjective,
    Trainable,
    Transformed,
    Variables,
    WarmStart,
    example_mask,
    losses,
)
from transfer_jax.objectives.petl import Adapted
from transfer_jax.training import Experiment, FitConfig, load_variables
from transfer_jax.training.config import from_dict
from transfer_jax.trees.paths import leaf_key, map_with_path

Array = jax.Array
Batch = Any
PyTree = Any

PLAIN = ("adapter", "head", "full", "fusion", "static_fusion", "soup", "random", "joint", "probing")
METHODS = (
    *PLAIN,
    *(f"{v}{n}" for v in adapter_fusion.VARIANTS for n in ("", ":mean", ":softmax")),
)


# -- objectives -------------------------------------------------------------------------------


class Combined(ReparameterizedObjective):
    """A network with source adapters, learned in what combines them (section 3).

    The parameters are ``{"combination", "full"}``: ``{"scales"}`` or ``{"fusion"}``, and those of
    the network that are trained, such as a head. The bank is carried and mapped, with the
    combination, to what the ``Adapted`` inside adds to the network.

    Attributes:
      inner: an ``Adapted`` whose method is one ``Sources``.
      bank: the source adapters [L, n, ...].
      fixed: scales [1 or L, n, 1 or d] that are not trained, carried; None = they are.
      sites: of the adapters, in the order of the network; see ``find_sites``.
      variant: of the scales, see ``adapter_fusion.VARIANTS``; 'fusion' or 'static_fusion'.
      normalisation: of the scales, see ``adapter_fusion.NORMALISATIONS``.
      total: what the scales sum to at first.
    """

    inner: Adapted
    bank: PyTree
    fixed: Array | None = None
    sites: tuple[petl.Site, ...] = flax.struct.field(pytree_node=False, kw_only=True)
    variant: str = flax.struct.field(pytree_node=False, default="scalearn")
    normalisation: str = flax.struct.field(pytree_node=False, default="none")
    total: float = flax.struct.field(pytree_node=False, default=2.0)

    def initial_params(self, rng: Array, inner_params: PyTree) -> PyTree:
        return {"combination": self.draw(rng), "full": inner_params["full"]}

    def draw(self, key: Array) -> PyTree:
        """Initial ``{"scales"}`` or ``{"fusion"}``; nothing if the scales are fixed."""
        sites, sources, features = self.bank["up"]["bias"].shape
        if self.fixed is not None:
            return {}
        if "fusion" in self.variant:
            value = self.variant == "fusion"
            return {"fusion": adapter_fusion.init_fusion(key, sites, features, value=value)}
        shape = (sites, sources, features)
        return {"scales": adapter_fusion.init_scales(key, self.variant, *shape, total=self.total)}

    def inner_params(self, params: PyTree) -> PyTree:
        combination = params["combination"]
        if "fusion" in combination:
            stacked = {"bank": self.bank, "fusion": combination["fusion"]}
        else:
            stacked = {"bank": self.bank, "scales": self.scales(combination)}
        added = {PART: adapter_fusion.spread(stacked, self.sites)}
        return {"added": added, "full": params["full"]}

    def scales(self, combination: PyTree) -> Array:
        """The scales in use, [L, n, 1 or d]."""
        scales = combination["scales"] if self.fixed is None else self.fixed
        scales = adapter_fusion.normalise_scales(scales, self.normalisation)
        sites = self.bank["up"]["bias"].shape[0]
        return jnp.broadcast_to(scales, (sites, *scales.shape[1:]))

    def fold(self, params: PyTree) -> tuple[Adapted, PyTree]:
        """Returns an objective and parameters with one wide adapter for bank and scales."""
        folded = adapter_fusion.fold(self.bank, self.scales(params["combination"]))
        width = folded["down"]["kernel"].shape[-1]
        part = next(p for p in self.inner.method if isinstance(p, Sources))
        wide = petl.Delta(**{**_fields(part), "bottleneck": width, "dropout": 0.0})
        added = {PART: adapter_fusion.spread(folded, self.sites)}
        return self.inner.replace(method=(wide,)), {"added": added, "full": params["full"]}


PART = "adapter"  # the one part of every method here


def _fields(part: petl.Delta) -> dict[str, Any]:
    return {f.name: getattr(part, f.name) for f in dataclasses.fields(petl.Delta)}


class FusionPenalty(PenalizedObjective):
    """AdapterFusion's ``strength * sum over sites ||I - W_v||_F^2``."""

    def penalty(self, params: PyTree) -> Array:
        return adapter_fusion.fusion_penalty(params["combination"]["fusion"])


class ScalePenalty(PenalizedObjective):
    """``strength * sum |w|^p`` of the scales; off in the reported runs.

    Attributes:
      p: 1 or 2.
    """

    p: int = flax.struct.field(pytree_node=False, default=2)

    def penalty(self, params: PyTree) -> Array:
        return jnp.sum(jnp.abs(params["combination"]["scales"]) ** self.p)


class Probing(Transformed):
    """Fixed scales on a grid, with a head for each (Figure 2), all trained at once.

    Parameters have a leading axis of G; the loss is the sum over the grid, so that each head's
    gradient is what it would be alone. Predictions are [G, B, ...].

    Attributes:
      inner: a ``Combined``.
      grid: [G, n], scales of the sources at every site.
    """

    grid: Array

    def init(self, rng: Array, batch: Batch) -> Variables:
        one = self._at(self.grid[0]).init(rng, batch)
        count = self.grid.shape[0]
        params = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), one.params)
        return Variables(params, one.state)

    def _at(self, scales: Array) -> Objective:
        return self.inner.replace(fixed=scales[None, :, None])

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        def one(scales: Array, params: PyTree) -> tuple[Array, tuple[dict[str, Mean], Array]]:
            loss, aux = self._at(scales).loss(Variables(params, variables.state), batch, rng)
            return loss, (aux.metrics, jnp.asarray(aux.weight))

        each, (metrics, weight) = jax.vmap(one)(self.grid, variables.params)
        metrics = {name: Mean(m.total.sum(), m.weight.sum()) for name, m in metrics.items()}
        return each.sum(), Aux(variables.state, metrics, weight[0])

    def predict(self, variables: Variables, batch: Batch) -> Array:
        return jax.vmap(
            lambda scales, params: self._at(scales).predict(
                Variables(params, variables.state), batch
            )
        )(self.grid, variables.params)


class MultiLabel(ModuleObjective):
    """Sigmoid cross-entropy, the mean over labels, on ``batch["labels"]`` [B, C] of 0 and 1.

    Metrics: ``nll`` per label, in nats.
    """

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        logits, state = self.apply(variables, batch, rng)
        each = optax.sigmoid_binary_cross_entropy(logits, batch["labels"]).mean(axis=-1)
        nll = Mean.of(each, example_mask(batch, each.shape[0]))
        return nll.value(), Aux(state, {"nll": nll}, nll.weight, logits)


class Joint(ModuleObjective):
    """Several tasks with one network, whose outputs [B, sum of widths] have a span for each.

    ``batch["task"]`` [B] says which task an example is of, ``batch["labels"]`` [B, sum of widths]
    float32 holds in its span one-hot classes, a score, or several labels. The loss is the mean
    over examples of the task's own loss.

    Metrics: ``nll``, that mean.

    Attributes:
      spans: (kind, start, stop) of every task; kinds as in ``Task``.
    """

    spans: tuple[tuple[str, int, int], ...] = flax.struct.field(pytree_node=False, kw_only=True)

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        outputs, state = self.apply(variables, batch, rng)
        each = jnp.zeros(outputs.shape[0])
        for t, (kind, start, stop) in enumerate(self.spans):
            logits, labels = outputs[:, start:stop], batch["labels"][:, start:stop]
            if kind == "score":
                own = losses.squared_error(logits, labels)
            elif kind == "labels":
                own = optax.sigmoid_binary_cross_entropy(logits, labels).mean(axis=-1)
            else:
                own = losses.cross_entropy(logits, jnp.argmax(labels, axis=-1))
            each = jnp.where(batch["task"] == t, own, each)
        nll = Mean.of(each, example_mask(batch, each.shape[0]))
        return nll.value(), Aux(state, {"nll": nll}, nll.weight, outputs)


# -- networks ---------------------------------------------------------------------------------


class ImageClassifier(nn.Module):
    """A residual perceptron under a linear head: images [B, ...] to logits [B, outputs].

    Attributes:
      outputs: of the head.
      width: of the encoder.
      depth: number of blocks.
      expand: the hidden width of a block is ``expand * width``.
    """

    outputs: int
    width: int = 128
    depth: int = 4
    expand: int = 2

    def setup(self):
        self.encoder = ResidualMLP(
            embedding=self.width, features=self.width, depth=self.depth, expand=self.expand
        )
        self.head = nn.Dense(self.outputs)

    def features(self, inputs: Array, *, train: bool = False) -> Array:
        """[B, width]."""
        return self.encoder(inputs, train=train)

    def __call__(self, inputs: Array, *, train: bool = False) -> Array:
        return self.head(self.features(inputs, train=train))


class TextClassifier(nn.Module):
    """An encoder of tokens under RoBERTa's head; with choices, one score for each of them.

    Attributes:
      config: of the network, its head included.
      choices: the inputs are [B, choices, L] and the logits [B, choices]; else [B, L] and
        [B, num_classes].
    """

    config: BertConfig
    choices: bool = False

    def setup(self):
        self.encoder = Bert(self.config)

    def features(
        self, inputs: Array, *, lengths: Array | None = None, train: bool = False
    ) -> Array:
        """The mean over tokens, [B, H]; choices are averaged too."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        lengths = None if lengths is None else lengths.reshape(-1)
        x = self.encoder.features(flat, lengths=lengths, train=train)
        if lengths is None:
            mean = x.mean(axis=1)
        else:
            seen = (jnp.arange(x.shape[1]) < lengths[:, None])[..., None]
            mean = (x * seen).sum(axis=1) / lengths[:, None]
        return mean.reshape(inputs.shape[0], -1, mean.shape[-1]).mean(axis=1)

    def __call__(
        self, inputs: Array, *, lengths: Array | None = None, train: bool = False
    ) -> Array:
        if not self.choices:
            return self.encoder(inputs, lengths=lengths, train=train)
        lengths = None if lengths is None else lengths.reshape(-1)
        scores = self.encoder(inputs.reshape(-1, inputs.shape[-1]), lengths=lengths, train=train)
        return scores.reshape(inputs.shape[:2])


# Parameters of the heads, which are drawn anew for every task.
HEAD = r"^head/|^encoder/(pooler|classifier)/"


def network(config: Any, outputs: int, *, choices: bool = False) -> nn.Module:
    """Builds the network of ``config.model`` for a task.

    Raises:
      ConfigError: an unknown kind.
    """
    options = config.model.to_dict()
    kind = options.pop("kind")
    if kind == "images":
        return ImageClassifier(outputs, **options)
    if kind != "roberta":
        raise ConfigError(f"config.model.kind={kind!r}; choose 'images' or 'roberta'.")
    dtype = jnp.dtype(options.pop("dtype"))
    vocabulary, positions = options.pop("vocab_size"), options.pop("max_positions")
    stack = bert_stack(norm_eps=1e-5, dtype=dtype, **options)
    bert = BertConfig(
        vocab_size=vocabulary, stack=stack, max_positions=positions, position_offset=2,
        token_types=1, roberta=True, head="classification", num_classes=outputs,
    )  # fmt: skip
    return TextClassifier(bert, choices=choices)


# -- tasks ------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A task of the bank, or a target.

    Attributes:
      kind: 'classes' (labels int [N]), 'score' (float [N, 1]), 'labels' (0 and 1, float [N, C]) or
        'choices' (inputs [N, choices, ...], labels int [N]).
      outputs: of the head: C, or 1.
      metric: see ``METRICS``.
      splits: "train", "validation" and "test".
      epochs: of training, 0 = the steps that the config says.
    """

    kind: str
    outputs: int
    metric: str
    splits: Mapping[str, Source]
    epochs: int = 0

    @property
    def monitor(self) -> tuple[str, str]:
        """What models are selected by on validation data, and whether it is to be 'max'."""
        named = {"score": ("validation/mse", "min"), "labels": ("validation/nll", "min")}
        return named.get(self.kind, ("validation/accuracy", "max"))


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(predictions == labels))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "matthews": classification.matthews,
    "pearson": classification.pearson,
    "macro_f1": classification.macro_f1,
    "f1": classification.f1,
}


def decide(kind: str, outputs: np.ndarray) -> np.ndarray:
    """Predictions as a metric reads them, of a network's outputs [N, C]."""
    if kind == "score":
        return outputs[:, 0]
    if kind == "labels":
        return (outputs > 0).astype(np.int32)  # sigmoid > 0.5
    return outputs.argmax(axis=-1)


def objective_of(task: Task, module: nn.Module) -> ModuleObjective:
    """The loss of a task."""
    kinds = {"score": Regression, "labels": MultiLabel}
    return kinds.get(task.kind, Classification)(module=module)


class Mixture:
    """Examples of several tasks, a task being drawn with probability ``size^(1 / temperature)``.

    Example i is a pure function of the seed: the task is drawn, then an example of it. Labels are
    as ``Joint`` reads them, which also has the ``spans``.

    Args:
      tasks: their kinds and outputs.
      sources: an example source for each of them.
      temperature: 1 = in proportion to the sizes; infinite = equally.
      length: number of examples drawn.
      seed: of the draws.

    Raises:
      ValueError: a task with choices, whose inputs have another shape.
    """

    def __init__(
        self, tasks: Sequence[Task], sources: Sequence[Source], temperature: float, length: int,
        seed: int,
    ):  # fmt: skip
        if any(task.kind == "choices" for task in tasks):
            raise ValueError("tasks with choices cannot be mixed with others: leave them out.")
        self.tasks, self.sources = tuple(tasks), tuple(sources)
        ends = np.cumsum([task.outputs for task in tasks])
        self.spans = tuple(
            (task.kind, int(end) - task.outputs, int(end)) for task, end in zip(tasks, ends)
        )
        sizes = np.array([len(source) for source in sources])
        rng = np.random.default_rng(seed)
        self.which = rng.choice(len(sizes), length, p=temperature_shares(sizes, temperature))
        self.example = (rng.random(length) * sizes[self.which]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        return {name: x[0] for name, x in self.take(np.array([index])).items()}

    def take(self, indices: np.ndarray) -> dict[str, Any]:
        which, example = self.which[indices], self.example[indices]
        rows: dict[str, Any] = {}
        for t in np.unique(which):
            at = which == t
            part = dict(take(self.sources[t], example[at]))
            part["labels"] = self.labels(int(t), part["labels"])
            part["task"] = np.full(at.sum(), t, np.int32)
            for name, x in part.items():
                whole = rows.setdefault(name, np.zeros((len(indices), *x.shape[1:]), x.dtype))
                whole[at] = x
        return rows

    def labels(self, task: int, labels: np.ndarray) -> np.ndarray:
        """Labels of one task in its span of [N, sum of outputs]."""
        kind, start, stop = self.spans[task]
        rows = np.zeros((len(labels), self.spans[-1][2]), np.float32)
        rows[:, start:stop] = np.eye(stop - start)[labels] if kind == "classes" else labels
        return rows


def temperature_shares(sizes: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities [T] in proportion to ``size^(1 / temperature)``."""
    log = np.log(np.asarray(sizes, np.float64)) / temperature
    shares = np.exp(log - log.max())
    return shares / shares.sum()


def _shuffled(x: np.ndarray, count: int) -> np.ndarray:
    """Cuts images into count x count blocks and puts these in another, fixed order."""
    n, height, width, channels = x.shape
    h, w = height // count, width // count
    body = x[:, : h * count, : w * count]
    tiles = body.reshape(n, count, h, count, w, channels).swapaxes(2, 3)
    tiles = tiles.reshape(n, count * count, h, w, channels)
    tiles = tiles[:, np.random.default_rng(0).permutation(count * count)]
    result = x.copy()
    result[:, : h * count, : w * count] = (
        tiles.reshape(n, count, count, h, w, channels).swapaxes(2, 3).reshape(body.shape)
    )
    return result


# What is done to images [N, H, W, 1] in [0, 1] to make another task of them.
DOMAINS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "plain": lambda x: x,
    "inverted": lambda x: 1 - x,
    "inverted_rotated": lambda x: 1 - np.rot90(x, axes=(1, 2)),
    "quarters": lambda x: _shuffled(x, 2),
    "thirds": lambda x: _shuffled(x, 3),
    "flipped": lambda x: x[:, :, ::-1],
    "upside_down": lambda x: x[:, ::-1],
    "checkered": lambda x: np.abs(x - np.indices(x.shape[1:3]).sum(axis=0)[..., None] % 2),
    "rotated": lambda x: np.rot90(x, axes=(1, 2)),
}


def _domain(name: str, x: np.ndarray) -> np.ndarray:
    if name not in DOMAINS:
        raise ConfigError(f"config.data: no domain {name!r}; there are {', '.join(DOMAINS)}.")
    return np.ascontiguousarray(DOMAINS[name](x)).astype(np.float32)


def _images(domain: str, classes: int, **splits: tuple[np.ndarray, np.ndarray]) -> Task:
    sources = {
        name: ArraySource({"inputs": _domain(domain, x), "labels": y.astype(np.int32)})
        for name, (x, y) in splits.items()
    }
    return Task("classes", classes, "accuracy", sources)


def _arrays(source: Source) -> tuple[np.ndarray, np.ndarray]:
    x = take(source, np.arange(len(source)))
    return x["inputs"], x["labels"]


def digits_tasks(config: Any) -> dict[str, Task]:
    """scikit-learn's digits in several domains: half of the images for sources.

    Of the other half, three tenths are for the targets, from which k per class are drawn or which
    validate, and two tenths test: no source has seen them in any domain.
    """
    bundle = load("digits", seed=config.seed, fractions=(0.5, 0.3, 0.2))
    halves = {"train": 0.5, "validation": 0.5}
    rest = stratified_split(bundle.splits["validation"], halves, seed=config.seed)
    train, test = _arrays(bundle.splits["train"]), _arrays(bundle.splits["test"])
    target = {name: _arrays(source) for name, source in rest.items()}
    tasks = {name: _images(name, 10, train=train) for name in config.sources}
    return tasks | {name: _images(name, 10, **target, test=test) for name in config.targets}


def handwriting_tasks(config: Any) -> dict[str, Task]:
    """MNIST's test part, the UCI digits and Omniglot's Greek, as 28 x 28 pixels.

    The targets' images are in no source: of MNIST (``mnist_t10k``) the validation and test images,
    of the UCI digits 823 of the training images and the test images, of other writers.
    """
    splits = load("mnist_t10k", sequence=False, seed=config.seed).splits
    mnist, held, test = (_arrays(splits[name]) for name in ("train", "validation", "test"))
    splits = load("optdigits", enlarged=True).splits
    uci, uci_test = _arrays(splits["train"]), _arrays(splits["test"])
    greek = _arrays(load("omniglot8", alphabet="Greek", test_drawers=0).splits["train"])
    order = np.random.default_rng(config.seed).permutation(len(uci[1]))
    first, second, third = (
        (uci[0][rows], uci[1][rows]) for rows in np.split(order, [3000, 3400])
    )  # fmt: skip
    return {
        "mnist": _images("plain", 10, train=mnist),
        "mnist_inverted_rotated": _images("inverted_rotated", 10, train=mnist),
        "mnist_thirds": _images("thirds", 10, train=mnist),
        "optdigits": _images("plain", 10, train=first),
        "greek": _images("plain", 24, train=greek),
        "mnist_rotated": _images(
            "rotated", 10, train=(held[0][:500], held[1][:500]),
            validation=(held[0][500:], held[1][500:]), test=test,
        ),
        "optdigits_inverted_rotated": _images(
            "inverted_rotated", 10, train=second, validation=third, test=uci_test
        ),
    }  # fmt: skip


def token_tasks(config: Any) -> dict[str, Task]:
    """Tasks as tokens, from ``config.data.directory``: ``<task>/<split>.npz``.

    A file has ``inputs`` int32 [N, L] (or [N, choices, L]), ``lengths`` int32 [N] (or [N, choices])
    and ``labels`` as ``Task`` says. The splits are "train" (90 % of the published one),
    "validation" (the other 10 %) and "test" (the published validation data).

    Raises:
      ConfigError: no directory is given.
      FileNotFoundError: a file is missing.
    """
    if not config.data.directory:
        raise ConfigError(
            "config.data.directory is empty: this config describes a published experiment; give "
            "the directory that holds <task>/<split>.npz for "
            f"{', '.join(config.data.tasks)}, or run a variant with data, such as scalearn:digits."
        )

    def read(name: str, split: str) -> ArraySource:
        how = "It holds the arrays 'inputs', 'lengths' and 'labels'."
        path = require_file(Path(config.data.directory) / name / f"{split}.npz", how)
        with np.load(path) as file:
            return ArraySource({key: file[key] for key in ("inputs", "lengths", "labels")})

    return {
        name: Task(
            t.kind, t.outputs, t.metric,
            {split: read(name, split) for split in ("train", "validation", "test")}, t.epochs,
        )
        for name, t in config.data.tasks.items()
    }  # fmt: skip


TASKS: dict[str, Callable[[Any], dict[str, Task]]] = {
    "digits": digits_tasks,
    "handwriting": handwriting_tasks,
    "tokens": token_tasks,
}


# -- stages -----------------------------------------------------------------------------------


def adapter_part(config: Any) -> petl.Delta:
    """The part of one adapter (Pfeiffer's where ``config.adapter.modified`` is 'normed')."""
    a = config.adapter
    return petl.Delta(
        name=PART, where=(a.where,), modified=a.modified, insertion="sequential",
        bottleneck=a.bottleneck, init="bert", dropout=0.0,
    )  # fmt: skip


def find_sites(
    config: Any, task: ModuleObjective, params: PyTree, batch: Batch
) -> tuple[petl.Site, ...]:
    """Where the adapters go in the network of ``task``; shapes suffice."""
    part = adapter_part(config)

    def run(params: PyTree, batch: Batch) -> PyTree:
        return task.predict(Variables(params, {}), batch)

    return tuple(petl.find_sites((part,), run, params, batch)[part.name].values())


def stage_one(config: Any, task: Objective, frozen: PyTree) -> Adapted:
    """The objective of one adapter and a head; ``frozen`` has None at the head."""
    return Adapted(inner=task, frozen=frozen, method=(adapter_part(config),))


def stage_two(
    config: Any,
    method: str,
    task: Objective,
    frozen: PyTree,
    sites: tuple[petl.Site, ...],
    bank: PyTree,
    fixed: Array | None = None,
) -> Objective:
    """Builds the objective of a method that combines adapters, and a head.

    Args:
      config: of the experiment.
      method: of ``METHODS``: 'fusion', 'static_fusion', a variant of the scales, with ':mean' or
        ':softmax' for its ablations; 'random' is 'scalearn'. With ``fixed`` it is not read.
      task: around the network.
      frozen: parameters of the network, None at the head.
      sites: from ``find_sites``.
      bank: the source adapters [L, n, ...].
      fixed: scales that are not trained.
    """
    variant, _, normalisation = method.partition(":")
    variant = "scalearn" if variant == "random" else variant
    # The ablations and the 8 numbers of uniform++ go without dropout.
    rate = 0.0 if normalisation or variant == "uniform++" else config.scale_dropout
    rate = config.fusion.dropout if "fusion" in variant else rate
    fields = {**_fields(adapter_part(config)), "dropout": rate if fixed is None else 0.0}
    objective = Combined(
        inner=Adapted(inner=task, frozen=frozen, method=(Sources(**fields),)), bank=bank,
        fixed=fixed, sites=sites, variant=variant, normalisation=normalisation or "none",
        total=config.scale_total,
    )  # fmt: skip
    if fixed is not None:
        return objective
    if variant == "fusion":
        return FusionPenalty(inner=objective, strength=config.fusion.penalty)
    if config.scale_penalty and "fusion" not in variant:
        return ScalePenalty(inner=objective, strength=config.scale_penalty, p=config.scale_norm)
    return objective


def load_bank(
    workdir: str | Path, stages: Sequence[str], sites: Sequence[petl.Site], layout: Any = None
) -> PyTree:
    """Reads source adapters from the checkpoints of stage 1 and stacks them.

    Args:
      workdir: of the experiment that trained them.
      stages: names of the stages, in the order that the bank is to have.
      sites: from ``find_sites``.
      layout: see ``load_variables``.

    Returns:
      The bank [L, n, ...].
    """
    added = [
        load_variables(Path(workdir) / "stages" / stage, layout=layout).params["added"][PART]
        for stage in stages
    ]
    return adapter_fusion.stack_adapters([adapter_fusion.gather(a, sites) for a in added])


def digest(tree: PyTree) -> str:
    """SHA-256 of a tree's paths and values, in hexadecimal."""
    sha = hashlib.sha256()
    for path, x in zip(trees.paths(tree), jax.tree.leaves(tree)):
        sha.update(path.encode() + np.ascontiguousarray(x).tobytes())
    return sha.hexdigest()


def random_adapters(adapter: PyTree, key: Array) -> PyTree:
    """Gaussian adapters in which every leaf has, at each site, the norm of the leaf given."""

    def draw(path: str, x: Array) -> Array:
        noise = jax.random.normal(leaf_key(key, path), x.shape)
        axes = tuple(range(1, x.ndim))

        def norm(x: Array) -> Array:
            return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))

        return noise * norm(x) / norm(noise)

    return map_with_path(draw, adapter)


def slug(method: str) -> str:
    """The method in the name of a stage."""
    return method.replace("++", "-shared").replace(":", "-").replace("_", "-")


def settings(config: Any, kind: str, task: Task, size: int) -> FitConfig:
    """The ``FitConfig`` of ``config.fits`` with what depends on the task.

    Args:
      config: of the experiment.
      kind: of the stage, a name in ``config.fits``.
      task: whose epochs, if it has some, replace the steps, and which says what is monitored.
      size: number of training examples.
    """
    fit = from_dict(FitConfig, config.fits[kind], f"fits.{kind}")
    few = any(config.shots) and kind != "source"
    if task.epochs and not few and kind not in ("joint", "probing"):
        per_epoch = math.ceil(size / config.batch_size)
        fit = dataclasses.replace(fit, steps=per_epoch * task.epochs, eval_every=per_epoch)
    if fit.select_best or fit.patience:
        monitor, mode = task.monitor
        fit = dataclasses.replace(fit, monitor=monitor, monitor_mode=mode)
    return fit


# -- the recipe -------------------------------------------------------------------------------


class Context(NamedTuple):
    """What the stages of the recipe share."""

    exp: Experiment
    tasks: dict[str, Task]
    base: PyTree  # parameters of the network, without a head
    sites: tuple[petl.Site, ...]

    def task(self, name: str) -> ModuleObjective:
        """The loss of a task around its network."""
        task = self.tasks[name]
        module = network(self.exp.config, task.outputs, choices=task.kind == "choices")
        return objective_of(task, module)

    def train(self, stage: str, source: Source) -> Pipeline:
        cfg = self.exp.config
        return Pipeline(
            source, cfg.batch_size, shuffle=True, seed=self.exp.seed(stage), repeat=True,
            num_threads=cfg.data.threads,
        )  # fmt: skip

    def whole(self, source: Source) -> Pipeline:
        cfg = self.exp.config
        return Pipeline(source, cfg.eval_batch_size, num_threads=cfg.data.threads)

    def fit(self, stage: str, objective: Objective, name: str, source: Source, kind: str) -> Any:
        """Trains a stage of the task ``name`` on ``source``, selecting on its validation data."""
        task = self.tasks[name]
        fit = settings(self.exp.config, kind, task, len(source))
        evaluate = None
        if fit.monitor:
            evaluate = {"validation": self.whole(task.splits["validation"])}
        return self.exp.fit(stage, objective, self.train(stage, source), fit, evaluate=evaluate)

    def score(
        self, objective: Objective, variables: Variables, name: str, split: str,
        span: tuple[int, int] | None = None,
    ) -> float:  # fmt: skip
        """The task's metric; ``span`` are the task's outputs among those of a ``Joint``."""
        task = self.tasks[name]
        outputs, labels = self.outputs(objective, variables, name, split)
        outputs = outputs if span is None else outputs[:, slice(*span)]
        labels = _plain_labels(task.kind, labels)
        return METRICS[task.metric](decide(task.kind, outputs), labels)

    def outputs(
        self, objective: Objective, variables: Variables, name: str, split: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Outputs [N, ...] and labels [N, ...] of a split, of all processes."""
        from jax.experimental.multihost_utils import process_allgather

        predict = jax.jit(lambda o, v, b: o.predict(v, b))
        parts = []
        for batch in self.exp.batches(self.whole(self.tasks[name].splits[split])):
            kept = process_allgather(batch["mask"], tiled=True) > 0
            outputs = process_allgather(predict(objective, variables, batch), tiled=True)
            grid = isinstance(objective, Probing)  # [G, B, ...]: examples first
            outputs = np.moveaxis(outputs, 0, 1) if grid else outputs
            parts.append((outputs[kept], process_allgather(batch["labels"], tiled=True)[kept]))
        outputs, labels = zip(*parts)
        return np.concatenate(outputs), np.concatenate(labels)


def _plain_labels(kind: str, labels: np.ndarray) -> np.ndarray:
    return labels[:, 0] if kind == "score" else labels


def recipe(exp: Experiment) -> None:
    cfg = exp.config
    if unknown := sorted(set(cfg.methods) - set(METHODS)):
        raise ConfigError(f"config.methods has {unknown}; there are {', '.join(METHODS)}.")
    if cfg.data.kind not in TASKS:
        raise ConfigError(f"config.data.kind={cfg.data.kind!r}; choose one of {', '.join(TASKS)}.")
    tasks = TASKS[cfg.data.kind](cfg)
    if missing := [name for name in (*cfg.sources, *cfg.targets) if name not in tasks]:
        raise ConfigError(f"config: no task {missing}; there are {', '.join(tasks)}.")
    base = backbone(exp, tasks)
    first = Context(exp, tasks, base, ())
    name = cfg.sources[0]
    task = first.task(name)
    batch = first.train("sites", tasks[name].splits["train"]).abstract_batch()
    shapes = jax.eval_shape(lambda k, b: task.init(k, b).params, jax.random.key(0), batch)
    context = first._replace(sites=find_sites(cfg, task, shapes, batch))

    if not cfg.bank:
        for name in cfg.sources:
            objective = stage_one(cfg, first.task(name), base)
            source = tasks[name].splits["train"]
            context.fit(f"source-{name}", objective, name, source, "source")
    scores: dict[str, dict[tuple[str, int], float]] = {}
    for target in cfg.targets:
        for shots in cfg.shots:
            for method, score in adapt(context, target, shots).items():
                scores.setdefault(method, {})[target, shots] = score
    report(context, scores)


def backbone(exp: Experiment, tasks: Mapping[str, Task]) -> PyTree:
    """Parameters of the network with None at its head: read, or trained on a mixture of sources."""
    cfg = exp.config
    if cfg.model.kind == "roberta":
        from transfer_jax.interop import from_pretrained

        named = from_pretrained(
            cfg.backbone, architecture="RobertaForSequenceClassification",
            fresh=("^(pooler|classifier)/",), seed=cfg.seed, scan=cfg.model.scan,
        )  # fmt: skip
        params = {"encoder": named.params}
    elif cfg.bank:
        params = load_variables(Path(cfg.bank) / "stages" / "base", layout=exp.layout).params
    else:
        sources = [tasks[name] for name in cfg.sources]
        length = cfg.fits.base.steps * cfg.batch_size
        mixture = Mixture(
            sources, [t.splits["train"] for t in sources], math.inf, length, exp.seed("mixture")
        )
        module = network(cfg, mixture.spans[-1][2])
        data = Pipeline(mixture, cfg.batch_size, repeat=True, num_threads=0)
        joint = Joint(module=module, spans=mixture.spans)
        params = exp.fit("base", joint, data, cfg.fits.base).params
    return trees.partition(params, HEAD)[1]


def adapt(context: Context, target: str, shots: int) -> dict[str, float]:
    """Stage 2 for one target: test scores by method.

    Args:
      context: the stages' common ground.
      target: name of the task.
      shots: number of examples, 0 = all; the target's own adapter sees the same ones.
    """
    exp, cfg = context.exp, context.exp.config
    splits = context.tasks[target].splits
    label = f"{target}-{shots}" if shots else target
    source: Source = splits["train"]
    if shots:
        source = draw_examples(source, shots, exp.seed(label), per_class=cfg.shots_per_class)
        exp.artifact(f"{label}-examples", lambda: source.indices.tolist())
    task = context.task(target)
    results: dict[str, float] = {}

    def run(method: str, objective: Objective, kind: str, stage: str = "") -> Variables:
        stage = stage or f"{label}-{slug(method)}"
        fitted = context.fit(stage, objective, target, source, kind)
        if method in cfg.methods:
            results[method] = exp.artifact(
                f"{stage}-score",
                lambda: context.score(objective, fitted.variables, target, "test"),
            )
        return fitted.variables

    def combine(method: str, bank: PyTree) -> Objective:
        return stage_two(cfg, method, task, context.base, context.sites, bank)

    # The target's own adapter: the last source. Trained on all data it is one of stage 1.
    stages = [f"source-{name}" for name in cfg.sources if name != target]
    known = not shots and target in cfg.sources
    own = f"source-{target}" if known else f"{label}-adapter"
    if not known:
        run("adapter", stage_one(cfg, task, context.base), "adapter", own)
    workdir = Path(cfg.bank) if cfg.bank else exp.workdir
    others = load_bank(workdir, stages, context.sites, exp.layout)
    target_bank = load_bank(workdir if known else exp.workdir, [own], context.sites, exp.layout)
    if known and "adapter" in cfg.methods:
        results["adapter"] = exp.artifact(f"{label}-score", lambda: _own(context, target, own))
    bank = _joined(others, target_bank)
    _check_sources(exp, label, [*stages, own], bank)

    for method in cfg.methods:
        if method == "head":
            run(method, Trainable(inner=task, frozen=context.base), "head")
        elif method == "full":
            run(method, WarmStart(inner=task, params=context.base), "full")
        elif method == "soup":
            run(method, _soup(context, task, others, target, label, source), "head")
        elif method == "random":
            noise = [
                random_adapters(
                    jax.tree.map(lambda x, i=i: x[:, i], others), exp.key(f"{label}-random-{i}")
                )
                for i in range(len(stages))
            ]  # fmt: skip
            noise_bank = _joined(adapter_fusion.stack_adapters(noise), target_bank)
            run(method, combine(method, noise_bank), "scales")
        elif method == "joint":
            if context.tasks[target].kind != "choices":  # these cannot be mixed with others
                results[method] = _joint(context, target, label, source)
        elif method == "probing":
            results[method] = _probe(context, task, bank, target, label, source)
        elif method != "adapter":
            run(method, combine(method, bank), "fusion" if "fusion" in method else "scales")
    return results


def draw_examples(source: Source, shots: int, seed: int, *, per_class: bool) -> Subset:
    """Few examples of a target: ``shots`` of every class, or in all."""
    if per_class:
        return few_shot(source, shots, seed)
    return Subset(source, np.random.default_rng(seed).choice(len(source), shots, replace=False))


def _joined(first: PyTree, second: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, second)


def _own(context: Context, target: str, stage: str) -> float:
    """The test score of a source's own stage 1."""
    exp = context.exp
    workdir = Path(exp.config.bank) if exp.config.bank else exp.workdir
    variables = load_variables(workdir / "stages" / stage, layout=exp.layout)
    objective = stage_one(exp.config, context.task(target), context.base)
    return context.score(objective, variables, target, "test")


def _check_sources(exp: Experiment, label: str, stages: Sequence[str], bank: PyTree) -> None:
    """Keeps the order and the digests of the sources beside what is learned of them.

    Raises:
      ConfigError: the sources are not those that a run in this directory has used before.
    """
    digests = [digest(jax.tree.map(lambda x, i=i: x[:, i], bank)) for i in range(len(stages))]
    now = [list(pair) for pair in zip(stages, digests)]
    before = exp.artifact(f"{label}-sources", lambda: now)
    if before != now:
        changed = [new[0] for old, new in zip(before, now) if old != new] or stages
        raise ConfigError(
            f"the source adapters {changed} are not those from which {label!r} has been learned in "
            f"{exp.workdir}. Give a new --workdir."
        )


def _soup(
    context: Context, task: Objective, others: PyTree, target: str, label: str, source: Source
) -> Objective:
    """A head on the frozen average of the adapters whose tasks' inputs resemble the target's.

    The paper embeds texts with a sentence encoder; here the frozen network's own mean features do.
    """
    exp, cfg = context.exp, context.exp.config
    names = [name for name in cfg.sources if name != target]

    def mean(name: str, source: Source) -> np.ndarray:
        task = context.task(name)
        drawn = task.init(exp.key("soup"), context.train("soup", source).example_batch())
        params = trees.combine(trees.partition(drawn.params, HEAD)[0], context.base)
        compute = jax.jit(
            lambda task, params, batch: task.apply(
                Variables(params, {}), batch, None, method="features"
            )[0]
        )
        few = Pipeline(_first(source, 10_000), cfg.eval_batch_size, num_threads=0)
        sums = [
            jnp.sum(compute(task, params, batch) * batch["mask"][:, None], axis=0)
            for batch in exp.batches(few)
        ]
        return np.asarray(sum(sums)) / min(len(source), 10_000)

    def similarities() -> list[float]:
        """Cosines of mean features."""
        one = mean(target, source)
        every = [mean(name, context.tasks[name].splits["train"]) for name in names]
        return [float(x @ one / np.linalg.norm(x) / np.linalg.norm(one)) for x in every]

    weights = adapter_fusion.soup_weights(
        jnp.asarray(exp.artifact(f"{label}-similarities", similarities)), cfg.soup_top
    )
    soup = adapter_fusion.stack_adapters([adapter_fusion.average_adapters(others, weights)])
    one = jnp.ones((1, 1, 1))
    return stage_two(cfg, "soup", task, context.base, context.sites, soup, fixed=one)


def _first(source: Source, count: int) -> Source:
    return source if len(source) <= count else Subset(source, np.arange(count))


def _joint(context: Context, target: str, label: str, source: Source) -> float:
    """One adapter for all tasks at once, with a head for each; the test score on the target."""
    exp, cfg = context.exp, context.exp.config
    names = [name for name in cfg.sources if name != target] + [target]
    names = [name for name in names if context.tasks[name].kind != "choices"]
    tasks = [context.tasks[name] for name in names]
    sources = [context.tasks[name].splits["train"] for name in names[:-1]] + [source]
    length = cfg.fits.joint.steps * cfg.batch_size
    stage = f"{label}-joint"
    mixture = Mixture(tasks, sources, cfg.joint_temperature, length, exp.seed(stage))
    inner = Joint(module=network(cfg, mixture.spans[-1][2]), spans=mixture.spans)
    objective = stage_one(cfg, inner, context.base)
    data = Pipeline(mixture, cfg.batch_size, repeat=True, num_threads=cfg.data.threads)
    fitted = exp.fit(stage, objective, data, cfg.fits.joint)
    span = mixture.spans[-1][1:]
    return exp.artifact(
        f"{stage}-score", lambda: context.score(objective, fitted.variables, target, "test", span)
    )


def _probe(
    context: Context, task: Objective, bank: PyTree, target: str, label: str, source: Source
) -> float:
    """Fixed scales of the target's own adapter and of the source that validates best with it.

    Keeps a table of the best pairs, chosen on validation data, and returns the test score of the
    first.
    """
    exp, cfg = context.exp, context.exp.config
    grid = probing_grid(cfg.probing, bank["down"]["kernel"].shape[1])
    one = jnp.ones((1, 1, 1))
    inner = stage_two(cfg, "probing", task, context.base, context.sites, bank, fixed=one)
    objective = Probing(inner=inner, grid=jnp.asarray(grid))
    stage = f"{label}-probing"
    fit = from_dict(FitConfig, cfg.fits.probing, "fits.probing")
    fitted = exp.fit(stage, objective, context.train(stage, source), fit)
    kind, metric = context.tasks[target].kind, METRICS[context.tasks[target].metric]

    def scores() -> dict[str, list[float]]:
        every = {}
        for split in ("validation", "test"):
            outputs, labels = context.outputs(objective, fitted.variables, target, split)
            every[split] = [
                metric(decide(kind, outputs[:, g]), _plain_labels(kind, labels))
                for g in range(len(grid))
            ]
        return every

    found = exp.artifact(f"{stage}-scores", scores)
    best = np.argsort(-np.asarray(found["validation"]), kind="stable")[:5]
    names = [*(name for name in cfg.sources if name != target), "own"]
    rows = []
    for g in best:
        other = int(np.argmax(grid[g, :-1]))
        rows.append(
            [
                names[other],
                *(round(float(x), 2) for x in (grid[g, other], grid[g, -1])),
                round(float(grid[g].sum()), 2),
                found["validation"][g],
                found["test"][g],
            ]
        )
    exp.table(
        f"Fixed scales for {label!r}, best on validation data",
        ["source", "its scale", "own scale", "sum", "validation", "test"], rows,
    )  # fmt: skip
    return found["test"][int(best[0])]


def probing_grid(values: Sequence[float], sources: int) -> np.ndarray:
    """All pairs of values for the last source and one other: float32 [G, sources]."""
    rows = []
    for other in range(sources - 1):
        for first in values:
            for own in values:
                row = np.zeros(sources, np.float32)
                row[other], row[-1] = first, own
                rows.append(row)
    return np.stack(rows)


def report(context: Context, scores: Mapping[str, Mapping[tuple[str, int], float]]) -> None:
    """Tables of test scores, of what was learned, and of what the paper requires."""
    exp, cfg = context.exp, context.exp.config
    cells = [(target, shots) for target in cfg.targets for shots in cfg.shots]
    names = [f"{t}, k = {k}" if k else t for t, k in cells]
    means = {
        method: {
            k: float(np.mean([row[t, k] for t in cfg.targets if (t, k) in row]))
            for k in cfg.shots
        }
        for method, row in scores.items()
    }  # fmt: skip
    rows = [
        [method, *(round(row[cell], 4) if cell in row else "" for cell in cells)]
        for method, row in scores.items()
    ]
    exp.table("Test scores", ["method", *names], rows)
    exp.table(
        "Mean over targets", ["method", *(f"k = {k}" if k else "all" for k in cfg.shots)],
        [[method, *(round(x, 4) for x in row.values())] for method, row in means.items()],
    )  # fmt: skip
    for method, row in means.items():
        for k, score in row.items():
            exp.record(f"k = {k}, {method}", score)
    sites, features = adapter_fusion.count_sites(context.sites), context.sites[0].outputs[0]
    sources = len({*cfg.sources, cfg.targets[0]})
    counts = adapter_fusion.transfer_parameters(sites, sources, features)
    exp.table(
        f"Parameters beside the head, {sources} sources", ["method", "parameters"],
        [[name, count] for name, count in counts.items()],
    )  # fmt: skip
    _required(exp, means)


def _required(exp: Experiment, means: Mapping[str, Mapping[int, float]]) -> None:
    """The table of what should hold of the means over targets."""
    few, many = min(exp.config.shots), max(exp.config.shots)
    rows = []
    for method in ("scalearn", "uniform"):
        for other, k, margin in (
            ("fusion", few, 0.03), ("fusion", many, 0.01), ("adapter", few, 0.03),
            ("random", few, 0.0),
        ):  # fmt: skip
            if method in means and other in means:
                gap = means[method][k] - means[other][k]
                what = f"{method} - {other}, k = {k}"
                bound = f">= {margin:g}" if margin else "> 0"
                holds = gap >= margin if margin else gap > 0
                rows.append([what, round(gap, 4), bound, "yes" if holds else "no"])
    if rows:
        exp.table("Required", ["what", "measured", "bound", "holds"], rows)


# -- ahead of time ----------------------------------------------------------------------------


def plan(
    config: Any, name: str, method: str
) -> tuple[Objective, dict[str, jax.ShapeDtypeStruct], FitConfig]:
    """What a method would run for a target of a published config, without its data.

    Args:
      config: of the kind 'tokens'.
      name: of the task.
      method: 'adapter', 'fusion', 'static_fusion', 'head', 'full', or a variant of the scales.

    Returns:
      The objective (its arrays ``jax.ShapeDtypeStruct``), a batch, and the settings of the stage,
      for ``training.aot.lower_step``.
    """
    t = config.data.tasks[name]
    task = Task(t.kind, t.outputs, t.metric, {}, t.epochs)
    choices = (t.choices,) if t.kind == "choices" else ()
    size = config.batch_size
    labels = {"score": (1,), "labels": (t.outputs,)}.get(t.kind, ())
    batch = {
        "inputs": jax.ShapeDtypeStruct((size, *choices, t.length), jnp.int32),
        "lengths": jax.ShapeDtypeStruct((size, *choices), jnp.int32),
        "labels": jax.ShapeDtypeStruct((size, *labels), jnp.float32 if labels else jnp.int32),
    }
    inner = objective_of(task, network(config, t.outputs, choices=t.kind == "choices"))
    params = jax.eval_shape(lambda k, b: inner.init(k, b).params, jax.random.key(0), batch)
    sites = find_sites(config, inner, params, batch)
    sources = len(set(config.sources) | {name})

    def build(params: PyTree, key: Array) -> Objective:
        base = trees.partition(params, HEAD)[1]
        if method == "full":
            return WarmStart(inner=inner, params=base)
        if method == "head":
            return Trainable(inner=inner, frozen=base)
        if method == "adapter":
            return stage_one(config, inner, base)
        count, features = adapter_fusion.count_sites(sites), sites[0].outputs[0]
        one = adapter_fusion.init_adapter(key, count, features, config.adapter.bottleneck)
        bank = adapter_fusion.stack_adapters([one] * sources)
        return stage_two(config, method, inner, base, sites, bank)

    objective = jax.eval_shape(build, params, jax.random.key(0))
    kind = "fusion" if "fusion" in method else method
    kind = kind if kind in config.fits else "scales"
    return objective, batch, settings(config, kind, task, t.size)
