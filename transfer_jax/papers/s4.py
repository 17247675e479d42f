"""S4: Efficiently Modeling Long Sequences with Structured State Spaces (Gu, Goel and Re 2021).

The recipe's ``config.task`` is one of

* ``classify``: one label per sequence (Long Range Arena, pixels, raw audio), and, with
  ``config.half_rate``, the same network on every second sample;
* ``language_model``: next token, perplexity, and a sample of text;
* ``recurrence``: convolution, scan and parallel scan agree; what a generated token costs;
* ``memory``: how well the state of one frozen LegS system remembers its input.
"""

import dataclasses
import difflib
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from transfer_jax.configuration import ConfigError
from transfer_jax.data.bundle import DataBundle, DatasetInfo
from transfer_jax.data.padding import bucketed
from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.registry import load
from transfer_jax.data.sources import Example, Source
from transfer_jax.data.speech import every_nth_sample
from transfer_jax.data.splits import Mapped
from transfer_jax.models import (
    LanguageModel,
    SequenceClassifier,
    SequencePairClassifier,
    generate,
)
from transfer_jax.nn import SSMKernel
from transfer_jax.objectives import Classification, NextToken, Objective
from transfer_jax.ops import fft_convolve, hippo, ssm
from transfer_jax.ops.scan import associative_linear_scan
from transfer_jax.training import Experiment, FitConfig
from transfer_jax.training.config import from_dict
from transfer_jax.training.loop import Fitted

Array = jax.Array

# The section of the config that holds a mixer's options.
_SECTIONS = {
    "s4": "s4", "s4d": "s4", "conv": "s4", "attention": "attention",
    "linear_attention": "linear_attention", "lstm": None, "gru": None,
}  # fmt: skip
_STATE_SPACES = ("s4", "s4d")


def recipe(exp: Experiment) -> None:
    tasks = {
        "classify": classify, "language_model": language_model, "recurrence": recurrence,
        "memory": memory,
    }  # fmt: skip
    if exp.config.task not in tasks:
        raise ConfigError(
            f"config.task={exp.config.task!r}; choose one of {', '.join(sorted(tasks))}."
        )
    tasks[exp.config.task](exp)


# -- training -------------------------------------------------------------------------------------


def classify(exp: Experiment) -> None:
    """Trains a classifier, keeps the parameters best on validation, and tests them once."""
    cfg = exp.config
    bundle = _load(cfg)
    if cfg.half_rate and bundle.info.features is None:
        raise ConfigError(
            f"config.half_rate: dataset {cfg.data.name!r} has tokens; only signals can be sampled "
            "at another rate."
        )
    task = Classification(module=classifier(cfg, bundle.info))
    fitted = _train(exp, task, bundle)

    def test_accuracy() -> dict[str, float]:
        source = bundle.splits["test"]
        accuracy = {"full rate": exp.evaluate(task, fitted.variables, _pipeline(cfg, source))}
        if cfg.half_rate:
            half = Pipeline(Mapped(source, every_nth_sample(2)), cfg.batch_size)
            accuracy["half rate, rate=1"] = exp.evaluate(task, fitted.variables, half)
            if cfg.model.mixer in _STATE_SPACES:
                slower = task.replace(module=task.module.clone(rate=2.0))
                accuracy["half rate, rate=2"] = exp.evaluate(slower, fitted.variables, half)
        return {name: metrics["accuracy"] for name, metrics in accuracy.items()}

    accuracy = exp.artifact("test", test_accuracy)
    _record_training(exp, fitted)
    if "validation/accuracy" in fitted.metrics:
        exp.record("validation accuracy", fitted.metrics["validation/accuracy"])
    exp.record("test accuracy", accuracy["full rate"])
    rows = [[name, round(value, 4)] for name, value in accuracy.items()]
    exp.table(f"Test accuracy ({cfg.model.mixer})", ["inputs", "accuracy"], rows)


