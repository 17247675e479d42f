"""Orbax checkpoints of a stage: asynchronous, the newest few kept, restored onto any mesh.

Beside the items of a checkpoint lies ``checksums.json``, the size and CRC-32 of every file, written
once the checkpoint is complete and compared before it is read: a file whose bits have changed is
otherwise often read without complaint. Object stores keep checksums of their own.
"""

import contextlib
import json
import logging
import threading
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from transfer_jax.objectives import Variables
from transfer_jax.training import distributed
from transfer_jax.training.files import absolute, is_remote, write_json
from transfer_jax.training.sharding import Layout

PyTree = Any
_log = logging.getLogger(__name__)

_CHECKSUMS = "checksums.json"


class CheckpointError(RuntimeError):
    """A checkpoint of a stage could not be written, or none could be read."""


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
        path = absolute(path)
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
      CheckpointError: there is no checkpoint, or its files have changed since they were written.
    """
    directory = absolute(stage) / "checkpoints"
    steps = [int(p.name) for p in directory.glob("*") if p.name.isdigit()]
    if not steps:
        raise CheckpointError(f"there is no checkpoint in {directory}.")
    newest = directory / str(max(steps))
    if damage := find_damage(newest, ("best", "variables", "ema")):
        raise CheckpointError(
            f"the checkpoint {newest} is damaged: {damage}. Run the experiment again: it goes on "
            "from the checkpoint before it."
        )
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


def write_checksums(checkpoint: Path) -> None:
    """Writes the sizes and CRC-32 sums of the files of a complete checkpoint beside them."""
    files = {
        path.relative_to(checkpoint).as_posix(): [path.stat().st_size, _crc32(path)]
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != _CHECKSUMS and not path.name.endswith(".tmp")
    }
    write_json(checkpoint / _CHECKSUMS, {"algorithm": "crc32", "files": files})


def find_damage(checkpoint: Path, items: Iterable[str]) -> str | None:
    """Says which file of some items is not as it was written; None if all are.

    A checkpoint without ``checksums.json`` (the process was killed before it was written, or the
    checkpoint lies in an object store) is taken as it is.
    """
    try:
        files = json.loads((checkpoint / _CHECKSUMS).read_text())["files"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{_CHECKSUMS} cannot be read ({error})"
    wanted = set(items)
    for name, (size, checksum) in files.items():
        if name.partition("/")[0] not in wanted:
            continue
        path = checkpoint / name
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, {size} were written"
            if _crc32(path) != checksum:
                return f"{name} has changed since it was written: its CRC-32 differs"
        except OSError as error:
            return f"{name}: {error.strerror or error}"
    return None


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as f:
        while block := f.read(2**22):
            value = zlib.crc32(block, value)  # releases the interpreter: steps go on meanwhile
    return value


class Checkpoints:
    """The checkpoints of one stage, named by the number of steps taken.

    Each holds several *items*: trees of arrays and one JSON object (``meta``), which also carries
    the state of the data iterator. An item can be restored without the others.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2):
        self.directory = absolute(directory)
        # What a killed process left half written goes away with the next save.
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )  # fmt: skip
        self._manager = ocp.CheckpointManager(self.directory, options=self._options)
        self._hashing: list[tuple[threading.Thread, threading.Event]] = []

    def steps(self) -> list[int]:
        """The steps at which finished checkpoints exist, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, items: dict[str, PyTree], meta: dict[str, Any]) -> None:
        """Saves in the background; arrays are copied before this returns and may be donated.

        Raises:
          CheckpointError: the save before this one has failed.
        """
        if step in self.steps():
            return
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        with self._explained():
            self._manager.save(
                step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **args), force=True
            )
        for _, ended in self._hashing:
            ended.set()
        self._hashing = [(thread, ended) for thread, ended in self._hashing if thread.is_alive()]
        if distributed.is_primary() and not is_remote(self.directory):
            ended = threading.Event()
            thread = threading.Thread(target=self._hash, args=(step, ended), daemon=True)
            self._hashing.append((thread, ended))
            thread.start()

    def _hash(self, step: int, ended: threading.Event) -> None:
        """Writes the checksums of a checkpoint once it is complete; ``ended``: it is, or never."""
        checkpoint = self.directory / str(step)
        while not checkpoint.exists() and not ended.wait(0.05):
            pass
        try:
            if checkpoint.exists():
                write_checksums(checkpoint)
        except OSError as error:
            if checkpoint.exists():  # else a newer one has replaced it meanwhile
                _log.warning("No checksums of the checkpoint %s: %s", checkpoint, error)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise many kinds
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            if len(reason) > 300:  # tensorstore begins with what it did and ends with the cause
                reason = f"{reason[:100]} … {reason[-180:]}"
            steps = self.steps()
            kept = f"The one of step {steps[-1]} is kept" if steps else "There is none yet"
            raise CheckpointError(
                f"a checkpoint could not be written to {self.directory}: {reason}. {kept}. Is the "
                "disk full or gone? Once that is mended the same command resumes."
            ) from error

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
            if distributed.is_primary() and not is_remote(self.directory):
                damage = find_damage(self.directory / str(step), (*items, "meta"))
                error = CheckpointError(damage) if damage else None
            # No process may begin to restore what another one does not: they meet in there.
            if not distributed.any_process(error is not None):
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
            if target.exists():
                epath.Path(target).rmtree()
            (self.directory / str(step)).rename(target)
        distributed.barrier("checkpoint set aside")
        self._manager.reload()

    def wait(self) -> None:
        """Blocks until what was saved is on disk.

        Raises:
          CheckpointError: it could not be written.
        """
        with self._explained():
            self._manager.wait_until_finished()
        for thread, ended in self._hashing:
            ended.set()
            thread.join()
        self._hashing.clear()

    def close(self) -> None:
        """Waits, and frees what is held.

        Raises:
          CheckpointError: what was saved last could not be written.
        """
        self.wait()
        self._manager.close()
