"""Merging checkpoints of any size, tensor by tensor.

One tensor of each model is in memory at a time: ``merge_leaf`` merges them, so the result is that
of ``merge`` on whole trees. The one method that needs more, ``ties`` with ``scope="global"``, takes
two more passes over the files, which count how often each magnitude occurs.

``read_recipe`` reads what is to be merged from a file, ``plan_merge`` compares the checkpoints by
their headers, and ``write_merge`` does the work.
"""

import dataclasses
import difflib
import gc
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from transfer_jax.trees.blocks import first_match, group_paths
from transfer_jax.trees.files import (
    Checkpoint,
    Spec,
    check_new,
    kind,
    new_directory,
    synced,
    write_checkpoint,
)
from transfer_jax.trees.masks import num_kept
from transfer_jax.trees.merging import METHODS, merge_leaf

OUTPUT_DTYPES = {
    "float64": np.float64, "float32": np.float32, "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}  # fmt: skip
PER_MODEL = ("weight", "density", "gamma", "epsilon")
MISSING = ("error", "base", "skip")
PYTHON_ONLY = {
    "greedy_soup": "it scores whole models with a function",
    "regmean": "it needs Gram matrices of the layers' inputs, in the layout of the kernels",
}
_GIVEN_HERE = ("key", "threshold", "fishers", "grams")  # no options of the user
_ALIASES = {"linear": "soup"}  # mergekit's name
# What a model directory holds beside its tensors.
_COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "spiece.model", "sentencepiece*.model",
    "preprocessor_config.json", "processor_config.json", "chat_template*",
)  # fmt: skip