def language_model(exp: Experiment) -> None:
    """Trains a language model; perplexity on windows that do not overlap; a sample of text."""
    cfg = exp.config
    bundle = _load(cfg)
    module = next_token_model(cfg, bundle.info)
    task = _next_token(cfg, module)
    fitted = _train(exp, task, bundle)
    test = exp.artifact(
        "test",
        lambda: exp.evaluate(task, fitted.variables, _pipeline(cfg, bundle.splits["test"])),
    )

    def continuation() -> list[int]:
        prompt = jnp.asarray(bundle.splits["test"][0]["inputs"][None, : cfg.sample.prompt])
        tokens = generate(
            module, {"params": fitted.params, **fitted.variables.state}, prompt,
            cfg.sample.tokens, rng=exp.key("sample"), temperature=cfg.sample.temperature,
        )  # fmt: skip
        return np.concatenate([prompt[0], tokens[0]]).tolist()

    tokens = exp.artifact("sample", continuation)
    words = [bundle.info.vocabulary[i] for i in tokens]
    between = "" if all(len(token) == 1 for token in bundle.info.vocabulary) else " "
    _record_training(exp, fitted)
    exp.record("prompt", between.join(words[: cfg.sample.prompt]))
    exp.record("sample", between.join(words[cfg.sample.prompt :]))
    rows = [["test", test["nll"], test["bits"], float(np.exp(test["nll"]))]]
    if "validation/nll" in fitted.metrics:
        nll, bits = fitted.metrics["validation/nll"], fitted.metrics["validation/bits"]
        rows.insert(0, ["validation", nll, bits, float(np.exp(nll))])
    exp.record("test perplexity", rows[-1][-1])
    exp.record("test bits per token", test["bits"])
    columns = ["split", "nats per token", "bits per token", "perplexity"]
    exp.table(f"Language modelling ({cfg.model.mixer})", columns, rows)


def classifier(config: Any, info: DatasetInfo) -> SequenceClassifier:
    """Builds the network of a config with ``task = "classify"``.

    Args:
      config: of ``configs/s4.py``.
      info: facts of the dataset, given by it or expected.

    Raises:
      ConfigError: an unknown mixer, or a dataset without classes.
    """
    if info.num_classes is None:
        raise ConfigError(
            f"dataset {config.data.name!r} has no classes; it is for config.task='language_model'."
        )
    kind = SequencePairClassifier if config.pairs else SequenceClassifier
    return kind(
        num_classes=info.num_classes, vocab_size=info.vocab_size, l_max=_length(config, info),
        **_model_fields(config),
    )  # fmt: skip


def next_token_model(config: Any, info: DatasetInfo) -> LanguageModel:
    """Builds the network of a config with ``task = "language_model"``; see ``classifier``.

    Raises:
      ConfigError: an unknown mixer or one that sees the future, or a dataset without tokens.
    """
    if info.vocab_size is None or info.num_classes is not None:
        raise ConfigError(
            f"dataset {config.data.name!r} has no windows of tokens; it is for "
            "config.task='classify'."
        )
    fields = _model_fields(config)
    options = fields["mixer_options"]
    if options.get("bidirectional") or not options.get("causal", True):
        raise ConfigError(
            f"a language model must not see the future: the mixer {config.model.mixer!r} must "
            "be causal (s4.bidirectional=False, attention.causal=True)."
        )
    return LanguageModel(vocab_size=info.vocab_size, l_max=_length(config, info) - 1, **fields)


def _model_fields(config: Any) -> dict[str, Any]:
    """The fields that both kinds of model take from the config."""
    mixer = config.model.mixer
    if mixer not in _SECTIONS:
        near = difflib.get_close_matches(mixer, _SECTIONS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"config.model.mixer={mixer!r}: {hint}there are {', '.join(sorted(_SECTIONS))}."
        )
    section = _SECTIONS[mixer]
    options = config[section].to_dict() if section else {}
    if section == "s4":
        options["init_seed"] = config.seed
    return {**config.model.to_dict(), "mixer_options": options}


