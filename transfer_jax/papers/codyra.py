"""CoDyRA: dynamic rank-selective LoRA for continual learning of CLIP (Lu et al., 2412.01004).

One image-text model learns a stream of tasks without replay and without growing. For each task
every adapted matrix gets a low-rank change with a learned importance per rank,
``W + B diag(w) A``. After half of the steps a soft threshold follows each update of w, which sets
ranks to exactly zero where they earn little; what is left is merged into W, and the next task
starts with new factors.

The recipe trains a base model, then runs ``config.methods`` over the stream and scores every model
on every set after every task:

* ``zero_shot``: the base model as it is;
* ``full``, ``wise_ft``, ``lwf``: all parameters; interpolated with those before the task; held by
  the predictions of the model before the task;
* ``lora``: the same low-rank changes without gates, at the ranks ``config.lora.ranks``;
* ``codyra``: a sweep over the largest threshold; 0 is LoRA with gates that nothing prunes;
* ``l1``: the penalty ``strength * sum |w|`` in place of the thresholds;
* ``joint``: all tasks at once, the upper bound.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from transfer_jax import trees
from transfer_jax.configuration import ConfigError
from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.registry import load
from transfer_jax.data.sources import ArraySource, CachedSource, Example, Source, take
from transfer_jax.data.splits import Concatenation, Mapped, Subset, few_shot
from transfer_jax.data.tfds import tfds_source
from transfer_jax.interop import from_pretrained, load_tokenizer
from transfer_jax.metrics import continual
from transfer_jax.models import ResidualMLP, SequenceClassifier
from transfer_jax.models.clip import Clip, clip_vit_b
from transfer_jax.objectives import (
    Distilled,
    Objective,
    PenalizedObjective,
    ReparameterizedObjective,
    Variables,
    WarmStart,
)
from transfer_jax.objectives.contrastive import ImageTextClassification, ZeroShotClassification
from transfer_jax.training import Experiment, FitConfig
from transfer_jax.training.config import from_dict
from transfer_jax.trees.paths import leaf_key, map_with_path, path_str

Array = jax.Array
PyTree = Any

PROX = ("released", "exact")
METHODS = ("zero_shot", "full", "wise_ft", "lwf", "lora", "codyra", "l1", "joint")
PLACEMENTS = ("all", "image", "text")


# -- thresholds -------------------------------------------------------------------------------


def shrink(w: Array, kappa: Array | float, prox: str = "released") -> Array:
    """Soft thresholding of importance weights, elementwise.

    "exact" is the proximal operator of ``kappa |w|``, ``sign(w) max(|w| - kappa, 0)``. "released"
    is what the authors' program does: it shrinks by kappa and then zeroes what is below kappa, so
    that everything below ``2 kappa`` becomes zero.

    Args:
      w: any shape.
      kappa: scalar >= 0; 0 changes nothing.
      prox: one of ``PROX``.
    """
    if prox not in PROX:
        raise ValueError(f"prox={prox!r}; choose one of {', '.join(PROX)}.")
    least = kappa if prox == "exact" else 2 * kappa
    keep = jnp.abs(w) > least if prox == "exact" else jnp.abs(w) >= least
    return jnp.where(keep, w - jnp.sign(w) * kappa, 0.0)


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """The threshold of every step: none at first, then a linear rise in ``levels`` levels.

    The level rises by one every ``floor((1 - dense) steps / levels)`` steps from step
    ``dense * steps`` on, to the last of ``linspace(0, largest, levels)``; thresholds are applied
    after the updates of the steps beyond ``dense * steps``, counted from 0.

    Attributes:
      steps: T, of a task.
      levels: of the table, at least 2.
      dense: share of the steps without thresholds.

    Raises:
      ValueError: too few steps for the levels.
    """

    steps: int
    levels: int = 50
    dense: float = 0.5

    def __post_init__(self):
        if not 0 <= self.dense < 1 or self.levels < 2 or self._period() < 1:
            raise ValueError(
                f"thresholds in {self.levels} levels over the last {1 - self.dense:g} of "
                f"{self.steps} steps: there must be 2 levels or more, and a step for each."
            )

    def _period(self) -> int:
        return int((1 - self.dense) * self.steps / self.levels + 1e-9)

    def at(self, step: Array | int, largest: Array | float) -> Array:
        """The threshold after the update of a step.

        Args:
          step: int, counted from 0; any shape.
          largest: kappa_max.
        """
        first = int(self.dense * self.steps + 1e-9)
        step = jnp.asarray(step)
        level = jnp.clip(1 + (step - first) // self._period(), 0, self.levels - 1)
        return jnp.where(step > first, largest * (level / (self.levels - 1)), 0.0)

    def table(self, largest: float) -> np.ndarray:
        """The threshold of every step, float64 [steps]."""
        return np.asarray(self.at(jnp.arange(self.steps), largest), np.float64)

    def total(self, largest: float) -> float:
        """The sum of all thresholds: by how much a weight shrinks that survives."""
        return float(self.table(largest).sum())

    def null_share(self, largest: float, prox: str = "released") -> float:
        """The share of ranks that survive without any gradient, w being N(0, 1) at first.

        The null model of every statement about ranks: what initialisation and thresholds alone do.
        """
        from scipy.stats import norm

        kappas = self.table(largest)
        needed = np.cumsum(kappas) + (0.0 if prox == "exact" else kappas)
        return float(2 * norm.sf(needed.max()))


# -- gated low-rank changes -------------------------------------------------------------------


class GatedLowRank(ReparameterizedObjective):
    """``W = W0 + B diag(w) A`` in every adapted matrix, with thresholds on w (section 3).

    The parameters are a tree like that of the inner objective, with ``{"a", "b", "w"}`` at the
    adapted leaves and None elsewhere: a [..., in, rank], b [..., rank, out], w [..., rank]; kernels
    are [in, out], so a is the paper's A transposed. At first a is uniform within
    ``1 / sqrt(in)``, b zero and w standard normal. Ranks whose weight is zero have no influence but
    may come back: their gradient is ``<dL/dW, b_i a_i>``. Build with ``GatedLowRank.of``.

    Attributes:
      inner: the objective.
      base: its parameters W0, carried.
      largest: kappa_max of the thresholds; 0 = none.
      kappa: the threshold of the present step; ``at`` sets it.
      where: regular expressions of the adapted leaves.
      axes: (pattern, layout) of leaves that are not [..., in, out]. A layout has a letter for each
        axis: b (each index is a matrix of its own), i (input), o (output), so that "ioo" is
        [in, heads, head_dim]. ":3" at the end says that the last axis holds three outputs one
        after the other, of matrices of their own ("io:3", a fused query, key and value).
      rank: r, of every matrix.
      thresholds: see ``Thresholds``; None = none.
      prox: see ``shrink``.
      gated: False = no w: LoRA with scale 1.
    """

    base: PyTree
    largest: Array | float = 0.0
    kappa: Array | float = 0.0
    where: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    axes: tuple[tuple[str, str], ...] = flax.struct.field(pytree_node=False, default=())
    rank: int = flax.struct.field(pytree_node=False, default=16)
    thresholds: Thresholds | None = flax.struct.field(pytree_node=False, default=None)
    prox: str = flax.struct.field(pytree_node=False, default="released")
    gated: bool = flax.struct.field(pytree_node=False, default=True)

    @classmethod
    def of(
        cls,
        inner: Objective,
        params: PyTree,
        where: str | Sequence[str],
        *,
        rank: int = 16,
        axes: Sequence[tuple[str, str]] = (),
        largest: float = 0.0,
        thresholds: Thresholds | None = None,
        prox: str = "released",
        gated: bool = True,
    ) -> "GatedLowRank":
        """Adapts ``params`` at ``where``; see the class.

        Raises:
          ValueError: ``where`` matches nothing, an unknown ``prox``, thresholds without gates.
        """
        patterns = (where,) if isinstance(where, str) else tuple(where)
        trees.select(params, list(patterns))
        if prox not in PROX:
            raise ValueError(f"prox={prox!r}; choose one of {', '.join(PROX)}.")
        if thresholds is not None and not gated:
            raise ValueError("thresholds act on the gates w: they need gated=True.")
        return cls(
            inner=inner, base=params, largest=largest, where=patterns,
            axes=tuple((pattern, layout) for pattern, layout in axes), rank=rank,
            thresholds=thresholds, prox=prox, gated=gated,
        )  # fmt: skip

    def initial_params(self, rng: Array, inner_params: PyTree) -> PyTree:
        del inner_params
        factors = trees.lora_init(self._matrices(self.base), list(self.where), self.rank, rng)

        def draw(kp: tuple[Any, ...], pair: dict[str, Array]) -> dict[str, Array]:
            a, b = pair["a"], pair["b"]
            key_a, key_w = jax.random.split(leaf_key(rng, path_str(kp)))
            bound = a.shape[-2] ** -0.5
            drawn = {"a": jax.random.uniform(key_a, a.shape, a.dtype, -bound, bound), "b": b}
            if self.gated:
                drawn["w"] = jax.random.normal(key_w, (*a.shape[:-2], self.rank), jnp.float32)
            return drawn

        return jax.tree_util.tree_map_with_path(draw, factors, is_leaf=_is_factors)

    def inner_params(self, params: PyTree) -> PyTree:
        pairs = jax.tree.map(_weighted, params, is_leaf=_is_factors)
        merged = trees.lora_merge(self._matrices(self.base), pairs)
        return map_with_path(
            lambda path, x, like: _from_matrix(x, self._layout(path), like.shape), merged, self.base
        )

    def at(self, step: Array) -> "GatedLowRank":
        kappa = 0.0 if self.thresholds is None else self.thresholds.at(step, self.largest)
        return self.replace(inner=self.inner.at(step), kappa=kappa)

    def proximal(self, params: PyTree, learning_rate: Array) -> PyTree:
        """Applies the threshold of the step to every w; the optimiser's moments stay."""
        del learning_rate
        if self.thresholds is None:
            return params
        return map_with_path(
            lambda path, x: shrink(x, self.kappa, self.prox) if path.endswith("/w") else x, params
        )

    def _layout(self, path: str) -> str | None:
        return next((layout for pattern, layout in self.axes if re.search(pattern, path)), None)

    def _matrices(self, tree: PyTree) -> PyTree:
        return map_with_path(lambda path, x: _to_matrix(path, x, self._layout(path)), tree)


