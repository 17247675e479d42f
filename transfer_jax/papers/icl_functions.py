"""Can Transformers Learn Sequential Function Classes In Context? (2023, arXiv 2312.12655).

A Transformer reads ``x_1, y_1, ..., x_n, y_n`` of a function that it has never seen and predicts
every y_i from what stands before it. In the sequential classes the function makes the x as well
(``transfer_jax.data.function_classes``). The recipe trains a GPT-2 on such prompts, or an LSTM and
an S4 model with as many parameters, and reports on fresh functions:

* the error by the number of examples, with bands from resampled prompts, beside predictors that
  learn nothing (zero, persistence), that cannot learn more (least squares), and others;
* the same with the first m labels, inputs, or both replaced by noise. In a sequence y_i is also
  x_{i+1}, so random labels alone hide little: all four curves belong together;
* the error at a ``fresh query``: the last x before the question is replaced by another one, which
  tells those who learnt the function from those who continue the sequence;
* the share of the sequences that have come to rest, where persistence would do.

``plan`` gives the training step of every config without data or parameters.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from transfer_jax.configuration import ConfigError
from transfer_jax.data.function_classes import Curriculum, FunctionClass, settings, windows
from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.sources import IndexSource
from transfer_jax.models import SequenceModel, gpt2_stack
from transfer_jax.nn.initializers import torch_uniform
from transfer_jax.nn.transformer import TransformerConfig, TransformerStack
from transfer_jax.objectives import (
    Aux,
    Generated,
    Mean,
    ModuleObjective,
    Objective,
    Variables,
    example_mask,
)
from transfer_jax.training import Experiment, FitConfig
from transfer_jax.training.config import from_dict
from transfer_jax.training.profiling import parameter_count
from transfer_jax.trees import path_str

Array = jax.Array
Batch = Any
PyTree = Any

# Layers, heads, width.
SIZES = {"tiny": (3, 2, 64), "small": (6, 4, 128), "standard": (12, 8, 256)}
MODELS = ("transformer", "lstm", "s4")
KINDS = ("squared", "norm", "normalised", "bce", "zero_one")
# What the evaluation of linear regression of Garg et al. changes in a prompt.
SHIFTS: dict[str, dict[str, Any]] = {
    "random quadrants": {"query": "quadrants"},
    "orthogonal query": {"query": "orthogonal"},
    "query in the context": {"query": "overlapping"},
    "half subspace": {"inputs": "half_subspace"},
    "skewed covariance": {"inputs": "skewed"},
    "noisy labels": {"name": "noisy_linear"},
    **{f"x times {scale:.3g}": {"scale_x": scale} for scale in (1 / 3, 1 / 2, 2.0, 3.0)},
    **{f"y times {scale:.3g}": {"scale_y": scale} for scale in (1 / 3, 1 / 2, 2.0, 3.0)},
}


# -- models ---------------------------------------------------------------------------------------


def prompt_stack(size: str, **fields: Any) -> TransformerConfig:
    """The layers of GPT-2 in one of ``SIZES``, without dropout."""
    if size not in SIZES:
        raise ConfigError(f"config.model.size={size!r}; choose one of {', '.join(SIZES)}.")
    layers, heads, width = SIZES[size]
    base = {"num_layers": layers, "num_heads": heads, "features": width}
    return gpt2_stack(**{**base, "dropout": 0.0, "attention_dropout": 0.0, **fields})


def _torch_linear(features: int, fan_in: int, name: str, dtype: Any) -> nn.Dense:
    """A layer that begins as PyTorch's do: weights and biases in +- 1 / sqrt(fan_in)."""
    uniform = torch_uniform(fan_in)
    return nn.Dense(features, kernel_init=uniform, bias_init=uniform, dtype=dtype, name=name)


