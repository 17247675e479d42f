"""Batch export of recommendations: interactions in, the best k items of every user out."""

import csv
import dataclasses
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from transfer_jax.configuration import ConfigError, config_from_json
from transfer_jax.data import interactions
from transfer_jax.data.interactions import Interactions, Sequences
from transfer_jax.data.recommend import histories, select

COLUMNS = ("user_id", "item_id", "rank", "score")


@dataclasses.dataclass(frozen=True)
class Served:
    """A trained model, for export.

    Attributes:
      objective: its ``predict`` gives scores [U, R], of which columns 1 … n are items.
      variables: of the objective.
      inputs: the histories of U users, oldest items first, to the batch that ``predict`` reads.
    """

    objective: Any
    variables: Any
    inputs: Callable[[Sequences], Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an export will do.

    Attributes:
      config: of the work directory.
      path: directory of the trained model.
      model: its name.
      item_names: [n + 1], as the model numbers them; of the padding, "".
      users: names of the users with a known item, [U].
      history: their known items, as the model numbers them.
      lines: of the interactions.
      unknown_lines: of items that the model has never seen; they are left out.
      unknown_users: users without any other item; they get no recommendation.
    """

    config: Any
    path: Path
    model: str
    item_names: list[str]
    users: np.ndarray
    history: Sequences
    lines: int
    unknown_lines: int
    unknown_users: int

    def describe(self) -> str:
        """What ``--dry_run`` prints."""
        return "\n".join(
            [
                f"model: {self.model} of {self.path}",
                f"items: {len(self.item_names) - 1:,}",
                f"interactions: {self.lines:,}, of them {self.unknown_lines:,} of items that the "
                "model does not know",
                f"users: {len(self.users):,}, and {self.unknown_users:,} without a known item",
            ]
        )


def plan(workdir: Path, log: Interactions, model: str | None = None) -> Plan:
    """Reads what a finished run says of its items, and numbers a log accordingly.

    Args:
      workdir: of a run of ``bert4rec`` or of another recipe whose module has ``recommender``, or
        ``saved_models`` and ``serve``.
      log: interactions of the users to recommend to, old and new.
      model: one of those that the run has trained; None = the first.

    Raises:
      ConfigError: no finished run is there, it has no such model, or it recommends nothing; or no
        user has an item that it knows.
    """
    try:
        config = config_from_json((workdir / "config.json").read_text())
    except FileNotFoundError:
        raise ConfigError(f"{workdir} is no work directory: it has no config.json.") from None
    recipe = _recipe(config)
    if not (hasattr(recipe, "recommender") or hasattr(recipe, "serve")):
        raise ConfigError(
            f"{workdir} is a run of {config.recipe!r}, which recommends nothing; 'recommend' is "
            "for runs of recommenders, such as bert4rec."
        )
    items = workdir / "artifacts" / "items.json"
    if hasattr(recipe, "serve"):
        finished = recipe.saved_models(config, workdir)
    else:
        stages = {p.parent.name: p.parent for p in (workdir / "stages").glob("*/summary.json")}
        order = [*(n for n in config.models if n in stages), *sorted(stages)]
        finished = {name: stages[name] for name in order}
    if not finished:
        raise ConfigError(f"no model in {workdir} is trained to its end; run the experiment first.")
    if not items.exists():
        raise ConfigError(
            f"{workdir} has no list of items (artifacts/items.json): what it ran, "
            f"config.task={config.get('task')!r}, does not recommend."
        )
    model = model or next(iter(finished))
    if model not in finished:
        raise ConfigError(
            f"{workdir} has no trained model {model!r}; choose from {', '.join(finished)}."
        )
    names = json.loads(items.read_text())
    numbers = {name: i for i, name in enumerate(names) if i}
    lookup = np.array([0, *(numbers.get(str(name), 0) for name in log.item_names[1:])], np.int32)
    known = lookup[log.items] > 0
    if not known.any():
        some = ", ".join(map(repr, log.item_names[1:4]))
        raise ConfigError(
            f"none of the items is known to the model: there {some}, here "
            f"{', '.join(map(repr, names[1:4]))}. Items are matched by name."
        )
    counts = np.bincount(log.users[known], minlength=log.num_users)
    users = np.flatnonzero(counts)
    return Plan(
        config=config,
        path=finished[model],
        model=model,
        item_names=names,
        users=log.user_names[users],
        history=Sequences(
            lookup[log.items[known]], np.concatenate([[0], np.cumsum(counts[users])])
        ),
        lines=len(log),
        unknown_lines=int((~known).sum()),
        unknown_users=log.num_users - len(users),
    )


def _recipe(config: Any) -> Any:
    name = config.recipe.partition(":")[0]
    full = name if ":" in config.recipe else f"transfer_jax.papers.{name}"
    return importlib.import_module(full)


def read_log(path: Path, *, user: str, item: str, time: str) -> Interactions:
    """Reads interactions with a header; ``time=""``: rows are in order of time."""
    if not path.exists():
        raise ConfigError(f"there is no file of interactions {path}.")
    return interactions.read_table(path, user=user, item=item, time=time or None)


def export(
    plan: Plan,
    out: Path,
    *,
    k: int,
    batch_size: int = 256,
    shards: int = 1,
    keep_seen: bool = False,
) -> int:
    """Writes the best k items of each user to a CSV file, best first.

    The file has the columns ``user_id,item_id,rank,score`` and appears when it is complete. A user
    who has seen nearly everything has fewer lines.

    Args:
      plan: see ``plan``.
      out: the file.
      k: items per user, at most those there are.
      batch_size: users at a time; scores are [batch_size, items].
      shards: devices over which the item table is split; the others split the users.
      keep_seen: recommend what the user already knows, too.

    Returns:
      The number of lines.

    Raises:
      ConfigError: k is too large, or the devices do not divide so.
      CheckpointError: the model's files are damaged.
    """
    import jax
    from jax.sharding import PartitionSpec

    from transfer_jax.metrics import ranking
    from transfer_jax.objectives.recommend import NEVER
    from transfer_jax.training import Layout, make_mesh

    count = len(plan.item_names) - 1
    if not 1 <= k <= count:
        raise ConfigError(f"k={k}: there are {count} items to recommend.")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: at least one user at a time.")
    if jax.device_count() % shards:
        raise ConfigError(
            f"{shards} shards of the items do not divide the {jax.device_count()} device(s)."
        )
    rules = tuple((p, PartitionSpec(*spec)) for p, spec in plan.config.sharding.rules)
    layout = Layout(make_mesh({"model": shards}), rules)
    serve = getattr(_recipe(plan.config), "serve", None)
    served = serve(plan.config, plan.path, layout) if serve else _by_number(plan, layout)
    batch_size = -(-batch_size // layout.batch_devices) * layout.batch_devices

    @jax.jit
    def best(objective: Any, variables: Any, batch: Any) -> Any:
        scores = objective.predict(variables, batch)
        return ranking.top_k(scores, k, excluded=batch.get("seen"), groups=shards)

    width = max(1, int(plan.history.lengths.max()))
    lines = 0
    partial = out.with_name(f"{out.name}.partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for start in range(0, len(plan.users), batch_size):
            users = np.arange(start, min(start + batch_size, len(plan.users)))
            rows = np.concatenate([users, np.repeat(users[-1:], batch_size - len(users))])
            history = select(plan.history, rows)
            batch = dict(served.inputs(history))
            if not keep_seen:
                batch["seen"] = history.padded(width, fill=-1)
            found = best(served.objective, served.variables, layout.place_batch(batch))
            scores, items = map(np.asarray, found)
            for row, user in enumerate(users):
                offered = scores[row] > NEVER / 2
                for rank, (item, score) in enumerate(
                    zip(items[row][offered], scores[row][offered]), start=1
                ):
                    writer.writerow([plan.users[user], plan.item_names[item], rank, f"{score:.6g}"])
                    lines += 1
    partial.replace(out)
    return lines


def _by_number(plan: Plan, layout: Any) -> Served:
    """A model of item numbers."""
    from transfer_jax.training import load_variables

    build = _recipe(plan.config).recommender
    objective = build(plan.config, plan.model, len(plan.item_names) - 1)
    m = objective.module

    def inputs(history: Sequences) -> dict[str, np.ndarray]:
        options = {"side": m.alignment, "mask_id": objective.mask_id}
        return {"inputs": histories(history, m.max_length, **options)}

    return Served(objective, load_variables(plan.path, layout=layout), inputs)
