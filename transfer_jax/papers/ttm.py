"""TTM: Tiny Time Mixers for zero-shot and few-shot forecasting (Ekambaram et al. 2024).

The recipe's ``config.task`` is one of

* ``transfer``: pre-training on series of several resolutions, then the target without any training
  (zero-shot), with a share of its training rows (head only, all parameters, from scratch), against
  closed forms and a linear network; shorter and longer horizons;
* ``prefix``: resolution prefix tuning on and off, on copies of the same series at two resolutions;
* ``exogenous``: channels apart, mixed in the decoder, and with known future values.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from transfer_jax.configuration import ConfigError
from transfer_jax.data import forecasting as data
from transfer_jax.data.forecasting import Benchmark, Corpus, SampledWindows, Series, Windows
from transfer_jax.data.pipeline import Pipeline
from transfer_jax.models.ttm import TTM, Linear, TTMConfig, forecast
from transfer_jax.objectives import Objective, Prepared, Trainable, Variables, WarmStart
from transfer_jax.objectives.forecasting import Forecasting
from transfer_jax.training import Experiment, FitConfig
from transfer_jax.training.config import from_dict

Array = jax.Array
PyTree = Any

# What is trained when the backbone is frozen.
HEAD = "^(decoder|head|exogenous)/"


def recipe(exp: Experiment) -> None:
    tasks = {"transfer": transfer, "prefix": prefix, "exogenous": exogenous}
    if exp.config.task not in tasks:
        raise ConfigError(
            f"config.task={exp.config.task!r}; choose one of {', '.join(sorted(tasks))}."
        )
    tasks[exp.config.task](exp)


def network(config: Any, **changes: Any) -> TTM:
    """Builds the network of a config, with some of its settings changed.

    Raises:
      ConfigError: batch normalisation, whose running statistics the recipes do not hand on.
    """
    if config.model.norm != "layer":
        raise ConfigError(
            "config.model.norm: the recipes take 'layer' only; 'batch' is for parity."
        )
    return TTM(TTMConfig(**{**config.model.to_dict(), **changes}), jnp.dtype(config.dtype))


# -- data -----------------------------------------------------------------------------------------


def target_set(config: Any) -> Benchmark:
    """Reads or draws the set that ``config.target`` names."""
    if config.target.name == "generated":
        return data.generated_benchmark(
            config.target.rows, config.target.seed, exogenous=config.task == "exogenous"
        )
    return data.benchmark(config.target.name, config.target.path)


def corpus_series(config: Any, names: tuple[str, ...], drs: str) -> list[Series]:
    """Reads the series of a corpus.

    Args:
      config: the experiment's.
      names: 'generated', 'nab', 'files' (the CSV files of ``config.corpus.path``), or a benchmark,
        of which the training and validation rows are taken.
      drs: how coarser copies are made, 'average' or 'decimate'; '' = none.
    """
    c = config.corpus
    series: list[Series] = []
    for name in names:
        if name == "generated":
            series += data.generated(c.count, c.rows, seed=c.seed)
        elif name == "nab":
            series += data.nab()
        elif name == "files":
            series += data.csv_series(c.path)
        else:
            bench = data.benchmark(name)
            values = bench.series.values[: bench.borders["validation"][1]]
            train = bench.borders["train"][1]
            series.append(dataclasses.replace(bench.series, values=values, train=train))
    if drs:
        least = config.model.context_length + config.model.prediction_length
        series = data.diverse_resolutions(
            series, least, method=drs, resolutions=config.corpus.resolutions
        )
    return series


def pretraining(
    config: Any, series: list[Series], seed: int, module: TTM
) -> tuple[Prepared, Pipeline]:
    """Returns the objective and the endless windows of pre-training, every channel on its own."""
    c = module.config
    length = c.context_length + c.prediction_length
    corpus = Corpus.of(series, length, vocab=c.rpt_vocab, clip=config.corpus.clip)
    source = SampledWindows(corpus, length, cap=config.corpus.cap, seed=seed)
    task = Prepared(
        inner=Forecasting(module=module, loss_name=config.loss),
        carried={"values": corpus.values},
        prepare=Windows(c.context_length, c.prediction_length),
    )
    return task, Pipeline(source, config.batch_size, repeat=True)


def plan(config: Any) -> tuple[Objective, PyTree, FitConfig]:
    """The pre-training step on shapes alone, for ``training.aot.lower_step``.

    ``config.corpus.planned_rows`` says how many rows all series have.
    """
    module, size = network(config), config.batch_size
    task = Prepared(
        inner=Forecasting(module=module, loss_name=config.loss),
        carried={"values": jax.ShapeDtypeStruct((config.corpus.planned_rows, 1), jnp.float32)},
        prepare=Windows(module.config.context_length, module.config.prediction_length),
    )
    batch = {name: jax.ShapeDtypeStruct((size,), jnp.int32) for name in ("start", "freq_token")}
    return task, batch, from_dict(FitConfig, config.pretrain)


class Target:
    """A target set, seen by networks of one context and horizon.

    Args:
      bench: the set.
      config: of the experiment.
      channels: columns that networks see; None = the targets alone (all, where none is named).
    """

    def __init__(self, bench: Benchmark, config: Any, channels: tuple[int, ...] | None = None):
        self.bench, self.config = bench, config
        self.context = config.model.context_length
        self.horizon = config.model.prediction_length
        if channels is None:
            channels = bench.targets or tuple(range(bench.series.values.shape[1]))
        self.values = np.ascontiguousarray(bench.series.values[:, np.array(channels)])
        self.token = data.resolution_token(bench.series.seconds, config.model.rpt_vocab)

    @property
    def day(self) -> int:
        """Steps of a day, or the whole context where that is shorter."""
        return min(round(86400 / self.bench.series.seconds), self.context)

    def starts(self, split: str) -> np.ndarray:
        return self.bench.starts(split, self.context, self.horizon)

    def objective(self, module: nn.Module, channels: tuple[int, ...] = ()) -> Prepared:
        task = Forecasting(module=module, channels=channels, loss_name=self.config.loss)
        carried = {"values": self.values}
        return Prepared(inner=task, carried=carried, prepare=Windows(self.context, self.horizon))

    def batches(self, starts: np.ndarray, seed: int | None = None) -> Pipeline:
        """One pass in order, or with a ``seed`` endless shuffled batches."""
        source, train = data.window_source(starts, self.token), seed is not None
        size = self.config.tune_batch_size if train else self.config.eval_batch_size
        return Pipeline(source, size, shuffle=train, seed=seed or 0, repeat=train)

    def tune(
        self,
        exp: Experiment,
        name: str,
        module: nn.Module,
        starts: np.ndarray,
        *,
        start: PyTree = None,
        where: str = "",
        channels: tuple[int, ...] = (),
    ) -> PyTree:
        """Trains on windows and keeps the parameters best on validation; returns all of them.

        Args:
          exp: the experiment.
          name: of the stage.
          module: the network.
          starts: of the training windows.
          start: parameters to start from; None = drawn.
          where: the parameters to train; '' = all. The others are frozen; dropout stays on in them.
          channels: see ``Forecasting``.
        """
        cfg = self.config
        objective: Any = self.objective(module, channels)
        if start is not None:
            objective = WarmStart(inner=objective, params=start)
        if where:
            objective = Trainable.of(objective, start, where)
        epoch = -(-len(starts) // cfg.tune_batch_size)
        settings = from_dict(FitConfig, cfg.tune)
        if cfg.tune_epochs:
            settings = dataclasses.replace(
                settings, steps=cfg.tune_epochs * epoch, eval_every=epoch, log_every=epoch
            )
        train = self.batches(starts, seed=exp.seed("tune"))
        validation = self.batches(self.starts("validation")[:: cfg.validation_stride])
        fitted = exp.fit(name, objective, train, settings, evaluate={"validation": validation})
        return objective.inner_params(fitted.params) if where else fitted.params

    def test(
        self, exp: Experiment, module: nn.Module, params: PyTree, channels: tuple[int, ...] = ()
    ) -> dict[str, float]:
        """Returns ``mse`` and ``mae`` over all windows of the test split."""
        batches = self.batches(self.starts("test"))
        return exp.evaluate(self.objective(module, channels), Variables(params, {}), batches)


# -- transfer -------------------------------------------------------------------------------------


def transfer(exp: Experiment) -> None:
    """Pre-trains on each corpus; zero-shot, few-shot and full training; references."""
    cfg = exp.config
    target = Target(target_set(cfg), cfg)
    module = network(cfg)
    tuned = network(cfg, head_dropout=cfg.tune_head_dropout)
    rows: list[list[Any]] = []

    def add(method: str, data_seen: str, score: Mapping[str, float]) -> float:
        rows.append([method, data_seen, score["mse"], score["mae"]])
        return score["mse"]

    if cfg.source not in cfg.corpora:
        raise ConfigError(f"config.source={cfg.source!r} is none of {', '.join(cfg.corpora)}.")
    pretrained: dict[str, PyTree] = {}
    scores: dict[str, float] = {}
    for name, (sources, drs) in cfg.corpora.items():
        stage = "pretrain" if name == cfg.source else f"pretrain_{name}"
        series = corpus_series(cfg, tuple(sources), drs)
        task, train = pretraining(cfg, series, exp.seed(f"windows {name}"), module)
        fitted = exp.fit(stage, task, train, cfg.pretrain)
        pretrained[name] = fitted.params
        score = exp.artifact(
            f"zero_shot_{name}", functools.partial(target.test, exp, module, fitted.params)
        )
        scores[f"zero-shot {name}"] = add(f"TTM zero-shot, pre-trained on {name}", "none", score)
    exp.record("parameters", fitted.summary["parameters"])
    source = pretrained[cfg.source]

    few = {
        f"{fraction:.0%}": target.bench.few_shot(
            fraction, target.context, target.horizon, location=cfg.fewshot_location, seed=cfg.seed
        )
        for fraction in cfg.fractions
    }
    if cfg.full_data:
        few["100%"] = target.starts("train")
    for share, starts in few.items():
        ways: dict[str, dict[str, Any]] = {
            "head": {"start": source, "where": HEAD}, "full": {"start": source}, "scratch": {},
        }  # fmt: skip
        for way in cfg.ways:
            name = f"{way}_{share.rstrip('%')}"
            params = target.tune(exp, name, tuned, starts, **ways[way])
            score = exp.artifact(f"test_{name}", functools.partial(target.test, exp, tuned, params))
            label = {"head": "TTM, head only", "full": "TTM, all parameters"}.get(
                way, "TTM scratch"
            )
            scores[f"{way} {share}"] = add(label, share, score)
        if cfg.dlinear:
            linear = DLinear(target.horizon)
            name = f"dlinear_{share.rstrip('%')}"
            params = target.tune(exp, name, linear, starts)
            score = exp.artifact(
                f"test_{name}", functools.partial(target.test, exp, linear, params)
            )
            add("DLinear", share, score)

    references = exp.artifact("references", lambda: _references(cfg, target, few))
    for name, (seen, score) in references.items():
        scores[name] = add(name, seen, score)
    title = f"Forecasts of {target.bench.series.name}, horizon {target.horizon}, all test windows"
    exp.table(title, ["method", "target rows seen", "MSE", "MAE"], sorted(rows, key=lambda r: r[2]))
    for name, value in scores.items():
        exp.record(f"MSE, {name}", value)

    horizons = exp.artifact("horizons", lambda: _horizons(cfg, target, module, source))
    columns = ["horizon", "passes", "TTM zero-shot", "profile"]
    exp.table("Pruned and recursive forecasts, MSE", columns, horizons)
    exp.curve("A test window", **_example(target, module, source))


def _references(
    config: Any, target: Target, few: Mapping[str, np.ndarray]
) -> dict[str, tuple[str, dict[str, float]]]:
    """Closed forms on the windows of the test split: name -> (rows seen, scores)."""
    context, horizon, values = target.context, target.horizon, target.values
    day = target.day
    test = target.starts("test")
    score = functools.partial(score_windows, values, test, context, horizon)
    result: dict[str, tuple[str, dict[str, float]]] = {
        "repeat-last": ("none", score(lambda x: seasonal_naive(x, horizon, 1))),
        "seasonal-naive": ("none", score(lambda x: seasonal_naive(x, horizon, day))),
        "profile": ("none", score(lambda x: profile(x, horizon, day, config.profile_days))),
    }
    for share, starts in {**few, "100%": target.starts("train")}.items():
        weights = ridge(values, starts, context, horizon)
        result[f"ridge {share}"] = (share, score(functools.partial(apply_ridge, weights)))
    for name, (sources, drs) in config.corpora.items():
        corpus = Corpus.of(
            corpus_series(config, tuple(sources), drs), context + horizon, clip=config.corpus.clip
        )
        stride = max(1, len(corpus.values) // config.ridge_windows)
        starts = np.concatenate(
            [
                offset + np.arange(0, length - context - horizon + 1, stride)
                for offset, length in zip(corpus.offsets, corpus.lengths)
            ]
        )
        weights = ridge(corpus.values, starts, context, horizon)
        result[f"ridge on {name}"] = ("none", score(functools.partial(apply_ridge, weights)))
    return result


def _horizons(config: Any, target: Target, module: TTM, params: PyTree) -> list[list[float]]:
    """MSE of shorter horizons by pruning and of longer ones by recursion, every 16th window."""
    day = target.day
    first, end = target.bench.borders["test"]
    rows = []
    for horizon in config.horizons:
        starts = data.window_starts(first, end, target.context, horizon)[::16]
        token = jnp.full((1,), target.token)

        def run(x: np.ndarray, horizon: int = horizon, token: Array = token) -> np.ndarray:
            tokens = jnp.broadcast_to(token, len(x))
            return np.asarray(predict(params, jnp.asarray(x), tokens, horizon))

        @functools.partial(jax.jit, static_argnums=3)
        def predict(params: PyTree, x: Array, tokens: Array, horizon: int) -> Array:
            return forecast(module, {"params": params}, x, horizon, freq_token=tokens)

        scores = [
            score_windows(target.values, starts, target.context, horizon, way)["mse"]
            for way in (run, lambda x, h=horizon: profile(x, h, day, config.profile_days))
        ]
        rows.append([horizon, -(-horizon // module.config.horizon), *scores])
    return rows


def _example(target: Target, module: TTM, params: PyTree) -> dict[str, Any]:
    start = int(target.starts("test")[0])
    window = target.values[start : start + target.context + target.horizon]
    token = jnp.array([target.token])
    y = jax.jit(lambda p, x: module.apply({"params": p}, x, freq_token=token))(
        params, window[None, : target.context]
    )
    shown = min(target.context, 2 * target.horizon)
    truth = window[target.context - shown :, -1].tolist()
    guess = [float("nan")] * shown + np.asarray(y)[0, :, -1].tolist()
    steps = list(range(-shown, target.horizon))
    return {
        "x": steps, "series": {"truth": truth, "zero-shot": guess}, "xlabel": "step",
        "ylabel": "z-score",
    }  # fmt: skip


# -- references -----------------------------------------------------------------------------------


class DLinear(nn.Module):
    """A linear map of the trend and another of the rest (Zeng et al. 2023), shared by channels.

    Attributes:
      horizon: steps to forecast.
      width: of the moving average, whose ends repeat the first and last value.
    """

    horizon: int
    width: int = 25

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Maps [B, sl, C] to [B, horizon, C]."""
        half = (self.width - 1) // 2
        padded = jnp.pad(inputs, ((0, 0), (half, self.width - 1 - half), (0, 0)), mode="edge")
        sums = jnp.cumsum(jnp.pad(padded, ((0, 0), (1, 0), (0, 0))), axis=1)
        trend = (sums[:, self.width :] - sums[:, : -self.width]) / self.width
        rest = Linear(self.horizon, -2, name="rest")(inputs - trend)
        return rest + Linear(self.horizon, -2, name="trend")(trend)