class VectorGPT2(nn.Module):
    """GPT-2 over vectors: real [B, L, d] to features [B, L, E].

    Attributes:
      stack: the layers.
      max_positions: rows of the position table; longer prompts are refused.
    """

    stack: TransformerConfig
    max_positions: int

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> Array:
        s, length = self.stack, inputs.shape[1]
        if length > self.max_positions:
            raise ValueError(
                f"{length} vectors do not fit: the position table has {self.max_positions} rows, "
                "two for each example of the longest prompt in training."
            )
        x = _torch_linear(s.features, inputs.shape[-1], "read_in", s.dtype)(inputs)
        init = nn.initializers.normal(s.init_scale)
        positions = nn.Embed(
            self.max_positions, s.features, embedding_init=init, dtype=s.dtype, name="positions"
        )
        x = x + positions(jnp.arange(length))
        return TransformerStack(s, name="stack")(x, train=train)


class PromptModel(nn.Module):
    """Prompts [B, 2n, d] to float32 predictions [B, n, outputs] of every y, at its x.

    Attributes:
      backbone: causal, real [B, 2n, d] to features [B, 2n, E].
      outputs: 1, or d where the y are vectors.
    """

    backbone: nn.Module
    outputs: int

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> Array:
        x = self.backbone(inputs, train=train)[:, 0::2]
        head = _torch_linear(self.outputs, x.shape[-1], "read_out", x.dtype)
        return head(x).astype(jnp.float32)


def prompt_model(config: Any, name: str = "transformer") -> PromptModel:
    """Builds one of ``MODELS`` for a config of ``configs/icl_functions.py``.

    The LSTM and S4 models have as many layers as the Transformer, and the width at which their
    number of parameters is nearest to its.
    """
    task = function_class(config)
    outputs, length = task.dims if task.sequential else 1, 2 * task.points
    stack = prompt_stack(
        config.model.size, scan=config.model.scan, dtype=jnp.dtype(config.model.dtype)
    )
    transformer = PromptModel(VectorGPT2(stack, length), outputs)
    if name == "transformer":
        return transformer
    if name not in MODELS:
        raise ConfigError(f"config.models has {name!r}; choose from {', '.join(MODELS)}.")

    def model(width: int) -> PromptModel:
        backbone = SequenceModel(
            features=width, depth=stack.num_layers, mixer=name, l_max=length, dtype=stack.dtype
        )
        return PromptModel(backbone, outputs)

    @functools.cache
    def count(module: PromptModel) -> int:
        prompt = jax.ShapeDtypeStruct((1, length, task.dims), jnp.float32)
        return parameter_count(jax.eval_shape(module.init, jax.random.key(0), prompt)["params"])

    wanted, low, high = count(transformer), stack.features // 2, 4 * stack.features
    while high - low > 4:
        middle = (low + high) // 8 * 4
        low, high = (middle, high) if count(model(middle)) <= wanted else (low, middle)
    return min((model(low), model(high)), key=lambda module: abs(count(module) - wanted))


# -- objectives -----------------------------------------------------------------------------------


def pointwise(kind: str, predictions: Any, labels: Any) -> Any:
    """The error at every position; NumPy or JAX arrays.

    Args:
      kind: 'squared' distance; 'norm', its root; 'normalised', the root over ||y||; for
        classification 'bce', the negative log-likelihood of the class under a logit, and
        'zero_one'.
      predictions: [..., outputs].
      labels: [...] numbers (-1 and 1 for classes), or vectors [..., outputs].

    Returns:
      [...]. The root's gradient is finite where the prediction is right.
    """
    if kind not in KINDS:
        raise ConfigError(f"{kind!r} is no error; choose one of {', '.join(KINDS)}.")
    labels = labels if labels.ndim == predictions.ndim else labels[..., None]
    if kind == "bce":
        return jax.nn.softplus(-predictions * labels)[..., 0]
    if kind == "zero_one":
        return (predictions * labels <= 0)[..., 0].astype(predictions.dtype)
    squared = ((predictions - labels) ** 2).sum(-1)
    if kind == "squared":
        return squared
    norm = (squared + 1e-12) ** 0.5
    return norm if kind == "norm" else norm / ((labels**2).sum(-1) + 1e-12) ** 0.5


