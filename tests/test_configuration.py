import json
import math

import pytest
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from transfer_jax import configuration
from transfer_jax.configuration import (
    ConfigError,
    apply_overrides,
    config_differences,
    config_from_json,
    config_to_json,
    find_config,
    get_config,
    list_configs,
    load_config,
)

_FILE = '''"""Sequence classification with a tiny model.

More text.
"""

from ml_collections import ConfigDict

VARIANTS = {"small": "seconds on a CPU", "full": "hours on a GPU"}


def get_config(variant: str = "small") -> ConfigDict:
    config = ConfigDict()
    config.variant = variant
    config.model = ConfigDict({"features": 8, "dropout": 0.0, "widths": (8, 16), "name": "s4"})
    config.optimizer = ConfigDict({"learning_rate": 1e-3, "nesterov": False})
    return config
'''


@pytest.fixture
def configs(tmp_path, monkeypatch):
    (tmp_path / "tiny.py").write_text(_FILE)
    (tmp_path / "other.py").write_text(
        '"""Another."""\nVARIANTS: dict[str, str] = {v: v.upper() for v in ("a", "b")}\n'
    )
    (tmp_path / "__init__.py").write_text("raise AssertionError")
    monkeypatch.setattr(configuration, "config_directory", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def config(configs):
    return get_config("tiny")


def test_list_gives_summaries_and_variants(configs):
    assert list_configs() == {
        "other": ("Another.", {"a": "A", "b": "B"}),
        "tiny": (
            "Sequence classification with a tiny model.",
            {"small": "seconds on a CPU", "full": "hours on a GPU"},
        ),
    }


def test_names_and_paths_give_the_same_locked_config(configs):
    by_name, by_path = get_config("tiny:full"), load_config(f"{configs / 'tiny.py'}:full")
    assert by_name == by_path
    assert by_name.variant == "full"
    with pytest.raises(AttributeError):
        by_name.new_key = 1
    assert find_config("tiny") == (configs / "tiny.py", "tiny", "small")
    assert get_config("tiny").variant == "small"


@pytest.mark.parametrize(
    "spec, message",
    [
        ("tny", "there is no config 'tny'. The nearest: tiny"),
        ("xylophone", "Known configs: other, tiny"),
        ("tiny:smal", "config 'tiny' has no variant 'smal'. The nearest: small"),
        ("tiny:zzz", "Known variants: full, small"),
        ("nowhere/x.py", "there is no config file nowhere/x.py"),
        ("other", "has no function get_config"),
    ],
)
def test_unknown_names_are_errors_with_the_nearest(configs, spec, message):
    with pytest.raises(ConfigError, match=message):
        load_config(spec)


def test_get_config_wants_a_name_and_a_configdict(configs):
    with pytest.raises(ConfigError, match="use load_config"):
        get_config("tiny.py:full")
    (configs / "plain.py").write_text("def get_config():\n    return {}\n")
    with pytest.raises(ConfigError, match="returned a dict"):
        get_config("plain")


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("model.features=64", "model.features", 64),
        ("optimizer.learning_rate=1e-2", "optimizer.learning_rate", 0.01),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("optimizer.nesterov=True", "optimizer.nesterov", True),
        ("optimizer.nesterov=false", "optimizer.nesterov", False),
        ("model.name=a=b", "model.name", "a=b"),
        ("model.name=3", "model.name", "3"),
        ("model.widths=(1, 2, 3)", "model.widths", (1, 2, 3)),
        ("model.widths=1,2", "model.widths", (1, 2)),
        ("model.widths=7", "model.widths", (7,)),
        ("model.widths=()", "model.widths", ()),
    ],
)
def test_overrides_take_the_type_of_the_field(config, override, key, value):
    before = config_to_json(config)
    changed = apply_overrides(config, [override])
    result = changed
    for part in key.split("."):
        result = result[part]
    assert result == value and type(result) is type(value)
    assert config_to_json(config) == before
    assert set(config_differences(config, changed)) <= {key}
    assert changed.is_locked


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.featurs=64", "no key 'model.featurs'. The nearest: model.features"),
        ("learning_rate=1", "no key 'learning_rate'. The nearest: optimizer.learning_rate"),
        ("model.features.x=1", "no key 'model.features.x'"),
        ("qqqqqq=1", "Its keys: model.dropout, model.features"),
        ("model.features=1e3", "model.features=1e3 is of the wrong type: an integer such as 64"),
        ("model.features=0.5", "an integer"),
        ("optimizer.learning_rate=fast", "a number such as 0.001 is needed, as 0.001"),
        ("optimizer.nesterov=perhaps", "true or false"),
        ("model.widths=a,b", "a tuple such as .* whose items are of type int"),
        ("model=3", "model is a section, not a value. Set what it holds: model.dropout"),
        ("model.features", "has no value: write model.features=VALUE"),
    ],
)
def test_wrong_overrides_say_what_would_be_right(config, override, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides(config, [override])


def test_fields_without_a_value_yet():
    config = ConfigDict({"steps": placeholder(int), "anything": None, "rates": (0.1, 0.2)})
    config.words = ()
    changed = apply_overrides(
        config, ["steps=5", "anything=[1, 'a']", "rates=1,2", "words=cola, sst2"]
    )
    assert changed.steps == 5 and changed.anything == [1, "a"]
    assert changed.rates == (1.0, 2.0) and all(type(r) is float for r in changed.rates)
    assert changed.words == ("cola", "sst2")
    assert apply_overrides(config, ["steps=None"]).steps is None
    with pytest.raises(ConfigError, match="integer"):
        apply_overrides(config, ["steps=five"])


def test_references_follow_an_override():
    config = ConfigDict({"width": 8})
    config.hidden = 4 * config.get_ref("width")
    changed = apply_overrides(config, ["width=16"])
    assert (changed.hidden, config.hidden) == (64, 32)
    assert json.loads(config_to_json(changed)) == {"width": 16, "hidden": 64}


def test_json_round_trip(config):
    config = config.unlock()
    config.tolerance, config.none, config.empty = 0.1 + 0.2, None, ConfigDict()
    config.nested = ((1, 2), ("a",))
    again = config_from_json(config_to_json(config))
    assert again == config.lock()
    assert again.nested == ((1, 2), ("a",)) and hash(again.nested)
    assert config_differences(again, config) == {}


def test_json_refuses_what_it_cannot_hold():
    with pytest.raises(ConfigError, match=r"config.model.scale is a complex"):
        config_to_json(ConfigDict({"model": {"scale": 1j}}))


def test_differences_are_flat_keys_with_both_values():
    a = ConfigDict({"model": {"features": 8, "widths": (1, 2)}, "seed": 0, "nan": math.nan})
    b = {"model": {"features": 16, "widths": [1, 2]}, "extra": True, "nan": math.nan}
    assert config_differences(a, b) == {
        "model.features": (8, 16),
        "seed": (0, "(absent)"),
        "extra": ("(absent)", True),
    }
