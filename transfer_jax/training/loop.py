"""The training loop. There is one."""

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from transfer_jax.objectives import Mean, Objective, Variables
from transfer_jax.training import distributed, profiling, progress, writers
from transfer_jax.training.checkpoint import Checkpoints, abstract
from transfer_jax.training.config import ConfigError, FitConfig
from transfer_jax.training.files import as_path, is_remote, write_json, write_text
from transfer_jax.training.optimizers import make_optimizer, schedule_shape
from transfer_jax.training.sharding import Layout, bytes_per_device, make_mesh, placement_table

Array = jax.Array
PyTree = Any
_log = logging.getLogger(__name__)

# Steps dispatched ahead of the device: enough to hide the host, few enough to stop soon.
_IN_FLIGHT = 2


class Data(Protocol):
    """What ``fit`` needs of a data pipeline (``transfer_jax.data.Pipeline`` is one)."""

    def iterator(self, process_index: int = 0, process_count: int = 1) -> Any:
        """Returns an iterator of this process's batches with ``get_state`` and ``set_state``."""

    def example_batch(self) -> PyTree:
        """Returns a global batch of the shapes and dtypes that the iterators together yield."""


class NonFiniteError(FloatingPointError):
    """The loss, the gradient norm or a metric became NaN or infinite."""