class InContext(ModuleObjective):
    """The mean error over prompts and positions.

    ``batch["inputs"]`` is [B, 2n, d], or [B, n, 2n, d] with one prompt for each position that is
    asked; ``labels`` [B, n] or [B, n, d]; ``weights`` [B, n]; ``dead`` [B].

    Metrics: ``error``, and ``dead``, the share of prompts that are left out because all ReLUs died.

    Attributes:
      kind: see ``pointwise``.
    """

    kind: str = flax.struct.field(pytree_node=False, default="squared")

    def init(self, rng: Array, batch: Batch) -> Variables:
        """As GPT-2: what each sublayer adds begins smaller by sqrt(2 layers)."""
        inputs = batch["inputs"]
        variables = super().init(rng, {**batch, "inputs": inputs[(0,) * (inputs.ndim - 3)]})
        backbone = self.module.backbone
        if not isinstance(backbone, VectorGPT2):
            return variables
        factor = (2 * backbone.stack.num_layers) ** -0.5

        def scale(path: Any, x: Array) -> Array:
            adds = path_str(path).endswith(("attention/out/kernel", "mlp/down/kernel"))
            return factor * x if adds else x

        params = jax.tree_util.tree_map_with_path(scale, variables.params)
        return variables._replace(params=params)

    def loss(self, variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        predictions, state = self._predictions(variables, batch, rng)
        error = pointwise(self.kind, predictions, batch["labels"])
        mask = example_mask(batch, len(error))
        mean = Mean.of(error, batch["weights"] * mask[:, None])
        metrics = {"error": mean, "dead": Mean.of(batch["dead"], mask)}
        return mean.value(), Aux(state, metrics, mean.weight, predictions)

    def predict(self, variables: Variables, batch: Batch) -> Array:
        """Returns [B, n, outputs]."""
        return self._predictions(variables, batch, None)[0]

    def _predictions(
        self, variables: Variables, batch: Batch, rng: Array | None
    ) -> tuple[Array, PyTree]:
        inputs = batch["inputs"]
        if inputs.ndim == 3:
            return self.apply(variables, batch, rng)
        rows = {"inputs": inputs.reshape(-1, *inputs.shape[2:])}
        every, state = self.apply(variables, rows, rng)
        every = every.reshape(*inputs.shape[:2], *every.shape[1:])
        return jnp.moveaxis(jnp.diagonal(every, axis1=1, axis2=2), -1, 1), state


class Prompts(Generated):
    """Prompts drawn on the device, of which ``share`` consecutive ones have one function.

    Attributes:
      generate: pure, ``(keys, settings) -> prompt`` with keys [2] of the function and of the rest,
        such as a ``FunctionClass``.
      share: with the batch size here, every step has a function of its own.
    """

    share: int = flax.struct.field(pytree_node=False, default=1)

    def key(self, index: Array) -> Array:
        """The keys [2] of a prompt."""
        functions, rest = jax.random.split(jax.random.key(self.seed))
        function = jax.random.fold_in(functions, index // self.share)
        return jnp.stack([function, jax.random.fold_in(rest, index)])


def function_class(config: Any) -> FunctionClass:
    """The prompts of a config."""
    try:
        return FunctionClass(**config.task.to_dict())
    except ValueError as e:
        raise ConfigError(f"config.task: {e}.") from e


def training_objective(config: Any, seed: int, name: str = "transformer") -> Prompts:
    """What a config trains.

    Args:
      config: of ``configs/icl_functions.py``.
      seed: of the prompts.
      name: one of ``MODELS``.
    """
    sharing = {"each": 1, "one": config.batch_size}
    if config.functions_per_batch not in sharing:
        raise ConfigError(
            f"config.functions_per_batch={config.functions_per_batch!r}; choose 'each' or 'one'."
        )
    task = function_class(config)
    c = config.curriculum
    return Prompts(
        inner=InContext(module=prompt_model(config, name), kind=config.loss),
        seed=jnp.uint32(seed),
        settings=settings(task, dims=config.active_dims),
        generate=task,
        schedule=Curriculum(tuple(c.dims), tuple(c.points), c.every) if c.every else None,
        share=sharing[config.functions_per_batch],
    )


def plan(config: Any) -> tuple[Objective, dict[str, jax.ShapeDtypeStruct], FitConfig]:
    """What a config would train, for ``training.aot.lower_step``.

    Returns:
      The objective, a batch, and the settings of the stage.
    """
    batch = {"index": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)}
    return training_objective(config, 0), batch, from_dict(FitConfig, config.train, "train")


# -- predictors without training ------------------------------------------------------------------


def _linear(z: np.ndarray, y: np.ndarray, q: np.ndarray, solve: Callable) -> np.ndarray:
    predictions = np.zeros(y.shape)
    for i in range(1, y.shape[1]):
        predictions[:, i] = np.einsum("np,npo->no", q[:, i], solve(z[:, :i], y[:, :i]))
    return predictions


def least_squares(z: np.ndarray, y: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The shortest of the best linear maps; Bayes' predictor for linear functions w ~ N(0, I)."""
    return _linear(z, y, q, lambda z, y: np.linalg.pinv(z, rcond=1e-6) @ y)


def ridge(z: np.ndarray, y: np.ndarray, q: np.ndarray, strength: float = 0.1) -> np.ndarray:
    """Least squares with ``strength`` times the squared length of the map."""

    def solve(z: np.ndarray, y: np.ndarray) -> np.ndarray:
        zt = np.swapaxes(z, 1, 2)
        return np.linalg.solve(zt @ z + strength * np.eye(z.shape[-1]), zt @ y)

    return _linear(z, y, q, solve)


def averaging(z: np.ndarray, y: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The map ``mean_j y_j z_j'``: one step of gradient descent from zero."""
    return _linear(z, y, q, lambda z, y: np.swapaxes(z, 1, 2) @ y / z.shape[1])


def nearest(z: np.ndarray, y: np.ndarray, q: np.ndarray, neighbours: int = 3) -> np.ndarray:
    """The mean y of the nearest examples."""
    predictions = np.zeros(y.shape)
    for i in range(1, y.shape[1]):
        distance = ((z[:, :i] - q[:, i, None]) ** 2).sum(-1)
        order = np.argsort(distance, axis=1)[:, :neighbours]
        predictions[:, i] = np.take_along_axis(y[:, :i], order[..., None], axis=1).mean(1)
    return predictions


def _each(z: np.ndarray, y: np.ndarray, q: np.ndarray, make: Callable[[], Any]) -> np.ndarray:
    """A scikit-learn regressor for every prefix of every prompt."""
    predictions = np.zeros(y.shape)
    for row in range(len(z)):
        for i in range(1, y.shape[1]):
            fitted = make().fit(z[row, :i], y[row, :i])
            predictions[row, i] = fitted.predict(q[row, i, None]).reshape(-1)
    return predictions


def lasso(z: np.ndarray, y: np.ndarray, q: np.ndarray, strength: float = 0.01) -> np.ndarray:
    """Least squares with ``strength`` times the sum of absolute values, without intercept."""
    from sklearn.linear_model import Lasso

    return _each(z, y, q, lambda: Lasso(strength, fit_intercept=False, max_iter=10_000))


def greedy_tree(z: np.ndarray, y: np.ndarray, q: np.ndarray, depth: int = 4) -> np.ndarray:
    """CART on the signs of the coordinates."""
    from sklearn.tree import DecisionTreeRegressor

    make = functools.partial(DecisionTreeRegressor, max_depth=depth, random_state=0)
    return _each(np.sign(z), y, np.sign(q), make)


def network(
    z: np.ndarray, y: np.ndarray, q: np.ndarray, hidden: int = 100, steps: int = 100
) -> np.ndarray:
    """Two layers with ReLU, for every prefix ``steps`` of Adam at 5e-3 from a random start."""
    count, outputs = y.shape[1:]
    optimizer = optax.adam(5e-3)
    first, second = jax.random.split(jax.random.key(0))
    start = {
        "w1": jax.random.normal(first, (z.shape[-1], hidden)) * (2 / z.shape[-1]) ** 0.5,
        "b1": jnp.zeros(hidden),
        "w2": jax.random.normal(second, (hidden, outputs)) * hidden**-0.5,
        "b2": jnp.zeros(outputs),
    }

    def apply(p: PyTree, x: Array) -> Array:
        return jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]

    def prefix(z: Array, y: Array, query: Array, i: Array) -> Array:
        weight = (jnp.arange(count) < i) / jnp.maximum(i, 1)

        def loss(p: PyTree) -> Array:
            return weight @ jnp.square(apply(p, z) - y).sum(-1)

        def step(carry: PyTree, _: None) -> tuple[PyTree, None]:
            p, moments = carry
            updates, moments = optimizer.update(jax.grad(loss)(p), moments)
            return (optax.apply_updates(p, updates), moments), None

        (p, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), None, length=steps)
        return jnp.where(i > 0, apply(p, query), 0.0)

    @jax.jit
    def prompts(z: Array, y: Array, q: Array) -> Array:
        def prompt(parts: tuple[Array, Array, Array]) -> Array:
            z, y, q = parts
            return jax.vmap(lambda query, i: prefix(z, y, query, i))(q, jnp.arange(count))

        return jax.lax.map(prompt, (z, y, q))

    return np.asarray(prompts(*(jnp.asarray(a, jnp.float32) for a in (z, y, q))), np.float64)


PREDICTORS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "zero": lambda z, y, q: np.zeros(y.shape),
    "averaging": averaging,
    "3 nearest": nearest,
    "least squares": least_squares,
    "ridge": ridge,
    "lasso": lasso,
    "greedy tree": greedy_tree,
    "network": network,
}
SLOW = ("lasso", "greedy tree", "network")
COPIES = ("persistence", "period 2")


