"""UniPT: universal parallel tuning (Diao et al., CVPR 2024).

Methods that train few parameters inside a network still differentiate through all of it. UniPT
trains a small network beside a frozen one, which reads all of its hidden states at once, so that
the backward pass never enters the frozen network: neither its activations nor its gradients are
held.

The recipe trains a small Vision Transformer on the digits 0 to 4, and then on the digits 5 to 9
with every one of ``config.methods``:

* ``probe``, ``scalar_mix``, ``lst``, ``lst_matched``, ``unipt`` and the ablations of ``unipt`` read
  the states of the frozen network, which are computed once and kept;
* ``lora``, ``adapters``, ``bitfit``, ``partial`` (the last layers) and ``full`` train inside it.

It then compiles a training step of most methods at several depths and tables what the compiler says
of its memory and arithmetic (``config.memory``).

``plan`` gives the training steps of the published settings: Flickr30K with VSE++-infinity, MSR-VTT
with CLIP4Clip, VQA v2 with CLIP-ViL.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from transfer_jax import trees
from transfer_jax.configuration import ConfigError
from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.registry import load
from transfer_jax.data.sources import ArraySource, Source, take
from transfer_jax.data.splits import Concatenation, select_classes, stratified_split
from transfer_jax.models import (
    Bert,
    BertConfig,
    Clip,
    VisionTransformer,
    ViTConfig,
    bert_stack,
    clip_vit_b,
)
from transfer_jax.nn import petl
from transfer_jax.nn.transformer import TransformerConfig
from transfer_jax.nn.unipt import (
    GeneralisedPooling,
    LadderSide,
    ScalarMix,
    UniPT,
    UniPTConfig,
    split_states,
    token_mean,
    unipt_config,
    valid_tokens,
)
from transfer_jax.objectives import (
    Aux,
    Classification,
    Mean,
    ModuleObjective,
    Objective,
    Trainable,
    Variables,
    WarmStart,
    example_mask,
)
from transfer_jax.objectives.contrastive import unit
from transfer_jax.objectives.frozen import Frozen, cache_features
from transfer_jax.objectives.matching import PairMatching
from transfer_jax.objectives.petl import Adapted
from transfer_jax.training import Experiment, FitConfig, Layout, make_mesh
from transfer_jax.training.aot import lower_step
from transfer_jax.training.config import OptimizerConfig, from_dict
from transfer_jax.training.profiling import compiled_flops, parameter_count

Array = jax.Array
Batch = Any
PyTree = Any

READERS = ("probe", "scalar_mix", "unipt", "lst", "lst_matched")
ABLATIONS: dict[str, dict[str, Any]] = {
    "softmax attention": {"weights": "softmax"},
    "without I": {"identity": False},
    "mean over layers": {"confidence": "uniform"},
    "confidence without anchor": {"confidence": "layer"},
    "every other layer": {},
}
TUNERS = ("lora", "adapters", "bitfit", "partial", "full")


# -- models of states -------------------------------------------------------------------------


class StatesClassifier(nn.Module):
    """States of a backbone to class scores: a reader, one token or their mean, and a head.

    Attributes:
      num_classes: C.
      reader: maps states to features [B, N, e]; None = the last state.
      layers: which states the reader sees, the anchor last; empty = all.
      token: the token that is classified; None = the mean over the valid tokens.
      hidden: width of a hidden layer of the head; 0 = none.
      dtype: compute dtype.
    """

    num_classes: int
    reader: nn.Module | None = None
    layers: tuple[int, ...] = ()
    token: int | None = 0
    hidden: int = 0
    dtype: Any = None

    @nn.compact
    def __call__(
        self, inputs: PyTree, *, lengths: Array | None = None, train: bool = False
    ) -> Array:
        """Maps states, see ``transfer_jax.nn.unipt``, to float32 logits [B, C]."""
        states = split_states(inputs)
        if self.layers:
            states = [states[i] for i in self.layers]
        x = states[-1]
        if self.reader is not None:
            x = self.reader(tuple(states), lengths=lengths, train=train)
        if self.token is None:
            x = token_mean(x, valid_tokens(lengths, x.shape[1]))
        else:
            x = x[:, self.token]
        if self.hidden:
            x = nn.gelu(nn.Dense(self.hidden, dtype=self.dtype, name="hidden")(x))
            x = nn.LayerNorm(1e-5, dtype=self.dtype, use_fast_variance=False, name="hidden_norm")(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)


class VSETowers(nn.Module):
    """Sides A and B of VSE++-infinity: text states and image stages to one space.

    Attributes:
      text: configuration of the texts' side.
      image: of the images' side.
      drop: share of the image tokens that a training step leaves out.
    """

    text: UniPTConfig
    image: UniPTConfig
    drop: float = 0.2

    @nn.compact
    def __call__(
        self, inputs: PyTree, images: PyTree, *, lengths: Array | None = None, train: bool = False
    ) -> tuple[Array, Array]:
        """Maps both to unit vectors.

        Args:
          inputs: states of the text tower, each [B, N, d].
          images: maps of the image tower's stages, each [B, H_l, W_l, C_l].
          lengths: int [B], valid tokens of the texts.
          train: statistics of the batch, and tokens left out.

        Returns:
          Images [B, e] and texts [B, e], float32.
        """
        x = UniPT(self.text, name="text")(inputs, lengths=lengths, train=train)
        texts = GeneralisedPooling(name="text_pooling")(x, valid_tokens(lengths, x.shape[1]))
        x = UniPT(self.image, name="image")(images, train=train)
        mask = None
        if train and self.drop:
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.drop, x.shape[:2])
            mask = kept.astype(jnp.float32)
        return unit(GeneralisedPooling(name="image_pooling")(x, mask)), unit(texts)


class ClipTowers(nn.Module):
    """Sides C of CLIP4Clip: the states of text and frames to one space.

    Attributes:
      side: configuration of either side.
    """

    side: UniPTConfig

    @nn.compact
    def __call__(
        self, inputs: PyTree, images: PyTree, *, lengths: Array | None = None, train: bool = False
    ) -> tuple[Array, Array]:
        """Maps both to vectors, videos as the mean of their unit frames, made unit again.

        Args:
          inputs: states of the texts [B, N, d], the embedding [B, 1, D] last.
          images: states of the frames [B, F, N', d'], the embedding [B, F, 1, D] last.
          lengths: int [B], tokens of the texts with the end token, which is the last of them.
          train: passed on.

        Returns:
          Videos [B, D] and texts [B, D], float32.
        """
        positions = None if lengths is None else lengths - 1
        texts = UniPT(self.side, name="text")(
            inputs, lengths=lengths, positions=positions, train=train
        )[:, 0]
        frames = tuple(x.reshape(-1, *x.shape[2:]) for x in images)
        videos = UniPT(self.side, name="image")(frames, train=train)[:, 0]
        videos = unit(videos.astype(jnp.float32)).reshape(*images[-1].shape[:2], -1)
        return unit(videos.mean(axis=1)), unit(texts.astype(jnp.float32))


class GridEncoder(nn.Module):
    """CLIP-ViL's encoder: grid features of an image and tokens through one stack of layers.

    The tokens' padding comes last, so that the first ``lengths`` positions are the valid ones.

    Attributes:
      text: the embeddings and layers.
      grid_features: width of the grid features.
    """

    text: BertConfig
    grid_features: int

    def setup(self):
        self.bert = Bert(self.text)
        self.grid = nn.Dense(self.text.stack.features, dtype=self.text.stack.dtype)
        self.grid_norm = nn.LayerNorm(
            self.text.stack.norm_eps, dtype=self.text.stack.dtype, use_fast_variance=False
        )

    def states(self, inputs: Mapping[str, Array], *, lengths: Array | None = None) -> PyTree:
        """All states [B, G + L, H], images first.

        Args:
          inputs: ``grid`` [B, G, grid_features] and ``tokens`` int [B, L].
          lengths: int [B], valid positions among the G + L.
        """
        grid = self.grid_norm(self.grid(inputs["grid"]))
        x = jnp.concatenate([grid, self.bert.embed(inputs["tokens"])], axis=1)
        return self.bert.stack(x, lengths=lengths, hidden_states=True)[1]


def vit_states(module: VisionTransformer, inputs: Array) -> PyTree:
    """All states [B, N, H] of images, for ``Frozen.method``."""
    return module.features(inputs, hidden_states=True)[1]


def bert_states(module: Bert, inputs: Array, *, lengths: Array | None = None) -> PyTree:
    """All states [B, L, H] of tokens, for ``Frozen.method``."""
    return module.features(inputs, lengths=lengths, hidden_states=True)[1]


def clip_text_states(module: Clip, inputs: Array, *, lengths: Array) -> PyTree:
    """All states [B, L, H] of texts and their embeddings [B, 1, D], for ``Frozen.method``."""
    x, states = module.text.features(inputs, hidden_states=True)
    ends = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return *states, module.text.projection(ends)


def clip_frame_states(module: Clip, inputs: Array) -> PyTree:
    """All states [B, F, N, H] of frames [B, F, h, w, 3] and embeddings [B, F, 1, D]."""
    x, states = module.image.features(inputs.reshape(-1, *inputs.shape[2:]), hidden_states=True)
    states = (*states, module.image.projection(x[:, :1]))
    return tuple(s.reshape(*inputs.shape[:2], *s.shape[1:]) for s in states)


class SoftAnswers(ModuleObjective):
    """Visual question answering: binary cross-entropies with the answers' scores, summed.

    ``batch["labels"]`` are scores float [B, A] in [0, 1], 0 for most answers. The mean is over the
    batch. Metrics: ``loss``; ``score``, that of the answer with the largest logit.
    """

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        logits, state = self.apply(variables, batch, rng)
        scores = batch["labels"]
        mask = example_mask(batch, len(scores))
        terms = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), scores)
        mean = Mean.of(terms.sum(axis=-1), mask)
        chosen = jnp.argmax(logits, axis=-1)[:, None]
        score = jnp.take_along_axis(scores, chosen, axis=-1)[:, 0]
        metrics = {"loss": mean, "score": Mean.of(score, mask)}
        return mean.value(), Aux(state, metrics, mean.weight, logits)


def vqa_accuracy(answer: str, given: Sequence[str]) -> float:
    """The accuracy of an answer against those of several people (VQA v2).

    ``min(n / 3, 1)``, n people of all but one having given the answer, averaged over which one is
    left out.

    >>> round(vqa_accuracy("cat", ["cat"] * 3 + ["dog"] * 7), 3)
    0.9
    """
    counts = [sum(g == answer for j, g in enumerate(given) if j != i) for i in range(len(given))]
    return float(np.mean([min(n / 3, 1.0) for n in counts]))


# -- the digits -------------------------------------------------------------------------------


def make_tasks(config: Any) -> dict[str, dict[str, Source]]:
    """The digits 0 to 4 (``source``) and 5 to 9 (``target``, as classes 0 to 4), split alike.

    All images of the data set are split anew, by ``config.data.fractions`` and ``config.seed``.
    """
    bundle = load(config.data.name, **dict(config.data.options))
    everything = Concatenation(list(bundle.splits.values()))
    pool = ArraySource(take(everything, np.arange(len(everything))))
    names = ("train", "validation", "test")
    fractions = dict(zip(names, config.data.fractions))
    tasks = {}
    for task, classes in (("source", range(5)), ("target", range(5, 10))):
        chosen = select_classes(pool, classes)
        arrays = take(chosen, np.arange(len(chosen)))
        arrays["labels"] = (arrays["labels"] - classes[0]).astype(np.int32)
        tasks[task] = dict(stratified_split(ArraySource(arrays), fractions, seed=config.seed))
    return tasks


def encoder(config: Any, head: str | None = None) -> VisionTransformer:
    """The Vision Transformer of a config, with a classifier of five classes or without a head."""
    stack = TransformerConfig(
        features=config.model.features, num_layers=config.model.depth,
        num_heads=config.model.num_heads, init_scale=config.model.init_scale,
    )  # fmt: skip
    return VisionTransformer(
        ViTConfig(
            stack=stack, image_size=config.data.image_size, patch_size=config.model.patch_size,
            channels=1, head=head, num_classes=5,
        )
    )  # fmt: skip


def reader(name: str, config: Any) -> StatesClassifier:
    """The classifier of states of a method that reads them, or of an ablation of UniPT.

    Raises:
      ConfigError: no such method.
    """
    side = config.side
    unipt = unipt_config("vse_text", features=side.features, outputs=config.model.features)
    token = None if side.pool == "mean" else 0

    def classifier(module: nn.Module | None, layers: tuple[int, ...] = ()) -> StatesClassifier:
        return StatesClassifier(5, reader=module, layers=layers, token=token)

    if name in ABLATIONS:
        every_other = tuple(range(config.model.depth % 2, config.model.depth + 1, 2))
        layers = every_other if name == "every other layer" else ()
        return classifier(UniPT(dataclasses.replace(unipt, **ABLATIONS[name])), layers)
    modules: dict[str, Callable[[], nn.Module | None]] = {
        "probe": lambda: None,
        "scalar_mix": ScalarMix,
        "unipt": lambda: UniPT(unipt),
        "lst": lambda: LadderSide(side.lst.features, side.lst.num_heads),
        "lst_matched": lambda: LadderSide(side.lst_matched.features, side.lst_matched.num_heads),
    }
    if name not in modules:
        raise ConfigError(f"no method {name!r}; there are {sorted([*READERS, *TUNERS])}.")
    return classifier(modules[name]())


def tuner(name: str, config: Any, source: PyTree) -> Objective:
    """The objective of a method that trains inside the network, with a new head.

    Args:
      name: one of ``TUNERS``.
      config: of the experiment.
      source: parameters of the trained network.

    Raises:
      ConfigError: no such method.
    """
    task, head = Classification(module=encoder(config, "classification")), "^classifier/"
    warm = WarmStart(inner=task, params=body_of(source))
    if name == "full":
        return warm
    if name == "lora":
        where = r"attention/(query|key|value)$"
        added = petl.lora(config.inside.rank, where=where, dropout=0.0)
        return Adapted.of(task, source, added, train=head)
    if name == "adapters":
        added = petl.sequential_ffn(config.inside.bottleneck, init="lora")
        return Adapted.of(task, source, added, train=head)
    if name == "bitfit":
        return Trainable.of(warm, source, [head, r"/bias$"])
    if name == "partial":
        depth = config.model.depth
        last = "|".join(str(i) for i in range(depth - config.inside.layers, depth))
        return Trainable.of(warm, source, [head, rf"^stack/(layers_({last})|norm)/"])
    raise ConfigError(f"no method {name!r}; there are {sorted([*READERS, *TUNERS])}.")


def frozen(name: str, config: Any, source: PyTree) -> Frozen:
    """The objective of a method that reads the states of the frozen network.

    Args:
      name: one of ``READERS`` or ``ABLATIONS``.
      config: of the experiment.
      source: as in ``tuner``.
    """
    params = {name: tree for name, tree in source.items() if name != "classifier"}
    return Frozen(
        inner=Classification(module=reader(name, config)), variables=Variables(params, {}),
        module=encoder(config), method=vit_states,
    )  # fmt: skip


def body_of(params: PyTree) -> PyTree:
    """The parameters of a trained Vision Transformer with None at its classifier."""
    return trees.partition(params, r"^(?!classifier/)")[0]


def recipe(exp: Experiment) -> None:
    cfg = exp.config
    if cfg.task != "digits":
        raise ConfigError(
            f"config.task={cfg.task!r} is a published setting, whose weights and data sets are not "
            "part of this project: papers.unipt.plan(config) gives its training step. The variants "
            "'digits' and 'mnist' run."
        )
    methods, stages = list(cfg.methods), (*READERS, *ABLATIONS, *TUNERS)
    if unknown := sorted(set(methods) - set(stages)):
        raise ConfigError(f"config.methods has {unknown}; choose from {', '.join(stages)}.")
    if cfg.memory.depths:
        memory_table(exp)
    if methods:
        compare_methods(exp, methods)


def compare_methods(exp: Experiment, methods: Sequence[str]) -> None:
    """Trains the source network, then each method on the target, and tables the accuracies."""
    cfg = exp.config
    tasks = make_tasks(cfg)

    def whole(source: Source) -> Pipeline:
        return Pipeline(source, cfg.eval_batch_size)

    def shuffled(name: str, source: Source) -> Pipeline:
        return Pipeline(source, cfg.batch_size, shuffle=True, seed=exp.seed(name), repeat=True)

    source = exp.fit(
        "source", Classification(module=encoder(cfg, "classification")),
        shuffled("source", tasks["source"]["train"]), cfg.source,
        evaluate={"test": whole(tasks["source"]["test"])},
    )  # fmt: skip
    exp.record("source accuracy", source.metrics["test/accuracy"])
    trained = source.params

    images = tasks["target"]
    states: dict[str, Source] = {}
    if not set(methods) <= set(TUNERS):
        states = {
            split: ArraySource(
                cache_features(frozen("probe", cfg, trained), exp.batches(whole(data)))
            )
            for split, data in images.items()
        }
    rows = []
    for method in methods:
        inside = method in TUNERS
        objective = tuner(method, cfg, trained) if inside else frozen(method, cfg, trained).inner
        data = images if inside else states
        stage = from_dict(FitConfig, cfg.target)
        rate = cfg.rates.get(method.replace(" ", "_"), cfg.rates.unipt)
        optimizer = dataclasses.replace(stage.optimizer, learning_rate=rate)
        name = method.replace(" ", "-")
        fitted = exp.fit(
            name, objective, shuffled("target", data["train"]),
            dataclasses.replace(stage, optimizer=optimizer),
            evaluate={split: whole(data[split]) for split in ("validation", "test")},
        )  # fmt: skip
        rows.append(
            [
                method, fitted.metrics["validation/accuracy"], fitted.metrics["test/accuracy"],
                fitted.summary["parameters"], 1000 * _seconds_per_step(exp, name),
            ]
        )  # fmt: skip
    columns = ["method", "validation accuracy", "test accuracy", "trained", "ms per step"]
    exp.table("Digits 5 to 9", columns, rows)
    exp.bars("Test accuracy", methods, {"": [row[2] for row in rows]})


def _seconds_per_step(exp: Experiment, stage: str) -> float:
    """The median over the lines of a stage's log; the first, shortest one apart."""
    path = exp.workdir / "stages" / stage / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rates = [line["time/steps_per_second"] for line in lines if "time/steps_per_second" in line]
    return 1 / float(np.median(rates))


