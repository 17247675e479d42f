"""Finding, loading, overriding and comparing configurations.

A config file is a Python file with a docstring, a function ``get_config(variant="...")`` that
returns an ``ml_collections.ConfigDict``, and a dictionary ``VARIANTS`` from each variant to a line
that describes it. ``"s4:digits"`` names the variant ``digits`` of ``configs/s4.py``.
"""

import ast
import copy
import difflib
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference


class ConfigError(ValueError):
    """A configuration that cannot be run: what is wrong, where, and what would be right."""


class ConfigInfo(NamedTuple):
    """What ``list_configs`` says of one file.

    Attributes:
      summary: first line of the file's docstring.
      variants: variant -> one line about it.
    """

    summary: str
    variants: dict[str, str]


class ConfigSpec(NamedTuple):
    """A config file and the variant chosen in it.

    Attributes:
      path: the file.
      name: its name without ``.py``.
      variant: argument of its ``get_config``.
    """

    path: Path
    name: str
    variant: str


def config_directory() -> Path:
    """Returns where the config files are: in the installed package, else beside it."""
    package = Path(__file__).resolve().parent
    installed = package / "_configs"
    return installed if installed.is_dir() else package.parent / "configs"


def list_configs() -> dict[str, ConfigInfo]:
    """Returns every config by name, without running those whose ``VARIANTS`` is a literal.

    >>> list_configs()["s4"].variants["digits"]  # doctest: +SKIP
    'handwritten digits as sequences of 64 pixels; minutes on a CPU'
    """
    return {path.stem: _info(path) for path in _config_files()}


def get_config(name: str) -> ConfigDict:
    """Returns the locked config of ``"name"`` or ``"name:variant"``.

    Raises:
      ConfigError: there is no such config or variant; the message gives the nearest names.
    """
    if name.split(":")[0].endswith(".py"):
        raise ConfigError(f"{name!r} is a file, not the name of a config: use load_config.")
    return load_config(name)


def load_config(spec: str) -> ConfigDict:
    """Returns the locked config of ``"path/to/file.py:variant"`` or ``"name:variant"``.

    Without ``:variant`` it is the variant that the file's ``get_config`` has as its default.

    Raises:
      ConfigError: there is no such file, config or variant.
    """
    found = find_config(spec)
    get = _load_module(found.path).get_config
    config = get(found.variant) if found.variant else get()
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"get_config in {found.path} returned a {type(config).__name__}; an "
            "ml_collections.ConfigDict is needed."
        )
    return config.lock()


def find_config(spec: str) -> ConfigSpec:
    """Resolves ``"path/to/file.py[:variant]"`` or ``"name[:variant]"``, default variant included.

    Raises:
      ConfigError: there is no such file, config or variant, or the file is no config.
    """
    where, _, variant = spec.partition(":")
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise ConfigError(f"there is no config file {where} (looked at {path.absolute()}).")
    else:
        files = {path.stem: path for path in _config_files()}
        if where not in files:
            raise ConfigError(
                f"there is no config {where!r}. {_nearest(where, files, 'config')} "
                f"(looked in {config_directory()})."
            )
        path = files[where]

    module = _load_module(path)
    get = getattr(module, "get_config", None)
    if not callable(get):
        raise ConfigError(f"{path} is no config file: it has no function get_config.")
    variants = getattr(module, "VARIANTS", {})
    if variant and variants and variant not in variants:
        raise ConfigError(
            f"config {path.stem!r} has no variant {variant!r}. "
            f"{_nearest(variant, variants, 'variant')}."
        )
    parameters = list(inspect.signature(get).parameters.values())
    if not variant and parameters and isinstance(parameters[0].default, str):
        variant = parameters[0].default
    return ConfigSpec(path, path.stem, variant)


def apply_overrides(config: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
    """Returns a locked copy of ``config`` with values replaced; ``config`` stays as it is.

    Args:
      config: the config.
      overrides: texts such as ``"model.features=64"``. The value is read as the type that the
        field has: ``true``/``false`` for a bool, ``1,2`` or ``(1, 2)`` for a tuple, anything for a
        string. A field without type (None) takes any Python literal.

    Raises:
      ConfigError: a key does not exist (the message gives the nearest keys), or its value is of
        the wrong type (the message says what is needed).
    """
    config = copy.deepcopy(config).lock()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"the override {override!r} has no value: write {key}=VALUE.")
        section, last = _section_of(config, key)
        value = section[last]
        if isinstance(value, ConfigDict):
            inside = ", ".join(f"{key}.{k}" for k in value)
            raise ConfigError(f"{key} is a section, not a value. Set what it holds: {inside}.")
        section[last] = _parse(key, text, value, section.get_type(last))
    return config