def predictor(name: str, task: FunctionClass, asked: Mapping[str, np.ndarray]) -> np.ndarray:
    """Predictions of one of ``PREDICTORS`` or ``COPIES``.

    In sequences they see the window [x_t, ..., x_{t-w+1}], and what they give is divided by its
    length where the targets are unit vectors.

    Args:
      name: of the predictor; the copies are for sequences.
      task: the class.
      asked: ``xs``, ``queries`` [N, n, d] and ``ys`` [N, n] or [N, n, d].

    Returns:
      float64 [N, n, 1] or [N, n, d].
    """
    xs, ys, queries = (np.asarray(asked[key], np.float64) for key in ("xs", "ys", "queries"))
    if name in COPIES:
        if not task.sequential:
            raise ConfigError(f"config.baselines: {name!r} is for sequences, not {task.name!r}.")
        if name == "persistence":
            return queries
        return np.concatenate([np.zeros_like(xs[:, :1]), xs[:, :-1]], axis=1)
    if name not in PREDICTORS:
        known = (*PREDICTORS, *COPIES)
        raise ConfigError(f"config.baselines has {name!r}; choose from {', '.join(known)}.")
    z, q = xs, queries
    if task.sequential:
        z = np.asarray(jax.vmap(lambda x: windows(x, task.window))(jnp.asarray(xs)), np.float64)
        q = z.copy()
        q[:, :, 0] = queries
        z, q = (a.reshape(*xs.shape[:2], -1) for a in (z, q))
    predictions = PREDICTORS[name](z, ys if ys.ndim == 3 else ys[..., None], q)
    if task.normalised:
        length = np.linalg.norm(predictions, axis=-1, keepdims=True)
        predictions = predictions / np.where(length > 0, length, 1.0)
    if task.name == "classification":
        predictions = np.sign(predictions)
    return predictions


