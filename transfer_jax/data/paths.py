"""Where data sets that are plain files lie: the directory named by ``TRANSFER_JAX_DATA``."""

import os
from pathlib import Path

VARIABLE = "TRANSFER_JAX_DATA"


def data_root() -> Path:
    """Returns the directory named by the environment variable ``TRANSFER_JAX_DATA``.

    Raises:
      FileNotFoundError: the variable is not set, or names no directory.
    """
    value = os.environ.get(VARIABLE, "")
    if not value:
        raise FileNotFoundError(
            f"this data set is read from local files, but the environment variable {VARIABLE} is "
            "not set. Set it to the directory that has one folder per data set, for example "
            f"export {VARIABLE}=$HOME/data. Data sets that need no files: digits, listops, "
            "pathfinder, arithmetic_text."
        )
    root = Path(value).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{VARIABLE}={value} names no directory; correct or create it")
    return root


def require(name: str, filename: str | None = None) -> Path:
    """Returns the folder ``name`` under ``data_root()``, or the file ``filename`` in it.

    Raises:
      FileNotFoundError: it is not there; names the place and what the directory holds instead.
    """
    root = data_root()
    folder = root / name
    if not folder.is_dir():
        present = sorted(p.name for p in root.iterdir() if p.is_dir())
        raise FileNotFoundError(
            f"there is no data set folder {folder} ({VARIABLE}={root}). Put its files there, or "
            f"set {VARIABLE} to another directory. Folders found: {', '.join(present) or 'none'}."
        )
    if filename is None:
        return folder
    return require_file(folder / filename, f"Put the file into the data set folder {folder}.")


def require_file(path: str | os.PathLike[str], how: str) -> Path:
    """Returns ``path``, which must exist.

    Args:
      path: a file or folder.
      how: sentences that say how to get it.

    Raises:
      FileNotFoundError: it does not exist; repeats ``how``.
    """
    path = Path(path).expanduser()
    if not path.exists():
        where = "the folder exists" if path.parent.is_dir() else f"{path.parent} does not exist"
        raise FileNotFoundError(f"{path} is missing ({where}). {how}")
    return path
