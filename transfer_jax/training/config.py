"""What ``fit`` can be told, as frozen dataclasses, and their form in a config file."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_collections

from transfer_jax.configuration import ConfigError


@dataclass(frozen=True)
class GroupConfig:
    """An exception to the optimiser's settings for some parameters.

    Attributes:
      where: regular expression on parameter paths.
      learning_rate: peak rate of the group; the schedule's shape is shared.
      weight_decay: decoupled weight decay of the group.
    """

    where: str = ""
    learning_rate: float = 0.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class OptimizerConfig:
    """An optax optimiser, its schedule and its parameter groups.

    Attributes:
      name: one of ``optimizers.OPTIMIZERS``; ``bert_adamw`` has no bias correction.
      learning_rate: peak rate.
      schedule: one of ``optimizers.SCHEDULES``: ``constant``, ``cosine``, ``linear``, ``rsqrt``,
        ``plateau`` (the rate is cut when the monitored metric stops improving), ``onecycle``
        (PyTorch's OneCycleLR; ``b1`` of Adam and LAMB goes with it, 0.95, 0.85, 0.95).
      warmup_steps: linear warm-up from 0; ``onecycle`` has its own.
      final_fraction: where ``cosine`` and ``linear`` end, as a share of the peak.
      weight_decay: decoupled (AdamW, Lion, LAMB) or added to the gradient (SGD).
      decay_mask: regular expression on paths; only those parameters are decayed ('' = all).
      groups: exceptions by name; a parameter belongs to the first, in the order of the names, whose
        ``where`` is found in its path.
      clip_norm: global norm to which gradients are clipped (0 = off).
      clip_value: absolute value to which gradient entries are clipped (0 = off).
      b1, b2, eps: moments of the Adam family; ``b1`` is the momentum of SGD and RMSprop, ``b2`` the
        decay of RMSprop's average.
      plateau_factor, plateau_patience: cut of the rate, and evaluations without improvement.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    weight_decay: float = 0.0
    decay_mask: str = ""
    groups: Mapping[str, GroupConfig] = field(default_factory=dict)
    clip_norm: float = 0.0
    clip_value: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    plateau_factor: float = 0.2
    plateau_patience: int = 10


@dataclass(frozen=True)
class FitConfig:
    """One training stage.

    Attributes:
      steps: optimiser steps.
      optimizer: see ``OptimizerConfig``.
      accumulate: microbatches per step; the result is that of the whole batch.
      ema_decay: decay of an exponential moving average of the parameters, which is then what is
        evaluated and returned (0 = off).
      log_every: steps between metric lines.
      eval_every: steps between evaluations (0 = only at the end).
      checkpoint_every: steps between checkpoints (0 = only at the end).
      keep: how many checkpoints are kept.
      monitor: ``set/metric`` that plateau schedules and model selection watch.
      monitor_mode: ``max`` or ``min``.
      select_best: return the parameters with the best monitored metric instead of the last.
      patience: stop after this many evaluations without improvement of ``monitor`` (0 = never).
      profile_start, profile_steps: window of the profiler trace (0 steps = off).
    """

    steps: int = 1000
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    accumulate: int = 1
    ema_decay: float = 0.0
    log_every: int = 50
    eval_every: int = 0
    checkpoint_every: int = 0
    keep: int = 2
    monitor: str = ""
    monitor_mode: str = "max"
    select_best: bool = False
    patience: int = 0
    profile_start: int = 10
    profile_steps: int = 0


def fit_config(**overrides: Any) -> ml_collections.ConfigDict:
    """Returns the defaults of ``FitConfig`` as a ``ConfigDict`` for use in config files.

    Args:
      **overrides: fields of ``FitConfig``; ``optimizer`` may be a dictionary of its fields.
    """
    return ml_collections.ConfigDict(dataclasses.asdict(from_dict(FitConfig, overrides)))


def base_config(recipe: str) -> ml_collections.ConfigDict:
    """Returns the settings that every experiment has, for a config file to extend.

    ``seed``; ``mesh`` (sizes of the axes ``data``, ``fsdp``, ``model``; -1 = what is left);
    ``sharding`` (``rules``: ordered pairs of a path regex and a tuple of mesh axes, None or tuples
    of them; ``min_size``: smaller leaves stay whole); ``logging.wandb_project`` ('' = no W&B).

    Args:
      recipe: module of ``transfer_jax.papers`` whose ``recipe`` runs the experiment, or
        ``package.module:function``.
    """
    return ml_collections.ConfigDict(
        {
            "recipe": recipe,
            "seed": 0,
            "mesh": {"data": -1, "fsdp": 1, "model": 1},
            "sharding": {"rules": (), "min_size": 2**14},
            "logging": {"wandb_project": ""},
        }
    )


def from_dict(cls: type, values: Mapping[str, Any], path: str = "") -> Any:
    """Builds a config dataclass from a mapping, recursively, checking names and types.

    Raises:
      ConfigError: an unknown name (with the nearest ones) or a value of the wrong type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    known = {}
    for name, value in dict(values).items():
        full = f"{path}.{name}" if path else name
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=3) or sorted(fields)
            raise ConfigError(f"{full!r} is not a setting of {cls.__name__}; nearest: {near}.")
        default = _default(fields[name])
        if dataclasses.is_dataclass(default) and not dataclasses.is_dataclass(value):
            value = from_dict(type(default), value, full)
        elif name == "groups":
            value = {
                key: g if isinstance(g, GroupConfig) else from_dict(GroupConfig, g, f"{full}.{key}")
                for key, g in sorted(dict(value).items())
            }
        else:
            value = _typed(value, default, full)
        known[name] = value
    config = cls(**known)
    _check(config, path)
    return config


def _default(f: dataclasses.Field) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


def _typed(value: Any, default: Any, name: str) -> Any:
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default) and not dataclasses.is_dataclass(default):
        raise ConfigError(
            f"{name}={value!r} is a {type(value).__name__}; a {type(default).__name__} such as "
            f"{default!r} is needed."
        )
    return value


def _check(config: Any, path: str) -> None:
    """Refuses values that no run could use."""

    def require(ok: bool, name: str, needed: str) -> None:
        if not ok:
            full = f"{path}.{name}" if path else name
            raise ConfigError(f"{full}={getattr(config, name)!r} is impossible: {needed}.")

    if isinstance(config, OptimizerConfig):
        from transfer_jax.training import optimizers

        for name, allowed in (
            ("name", optimizers.OPTIMIZERS), ("schedule", optimizers.SCHEDULES),
        ):  # fmt: skip
            value = getattr(config, name)
            near = difflib.get_close_matches(value, allowed, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            require(value in allowed, name, f"{hint}there are {sorted(allowed)}")
        for name in (
            "learning_rate", "warmup_steps", "weight_decay", "clip_norm", "clip_value",
            "final_fraction", "eps",
        ):  # fmt: skip
            require(getattr(config, name) >= 0, name, "it must not be negative")
        require(
            config.schedule != "onecycle" or not config.warmup_steps, "warmup_steps",
            "the schedule 'onecycle' has its own warm-up, 30 % of the steps",
        )  # fmt: skip
        require(0 <= config.b1 < 1, "b1", "it must lie in [0, 1)")
        require(0 <= config.b2 < 1, "b2", "it must lie in [0, 1)")
        require(0 < config.plateau_factor < 1, "plateau_factor", "it must lie in (0, 1)")
    if isinstance(config, FitConfig):
        require(config.steps >= 1, "steps", "at least one step is needed")
        require(config.accumulate >= 1, "accumulate", "at least one microbatch is needed")
        require(0 <= config.ema_decay < 1, "ema_decay", "it must lie in [0, 1)")
        require(config.monitor_mode in ("max", "min"), "monitor_mode", "'max' or 'min'")
        require(config.log_every >= 1, "log_every", "it must be at least 1")
        require(config.keep >= 1, "keep", "at least one checkpoint must be kept")
        for name in (
            "eval_every",
            "checkpoint_every",
            "patience",
            "profile_steps",
            "profile_start",
        ):
            require(getattr(config, name) >= 0, name, "it must not be negative")
        watching = config.select_best or config.patience or config.optimizer.schedule == "plateau"
        require(
            bool(config.monitor) or not watching, "monitor",
            "select_best, patience and the plateau schedule need the name of a metric to watch, "
            "for example 'validation/accuracy'",
        )  # fmt: skip
