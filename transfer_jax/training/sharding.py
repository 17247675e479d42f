"""Where every array lives: the mesh, ordered partition rules, and the FSDP default.

The mesh has three axes. ``data`` splits the batch; ``fsdp`` splits the batch and, besides, every
large array that a step carries (parameters, optimiser state, teachers, Fisher diagonals); ``model``
splits what the rules say. The arithmetic is written for one device; XLA inserts the communication.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transfer_jax.trees import path_str

PyTree = Any
Rules = Sequence[tuple[str, PartitionSpec]]

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the ``data x fsdp x model`` mesh.

    Args:
      sizes: axis name -> size; at most one may be -1 (whatever is left); absent axes are 1, and
        ``data`` is -1 where nothing else says so.
      devices: the devices to use, default all of them, of all processes.

    Raises:
      ValueError: an axis is unknown or the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    given = dict(sizes or {})
    if unknown := sorted(set(given) - set(AXES)):
        raise ValueError(f"unknown mesh axes {unknown}; a mesh has the axes {list(AXES)}.")
    shape = {axis: int(given.get(axis, -1 if axis == "data" else 1)) for axis in AXES}
    free = [axis for axis, size in shape.items() if size == -1]
    fixed = int(np.prod([size for size in shape.values() if size != -1]))
    bad = any(size < 1 and size != -1 for size in shape.values())
    if bad or len(free) > 1 or len(devices) % fixed or (not free and fixed != len(devices)):
        raise ValueError(
            f"a mesh of {shape} does not fit {len(devices)} device(s): the sizes must multiply to "
            "the number of devices, and one of them may be -1 to take what is left."
        )
    for axis in free:
        shape[axis] = len(devices) // fixed
    if devices == list(jax.devices()):
        # Orders devices so that neighbours on an axis are neighbours on the interconnect.
        return jax.make_mesh(tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return Mesh(np.asarray(devices).reshape(tuple(shape.values())), AXES)


@dataclass(frozen=True)
class Layout:
    """A mesh and the rules that place arrays on it.

    Attributes:
      mesh: from ``make_mesh``.
      rules: ordered ``(path regex, PartitionSpec)``; the first whose regex is found in a leaf's
        path decides. A leaf that no rule matches is split over ``fsdp`` along its largest axis
        that the axis size divides.
      min_size: leaves with fewer elements than this stay whole unless a rule says otherwise;
        splitting them costs more than it saves.
    """

    mesh: Mesh
    rules: Rules = field(default_factory=tuple)
    min_size: int = 2**14

    @property
    def batch_devices(self) -> int:
        """How many pieces the batch is split into."""
        return int(np.prod([self.mesh.shape[axis] for axis in BATCH_AXES]))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch(self) -> NamedSharding:
        """The sharding of every batch array: its first axis over ``data`` and ``fsdp``."""
        return NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))

    def spec(self, path: str, shape: Sequence[int]) -> PartitionSpec:
        """Returns the partition of one leaf.

        Raises:
          ValueError: the rule that applies does not fit the leaf's shape.
        """
        for pattern, spec in self.rules:
            if re.search(pattern, path):
                self._check(path, shape, pattern, spec)
                return spec
        size = self.mesh.shape["fsdp"]
        if size == 1 or int(np.prod(shape, dtype=np.int64)) < self.min_size:
            return PartitionSpec()
        candidates = [i for i, n in enumerate(shape) if n % size == 0 and n > 0]
        if not candidates:
            return PartitionSpec()
        best = max(candidates, key=lambda i: shape[i])
        return PartitionSpec(*(["fsdp" if i == best else None for i in range(best + 1)]))

    def _check(self, path: str, shape: Sequence[int], pattern: str, spec: PartitionSpec) -> None:
        where = f"the rule ({pattern!r}, {spec}) for {path!r} of shape {tuple(shape)}"
        if len(spec) > len(shape):
            raise ValueError(f"{where} names more axes than the array has.")
        for n, names in zip(shape, spec):
            axes = () if names is None else (names,) if isinstance(names, str) else tuple(names)
            if unknown := [a for a in axes if a not in self.mesh.shape]:
                raise ValueError(f"{where} uses mesh axes {unknown}; there are {list(AXES)}.")
            pieces = int(np.prod([self.mesh.shape[a] for a in axes]))
            if n % pieces:
                raise ValueError(
                    f"{where} would split an axis of {n} into {pieces} unequal pieces."
                )

    def shardings(self, tree: PyTree) -> PyTree:
        """Returns a tree of ``NamedSharding`` for a tree of arrays or ``ShapeDtypeStruct``."""
        return jax.tree_util.tree_map_with_path(
            lambda kp, x: NamedSharding(self.mesh, self.spec(path_str(kp), np.shape(x))), tree
        )

    def optimizer_shardings(self, opt_state: PyTree, params: PyTree) -> PyTree:
        """Places optimiser state: a leaf with a parameter's shape and path goes where that is.

        optax keeps moments in trees of the parameters' structure, so the path of a moment ends in
        the path of its parameter.
        """
        known = {
            path_str(kp): (np.shape(x), self.spec(path_str(kp), np.shape(x)))
            for kp, x in jax.tree_util.tree_leaves_with_path(params)
        }

        def place(kp: tuple[Any, ...], x: Any) -> NamedSharding:
            path = path_str(kp)
            parts = path.split("/")
            for start in range(len(parts)):
                match = known.get("/".join(parts[start:]))
                if match is not None and match[0] == np.shape(x):
                    return NamedSharding(self.mesh, match[1])
            return NamedSharding(self.mesh, self.spec(path, np.shape(x)))

        return jax.tree_util.tree_map_with_path(place, opt_state)

    def place(self, tree: PyTree, shardings: PyTree | None = None) -> PyTree:
        """Puts a tree of arrays, equal on all processes, onto the mesh."""
        shardings = self.shardings(tree) if shardings is None else shardings
        return jax.tree.map(_put, tree, shardings)

    def place_batch(self, batch: PyTree) -> PyTree:
        """Puts this process's rows of a batch onto the mesh.

        Raises:
          ValueError: the rows do not divide by the devices that split the batch.
        """
        rows = {np.shape(x)[0] for x in jax.tree.leaves(batch)}
        processes = jax.process_count()
        if any((n * processes) % self.batch_devices for n in rows):
            total = sorted(n * processes for n in rows)
            raise ValueError(
                f"a batch of {total[0] if len(total) == 1 else total} examples cannot be split "
                f"evenly over {self.batch_devices} devices (mesh {dict(self.mesh.shape)}): make "
                f"the batch size a multiple of {self.batch_devices}, or shrink the data or fsdp "
                "axis."
            )
        if processes == 1:
            return jax.device_put(batch, self.batch)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self.batch, np.asarray(x)), batch
        )


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array) and (x.is_fully_addressable is False or x.sharding == sharding):
        return x if x.sharding == sharding else jax.device_put(x, sharding)
    if jax.process_count() == 1:
        # copy: a step donates its state, and what the caller gave must outlive that.
        return jax.device_put(x, sharding, may_alias=False)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def bytes_per_device(tree: PyTree) -> int:
    """Returns the bytes that one device holds of a tree of placed arrays."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def placement_table(tree: PyTree) -> str:
    """Returns a table of placed arrays: leaf, shape, partition, bytes per device, and the sum."""
    rows = [
        (
            path_str(kp),
            "x".join(map(str, x.shape)) or "scalar",
            "whole" if x.sharding.is_fully_replicated else str(tuple(x.sharding.spec)),
            f"{bytes_per_device(x):,}",
        )
        for kp, x in jax.tree_util.tree_leaves_with_path(tree)
    ]
    rows = [("leaf", "shape", "partition", "bytes per device"), *rows]
    rows.append(("total", "", "", f"{bytes_per_device(tree):,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[3].rjust(16)])
        for row in rows
    )