# -- evaluation -----------------------------------------------------------------------------------


@jax.jit
def _answers(objective: Prompts, variables: Variables, batch: Batch) -> dict[str, Array]:
    examples = objective.batch(batch)
    kept = {key: examples[key] for key in ("xs", "ys", "queries", "labels", "weights", "mask")}
    return {**kept, "predictions": objective.inner.predict(variables, examples)}


def ask(
    exp: Experiment, objective: Prompts, variables: Variables, count: int, batch_size: int
) -> dict[str, np.ndarray]:
    """Puts ``count`` prompts to a model.

    Returns:
      ``predictions`` [N, n, outputs] and the prompts' ``xs``, ``ys``, ``queries``, ``labels`` and
      ``weights``, of all processes.
    """
    from jax.experimental.multihost_utils import process_allgather

    parts = []
    for batch in exp.batches(Pipeline(IndexSource(count), batch_size)):
        answers = process_allgather(_answers(objective, variables, batch), tiled=True)
        real = answers.pop("mask") > 0
        parts.append({key: value[real] for key, value in answers.items()})
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def errors(
    config: Any, task: FunctionClass, predictions: np.ndarray, asked: Mapping[str, np.ndarray]
) -> np.ndarray:
    """``config.metric`` at every position, so that zero is at 1; NaN where none counts: [N, n]."""
    scale = 1.0
    if config.metric == "squared" and not task.sequential:
        scale = {"sparse_linear": task.sparsity, "tree": 1}.get(task.name, task.dims)
    error = np.asarray(pointwise(config.metric, predictions, asked["labels"]), np.float64) / scale
    return np.where(asked["weights"] > 0, error, np.nan)


