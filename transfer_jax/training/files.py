"""Small files that must never be half written."""

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically: a reader, or a restart after a crash, sees all of it or the old."""
    path = Path(path)
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
