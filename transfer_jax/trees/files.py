"""Trees and single tensors in safetensors files.

A checkpoint is one file, or a directory with ``model.safetensors``, or with shards and the index
file ``model.safetensors.index.json``, as Hugging Face lays them out. The format is a JSON header
and raw bytes. It is read and written here, tensor by tensor and without mapping files into memory,
so that what is held is what was asked for; the safetensors package writes only what is all in
memory and has no 8-bit floats for NumPy.
"""

import contextlib
import difflib
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from transfer_jax.trees.arithmetic import sharded_like
from transfer_jax.trees.paths import PyTree, paths

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "C64": np.complex64,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors package
_ALIGNMENT = 64  # bytes; JAX uses host memory that is aligned so without a copy


class Spec(NamedTuple):
    """The dtype and shape of a tensor."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes in memory and in a file."""
        return self.size * self.dtype.itemsize


class Checkpoint:
    """The tensors of one model in files, read one at a time.

    Args:
      path: a safetensors file, an index file, or a directory with one of them (see the module).

    Attributes:
      path: as given.
      specs: name of each tensor -> its dtype and shape, in the order of the files.

    Raises:
      FileNotFoundError: there is no such file or directory, or it has no checkpoint.
      ValueError: a file is no safetensors file, is cut off, or does not fit its index.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.specs: dict[str, Spec] = {}
        self._places: dict[str, tuple[Path, int]] = {}  # file and offset in it
        file = _entry(self.path)
        if file.suffix == ".json":
            weight_map = _weight_map(file)
            for shard in dict.fromkeys(weight_map.values()):
                names = {name for name, s in weight_map.items() if s == shard}
                self._add(file.parent / shard, names, index=file)
        else:
            self._add(file, None, index=file)

    @property
    def directory(self) -> Path:
        """The directory of the files, where a configuration and a tokenizer would be."""
        return self.path if self.path.is_dir() else self.path.parent

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor in memory of its own."""
        spec = self.specs[name]
        file, offset = self._places[name]
        memory = np.empty(spec.nbytes + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        data = memory[start : start + spec.nbytes]
        with file.open("rb") as f:
            f.seek(offset)
            if f.readinto(data.data) != spec.nbytes:
                raise ValueError(f"{file} ended within tensor {name!r}: it is cut off.")
        return data.view(spec.dtype).reshape(spec.shape)

    def _add(self, file: Path, wanted: set[str] | None, index: Path) -> None:
        if not file.is_file():
            raise FileNotFoundError(f"{index} names the shard {file.name}, which is not there.")
        header, start, size = _header(file)
        if wanted is not None and wanted - header.keys():
            raise ValueError(
                f"{index} says that {file.name} has the tensor {min(wanted - header.keys())!r}; "
                "it has not."
            )
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if wanted is not None and name not in wanted:
                continue
            if entry["dtype"] not in _DTYPES:
                raise ValueError(
                    f"tensor {name!r} of {file} has the dtype {entry['dtype']}; known are "
                    f"{', '.join(_DTYPES)}."
                )
            spec = Spec(np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"]))
            begin, end = entry["data_offsets"]
            if begin < 0 or end - begin != spec.nbytes or start + end > size:
                raise ValueError(
                    f"tensor {name!r} of {file}: {entry['dtype']} of shape {spec.shape} does not "
                    f"fit bytes {begin} to {end} of {size - start}; the file is cut off or damaged."
                )
            self.specs[name] = spec
            self._places[name] = (file, start + begin)


def _entry(path: Path) -> Path:
    """Returns the index file or the only file of a checkpoint."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(
            f"there is no checkpoint {path} (looked at {path.absolute()}). Give a safetensors file "
            "or a directory; download models of a hub first."
        )
    for name in (INDEX, SINGLE):
        if (path / name).is_file():
            return path / name
    there = sorted(p.name for p in path.iterdir())
    shown = ", ".join(there[:8]) + (", …" if len(there) > 8 else "") or "nothing"
    raise FileNotFoundError(f"{path} has neither {SINGLE} nor {INDEX}; it has {shown}.")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        return {str(name): str(file) for name, file in content["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f'{index} is no index file: JSON with "weight_map", from tensors to files.'
        ) from None


def _header(file: Path) -> tuple[dict[str, Any], int, int]:
    """Returns the entries, where the data begin, and the size of the file."""
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"{file} is no safetensors file, or is cut off in its header.")
        text = f.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        for entry in entries.values():
            _, _ = entry["data_offsets"]
            entry["dtype"], tuple(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is no safetensors file: its header is not what it should be.") \
            from None  # fmt: skip
    return entries, 8 + length, size


# --- Writing ------------------------------------------------------------------------------------


def write_checkpoint(
    directory: Path,
    specs: Mapping[str, Spec],
    tensor: Callable[[str], np.ndarray],
    *,
    max_shard_size: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes tensors that are made one at a time into one file, or into shards with an index.

    Args:
      directory: an existing directory.
      specs: name of each tensor -> its dtype and shape.
      tensor: returns the tensor of a name; called once per tensor, file by file.
      max_shard_size: bytes of tensors in one file, unless a single tensor has more; None for one
        file.
      metadata: goes into the header of every file.

    Returns:
      The files.

    Raises:
      ValueError: a tensor has another dtype or shape than its spec.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and max_shard_size is not None and filled + spec.nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    count = len(shards)
    files = [
        directory / (SINGLE if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors")
        for i in range(count)
    ]
    for file, names in zip(files, shards):
        write_file(file, {name: specs[name] for name in names}, tensor, metadata=metadata)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(spec.nbytes for spec in specs.values())},
            "weight_map": {name: f.name for f, names in zip(files, shards) for name in names},
        }
        files.append(directory / INDEX)
        with synced(files[-1]) as f:
            f.write(json.dumps(index, indent=2).encode() + b"\n")
    return files


def write_file(
    file: Path,
    specs: Mapping[str, Spec],
    tensor: Callable[[str], np.ndarray],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one safetensors file, tensor by tensor; see ``write_checkpoint``."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    # The largest items first keeps every tensor aligned, as the safetensors package writes them.
    ordered = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    for name in ordered:
        spec = specs[name]
        if spec.dtype not in _CODES:
            raise ValueError(
                f"tensor {name!r} has the dtype {spec.dtype}, which safetensors files lack. They "
                f"have {', '.join(map(str, _CODES))}."
            )
        header[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with synced(file) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            x = np.asarray(tensor(name))
            if Spec(x.dtype, x.shape) != specs[name]:
                raise ValueError(
                    f"tensor {name!r} is {x.dtype} of shape {x.shape}; {specs[name].dtype} of "
                    f"shape {specs[name].shape} was announced."
                )
            f.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)


@contextlib.contextmanager
def synced(file: Path) -> Iterator[Any]:
    """Opens a file for writing bytes, which are on the disk at the end."""
    with file.open("wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yields a directory to write into, which is given its name ``path`` only at the end.

    It is a hidden sibling, removed after an error; one that a killed process has left behind is
    removed by the next that writes ``path``.

    Raises:
      FileExistsError: ``path`` is there and not an empty directory.
      RuntimeError: another process is writing it.
    """
    import fcntl

    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.absolute().with_name(f".{path.absolute().name}.partial")
    partial.mkdir(exist_ok=True)
    # The lock ends with the process, however that ends.
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process is writing {path} (in {partial}).") from None
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield partial
            os.fsync(lock)
            check_new(path)
            partial.rename(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)
    _sync_directory(path.absolute().parent)


def check_new(path: Path) -> None:
    """Checks that a directory can be written at ``path``.

    Raises:
      FileExistsError: there is something that is not an empty directory.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists already; give another place, or remove it.")


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- Trees --------------------------------------------------------------------------------------


def save_safetensors(
    tree: PyTree,
    path: str | Path,
    *,
    separator: str = ".",
    max_shard_size: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Saves the leaves of a tree under their paths, atomically.

    Leaves are fetched from their devices one at a time.

    Args:
      tree: any pytree of arrays of real, complex (64 bit), integer or boolean numbers.
      path: a file, if the name ends in ``.safetensors``, which is replaced if it exists; otherwise
        a directory, which must be new or empty, for ``model.safetensors`` or shards and an index.
      separator: joins the keys of a leaf's path to the name of its tensor.
      max_shard_size: bytes per file of a directory; None for one file.
      metadata: strings for the files' headers.

    Raises:
      ValueError: two leaves have one name, a dtype has no place in safetensors files, or
        ``max_shard_size`` is given for a single file.
      FileExistsError: the directory exists and is not empty.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     save_safetensors({"dense": {"bias": jnp.zeros(2)}}, f"{place}/a.safetensors")
    ...     load_safetensors(f"{place}/a.safetensors")
    {'dense.bias': array([0., 0.], dtype=float32)}
    """
    path = Path(path)
    leaves: dict[str, Any] = {}
    for name, leaf in zip(_names(tree, separator), jax.tree.leaves(tree)):
        if name in leaves:
            raise ValueError(f"two leaves have the name {name!r}; use another separator.")
        leaves[name] = leaf
    specs = {name: _spec(name, leaf) for name, leaf in leaves.items()}

    def tensor(name: str) -> np.ndarray:
        return np.asarray(leaves[name])

    if path.suffix != ".safetensors":
        with new_directory(path) as directory:
            write_checkpoint(
                directory, specs, tensor, max_shard_size=max_shard_size, metadata=metadata
            )
        return
    if max_shard_size is not None:
        raise ValueError(f"max_shard_size is for directories; {path} is one file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write_file(partial, specs, tensor, metadata=metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_directory(path.absolute().parent)


def load_safetensors(
    path: str | Path, like: PyTree | None = None, *, separator: str = "."
) -> PyTree:
    """Loads a checkpoint, into the structure of another tree if one is given.

    Args:
      path: a file or directory, see ``Checkpoint``.
      like: a tree of arrays or of ``jax.ShapeDtypeStruct``, such as ``jax.eval_shape`` returns.
        The file must have its leaves, all of them and no others, in their shapes.
      separator: as in ``save_safetensors``.

    Returns:
      A tree like ``like``, with its dtypes and shardings: NumPy arrays where it has some, else JAX
      arrays. Without ``like`` a dictionary from names to NumPy arrays in the dtypes of the file.

    Raises:
      ValueError: the leaves differ in names, shapes or kind (integers for real numbers); all
        differences are listed.
      FileNotFoundError: there is no checkpoint.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     save_safetensors({"w": jnp.zeros(2)}, place)
    ...     load_safetensors(
    ...         place, like={"w": jnp.zeros(3), "b": jnp.zeros(3)}
    ...     )  # doctest: +ELLIPSIS
    Traceback (most recent call last):
      ...
    ValueError: ... missing: b; shapes: w is (2,) in the file, (3,) was expected.
    """
    checkpoint = Checkpoint(path)
    if like is None:
        return {name: checkpoint.read(name) for name in checkpoint.specs}
    names, leaves = _names(like, separator), jax.tree.leaves(like)
    _check_strict(checkpoint, {n: _spec(n, x) for n, x in zip(names, leaves)})

    def load(name: str, leaf: Any) -> Any:
        x = checkpoint.read(name).astype(_spec(name, leaf).dtype, copy=False)
        if isinstance(leaf, (np.ndarray, np.generic)):
            return x
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None:
            return jax.device_put(x, leaf.sharding)
        return sharded_like(jnp.asarray(x), leaf)

    loaded = [load(name, leaf) for name, leaf in zip(names, leaves)]
    return jax.tree.unflatten(jax.tree.structure(like), loaded)


def _names(tree: PyTree, separator: str) -> list[str]:
    return [path.replace("/", separator) for path in paths(tree)]


def _spec(name: str, leaf: Any) -> Spec:
    dtype = getattr(leaf, "dtype", None)
    if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        raise ValueError(f"leaf {name!r} is a random key; save jax.random.key_data of it.")
    if dtype is None and not isinstance(leaf, (bool, int, float, complex)):
        raise ValueError(
            f"leaf {name!r} is {type(leaf).__name__}, not an array. Split such leaves off: "
            "numbers, rest = partition(tree, is_floating)."
        )
    dtype = np.asarray(leaf).dtype if dtype is None else dtype
    return Spec(np.dtype(dtype), tuple(np.shape(leaf)))


def _check_strict(checkpoint: Checkpoint, wanted: Mapping[str, Spec]) -> None:
    there = checkpoint.specs
    missing = [_with_nearest(name, there.keys() - wanted.keys()) for name in wanted.keys() - there]
    unexpected = [f"{n} {there[n].shape}" for n in there if n not in wanted]
    both = [name for name in wanted if name in there]
    shapes = [
        f"{n} is {there[n].shape} in the file, {wanted[n].shape} was expected"
        for n in both if there[n].shape != wanted[n].shape
    ]  # fmt: skip
    kinds = [
        f"{n} is {there[n].dtype} in the file, {wanted[n].dtype} was expected"
        for n in both if kind(there[n].dtype) != kind(wanted[n].dtype)
    ]  # fmt: skip
    parts = {
        "missing": sorted(missing),
        "unexpected": unexpected,
        "shapes": shapes,
        "dtypes": kinds,
    }
    shown = "; ".join(f"{what}: {', '.join(found)}" for what, found in parts.items() if found)
    if shown:
        raise ValueError(f"{checkpoint.path} does not fit the tree; {shown}.")


def _with_nearest(name: str, others: Any) -> str:
    near = difflib.get_close_matches(name, sorted(others), n=1, cutoff=0.8)
    return f"{name} (the file has {near[0]})" if near else name


@functools.cache
def kind(dtype: np.dtype) -> str:
    """Returns ``real``, ``complex``, ``integer`` or ``boolean``."""
    kinds = (("real", jnp.floating), ("complex", jnp.complexfloating), ("integer", jnp.integer))
    return next((name for name, k in kinds if jnp.issubdtype(dtype, k)), "boolean")
