"""Forecasts of CSV files by a trained Tiny Time Mixer: the command ``transfer-jax forecast``."""

import csv
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transfer_jax.configuration import config_from_json
from transfer_jax.data.forecasting import Scaler, read_csv, read_header, resolution_token

TIME_COLUMNS = ("date", "timestamp", "time", "datetime", "ds")


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What will be forecast, by what.

    Attributes:
      config: ``TTMConfig`` of the network.
      load: reads its parameters.
      times: datetime64[s] [T], of the context.
      columns: names, C of them.
      values: float64 [T, C], the context; NaN = missing.
      seconds: of a step.
      token: the resolution, for networks with a prefix.
      horizon: steps.
      notes: what the user should know.
    """

    config: Any
    load: Callable[[], Any]
    times: np.ndarray
    columns: tuple[str, ...]
    values: np.ndarray
    seconds: int
    token: int
    horizon: int
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """Returns the lines that ``--dry_run`` prints."""
        c = self.config
        passes = -(-self.horizon // c.horizon)
        how = f"{passes} passes, forecasts fed back" if passes > 1 else "one pass"
        if self.horizon < c.horizon:
            how = f"the first of {c.horizon} steps"
        lines = [
            f"network: context {c.context_length}, horizon {c.horizon}",
            f"columns: {', '.join(self.columns)}",
            f"context: {self.times[0]} to {self.times[-1]}, one row every {self.seconds} s",
            f"forecast: {self.horizon} steps, to {self.future_times()[-1]} ({how})",
        ]
        if c.rpt:
            lines.append(f"resolution token: {self.token}{'' if self.token else ' (unknown)'}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def future_times(self) -> np.ndarray:
        """Returns the timestamps of the forecast, datetime64[s] [horizon]."""
        steps = np.arange(1, self.horizon + 1) * self.seconds
        return self.times[-1] + steps.astype("timedelta64[s]")


def plan_forecast(
    file: str | Path,
    model: str | Path,
    *,
    horizon: int = 0,
    columns: Sequence[str] = (),
    time_column: str = "",
    stage: str = "pretrain",
) -> Plan:
    """Reads the file and the network's settings, and checks that they fit.

    Args:
      file: CSV with a header, a column of ISO timestamps and columns of numbers; an empty cell is a
        missing value. The context is taken from its end.
      model: a work directory of the paper ``ttm``, or a granite-tsfm directory.
      horizon: steps; 0 = the network's.
      columns: to forecast; () = all but the timestamps.
      time_column: '' = the first of ``TIME_COLUMNS`` that there is.
      stage: of a work directory: 'pretrain', or one trained from it.

    Raises:
      FileNotFoundError: no such file or directory.
      ValueError: the file or the network cannot be used; the message says what would be right.
    """
    if horizon < 0:
        raise ValueError(f"a horizon of {horizon} steps cannot be forecast: give 1 or more.")
    config, load = read_network(model, stage)
    if not time_column:
        header = read_header(file)
        lower = {name.lower(): name for name in reversed(header)}
        found = [lower[name] for name in TIME_COLUMNS if name in lower]
        if not found:
            raise ValueError(
                f"{file} has no column of timestamps called {', '.join(TIME_COLUMNS)}; it has "
                f"{', '.join(header)}. Name it with --time_column."
            )
        time_column = found[0]
    times, names, values = read_csv(file, time_column, only=columns)
    assert times is not None
    if not names:
        raise ValueError(f"{file} has no column besides {time_column!r}: nothing to forecast.")
    if config.exogenous_channels or config.static_vocab:
        raise ValueError(
            f"the network of {model} needs known future values or static variables, which this "
            "command does not read; call transfer_jax.models.ttm.forecast instead."
        )
    mixed = "mix_channel" in (config.mode, config.decoder_mode) or config.fcm
    if (mixed or config.targets) and len(names) != config.channels:
        raise ValueError(
            f"the network of {model} mixes {config.channels} columns; {len(names)} are given: "
            f"{', '.join(names)}. Choose them with --columns."
        )
    if len(values) < config.context_length:
        raise ValueError(
            f"{file} has {len(values)} rows; this network reads {config.context_length}: at least "
            f"{config.context_length} rows are needed, {config.context_length - len(values)} more."
        )
    times, values = times[-config.context_length :], values[-config.context_length :]
    gaps = np.diff(times).astype(np.int64)
    if (gaps <= 0).any():
        i = int(np.argmax(gaps <= 0))
        raise ValueError(
            f"{file}: the timestamps must increase, and {times[i + 1]} follows {times[i]}. Sort "
            "the rows and remove doubles."
        )
    seconds = int(np.median(gaps))
    notes = []
    if (uneven := int((gaps != seconds).sum())) > 0:
        notes.append(
            f"{uneven} of {len(gaps)} steps are not {seconds} s long; rows are taken as "
            "consecutive. Insert rows with empty cells where some are missing."
        )
    empty = [n for n, column in zip(names, values.T) if np.isnan(column).all()]
    if empty:
        raise ValueError(f"{file}: column {empty[0]!r} has no number in the context.")
    if missing := int(np.isnan(values).sum()):
        notes.append(f"{missing} missing values in the context.")
    if (horizon or config.horizon) > 2 * config.horizon:
        notes.append("far beyond the network's horizon: errors add up.")
    token = resolution_token(seconds, config.rpt_vocab)
    return Plan(
        config, load, times, names, values, seconds, token, horizon or config.horizon, tuple(notes)
    )


def read_network(path: str | Path, stage: str = "pretrain") -> tuple[Any, Callable[[], Any]]:
    """Returns the ``TTMConfig`` of a directory and a function that reads its parameters.

    Raises:
      FileNotFoundError: there is no such directory, or no such stage in it.
      ValueError: it holds another kind of network.
    """
    from transfer_jax.interop.huggingface import find_family, read_config
    from transfer_jax.models.ttm import TTMConfig

    path = Path(path)
    config = read_config(path)
    if "model_type" in config:
        if config["model_type"] != "tinytimemixer":
            raise ValueError(
                f"{path} holds a model of type {config['model_type']!r}; forecasts are made by "
                "'tinytimemixer'."
            )
        family = find_family(config)
        head = family.architectures.get((config.get("architectures") or [""])[0])

        def read() -> Any:
            from transfer_jax.interop import from_pretrained

            return from_pretrained(path).params

        return family.build(config, head, {}).config, read
    if config.get("recipe") != "ttm":
        raise ValueError(
            f"{path} is a work directory of {config.get('recipe')!r}; give one of 'ttm', or a "
            "granite-tsfm directory."
        )
    stages = sorted(p.name for p in (path / "stages").glob("*") if (p / "checkpoints").exists())
    if stage not in stages:
        raise FileNotFoundError(
            f"{path} has no stage {stage!r}; it has {', '.join(stages) or 'none'}. Run the "
            "experiment, or choose with --stage."
        )
    fields = config_from_json((path / "config.json").read_text()).model.to_dict()

    def load() -> Any:
        from transfer_jax.objectives.warm_start import overlay
        from transfer_jax.training import load_variables

        names = ["pretrain", stage] if "pretrain" in stages and stage != "pretrain" else [stage]
        first, *rest = [load_variables(path / "stages" / name).params for name in names]
        # A stage with a frozen backbone holds only what it trained.
        return overlay(first, rest[0], f"stage {stage!r}") if rest else first

    return TTMConfig(**fields), load


def run_forecast(plan: Plan) -> np.ndarray:
    """Returns the forecast in the units of the file, float64 [horizon, columns]."""
    import jax
    import jax.numpy as jnp

    from transfer_jax.models.ttm import TTM, forecast

    observed = ~np.isnan(plan.values)
    scaler = Scaler.of(plan.values)  # columns of tiny variance would meet the network's epsilon
    inputs = np.where(observed, scaler.transform(plan.values), 0.0)[None]
    module, params = TTM(plan.config), plan.load()

    @jax.jit
    def run(params: Any, inputs: Any, observed: Any) -> Any:
        token = jnp.array([plan.token])
        return forecast(
            module, {"params": params}, inputs, plan.horizon, observed=observed, freq_token=token
        )

    y = np.asarray(run(params, inputs.astype(np.float32), observed[None].astype(np.float32)))[0]
    return scaler.inverse(y.astype(np.float64))


def write_forecast(plan: Plan, values: np.ndarray, out: str | Path) -> tuple[Path, Path]:
    """Writes the forecast as CSV and, beside it, a plot; returns both paths."""
    from matplotlib.figure import Figure

    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    future = plan.future_times()
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["timestamp", *plan.columns])
        for time, row in zip(future, values):
            writer.writerow([str(time).replace("T", " "), *(f"{x:.6g}" for x in row)])
    shown = min(len(plan.times), 3 * plan.horizon)
    count = len(plan.columns)
    across = min(count, 2)
    figure = Figure(figsize=(6 * across, 2.2 * math.ceil(count / across)), layout="constrained")
    axes = np.ravel(figure.subplots(math.ceil(count / across), across, squeeze=False))
    for i, ax in enumerate(axes):
        if i >= count:
            ax.set_axis_off()
            continue
        ax.plot(plan.times[-shown:], plan.values[-shown:, i], linewidth=1, label="past")
        ax.plot(future, values[:, i], linewidth=1, label="forecast")
        ax.set_title(plan.columns[i], fontsize="medium")
        ax.tick_params(axis="x", rotation=30)
    axes[0].legend(loc="upper left", fontsize="small")
    plot = out.with_suffix(".png")
    figure.savefig(plot, dpi=100)
    return out, plot