class GatePenalty(PenalizedObjective):
    """``strength * sum |w|`` in the loss, in place of thresholds: the ablation of section 3."""

    def penalty(self, params: PyTree) -> Array:
        return jnp.concatenate([jnp.abs(w).ravel() for w in gates(params).values()]).sum()


def gates(params: PyTree) -> dict[str, Array]:
    """Path of every adapted leaf -> its importance weights w, [..., rank]."""
    return {
        path_str(kp): node["w"]
        for kp, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_factors)
    }


def active_ranks(params: PyTree) -> dict[str, np.ndarray]:
    """Path of every adapted leaf -> how many ranks of each of its matrices are not zero, [...]."""
    return {path: np.asarray((w != 0).sum(axis=-1)) for path, w in gates(params).items()}


def prune(params: PyTree) -> PyTree:
    """Returns the factors of the active ranks alone, w multiplied into ``a``.

    Args:
      params: of a ``GatedLowRank``, outside of compiled code.

    Returns:
      A tree of ``{"a": [..., in, k], "b": [..., k, out]}`` for ``trees.lora_merge``, k being the
      number of ranks that are active in any matrix of the leaf (it may be 0).
    """

    def cut(node: dict[str, Array]) -> dict[str, Array]:
        w = np.asarray(node["w"])
        kept = np.flatnonzero((w != 0).reshape(-1, w.shape[-1]).any(axis=0))
        pair = _weighted(node)
        return {"a": pair["a"][..., kept], "b": pair["b"][..., kept, :]}

    return jax.tree.map(cut, params, is_leaf=_is_factors)