def summarise(error: np.ndarray, resamples: int = 1000, seed: int = 0) -> dict[str, list[float]]:
    """Means over prompts and their uncertainty.

    Args:
      error: [N, n]; NaN does not count.
      resamples: of whole prompts, drawn with replacement.
      seed: of the resampling.

    Returns:
      ``mean``, ``std`` (unbiased, of one prompt), ``low`` and ``high``, the 5th and 95th percentile
      of the resampled means; [n] each.
    """
    count = len(error)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
    real = ~np.isnan(error)
    with np.errstate(invalid="ignore"):  # a position where no prompt counts has no mean
        means = (drawn @ np.where(real, error, 0.0)) / (drawn @ real)
        mean = np.where(real, error, 0.0).sum(0) / real.sum(0)
        deviation = np.where(real, error - mean, 0.0)
        std = np.sqrt((deviation**2).sum(0) / np.maximum(real.sum(0) - 1, 1))
        low, high = np.percentile(means, [5, 95], axis=0)
    values = {"mean": mean, "std": std, "low": low, "high": high}
    return {key: value.tolist() for key, value in values.items()}


def conditions(config: Any) -> dict[str, tuple[FunctionClass, dict[str, Array]]]:
    """What a model is asked: name -> class and settings. All have the same functions and x_1."""
    task = function_class(config)
    c = config.evaluation
    found = {"clean": (task, settings(task, dims=config.active_dims))}
    for mode, (x, y) in {"y": (0, 1), "x": (1, 0), "x and y": (1, 1)}.items():
        for m in c.random:
            if not 0 <= m <= task.points:
                raise ConfigError(f"config.evaluation.random has {m}; there are {task.points}.")
            changed = settings(task, dims=config.active_dims, random_x=x * m, random_y=y * m)
            found[f"{mode}, first {m}"] = (task, changed)
    if c.fresh_query and task.sequential:
        fresh = dataclasses.replace(task, query="fresh")
        found["fresh query"] = (fresh, settings(fresh, dims=config.active_dims))
    if task.pool:  # functions outside the pool
        new = dataclasses.replace(task, pool=0)
        found["new functions"] = (new, settings(new, dims=config.active_dims))
    for name in c.shifts:
        if name not in SHIFTS or task.name != "linear":
            raise ConfigError(
                f"config.evaluation.shifts has {name!r}; for linear functions there are "
                f"{', '.join(SHIFTS)}."
            )
        shifted = dataclasses.replace(task, **SHIFTS[name])
        found[name] = (shifted, settings(shifted))
    return found