# -- memory -----------------------------------------------------------------------------------


def step_costs(objective: Objective, batch: Batch) -> dict[str, float]:
    """What the compiler says of a training step on one device.

    Args:
      objective: may hold ``jax.ShapeDtypeStruct``.
      batch: of ``jax.ShapeDtypeStruct``.

    Returns:
      ``trained`` parameters; ``temporaries`` and ``peak`` (with parameters, moments and batch) in
      bytes; ``flops``, 0 where the compiler does not say.
    """
    layout = Layout(make_mesh({"data": 1}, jax.devices()[:1]))
    settings = FitConfig(optimizer=OptimizerConfig(name="adam", learning_rate=1e-3))
    lowered, held = lower_step(objective, batch, settings, layout)
    compiled = lowered.compile()
    memory: Any = compiled.memory_analysis()
    return {
        "trained": parameter_count(held["params"]),
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
        "flops": compiled_flops(compiled) or 0.0,
    }


def memory_objective(method: str, config: Any) -> tuple[Objective, Batch]:
    """A method at the shapes of ``config.model`` and ``config.data``, without any array."""
    size, side = config.batch_size, config.data.image_size
    batch = {
        "inputs": jax.ShapeDtypeStruct((size, side, side, 1), jnp.float32),
        "labels": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    task = Classification(module=encoder(config, "classification"))
    params = jax.eval_shape(lambda k, b: task.init(k, b).params, jax.random.key(0), batch)
    build = tuner if method in TUNERS else frozen
    return jax.eval_shape(lambda p: build(method, config, p), params), batch


def memory_table(exp: Experiment) -> dict[int, dict[str, dict[str, float]]]:
    """Tables ``step_costs`` over methods and depths: {depth: {method: costs}}."""
    cfg = exp.config
    costs: dict[int, dict[str, dict[str, float]]] = {}
    rows = []
    for depth in cfg.memory.depths:
        config = ml_collections.ConfigDict(cfg.memory.shapes)
        config.model.depth = depth

        def compute(config: Any = config) -> dict[str, dict[str, float]]:
            methods = cfg.memory.methods
            return {name: step_costs(*memory_objective(name, config)) for name in methods}

        costs[depth] = exp.artifact(f"memory-{depth}", compute)
        whole = costs[depth].get("full", {}).get("peak")
        for method, cost in costs[depth].items():
            rows.append(
                [
                    depth, method, cost["trained"], cost["temporaries"] / 2**20,
                    cost["peak"] / 2**20, cost["peak"] / whole if whole else "",
                    cost["flops"] / 1e9,
                ]
            )  # fmt: skip
    columns = [
        "layers", "method", "trained", "temporaries, MiB", "peak, MiB", "share of full",
        "GFLOP",
    ]  # fmt: skip
    exp.table("A training step, as compiled", columns, rows)
    return costs


# -- the published settings -------------------------------------------------------------------


def plan(config: Any) -> tuple[Objective, Batch, FitConfig]:
    """The training step of a published setting, on shapes alone.

    Returns:
      The objective and a batch of ``jax.ShapeDtypeStruct``, and the settings of the stage, for
      ``training.aot.lower_step``.

    Raises:
      ConfigError: no published setting.
    """
    plans = {"vse": _plan_vse, "clip4clip": _plan_clip4clip, "vqa": _plan_vqa}
    if config.task not in plans:
        raise ConfigError(f"config.task={config.task!r} has no plan; there are {sorted(plans)}.")
    objective, batch = plans[config.task](config)
    return objective, batch, from_dict(FitConfig, config.fit)


def _shape(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _shapes_of(module: nn.Module, *inputs: Any, **options: Any) -> Variables:
    """The shapes of a module's parameters."""
    drawn = jax.eval_shape(
        lambda key, inputs: module.init(key, *inputs, **options), jax.random.key(0), inputs
    )
    return Variables(drawn["params"], {})


def _plan_vse(config: Any) -> tuple[Objective, Batch]:
    """Flickr30K: texts through BERT-base; the stages of the image tower are given."""
    size, length, dtype = config.batch_size, config.text_length, jnp.dtype(config.dtype)
    side = config.image_size // 32
    stages = zip((8, 4, 2, 1), config.stage_features)
    batch = {
        "inputs": _shape(size, length, dtype=jnp.int32),
        "lengths": _shape(size, dtype=jnp.int32),
        "images": tuple(_shape(size, r * side, r * side, c, dtype=dtype) for r, c in stages),
    }
    bert = Bert(BertConfig(vocab_size=30_522, stack=bert_stack(dtype=dtype)))
    towers = VSETowers(
        unipt_config("vse_text", dtype=dtype), unipt_config("vse_image", dtype=dtype),
        drop=config.drop,
    )  # fmt: skip
    pairs = PairMatching(
        module=towers, kind="hinge", margin=config.margin, epoch_steps=config.epoch_steps
    )
    variables = _shapes_of(bert, batch["inputs"])
    return Frozen(inner=pairs, variables=variables, module=bert, method=bert_states), batch


def _plan_clip4clip(config: Any) -> tuple[Objective, Batch]:
    """MSR-VTT: texts and frames through CLIP ViT-B/32, which both sides read."""
    size, dtype = config.batch_size, jnp.dtype(config.dtype)
    clip = Clip(clip_vit_b(32, dtype=dtype))
    batch = {
        "inputs": _shape(size, config.text_length, dtype=jnp.int32),
        "lengths": _shape(size, dtype=jnp.int32),
        "images": _shape(size, config.frames, 224, 224, 3, dtype=dtype),
    }
    pairs = PairMatching(module=ClipTowers(unipt_config("clip4clip", dtype=dtype)), scale=100.0)
    params = _shapes_of(clip, _shape(1, 224, 224, 3), batch["inputs"]).params
    towers = {
        name: {k: v for k, v in params.items() if k != other}
        for name, other in (("text", "image"), ("image", "text"))
    }
    texts = Frozen(
        inner=pairs, variables=Variables(towers["text"], {}), module=clip, method=clip_text_states
    )
    return Frozen(
        inner=texts, variables=Variables(towers["image"], {}), module=clip,
        method=clip_frame_states, key="images", lengths="frame_lengths",
    ), batch  # fmt: skip


def _plan_vqa(config: Any) -> tuple[Objective, Batch]:
    """VQA v2: grid features and words through twelve layers."""
    size, dtype = config.batch_size, jnp.dtype(config.dtype)
    batch = {
        "inputs": {
            "grid": _shape(size, config.grid_tokens, config.grid_features, dtype=dtype),
            "tokens": _shape(size, config.text_length, dtype=jnp.int32),
        },
        "lengths": _shape(size, dtype=jnp.int32),
        "labels": _shape(size, config.answers),
    }
    module = GridEncoder(
        BertConfig(vocab_size=30_522, stack=bert_stack(dtype=dtype)), config.grid_features
    )
    side = unipt_config("clip_vil", dtype=dtype)
    answers = SoftAnswers(
        module=StatesClassifier(
            config.answers, reader=UniPT(side), token=config.grid_tokens, hidden=2 * 768,
            dtype=dtype,
        )
    )  # fmt: skip
    variables = _shapes_of(module, batch["inputs"], method="states")
    return Frozen(inner=answers, variables=variables, module=module, method="states"), batch