def _is_factors(node: Any) -> bool:
    return isinstance(node, dict) and {"a", "b"} <= node.keys() <= {"a", "b", "w"}


def _weighted(node: dict[str, Array]) -> dict[str, Array]:
    if "w" not in node:
        return node
    return {"a": node["a"] * node["w"][..., None, :], "b": node["b"]}


def _expanded(shape: tuple[int, ...], layout: str) -> tuple[tuple[int, ...], str]:
    """Gives parts an axis: ((in, 3 * out), "io:3") -> ((in, 3, out), "ibo")."""
    letters, _, parts = layout.partition(":")
    if parts:
        shape, letters = (*shape[:-1], int(parts), -1), letters[:-1] + "b" + letters[-1]
    return shape, letters


def _order(letters: str) -> list[int]:
    return sorted(range(len(letters)), key=lambda i: "bio".index(letters[i]))


def _to_matrix(path: str, x: Array, layout: str | None) -> Array:
    """Brings a leaf to [in, out], or [matrices, in, out]."""
    if layout is None:
        return x
    if not re.fullmatch(r"[bio]+(:\d+)?", layout) or len(layout.split(":")[0]) != x.ndim:
        raise ValueError(
            f"the layout {layout!r} does not fit leaf {path!r} of shape {x.shape}: give a letter "
            "b, i or o for each axis, such as 'ioo'."
        )
    shape, letters = _expanded(x.shape, layout)
    x = x.reshape(shape).transpose(_order(letters))
    sizes = [1, 1, 1]
    for letter, size in zip(sorted(letters, key="bio".index), x.shape):
        sizes["bio".index(letter)] *= size
    return x.reshape(sizes if "b" in letters else sizes[1:])