def recipe(exp: Experiment) -> None:
    cfg = exp.config
    task, c = function_class(cfg), cfg.evaluation
    asked_of = conditions(cfg)
    points = list(range(1, task.points + 1))
    results: dict[str, dict[str, dict[str, list[float]]]] = {}
    rows = []
    for name in cfg.models:
        objective = training_objective(cfg, exp.seed("prompts"), name)
        numbers = Pipeline(IndexSource(), cfg.batch_size, repeat=True)
        fitted = exp.fit(name, objective, numbers, cfg.train)
        results[name] = exp.artifact(
            f"errors-{name}",
            functools.partial(_model_errors, exp, objective, fitted.variables, asked_of),
        )
        summary = fitted.summary
        running = max(summary["seconds"] - summary["compile_seconds"], 1e-9)
        rows.append([name, summary["parameters"], round(summary["steps"] / running, 2)])
    exp.table("Models", ["model", "parameters", "steps per second"], rows)
    baselines = exp.artifact(
        "errors-baselines",
        functools.partial(_baseline_errors, exp, objective, fitted.variables, asked_of),
    )

    everyone = {**results, **baselines["errors"]}
    scaled = cfg.metric == "squared" and not task.sequential
    unit = "squared error / variance" if scaled else f"error ({cfg.metric})"
    axes = {"xlabel": "position of the query", "ylabel": unit}
    clean = {name: found["clean"] for name, found in everyone.items()}
    exp.curve("Error by position", points, {n: f["mean"] for n, f in clean.items()}, **axes)
    bands: dict[str, list[float]] = {}
    columns: dict[str, list[float]] = {}
    for name in cfg.models:
        found = clean[name]
        bands |= {name: found["mean"], f"{name}, 5 %": found["low"], f"{name}, 95 %": found["high"]}
        columns[f"{name}, std"] = found["std"]
    exp.curve("Bands of resampled prompts", points, bands, **axes)
    columns = {**bands, **columns, **{name: clean[name]["mean"] for name in cfg.baselines}}
    exp.table("Error by position", ["position", *columns], list(zip(points, *columns.values())))
    main = results[cfg.models[0]]
    for mode in ("y", "x", "x and y") if c.random else ():
        curves = {"clean": main["clean"]["mean"]}
        curves |= {f"first {m}": main[f"{mode}, first {m}"]["mean"] for m in c.random}
        exp.curve(f"Random {mode}", points, curves, **axes)
    if c.random:
        start = main["clean"]["mean"][-1]
        ends = {"clean": [start] * (1 + len(c.random))}
        for mode in ("y", "x", "x and y"):
            ends[mode] = [start, *(main[f"{mode}, first {m}"]["mean"][-1] for m in c.random)]
        exp.curve(
            "Last position by the random prefix", [0, *c.random], ends,
            xlabel="examples replaced", ylabel=unit,
        )  # fmt: skip
    others = [name for name in asked_of if name == "new functions" or name in SHIFTS]
    if "fresh query" in asked_of:
        curves = {name: found["fresh query"]["mean"] for name, found in everyone.items()}
        exp.curve("Fresh query", points, curves, **axes)
        others.insert(0, "fresh query")
    if others:
        exp.table(
            "Last position that counts, other prompts", ["prompts", *everyone],
            [
                [name, *(_last(found[name]["mean"]) for found in everyone.values())]
                for name in ("clean", *others)
            ],
        )  # fmt: skip
    for name, value in baselines["facts"].items():
        exp.record(name, value)
    _claims(exp, main, baselines["errors"])


def _last(means: Sequence[float]) -> float:
    return [value for value in means if value == value][-1]


def _model_errors(
    exp: Experiment, objective: Prompts, variables: Variables, asked_of: Mapping[str, Any]
) -> dict[str, dict[str, list[float]]]:
    found = {}
    for name, asked in _asked(exp, objective, variables, asked_of):
        error = errors(exp.config, asked_of[name][0], asked["predictions"], asked)
        found[name] = summarise(error, exp.config.evaluation.resamples)
    return found