class Preempted(Exception):
    """The process was asked to stop; a checkpoint was saved and the same command resumes."""

    def __init__(self, stage: str, step: int):
        super().__init__(
            f"stage {stage!r} was asked to stop and saved a checkpoint at step {step}."
        )
        self.stage, self.step = stage, step


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step updates. All of it is saved, so that a resume changes no bit.

    Attributes:
      step: scalar int32, steps taken.
      variables: params and state.
      opt_state: optax state.
      ema: averaged params, or None.
      lr_scale: scalar float32, cut by the plateau schedule.
      sums: [K, 2] float32, total and weight of each metric since the last line was due.
      bad_step: scalar int32, the first step with a non-finite metric, or -1. It is recorded on the
        device, so the host may look late and still name the step.
      bad: [K] bool, which metrics were not finite at that step.
    """

    step: Array
    variables: Variables
    opt_state: PyTree
    ema: PyTree
    lr_scale: Array
    sums: Array
    bad_step: Array
    bad: Array


class Report(NamedTuple):
    """The part of a ``TrainState`` that the host reads; small, and never donated."""

    sums: Array
    lr_scale: Array
    bad_step: Array
    bad: Array


@dataclass(frozen=True)
class Fitted:
    """What ``fit`` returns.

    Attributes:
      variables: the trained (or averaged, or best) variables, on the mesh.
      metrics: ``set/metric`` -> value of the evaluation that belongs to these variables.
      summary: steps, parameter counts, seconds, FLOPs per step.
    """

    variables: Variables
    metrics: dict[str, float] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def params(self) -> PyTree:
        return self.variables.params


def fit(
    objective: Objective,
    train: Data,
    config: FitConfig,
    *,
    layout: Layout | None = None,
    evaluate: Mapping[str, Data] | None = None,
    workdir: str | Path | None = None,
    seed: int = 0,
    label: str = "fit",
    wandb: Mapping[str, Any] | None = None,
) -> Fitted:
    """Trains one objective.

    Args:
      objective: what to train.
      train: endless training data.
      config: how.
      layout: mesh and partition rules; default all devices, data parallel.
      evaluate: name -> data of one pass; metrics appear as ``name/metric``.
      workdir: directory of checkpoints, metrics and events. A directory in which this stage was
        finished returns its result; one in which it was cut off resumes it. None keeps nothing.
      seed: of initial parameters and of everything random in the steps.
      label: name of the stage in messages.
      wandb: arguments of ``wandb.init``, or None.

    Raises:
      NonFiniteError: see there; the message names the metric and the step.
      Preempted: SIGTERM arrived; a checkpoint is saved.
      ConfigError: settings that do not fit each other or the data.
      CheckpointError: checkpoints cannot be written, or none of those that exist can be read.
    """
    layout = layout or Layout(make_mesh())
    return _Run(
        objective, train, config, layout, dict(evaluate or {}),
        None if workdir is None else as_path(workdir), seed, label, wandb,
    ).run()  # fmt: skip


def evaluate(
    objective: Objective, variables: Variables, data: Data, layout: Layout | None = None
) -> dict[str, float]:
    """Returns every metric of the objective, and ``loss``, as exact means over the whole data."""
    layout = layout or Layout(make_mesh())
    objective = layout.place(objective.release())
    variables = layout.place(variables)
    totals: dict[str, list] = {}
    iterator = data.iterator(jax.process_index(), jax.process_count())
    try:
        for i, batch in enumerate(iterator):
            for name, mean in _evaluation_step(
                objective, variables, layout.place_batch(batch)
            ).items():
                totals.setdefault(name, []).append(mean)
            if i % 16 == 15:  # bounds how many batches wait on the device
                jax.block_until_ready(totals)
    finally:
        close(iterator)
    values = {}
    for name, means in jax.device_get(totals).items():
        weight = float(np.sum([m.weight for m in means], dtype=np.float64))
        total = float(np.sum([m.total for m in means], dtype=np.float64))
        values[name] = total / weight if weight else 0.0
    return values


@jax.jit
def _evaluation_step(objective: Objective, variables: Variables, batch: PyTree) -> dict:
    loss, aux = objective.loss(variables, batch, None)
    weight = jnp.asarray(aux.weight, jnp.float32)
    return {**aux.metrics, "loss": Mean(loss * weight, weight)}


def close(iterator: Any) -> None:
    """Ends the threads that read ahead for an iterator, if it has any."""
    end = getattr(iterator, "close", None)
    if end is not None:
        end()


def check_batch(batch: PyTree, config: FitConfig, layout: Layout) -> None:
    """Refuses a global batch that does not divide by microbatches and devices.

    Raises:
      ConfigError: the message says which sizes would do.
    """
    pieces = layout.batch_devices * config.accumulate
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % pieces:
        raise ConfigError(
            f"a batch of {rows} does not divide into {config.accumulate} microbatch(es) on "
            f"{layout.batch_devices} device(s): make the batch size a multiple of {pieces}."
        )


def metric_names(objective: Objective, variables: Variables, batch: PyTree) -> tuple[str, ...]:
    """Returns the names of what a training step reports, in the order of ``TrainState.sums``."""
    rng = jax.random.key(0)
    aux = jax.eval_shape(lambda o, v, b: o.loss(v, b, rng)[1], objective, variables, batch)
    return ("loss", "grad_norm", *sorted(aux.metrics))


def make_step(
    tx: optax.GradientTransformation, config: FitConfig, layout: Layout
) -> Callable[[TrainState, Objective, PyTree, Array], tuple[TrainState, Report]]:
    """Returns the pure function of one optimiser step, ready to be jitted."""
    schedule = schedule_shape(config.optimizer, config.steps)

    def gradients(
        objective: Objective, variables: Variables, batch: PyTree, rng: Array
    ) -> tuple[PyTree, Array, PyTree, dict, Array]:
        def loss(params: PyTree) -> tuple[Array, Any]:
            value, aux = objective.loss(Variables(params, variables.state), batch, rng)
            return value, (aux.state, aux.metrics, jnp.asarray(aux.weight, jnp.float32))

        (value, (state, metrics, weight)), grads = jax.value_and_grad(loss, has_aux=True)(
            variables.params
        )
        return grads, value, state, metrics, weight

    def accumulated(
        objective: Objective, variables: Variables, batch: PyTree, rng: Array
    ) -> tuple[PyTree, Array, PyTree, dict, Array]:
        count = config.accumulate
        if count == 1:
            return gradients(objective, variables, batch, rng)

        def split(x: Array) -> Array:
            # Every count-th row goes to the same microbatch: each device keeps its own rows.
            x = jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)
            spec = jax.sharding.PartitionSpec(None, *layout.batch.spec)
            return jax.lax.with_sharding_constraint(
                x, jax.sharding.NamedSharding(layout.mesh, spec)
            )

        parts = jax.tree.map(split, batch)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradients, objective, variables, first, rng)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def body(carry: Any, part: tuple[Array, PyTree]) -> tuple[Any, None]:
            state, grads, value, metrics, weight = carry
            index, micro = part
            g, v, state, m, w = gradients(
                objective, Variables(variables.params, state), micro, jax.random.fold_in(rng, index)
            )
            grads = jax.tree.map(lambda a, b: a + w * b, grads, g)
            metrics = jax.tree.map(jnp.add, metrics, m)
            return (state, grads, value + w * v, metrics, weight + w), None

        start = (variables.state, zeros[0], zeros[1], zeros[3], jnp.float32(0))
        (state, grads, value, metrics, weight), _ = jax.lax.scan(
            body, start, (jnp.arange(count), parts)
        )
        safe = jnp.where(weight == 0, 1.0, weight)
        return jax.tree.map(lambda g: g / safe, grads), value / safe, state, metrics, weight

    def step(
        state: TrainState, objective: Objective, batch: PyTree, key: Array
    ) -> tuple[TrainState, Report]:
        rng = jax.random.fold_in(key, state.step)
        params = state.variables.params
        objective = objective.at(state.step)
        grads, loss, model_state, metrics, weight = accumulated(
            objective, state.variables, batch, rng
        )
        updates, opt_state = tx.update(grads, state.opt_state, params)
        updates = jax.tree.map(lambda u: (u * state.lr_scale).astype(u.dtype), updates)
        rate = config.optimizer.learning_rate * schedule(state.step) * state.lr_scale
        new_params = objective.proximal(optax.apply_updates(params, updates), rate)
        ema = None
        if state.ema is not None:
            ema = optax.incremental_update(new_params, state.ema, 1.0 - config.ema_decay)

        rows = [(loss * weight, weight), (optax.global_norm(grads), jnp.float32(1))]
        rows += [tuple(metrics[name]) for name in sorted(metrics)]
        now = jnp.stack([jnp.stack(row).astype(jnp.float32) for row in rows])
        bad = ~jnp.isfinite(now).all(axis=1)
        first = bad.any() & (state.bad_step < 0)
        fresh = (state.step % config.log_every) == 0
        new = TrainState(
            step=state.step + 1,
            variables=Variables(new_params, model_state),
            opt_state=opt_state,
            ema=ema,
            lr_scale=state.lr_scale,
            sums=jnp.where(fresh, 0.0, state.sums) + now,
            # Recorded, not undone: what comes after is never saved, and keeping the old arrays for
            # a choice between old and new costs a fifth of a step.
            bad_step=jnp.where(first, state.step, state.bad_step),
            bad=jnp.where(first, bad, state.bad),
        )
        return new, Report(new.sums, new.lr_scale, new.bad_step, new.bad)

    return step


class _Watch:
    """The host's memory of the monitored metric: best value, patience, plateau."""

    def __init__(self, config: FitConfig):
        self.config = config
        self.best: float | None = None
        self.best_metrics: dict[str, float] = {}
        self.stale = 0  # evaluations since the best
        self.since_cut = 0  # evaluations since the best or the last cut of the learning rate

    def update(self, metrics: dict[str, float]) -> bool:
        """Takes a new evaluation; returns whether it is the best so far."""
        name = self.config.monitor
        if name not in metrics:
            raise ConfigError(
                f"monitor={name!r} is not among the evaluated metrics {sorted(metrics)}."
            )
        sign = 1.0 if self.config.monitor_mode == "max" else -1.0
        improved = self.best is None or sign * metrics[name] > sign * self.best
        self.stale += 1
        self.since_cut += 1
        if improved:
            self.best, self.best_metrics = metrics[name], dict(metrics)
            self.stale = self.since_cut = 0
        return improved

    def cut_due(self) -> bool:
        """Whether the plateau schedule cuts the rate now."""
        optimizer = self.config.optimizer
        if optimizer.schedule != "plateau" or self.since_cut <= optimizer.plateau_patience:
            return False
        self.since_cut = 0
        return True

    def exhausted(self) -> bool:
        return bool(self.config.patience) and self.stale >= self.config.patience

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "config"}

    def from_json(self, values: dict[str, Any]) -> None:
        vars(self).update(values)


