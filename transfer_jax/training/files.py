"""Where a work directory lies, and small files in it that must never be half written."""

import json
import os
from pathlib import Path
from typing import Any

from transfer_jax.configuration import ConfigError

_REMOTE = {"gs://": "gcsfs", "s3://": "s3fs"}  # prefix -> the package that knows it


def as_path(path: str | os.PathLike[str]) -> Path:
    """Returns a local ``pathlib.Path``, or an ``etils.epath.Path`` for ``gs://`` and ``s3://``.

    Both have the same methods.

    Raises:
      ConfigError: another kind of address, or the package that knows this one is not installed.
    """
    text, prefix = os.fspath(path), check_address(path)
    if not prefix:
        return Path(path)
    from importlib.util import find_spec

    if find_spec(_REMOTE[prefix]) is None:
        package = _REMOTE[prefix]
        raise ConfigError(f"{text} needs the package {package}: pip install {package}.")
    from etils import epath

    return epath.Path(text)  # type: ignore[return-value]  # a pathlib path in all but name


def check_address(path: str | os.PathLike[str]) -> str:
    """Returns the scheme of an address, such as ``gs://``, or nothing for a local path.

    The package that knows the address need not be here: who launches a job does not read from it.

    Raises:
      ConfigError: another kind of address.
    """
    text = os.fspath(path)
    prefix = text[: text.find("://") + 3] if "://" in text else ""
    if prefix and prefix not in _REMOTE:
        raise ConfigError(f"{text} is no work directory: use a local path, gs://… or s3://….")
    return prefix


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path lies in an object store: no append, no rename in one piece."""
    return "://" in os.fspath(path)


def absolute(path: str | os.PathLike[str]) -> Path:
    """Returns ``as_path(path)`` from the root of its file system on, ``~`` expanded."""
    found = as_path(path)
    return found if is_remote(found) else found.expanduser().absolute()


def modified(path: Path) -> float:
    """Returns when a file was written last, in seconds since the epoch."""
    stat: Any = path.stat()
    return stat.mtime if is_remote(path) else stat.st_mtime


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically: a reader, or a restart after a crash, sees all of it or the old."""
    path = as_path(path)
    if is_remote(path):  # an object appears when it is complete
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")
