"""LoRA and prefixes in the files of PEFT: ``adapter_config.json`` and safetensors, in and out.

The names in these files are those of the Hugging Face model; a family's list of tensors says which
of our parameters they modify.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transfer_jax import trees
from transfer_jax.interop.family import Family
from transfer_jax.interop.huggingface import family_of, param_shapes
from transfer_jax.interop.layouts import Tensor
from transfer_jax.nn import petl
from transfer_jax.nn.transformer import stack_layers
from transfer_jax.trees.files import Checkpoint, Spec, new_directory, write_checkpoint

PyTree = Any

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ATTENTION = re.compile(r"^(.*?)layers_(\d+)/attention/key/kernel$")
# Settings that change what the numbers mean, and the values at which they do not.
_PLAIN = {
    "bias": "none", "use_dora": False, "lora_bias": False, "use_qalora": False,
    "layer_replication": None, "alora_invocation_tokens": None, "target_parameters": None,
    "trainable_token_indices": None, "megatron_config": None, "use_bdlora": None,
    "arrow_config": None, "velora_config": None, "monteclora_config": None,
}  # fmt: skip


class Adapter(NamedTuple):
    """What an adapter directory holds.

    Attributes:
      method: for ``petl.adapted``.
      added: its parameters.
      params: parameters of the network that the file replaces (a head), None elsewhere.
    """

    method: petl.Method
    added: PyTree
    params: PyTree


def load_peft(path: str | Path, module: Any) -> Adapter:
    """Reads an adapter that PEFT has written.

    LoRA (of linear layers, rsLoRA and rank and alpha patterns too) and prefix tuning of a single
    stack. PEFT's prefix tuning moves the positions of the tokens by the length of the prefix;
    to get its outputs, add that length to the ``position_offset`` of a BERT.

    Args:
      path: a directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
      module: the network that it is for, one of a Hugging Face family.

    Raises:
      FileNotFoundError: there is no such directory or file.
      ValueError: another kind of adapter, or tensors that match no module of ``module``, or do not
        fit it; they are listed.
    """
    path = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"{path} has no {name}: a PEFT adapter is a directory with {CONFIG} and {WEIGHTS} "
                "(not adapter_model.bin: save it again with safe_serialization=True)."
            )
    config = json.loads((path / CONFIG).read_text())
    checkpoint = Checkpoint(path / WEIGHTS)
    family = family_of(module)
    shapes = _unrolled_shapes(family, module)
    kind = config.get("peft_type")
    if kind == "LORA":
        return _load_lora(path, config, checkpoint, family, module, shapes)
    if kind == "PREFIX_TUNING":
        return _load_prefix(path, config, checkpoint, family, module, shapes)
    raise ValueError(f"{path} is of peft_type {kind!r}; LORA and PREFIX_TUNING are read.")


def save_peft(
    path: str | Path,
    module: Any,
    method: petl.Method,
    added: PyTree,
    *,
    params: PyTree = None,
    task_type: str | None = None,
    base_model: str | None = None,
) -> Path:
    """Writes an adapter that PEFT loads.

    Args:
      path: a new or empty directory.
      module: the network, one of a Hugging Face family.
      method: one part: LoRA, or a prefix (one that a network makes is folded).
      added: its parameters.
      params: parameters of the network to be saved beside it (a head), None elsewhere.
      task_type: of PEFT, such as 'SEQ_CLS'.
      base_model: name or path of the network for who loads it.

    Raises:
      ValueError: the method is neither, or it modifies something that has no place in the file.
      FileExistsError: the directory is not empty.
    """
    method, added = petl.fold(method, added)
    parts = [part for part in method if not isinstance(part, petl.Unfrozen)]
    if len(parts) != 1 or not isinstance(parts[0], petl.Delta):
        raise ValueError(
            f"PEFT's files hold one kind of change; this method has {[p.name for p in parts]}."
        )
    part = parts[0]
    family = family_of(module)
    saved, modules = _heads(family, module, params)
    config = {
        "task_type": task_type, "base_model_name_or_path": base_model, "inference_mode": True,
        "modules_to_save": modules or None,
    }  # fmt: skip
    if part.is_lora:
        tensors, settings = _lora_tensors(family, module, part, added[part.name])
    elif part.form == "softmax" and part.composition == "gated":
        tensors, settings = _prefix_tensors(family, module, part, added[part.name])
    else:
        raise ValueError(f"the part {part.name!r} is neither LoRA nor prefix tuning.")
    arrays = {name: np.ascontiguousarray(x) for name, x in {**tensors, **saved}.items()}
    specs = {name: Spec(x.dtype, x.shape) for name, x in sorted(arrays.items())}
    with new_directory(Path(path)) as directory:
        (directory / CONFIG).write_text(json.dumps({**settings, **config}, indent=2) + "\n")
        (written,) = write_checkpoint(
            directory, specs, arrays.__getitem__, metadata={"format": "pt"}
        )
        written.rename(directory / WEIGHTS)
    return Path(path)


# -- LoRA -------------------------------------------------------------------------------------


def _load_lora(
    path: Path, config: dict[str, Any], checkpoint: Checkpoint, family: Family, module: Any,
    shapes: dict[str, tuple[int, ...]],
) -> Adapter:  # fmt: skip
    changed = {k: config[k] for k, plain in _PLAIN.items() if config.get(k, plain) != plain}
    if changed:
        raise ValueError(f"{path}: these settings of LoRA are not supported: {changed}.")
    names = {_module_name(name): name for name in checkpoint.specs}
    weights = {name.removesuffix(".lora_A.weight") for name in names if ".lora_A." in name}
    tensors = _by_name(family, module, weights)
    wrong: list[str] = []
    sites: dict[str, dict[str, np.ndarray]] = {}
    scale = _scale(config, config["r"], config["lora_alpha"])
    for name in sorted(weights):
        tensor = tensors.get(f"{name}.weight")
        b_name = names.get(f"{name}.lora_B.weight")
        if tensor is None or b_name is None:
            wrong.append(f"{name} (no such module)" if tensor is None else f"{name} (no lora_B)")
            continue
        a = checkpoint.read(names[f"{name}.lora_A.weight"]).T
        b = checkpoint.read(b_name).T
        own = _scale(config, a.shape[-1], _pattern(config, "alpha_pattern", name))
        pieces = _split(tensor, a, b * np.float32(own / scale), shapes)
        if pieces is None:
            wrong.append(f"{name} {a.shape} x {b.shape} (another shape)")
        else:
            sites |= pieces
    heads, unknown = _read_heads(checkpoint, names, family, module, shapes)
    wrong += unknown
    if wrong or not sites:
        listed = ", ".join(wrong[:10]) or "it has no factors"
        raise ValueError(
            f"{path} is no adapter of this {type(module).__name__}: {listed}. Its modules are "
            f"called as {_examples(family, module)}."
        )
    added: dict[str, Any] = {}
    rank = max(pair["a"].shape[-1] for pair in sites.values())
    for ours, pair in sites.items():
        petl.put(added, ours, {"kernel": jax.tree.map(jnp.asarray, pair)})
    if module.config.stack.scan:
        added = _stack(added, sites, shapes, rank, module.config.stack.num_layers)
    (part,) = petl.lora(
        rank, where=tuple(f"^{re.escape(p)}$" for p in petl.find(added, "kernel")),
        dropout=config.get("lora_dropout", 0.0), alpha=scale * rank,
    )  # fmt: skip
    return Adapter((part,), {part.name: added}, heads)


def _scale(config: Mapping[str, Any], rank: int, alpha: float) -> float:
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(config: Mapping[str, Any], field: str, name: str) -> float:
    """The alpha of a module: the first pattern that matches the end of its name."""
    for pattern, value in (config.get(field) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return config["lora_alpha"]


def _split(
    tensor: Tensor, a: np.ndarray, b: np.ndarray, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[str, np.ndarray]] | None:
    """Factors [in, r] and [r, out] in the shapes of our kernels; None where they do not fit.

    One of their matrices may be several of ours, side by side: these share ``a``.
    """
    pieces = {}
    if a.ndim != 2 or b.ndim != 2 or b.shape[1] % len(tensor.ours):
        return None
    for ours, part in zip(tensor.ours, np.split(b, len(tensor.ours), axis=1)):
        shape = shapes[ours]
        axes = _input_axes(shape, a.shape[0], part.shape[1])
        if axes is None:
            return None
        pieces[ours.removesuffix("/kernel")] = {
            "a": a.reshape(*shape[:axes], -1),
            "b": part.reshape(-1, *shape[axes:]),
        }
    return pieces


def _input_axes(shape: tuple[int, ...], inputs: int, outputs: int) -> int | None:
    for axes in range(1, len(shape)):
        if math.prod(shape[:axes]) == inputs and math.prod(shape[axes:]) == outputs:
            return axes
    return None


def _stack(
    added: PyTree, sites: Mapping[str, Any], shapes: Mapping[str, Any], rank: int, layers: int
) -> PyTree:
    """Factors under a scanned stack: ranks filled up with zeros, layers without any as well."""
    for path in list(sites):
        for i in range(layers):
            other = re.sub(r"layers_\d+/", f"layers_{i}/", path)
            pair = sites.get(other) or jax.tree.map(np.zeros_like, sites[path])
            a, b = pair["a"], pair["b"]
            missing = rank - a.shape[-1]
            a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)])
            b = np.pad(b, [(0, missing)] + [(0, 0)] * (b.ndim - 1))
            petl.put(added, other, {"kernel": {"a": jnp.asarray(a), "b": jnp.asarray(b)}})
    return stack_layers(added)


def _lora_tensors(
    family: Family, module: Any, part: petl.Delta, tree: PyTree
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    sites = _unrolled_sites(tree, "kernel", module)
    bare = _is_bare(family, module)
    found: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    rest = set(sites)
    for tensor in family.tensors(module):
        members = [ours.removesuffix("/kernel") for ours in tensor.ours]
        if not rest & set(members):
            continue
        rest -= set(members)
        name = _theirs(tensor, family, bare).removesuffix(".weight")
        a, b = _joined(members, tensor, sites, part)
        found[f"{_PREFIX}{name}.lora_A.weight"], found[f"{_PREFIX}{name}.lora_B.weight"] = a, b
        ranks[name] = a.shape[0]
    if rest:
        raise ValueError(f"{sorted(rest)[:5]} have no counterpart in a Hugging Face {family.name}.")
    rank = part.bottleneck
    # A learned scale is in the factors already.
    scale = 1.0 if part.scale is None else part.scale
    odd = {name: r for name, r in ranks.items() if r != rank}
    return found, {
        "peft_type": "LORA", "r": rank, "lora_alpha": scale * rank,
        "lora_dropout": part.dropout or 0.0,
        "target_modules": _targets(family, module, set(ranks), bare), "bias": "none",
        "use_rslora": False, "fan_in_fan_out": family.name == "gpt2",
        "rank_pattern": odd, "alpha_pattern": {name: scale * r for name, r in odd.items()},
    }  # fmt: skip


def _joined(
    members: list[str], tensor: Tensor, sites: Mapping[str, Any], part: petl.Delta
) -> tuple[np.ndarray, np.ndarray]:
    """Their lora_A [r, in] and lora_B [out, r] of one matrix, which may hold several of ours."""
    pairs = {}
    for member in members:
        if member in sites:
            site = sites[member]
            a, b = (np.asarray(site["kernel"][x], np.float32) for x in "ab")
            factor = np.asarray(site["scale"]) if part.scale is None else np.float32(1)
            pairs[member] = a.reshape(-1, a.shape[-1]), factor * b.reshape(b.shape[0], -1)
    (first, b), *others = pairs.values()
    width = b.shape[1]
    if len(members) == 1:
        return first.T, b.T
    if len(pairs) == len(members) and all(np.array_equal(first, a) for a, _ in others):
        return first.T, np.concatenate([b for _, b in pairs.values()], axis=1).T
    # Of different inputs: the ranks add up, each block of rows for its own outputs.
    a = np.concatenate([a for a, _ in pairs.values()], axis=1)
    blocks, start = np.zeros((a.shape[1], width * len(members)), np.float32), 0
    for member, (_, b) in pairs.items():
        column = members.index(member) * width
        blocks[start : start + len(b), column : column + width] = b
        start += len(b)
    return a.T, blocks.T


def _targets(family: Family, module: Any, names: set[str], bare: bool) -> list[str]:
    """Short names of modules where these mean no others, else the full names."""
    every = {
        _theirs(t, family, bare).removesuffix(".weight")
        for t in family.tensors(module) if t.theirs.endswith(".weight")
    }  # fmt: skip
    short = {name.rsplit(".", 1)[-1] for name in names}
    meant = {name for name in every if name.rsplit(".", 1)[-1] in short}
    return sorted(short if meant == names else names)


# -- prefixes -----------------------------------------------------------------------------------


def _load_prefix(
    path: Path, config: dict[str, Any], checkpoint: Checkpoint, family: Family, module: Any,
    shapes: dict[str, tuple[int, ...]],
) -> Adapter:  # fmt: skip
    attentions = _attentions(module, shapes)
    length, heads = config["num_virtual_tokens"], shapes[f"{attentions[0]}/key/kernel"][1:]
    names = {_module_name(name): name for name in checkpoint.specs}
    embeddings = names.pop("prompt_embeddings", None)
    wanted = (length, len(attentions) * 2 * math.prod(heads))
    found = checkpoint.specs[embeddings].shape if embeddings else None
    if found != wanted:
        raise ValueError(
            f"{path}: prompt_embeddings has shape {found}; this {type(module).__name__} of "
            f"{len(attentions)} layers needs {wanted}."
        )
    tree: dict[str, Any] = {}
    made = checkpoint.read(str(embeddings)).reshape(length, len(attentions), 2, *heads)
    for i, attention in enumerate(attentions):
        key, value = made[:, i, 0], made[:, i, 1]
        petl.put(tree, attention, {"key": jnp.asarray(key), "value": jnp.asarray(value)})
    replaced, unknown = _read_heads(checkpoint, names, family, module, shapes)
    if unknown:
        raise ValueError(f"{path} holds {', '.join(unknown[:10])}.")
    method = petl.prefix(length)
    tree = stack_layers(tree) if module.config.stack.scan else tree
    return Adapter(method, {method[0].name: tree}, replaced)


def _prefix_tensors(
    family: Family, module: Any, part: petl.Delta, tree: PyTree
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    shapes = _unrolled_shapes(family, module)
    attentions = _attentions(module, shapes)
    sites = _unrolled_sites(tree, "value", module)
    if set(sites) != set(attentions):
        raise ValueError(f"PEFT's prefixes are at every layer; these are at {sorted(sites)}.")
    stacked = [[np.asarray(sites[path][x], np.float32) for x in ("key", "value")]
               for path in attentions]  # fmt: skip
    made = np.moveaxis(np.array(stacked), 2, 0).reshape(part.bottleneck, -1)
    heads = shapes[f"{attentions[0]}/key/kernel"][1:]
    return {"prompt_embeddings": made}, {
        "peft_type": "PREFIX_TUNING", "num_virtual_tokens": part.bottleneck,
        "token_dim": math.prod(heads), "num_attention_heads": heads[0],
        "num_layers": len(attentions), "num_transformer_submodules": 1, "prefix_projection": False,
        "encoder_hidden_size": math.prod(heads),
    }  # fmt: skip


def _attentions(module: Any, shapes: Mapping[str, Any]) -> list[str]:
    """Paths of the attentions of a network with one stack, in order."""
    matches = [match for path in shapes if (match := _ATTENTION.match(path))]
    if len({match[1] for match in matches}) != 1 or any("cross_attention" in p for p in shapes):
        raise ValueError(
            f"PEFT's prefixes are read and written for networks of one stack; a "
            f"{type(module).__name__} has none or several."
        )
    return [m[0].removesuffix("/key/kernel") for m in sorted(matches, key=lambda m: int(m[2]))]


# -- heads and names ----------------------------------------------------------------------------


def _read_heads(
    checkpoint: Checkpoint, names: Mapping[str, str], family: Family, module: Any,
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[PyTree, list[str]]:  # fmt: skip
    """The parameters that a file replaces, as a tree with None elsewhere; and what is unknown."""
    whole = [name for name in names if ".lora_" not in name and name != "prompt_embeddings"]
    tensors = _by_name(family, module, whole)
    leaves, unknown = {}, [n for n in names if ".lora_" in n and not _is_factor(n)]
    for name in whole:
        if name not in tensors:
            unknown.append(f"{name} (no such parameter)")
            continue
        tensor = tensors[name]
        for ours, value in zip(tensor.ours, tensor.layout.read(checkpoint.read(names[name]))):
            if value.shape != shapes[ours]:
                unknown.append(f"{name} {value.shape} ({shapes[ours]} is wanted)")
            leaves[ours] = jnp.array(np.ascontiguousarray(value))
    if any("/layers_" in path for path in leaves) and module.config.stack.scan:
        unknown.append("single layers of a scanned stack")
    tree = jax.tree_util.tree_map_with_path(
        lambda kp, _: leaves.get(trees.path_str(kp)), param_shapes(family, module)
    )
    return tree, unknown


def _is_factor(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def _heads(
    family: Family, module: Any, params: PyTree
) -> tuple[dict[str, np.ndarray], list[str]]:  # fmt: skip
    """Their tensors of the leaves in ``params``, and the modules that these make up."""
    leaves = dict(zip(trees.paths(params), jax.tree.leaves(params)))
    bare = _is_bare(family, module)
    every = [_theirs(t, family, bare) for t in family.tensors(module)]
    saved = {}
    for tensor in family.tensors(module):
        if all(ours in leaves for ours in tensor.ours):
            parts = [np.asarray(leaves.pop(ours)) for ours in tensor.ours]
            saved[_theirs(tensor, family, bare)] = tensor.layout.write(*parts)
    if leaves:
        raise ValueError(f"{sorted(leaves)[:5]} have no counterpart in a Hugging Face model.")
    modules = set()
    for name in saved:
        words = name.split(".")
        for i in range(1, len(words)):
            inside = [n for n in every if n.startswith(".".join(words[:i]) + ".")]
            if all(n in saved for n in inside):
                modules.add(".".join(words[:i]))
                break
    return {f"{_PREFIX}{name}": x for name, x in saved.items()}, sorted(modules)


def _module_name(name: str) -> str:
    """A name in the file without PEFT's additions."""
    return re.sub(r"modules_to_save\.(default\.)?", "", name.removeprefix(_PREFIX))