def seasonal_naive(context: np.ndarray, horizon: int, period: int) -> np.ndarray:
    """Repeats the last ``period`` steps of [B, sl, C]; a period of 1 repeats the last value."""
    return context[:, -period:][:, np.arange(horizon) % period]


def profile(context: np.ndarray, horizon: int, period: int, count: int = 7) -> np.ndarray:
    """Repeats the mean of the last ``count`` periods of [B, sl, C], fewer where it is short."""
    count = min(count, context.shape[1] // period)
    days = context[:, -count * period :].reshape(len(context), count, period, -1)
    return days.mean(axis=1)[:, np.arange(horizon) % period]


def _scale(context: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    loc = context.mean(axis=1, keepdims=True)
    return loc, np.sqrt(context.var(axis=1, keepdims=True) + 1e-5)


def ridge(
    values: np.ndarray, starts: np.ndarray, context: int, horizon: int, strength: float = 0.1
) -> np.ndarray:
    """Linear regression of the horizon on the context, both normalised by the context, closed form.

    Shared by the channels, without intercept: ``(X'X + strength tr(X'X) / sl I)^-1 X'Y``. Windows
    that leave ten deviations of their context, such as those after a constant one, are not used:
    a few of them would decide everything.

    Returns:
      float64 [sl, fl].
    """
    gram = np.zeros((context, context + horizon))
    for rows in _chunks(values, starts, context + horizon):
        loc, scale = _scale(rows[:, :context])
        rows = ((rows - loc) / scale).swapaxes(1, 2).reshape(-1, context + horizon)
        rows = rows[np.abs(rows).max(axis=1) < 10]
        gram += rows[:, :context].T @ rows
    xx, xy = gram[:, :context], gram[:, context:]
    return np.linalg.solve(xx + strength * np.trace(xx) / context * np.eye(context), xy)


def apply_ridge(weights: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Forecasts [B, fl, C] from [B, sl, C]."""
    loc, scale = _scale(context)
    normal = (context - loc) / scale
    return np.einsum("btc,th->bhc", normal, weights, optimize=True) * scale + loc


def _chunks(values: np.ndarray, starts: np.ndarray, length: int, size: int = 512) -> Any:
    """Yields windows [B, length, C], a few at a time."""
    for i in range(0, len(starts), size):
        yield values[starts[i : i + size, None] + np.arange(length)]


def score_windows(
    values: np.ndarray,
    starts: np.ndarray,
    context: int,
    horizon: int,
    way: Callable[[np.ndarray], np.ndarray],
) -> dict[str, float]:
    """Returns ``mse`` and ``mae`` of ``way`` ([B, sl, C] -> [B, fl, C]) over windows."""
    squared = absolute = 0.0
    for rows in _chunks(values, starts, context + horizon):
        error = np.asarray(way(rows[:, :context]), np.float64) - rows[:, context:]
        squared += float(np.square(error).sum())
        absolute += float(np.abs(error).sum())
    total = len(starts) * horizon * values.shape[1]
    return {"mse": squared / total, "mae": absolute / total}


# -- resolution prefix ----------------------------------------------------------------------------


def prefix(exp: Experiment) -> None:
    """Trains with and without the prefix on two resolutions; MSE by resolution on later rows."""
    cfg = exp.config
    low, high = cfg.prefix.resolutions
    length = cfg.model.context_length + cfg.model.prediction_length
    fine = [s for s in corpus_series(cfg, tuple(cfg.prefix.sources), "") if s.seconds == low]
    both = [*fine, *(data.coarsen(s, high // low, "average") for s in fine)]
    both = [s for s in both if int(cfg.prefix.share * len(s.values)) >= length]
    both = [dataclasses.replace(s, train=int(cfg.prefix.share * len(s.values))) for s in both]
    train = [dataclasses.replace(s, values=s.values[: s.train]) for s in both]
    rows = []
    for name, on in (("with prefix", True), ("without", False)):
        module = network(cfg, rpt=on)
        task, batches = pretraining(cfg, train, exp.seed("windows"), module)
        stage = "with_prefix" if on else "without_prefix"
        fitted = exp.fit(stage, task, batches, cfg.pretrain)

        def score(module: TTM = module, params: PyTree = fitted.params) -> dict[str, float]:
            return {str(step): _later_rows(exp, module, params, both, step) for step in (low, high)}

        scores = exp.artifact(f"test_{stage}", score)
        rows.append([name, *scores.values(), float(np.mean(list(scores.values())))])
        exp.record(f"MSE, {name}", rows[-1][-1])
    columns = ["network", f"MSE at {low} s", f"MSE at {high} s", "mean"]
    exp.table(f"Context {cfg.model.context_length}: resolution prefix", columns, rows)
    exp.record("series", len(both))


def _later_rows(
    exp: Experiment, module: TTM, params: PyTree, series: list[Series], seconds: float
) -> float:
    """MSE at one resolution over windows whose horizon lies behind the training rows."""
    cfg, c = exp.config, module.config
    context, horizon = c.context_length, c.prediction_length
    corpus = Corpus.of(series, context + horizon, vocab=c.rpt_vocab, clip=cfg.corpus.clip)
    starts = np.concatenate(
        [
            offset + data.window_starts(s.train or 0, len(s.values), context, horizon)
            for offset, s in zip(corpus.offsets, series)
            if s.seconds == seconds
        ]
    )
    task = Prepared(
        inner=Forecasting(module=module), carried={"values": corpus.values},
        prepare=Windows(context, horizon),
    )  # fmt: skip
    token = data.resolution_token(seconds, c.rpt_vocab)
    source = data.window_source(starts[:: cfg.validation_stride], token)
    batches = Pipeline(source, cfg.eval_batch_size)
    return exp.evaluate(task, Variables(params, {}), batches)["mse"]


# -- exogenous channels ---------------------------------------------------------------------------


def exogenous(exp: Experiment) -> None:
    """Trains three networks on one set: channels apart, mixed, and with the future of some known.

    Where ``config.pretrain.steps`` is not 0, all start from one pre-trained backbone.
    """
    cfg = exp.config
    bench = target_set(cfg)
    if not bench.exogenous:
        raise ConfigError(f"{bench.series.name} has no exogenous channels; try bike_sharing.")
    everything = tuple(range(bench.series.values.shape[1]))
    roles = {
        "channels": len(everything), "prediction_channels": bench.targets,
        "decoder_mode": "mix_channel",
    }  # fmt: skip
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "independent": ("channels apart", {"channels": len(bench.targets)}),
        "mixed": ("mixed in the decoder", roles),
        "exogenous": (
            "and known future",
            {**roles, "exogenous_channels": bench.exogenous, "fcm": True, **cfg.fcm.to_dict()},
        ),
    }
    rows: list[list[Any]] = []
    for way in cfg.exogenous_ways:
        label, changes = ways[way]
        target = Target(bench, cfg, None if way == "independent" else everything)
        module = network(cfg, **changes)
        channels = module.config.targets
        params = target.tune(exp, way, module, target.starts("train"), channels=channels)
        test = functools.partial(target.test, exp, module, params, channels)
        score = exp.artifact(f"test_{way}", test)
        rows.append([label, score["mse"], score["mae"]])
        exp.record(f"MSE, {label}", score["mse"])
    target = Target(bench, cfg)
    day = target.day
    score = functools.partial(
        score_windows, target.values, target.starts("test"), target.context, target.horizon
    )
    naive = score(lambda x: seasonal_naive(x, target.horizon, day))
    daily = score(lambda x: profile(x, target.horizon, day, cfg.profile_days))
    weights = ridge(target.values, target.starts("train"), target.context, target.horizon)
    linear = score(functools.partial(apply_ridge, weights))
    for label, value in (("seasonal-naive", naive), ("profile", daily), ("ridge", linear)):
        rows.append([label, value["mse"], value["mae"]])
    exp.table(f"Targets of {bench.series.name}, all test windows", ["method", "MSE", "MAE"], rows)


# -- learning rate --------------------------------------------------------------------------------


def lr_range_test(
    objective: Objective,
    variables: Variables,
    batches: Any,
    key: Array,
    *,
    steps: int = 100,
    lowest: float = 1e-7,
    highest: float = 10.0,
) -> tuple[float, list[float], list[float]]:
    """Suggests a learning rate: it grows until the loss explodes; the middle of the valley counts.

    AdamW with rates that grow exponentially; losses smoothed with 0.98 and corrected for their
    start; it ends where they exceed four times their least. The variables given stay as they are.

    Args:
      objective: what would be trained.
      variables: where to start.
      batches: an iterable of at least ``steps`` batches.
      key: of the dropout.
      steps, lowest, highest: of the rates.

    Returns:
      The suggested rate, the rates tried and the smoothed losses.
    """
    tx = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.01))

    @jax.jit
    def step(
        objective: Objective, params: PyTree, moments: PyTree, batch: Any, rate: Array, key: Array
    ) -> tuple[PyTree, PyTree, Array]:
        def loss(params: PyTree) -> Array:
            return objective.loss(Variables(params, variables.state), batch, key)[0]

        value, grads = jax.value_and_grad(loss)(params)
        updates, moments = tx.update(grads, moments, params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        return params, moments, value

    params, moments, average = variables.params, tx.init(variables.params), 0.0
    rates: list[float] = []
    losses: list[float] = []
    for i, batch in zip(range(steps), batches):
        rate = lowest * (highest / lowest) ** (i / (steps - 1))
        params, moments, value = step(
            objective, params, moments, batch, jnp.float32(rate), jax.random.fold_in(key, i)
        )
        average = 0.98 * average + 0.02 * float(value)
        rates.append(rate)
        losses.append(average / (1 - 0.98 ** (i + 1)))
        if not np.isfinite(losses[-1]) or losses[-1] > 4 * min(losses):
            break
    return valley(rates, losses), rates, losses


def valley(rates: list[float], losses: list[float]) -> float:
    """Returns a rate within the longest decreasing subsequence of the losses."""
    lengths = np.ones(len(losses), int)
    for i in range(1, len(losses)):
        below = [lengths[j] + 1 for j in range(i) if losses[i] < losses[j]]
        lengths[i] = max(below, default=1)
    end = int(lengths.argmax())
    start = end - int(lengths[end])
    third = (end - start) / 3
    return rates[max(start + int(third) + int(third / 2), 0)]
