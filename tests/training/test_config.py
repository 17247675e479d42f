"""Settings of a stage: misspelt names and impossible values fail before any compute."""

import dataclasses

import pytest

from transfer_jax.training import base_config, fit_config
from transfer_jax.training.config import ConfigError, FitConfig, OptimizerConfig, from_dict


def test_round_trip_through_a_config_dict():
    config = fit_config(steps=7, optimizer={"learning_rate": 0.5, "groups": {"g": {"where": "a"}}})
    built = from_dict(FitConfig, config)
    assert built.steps == 7 and built.optimizer.groups["g"].where == "a"
    assert dataclasses.asdict(
        from_dict(FitConfig, dataclasses.asdict(built))
    ) == dataclasses.asdict(built)
    assert from_dict(FitConfig, {"ema_decay": 0}).ema_decay == 0.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": 3}, r"'step' is not a setting of FitConfig; nearest: \['steps'"),
        ({"optimizer": {"learning_rat": 1.0}}, r"optimizer.learning_rat.*learning_rate"),
        ({"optimizer": {"groups": {"g": {"wher": "a"}}}}, r"optimizer.groups.g.wher"),
        ({"steps": 1.5}, "steps=1.5 is a float; a int"),
        ({"steps": 0}, "at least one step"),
        ({"optimizer": {"name": "adamm"}}, "did you mean 'adam"),
        ({"optimizer": {"schedule": "cosin"}}, "did you mean 'cosine'"),
        ({"optimizer": {"learning_rate": -1.0}}, "must not be negative"),
        ({"optimizer": {"b1": 1.0}}, r"must lie in \[0, 1\)"),
        ({"accumulate": 0}, "at least one microbatch"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"monitor_mode": "maximum"}, "'max' or 'min'"),
        ({"select_best": True}, "name of a metric to watch"),
        ({"optimizer": {"schedule": "plateau"}}, "name of a metric to watch"),
        ({"checkpoint_every": -1}, "checkpoint_every=-1"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(FitConfig, values)
    with pytest.raises(ConfigError):
        fit_config(**values)


def test_defaults_are_settings():
    assert from_dict(OptimizerConfig, {}) == OptimizerConfig()
    assert base_config("s4").recipe == "s4"
