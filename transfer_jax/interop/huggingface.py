"""Models in the files of Hugging Face: ``config.json`` and safetensors, read and written.

No torch and no pickle. Tensors are converted one at a time, so that memory holds the model and one
tensor more.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from transfer_jax import trees
from transfer_jax.interop.bart import BART, MBART
from transfer_jax.interop.bert import BERT, ROBERTA
from transfer_jax.interop.clip import CLIP
from transfer_jax.interop.family import Family
from transfer_jax.interop.gpt2 import GPT2_FAMILY
from transfer_jax.interop.layouts import Tensor
from transfer_jax.interop.longformer import LONGFORMER
from transfer_jax.interop.t5 import T5_FAMILY
from transfer_jax.interop.ttm import TTM_FAMILY
from transfer_jax.interop.vit import DEIT, VIT
from transfer_jax.trees.files import Checkpoint, Spec, new_directory, write_checkpoint

PyTree = Any

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        BERT,
        ROBERTA,
        CLIP,
        T5_FAMILY,
        BART,
        MBART,
        GPT2_FAMILY,
        VIT,
        DEIT,
        LONGFORMER,
        TTM_FAMILY,
    )
}


class Pretrained(NamedTuple):
    """A model that was read.

    Attributes:
      module: the Linen module.
      params: its parameters.
      fresh: paths that were not in the file and are drawn (see ``from_pretrained``).
    """

    module: Any
    params: PyTree
    fresh: tuple[str, ...]


def read_config(path: str | Path) -> dict[str, Any]:
    """Returns the ``config.json`` of a directory.

    Raises:
      FileNotFoundError: there is none; the message says how to get one.
    """
    path = Path(path)
    file = path / "config.json"
    if file.is_file():
        return json.loads(file.read_text())
    if path.is_dir():
        raise FileNotFoundError(
            f"{path} has no config.json: it is no model directory. One has config.json and "
            "model.safetensors (or shards with an index)."
        )
    raise FileNotFoundError(
        f"there is no directory {str(path)!r}. Models are read from local directories: if this is "
        "the id of a model hub, download it first (`hf download ID --local-dir DIR`) and give DIR."
    )


def find_family(config: Mapping[str, Any]) -> Family:
    """Returns the family of a ``config.json``.

    Raises:
      ValueError: it is not known.
    """
    name = config.get("model_type", "")
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"model_type={name!r} is not known; known are {sorted(FAMILIES)}.{hint}")
    return FAMILIES[name]


def family_of(module: Any) -> Family:
    """Returns the family of one of our modules.

    Raises:
      ValueError: it belongs to none.
    """
    for family in FAMILIES.values():
        try:
            if family.config(module)["model_type"] == family.name:
                return family
        except (AttributeError, TypeError, KeyError):
            continue
    raise ValueError(f"{type(module).__name__} is no model of the families {sorted(FAMILIES)}.")


def from_pretrained(
    path: str | Path,
    *,
    architecture: str | None = None,
    fresh: Sequence[str] = (),
    seed: int = 0,
    dtype: Any = jnp.float32,
    **options: Any,
) -> Pretrained:
    """Reads a model.

    Args:
      path: a directory with ``config.json`` and safetensors.
      architecture: the Hugging Face class to read it as, such as 'BertForMaskedLM'; None = the
        one that ``config.json`` names. If it is another one, the file's head is left out.
      fresh: regular expressions of parameters that may be missing in the file, such as a new head
        ('^classifier'); those that are missing are drawn from ``seed``.
      seed: of what is drawn.
      dtype: of the parameters.
      **options: fields of ``TransformerConfig`` to change: ``scan``, ``remat``, ``dropout``,
        ``dtype`` of the arithmetic as ``compute_dtype``, ``implementation``, …

    Returns:
      See ``Pretrained``.

    Raises:
      FileNotFoundError: there is no such directory.
      ValueError: the family or architecture is not known, or tensors are missing, unexpected or of
        another shape; all of them are listed.
    """
    config = read_config(path)
    family = find_family(config)
    named = architecture or (config.get("architectures") or [None])[0]
    if named is None:
        named = next(name for name, head in family.architectures.items() if head is None)
    if named not in family.architectures:
        raise ValueError(
            f"the architecture {named!r} is not known; {family.name} has "
            f"{', '.join(family.architectures)}. Choose with architecture=…"
        )
    if "compute_dtype" in options:
        options["dtype"] = options.pop("compute_dtype")
    module = family.build(config, family.architectures[named], options)
    params, missing = read_params(
        path, family, module, fresh=fresh, dtype=dtype,
        other_heads=named not in (config.get("architectures") or [named]),
    )  # fmt: skip
    if missing:
        params = trees.combine(params, _draw(family, module, missing, seed, dtype))
    return Pretrained(module, params, missing)


def read_params(
    path: str | Path,
    family: Family,
    module: Any,
    *,
    fresh: Sequence[str] = (),
    dtype: Any = jnp.float32,
    other_heads: bool = False,
) -> tuple[PyTree, tuple[str, ...]]:
    """Reads the parameters of ``module``, None where ``fresh`` ones are missing.

    Args:
      path, fresh, dtype: see ``from_pretrained``.
      family: of the module.
      module: its parameters are read.
      other_heads: the file's own head may be left out.

    Returns:
      The parameters and the paths of the missing ones.
    """
    checkpoint = Checkpoint(path)
    shapes = param_shapes(family, module)
    wanted = dict(zip(trees.paths(shapes), jax.tree.leaves(shapes)))
    bare = bool(family.base) and not any(n.startswith(family.base) for n in checkpoint.specs)
    tensors = {_name(t, family, bare): t for t in family.tensors(module)}
    left_out = family.ignored + (family.heads if other_heads else ())
    ignored = [re.compile(pattern) for pattern in left_out]
    unexpected = sorted(
        name for name in checkpoint.specs
        if name not in tensors and not any(p.search(name) for p in ignored)
    )  # fmt: skip
    lacking = {name: t for name, t in tensors.items() if name not in checkpoint.specs}
    allowed = [re.compile(pattern) for pattern in fresh]
    missing = sorted(
        name for name, t in lacking.items()
        if not any(p.search(path) for path in t.ours for p in allowed)
    )  # fmt: skip
    stacks: dict[str, np.ndarray] = {}
    leaves: dict[str, Any] = {}
    wrong = []
    for name, tensor in tensors.items():
        if name in lacking or missing or unexpected:
            continue
        for ours, value in zip(tensor.ours, tensor.layout.read(checkpoint.read(name))):
            target, index = _stacked(ours, wanted)
            expected = wanted[target].shape
            if value.shape != (expected if index is None else expected[1:]):
                wrong.append(
                    f"{name} {checkpoint.specs[name].shape} gives {ours} {value.shape}, and "
                    f"{expected} is wanted"
                )
            elif index is None:
                # A copy: a transposed view would keep the layout that the file had.
                leaves[target] = jnp.array(np.asarray(value, order="C"), dtype)
            else:
                if target not in stacks:
                    stacks[target] = np.empty(expected, dtype)
                stacks[target][index] = value
    if missing or unexpected or wrong:
        problems = {
            "missing": missing, "unexpected": unexpected, "of another shape": wrong
        }  # fmt: skip
        listed = "; ".join(
            f"{kind}: {', '.join(names[:10])}" + (" …" if len(names) > 10 else "")
            for kind, names in problems.items() if names
        )  # fmt: skip
        raise ValueError(
            f"{path} does not hold this {type(module).__name__}: {listed}. Parameters that are to "
            "be drawn anew are named with fresh=…, another head with architecture=…"
        )
    for target in list(stacks):
        leaves[target] = jnp.asarray(stacks.pop(target))
    params = jax.tree_util.tree_map_with_path(lambda kp, _: leaves.get(trees.path_str(kp)), shapes)
    return params, tuple(sorted(set(wanted) - set(leaves)))


def save_pretrained(
    path: str | Path,
    module: Any,
    params: PyTree,
    *,
    architecture: str | None = None,
    dtype: Any = None,
    max_shard_size: int | None = 5_000_000_000,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a model directory that ``transformers`` loads.

    Args:
      path: a new or empty directory.
      module: one of our backbones.
      params: its parameters.
      architecture: the Hugging Face class; None = the family's first with the module's head.
      dtype: of the tensors; None = as they are.
      max_shard_size: bytes of one file.
      extra: further entries of ``config.json`` (token ids, labels).

    Returns:
      The directory.

    Raises:
      ValueError: the module is of no known family, or the parameters are not its.
      FileExistsError: the directory is not empty.
    """
    family = family_of(module)
    head = getattr(getattr(module, "config", None), "head", None)
    if architecture is None:
        architecture = next(n for n, h in family.architectures.items() if h == head)
    shapes = param_shapes(family, module)
    found = {p: tuple(x.shape) for p, x in zip(trees.paths(params), jax.tree.leaves(params))}
    expected = {p: tuple(x.shape) for p, x in zip(trees.paths(shapes), jax.tree.leaves(shapes))}
    if found != expected:
        differing = sorted(p for p in found.keys() | expected.keys()
                           if found.get(p) != expected.get(p))  # fmt: skip
        listed = "; ".join(f"{p}: {found.get(p)}, not {expected.get(p)}" for p in differing[:8])
        raise ValueError(f"these are not the parameters of this {type(module).__name__}: {listed}.")
    leaves = dict(zip(trees.paths(params), jax.tree.leaves(params)))
    bare = family.architectures[architecture] is None and bool(family.base)
    tensors = {_name(t, family, bare): t for t in family.tensors(module)}

    def convert(name: str) -> np.ndarray:
        parts = []
        for ours in tensors[name].ours:
            target, index = _stacked(ours, leaves)
            value = leaves[target]
            parts.append(np.asarray(value if index is None else value[index]))
        value = tensors[name].layout.write(*parts)
        return np.asarray(value if dtype is None else value.astype(dtype), order="C")

    def spec(tensor: Tensor) -> Spec:
        parts = []
        for ours in tensor.ours:
            target, index = _stacked(ours, leaves)
            shape = leaves[target].shape if index is None else leaves[target].shape[1:]
            # A broadcast scalar has a shape and no memory.
            parts.append(np.broadcast_to(np.zeros((), leaves[target].dtype), shape))
        value = tensor.layout.write(*parts)
        return Spec(np.dtype(dtype or value.dtype), value.shape)

    specs = {name: spec(tensor) for name, tensor in tensors.items()}
    config = {**family.config(module), "architectures": [architecture], **(extra or {})}
    config["dtype"] = str(next(iter(specs.values())).dtype)
    with new_directory(Path(path)) as directory:
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_checkpoint(directory, specs, convert, max_shard_size=max_shard_size)
    return Path(path)