def plan(config: Any) -> tuple[Objective, dict[str, jax.ShapeDtypeStruct], FitConfig]:
    """What a training config would run, without its data.

    Returns:
      The objective, a batch of the shapes that ``config.data.expected`` gives, and the settings of
      stage ``train``, for ``training.aot.lower_step``.
    """
    expected = config.data.expected.to_dict()
    lengths = expected.pop("lengths")
    info = DatasetInfo(**expected)
    size = config.batch_size
    rows = (size, 2) if config.task == "classify" and config.pairs else (size,)
    tokens = info.vocab_size is not None
    shape = (*rows, _length(config, info), *(() if tokens else (info.features,)))
    batch = {"inputs": jax.ShapeDtypeStruct(shape, jnp.int32 if tokens else jnp.float32)}
    if config.task == "language_model":
        return _next_token(config, next_token_model(config, info)), batch, _settings(config)
    batch["labels"] = jax.ShapeDtypeStruct((size,), jnp.int32)
    if lengths:
        batch["lengths"] = jax.ShapeDtypeStruct(rows, jnp.int32)
    return Classification(module=classifier(config, info)), batch, _settings(config)


def _next_token(config: Any, module: LanguageModel) -> NextToken:
    return NextToken(module=module, use_nll=config.model.cutoffs is not None)


def _length(config: Any, info: DatasetInfo) -> int:
    boundaries = config.get("bucket_boundaries", ())
    if info.length is None and not boundaries:
        raise ConfigError(
            f"dataset {config.data.name!r} has sequences of varying length: give the lengths to "
            "pad them to, as config.bucket_boundaries=(256, 512, 1024)."
        )
    return max(boundaries) if info.length is None else info.length


def _load(config: Any) -> DataBundle:
    options = {name: v for name, v in config.data.options.items() if v is not None}
    return load(config.data.name, **options)


def _pipeline(config: Any, source: Source, seed: int | None = None) -> Pipeline:
    """One pass in order, or with a ``seed`` endless shuffled batches."""
    train = seed is not None
    if not config.get("bucket_boundaries", ()):
        return Pipeline(source, config.batch_size, shuffle=train, seed=seed or 0, repeat=train)
    if config.pairs:
        raise ConfigError("config.bucket_boundaries: pairs of sequences cannot be bucketed.")
    examples = (source[i] for i in range(len(source)))
    return bucketed(
        source, [len(_unpadded(e)["inputs"]) for e in examples], config.bucket_boundaries,
        config.batch_size, seed or 0, shuffle=train, repeat=train, transforms=(_unpadded,),
    )  # fmt: skip


def _unpadded(example: Mapping[str, Any]) -> Example:
    valid = example.get("lengths", len(example["inputs"]))
    return {**example, "inputs": example["inputs"][:valid]}


def _settings(config: Any) -> FitConfig:
    """The fit settings, without the groups of state space parameters where there are none."""
    settings = from_dict(FitConfig, config.train, "train")
    if config.model.mixer in _STATE_SPACES:
        return settings
    groups = {k: g for k, g in settings.optimizer.groups.items() if "ssm/" not in g.where}
    return dataclasses.replace(
        settings, optimizer=dataclasses.replace(settings.optimizer, groups=groups)
    )


def _train(exp: Experiment, task: Objective, bundle: DataBundle) -> Fitted:
    cfg = exp.config
    settings = _settings(cfg)
    evaluate = {}
    if "validation" in bundle.splits:
        evaluate["validation"] = _pipeline(cfg, bundle.splits["validation"])
    else:
        if settings.optimizer.schedule == "plateau":
            raise ConfigError(
                "train.optimizer.schedule='plateau' watches the validation split, and dataset "
                f"{cfg.data.name!r} has none; choose another schedule."
            )
        # Nothing to select on: the last parameters are kept.
        settings = dataclasses.replace(settings, select_best=False, monitor="", patience=0)
    train = _pipeline(cfg, bundle.splits["train"], seed=exp.seed("train"))
    return exp.fit("train", task, train, settings, evaluate=evaluate)


def _record_training(exp: Experiment, fitted: Fitted) -> None:
    summary = fitted.summary
    exp.record("parameters", summary["parameters"])
    running = summary["seconds"] - summary["compile_seconds"]
    if running > 0:
        exp.record("steps per second (with evaluation)", round(summary["steps"] / running, 2))


# -- convolution and recurrence (demonstration A) -------------------------------------------------

