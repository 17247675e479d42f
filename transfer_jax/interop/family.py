"""What the conversion needs to know of a family of models."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from transfer_jax.interop.layouts import Tensor

_ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu",
}  # fmt: skip
_NAMES = {
    "gelu": "gelu", "gelu_tanh": "gelu_new", "quick_gelu": "quick_gelu", "relu": "relu",
    "silu": "silu",
}  # fmt: skip


def _tokens(module: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    del module
    return (jax.ShapeDtypeStruct((1, 2), jnp.int32),), {}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models.

    Attributes:
      name: ``model_type`` in ``config.json``.
      architectures: Hugging Face class -> our ``config.head``.
      base: prefix of the tensors of the model without a head, such as 'bert.'; files of the bare
        model lack it.
      build: (config.json, head, fields of ``TransformerConfig``) -> module.
      config: module -> config.json, without architectures.
      tensors: module -> every tensor of its file, by the names of the model with a head.
      ignored: regular expressions of tensors that carry nothing: buffers, copies of tied weights.
      heads: regular expressions of tensors of heads, which a model read as another architecture
        than its own leaves out.
      vocabulary: paths whose leading axis is the vocabulary.
      inputs: module -> shapes of arguments of its ``__call__``.
    """

    name: str
    architectures: dict[str, str | None]
    base: str
    build: Callable[[dict[str, Any], str | None, dict[str, Any]], Any]
    config: Callable[[Any], dict[str, Any]]
    tensors: Callable[[Any], list[Tensor]]
    ignored: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    inputs: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]] = _tokens


def activation(name: str) -> str:
    """Our name of an activation of theirs.

    Raises:
      ValueError: it is not known.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"the activation {name!r} is not known; known are {sorted(_ACTIVATIONS)}.")
    return _ACTIVATIONS[name]


def activation_name(name: str) -> str:
    """Their name of an activation of ours."""
    return _NAMES[name]


def unsupported(config: dict[str, Any], **expected: Any) -> None:
    """Refuses settings of ``config.json`` that we would silently read otherwise.

    Args:
      config: the file.
      **expected: key -> the only value, or tuple of values, that is supported; a missing key is
        fine.

    Raises:
      ValueError: another value.
    """
    for key, value in expected.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(
                f"config.json has {key}={config[key]!r}; this library reads "
                f"{' or '.join(map(repr, allowed))} only."
            )


def labels(count: int) -> dict[str, Any]:
    """The entries of ``config.json`` that say how many classes there are."""
    names = {str(i): f"LABEL_{i}" for i in range(count)}
    return {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}


def num_labels(config: dict[str, Any]) -> int:
    """The number of classes of a ``config.json``; 2 where it says nothing, as there."""
    return len(config.get("id2label") or range(2))
