"""optax optimisers and schedules from a config, with per-path learning rates and weight decay."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from transfer_jax.training.config import ConfigError, OptimizerConfig
from transfer_jax.trees import path_str, paths

PyTree = Any
Schedule = Callable[[Any], Any]

_MAIN = "main"


class UncorrectedAdamState(NamedTuple):
    """Moments of ``uncorrected_adam``, trees of the parameters' structure."""

    mu: PyTree
    nu: PyTree


def uncorrected_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam without bias correction, as in the released BERT: ``m / (sqrt(v) + eps)``.

    With the usual decays the first steps are about three times as long as Adam's: at step 1 m is a
    tenth and sqrt(v) a thirtieth of the gradient. After some thousand steps the two coincide.
    """

    def init(params: PyTree) -> UncorrectedAdamState:
        return UncorrectedAdamState(optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    def update(updates: PyTree, state: UncorrectedAdamState, params: PyTree = None) -> Any:
        del params
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(updates, state.nu, b2, 2)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, UncorrectedAdamState(mu, nu)

    return optax.GradientTransformation(init, update)


OPTIMIZERS: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
    "adam": lambda c: optax.scale_by_adam(c.b1, c.b2, c.eps),
    "adamw": lambda c: optax.scale_by_adam(c.b1, c.b2, c.eps),
    "bert_adamw": lambda c: uncorrected_adam(c.b1, c.b2, c.eps),
    "lamb": lambda c: optax.scale_by_adam(c.b1, c.b2, c.eps),
    "lion": lambda c: optax.scale_by_lion(c.b1, c.b2),
    "adafactor": lambda c: optax.scale_by_factored_rms(),
    "rmsprop": lambda c: optax.chain(
        optax.scale_by_rms(c.b2, c.eps, eps_in_sqrt=False),
        optax.trace(c.b1) if c.b1 else optax.identity(),
    ),
    "sgd": lambda c: optax.trace(c.b1) if c.b1 else optax.identity(),
}

SCHEDULES = ("constant", "cosine", "linear", "rsqrt", "plateau", "onecycle")

_CYCLED = ("adam", "adamw", "lamb")  # optimisers whose b1 goes with the one-cycle schedule


def schedule_shape(config: OptimizerConfig, steps: int) -> Schedule:
    """Returns step -> share of the peak rate, in [0, 1].

    Linear warm-up over ``warmup_steps``, then the named decay over the remaining steps. ``rsqrt``
    is ``sqrt(w / step)`` with ``w = max(warmup_steps, 1)``. ``plateau`` is constant here: ``fit``
    cuts it when the monitored metric stops improving. ``onecycle`` is PyTorch's OneCycleLR: from
    1/25 up by a half cosine over the first 30 % of all steps, down to 1/250,000 over the rest.

    Args:
      config: the optimiser's config.
      steps: length of the whole stage.

    Raises:
      ConfigError: the warm-up is not shorter than the stage.
    """
    warmup = config.warmup_steps
    if warmup and warmup >= steps:
        raise ConfigError(
            f"optimizer.warmup_steps={warmup} is not shorter than the stage of {steps} steps; "
            "set it below."
        )
    rest = steps - warmup
    if config.schedule == "onecycle":
        return _one_cycle(steps, 1 / 25, 1.0, 1 / 25e4)
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(1.0, rest, config.final_fraction)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(1.0, config.final_fraction, rest)
    elif config.schedule == "rsqrt":
        start = max(warmup, 1)

        def decay(step: Any) -> Any:
            return jnp.sqrt(start / (start + jnp.maximum(step, 0)))

    else:
        decay = optax.constant_schedule(1.0)
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), decay], [warmup])


def _one_cycle(steps: int, first: float, peak: float, last: float) -> Schedule:
    """Half a cosine from ``first`` to ``peak``, another to ``last``, at the last step."""
    top, end = 0.3 * steps - 1.0, steps - 1.0

    def value(step: Any) -> Any:
        rise = step / max(top, 1e-9)
        fall = jnp.minimum((step - top) / max(end - top, 1e-9), 1.0)
        up = peak + (first - peak) * 0.5 * (1 + jnp.cos(jnp.pi * rise))
        down = last + (peak - last) * 0.5 * (1 + jnp.cos(jnp.pi * fall))
        return jnp.where(step <= top, up, down)

    return value


def _cycled_adam(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Adam whose b1 falls from 0.95 to 0.85 while the rate rises, and rises while it falls."""
    b1 = _one_cycle(steps, 0.95, 0.85, 0.95)
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        now = optax.scale_by_adam(b1(state.count), config.b2, config.eps)
        return now.update(updates, state, params)

    return optax.GradientTransformation(adam.init, update)


