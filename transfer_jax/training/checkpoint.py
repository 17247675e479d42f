"""Orbax checkpoints of a stage: asynchronous, the newest few kept, restored onto any mesh."""

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from transfer_jax.objectives import Variables
from transfer_jax.training import distributed
from transfer_jax.training.sharding import Layout

PyTree = Any
_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """No checkpoint of a stage could be read."""


def abstract(tree: PyTree, shardings: PyTree | None = None) -> PyTree:
    """Returns shapes and dtypes of a tree, with the shardings to restore to where given."""
    if shardings is None:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
            tree,
        )
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def read_tree(path: str | Path, layout: Layout | None = None) -> PyTree:
    """Reads a saved tree without knowing its structure.

    Args:
      path: of an item of a checkpoint (``stages/<name>/checkpoints/<step>/variables``) or of an
        artifact.
      layout: where to put the arrays; default whole, on the first device of this process.

    Returns:
      Nested dictionaries and lists of arrays; tuples come back as lists.
    """
    with _no_metadata_warning(), ocp.StandardCheckpointer() as checkpointer:
        path = Path(path).absolute()
        saved = checkpointer.metadata(path).item_metadata.tree
        shapes = jax.tree.map(
            lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), saved, is_leaf=_is_array_metadata
        )
        if layout is None:
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            shardings = jax.tree.map(lambda _: device, shapes)
        else:
            shardings = layout.shardings(shapes)
        return checkpointer.restore(path, abstract(shapes, shardings))


@contextlib.contextmanager
def _no_metadata_warning() -> Iterator[None]:
    """An item of a checkpoint has no metadata file of its own; orbax warns of it, needlessly."""
    logger = logging.getLogger("absl")

    def keep(record: logging.LogRecord) -> bool:
        return "_CHECKPOINT_METADATA" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def load_variables(stage: str | Path, *, layout: Layout | None = None) -> Variables:
    """Reads the variables that a stage ended with (or its newest checkpoint, if it has not ended).

    Where the stage kept an average of its parameters, or selected the best, it is these.

    Args:
      stage: the stage's directory, ``WORKDIR/stages/<name>``.
      layout: see ``read_tree``.

    Raises:
      CheckpointError: there is no checkpoint.
    """
    directory = Path(stage).absolute() / "checkpoints"
    steps = [int(p.name) for p in directory.glob("*") if p.name.isdigit()]
    if not steps:
        raise CheckpointError(f"there is no checkpoint in {directory}.")
    newest = directory / str(max(steps))
    for item in ("best", "variables"):
        if (newest / item).exists():
            params, state = _pair(read_tree(newest / item, layout))
            break
    if item == "variables" and (newest / "ema").exists():
        params = read_tree(newest / "ema", layout)
    return Variables(params, state)


def _pair(tree: PyTree) -> tuple[PyTree, PyTree]:
    """The saved form of ``Variables``."""
    return (tree["params"], tree["state"]) if isinstance(tree, dict) else tuple(tree)


def _is_array_metadata(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


class Checkpoints:
    """The checkpoints of one stage, named by the number of steps taken.

    Each holds several *items*: trees of arrays and one JSON object (``meta``), which also carries
    the state of the data iterator. An item can be restored without the others.
    """

    def __init__(self, directory: Path, *, keep: int = 2):
        self.directory = Path(directory).absolute()
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(self.directory, options=self._options)

    def steps(self) -> list[int]:
        """The steps at which finished checkpoints exist, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, items: dict[str, PyTree], meta: dict[str, Any]) -> None:
        """Saves in the background; arrays are copied before this returns and may be donated."""
        if step in self.steps():
            return
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._manager.save(
            step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **args), force=True
        )

    def restore(self, step: int, items: dict[str, PyTree]) -> tuple[dict[str, PyTree], dict]:
        """Restores some items of one checkpoint.

        Args:
          step: which.
          items: name -> tree of ``ShapeDtypeStruct`` with the shardings to restore to.
        """
        args = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
        restored = self._manager.restore(
            step, args=ocp.args.Composite(meta=ocp.args.JsonRestore(), **args)
        )
        return {name: restored[name] for name in items}, restored["meta"]

    def restore_newest(
        self, items: dict[str, PyTree]
    ) -> tuple[int, dict[str, PyTree], dict[str, Any]] | None:
        """Restores the newest checkpoint that can be read.

        A damaged one is set aside (renamed ``<step>.damaged``) with a warning and the one before
        it is tried.

        Returns:
          (step, items, meta), or None where there is no checkpoint at all.

        Raises:
          CheckpointError: checkpoints exist and none can be read.
        """
        failures = []
        for step in reversed(self.steps()):
            error: Exception | None = None
            try:
                restored, meta = self.restore(step, items)
            except Exception as e:  # orbax and tensorstore raise many kinds for damaged files
                error = e
            if not distributed.any_process(error is not None):
                return step, restored, meta
            reason = str(error).strip().splitlines()[0][:300] if error else "another process failed"
            failures.append(f"step {step}: {reason}")
            _log.warning(
                "The checkpoint of step %d in %s cannot be read (%s); trying the one before it. "
                "The damaged files are kept as %d.damaged.",
                step, self.directory, reason, step,
            )  # fmt: skip
            self._set_aside(step)
        if not failures:
            return None
        raise CheckpointError(
            f"none of the checkpoints in {self.directory} can be read: {'; '.join(failures)}. "
            "If the model or its code has changed since they were written, use a new workdir; if "
            "the files are damaged, delete this directory and the stage starts again."
        )

    def _set_aside(self, step: int) -> None:
        if distributed.is_primary():
            target = self.directory / f"{step}.damaged"
            shutil.rmtree(target, ignore_errors=True)
            (self.directory / str(step)).rename(target)
        distributed.barrier("checkpoint set aside")
        self._manager.reload()

    def wait(self) -> None:
        """Blocks until what was saved is on disk; raises what went wrong there."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