class _Run:
    """One call of ``fit``: set up, loop, finish. The host's side; all arithmetic is in steps."""

    def __init__(
        self, objective: Objective, train: Data, config: FitConfig, layout: Layout,
        evaluation: dict[str, Data], workdir: Path | None, seed: int, label: str,
        wandb: Mapping[str, Any] | None,
    ):  # fmt: skip
        self.objective, self.train, self.config, self.layout = objective, train, config, layout
        self.evaluation, self.workdir, self.label, self.wandb = evaluation, workdir, label, wandb
        self.init_key, self.step_key = jax.random.split(jax.random.key(seed))
        self.watch = _Watch(config)
        self.metrics: dict[str, float] = {}
        self.best: Variables | None = None
        self.compiled: dict[Any, Any] = {}
        self.seconds = 0.0
        self.compile_seconds = 0.0
        self.flops = 0.0

    # -- set up ---------------------------------------------------------------------------------

    def run(self) -> Fitted:
        batch = self.train.example_batch()
        check_batch(batch, self.config, self.layout)
        self.checkpoints = (
            Checkpoints(self.workdir / "checkpoints", keep=self.config.keep)
            if self.workdir is not None
            else None
        )
        try:
            summary = None if self.workdir is None else self.workdir / "summary.json"
            if summary is not None and summary.exists():
                finished = self._finished(batch, json.loads(summary.read_text()))
                if finished is not None:
                    return finished
            return self._train(batch)
        finally:
            if self.checkpoints is not None:
                self.checkpoints.close()

    def _variable_shapes(self, batch: PyTree) -> tuple[Variables, Variables]:
        """Abstract variables and their shardings."""
        shapes = jax.eval_shape(lambda o, k, b: o.init(k, b), self.objective, self.init_key, batch)
        return shapes, self.layout.shardings(shapes)

    def _finished(self, batch: PyTree, summary: dict[str, Any]) -> Fitted | None:
        """The result of a finished stage; None if its last checkpoint had to be set aside."""
        shapes, shardings = self._variable_shapes(batch)
        wanted = abstract(shapes, shardings)
        assert self.checkpoints is not None
        items: dict[str, PyTree]
        if self.config.select_best:
            items = {"best": wanted}
        elif self.config.ema_decay:
            items = {"variables": wanted, "ema": wanted.params}
        else:
            items = {"variables": wanted}
        found = self.checkpoints.restore_newest(items)
        if found is None:
            raise ConfigError(
                f"{self.workdir} says that stage {self.label!r} is finished, but holds no "
                "checkpoint of it. Delete the stage's directory to train it again."
            )
        step, restored, _ = found
        if step != summary["steps"]:
            _log.warning(
                "Stage %r was finished at step %d, but its newest good checkpoint is of step %d: "
                "the steps after it are computed again.", self.label, summary["steps"], step,
            )  # fmt: skip
            return None
        variables = restored.get("best") or restored["variables"]
        if "ema" in restored:
            variables = Variables(restored["ema"], variables.state)
        return Fitted(variables, summary["metrics"], summary)

    def _initial_state(
        self, batch: PyTree, shardings: PyTree, tx: optax.GradientTransformation
    ) -> TrainState:
        # Only shapes of the batch matter: one row of zeros keeps the program small.
        row = jax.tree.map(lambda x: jnp.zeros((1, *np.shape(x)[1:]), x.dtype), batch)

        # The copy keeps what the objective carries apart from what the steps will donate.
        def init(objective: Objective, key: Array, row: PyTree) -> Variables:
            return jax.tree.map(jnp.copy, objective.init(key, row))

        variables = jax.jit(init, out_shardings=shardings)(
            self.layout.place(self.objective), self.init_key, row
        )
        opt_shapes = jax.eval_shape(tx.init, variables.params)
        opt_state = jax.jit(
            tx.init,
            out_shardings=self.layout.optimizer_shardings(opt_shapes, variables.params),
        )(variables.params)
        k = len(self.names)
        small = {
            "step": jnp.int32(0),
            "lr_scale": jnp.float32(1),
            "sums": jnp.zeros((k, 2), jnp.float32),
            "bad_step": jnp.int32(-1),
            "bad": jnp.zeros((k,), bool),
        }
        return TrainState(
            variables=variables,
            opt_state=opt_state,
            ema=jax.tree.map(jnp.copy, variables.params) if self.config.ema_decay else None,
            **jax.device_put(jax.device_get(small), self.layout.replicated),
        )

    # -- loop -----------------------------------------------------------------------------------

    def _train(self, batch: PyTree) -> Fitted:
        shapes, shardings = self._variable_shapes(batch)
        if not jax.tree.leaves(shapes.params):
            raise ConfigError(f"stage {self.label!r}: the objective has no parameters to train.")
        self.names = metric_names(self.objective, shapes, batch)
        tx, self.schedule = make_optimizer(self.config.optimizer, self.config.steps, shapes.params)
        state = self._initial_state(batch, shardings, tx)
        objective = self.objective = self.layout.place(self.objective.release())
        step_function = make_step(tx, self.config, self.layout)
        out = (jax.tree.map(lambda x: x.sharding, state), self.layout.replicated)
        self.jitted = jax.jit(step_function, donate_argnums=0, out_shardings=out)

        iterator = self.train.iterator(jax.process_index(), jax.process_count())
        start, state = self._resume(state, iterator)
        primary = distributed.is_primary()
        self.writer: Any = writers.NullWriter()
        if primary and self.workdir is not None:
            self.writer = writers.MetricWriter(
                self.workdir, wandb=None if self.wandb is None else dict(self.wandb),
                resume_step=start or None,
            )  # fmt: skip
        self.progress = progress.Progress(self.config.steps, self.label) if primary else None
        self._describe(state, start)
        try:
            with distributed.PreemptionGuard() as guard:
                state = self._loop(state, objective, iterator, start, guard)
            return self._finish(state)
        finally:
            close(iterator)
            self.writer.close()
            if self.progress is not None:
                self.progress.close()

    def _resume(self, state: TrainState, iterator: Any) -> tuple[int, TrainState]:
        if self.config.select_best:
            self.best = jax.tree.map(jnp.copy, self._current(state))
        if self.checkpoints is None:
            return 0, state
        items = {name: abstract(tree) for name, tree in self._items(state).items()}
        found = self.checkpoints.restore_newest(items)
        if found is None:
            return 0, state
        step, restored, meta = found
        iterator.set_state(meta["data"])
        self.watch.from_json(meta["watch"])
        self.metrics, self.seconds = meta["metrics"], meta["seconds"]
        self.best = restored.get("best")
        state = restored["training"].replace(
            variables=restored["variables"], ema=restored.get("ema")
        )
        return step, state

    def _loop(
        self, state: TrainState, objective: Objective, iterator: Any, start: int, guard: Any
    ) -> TrainState:
        config = self.config
        in_flight: deque[Report] = deque()
        due: list[tuple[int, Report]] = []  # lines whose values are still being computed
        # The profiler writes files itself, to local disks only.
        local = self.workdir is not None and not is_remote(self.workdir)
        profiled = bool(config.profile_steps) and local
        first = start + config.profile_start
        window = profiling.ProfileWindow(
            (self.workdir or Path()) / "profile",
            first if profiled else None,
            first + config.profile_steps,
        )
        self.clock, self.clock_step = time.perf_counter(), start
        began = self.clock
        before = self.seconds
        report: Report | None = None
        with window:
            for step in range(start, config.steps):
                window.step(step)
                batch = self.layout.place_batch(next(iterator))
                run = self._compiled(state, objective, batch)
                state, report = run(state, objective, batch, self.step_key)
                done = step + 1
                in_flight.append(report)
                if len(in_flight) > _IN_FLIGHT:
                    jax.block_until_ready(in_flight.popleft())
                if due:
                    self._lines(due, batch)
                last = done == config.steps
                if last or done % config.log_every == 0:
                    due.append((done, report))
                evaluating = last or (bool(config.eval_every) and done % config.eval_every == 0)
                saving = last or (
                    bool(config.checkpoint_every) and done % config.checkpoint_every == 0
                )
                stopping = distributed.should_stop(done, guard)
                if evaluating or saving or stopping:
                    self._lines(due, batch)
                    self._check(report)
                if evaluating:
                    state, patience_over = self._evaluate(state, done)
                    last = last or patience_over
                    saving = saving or last
                self.seconds = before + time.perf_counter() - began
                if saving or stopping:
                    self._save(state, done, iterator)
                if stopping and not last:
                    assert guard is not None
                    if self.checkpoints is not None:
                        self.checkpoints.wait()
                    raise Preempted(self.label, done)
                if last:
                    break
        return state

    def _compiled(self, state: TrainState, objective: Objective, batch: PyTree) -> Any:
        """The compiled step for batches of this shape (bucketed sequences have several)."""
        shape = tuple((x.shape, x.dtype.name) for x in jax.tree.leaves(batch))
        if shape not in self.compiled:
            began = time.perf_counter()
            compiled = self.jitted.lower(state, objective, batch, self.step_key).compile()
            self.compile_seconds += time.perf_counter() - began
            # XLA counts one device's program.
            self.flops = (profiling.compiled_flops(compiled) or 0.0) * self.layout.mesh.size
            self.compiled[shape] = compiled
            self.clock = time.perf_counter()
        return self.compiled[shape]

    def _lines(self, due: list[tuple[int, Report]], batch: PyTree) -> None:
        """Writes the metric lines that are due; waits for their values."""
        for step, report in due:
            host = jax.device_get(report)
            self._check(host)
            sums = np.asarray(host.sums, np.float64)
            values = {
                f"train/{name}": float(total / weight) if weight else 0.0
                for name, (total, weight) in zip(self.names, sums)
            }
            values["train/learning_rate"] = float(self.schedule(step - 1)) * float(host.lr_scale)
            now = time.perf_counter()
            elapsed, steps = now - self.clock, step - self.clock_step
            rows = jax.tree.leaves(batch)[0].shape[0]
            if steps and elapsed > 0:
                values["time/steps_per_second"] = steps / elapsed
                values["time/examples_per_second"] = rows * steps / elapsed
                mfu = profiling.model_flops_utilisation(
                    self.flops, elapsed / steps, list(self.layout.mesh.devices.flat)
                )
                if mfu is not None:
                    values["time/mfu"] = mfu
            self.clock, self.clock_step = now, step
            self.writer.write(step, values)
            if self.progress is not None:
                self.progress.update(step, values)
        due.clear()

    def _check(self, report: Report) -> None:
        host = jax.device_get(report)
        step = int(host.bad_step)
        if step < 0:
            return
        names = [name for name, bad in zip(self.names, host.bad) if bad]
        kept = "nothing was saved before it"
        if self.checkpoints is not None:
            self.checkpoints.wait()
            if steps := self.checkpoints.steps():
                kept = f"the last good checkpoint, of step {steps[-1]}, is kept"
        raise NonFiniteError(
            f"stage {self.label!r}: {', '.join(names)} became NaN or infinite at step {step + 1}; "
            f"{kept}. Lower the learning rate, clip the gradient norm "
            "(optimizer.clip_norm), or check the data of that step."
        )

    def _current(self, state: TrainState) -> Variables:
        """The variables that count: averaged where an average is kept."""
        if state.ema is None:
            return state.variables
        return Variables(state.ema, state.variables.state)

    def _evaluate(self, state: TrainState, step: int) -> tuple[TrainState, bool]:
        variables = self._current(state)
        metrics: dict[str, float] = {}
        for name, data in self.evaluation.items():
            for key, value in evaluate(self.objective, variables, data, self.layout).items():
                metrics[f"{name}/{key}"] = value
        self.metrics = metrics
        if metrics:
            self.writer.write(step, metrics)
            if self.progress is not None:
                self.progress.update(step, metrics)
        self.clock, self.clock_step = time.perf_counter(), step
        if not self.config.monitor:
            return state, False
        if self.watch.update(metrics) and self.config.select_best:
            self.best = jax.tree.map(jnp.copy, variables)
        if self.watch.cut_due():
            factor = self.config.optimizer.plateau_factor
            state = state.replace(lr_scale=state.lr_scale * jnp.float32(factor))
            self._say(f"no improvement of {self.config.monitor}: learning rate times {factor}")
        return state, self.watch.exhausted()

    # -- finish ---------------------------------------------------------------------------------

    def _save(self, state: TrainState, step: int, iterator: Any) -> None:
        if self.checkpoints is None:
            return
        self.writer.flush()  # a checkpoint never knows more than the metric files
        meta = {
            "data": iterator.get_state(),
            "watch": self.watch.to_json(),
            "metrics": self.metrics,
            "seconds": self.seconds,
        }
        self.checkpoints.save(step, self._items(state), meta)

    def _items(self, state: TrainState) -> dict[str, PyTree]:
        """What a checkpoint holds. Variables stand apart, to be read without the optimiser."""
        items = {
            "variables": state.variables,
            "training": state.replace(variables=None, ema=None),
        }
        if state.ema is not None:
            items["ema"] = state.ema
        if self.best is not None:
            items["best"] = self.best
        return items

    def _finish(self, state: TrainState) -> Fitted:
        if self.config.select_best:
            assert self.best is not None
            variables, metrics = self.best, self.watch.best_metrics
        else:
            variables, metrics = self._current(state), self.metrics
        summary = {
            "stage": self.label,
            "steps": int(state.step),
            "metrics": metrics,
            "parameters": profiling.parameter_count(variables.params),
            "flops_per_step": self.flops,
            "compile_seconds": self.compile_seconds,
            "seconds": self.seconds,
        }
        if self.checkpoints is not None and self.workdir is not None:
            self.checkpoints.wait()
            if distributed.is_primary():
                write_json(self.workdir / "summary.json", summary)
            distributed.barrier(f"finished {self.label}")
        return Fitted(variables, metrics, summary)

    def _describe(self, state: TrainState, start: int) -> None:
        """Says what is about to run, and leaves the table of all arrays beside the checkpoints."""
        trained = profiling.parameter_count(state.variables.params)
        arrays = [x for x in jax.tree.leaves(self.objective) if x.ndim]
        carried = profiling.parameter_count(arrays)
        held = sum(map(bytes_per_device, (state, self.objective)))
        text = f"{self.label}: {trained:,} trained parameters"
        if carried:
            text += f", {carried:,} carried numbers"
        text += f", {held / 2**20:.1f} MiB per device"
        if self.layout.mesh.size > 1:
            text += f" on a mesh of {dict(self.layout.mesh.shape)}"
        if start:
            text += f"; resuming at step {start}"
        self._say(text)
        if not distributed.is_primary():
            return
        table = placement_table(
            {
                "params": state.variables.params,
                "state": state.variables.state,
                "optimizer": state.opt_state,
                "carried": self.objective,
            }
        )
        if self.layout.mesh.shape["fsdp"] * self.layout.mesh.shape["model"] > 1:
            self._say(table)
        if self.workdir is not None:
            write_text(self.workdir / "layout.txt", table + "\n")

    def _say(self, text: str) -> None:
        if self.progress is not None:
            self.progress.message(text)