def group_labels(config: OptimizerConfig, params: PyTree) -> PyTree:
    """Returns a tree that names each parameter's group, ``main`` where it belongs to none.

    Raises:
      ConfigError: a group matches no parameter: its settings would silently do nothing.
    """
    patterns = {name: re.compile(group.where) for name, group in config.groups.items()}
    for name, pattern in patterns.items():
        if not any(pattern.search(p) for p in paths(params)):
            raise ConfigError(
                f"optimizer.groups.{name}.where={pattern.pattern!r} matches none of the parameters "
                f"{paths(params)[:8]}{' …' if len(paths(params)) > 8 else ''}."
            )

    def label(path: str) -> str:
        return next((name for name, p in patterns.items() if p.search(path)), _MAIN)

    return jax.tree_util.tree_map_with_path(lambda kp, _: label(path_str(kp)), params)


def make_optimizer(
    config: OptimizerConfig, steps: int, params: PyTree
) -> tuple[optax.GradientTransformation, Schedule]:
    """Builds the optimiser of a stage.

    Order: clip entries, clip the global norm, rescale (Adam, Lion, …), decay the weights, scale by
    the learning rate. SGD adds the decay to the gradient, before its momentum, as is usual there.

    Args:
      config: see ``OptimizerConfig``.
      steps: length of the stage, for the schedule.
      params: the trained parameters (only paths matter).

    Returns:
      The transformation, whose updates are to be *added*, and the schedule of the main group
      (step -> learning rate) for logging.
    """
    labels = group_labels(config, params)
    shape = schedule_shape(config, steps)
    rates = {_MAIN: config.learning_rate}
    decays = {_MAIN: config.weight_decay}
    for name, group in config.groups.items():
        rates[name], decays[name] = group.learning_rate, group.weight_decay

    def scaled(rate: float) -> optax.GradientTransformation:
        return optax.scale_by_learning_rate(lambda step: rate * shape(step))

    if config.schedule == "onecycle" and config.name in _CYCLED:
        rescale = _cycled_adam(config, steps)
    else:
        rescale = OPTIMIZERS[config.name](config)
    decay = _weight_decay(config, decays, labels, params)
    parts: list[optax.GradientTransformation] = []
    if config.clip_value:
        parts.append(optax.clip(config.clip_value))
    if config.clip_norm:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    parts += [decay, rescale] if config.name == "sgd" else [rescale, decay]
    if config.name == "lamb":
        parts.append(optax.scale_by_trust_ratio())
    parts.append(
        scaled(config.learning_rate)
        if not config.groups
        else optax.partition({name: scaled(rate) for name, rate in rates.items()}, labels)
    )
    return optax.chain(*parts), lambda step: config.learning_rate * shape(step)


def _weight_decay(
    config: OptimizerConfig, decays: dict[str, float], labels: PyTree, params: PyTree
) -> optax.GradientTransformation:
    masked = re.compile(config.decay_mask)

    def coefficient(kp: tuple[Any, ...], label: str) -> float:
        if label == _MAIN and not masked.search(path_str(kp)):
            return 0.0
        return decays[label]

    coefficients = jax.tree_util.tree_map_with_path(coefficient, labels)
    parts = []
    for value in sorted(set(jax.tree.leaves(coefficients)) - {0.0}):
        mask = jax.tree.map(lambda c, value=value: c == value, coefficients)
        parts.append(optax.add_decayed_weights(value, mask))
    return optax.chain(*parts) if parts else optax.identity()