# Systems by name: fields of SSMKernel, and the mode in which a parallel scan can run them. There is
# none for LegS: its eigenbasis is too ill-conditioned.
_SYSTEMS: dict[str, tuple[dict[str, Any], str | None]] = {
    "S4 LegS": ({}, None),
    "S4 FouT": ({"a_init": "fout"}, "diagonal"),
    "S4D LegS": ({"kernel": "diag", "a_init": "legs-diag"}, None),
}


def recurrence(exp: Experiment) -> None:
    """Every way to run a layer gives the same outputs; generation costs the same at every step."""
    cfg = exp.config.recurrence
    errors = exp.artifact("errors", lambda: _agreement(exp, cfg))
    rows = [[name, way, error] for name, ways in errors.items() for way, error in ways.items()]
    exp.table(
        "Largest error, relative to the largest output of the FFT convolution",
        ["system", "evaluation", "relative error"],
        rows,
    )
    exp.record("largest relative error", max(row[-1] for row in rows))

    cost = exp.artifact("generation", lambda: _generation(exp, cfg))
    for name in ("generated = convolved, relative error", "state bytes per sequence"):
        exp.record(name, cost[name])
    exp.table(
        f"Generating {cfg.generate} steps, {cfg.features} features, one sequence",
        ["way", "seconds"],
        [
            ["recurrence with a cached state (measured)", cost["recurrence"]],
            ["convolution again at every step (estimated, see below)", cost["convolution"]],
        ],
    )
    exp.record("recurrence is faster by", round(cost["convolution"] / cost["recurrence"], 1))
    exp.record(
        "how the convolution's time was estimated",
        "least of 20 runs at each length below, kernel computed once, one call a step (the "
        "recurrence makes one call for many); interpolated linearly and summed over all lengths",
    )
    columns = ["length", "seconds per convolution"]
    exp.table("One convolution of a prefix", columns, cost["convolutions"])
    exp.curve(
        "Time of one generated step", cost["positions"], {"recurrence": cost["microseconds"]},
        xlabel="position", ylabel="microseconds",
    )  # fmt: skip
    exp.record(
        "step time, last eighth / first eighth",
        round(_eighth(cost["microseconds"], -1) / _eighth(cost["microseconds"], 0), 3),
    )


def _eighth(values: list[float], which: int) -> float:
    return float(np.median(np.array_split(values, 8)[which]))


def _kernel(cfg: Any, options: Mapping[str, Any]) -> SSMKernel:
    return SSMKernel(cfg.features, state_size=cfg.state_size, l_max=cfg.length, **options)


def _initialise(module: SSMKernel, key: Array, length: int) -> tuple[Any, Array]:
    """The variables and the kernel [1, H, L] of a system."""
    taps, variables = jax.jit(module.init_with_output, static_argnums=1)(key, length)
    return variables, taps


def _discretise(module: SSMKernel, variables: Any, mode: str | None = None) -> ssm.Discrete:
    run = partial(module.apply, mode=mode, method="discretise")
    # The eigenbasis is found on the host.
    return cast(ssm.Discrete, (jax.jit(run) if mode is None else run)(variables))


def _agreement(exp: Experiment, cfg: Any) -> dict[str, dict[str, float]]:
    """Relative errors of the ways to run each system, against its FFT convolution."""
    u = jax.random.normal(exp.key("signal"), (1, cfg.length, cfg.features))

    def convolve(taps: Array, u: Array) -> Array:
        return jnp.moveaxis(fft_convolve(jnp.swapaxes(u, 1, 2), taps[0]), -1, 1)

    def parallel(system: ssm.Discrete, u: Array) -> Array:
        states = associative_linear_scan(system.a, system.b * u[..., None], axis=1)
        return jnp.sum(system.c[0] * states, axis=-1).real

    def scan(run: Callable) -> Callable:
        return lambda system, u: run(system, u, ssm.zero_state(system, 1))[0][:, :, 0]

    errors: dict[str, dict[str, float]] = {}
    for name, (options, mode) in _SYSTEMS.items():
        module = _kernel(cfg, options)
        variables, taps = _initialise(module, exp.key(name), cfg.length)
        reference = jax.jit(convolve)(taps, u)
        system = _discretise(module, variables)
        ways = {"scan": (scan(ssm.recurrence), system), "blocks": (scan(ssm.chunked), system)}
        if mode is not None:
            system = _discretise(module, variables, mode)
            ways["scan in the eigenbasis"] = (scan(ssm.recurrence), system)
        if not len(system.g):
            ways["parallel scan"] = (parallel, system)
        errors[name] = {
            way: float(jnp.abs(jax.jit(run)(s, u) - reference).max() / jnp.abs(reference).max())
            for way, (run, s) in ways.items()
        }
    return errors