def config_to_json(config: ConfigDict | Mapping[str, Any]) -> str:
    """Returns the config as indented JSON text; tuples become lists.

    Raises:
      ConfigError: a value is of a type that JSON does not have.
    """
    for key, value in _flatten(config):
        try:
            json.dumps(value)
        except TypeError:
            raise ConfigError(
                f"config.{key} is a {type(value).__name__}; configs hold numbers, strings, "
                "booleans, None, and tuples of these."
            ) from None
    return json.dumps(_plain(config), indent=2) + "\n"


def config_from_json(text: str) -> ConfigDict:
    """Returns the locked config that ``config_to_json`` wrote; lists come back as tuples."""
    return ConfigDict(_tuples(json.loads(text))).lock()


def config_differences(
    a: ConfigDict | Mapping[str, Any], b: ConfigDict | Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Returns the dotted keys on which two configs differ, with both values.

    A key that one of them lacks has ``"(absent)"`` there. Tuples and lists count as equal, as JSON
    does not tell them apart.

    >>> config_differences({"model": {"features": 64}}, {"model": {"features": 32}})
    {'model.features': (64, 32)}
    """
    flat_a, flat_b = dict(_flatten(a)), dict(_flatten(b))
    absent = "(absent)"
    pairs = {k: (flat_a.get(k, absent), flat_b.get(k, absent)) for k in {**flat_a, **flat_b}}
    return {k: (x, y) for k, (x, y) in pairs.items() if json.dumps(x) != json.dumps(y)}


def _config_files() -> list[Path]:
    files = sorted(config_directory().glob("*.py"))
    return [path for path in files if not path.name.startswith("_")]


def _load_module(path: Path) -> ModuleType:
    name = f"transfer_jax_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def _info(path: Path) -> ConfigInfo:
    tree = ast.parse(path.read_text(), filename=str(path))
    summary = (ast.get_docstring(tree) or "").partition("\n")[0]
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == "VARIANTS" for t in targets):
            try:
                return ConfigInfo(summary, ast.literal_eval(node.value))  # type: ignore[attr-defined]
            except ValueError:  # computed, so the file has to run
                return ConfigInfo(summary, dict(_load_module(path).VARIANTS))
    return ConfigInfo(summary, {})


def _nearest(name: str, known: Iterable[str], what: str) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"The nearest: {', '.join(near)}"
    return f"Known {what}s: {', '.join(known)}" if known else f"There are no {what}s"


def _section_of(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    section: Any = config
    *parents, last = key.split(".")
    for part in parents:
        if not isinstance(section, ConfigDict) or part not in section:
            raise _unknown_key(config, key)
        section = section[part]
    if not isinstance(section, ConfigDict) or last not in section:
        raise _unknown_key(config, key)
    return section, last


def _unknown_key(config: ConfigDict, key: str) -> ConfigError:
    def similarity(known: str) -> float:
        whole = difflib.SequenceMatcher(None, key, known).ratio()
        ends = key.rpartition(".")[2], known.rpartition(".")[2]
        return max(whole, difflib.SequenceMatcher(None, *ends).ratio())

    known = [k for k, _ in _flatten(config)]
    near = sorted((k for k in known if similarity(k) > 0.6), key=similarity, reverse=True)[:3]
    if near:
        return ConfigError(f"the config has no key {key!r}. The nearest: {', '.join(near)}.")
    return ConfigError(f"the config has no key {key!r}. Its keys: {', '.join(known)}.")


_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_NEEDED = {
    bool: "true or false",
    int: "an integer such as 64",
    float: "a number such as 0.001",
    tuple: "a tuple such as (1, 2)",
    list: "a list such as [1, 2]",
}


def _parse(key: str, text: str, value: Any, kind: type) -> Any:
    """Reads ``text`` as the ``kind`` that the field ``key``, at present ``value``, has."""

    def wrong(needed: str) -> ConfigError:
        return ConfigError(f"{key}={text} is of the wrong type: {needed} is needed, as {value!r}.")

    if value is None and text == "None":
        return None
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise wrong(_NEEDED[bool])
        return _BOOLEANS[text.lower()]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise wrong(_NEEDED[kind]) from None
    try:
        parsed = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        # Bare words: a string, or strings separated by commas.
        parsed = text if kind not in (tuple, list) else [w.strip() for w in text.split(",")]
    if kind not in (tuple, list):
        return parsed

    items = list(parsed) if isinstance(parsed, (tuple, list)) else [parsed]
    kinds = {type(item) for item in value or ()}
    if len(kinds) == 1:
        (item_kind,) = kinds
        if item_kind is float:
            items = [float(i) if type(i) is int else i for i in items]
        if any(type(i) is not item_kind for i in items):
            raise wrong(f"{_NEEDED[kind]} whose items are of type {item_kind.__name__}")
    return kind(items)


def _plain(value: Any) -> Any:
    """ConfigDicts as dictionaries, field references as their values."""
    if isinstance(value, FieldReference):
        return _plain(value.get())
    if isinstance(value, (ConfigDict, Mapping)):
        return {k: _plain(value[k]) for k in value}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value


def _flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in _plain(config).items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
