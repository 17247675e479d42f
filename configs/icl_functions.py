"""In-context learning of function classes, sequential and independent."""

import dataclasses
from typing import Any

import ml_collections

from transfer_jax.data.function_classes import FunctionClass
from transfer_jax.training import base_config, fit_config

VARIANTS = {
    "window": "linear maps over a window of two, d = 4; nothing to download",
    "relu_window": "ReLU networks over a window of two, d = 4",
    "linear": "linear regression on independent inputs, d = 5: the control",
    "tree": "decision trees of depth 2 on independent inputs, d = 5",
    "seq_relu_2nn": "published: ReLU networks over a window of two, d = 20, 50,001 steps",
    "seq_relu_2nn_long": "published: the same with d = 100, 10 of them in x_1, and 100 points",
    "seq_linear": "published: linear maps, not normalised",
    "seq_rec_linear": "published: linear maps, normalised, 20,001 steps",
    "toy_linear": "published: linear regression, d = 5, 5,001 steps of the standard model",
    "garg_linear": "Garg et al.: linear regression, d = 20, 500,001 steps",
    "garg_sparse": "Garg et al.: sparse linear regression",
    "garg_relu": "Garg et al.: two-layer ReLU networks",
    "garg_tree": "Garg et al.: decision trees of depth 4",
    "garg_classification": "linear classification in the setting of Garg et al.",
}


def get_config(variant: str = "window") -> ml_collections.ConfigDict:
    if variant in SMALL:
        return SMALL[variant]()
    return PUBLISHED[variant]()


# -- small ----------------------------------------------------------------------------------------


def _window(**task: Any) -> ml_collections.ConfigDict:
    config = _base(
        _task(**{"name": "seq_rec_linear", "dims": 4, "points": 16, "window": 2, **task})
    )
    config.loss = "norm"
    config.evaluation.random = (1, 2, 4, 8, 12, 15)
    config.baselines = ("zero", "persistence", "period 2", "averaging", "3 nearest",
                        "least squares", "ridge", "network")  # fmt: skip
    config.train = _small_fit(1500)
    # Of the last position; of the trend; graded by 4, 8, 15 random labels; from position 12 on.
    config.required.update(last=0.3, trend=-0.9, graded=(4, 8, 15), recovered=(8, 12, 0.65))
    return config


def _relu_window() -> ml_collections.ConfigDict:
    config = _window(name="seq_relu_2nn", hidden=16)
    config.train = _small_fit(1000)
    config.required.update(recovered=())
    return config


def _linear() -> ml_collections.ConfigDict:
    config = _base(_task(name="linear", dims=5, points=11))
    config.loss = "squared"
    config.evaluation.random = (2, 4, 6, 10)
    config.evaluation.shifts = ("random quadrants", "orthogonal query", "query in the context",
                                "skewed covariance", "noisy labels", "x times 2")  # fmt: skip
    config.baselines = ("zero", "averaging", "3 nearest", "least squares")
    # Without the curriculum, or at a third of the rate, 3000 steps do not suffice.
    config.curriculum.update(dims=(1, 1), points=(11, 0), every=200)
    config.train = _small_fit(3000)
    config.train.optimizer.update(learning_rate=3e-3, weight_decay=0.0)
    config.required.least_squares = 0.15
    return config


def _tree() -> ml_collections.ConfigDict:
    config = _base(_task(name="tree", dims=5, points=21, depth=2))
    config.loss = "squared"
    config.baselines = ("zero", "3 nearest", "least squares", "greedy tree")
    config.train = _small_fit(1500)
    return config


SMALL = {"window": _window, "relu_window": _relu_window, "linear": _linear, "tree": _tree}


# -- published ------------------------------------------------------------------------------------


