"""How one tensor of a Hugging Face checkpoint lies in our parameters."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """A bijection between one tensor of theirs and one or more of ours.

    Attributes:
      read: theirs -> a tuple of ours; views where possible.
      write: ours -> theirs.
    """

    read: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    write: Callable[..., np.ndarray]


class Tensor(NamedTuple):
    """One line of the correspondence.

    Attributes:
      theirs: name in the file.
      ours: path(s) in the parameters.
      layout: the bijection.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: Layout


SAME = Layout(lambda x: (x,), lambda x: x)
LINEAR = Layout(lambda x: (x.T,), lambda x: x.T)  # [out, in] <-> [in, out]
CONV = Layout(  # [out, in, height, width] <-> [height, width, in, out]
    lambda x: (x.transpose(2, 3, 1, 0),), lambda x: x.transpose(3, 2, 0, 1)
)


def heads_in(heads: int) -> Layout:
    """Weights of a query, key or value: [heads * D, H] <-> [H, heads, D]."""
    return Layout(
        lambda x: (x.T.reshape(x.shape[1], heads, -1),), lambda x: x.reshape(x.shape[0], -1).T
    )


def heads_bias(heads: int) -> Layout:
    """Their bias: [heads * D] <-> [heads, D]."""
    return Layout(lambda x: (x.reshape(heads, -1),), lambda x: x.reshape(-1))


def heads_out(heads: int) -> Layout:
    """Weights of the output projection: [H, heads * D] <-> [heads, D, H]."""
    return Layout(
        lambda x: (x.T.reshape(heads, -1, x.shape[0]),), lambda x: x.reshape(-1, x.shape[-1]).T
    )


def dense(theirs: str, ours: str, *, bias: bool = True) -> list[Tensor]:
    """A linear layer."""
    weight = Tensor(f"{theirs}.weight", (f"{ours}/kernel",), LINEAR)
    return [weight, Tensor(f"{theirs}.bias", (f"{ours}/bias",), SAME)] if bias else [weight]


def norm(theirs: str, ours: str, *, bias: bool = True) -> list[Tensor]:
    """A layer norm, or an RMS norm without bias."""
    weight = Tensor(f"{theirs}.weight", (f"{ours}/scale",), SAME)
    return [weight, Tensor(f"{theirs}.bias", (f"{ours}/bias",), SAME)] if bias else [weight]


def embedding(theirs: str, ours: str) -> list[Tensor]:
    """An embedding table."""
    return [Tensor(f"{theirs}.weight", (f"{ours}/embedding",), SAME)]


def attention(theirs: dict[str, str], ours: str, heads: int, *, bias: bool = True) -> list[Tensor]:
    """The four projections of an attention.

    Args:
      theirs: names of the modules, under 'query', 'key', 'value' and 'out'.
      ours: path of the attention.
      heads: how many.
      bias: of all four.
    """
    tensors = []
    for part in ("query", "key", "value"):
        name, path = theirs[part], f"{ours}/{part}"
        tensors.append(Tensor(f"{name}.weight", (f"{path}/kernel",), heads_in(heads)))
        if bias:
            tensors.append(Tensor(f"{name}.bias", (f"{path}/bias",), heads_bias(heads)))
    name, path = theirs["out"], f"{ours}/out"
    tensors.append(Tensor(f"{name}.weight", (f"{path}/kernel",), heads_out(heads)))
    if bias:
        tensors.append(Tensor(f"{name}.bias", (f"{path}/bias",), SAME))
    return tensors