Report = Callable[[int, int], None]  # tensors done, and all


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is merged, and how.

    Attributes:
      method: a name in ``METHODS``.
      models: paths of the checkpoints.
      base: path of the base, None for methods that need none.
      options: options of the method, as for ``merge``. A value is one for all, a list of one for
        each model (where the method has that), or a mapping from path patterns to such values; a
        list may hold mappings.
      fishers: paths of the models' Fisher diagonals, for ``fisher``.
      dtype: name of the dtype of real tensors in the result; None for those of the base.
      seed: of the random methods.
      missing: what becomes of a tensor that some input lacks, or that differs in shape or (for
        integers) in value: an ``error``; the tensor of the ``base``, if it has one; or ``skip``,
        which leaves it out.
    """

    method: str
    models: tuple[str, ...]
    base: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fishers: tuple[str, ...] = ()
    dtype: str | None = None
    seed: int = 0
    missing: Literal["error", "base", "skip"] = "error"


class Plan(NamedTuple):
    """A recipe with the checkpoints it names.

    Attributes:
      recipe: with all choices made.
      base: the base.
      models: the models.
      fishers: their Fisher diagonals, or none.
      merged: names of the tensors that are merged.
      copied: names of those that are taken from the base (the first model, if there is none).
      left_out: names of those that are not in the result.
      specs: name -> dtype and shape, of everything in the result.
    """

    recipe: Recipe
    base: Checkpoint | None
    models: list[Checkpoint]
    fishers: list[Checkpoint]
    merged: list[str]
    copied: list[str]
    left_out: list[str]
    specs: dict[str, Spec]

    @property
    def template(self) -> Checkpoint:
        """The base or, if there is none, the first model."""
        return self.models[0] if self.base is None else self.base

    @property
    def passes(self) -> int:
        """How often the inputs are read."""
        return 3 if _global_ties(self.recipe) else 1

    def describe(self) -> str:
        """Returns some lines that say what will be done."""
        inputs = [*([("base", self.base)] if self.base else []),
                  *((f"model {i}", m) for i, m in enumerate(self.models)),
                  *((f"Fisher {i}", f) for i, f in enumerate(self.fishers))]  # fmt: skip
        dtypes = sorted({str(spec.dtype) for spec in self.specs.values()})
        largest = max(self.specs, key=lambda name: self.specs[name].size)
        lines = [f"method: {self.recipe.method}"]
        lines += [f"{name}: {value}" for name, value in self.recipe.options.items()]
        lines += [
            f"{label}: {c.path} ({len(c.specs)} tensors, {_bytes(c.specs.values())})"
            for label, c in inputs
        ]
        lines += [
            f"result: {len(self.merged)} tensors merged, {len(self.copied)} copied, "
            f"{len(self.left_out)} left out; {_bytes(self.specs.values())} of {', '.join(dtypes)}",
            f"largest tensor: {largest} {self.specs[largest].shape}",
        ]
        lines += [f"passes over the inputs: {self.passes}"] if self.passes > 1 else []
        return "\n".join(lines)


# --- Recipes ------------------------------------------------------------------------------------


def read_recipe(path: str | Path) -> Recipe:
    """Reads a recipe in YAML, in the form that mergekit has made common.

    Keys: ``merge_method``, ``base_model``, ``models`` (paths, or mappings with ``model``,
    ``parameters`` and, for Fisher merging, ``fisher``), ``parameters``, ``dtype``, ``seed``,
    ``missing``. ``parameters`` of a model are ``weight``, ``density``, ``gamma`` and ``epsilon``;
    a model without one has that of the recipe. A value may be a list of ``{filter, value}``, of
    which the first filter that is found in a tensor's name, a regular expression, counts; the last
    has no filter.

    Raises:
      ValueError: it is no recipe; a key, method or option is unknown; the message gives the
        nearest.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w+") as file:
    ...     _ = file.write("{merge_method: ties, base_model: a, models: [{model: b}], sede: 1}")
    ...     _ = file.seek(0)
    ...     read_recipe(file.name)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
      ...
    ValueError: unknown key 'sede' in .... Did you mean seed?
    """
    import yaml

    where = str(path)
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{where} is not YAML: {reason}") from None
    content = _mapping(content, where)
    known = ["merge_method", "base_model", "models", "parameters", "dtype", "seed", "missing"]
    _check_keys(content, known, where)
    if "merge_method" not in content or not isinstance(content.get("models"), list):
        raise ValueError(f"{where} needs merge_method, and models, a list.")
    method = _ALIASES.get(content["merge_method"], content["merge_method"])
    base = content.get("base_model")
    entries = []
    for i, entry in enumerate(content["models"]):
        place = f"models[{i}] of {where}"
        entry = {"model": entry} if isinstance(entry, str) else _mapping(entry, place)
        _check_keys(entry, ["model", "parameters", "fisher"], place)
        if not isinstance(entry.get("model"), str):
            raise ValueError(f"{place} needs model, a path.")
        own = _mapping(entry.get("parameters") or {}, f"parameters of {place}")
        _check_keys(own, PER_MODEL, f"parameters of {place}")
        entries.append({**entry, "parameters": own})
    if base is not None and method in METHODS and _uses_base(method):
        # As in mergekit, where the base may be listed among the models of such methods.
        entries = [e for e in entries if e["model"] != base]
    shared = {
        name: _value(v, f"{name} of {where}")
        for name, v in _mapping(content.get("parameters") or {}, f"parameters of {where}").items()
    }
    options = dict(shared)
    for name in PER_MODEL:
        if any(name in e["parameters"] for e in entries):
            default = shared.get(name, _default(method, name))
            values = [
                _value(e["parameters"][name], f"{name} of {e['model']}")
                if name in e["parameters"] else default for e in entries
            ]  # fmt: skip
            if None in values:
                lacks = entries[values.index(None)]["model"]
                raise ValueError(f"{name} is given for some models of {where}, not for {lacks}.")
            options[name] = values
    fishers = [e["fisher"] for e in entries if "fisher" in e]
    return Recipe(
        method=method,
        models=tuple(e["model"] for e in entries),
        base=base,
        options=options,
        fishers=tuple(fishers),
        dtype=content.get("dtype"),
        seed=content.get("seed", 0),
        missing=content.get("missing", "error"),
    )


def parse_option(text: str) -> tuple[str, Any]:
    """Reads ``key=value``, with the value in YAML.

    >>> parse_option("density=0.5"), parse_option("weight={attn: 1.0, .*: 1e-3}")
    (('density', 0.5), ('weight', {'attn': 1.0, '.*': 0.001}))
    """
    import yaml

    name, equals, value = text.partition("=")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        parsed = None
    if not equals or parsed is None:
        raise ValueError(f"option {text!r} is not of the form key=value.")
    return name.strip(), _numbers(parsed)


def parse_size(text: str) -> int:
    """Reads a number of bytes with a unit.

    >>> parse_size("5GB"), parse_size("200 MiB")
    (5000000000, 209715200)
    """
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)", text.strip())
    if not found or found[2].upper() not in units or float(found[1]) <= 0:
        raise ValueError(f"{text!r} is no size: write 5GB, 500MB or 200MiB.")
    return int(float(found[1]) * units[found[2].upper()])


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{where} must be a mapping from names to values.")
    return value


def _check_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {where}. {_nearest(key, known)}")


def _nearest(value: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value), known, n=2)
    return f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(known)}."


def _value(value: Any, where: str) -> Any:
    """Turns mergekit's list of ``{filter, value}`` into a mapping from patterns to values."""
    if not isinstance(value, list):
        return _numbers(value)
    groups: dict[str, Any] = {}
    for entry in value:
        if not isinstance(entry, dict) or "value" not in entry or isinstance(entry["value"], list):
            raise ValueError(
                f"{where}: give one value, or a list of {{filter, value}} with one value each. "
                "Gradients over layers are not known here; filters can name the layers."
            )
        _check_keys(entry, ["filter", "value"], where)
        text = entry.get("filter")
        groups[".*" if text in (None, "*") else str(text)] = _numbers(entry["value"])
    return groups


