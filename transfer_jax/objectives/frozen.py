"""An objective on what a frozen network computes: the backward pass never enters that network."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from transfer_jax.objectives.base import Array, Batch, MappedBatch, PyTree, Variables


class Frozen(MappedBatch):
    """Replaces an entry of the batch by what a frozen module makes of it.

    The module's variables are carried, so they are neither differentiated nor optimised: its
    forward pass runs once, in evaluation mode (no dropout, running statistics, which stay), and
    keeps nothing for a backward pass. What the inner objective reads is all that is held. The
    parameters are those of the inner objective.

    Two of them nest, for two towers with an entry each.

    Attributes:
      inner: an objective that reads the module's outputs at ``batch[key]``.
      variables: of the module, carried.
      module: the frozen network.
      method: of the module, a name or a function ``(module, inputs, lengths=...) -> outputs``;
        ``lengths`` is given where the batch has it.
      key: the entry that is replaced.
      lengths: the entry with the lengths.
    """

    variables: Variables
    module: nn.Module = flax.struct.field(pytree_node=False, kw_only=True)
    method: str | Callable[..., PyTree] | None = flax.struct.field(pytree_node=False, default=None)
    key: str = flax.struct.field(pytree_node=False, default="inputs")
    lengths: str = flax.struct.field(pytree_node=False, default="lengths")

    def batch(self, batch: Batch) -> Batch:
        """Returns the batch with the module's outputs in place of its inputs."""
        if self.key not in batch:
            raise ValueError(f"Frozen reads batch[{self.key!r}]; the batch has {sorted(batch)}.")
        given = {"lengths": batch[self.lengths]} if self.lengths in batch else {}
        collections = {"params": self.variables.params, **self.variables.state}
        # Nothing here depends on what is differentiated; this also holds inside outer gradients.
        collections = jax.lax.stop_gradient(collections)
        outputs = self.module.apply(collections, batch[self.key], method=self.method, **given)
        return {**batch, self.key: jax.lax.stop_gradient(outputs)}


def cache_features(
    objective: Frozen, batches: Iterable[Batch], *, dtype: Any = None, file: str | None = None
) -> dict[str, np.ndarray]:
    """Computes what the frozen network gives for every example, once.

    Valid where the inputs do not change from epoch to epoch; for runs of one process.
    ``objective.inner`` then trains on the result (an ``ArraySource`` of it) as ``objective`` does
    on the inputs, without the network.

    Args:
      objective: whose ``batch`` is kept.
      batches: one pass, such as ``experiment.batches(pipeline)``; rows of ``mask`` 0 are left out.
      dtype: to store the features in, such as ``jnp.bfloat16``; None = as computed.
      file: to keep the features in, memory-mapped; None = in memory.

    Returns:
      The arrays of the batches, [N, ...]. States that are a tuple of S arrays [B, ...] of one shape
      become one array [N, S, ...].

    Raises:
      ValueError: there are no examples, or states of several shapes.
    """
    compute = jax.jit(lambda o, batch: o.batch(batch))
    parts: dict[str, list[np.ndarray]] = {}
    count, row, stored = 0, (), np.dtype(np.float32)
    with open(os.devnull if file is None else file, "wb") as out:
        for batch in batches:
            kept = slice(None) if "mask" not in batch else np.asarray(batch["mask"]) > 0
            rows = {k: v for k, v in compute(objective, batch).items() if k != "mask"}
            features = np.asarray(_stacked(rows.pop(objective.key)))[kept]
            features = features if dtype is None else features.astype(dtype)
            if file is None:
                parts.setdefault(objective.key, []).append(features)
            else:
                out.write(features.tobytes())
            count, row, stored = count + len(features), features.shape[1:], features.dtype
            for name, value in rows.items():
                parts.setdefault(name, []).append(np.asarray(value)[kept])
    if not count:
        raise ValueError("there are no examples to compute features of.")
    arrays = {name: np.concatenate(values) for name, values in parts.items()}
    if file is not None:
        arrays[objective.key] = np.memmap(file, stored, "r", shape=(count, *row))
    return arrays


def _stacked(states: PyTree) -> Array:
    leaves = jax.tree.leaves(states)
    if len(leaves) == 1:
        return leaves[0]
    if len({x.shape for x in leaves}) > 1:
        raise ValueError(
            f"states of shapes {[x.shape for x in leaves]} do not fit one array; only states of "
            "one shape can be cached."
        )
    return jnp.stack(leaves, axis=1)
