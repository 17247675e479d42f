"""An experiment: named stages and artifacts in a work directory that can be resumed."""

import base64
import importlib
import json
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import PartitionSpec

from transfer_jax.configuration import (
    ConfigError,
    config_differences,
    config_from_json,
    config_to_json,
)
from transfer_jax.objectives import Objective, Variables
from transfer_jax.training import distributed, loop, report
from transfer_jax.training.checkpoint import read_tree
from transfer_jax.training.config import FitConfig, from_dict
from transfer_jax.training.files import absolute, write_json, write_text
from transfer_jax.training.sharding import Layout, make_mesh

PyTree = Any

# Settings that may differ between the runs of one work directory: where and how, not what.
_MAY_CHANGE = ("mesh.", "sharding.", "logging.")


class Experiment:
    """Runs the recipe that a config names, in a work directory.

    The directory holds ``config.json``, ``stages/<name>/`` (checkpoints, metrics, events),
    ``artifacts/<name>``, ``results.json`` and ``report/``. Running the same config in the same
    directory again skips what is finished and resumes what is not.

    Args:
      config: from ``get_config``; locked or not, it is copied.
      workdir: directory, created if absent; local, or ``gs://`` or ``s3://``.

    Raises:
      ConfigError: the directory belongs to another config or cannot be written.
    """

    def __init__(self, config: ml_collections.ConfigDict, workdir: str | Path):
        self.config = ml_collections.FrozenConfigDict(config)
        _check_stages(self.config)
        self.workdir = absolute(workdir)
        self._open(config)
        mesh = make_mesh(dict(self.config.get("mesh", {})))
        sharding = self.config.get("sharding", {})
        rules = tuple(
            (pattern, PartitionSpec(*spec)) for pattern, spec in sharding.get("rules", ())
        )
        self.layout = Layout(mesh, rules, sharding.get("min_size", 2**14))
        self._names: set[str] = set()
        stored = self.workdir / "results.json"
        self.results: dict[str, dict[str, Any]] = (
            json.loads(stored.read_text()) if stored.exists() else {}
        )

    def _open(self, config: ml_collections.ConfigDict) -> None:
        file = self.workdir / "config.json"
        if distributed.is_primary():
            try:
                self.workdir.mkdir(parents=True, exist_ok=True)
                if not any((self.workdir / kept).exists() for kept in ("stages", "artifacts")):
                    write_text(file, config_to_json(config))  # nothing computed: no claim yet
                (probe := self.workdir / ".writable").write_text("")
                probe.unlink()
            except OSError as e:
                raise ConfigError(
                    f"the work directory {self.workdir} cannot be written "
                    f"({e.strerror or e}). Choose "
                    "another with --workdir, or change its permissions."
                ) from e
        distributed.barrier("work directory")
        differences = {
            key: values
            for key, values in config_differences(
                config_from_json(file.read_text()), config_from_json(config_to_json(config))
            ).items()
            if not key.startswith(_MAY_CHANGE)
        }
        if differences:
            shown = "; ".join(
                f"{key} is {old!r} there and {new!r} now"
                for key, (old, new) in list(differences.items())[:5]
            )
            more = f" (and {len(differences) - 5} more)" if len(differences) > 5 else ""
            raise ConfigError(
                f"the work directory {self.workdir} belongs to another config: {shown}{more}. Give "
                "a new --workdir, or run with the settings in its config.json."
            )

    # -- stages and artifacts ---------------------------------------------------------------------

    def seed(self, name: str) -> int:
        """Returns a seed that depends on the config's seed and ``name`` alone."""
        return zlib.crc32(f"{self.config.get('seed', 0)}/{name}".encode())

    def key(self, name: str) -> jax.Array:
        """Returns a typed key that depends on the config's seed and ``name`` alone."""
        return jax.random.key(self.seed(name))

    def fit(
        self,
        name: str,
        objective: Objective,
        train: loop.Data,
        config: FitConfig | Mapping[str, Any],
        *,
        evaluate: Mapping[str, loop.Data] | None = None,
    ) -> loop.Fitted:
        """Trains a stage, or returns its result if it is finished, or resumes it.

        Args:
          name: of the stage, unique in the recipe.
          objective, train, evaluate: see ``training.fit``.
          config: a ``FitConfig``, or the part of the experiment's config that holds one.
        """
        settings = config if isinstance(config, FitConfig) else from_dict(FitConfig, config)
        project = self.config.get("logging", {}).get("wandb_project", "")
        wandb = {"project": project, "name": f"{self.workdir.name}/{name}"} if project else None
        return loop.fit(
            objective,
            train,
            settings,
            layout=self.layout,
            evaluate=evaluate,
            workdir=self.workdir / "stages" / self._claim(name),
            seed=self.seed(name),
            label=name,
            wandb=wandb,
        )

    def evaluate(
        self, objective: Objective, variables: Variables, data: loop.Data
    ) -> dict[str, float]:
        """Returns the objective's metrics over the whole of ``data``."""
        return loop.evaluate(objective, variables, data, self.layout)

    def batches(self, data: loop.Data) -> Iterator[PyTree]:
        """Yields the batches of ``data``, on the mesh."""
        iterator = data.iterator(jax.process_index(), jax.process_count())
        try:
            for batch in iterator:
                yield self.layout.place_batch(batch)
        finally:
            loop.close(iterator)

    def artifact(self, name: str, compute: Callable[[], PyTree]) -> PyTree:
        """Computes a tree of arrays once, keeps it, and reads it back in later runs.

        What is returned is always what was read back, so the first run and a resumed one go on with
        the same values: nested dictionaries of arrays on the experiment's mesh, or, where nothing
        in it is an array, the JSON value.

        Args:
          name: of the artifact, unique in the recipe.
          compute: called if the artifact does not exist yet.
        """
        path = self.workdir / "artifacts" / self._claim(name)
        text = path.with_suffix(".json")
        if not path.exists() and not text.exists():
            value = compute()
            if any(hasattr(x, "dtype") for x in jax.tree.leaves(value)):
                with ocp.StandardCheckpointer() as checkpointer:
                    checkpointer.save(path, self.layout.place(value))
            elif distributed.is_primary():
                write_json(text, value)
            distributed.barrier(f"artifact {name}")
        if text.exists():
            return json.loads(text.read_text())
        return read_tree(path, self.layout)

    def _claim(self, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.=-]*", name):
            raise ValueError(
                f"{name!r} names no stage or artifact: use letters, digits, '_', '-', '.', '='."
            )
        if name in self._names:
            raise ValueError(f"two stages or artifacts are called {name!r}; names must be unique.")
        self._names.add(name)
        return name

    # -- results ----------------------------------------------------------------------------------

    def record(self, name: str, value: float | int | str) -> None:
        """Keeps a number or text in ``results.json``."""
        self._store("scalars", name, _plain(value))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Keeps a table; the report shows it as markdown."""
        self._store(
            "tables",
            name,
            {"columns": list(columns), "rows": [[_plain(c) for c in r] for r in rows]},
        )

    def curve(
        self, name: str, x: Sequence[float], series: Mapping[str, Sequence[float]],
        *, xlabel: str = "", ylabel: str = "",
    ) -> None:  # fmt: skip
        """Keeps lines over a common axis; the report plots them."""
        values = {label: [_plain(v) for v in y] for label, y in series.items()}
        self._store(
            "curves", name,
            {"x": [_plain(v) for v in x], "series": values, "xlabel": xlabel, "ylabel": ylabel},
        )  # fmt: skip

    def bars(
        self, name: str, labels: Sequence[str], series: Mapping[str, Sequence[float]],
        *, ylabel: str = "",
    ) -> None:  # fmt: skip
        """Keeps groups of bars, one group per label; the report plots them."""
        values = {label: [_plain(v) for v in y] for label, y in series.items()}
        self._store("bars", name, {"labels": list(labels), "series": values, "ylabel": ylabel})

    def _store(self, kind: str, name: str, value: Any) -> None:
        self.results.setdefault(kind, {})[name] = value
        if distributed.is_primary():
            write_json(self.workdir / "results.json", self.results)

    # -- running ----------------------------------------------------------------------------------

    def run(self) -> dict[str, dict[str, Any]]:
        """Runs the recipe from where it stopped; returns the results."""
        self._names.clear()
        began = time.perf_counter()
        resolve_recipe(self.config.recipe)(self)
        self.seconds = time.perf_counter() - began
        return self.results

    def report(self) -> Path:
        """Writes ``report/`` from the files of the work directory; returns the path of its text."""
        return report.write_report(self.workdir)

    def show(self) -> Any:
        """Writes the report and returns it, plots included, for display in a notebook."""
        from IPython.display import Markdown

        path = self.report()

        def embed(match: re.Match) -> str:
            image = base64.b64encode((path.parent / match[2]).read_bytes()).decode()
            return f"![{match[1]}](data:image/png;base64,{image})"

        return Markdown(re.sub(r"!\[([^\]]*)\]\(([^)]+\.png)\)", embed, path.read_text()))


def resolve_recipe(name: str) -> Callable[[Experiment], Any]:
    """Returns a recipe: of the module ``name`` of ``transfer_jax.papers``, or ``module:function``.

    Raises:
      ConfigError: there is none.
    """
    module, _, function = name.partition(":")
    full = module if function else f"transfer_jax.papers.{module}"
    try:
        return getattr(importlib.import_module(full), function or "recipe")
    except ModuleNotFoundError as e:
        if e.name is None or not full.startswith(e.name):
            raise
        raise ConfigError(f"config.recipe={name!r}: there is no module {full}.") from e
    except AttributeError as e:
        raise ConfigError(f"config.recipe={name!r}: {full} has no {function or 'recipe'}.") from e


def _check_stages(config: ml_collections.FrozenConfigDict, path: str = "") -> None:
    """Refuses an impossible setting of any stage before the first one runs."""
    if {"steps", "optimizer"} <= set(config):
        from_dict(FitConfig, config, path)
        return
    for name, value in config.items():
        if isinstance(value, ml_collections.FrozenConfigDict):
            _check_stages(value, f"{path}.{name}" if path else name)


def _plain(value: Any) -> Any:
    """Turns NumPy and JAX scalars into Python's."""
    if isinstance(value, (str, bool, int, float)) or value is None:
        return value
    return np.asarray(value).item()
