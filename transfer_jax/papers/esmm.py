"""ESMM: Entire Space Multi-Task Model for post-click conversion rates (Ma et al. 2018).

The recipe trains one network of click rates (CTR), on its own, and then each of
``config.methods``, and scores their conversion rates (CVR) on test impressions:

* ``esmm``: click and conversion towers over shared tables, trained on clicks and on clicks followed
  by conversions, over all impressions; ``esmm_ns``: tables not shared; ``ctcvr_only``: without the
  clicks' term;
* ``base``: the conversion tower alone, on clicked impressions; ``aman``, ``oversampling``,
  ``unbias``: the same network on other choices of impressions (see ``data.conversions``);
* ``division``: a network of clicked-and-converted (CTCVR), divided by the CTR network.

Every method's CTCVR is its CVR times the CTR of the one separate network, as in the paper
(section 3.1). ESMM's conversion rates are known to lean upwards on some data (Wang et al. 2022,
"ESCM2"); it is kept as it is.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit, log_expit

from transfer_jax.configuration import ConfigError
from transfer_jax.data import conversions
from transfer_jax.data.conversions import ALICPP_SLOTS, Impressions
from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.splits import Subset
from transfer_jax.metrics.classification import (
    Area,
    StreamingAUC,
    auc_difference,
    auc_interval,
    calibration_error,
)
from transfer_jax.models.conversion import ConversionNetwork, Tower
from transfer_jax.objectives import Variables
from transfer_jax.objectives.conversion import EntireSpace
from transfer_jax.training import Experiment, FitConfig
from transfer_jax.training.checkpoint import read_tree
from transfer_jax.training.config import from_dict

METHODS = (
    "base", "aman", "oversampling", "unbias", "division", "ctcvr_only", "esmm_ns", "esmm",
)  # fmt: skip
# Methods that train on a choice of impressions, with the labels of one stage.
CHOSEN = ("base", "aman", "oversampling", "unbias")

Fields = tuple[tuple[str, int, int], ...]


def recipe(exp: Experiment) -> None:
    cfg = exp.config
    check_methods(cfg.methods)
    data = load_data(cfg)
    train, test = data["train"], data["test"]

    click = task(cfg, train.fields, "click")
    clicks_only = train.labelled(train.labels[:, :1])
    ctr = _fit(exp, "click", click, clicks_only, cfg.train, cfg.epochs, cfg.batch_size)
    click_scores = _log_rates(exp, "click", click, ctr, test)

    log_rates: dict[str, np.ndarray] = {}
    curves: dict[str, list[float]] = {}
    for method in cfg.methods:
        chosen, settings = _training(exp, method, click, ctr, train)
        objective = task(cfg, train.fields, method)
        variables = _fit(exp, method, objective, chosen, *settings)

        log_rates[method] = _log_rates(exp, method, objective, variables, test)
        if method == "division":
            log_rates[method] = log_rates[method] - click_scores
        elif cfg.curve and test.outcomes is not None:
            compute = functools.partial(_by_checkpoint, exp, method, objective, test)
            curves[method] = exp.artifact(f"curve-{method}", compute)
    _report(exp, test, click_scores, log_rates, curves)


def check_methods(methods: Any) -> None:
    """Refuses unknown methods, and none.

    Raises:
      ConfigError: names the nearest.
    """
    if not methods:
        raise ConfigError(f"config.methods is empty; choose among {', '.join(METHODS)}.")
    for method in methods:
        if method not in METHODS:
            near = difflib.get_close_matches(method, METHODS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"config.methods has {method!r}: {hint}there are {', '.join(METHODS)}."
            )


def load_data(cfg: Any) -> dict[str, Impressions]:
    """The ``train`` and ``test`` impressions of a config.

    Raises:
      ConfigError: an unknown kind of data, or Ali-CCP without its directory.
    """
    options = cfg.data.options.to_dict()
    kinds: dict[str, Callable[..., dict[str, Impressions]]] = {
        "funnel": conversions.funnel, "coat": conversions.coat,
        "alicpp_sample": conversions.alicpp_sample,
    }  # fmt: skip
    if cfg.data.kind == "alicpp":
        if not cfg.data.directory:
            raise ConfigError(
                "config.data.directory: Ali-CCP is read from a folder with the folders 'train' and "
                "'test' that Impressions.save writes; data.conversions.read_alicpp reads the "
                "released files."
            )
        return {
            part: Impressions.load(f"{cfg.data.directory}/{part}") for part in ("train", "test")
        }
    if cfg.data.kind not in kinds:
        raise ConfigError(
            f"config.data.kind={cfg.data.kind!r}; there are {', '.join([*kinds, 'alicpp'])}."
        )
    return kinds[cfg.data.kind](**options)


def task(cfg: Any, fields: Fields, method: str) -> EntireSpace:
    """The objective of a method, or of the separate CTR network (``click``)."""
    stages = {"click": ("click",), "division": ("click_and_conversion",)}.get(
        method, ("conversion",) if method in CHOSEN else ("click", "conversion")
    )
    chain = len(stages) == 2
    model = cfg.model
    dtype = jnp.dtype(model.dtype)
    module = ConversionNetwork(
        fields=fields, stages=stages, features=model.features, shared=method != "esmm_ns",
        tower=Tower(
            hidden=tuple(model.hidden), activation=model.activation,
            outputs=1 if model.head == "sigmoid" else 2, kernel_variance=model.kernel_variance,
            bias=model.bias, slope=model.slope, dtype=dtype,
        ),
        head=model.head, stddev=model.stddev, multiple=model.multiple, dtype=dtype,
    )  # fmt: skip
    click_weight = 0.0 if method == "ctcvr_only" else cfg.loss.click_weight
    return EntireSpace(
        module=module,
        event_weights=(click_weight, cfg.loss.event_weight) if chain else (),
        stage_weights=(0.0, cfg.loss.conversion_weight) if chain else (),
    )


def plan(cfg: Any) -> tuple[EntireSpace, dict[str, Any], FitConfig]:
    """What ESMM would train on Ali-CCP, without its data, for ``training.aot.lower_step``."""
    fields = tuple((name, cfg.data.sizes[name], n) for name, n in ALICPP_SLOTS.items())
    slots = sum(ALICPP_SLOTS.values())
    size = cfg.batch_size
    batch = {
        "inputs": {
            "ids": jax.ShapeDtypeStruct((size, slots), jnp.int32),
            "weights": jax.ShapeDtypeStruct((size, slots), jnp.float32),
        },
        "labels": jax.ShapeDtypeStruct((size, 2), jnp.float32),
    }
    steps = steps_of(cfg.data.rows, cfg.epochs, size)
    settings = dataclasses.replace(from_dict(FitConfig, cfg.train, "train"), steps=steps)
    return task(cfg, fields, "esmm"), batch, settings


def steps_of(rows: int, epochs: int, batch_size: int) -> int:
    """Steps of so many epochs, at least one."""
    return max(1, epochs * rows // batch_size)


# -- training -------------------------------------------------------------------------------------


def _training(
    exp: Experiment, method: str, click: EntireSpace, ctr: Any, train: Impressions
) -> tuple[Any, tuple[Any, int, int]]:
    """The impressions that a method trains on, and its settings, epochs and batch size."""
    cfg = exp.config
    entire = cfg.train, cfg.epochs, cfg.batch_size
    clicks, bought = train.labels[:, 0], train.labels[:, 1]
    if method == "division":
        return train.labelled((clicks * bought)[:, None]), entire
    if method not in CHOSEN:
        return train, entire
    if method == "base":
        rows = np.flatnonzero(clicks)
    elif method == "aman":
        rows = conversions.with_missing_as_negative(clicks, cfg.aman_share, exp.seed("aman rows"))
    elif method == "oversampling":
        rows = conversions.oversampled(clicks, bought, cfg.oversampling_times)
    else:
        rates = expit(scores(exp, click, ctr, train)[:, 0])
        rows, c = conversions.rejection_sampled(clicks, rates, exp.seed("unbias rows"))
        exp.record("unbias: c, the pCTR at and below which every row is kept", c)
        exp.record("unbias: rows kept", len(rows))
    # Without a click there is no conversion, whatever the file says.
    chosen = Subset(train.labelled((clicks * bought)[:, None]), rows)
    return chosen, (cfg.train, cfg.clicked.epochs, cfg.clicked.batch_size)


def _fit(
    exp: Experiment, name: str, objective: EntireSpace, source: Any, settings: Any, epochs: int,
    batch_size: int,
) -> Any:  # fmt: skip
    fit = from_dict(FitConfig, settings, "train")
    steps = steps_of(len(source), epochs, batch_size)
    fit = dataclasses.replace(fit, steps=steps)
    if exp.config.curve:
        every = max(1, steps // epochs)
        fit = dataclasses.replace(fit, checkpoint_every=every, keep=epochs + 2)
    data = Pipeline(source, batch_size, shuffle=True, seed=exp.seed(name), repeat=True)
    return exp.fit(name, objective, data, fit).variables


@jax.jit
def _predict(objective: EntireSpace, variables: Any, batch: Any) -> jax.Array:
    return objective.predict(variables, batch)


def scores(exp: Experiment, objective: EntireSpace, variables: Any, source: Any) -> np.ndarray:
    """The logits of every row of a source, float64 [N, K]."""
    data = Pipeline(source, exp.config.eval_batch_size)
    found = []
    for batch in exp.batches(data):
        logits = jax.device_get(_predict(objective, variables, batch))
        found.append(logits[jax.device_get(batch["mask"]) > 0])
    return np.concatenate(found).astype(np.float64)


def _log_rates(
    exp: Experiment, name: str, objective: EntireSpace, variables: Variables, test: Impressions
) -> np.ndarray:
    """log of the last stage's probability for every test row, float64 [N]; kept as an artifact."""

    def compute() -> dict[str, np.ndarray]:
        return {"logits": scores(exp, objective, variables, test)[:, -1].astype(np.float32)}

    logits = exp.artifact(f"scores-{name}", compute)["logits"]
    return log_expit(np.asarray(jax.device_get(logits), np.float64))