def _from_matrix(x: Array, layout: str | None, shape: tuple[int, ...]) -> Array:
    """The inverse of ``_to_matrix``."""
    if layout is None:
        return x
    expanded, letters = _expanded(shape, layout)
    if -1 in expanded:
        expanded = (*expanded[:-1], shape[-1] // expanded[-2])
    order = _order(letters)
    return x.reshape([expanded[i] for i in order]).transpose(np.argsort(order)).reshape(shape)


# -- models -----------------------------------------------------------------------------------


class TwoTower(nn.Module):
    """Two towers with a common embedding: a CLIP out of any parts.

    Attributes:
      image: maps ``(inputs, train=...)`` to [B, D].
      text: maps int32 tokens [C, L] (0 = padding, at the end) and ``lengths``, ``train`` to [C, D].
      scale: by which cosines are multiplied; the parameter ``logit_scale`` starts at its logarithm.
    """

    image: nn.Module
    text: nn.Module
    scale: float = 100.0

    def setup(self):
        self.logit_scale = self.param(
            "logit_scale", nn.initializers.constant(np.log(self.scale)), ()
        )

    def __call__(self, inputs: Array, tokens: Array, *, train: bool = False) -> tuple[Array, Array]:
        """Features of images [B, ...] and texts [C, L]: [B, D] and [C, D], not normalised."""
        return self.encode_image(inputs, train=train), self.encode_text(tokens, train=train)

    def encode_image(self, inputs: Array, *, train: bool = False) -> Array:
        return self.image(inputs, train=train)

    def encode_text(self, tokens: Array, *, train: bool = False) -> Array:
        # A row of padding alone keeps one position: attention over none is not a number.
        lengths = jnp.maximum((tokens != 0).sum(axis=-1), 1)
        return self.text(tokens, lengths=lengths, train=train)


class Prototypes(nn.Module):
    """In place of a text tower: a random vector for every text, without parameters.

    Attributes:
      embedding: D.
    """

    embedding: int

    def __call__(
        self, tokens: Array, *, lengths: Array | None = None, train: bool = False
    ) -> Array:
        """Maps int tokens [C, L] to [C, D]; equal rows to equal vectors."""
        del lengths, train

        def draw(row: Array) -> Array:
            key = jax.random.key(0)
            for i in range(row.shape[0]):
                key = jax.random.fold_in(key, row[i])
            return jax.random.normal(key, (self.embedding,))

        return jax.vmap(draw)(tokens)


class Model(NamedTuple):
    """A model and how it reads texts.

    Attributes:
      module: the two towers.
      params: as they were read; None = to be trained first.
      tokens: of the texts of each set, int32 [C, L].
    """

    module: nn.Module
    params: PyTree
    tokens: tuple[np.ndarray, ...]


def make_model(config: Any, sets: Sequence[Sequence[str]]) -> Model:
    """Builds or reads ``config.model``.

    Args:
      config: of the experiment.
      sets: for each set the texts of its classes.

    Raises:
      ConfigError: an unknown kind.
      FileNotFoundError: there is no pretrained model at ``config.model.path``.
    """
    model = config.model
    if model.kind == "clip":
        read = from_pretrained(model.path, architecture="CLIPModel", **_compute(config))
        tokeniser = load_tokenizer(model.path, max_length=77)
        inputs = tokeniser([text for texts in sets for text in texts]).inputs
        ends = np.cumsum([len(texts) for texts in sets])[:-1]
        return Model(read.module, read.params, tuple(np.split(inputs, ends)))
    tokens, vocab_size = tokenise(sets)
    towers: dict[str, Callable[[], nn.Module]] = {
        "two_tower": lambda: SequenceClassifier(
            num_classes=model.embedding, vocab_size=vocab_size, mixer="attention",
            mixer_options={"causal": False, "num_heads": model.text.num_heads},
            pattern=("mixer", "ffn"), ffn_options={"expand": model.text.expand},
            features=model.text.features, depth=model.text.depth,
            max_positions=tokens[0].shape[1],
        ),
        "prototypes": lambda: Prototypes(model.embedding),
    }  # fmt: skip
    if model.kind not in towers:
        raise ConfigError(
            f"config.model.kind={model.kind!r}; choose one of clip, {', '.join(towers)}."
        )
    image = ResidualMLP(model.embedding, **model.image.to_dict())
    return Model(TwoTower(image, towers[model.kind](), model.scale), None, tuple(tokens))


def _compute(config: Any) -> dict[str, Any]:
    """How CLIP computes, from the config."""
    dtype = jnp.dtype(config.model.dtype)
    return {"scan": config.model.scan, "remat": config.model.remat, "compute_dtype": dtype}


# -- data -------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A set of images and the texts that name its classes.

    Attributes:
      name: of the set.
      train, test: ``inputs`` and ``labels`` in [0, C).
      prompts: C texts.
    """

    name: str
    train: Source
    test: Source
    prompts: tuple[str, ...]


def _shifted(source: Source, offset: int) -> Source:
    """The same examples with labels in a common space."""
    return Mapped(
        source, lambda e: {**e, "labels": (e["labels"] + offset).astype(np.int32)}, batched=True
    )


class Stream(NamedTuple):
    """The sets that the base model is trained on, and the tasks in their order."""

    base: tuple[Task, ...]
    tasks: tuple[Task, ...]


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _shuffled(x: np.ndarray) -> np.ndarray:
    """Cuts images into 4 x 4 blocks and puts these in another, fixed order."""
    count, height, width, channels = x.shape
    h, w = height // 4, width // 4
    blocks = (
        x.reshape(count, 4, h, 4, w, channels).swapaxes(2, 3).reshape(count, 16, h, w, channels)
    )
    blocks = blocks[:, np.random.default_rng(0).permutation(16)]
    return blocks.reshape(count, 4, 4, h, w, channels).swapaxes(2, 3).reshape(x.shape)


# Adjective -> what is done to images [N, H, W, 1] in [0, 1].
STYLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "plain": lambda x: x,
    "mirrored": lambda x: x[:, :, ::-1],
    "inverted": lambda x: 1 - x,
    "turned": lambda x: np.rot90(x, axes=(1, 2)),
    "shuffled": _shuffled,
    "inverted turned": lambda x: 1 - np.rot90(x, axes=(1, 2)),
    "checkered": lambda x: np.abs(x - np.indices(x.shape[1:3]).sum(axis=0)[..., None] % 2),
}


def _styled(style: str, splits: Mapping[str, dict[str, np.ndarray]], shots: int, seed: int) -> Task:
    """Digits in a style; ``shots`` images per class of "train", 0 = all."""
    sources = {
        name: ArraySource(
            {"inputs": STYLES[style](x["inputs"]).astype(np.float32), "labels": x["labels"]}
        )
        for name, x in splits.items()
    }
    train = sources["train"]
    if shots:
        train = _arrays(few_shot(train, shots, seed))
    prompts = tuple(f"{style} digit {name}" for name in DIGITS)
    return Task(style.replace(" ", "_"), train, sources["test"], prompts)


def _arrays(source: Source) -> ArraySource:
    return ArraySource(take(source, np.arange(len(source))))


def _digits(exp: Experiment) -> Stream:
    """scikit-learn's digits in several styles; nothing else is read."""
    cfg = exp.config
    for style in (*cfg.data.base, *cfg.data.tasks):
        if style not in STYLES:
            raise ConfigError(f"config.data: no style {style!r}; there are {sorted(STYLES)}.")
    splits = {
        name: take(source, np.arange(len(source)))
        for name, source in load("digits", seed=cfg.seed).splits.items()
    }

    def tasks(styles: Sequence[str], shots: int) -> tuple[Task, ...]:
        return tuple(_styled(s, splits, shots, exp.seed(f"shots/{s}")) for s in styles)

    return Stream(tasks(cfg.data.base, 0), tasks(cfg.data.tasks, cfg.data.shots))


def _handwriting(exp: Experiment) -> Stream:
    """MNIST's test part, two Omniglot alphabets and the UCI digits, all of 28 x 28 pixels."""
    cfg = exp.config
    mnist = {
        name: take(source, np.arange(len(source)))
        for name, source in load("mnist_t10k", sequence=False, seed=cfg.seed).splits.items()
    }
    shots, seed = cfg.data.shots, exp.seed("shots")
    styled = {
        style: _styled(style, mnist, shots if style != "plain" else 0, seed)
        for style in ("plain", "inverted turned", "shuffled")
    }
    return Stream(
        (styled["plain"], _omniglot("Latin", 0, seed)),
        (
            styled["inverted turned"], styled["shuffled"], _optdigits(shots, seed),
            _omniglot("Greek", shots, seed),
        ),
    )  # fmt: skip


def _omniglot(alphabet: str, shots: int, seed: int) -> Task:
    """One alphabet; 5 of the 20 people who drew it test."""
    bundle = load("omniglot8", alphabet=alphabet)
    train = bundle.splits["train"]
    if shots and shots < 15:
        train = few_shot(train, shots, seed)
    count = bundle.info.num_classes or 0
    prompts = tuple(f"{alphabet} letter {alphabet}{i}" for i in range(count))
    return Task(alphabet, _arrays(train), _arrays(bundle.splits["test"]), prompts)


def _optdigits(shots: int, seed: int) -> Task:
    """The UCI digits; 13 other writers test."""
    splits = load("optdigits", enlarged=True).splits
    train = _arrays(few_shot(splits["train"], shots, seed))
    prompts = tuple(f"scanned digit {name}" for name in DIGITS)
    return Task("optdigits", train, _arrays(splits["test"]), prompts)


def _published(exp: Experiment) -> Stream:
    """The sets of ``config.data.sets``, prepared by TensorFlow Datasets; there is no base set.

    Few-shot sets are drawn from the training split; a class with fewer images gives all it has.
    """
    cfg = exp.config

    def pixels(example: Mapping[str, Any]) -> Example:
        image = clip_image(example["image"], cfg.model.image_size)
        return {"inputs": image, "labels": np.int32(example["label"])}

    def normalised(example: Example) -> Example:
        x = example["inputs"].astype(np.float32) / np.float32(255)
        return {**example, "inputs": (x - CLIP_MEAN) / CLIP_DEVIATION}

    tasks = []
    for name, source, classes, template, *splits in cfg.data.sets:
        train, test = (tfds_source(source, split, cfg.data.directory or None) for split in splits)
        names = train.dataset_info.features["label"].names  # type: ignore[attr-defined]
        if len(names) != classes:
            raise ConfigError(
                f"config.data.sets: {source!r} has {len(names)} classes, not {classes}."
            )

        def draw(train: Source = train, name: str = name) -> list[int]:
            labels = np.array([int(example["label"]) for example in train])  # type: ignore
            return at_most(labels, cfg.data.shots, exp.seed(f"shots/{name}")).tolist()

        kept = np.array(exp.artifact(f"shots-{name}", draw))
        few = CachedSource(Mapped(Subset(train, kept), pixels))
        tasks.append(
            Task(
                name, Mapped(few, normalised, batched=True),
                Mapped(Mapped(test, pixels), normalised, batched=True),
                tuple(template.format(n.replace("_", " ")) for n in names),
            )
        )  # fmt: skip
    return Stream((), tuple(tasks))


def at_most(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Positions of ``shots`` examples of every class, of all where a class has fewer; [K] ints."""
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(labels == c))[:shots] for c in np.unique(labels)]
    return rng.permutation(np.concatenate(chosen))


CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def clip_image(image: np.ndarray, size: int) -> np.ndarray:
    """Brings an image to the square that CLIP sees: bicubic to the short side, then the centre.

    Args:
      image: uint8 [H, W, 1 or 3].
      size: of the square.

    Returns:
      uint8 [size, size, 3].
    """
    from PIL import Image

    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).convert("RGB")
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))


STREAMS: dict[str, Callable[[Experiment], Stream]] = {
    "digits": _digits,
    "handwriting": _handwriting,
    "published": _published,
}


def tokenise(sets: Sequence[Sequence[str]]) -> tuple[list[np.ndarray], int]:
    """Turns texts into tokens, a token being a word.

    Args:
      sets: for each set its texts.

    Returns:
      int32 [C, L] for each set, padded with 0 to the longest text of any set; and the size of the
      vocabulary.
    """
    words = sorted({word for texts in sets for text in texts for word in text.split()})
    ids = {word: i + 1 for i, word in enumerate(words)}
    length = max(len(text.split()) for texts in sets for text in texts)
    rows = [[[ids[word] for word in text.split()] for text in texts] for texts in sets]
    padded = [
        np.asarray([row + [0] * (length - len(row)) for row in part], np.int32) for part in rows
    ]
    return padded, len(ids) + 1


# -- scores -----------------------------------------------------------------------------------


def label_spaces(sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """How the classes of several sets lie in one label space (X-TAIL).

    A class name that two sets share is two classes there, and only the set's own one is right.

    Args:
      sizes: number of classes of each set.

    Returns:
      The first class of each set, [K]; and which classes are a set's own, bool [K, sum of sizes].
    """
    first = np.concatenate([[0], np.cumsum(sizes)])
    at = np.arange(first[-1])
    return first[:-1], (at >= first[:-1, None]) & (at < first[1:, None])


class Scores(NamedTuple):
    """Accuracies on all sets after each task.

    Attributes:
      own: [N, K], among the classes of the set (MTIL: the domain is known).
      union: [N, K], among the classes of all sets (X-TAIL: it is not).
    """

    own: np.ndarray
    union: np.ndarray


class History(NamedTuple):
    """What a method left behind.

    Attributes:
      scores: on the base's sets, then the tasks.
      drift: ``||theta_N - theta_0||_F``.
      updates: ``||theta_t - theta_{t-1}||_F`` of each task.
      trained: number of parameters that the optimiser had.
      ranks: for each task, path -> active ranks; empty without gates.
    """

    scores: Scores
    drift: float
    updates: list[float]
    trained: int
    ranks: list[dict[str, int]]


# -- recipe -----------------------------------------------------------------------------------


class Learned(NamedTuple):
    """What a method made of one task: parameters, number trained, active ranks by path."""

    params: PyTree
    trained: int
    ranks: dict[str, int]


Learner = Callable[[str, int, PyTree], Learned]  # (stage, task, parameters before) -> after


@dataclasses.dataclass(frozen=True, eq=False)
class Laboratory:
    """The model, the data and what the methods have in common.

    Attributes:
      exp: the experiment.
      stream: the sets.
      model: its ``tokens`` are those of the base's sets, then of the tasks.
    """

    exp: Experiment
    stream: Stream
    model: Model

    @classmethod
    def of(cls, exp: Experiment) -> "Laboratory":
        """Reads the data and builds the model."""
        cfg = exp.config
        if cfg.data.kind not in STREAMS:
            raise ConfigError(
                f"config.data.kind={cfg.data.kind!r}; choose one of {', '.join(sorted(STREAMS))}."
            )
        stream = STREAMS[cfg.data.kind](exp)
        model = make_model(cfg, [task.prompts for task in (*stream.base, *stream.tasks)])
        return cls(exp, stream, model)

    def train(self, stage: str, source: Source) -> Pipeline:
        """Endless shuffled batches."""
        size, seed = self.exp.config.batch_size, self.exp.seed(stage)
        return Pipeline(source, size, shuffle=True, seed=seed, repeat=True)

    def union(self, tasks: Sequence[Task], tokens: Sequence[np.ndarray]) -> tuple[Source, Array]:
        """The training images of several sets with labels in one space, and its texts."""
        first, _ = label_spaces([len(t) for t in tokens])
        parts = [_shifted(task.train, offset) for task, offset in zip(tasks, first)]
        return Concatenation(parts), jnp.asarray(np.concatenate(tokens))

    def _texts(self, tokens: Sequence[np.ndarray]) -> ImageTextClassification:
        """The texts of several sets."""
        texts = jnp.asarray(np.concatenate(tokens))
        chunk = self.exp.config.text_chunk
        return ImageTextClassification(module=self.model.module, texts=texts, chunk=chunk)

    def objective(self, task: int, params: PyTree) -> ImageTextClassification:
        """The loss of a task of the stream, given the parameters before it.

        Texts and seen features have as many rows for every task, so that one program serves all.
        """
        tokens = self.model.tokens[len(self.stream.base) :]
        texts = np.zeros((max(map(len, tokens)), tokens[0].shape[1]), np.int32)
        texts[: len(tokens[task])] = tokens[task]
        features = _text_features(self._texts(tokens), Variables(params, {}))
        seen = np.arange(len(features)) < sum(len(t) for t in tokens[:task])
        return ImageTextClassification(
            module=self.model.module, texts=jnp.asarray(texts), chunk=self.exp.config.text_chunk,
            seen=jnp.where(jnp.asarray(seen)[:, None], features, 0.0),
        )  # fmt: skip

    def scores(self, params: PyTree) -> tuple[list[float], list[float]]:
        """Test accuracy on every set, among its own classes and among all."""
        first, own = label_spaces([len(t) for t in self.model.tokens])
        variables = Variables(params, {})
        features = _text_features(self._texts(self.model.tokens), variables)
        found: tuple[list[float], list[float]] = ([], [])
        for k, task in enumerate((*self.stream.base, *self.stream.tasks)):
            objective = ZeroShotClassification(
                module=self.model.module, features=features, candidates=jnp.asarray(own[k])
            )
            data = Pipeline(_shifted(task.test, first[k]), self.exp.config.eval_batch_size)
            metrics = self.exp.evaluate(objective, variables, data)
            found[0].append(metrics["accuracy"])
            found[1].append(metrics["accuracy_all"])
        return found

    def sequence(self, name: str, base: PyTree, learn: Learner) -> History:
        """Learns the tasks one after the other; scores every set after each."""
        params = base
        own: list[list[float]] = []
        union: list[list[float]] = []
        updates, ranks = [], []
        trained = 0
        for t in range(len(self.stream.tasks)):
            learned = learn(f"{name}-{t}", t, params)
            updates.append(float(trees.norm(trees.sub(learned.params, params))))
            params = self._kept(f"{name}-{t}-model", learned.params)
            trained = learned.trained
            ranks.append(learned.ranks)
            for rows, row in zip((own, union), self.scores(params)):
                rows.append(row)
        drift = float(trees.norm(trees.sub(params, base)))
        return History(Scores(np.array(own), np.array(union)), drift, updates, trained, ranks)

    def _kept(self, name: str, params: PyTree) -> PyTree:
        """The parameters, as an artifact where the config says so: what would be deployed."""
        return self.exp.artifact(name, lambda: params) if self.exp.config.keep_models else params

    def everything(self, *, share: float = 1.0, hold: Any = None) -> Learner:
        """All parameters but the scale.

        Args:
          share: of the way from the parameters before the task to those after it (WiSE-FT).
          hold: ``weight`` and ``temperature`` of the distillation from the model before the task,
            on the images and texts of the task (LwF); or None.
        """

        def learn(stage: str, t: int, params: PyTree) -> Learned:
            task = self.objective(t, params)
            objective: Objective = WarmStart(inner=task, params=params)
            if hold is not None:
                objective = Distilled(
                    inner=objective, teacher=task.replace(seen=None),
                    teacher_variables=Variables(params, {}),
                    weight=hold.weight, temperature=hold.temperature,
                )  # fmt: skip
            data = self.train(stage, self.stream.tasks[t].train)
            fitted = self.exp.fit(stage, objective, data, self.exp.config.full)
            after = fitted.params if share == 1.0 else trees.lerp(params, fitted.params, share)
            return Learned(after, fitted.summary["parameters"], {})

        return learn

    def low_rank(
        self, *, rank: int, placement: str, gated: bool = True, largest: float = 0.0,
        prox: str = "released", strength: float = 0.0,
    ) -> Learner:  # fmt: skip
        """Low-rank changes that are merged after each task.

        Args:
          rank: of every matrix.
          placement: one of ``PLACEMENTS``.
          gated: with importance weights.
          largest: kappa_max.
          prox: see ``shrink``.
          strength: of the penalty on the weights in place of thresholds.
        """
        cfg = self.exp.config
        fit = from_dict(FitConfig, cfg.adapt)

        def learn(stage: str, t: int, params: PyTree) -> Learned:
            task = self.objective(t, params).replace(text_weight=float(placement != "text"))
            gated_task = gated_low_rank(
                cfg, task, params, rank=rank, placement=placement, gated=gated, largest=largest,
                prox=prox, steps=fit.steps,
            )  # fmt: skip
            objective: Objective = gated_task
            if strength:
                objective = GatePenalty(inner=gated_task, strength=strength)
            data = self.train(stage, self.stream.tasks[t].train)
            fitted = self.exp.fit(stage, objective, data, fit)
            ranks = active_ranks(fitted.params) if gated else {}
            return Learned(
                gated_task.inner_params(fitted.params), fitted.summary["parameters"],
                _by_matrix(ranks),
            )  # fmt: skip

        return learn


def _by_matrix(ranks: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Active ranks by path, those of stacked matrices by ``path[index]``."""
    return {
        path + (str(list(index)) if index else ""): int(count[index])
        for path, count in ranks.items()
        for index in np.ndindex(count.shape)
    }


@jax.jit
def _text_features(objective: ImageTextClassification, variables: Variables) -> Array:
    return objective.text_features(variables)


def gated_low_rank(
    config: Any, task: Objective, params: PyTree, *, rank: int, placement: str, gated: bool,
    largest: float, prox: str, steps: int,
) -> GatedLowRank:  # fmt: skip
    """Adapts the matrices that ``config.adapted`` names for a placement, with its thresholds.

    Raises:
      ConfigError: an unknown placement or operator.
    """
    if placement not in PLACEMENTS:
        raise ConfigError(f"placement={placement!r}; choose one of {', '.join(PLACEMENTS)}.")
    if prox not in PROX:
        raise ConfigError(f"config.codyra.prox={prox!r}; choose one of {', '.join(PROX)}.")
    chosen = [config.adapted[tower] for tower in ("image", "text") if placement in ("all", tower)]
    where = [pattern for pattern in chosen if pattern]
    thresholds = None
    if gated:
        thresholds = Thresholds(steps, config.codyra.levels, config.codyra.dense)
    return GatedLowRank.of(
        task, params, where, rank=rank, axes=config.adapted.axes, largest=largest,
        thresholds=thresholds, prox=prox, gated=gated,
    )  # fmt: skip


def plan(config: Any) -> tuple[GatedLowRank, dict[str, jax.ShapeDtypeStruct], FitConfig]:
    """A step of a full-scale config on shapes alone, for ``training.aot.lower_step``.

    Returns:
      The objective of a task with the most classes, a batch, and how it would be trained.
    """
    model, size = config.model, config.model.image_size
    compute = _compute(config)
    compute["dtype"] = compute.pop("compute_dtype")
    module = Clip(clip_vit_b(model.patch_size, **compute))
    classes = [entry[2] for entry in config.data.sets]

    def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    task = ImageTextClassification(
        module=module, texts=shape(max(classes), 77, dtype=jnp.int32),  # type: ignore[arg-type]
        seen=shape(sum(classes), module.config.text.projection),  # type: ignore[arg-type]
        chunk=config.text_chunk,
    )  # fmt: skip
    batch = {
        "inputs": shape(config.batch_size, size, size, 3),
        "labels": shape(config.batch_size, dtype=jnp.int32),
    }
    params = jax.eval_shape(lambda o, k, b: o.init(k, b), task, jax.random.key(0), batch).params
    own, fit = config.codyra, from_dict(FitConfig, config.adapt)
    objective = gated_low_rank(
        config, task, params, rank=own.rank, placement=own.placement, gated=True,
        largest=max(own.largest), prox=own.prox, steps=fit.steps,
    )  # fmt: skip
    return objective, batch, fit


def recipe(exp: Experiment) -> None:
    cfg = exp.config
    for method in cfg.methods:
        if method not in METHODS:
            raise ConfigError(f"config.methods has {method!r}; there are {', '.join(METHODS)}.")
    lab = Laboratory.of(exp)
    count = len(lab.stream.base)
    base = lab.model.params
    if base is None:
        source, texts = lab.union(lab.stream.base, lab.model.tokens[:count])
        task = ImageTextClassification(module=lab.model.module, texts=texts)
        base = exp.fit("base", task, lab.train("base", source), cfg.base).params

    histories: dict[str, History] = {}
    points: dict[str, list[str]] = {"LoRA": [], "CoDyRA": []}
    if "zero_shot" in cfg.methods:
        histories["zero-shot"] = _unchanged(lab, base)
    for method, name, learn in (
        ("full", "full fine-tuning", lab.everything()),
        ("wise_ft", "WiSE-FT", lab.everything(share=cfg.wise_ft.share)),
        ("lwf", "LwF", lab.everything(hold=cfg.lwf)),
    ):
        if method in cfg.methods:
            histories[name] = lab.sequence(method, base, learn)
    if "lora" in cfg.methods:
        for rank in cfg.lora.ranks:
            name = f"LoRA r = {rank}"
            learn = lab.low_rank(rank=rank, placement=cfg.lora.placement, gated=False)
            histories[name] = lab.sequence(f"lora-{rank}", base, learn)
            points["LoRA"].append(name)
    own = {"rank": cfg.codyra.rank, "placement": cfg.codyra.placement, "prox": cfg.codyra.prox}
    if "codyra" in cfg.methods:
        for largest in cfg.codyra.largest:
            name = f"CoDyRA {largest:g}" if largest else "gated LoRA"
            histories[name] = lab.sequence(
                f"codyra-{largest:g}", base, lab.low_rank(largest=largest, **own)
            )
            points["CoDyRA"].append(name)
    if "l1" in cfg.methods:
        learn = lab.low_rank(strength=cfg.l1.strength, **own)
        histories["L1 penalty"] = lab.sequence("l1", base, learn)

    _report(lab, histories)
    if count and all(points.values()):
        _frontier(lab, histories, points)
    if "codyra" in cfg.methods:
        _ranks(lab, histories)
    if "joint" in cfg.methods:
        _joint(lab, base)


def _unchanged(lab: Laboratory, base: PyTree) -> History:
    rows = [np.tile(row, (len(lab.stream.tasks), 1)) for row in lab.scores(base)]
    return History(Scores(*rows), 0.0, [], 0, [])


def _joint(lab: Laboratory, base: PyTree) -> None:
    """All tasks of the stream at once, all parameters: what no sequence is expected to reach."""
    count = len(lab.stream.base)
    source, texts = lab.union(lab.stream.tasks, lab.model.tokens[count:])
    task = ImageTextClassification(module=lab.model.module, texts=texts)
    start = WarmStart(inner=task, params=base)
    cfg = lab.exp.config
    fitted = lab.exp.fit("joint", start, lab.train("joint", source), cfg.joint)
    own, union = lab.scores(fitted.params)
    lab.exp.record("joint training, Last", float(np.mean(own[count:])))
    lab.exp.record("joint training, Last in one label space", float(np.mean(union[count:])))
    if count:
        lab.exp.record("joint training, retained", float(np.mean(own[:count])))


def _current(history: History, base: int) -> float:
    """Mean accuracy on each task right after learning it."""
    return float(np.mean(np.diagonal(history.scores.own[:, base:])))


def _retained(history: History, base: int) -> float:
    """Mean accuracy on the base's sets at the end; not a number where there are none."""
    return float(history.scores.own[-1, :base].mean()) if base else float("nan")


def _report(lab: Laboratory, histories: Mapping[str, History]) -> None:
    count = len(lab.stream.base)
    rows = []
    for name, h in histories.items():
        own, union = h.scores.own[:, count:], h.scores.union[:, count:]
        metrics = {
            "Transfer": continual.transfer(own),
            "Average": continual.average(own),
            "Last": continual.last(own),
            "forgetting": continual.forgetting(own),
            "current": _current(h, count),
            "retained": _retained(h, count),
            "Last, one label space": continual.last(union),
            "drift": h.drift,
            "update": float(np.mean(h.updates)) if h.updates else 0.0,
        }
        for metric in ("forgetting", "current", "retained", "drift"):
            lab.exp.record(f"{name}, {metric}", metrics[metric])
        ranks = [float(n) for log in h.ranks for n in log.values()]
        rows.append([name, *metrics.values(), float(np.mean(ranks)) if ranks else None, h.trained])
    lab.exp.table(
        "Continual learning, test accuracy",
        ["method", *metrics, "active ranks", "trained"],
        _rounded(rows),
    )


def _frontier(
    lab: Laboratory, histories: Mapping[str, History], points: Mapping[str, Sequence[str]]
) -> None:
    """Plasticity against stability: the sweep of thresholds beside the sweep of LoRA's rank."""
    count = len(lab.stream.base)
    curves = {
        name: sorted((_retained(histories[m], count), _current(histories[m], count)) for m in made)
        for name, made in points.items()
    }
    x = sorted({r for curve in curves.values() for r, _ in curve})
    series = {
        name: np.interp(
            x, [r for r, _ in curve], [c for _, c in curve], left=np.nan, right=np.nan
        ).tolist()
        for name, curve in curves.items()
    }
    lab.exp.curve(
        "Plasticity and stability",
        x,
        series,
        xlabel="accuracy retained on the base's sets",
        ylabel="accuracy on the current task",
    )
    ours = curves["CoDyRA"]
    below = sum(c < np.interp(r, [x for x, _ in ours], [y for _, y in ours])
                for r, c in curves["LoRA"])  # fmt: skip
    lab.exp.record("LoRA's points below the curve of CoDyRA", int(below))
    lab.exp.record("LoRA's points", len(curves["LoRA"]))


def _ranks(lab: Laboratory, histories: Mapping[str, History]) -> None:
    """Active ranks by module, beside what initialisation and thresholds alone would leave."""
    cfg = lab.exp.config
    steps = from_dict(FitConfig, cfg.adapt).steps
    thresholds = Thresholds(steps, cfg.codyra.levels, cfg.codyra.dense)
    rank, tasks = cfg.codyra.rank, len(lab.stream.tasks)
    summary = []
    for largest in cfg.codyra.largest:
        if not largest:
            continue
        logs = histories[f"CoDyRA {largest:g}"].ranks
        counts = np.array([[log[path] for log in logs] for path in logs[0]])  # [modules, tasks]
        means = counts.mean(axis=1)
        share = thresholds.null_share(largest, cfg.codyra.prox)
        by_chance = (rank * share * (1 - share) / tasks) ** 0.5
        summary.append(
            [
                largest, thresholds.total(largest), float(means.mean()), rank * share,
                float(means.std(ddof=1)), by_chance,
            ]
        )  # fmt: skip
        lab.exp.table(
            f"Active ranks of {rank}, largest threshold {largest:g}",
            ["matrix", *(task.name for task in lab.stream.tasks), "mean"],
            _rounded([[p, *row.tolist(), m] for p, row, m in zip(logs[0], counts, means)]),
        )
    lab.exp.table(
        "Active ranks and the null model",
        [
            "largest threshold", "sum of thresholds", "mean rank", "null mean",
            "spread between matrices", "null spread",
        ],
        _rounded(summary),
    )  # fmt: skip


def _rounded(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [[round(x, 4) if isinstance(x, float) else x for x in row] for row in rows]