def _asked(
    exp: Experiment, objective: Prompts, variables: Variables, asked_of: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    c = exp.config.evaluation
    for name, (task, now) in asked_of.items():
        # Every prompt has a function of its own here, and none of the training's.
        other = objective.replace(
            generate=task, settings=now, share=1, seed=jnp.uint32(exp.seed("evaluation"))
        )
        size = c.batch_size
        if task.query != "same":  # n prompts in one
            devices = exp.layout.batch_devices
            size = devices * max(1, size // (task.points * devices))
        yield name, ask(exp, other, variables, c.prompts, size)


def _baseline_errors(
    exp: Experiment, objective: Prompts, variables: Variables, asked_of: Mapping[str, Any]
) -> dict[str, Any]:
    """Errors of ``config.baselines`` on the same prompts, and facts about the sequences.

    The prompts come with the answers of a model, which are not read: its program exists already.
    """
    cfg = exp.config
    shown = {
        name: value for name, value in asked_of.items() if name == "clean" or ", first " not in name
    }
    found: dict[str, dict[str, Any]] = {name: {} for name in cfg.baselines}
    facts: dict[str, float] = {}
    for name, asked in _asked(exp, objective, variables, shown):
        task = shown[name][0]
        for baseline in cfg.baselines:
            few = cfg.evaluation.slow_prompts if baseline in SLOW else None
            part = {key: value[:few] for key, value in asked.items()}
            error = errors(cfg, task, predictor(baseline, task, part), part)
            found[baseline][name] = summarise(error, cfg.evaluation.resamples)
        if name == "clean":
            alive = asked["weights"].any(axis=1)
            facts["share of evaluation prompts with dead ReLUs"] = float(1 - alive.mean())
            if task.sequential:
                steps = np.linalg.norm(asked["ys"][:, -1] - asked["xs"][:, -1], axis=-1)[alive]
                facts["share at rest at the end (step < 0.05)"] = float((steps < 0.05).mean())
                turns = np.linalg.norm(asked["ys"][:, -1] - asked["xs"][:, -2], axis=-1)[alive]
                share = float(((turns < 0.05) & (steps >= 0.05)).mean())
                facts["share in a cycle of two at the end"] = share
    return {"errors": found, "facts": facts}


def _claims(exp: Experiment, main: Mapping[str, Any], baselines: Mapping[str, Any]) -> None:
    """What a run should show; see ``config.required``, where 0 and () ask for nothing."""
    r = exp.config.required
    clean = np.array(main["clean"]["mean"])
    found: list[tuple[str, float, float]] = []  # what, measured, at most
    if r.last:
        found.append(("clean error at the last position", clean[-1], r.last))
    if r.trend:
        from scipy.stats import spearmanr

        rank = float(spearmanr(np.arange(len(clean)), clean).statistic)
        found.append(("rank correlation of position and error", rank, r.trend))
    if r.graded:
        last = [clean[-1], *(main[f"y, first {m}"]["mean"][-1] for m in r.graded)]
        rise = float(np.diff(last).min())
        what = f"least rise of the last error over 0, {', '.join(map(str, r.graded))} random labels"
        found.append((f"minus the {what}", -rise, 0.0))
    if r.recovered:
        m, start, bound = r.recovered
        value = max(main[f"y, first {int(m)}"]["mean"][int(start) - 1 :])
        what = f"largest error from position {int(start)} on, first {int(m)} labels random"
        found.append((what, value, bound))
    if r.least_squares:
        gap = np.abs(clean - np.array(baselines["least squares"]["clean"]["mean"]))
        found.append(("mean distance to least squares", float(gap.mean()), r.least_squares))
        found.append(("largest distance to least squares", float(gap.max()), r.least_squares))
    rows = [
        [what, round(float(value), 4), f"<= {bound:g}", "yes" if value <= bound else "no"]
        for what, value, bound in found
    ]
    if rows:
        exp.table("Required", ["what", "measured", "bound", "holds"], rows)
