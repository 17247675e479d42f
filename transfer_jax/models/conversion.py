"""Networks that predict a chain of events, such as click and then conversion (ESMM).

Sparse fields are looked up in embedding tables, summed under their weights and concatenated; one
tower per stage of the chain gives the logit of that stage, given that the ones before it happened.
Ma et al. 2018, "Entire Space Multi-Task Model".
"""

import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Array = jax.Array

ACTIVATIONS = ("relu", "prelu")
HEADS = ("sigmoid", "softmax2")
LOOKUPS = ("gather", "one_hot")


class Embeddings(nn.Module):
    """One table per field; a field's vector is the weighted sum of its slots' rows.

    Inputs are a dictionary:

    * ``ids``: int32 [B, S], the slots of all fields side by side, in the order of ``fields``. Id 0
      is padding and contributes zero, whatever its row holds.
    * ``weights``: float32 [B, S], optional; 1 where absent.
    * ``dense``: float32 [B, D], optional; appended to the vectors.
    * ``common_ids``, ``common_weights``: [G, C], optional, with ``index``: int32 [B]. The first C
      slots, of fields that several rows share (those of a user in a page view), given once; row i
      has those of ``index[i]``, and ``ids`` and ``weights`` hold the other S - C slots.

    Output: [B, sum over fields of ``features`` + D] in ``dtype``.

    Attributes:
      fields: (name, ids including the padding, slots) of each field.
      features: e, size of an embedding.
      stddev: of the truncated normal distribution that tables are drawn from.
      multiple: tables have a multiple of so many rows, so that a mesh axis divides them.
      lookup: ``gather``, whose gradient is a sum over segments, or ``one_hot``, a matrix product.
      dtype: of the output; tables are float32.
    """

    fields: Sequence[tuple[str, int, int]]
    features: int = 18
    stddev: float = 0.001
    multiple: int = 1
    lookup: str = "gather"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, inputs: Mapping[str, Array]) -> Array:
        if self.lookup not in LOOKUPS:
            raise ValueError(f"lookup={self.lookup!r}; choose one of {', '.join(LOOKUPS)}.")
        widths = _widths(self.fields, inputs)
        parts: list[Array] = []
        start = 0
        for name, size, slots in self.fields:
            shape = (math.ceil(size / self.multiple) * self.multiple, self.features)
            table = self.param(name, nn.initializers.truncated_normal(self.stddev), shape)
            common = start < widths["common_ids"]
            prefix, offset = ("common_", 0) if common else ("", widths["common_ids"])
            span = slice(start - offset, start - offset + slots)
            weights = inputs.get(f"{prefix}weights")
            vectors = self._combined(
                table, inputs[f"{prefix}ids"][:, span],
                None if weights is None else weights[:, span],
            )  # fmt: skip
            if common:
                vectors = jnp.take(vectors, inputs["index"], axis=0)
            parts.append(vectors)
            start += slots
        if "dense" in inputs:
            parts.append(inputs["dense"].astype(self.dtype))
        return jnp.concatenate(parts, axis=-1)

    def _combined(self, table: Array, ids: Array, weights: Array | None) -> Array:
        """[B, slots] ids to [B, e] vectors."""
        valid = (ids != 0).astype(self.dtype)
        weights = valid if weights is None else valid * weights.astype(self.dtype)
        if self.lookup == "one_hot":
            chosen = jax.nn.one_hot(ids, len(table), dtype=self.dtype) * weights[..., None]
            return chosen.sum(axis=1) @ table.astype(self.dtype)
        rows = jnp.take(table, ids, axis=0).astype(self.dtype)
        # Unrolled: a sum over so few slots is the same whatever the number of rows.
        return sum(
            (rows[:, j] * weights[:, j, None] for j in range(1, ids.shape[1])),
            rows[:, 0] * weights[:, 0, None],
        )


def _widths(fields: Sequence[tuple[str, int, int]], inputs: Mapping[str, Array]) -> dict[str, int]:
    """The slots in ``ids`` and ``common_ids``, which must be those of the fields."""
    names = ("common_ids", "ids")
    widths = {name: inputs[name].shape[1] if name in inputs else 0 for name in names}
    slots = [slots for _, _, slots in fields]
    ends = [sum(slots[:i]) for i in range(len(slots) + 1)]
    if sum(widths.values()) != ends[-1] or widths["common_ids"] not in ends:
        raise ValueError(
            f"inputs have {widths['common_ids']} common and {widths['ids']} own slots; the fields "
            f"{[name for name, _, _ in fields]} have {slots}, of which the first ones may be "
            "common, whole fields at a time."
        )
    return widths


