"""Sweeps: a list of overrides in a Python file, one run for each.

    def get_sweep():
        return [{"train.optimizer.learning_rate": rate, "seed": seed}
                for rate in (1e-3, 3e-3) for seed in range(3)]

Every run has a directory of its own below the sweep's, named after its overrides: entries may be
added to the list later, and what has run is not run again.
"""

import hashlib
import re
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch.common import Job, resolve
from transfer_jax.configuration import ConfigError


class Entry(NamedTuple):
    """One run of a sweep: the name of its directory, and its job."""

    name: str
    job: Job


def load(file: str, config: str, workdir: str | None, overrides: Sequence[str]) -> list[Entry]:
    """Reads a sweep and checks every entry against the config.

    Args:
      file: Python file with ``get_sweep() -> list[dict[str, value]]``.
      config: of every run.
      workdir: holds the directories of the runs.
      overrides: of every run; an entry comes after them.

    Raises:
      ConfigError: there is no such file, or an entry does not fit the config.
    """
    if not Path(file).is_file():
        raise ConfigError(f"there is no sweep file {file} (looked at {Path(file).absolute()}).")
    get = runpy.run_path(file).get("get_sweep")
    sweep = get() if callable(get) else None
    if not isinstance(sweep, list) or not sweep or not all(isinstance(e, Mapping) for e in sweep):
        raise ConfigError(
            f"{file} needs a function get_sweep() that returns a list of dictionaries, key of the "
            'config -> value, such as [{"seed": 0}, {"seed": 1}].'
        )
    entries = []
    for i, values in enumerate(sweep):
        texts = [f"{key}={_text(value)}" for key, value in values.items()]
        try:
            job = resolve(config, workdir, [*overrides, *texts])
        except ConfigError as error:
            raise ConfigError(f"entry {i} of {file}: {error}") from error
        label = _label(values)
        entries.append(Entry(label, job._replace(workdir=f"{job.workdir}/{label}")))
    names = [entry.name for entry in entries]
    if twice := sorted({label for label in names if names.count(label) > 1}):
        raise ConfigError(f"{file} has these entries twice: {', '.join(twice)}.")
    return entries


def _text(value: Any) -> str:
    """A value as ``--config.key=…`` reads it back."""
    return value if isinstance(value, str) else repr(value)


def _label(values: Mapping[str, Any]) -> str:
    """A file name that tells an entry from every other one of any sweep over the same config."""
    full = ",".join(f"{key}={_text(values[key])}" for key in sorted(values))
    lasts = [key.rpartition(".")[2] for key in values]
    short = {key: last if lasts.count(last) == 1 else key for key, last in zip(values, lasts)}
    label = ",".join(f"{short[key]}={_text(values[key])}" for key in sorted(values))
    label = re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", label).strip("._") or "base"
    digest = hashlib.sha256(full.encode()).hexdigest()[:6]
    return f"{label[:60]}-{digest}"
