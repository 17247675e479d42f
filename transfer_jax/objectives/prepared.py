"""Batches that are made inside the compiled step: windows of a held series, generated examples."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax

from transfer_jax.objectives.base import Array, Batch, MappedBatch, PyTree


class Prepared(MappedBatch):
    """Maps every batch on the device, with arrays that are carried.

    For what would be wasteful to send: a batch of window starts becomes the windows of a series
    that lies on the device.

    Attributes:
      inner: reads the batch that ``prepare`` makes.
      carried: arrays for ``prepare``.
      prepare: pure, ``(carried, batch) -> batch``. It passes on ``mask`` where the batch has one.
    """

    carried: PyTree
    prepare: Callable[[PyTree, Batch], Batch] = flax.struct.field(pytree_node=False, kw_only=True)

    def batch(self, batch: Batch) -> Batch:
        return self.prepare(self.carried, batch)


class Generated(MappedBatch):
    """Draws every example on the device; example i is a pure function of (seed, i).

    The pipeline reads an ``IndexSource``: its batches hold the numbers of the examples, so any
    number of devices draws the same examples and a resumed run goes on with the next ones. Two
    seeds share no example; training and evaluation take different ones.

    Attributes:
      inner: reads batches of the stacked examples.
      seed: integer scalar, carried.
      settings: arrays for ``generate``, carried, such as the stage of a curriculum.
      generate: pure, ``(key, settings) -> example``, a dictionary of arrays without a batch axis.
      schedule: ``(settings, step) -> settings`` during training; None = they stay. Evaluation
        uses the settings as given.
    """

    seed: Array | int = 0
    settings: PyTree = None
    generate: Callable[[Array, PyTree], Batch] = flax.struct.field(pytree_node=False, kw_only=True)
    schedule: Callable[[PyTree, Array], PyTree] | None = flax.struct.field(
        pytree_node=False, default=None
    )

    def key(self, index: Array) -> Array:
        """Returns the key that ``generate`` is given for an example."""
        return jax.random.fold_in(jax.random.key(self.seed), index)

    def batch(self, batch: Batch) -> Batch:
        if "index" not in batch:
            raise ValueError(
                f"{type(self).__name__} reads the numbers of the examples in batch['index'] "
                f"(IndexSource); the batch has {sorted(batch)}."
            )

        def example(index: Array) -> dict[str, Any]:
            return dict(self.generate(self.key(index), self.settings))

        rest = {name: value for name, value in batch.items() if name != "index"}
        return {**rest, **jax.vmap(example)(batch["index"])}

    def at(self, step: Array) -> "Generated":
        settings = self.settings if self.schedule is None else self.schedule(self.settings, step)
        return self.replace(inner=self.inner.at(step), settings=settings)