def param_shapes(family: Family, module: nn.Module) -> PyTree:
    """Returns the shapes of the module's parameters, without making any."""
    args, kwargs = family.inputs(module)
    key = jax.random.key(0)
    return jax.eval_shape(lambda *a: module.init(key, *a, **kwargs)["params"], *args)


def resize_vocabulary(
    module: Any, params: PyTree, vocab_size: int, *, seed: int = 0
) -> tuple[Any, PyTree]:
    """Changes the number of tokens; new rows are drawn around the mean of the old ones.

    The mean, with the scale of the initial values as noise, keeps the output distribution near what
    it was (Hewitt 2021).

    Args:
      module: one of our backbones.
      params: its parameters.
      vocab_size: the new number of tokens; rows beyond are dropped.
      seed: of the noise.

    Returns:
      The module and the parameters.

    Raises:
      ValueError: the family has no vocabulary, or (CLIP) one that must stay.
    """
    family = family_of(module)
    if not family.vocabulary:
        raise ValueError(
            f"models of the family {family.name!r} have no vocabulary that can be changed."
        )
    config = module.config
    scale = (
        config.embedding_scale if hasattr(config, "embedding_scale") else config.stack.init_scale
    )

    def resize(kp: Any, x: jax.Array) -> jax.Array:
        path = trees.path_str(kp)
        if path not in family.vocabulary or x.shape[0] == vocab_size:
            return x
        if vocab_size < x.shape[0]:
            return x[:vocab_size]
        key = jax.random.fold_in(jax.random.key(seed), family.vocabulary.index(path))
        shape = (vocab_size - x.shape[0], *x.shape[1:])
        noise = scale * jax.random.normal(key, shape) if x.ndim > 1 else jnp.zeros(shape)
        return jnp.concatenate([x, (x.mean(0) + noise).astype(x.dtype)])

    config = dataclasses.replace(config, vocab_size=vocab_size)
    return module.clone(config=config), jax.tree_util.tree_map_with_path(resize, params)


def _name(tensor: Tensor, family: Family, bare: bool) -> str:
    return tensor.theirs.removeprefix(family.base) if bare else tensor.theirs


_LAYER = re.compile(r"layers_(\d+)/")


def _stacked(path: str, known: Mapping[str, Any]) -> tuple[str, int | None]:
    """The path and index of a leaf, where the layers of a scanned stack lie in one array."""
    if path in known:
        return path, None
    match = _LAYER.search(path)
    if match is None:
        return path, None
    return path[: match.start()] + "layers/" + path[match.end() :], int(match[1])


def _draw(
    family: Family, module: nn.Module, missing: Sequence[str], seed: int, dtype: Any
) -> PyTree:
    """Initial values of the parameters ``missing``, None elsewhere."""
    args, kwargs = family.inputs(module)
    zeros = [jnp.zeros(x.shape, x.dtype) for x in args]

    @jax.jit  # what is not returned is not computed
    def draw(key: jax.Array) -> PyTree:
        params = module.init(key, *zeros, **kwargs)["params"]
        return jax.tree_util.tree_map_with_path(
            lambda kp, x: x.astype(dtype) if trees.path_str(kp) in missing else None, params
        )

    return draw(jax.random.key(seed))