def _generation(exp: Experiment, cfg: Any) -> dict[str, Any]:
    """Times a closed loop, ``u_{k+1} = tanh(y_k)``, by recurrence and by convolution."""
    module = _kernel(cfg, {})
    variables, taps = _initialise(module, exp.key("generation"), cfg.length)
    system = _discretise(module, variables)
    start = jax.random.normal(exp.key("start"), (1, cfg.features))
    block = max(1, cfg.generate // 32)

    @jax.jit
    def run(system: ssm.Discrete, x: Array, u: Array) -> tuple[Array, Array, Array]:
        def body(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
            x, u = carry
            y, x = ssm.step(system, x, u)
            return (x, jnp.tanh(y[:, 0])), u

        (x, u), inputs = jax.lax.scan(body, (x, u), None, length=block)
        return x, u, inputs

    def generate_all() -> tuple[list[float], Array, Array]:
        x, u, times, inputs = ssm.zero_state(system, 1), start, [], []
        for _ in range(cfg.generate // block):
            began = time.perf_counter()
            x, u, used = jax.block_until_ready(run(system, x, u))
            times.append(time.perf_counter() - began)
            inputs.append(used)
        return times, jnp.concatenate([*inputs, u[None]])[:, 0], x

    _, inputs, state = generate_all()  # compiles
    # Another job on the machine can only add time: the least of several is what a step costs.
    times = np.min([generate_all()[0] for _ in range(20)], axis=0)

    # What was generated, convolved: tanh of output k must be input k + 1.
    signal = inputs[:-1].T[None]
    outputs = jnp.tanh(fft_convolve(signal, taps[0, :, : signal.shape[-1]]))[0].T
    error = float(jnp.abs(outputs - inputs[1:]).max() / jnp.abs(inputs[1:]).max())

    convolve = jax.jit(lambda u, taps: fft_convolve(u, taps)[..., -1])
    lengths = [cfg.generate >> k for k in range(6, -1, -1)]
    seconds = []
    for length in lengths:
        prefix = signal[..., :length], taps[0, :, :length]
        jax.block_until_ready(convolve(*prefix))
        seconds.append(min(_seconds(partial(convolve, *prefix)) for _ in range(20)))
    every = np.arange(1, cfg.generate + 1)
    return {
        "recurrence": float(times.sum()),
        "convolution": float(np.interp(every, lengths, seconds).sum()),
        "convolutions": [list(pair) for pair in zip(lengths, seconds)],
        "positions": (block * np.arange(1, len(times) + 1)).tolist(),
        "microseconds": (1e6 * times / block).tolist(),
        "generated = convolved, relative error": error,
        "state bytes per sequence": int(state.nbytes),
    }


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


# -- memory (demonstration C) ---------------------------------------------------------------------


def memory(exp: Experiment) -> None:
    """Reads a signal on [0, 1] back from the state that it leaves in a frozen system.

    LegS, run as the time-invariant system ``x' = A x + B u`` for ``horizon`` units of its time, has
    ``x_n = int e^{-s} sqrt(2n+1) P_n(2 e^{-s} - 1) u(T - s) ds``: the coefficients of the signal in
    the Legendre polynomials of the warped time ``e^{-s}``. Summing them reads the signal back. A
    random A, of the spectral radius of LegS, has no such formula: it is read by the best linear
    decoder of its state, least squares in the norm in which the error is measured.
    """
    cfg = exp.config.memory
    sizes = [int(n) for n in cfg.state_sizes]
    errors = exp.artifact("errors", lambda: _memory_errors(exp, cfg))
    rows = [[n, *(errors[name][i] for name in errors)] for i, n in enumerate(sizes)]
    exp.table(
        "Relative error of the signal read back from the state", ["state size", *errors], rows
    )
    exp.curve("Memory", sizes, errors, xlabel="state size", ylabel="relative error")
    for name, values in errors.items():
        exp.record(f"error of {name}, {sizes[0]} to {sizes[-1]}", f"{values[0]:.3g} to "
                   f"{values[-1]:.3g}")  # fmt: skip


def band_limited(rng: np.random.Generator, count: int, band: int, length: int) -> np.ndarray:
    """Random signals on [0, 1] that begin at 0: [count, length], sines of 1/2 to ``band`` cycles,
    root mean square 1."""
    t = np.arange(1, length + 1) / length
    waves = np.sin(np.pi * np.arange(1, 2 * band + 1)[:, None] * t)
    signals = rng.normal(size=(count, 2 * band)) @ waves
    return signals / np.sqrt(np.mean(signals**2, axis=1, keepdims=True))


def _memory_errors(exp: Experiment, cfg: Any) -> dict[str, list[float]]:
    rng = np.random.default_rng(exp.seed("signals"))
    u = band_limited(rng, cfg.signals, cfg.band, cfg.length)
    errors: dict[str, list[float]] = {"LegS": [], "random A": []}
    for size in cfg.state_sizes:
        errors["LegS"].append(_relative(legs_readout(u, size, cfg.horizon), u))
        gaussian, b = hippo.random_dense(size, rng)
        # The eigenvalues of LegS are -1 ... -N.
        scale = size / np.abs(np.linalg.eigvals(gaussian)).max()
        read = best_readout(u, scale * gaussian, scale * b, cfg.horizon)
        errors["random A"].append(_relative(read, u))
    return errors


def _relative(read: np.ndarray, u: np.ndarray) -> float:
    return float(np.sqrt(np.mean((read - u) ** 2) / np.mean(u**2)))


def legs_readout(u: np.ndarray, size: int, horizon: float) -> np.ndarray:
    """Signals [K, L] on [0, 1], read back from the last state of the S4 recurrence with LegS.

    Args:
      u: real [K, L].
      size: N.
      horizon: units of the system's time that the signal lasts.
    """
    length = u.shape[1]
    lam, p, b, v = hippo.to_dplr(hippo.legs(size))
    as_array = lambda x: jnp.asarray(x, jnp.complex64)  # noqa: E731
    dt = jnp.full((1,), horizon / length, jnp.float32)
    # One output per coordinate of the state in its original basis: x = 2 Re(V z).
    system = ssm.discretise_dplr(
        dt, as_array(lam[None]), as_array(p[:, None]), as_array(p[:, None]), as_array(b[None]),
        as_array(v[:, None]),
    )  # fmt: skip
    signal = jnp.asarray(u[..., None], jnp.float32)
    y, _ = jax.jit(ssm.recurrence)(system, signal, ssm.zero_state(system, len(u)))
    state = np.asarray(y[:, -1, :, 0], np.float64)  # [K, N]
    # Bilinear inputs act in the middle of a step.
    age = horizon / length * (np.arange(length)[::-1] + 0.5)
    n = np.arange(size)
    basis = np.polynomial.legendre.legvander(2 * np.exp(-age) - 1, size - 1) * np.sqrt(2 * n + 1)
    return state @ basis.T


def best_readout(u: np.ndarray, a: np.ndarray, b: np.ndarray, horizon: float) -> np.ndarray:
    """Signals [K, L], projected onto what the state of ``x' = A x + B u`` can tell about them.

    No linear decoder of the state has a smaller squared error on white signals. Float64.
    """
    length = u.shape[1]
    half = horizon / length / 2 * a
    eye = np.eye(len(b))
    ab, bb = np.linalg.solve(eye - half, eye + half), np.linalg.solve(eye - half, b)
    taps = np.empty((len(b), length))
    x = bb
    for k in range(length):
        taps[:, length - 1 - k] = x
        x = ab @ x
    _, singular, rows = np.linalg.svd(taps, full_matrices=False)
    rows = rows[singular > 1e-6 * singular[0]]  # directions that single precision would keep
    return u @ rows.T @ rows