class Tower(nn.Module):
    """A multilayer perceptron [B, F] -> [B, outputs]; any module of this interface may stand here.

    Defaults are those of the authors' code: kernels N(0, 1) / sqrt(fan in), biases 0.1, and PReLU
    with one slope per layer that starts at -0.25 (elsewhere 0.25 is usual).

    Attributes:
      hidden: sizes of the hidden layers.
      activation: ``relu`` or ``prelu``.
      outputs: 1, or 2 for ``head="softmax2"``.
      kernel_variance: variance of a kernel's entries times its fan in (2 = He's).
      bias: initial value of the biases.
      slope: initial value of PReLU's slopes.
      dtype: of the arithmetic; parameters are float32.
    """

    hidden: tuple[int, ...] = (200, 80)
    activation: str = "relu"
    outputs: int = 1
    kernel_variance: float = 1.0
    bias: float = 0.1
    slope: float = -0.25
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={self.activation!r}; choose one of {', '.join(ACTIVATIONS)}."
            )
        for i, size in enumerate((*self.hidden, self.outputs)):
            x = nn.Dense(
                size, name=f"dense_{i}", dtype=self.dtype,
                kernel_init=nn.initializers.variance_scaling(
                    self.kernel_variance, "fan_in", "normal"
                ),
                bias_init=nn.initializers.constant(self.bias),
            )(x)  # fmt: skip
            if i == len(self.hidden):
                return x
            if self.activation == "relu":
                x = nn.relu(x)
            else:
                x = nn.PReLU(negative_slope_init=self.slope, name=f"prelu_{i}")(x)
        return x


class ConversionNetwork(nn.Module):
    """Inputs of ``Embeddings`` to logits float32 [B, K]: stage k given that all before it happened.

    ESMM has two stages, click and conversion, over shared tables. With one stage it is the network
    of every single-task baseline.

    Attributes:
      fields, features, stddev, multiple, lookup: see ``Embeddings``.
      stages: names, in order.
      shared: one set of tables for all towers; else each has its own (ESMM-NS).
      tower: a module [B, F] -> [B, outputs], copied for every stage.
      head: ``sigmoid``: the tower's one output is the logit. ``softmax2``: it has two, whose
        softmax is the sigmoid of their difference.
      dtype: of the arithmetic up to the towers; logits are float32.
    """

    fields: Sequence[tuple[str, int, int]]
    stages: tuple[str, ...] = ("click", "conversion")
    features: int = 18
    shared: bool = True
    tower: nn.Module = Tower()
    head: str = "sigmoid"
    stddev: float = 0.001
    multiple: int = 1
    lookup: str = "gather"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, inputs: Mapping[str, Array]) -> Array:
        if self.head not in HEADS:
            raise ValueError(f"head={self.head!r}; choose one of {', '.join(HEADS)}.")

        def embed(name: str) -> Array:
            return Embeddings(
                fields=self.fields, features=self.features, stddev=self.stddev,
                multiple=self.multiple, lookup=self.lookup, dtype=self.dtype, name=name,
            )(inputs)  # fmt: skip

        hidden = embed("embeddings") if self.shared else None
        logits = []
        for stage in self.stages:
            below = embed(f"{stage}_embeddings") if hidden is None else hidden
            tower = self.tower.clone(parent=self, name=f"{stage}_tower")
            outputs = tower(below).astype(jnp.float32)
            expected = 1 if self.head == "sigmoid" else 2
            if outputs.shape[-1] != expected:
                raise ValueError(
                    f"head={self.head!r} needs towers with {expected} output(s); this one has "
                    f"{outputs.shape[-1]}."
                )
            logits.append(outputs[:, 0] if expected == 1 else outputs[:, 1] - outputs[:, 0])
        return jnp.stack(logits, axis=-1)


def partition_rules() -> tuple[tuple[str, PartitionSpec], ...]:
    """Splits every embedding table by rows over the mesh axis ``model``; see ``multiple``."""
    return ((r"(^|/|_)embeddings/", PartitionSpec("model", None)),)