def _by_name(family: Family, module: Any, names: Any) -> dict[str, Tensor]:
    """The family's tensors by the names that the model has which ``names`` come from."""
    bare = bool(family.base) and not any(name.startswith(family.base) for name in names)
    return {
        name: tensor for tensor in family.tensors(module)
        for name in ({tensor.theirs, _theirs(tensor, family, bare)})
    }  # fmt: skip


def _is_bare(family: Family, module: Any) -> bool:
    return getattr(module.config, "head", None) is None and bool(family.base)


def _theirs(tensor: Tensor, family: Family, bare: bool) -> str:
    return tensor.theirs.removeprefix(family.base) if bare else tensor.theirs


def _examples(family: Family, module: Any) -> str:
    names = [t.theirs for t in family.tensors(module) if any("layers_0/" in p for p in t.ours)]
    return ", ".join(name.removesuffix(".weight") for name in names[:3])


def _unrolled_shapes(family: Family, module: Any) -> dict[str, tuple[int, ...]]:
    """Path in the unrolled network -> shape."""
    if module.config.stack.scan:
        stack = dataclasses.replace(module.config.stack, scan=False)
        module = module.clone(config=dataclasses.replace(module.config, stack=stack))
    shapes = param_shapes(family, module)
    return {p: tuple(x.shape) for p, x in zip(trees.paths(shapes), jax.tree.leaves(shapes))}


def _unrolled_sites(tree: PyTree, key: str, module: Any) -> dict[str, PyTree]:
    """Path in the unrolled network -> parameters there."""
    found: dict[str, PyTree] = {}
    for path, site in petl.find(tree, key).items():
        if re.search(r"(^|/)layers/", path):
            for i in range(module.config.stack.num_layers):
                layer = re.sub(r"(^|/)layers/", rf"\1layers_{i}/", path)
                found[layer] = jax.tree.map(lambda x, i=i: x[i], site)
        else:
            found[path] = site
    return found