def _numbers(value: Any) -> Any:
    """Reads what YAML 1.1 takes for text, such as 1e-3, as the number that it is."""
    if isinstance(value, dict):
        return {str(key): _numbers(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _default(method: str, name: str) -> Any:
    default = METHODS[method].options.get(name) if method in METHODS else None
    return default if isinstance(default, (int, float)) else None


def _uses_base(method: str) -> bool:
    return METHODS[method].deltas or METHODS[method].num_models[1] == 2


# --- Plans --------------------------------------------------------------------------------------


def plan_merge(recipe: Recipe) -> Plan:
    """Opens the checkpoints of a recipe and decides what becomes of every tensor.

    Only headers are read, and integers, which cannot be merged and have to agree.

    Raises:
      ValueError: the recipe has an unknown method, option or value; tensors differ and the recipe
        says no way to treat them.
      FileNotFoundError: a checkpoint is not there.
    """
    _check_recipe(recipe)
    base = None if recipe.base is None else Checkpoint(recipe.base)
    models = [Checkpoint(path) for path in recipe.models]
    fishers = [Checkpoint(path) for path in recipe.fishers]
    template = models[0] if base is None else base
    everyone = list({id(c): c for c in [template, *models]}.values())

    merged, same, problems = [], [], {}
    for name in dict.fromkeys(name for c in everyone for name in c.specs):
        problem = _difference(name, everyone)
        if problem:
            problems[name] = problem
        elif kind(template.specs[name].dtype) in ("real", "complex"):
            merged.append(name)
        else:
            same.append(name)
    if problems and recipe.missing == "error":
        shown = "; ".join(list(problems.values())[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"the checkpoints differ: {shown}{more}. To go on, choose missing=base, which takes "
            "such tensors from the base, or missing=skip, which leaves them out."
        )
    if not merged:
        raise ValueError(
            f"there is nothing to merge: {_first_names(template)} and {_first_names(everyone[-1])} "
            "have no tensor of real numbers in common."
        )
    kept = {name for name in problems if recipe.missing == "base" and name in template.specs}
    unmerged, written = {*kept, *same}, {*kept, *same, *merged}
    copied = [name for name in template.specs if name in unmerged]
    for fisher in fishers:
        for name in merged:
            if _difference(name, [template, fisher]):
                raise ValueError(
                    f"Fisher diagonals: {_difference(name, [template, fisher])}; one value is "
                    "needed for each entry of each model."
                )
    _check_options(recipe, merged)
    specs = {
        name: _output_spec(spec, recipe.dtype)
        for name, spec in template.specs.items() if name in written
    }  # fmt: skip
    left_out = [name for name in problems if name not in kept]
    return Plan(recipe, base, models, fishers, merged, copied, left_out, specs)


def _check_recipe(recipe: Recipe) -> None:
    method = recipe.method
    if method in PYTHON_ONLY:
        raise ValueError(
            f"method {method!r} is for models in memory, transfer_jax.trees.merge, only: "
            f"{PYTHON_ONLY[method]}."
        )
    if method not in METHODS:
        known = [name for name in METHODS if name not in PYTHON_ONLY]
        raise ValueError(f"unknown method {method!r}. {_nearest(method, known)}")
    if not recipe.models:
        raise ValueError("nothing to merge: give at least one model besides the base.")
    if method == "fisher" and len(recipe.fishers) != len(recipe.models):
        raise ValueError(
            f"method 'fisher' needs {len(recipe.models)} files of Fisher diagonals, one for each "
            f"model; {len(recipe.fishers)} are given."
        )
    if recipe.fishers and method != "fisher":
        raise ValueError(f"Fisher diagonals are for method 'fisher', not {method!r}.")
    if METHODS[method].deltas and recipe.base is None:
        raise ValueError(f"method {method!r} needs a base.")
    if recipe.missing not in MISSING:
        raise ValueError(f"unknown missing={recipe.missing!r}. {_nearest('', MISSING)}")
    if recipe.missing == "base" and recipe.base is None:
        raise ValueError("missing='base' needs a base.")
    if recipe.dtype is not None and recipe.dtype not in OUTPUT_DTYPES:
        raise ValueError(
            f"unknown dtype {recipe.dtype!r}. {_nearest(recipe.dtype, [*OUTPUT_DTYPES])}"
        )
    if isinstance(recipe.seed, bool) or not isinstance(recipe.seed, int):
        raise ValueError(f"seed={recipe.seed!r} is not an integer.")
    known = [n.rstrip("_") for n in METHODS[method].options if n not in _GIVEN_HERE]
    for name in recipe.options:
        if name.rstrip("_") not in known:
            raise ValueError(f"unknown option {name!r} of {method}. {_nearest(name, known)}")


def _check_options(recipe: Recipe, names: list[str]) -> None:
    """Finds wrong values of options before the work begins."""
    tree = dict.fromkeys(names)
    for value in recipe.options.values():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Mapping):
                leaves: Any = dict.fromkeys(tree, 0.0)
                group_paths(leaves, one)  # Every tensor has a group, and every group a tensor.
    number = jnp.zeros((1, 1))
    models = [number] * len(recipe.models)
    extra: dict[str, Any] = {"fishers": models} if recipe.fishers else {}
    if _global_ties(recipe):
        _densities(recipe)
        extra["threshold"] = jnp.zeros(len(models))
    base = None if recipe.base is None else number
    distinct = {json.dumps(_options_at(recipe, name), sort_keys=True): name for name in names}
    for name in distinct.values():
        merge_leaf(name, base, models, recipe.method,
                   **_options_at(recipe, name), **_key(recipe), **extra)  # fmt: skip


def _difference(name: str, checkpoints: list[Checkpoint]) -> str | None:
    """Says how a tensor differs between checkpoints, if it does so that it cannot be merged."""
    having = [c for c in checkpoints if name in c.specs]
    if len(having) < len(checkpoints):
        lacks = next(c for c in checkpoints if name not in c.specs)
        return f"{name!r} {having[0].specs[name].shape} is in {having[0].path}, not in {lacks.path}"
    first = having[0].specs[name]
    for other in having[1:]:
        spec = other.specs[name]
        if spec.shape != first.shape:
            vocabulary = len(spec.shape) == 2 and spec.shape[1:] == first.shape[1:]
            return (
                f"{name!r} is {first.shape} in {having[0].path}, {spec.shape} in {other.path}"
                + (" (another vocabulary?)" if vocabulary else "")
            )
        if kind(spec.dtype) != kind(first.dtype):
            return f"{name!r} is {first.dtype} in {having[0].path}, {spec.dtype} in {other.path}"
    if kind(first.dtype) in ("integer", "boolean"):
        value = having[0].read(name)
        for other in having[1:]:
            if not np.array_equal(value, other.read(name)):
                return (
                    f"{name!r}, of {first.dtype}, has other values in {having[0].path} than in "
                    f"{other.path}, and only real numbers can be merged"
                )
    return None


def _first_names(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.path} ({', '.join([*checkpoint.specs][:2])}, …)"


def _output_spec(spec: Spec, dtype: str | None) -> Spec:
    real = kind(spec.dtype) == "real"
    return Spec(np.dtype(OUTPUT_DTYPES[dtype]) if dtype and real else spec.dtype, spec.shape)


def _options_at(recipe: Recipe, name: str) -> dict[str, Any]:
    """Returns the options for one tensor, with no mappings left."""

    def resolve(value: Any) -> Any:
        if isinstance(value, Mapping):
            return resolve(value[first_match(value, name)])
        return [resolve(v) for v in value] if isinstance(value, list) else value

    return {option: resolve(value) for option, value in recipe.options.items()}


def _key(recipe: Recipe) -> dict[str, Any]:
    needed = "key" in METHODS[recipe.method].options
    return {"key": jax.random.key(recipe.seed)} if needed else {}


def _global_ties(recipe: Recipe) -> bool:
    scope = {**METHODS[recipe.method].options, **recipe.options}.get("scope")
    return scope == "global"


def _densities(recipe: Recipe) -> list[float]:
    value = recipe.options.get("density", METHODS["ties"].options["density"])
    densities = value if isinstance(value, list) else [value] * len(recipe.models)
    if any(isinstance(d, Mapping) for d in densities):
        raise ValueError("density per group of tensors needs scope=leaf.")
    if len(densities) != len(recipe.models) or any(not 0 <= d <= 1 for d in densities):
        raise ValueError(f"density={value}: give fractions from 0 to 1, one or one per model.")
    return densities


# --- Merging ------------------------------------------------------------------------------------


def merged_tensors(
    plan: Plan, report: Report = lambda done, total: None
) -> Callable[[str], np.ndarray]:
    """Returns the function from names in ``plan.specs`` to tensors of the result.

    Args:
      plan: see ``plan_merge``.
      report: called after every tensor with the number done and the number of all, counting each
        pass over the inputs.
    """
    recipe = plan.recipe
    total = (plan.passes - 1) * len(plan.merged) + len(plan.specs)
    counter = iter(range(1, total + 1))
    extra = _key(recipe)
    if _global_ties(recipe):
        extra["threshold"] = _thresholds(plan, lambda: report(next(counter), total))
    merged = set(plan.merged)

    def tensor(name: str) -> np.ndarray:
        dtype = plan.specs[name].dtype
        if name not in merged:
            result = plan.template.read(name)
        else:
            result = np.asarray(_merge_tensor(plan, name, dtype, extra))
            # JAX gives host memory that it has used back when Python next collects garbage.
            gc.collect(0)
        report(next(counter), total)
        return result.astype(dtype, copy=False)

    return tensor


def _merge_tensor(plan: Plan, name: str, dtype: np.dtype, extra: Mapping[str, Any]) -> jax.Array:
    models = [_read(m, name) for m in plan.models]
    base = None if plan.base is None else _read(plan.base, name)
    # merge_leaf rounds to the dtype of the base: it is a wide one if the result's differs.
    if base is not None and base.dtype != dtype:
        base = _wide(base)
    elif base is None and models[0].dtype != dtype:
        models[0] = _wide(models[0])
    options: dict[str, Any] = {**_options_at(plan.recipe, name), **extra}
    if plan.fishers:
        options["fishers"] = [_read(f, name) for f in plan.fishers]
    merged = merge_leaf(name, base, models, plan.recipe.method, **options)
    return merged.block_until_ready()


def _read(checkpoint: Checkpoint, name: str) -> jax.Array:
    x = checkpoint.read(name)
    # JAX promotes no 8-bit floats. Unlike jnp.asarray, device_put uses host memory as it is.
    return jax.device_put(x.astype(np.float32) if x.dtype.itemsize == 1 else x)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


_HALF = 2**16
_CHUNK = 2**22


def _thresholds(plan: Plan, step: Callable[[], None]) -> jax.Array:
    """Returns the smallest magnitude that ``ties`` keeps of each whole model, [n].

    The bits of a positive float32 are ordered as it is. A first pass counts how often each value
    of their upper half occurs, a second one the lower halves of those with the sought upper one.
    """
    num, size = len(plan.models), sum(plan.specs[name].size for name in plan.merged)
    ranks = [max(0, size - num_kept(d, size)) for d in _densities(plan.recipe)]
    counts = np.zeros((num, _HALF), np.int64)
    for name in plan.merged:
        for i, bits in _delta_bits(plan, name):
            counts[i] += np.bincount(bits >> 16, minlength=_HALF)
        step()
    upper = [
        int(np.searchsorted(np.cumsum(c), rank, side="right")) for c, rank in zip(counts, ranks)
    ]
    below = [int(c[:u].sum()) for c, u in zip(counts, upper)]
    counts[:] = 0
    for name in plan.merged:
        for i, bits in _delta_bits(plan, name):
            counts[i] += np.bincount(bits[bits >> 16 == upper[i]] & (_HALF - 1), minlength=_HALF)
        step()
    lower = [
        int(np.searchsorted(np.cumsum(c), rank - b, side="right"))
        for c, rank, b in zip(counts, ranks, below)
    ]
    found = np.array([(u << 16) + l for u, l in zip(upper, lower)], np.uint32).view(np.float32)
    # All of a model is kept by 0, as zeros are no less.
    return jnp.asarray(np.where(np.array(ranks) == 0, np.float32(0), found))


def _delta_bits(plan: Plan, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (model, bits of the magnitudes of its deltas) for pieces of one tensor."""
    assert plan.base is not None
    base = plan.base.read(name).reshape(-1)
    for i, model in enumerate(plan.models):
        x = model.read(name).reshape(-1)
        for start in range(0, x.size, _CHUNK):
            piece = slice(start, start + _CHUNK)
            delta = np.abs(_real32(x[piece]) - _real32(base[piece])).astype(np.float32)
            yield i, delta.view(np.uint32)


def _real32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.complex64 if kind(x.dtype) == "complex" else np.float32, copy=False)


def write_merge(
    plan: Plan,
    out: str | Path,
    *,
    max_shard_size: int = 5 * 10**9,
    report: Report = lambda done, total: None,
    note: str = "",
) -> list[Path]:
    """Merges, and writes a new checkpoint directory, which appears only when it is complete.

    With the tensors go a model card, ``README.md``, and the configuration and tokenizer files that
    lie beside the base.

    Args:
      plan: see ``plan_merge``.
      out: the directory, which must be new or empty.
      max_shard_size: bytes per file.
      report: see ``merged_tensors``.
      note: a sentence for the end of the model card.

    Returns:
      The files of tensors.

    Raises:
      FileExistsError: there is something at ``out``.
    """
    out = Path(out)
    check_new(out)
    with new_directory(out) as directory:
        tensor = merged_tensors(plan, report)
        files = write_checkpoint(directory, plan.specs, tensor, max_shard_size=max_shard_size)
        companions = copy_companions(plan.template.directory, directory, plan.recipe.dtype)
        with synced(directory / "README.md") as f:
            f.write(model_card(plan, out.name, companions, note).encode())
    return [out / file.name for file in files]


def copy_companions(source: Path, target: Path, dtype: str | None) -> list[str]:
    """Copies configuration and tokenizer files; returns their names.

    The dtype that a ``config.json`` states becomes that of the result.
    """
    found = sorted({p for pattern in _COMPANIONS for p in source.glob(pattern) if p.is_file()})
    for file in found:
        text = file.read_bytes()
        if file.name == "config.json" and dtype is not None:
            try:
                config = json.loads(text)
            except ValueError:
                raise ValueError(f"{file} is not JSON.") from None
            for key in {"torch_dtype", "dtype"} & config.keys():
                config[key] = dtype
            text = json.dumps(config, indent=2).encode() + b"\n"
        with synced(target / file.name) as f:
            f.write(text)
    return [file.name for file in found]


def recipe_text(recipe: Recipe) -> str:
    """Returns a recipe as YAML that ``read_recipe`` reads.

    >>> print(recipe_text(Recipe("task_arithmetic", ("b", "c"), "a", {"weight": [1.0, 0.5]})))
    merge_method: task_arithmetic
    base_model: a
    models:
    - model: b
      parameters:
        weight: 1.0
    - model: c
      parameters:
        weight: 0.5
    <BLANKLINE>
    """
    import yaml

    def plain(value: Any) -> Any:
        return list(map(plain_group, value.items())) if isinstance(value, Mapping) else value

    def plain_group(group: tuple[str, Any]) -> dict[str, Any]:
        pattern, value = group
        return {"value": value} if pattern == ".*" else {"filter": pattern, "value": value}

    def of_model(value: Any, i: int) -> Any:
        if isinstance(value, Mapping):
            return {pattern: of_model(v, i) for pattern, v in value.items()}
        return value[i] if isinstance(value, list) else value

    per_model = {n for n, v in recipe.options.items() if isinstance(v, list) or (
        isinstance(v, Mapping) and any(isinstance(x, list) for x in v.values()))}  # fmt: skip
    content: dict[str, Any] = {"merge_method": recipe.method}
    if recipe.base is not None:
        content["base_model"] = recipe.base
    content["models"] = []
    for i, model in enumerate(recipe.models):
        entry: dict[str, Any] = {"model": model}
        own = {n: plain(of_model(v, i)) for n, v in recipe.options.items() if n in per_model}
        entry |= {"parameters": own} if own else {}
        entry |= {"fisher": recipe.fishers[i]} if recipe.fishers else {}
        content["models"].append(entry)
    shared = {n.rstrip("_"): plain(v) for n, v in recipe.options.items() if n not in per_model}
    content |= {"parameters": shared} if shared else {}
    for field, default in (("dtype", None), ("seed", 0), ("missing", "error")):
        value = getattr(recipe, field)
        content |= {field: value} if value != default else {}
    return yaml.safe_dump(content, sort_keys=False)


def model_card(plan: Plan, name: str, companions: Sequence[str], note: str = "") -> str:
    """Returns the text of the result's ``README.md``."""
    recipe = plan.recipe
    lines = ["---", "tags:", "- merge", "---", "", f"# {name}", ""]
    lines += [f"A merge of {len(recipe.models)} models by the method `{recipe.method}`.", ""]
    lines += [f"- base: `{recipe.base}`"] if recipe.base else []
    lines += [f"- model: `{model}`" for model in recipe.models]
    lines += [f"- {option}: `{value}`" for option, value in recipe.options.items()]
    dtypes = sorted({str(spec.dtype) for spec in plan.specs.values()})
    lines += [
        f"- {len(plan.merged)} tensors merged, {len(plan.copied)} copied from "
        f"`{plan.template.path}`, {len(plan.left_out)} left out; dtypes: {', '.join(dtypes)}"
    ]
    lines += [f"- left out: {', '.join(f'`{n}`' for n in plan.left_out)}"] if plan.left_out else []
    lines += [f"- from the base: {', '.join(f'`{n}`' for n in companions)}"] if companions else []
    lines += ["", "The recipe:", "", "```yaml", recipe_text(recipe).rstrip(), "```"]
    lines += ["", note] if note else []
    return "\n".join(lines) + "\n"


def _bytes(specs: Iterable[Spec]) -> str:
    size = float(sum(spec.nbytes for spec in specs))
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} GB"