def _by_checkpoint(
    exp: Experiment, method: str, objective: EntireSpace, test: Impressions
) -> list[float]:
    """The entire-space CVR AUC at every checkpoint."""
    folder = exp.workdir / "stages" / method / "checkpoints"
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    areas = []
    for step in steps:
        tree = read_tree(folder / str(step) / "variables", exp.layout)
        params = tree["params"] if isinstance(tree, dict) else tree[0]
        rates = scores(exp, objective, Variables(params, {}), test)[:, -1]
        areas.append(area(rates, test.outcomes).auc)
    return areas


# -- results --------------------------------------------------------------------------------------


def area(scores: np.ndarray, labels: np.ndarray | None, limit: int = 5_000_000) -> Area:
    """The AUC with its 95 % interval; beyond ``limit`` rows from a histogram.

    Args:
      scores: [N], logarithms of probabilities or log odds.
      labels: [N] of 0 and 1.
      limit: rows that are sorted.
    """
    labels = np.asarray(labels)
    if len(scores) <= limit:
        return auc_interval(scores, labels)
    stream = StreamingAUC(low=-32.0, high=8.0)
    for rows in np.array_split(np.arange(len(scores)), -(-len(scores) // 1_000_000)):
        stream.update(scores[rows], labels[rows])
    return stream.value()


def _report(
    exp: Experiment,
    test: Impressions,
    click_scores: np.ndarray,
    log_rates: dict[str, np.ndarray],
    curves: dict[str, list[float]],
) -> None:
    comparisons = _comparisons(test, click_scores)
    rows: list[list[Any]] = []
    for method, rates in log_rates.items():
        rows.append([method])
        for pick in comparisons.values():
            found = area(*pick(rates))
            rows[-1] += [round(found.auc, 4), f"{found.low:.4f} to {found.high:.4f}"]
    header = [name for column in comparisons for name in (column, "95 % interval")]
    exp.table("AUC on test impressions", ["method", *header], rows)
    _report_calibration(exp, test, log_rates)
    if "esmm" in log_rates and len(test) <= 5_000_000:
        rows = []
        for other in log_rates:
            for column, pick in comparisons.items():
                if other != "esmm":
                    (first, labels), (second, _) = pick(log_rates["esmm"]), pick(log_rates[other])
                    test_of = auc_difference(first, second, labels)
                    rows.append([other, column, *(float(f"{x:.3g}") for x in test_of)])
        columns = ["ESMM minus", "AUC", "difference", "standard error", "p (DeLong)"]
        exp.table("ESMM against the others", columns, rows)
    if curves:
        _report_curves(exp, curves)


def _comparisons(test: Impressions, click_scores: np.ndarray) -> dict[str, Callable]:
    """AUC name -> log pCVR of a method to (scores, labels): only what the data tell."""
    clicks, bought, outcomes = _events(test)
    found: dict[str, Callable] = {}
    if not clicks.all():
        found["CVR AUC, clicked"] = lambda rates: (rates[clicks], bought[clicks])
        found["CTCVR AUC"] = lambda rates: (rates + click_scores, bought)
    if outcomes is not None:
        found["CVR AUC, entire space"] = lambda rates: (rates, outcomes)
    return found


def _events(test: Impressions) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Clicks (bool), conversions, and the outcomes of all impressions if known.

    Random impressions all count as clicked: there the clicked ones are no choice.
    """
    clicks = np.asarray(test.labels[:, 0]) > 0
    return clicks, np.asarray(test.labels[:, 0] * test.labels[:, 1]), test.outcomes


def _report_calibration(
    exp: Experiment, test: Impressions, log_rates: dict[str, np.ndarray]
) -> None:
    clicks, bought, outcomes = _events(test)
    chosen = not clicks.all()
    columns = ["method"]
    if chosen:
        columns += ["mean pCVR, clicked", "ECE, clicked", "log loss, clicked"]
        exp.record("conversions per click, test", float(bought[clicks].mean()))
    if outcomes is not None:
        columns += ["mean pCVR, all", "ECE, all", "log loss, all"]
        truth = outcomes if test.truth is None else test.truth
        exp.record("conversion rate, entire space", float(truth.mean()))
    if test.truth is not None:
        columns += ["mean |pCVR - truth|"]
        exp.record("CVR AUC of the truth, entire space", area(test.truth, outcomes).auc)
    rows: list[list[Any]] = []
    for method, rates in log_rates.items():
        p = np.exp(np.minimum(rates, 0.0))  # of division, it may exceed 1
        rows.append([method])
        if chosen:
            rows[-1] += _calibration(p[clicks], bought[clicks], bought[clicks])
        if outcomes is not None:
            rows[-1] += _calibration(p, truth, outcomes)
        if test.truth is not None:
            rows[-1].append(round(float(np.abs(p - test.truth).mean()), 4))
    exp.table("Calibration on test impressions", columns, rows)
    if "division" in log_rates:
        share = float((log_rates["division"] > 0).mean())
        exp.record("division: share of impressions with pCVR > 1", share)


def _calibration(p: np.ndarray, truth: np.ndarray, outcomes: np.ndarray) -> list[float]:
    """Mean, calibration error against the truth, and log loss of the outcomes."""
    clipped = np.clip(p, 1e-7, 1 - 1e-7)
    loss = -np.mean(outcomes * np.log(clipped) + (1 - outcomes) * np.log1p(-clipped))
    return [round(float(x), 4) for x in (p.mean(), calibration_error(p, truth), loss)]


def _report_curves(exp: Experiment, curves: dict[str, list[float]]) -> None:
    rows = [[method, max(areas), areas[-1]] for method, areas in curves.items()]
    columns = ["method", "best epoch (chosen on the test rows)", "last epoch"]
    exp.table("Entire-space CVR AUC by epoch", columns, rows)
    share = np.linspace(0.05, 1, 20)
    series = {
        method: np.interp(share, np.arange(1, len(areas) + 1) / len(areas), areas).tolist()
        for method, areas in curves.items()
    }
    exp.curve(
        "Entire-space CVR AUC", share.tolist(), series, xlabel="share of the training",
        ylabel="AUC",
    )  # fmt: skip