def _published(steps: int, loss: str, metric: str, **task: Any) -> ml_collections.ConfigDict:
    """Adam at 1e-4 on batches of 64, the standard model, no clipping and no dropout."""
    config = _base(_task(**task))
    config.model.update(size="standard", scan=True)
    config.loss, config.metric = loss, metric
    sequential = task["name"].startswith("seq")
    if sequential:  # the published code has one function in a step
        config.functions_per_batch = "one"
    copies = ("persistence", "period 2") if sequential else ()
    config.baselines = ("zero", *copies, "averaging", "3 nearest", "least squares", "ridge",
                        "network")  # fmt: skip
    points = task["points"]
    config.evaluation.random = tuple(range(1, points, 1 if points <= 20 else points // 10))
    config.train = fit_config(
        steps=steps, log_every=100, checkpoint_every=1000,
        optimizer={
            "name": "adamw" if sequential else "adam", "learning_rate": 1e-4,
            "weight_decay": 0.01 if sequential else 0.0,
        },
    )  # fmt: skip
    return config


def _seq_relu_2nn(dims: int = 20, points: int = 20) -> ml_collections.ConfigDict:
    """``task.tie_window=True`` and ``functions_per_batch=one`` are the code's; see ``_task``."""
    return _published(
        50_001, "norm", "norm", name="seq_relu_2nn", dims=dims, points=points, window=2,
        tie_window=True,
    )  # fmt: skip


def _seq_relu_2nn_long() -> ml_collections.ConfigDict:
    config = _seq_relu_2nn(100, 100)
    config.active_dims = 10
    config.train.steps = 50_000
    config.train.optimizer.learning_rate = 1e-3
    return config


def _seq_linear() -> ml_collections.ConfigDict:
    config = _published(
        50_001, "normalised", "normalised", name="seq_linear", dims=20, points=20,
        linear_init="authors",
    )  # fmt: skip
    config.batch_size = 1
    return config


def _seq_rec_linear() -> ml_collections.ConfigDict:
    return _published(
        20_001, "normalised", "normalised", name="seq_rec_linear", dims=20, points=11,
        linear_init="authors",
    )  # fmt: skip


def _toy_linear() -> ml_collections.ConfigDict:
    return _published(5001, "squared", "squared", name="linear", dims=5, points=11)


def _garg(name: str, points: int = 41) -> ml_collections.ConfigDict:
    config = _published(500_001, "squared", "squared", name=name, dims=20, points=points)
    start, increment = (26, 5) if points > 41 else (11, 2)
    config.curriculum.update(dims=(5, 1), points=(start, increment), every=2000)
    special = {"sparse_linear": ("lasso",), "tree": ("greedy tree",)}
    config.baselines = (*config.baselines, *special.get(name, ()))
    if name == "classification":
        config.loss, config.metric = "bce", "zero_one"
    if name == "linear":
        config.evaluation.shifts = (
            "random quadrants", "orthogonal query", "query in the context", "half subspace",
            "skewed covariance", "noisy labels", "x times 0.333", "x times 0.5", "x times 2",
            "x times 3", "y times 0.333", "y times 0.5", "y times 2", "y times 3",
        )  # fmt: skip
    return config


PUBLISHED = {
    "seq_relu_2nn": _seq_relu_2nn,
    "seq_relu_2nn_long": _seq_relu_2nn_long,
    "seq_linear": _seq_linear,
    "seq_rec_linear": _seq_rec_linear,
    "toy_linear": _toy_linear,
    "garg_linear": lambda: _garg("linear"),
    "garg_sparse": lambda: _garg("sparse_linear"),
    "garg_relu": lambda: _garg("relu_2nn", 101),
    "garg_tree": lambda: _garg("tree", 101),
    "garg_classification": lambda: _garg("classification"),
}


# -- parts ----------------------------------------------------------------------------------------


def _task(**fields: Any) -> ml_collections.ConfigDict:
    """Fields of ``transfer_jax.data.function_classes.FunctionClass``."""
    return ml_collections.ConfigDict(dataclasses.asdict(FunctionClass(**fields)))


def _base(task: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    config = base_config("icl_functions")
    config.task = task
    config.active_dims = 0  # non-zero coordinates of x; 0 = all
    config.functions_per_batch = "each"  # or 'one'
    config.batch_size = 64
    config.models = ("transformer",)  # and 'lstm', 's4', with as many parameters
    # scan: the layers are compiled as one, with parameters stacked on a leading axis.
    config.model = ml_collections.ConfigDict({"size": "tiny", "scan": False, "dtype": "float32"})
    # See transfer_jax.papers.icl_functions.pointwise.
    config.loss = "squared"
    config.metric = "squared"
    config.curriculum = ml_collections.ConfigDict({"dims": (5, 1), "points": (11, 2), "every": 0})
    config.evaluation = ml_collections.ConfigDict(
        {
            "prompts": 1280, "batch_size": 256, "slow_prompts": 64, "resamples": 1000,
            "random": (), "fresh_query": True, "shifts": (),
        }
    )  # fmt: skip
    config.baselines = ("zero",)
    config.required = ml_collections.ConfigDict(
        {"last": 0.0, "trend": 0.0, "graded": (), "recovered": (), "least_squares": 0.0}
    )
    config.train = fit_config()
    return config


def _small_fit(steps: int) -> ml_collections.ConfigDict:
    return fit_config(
        steps=steps, log_every=50,
        optimizer={
            "name": "adamw", "learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 100,
            "weight_decay": 0.01, "clip_norm": 1.0,
        },
    )  # fmt: skip
