"""Time series for forecasting: files, splits, scalers, resolutions and windows.

A set is one array of equally spaced rows, and a window is a number, the row at which it starts: the
rows are gathered on the device (``Windows``), so that no set of windows is ever laid out in memory.
"""

import csv
import dataclasses
import datetime
import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transfer_jax.data.paths import require, require_file
from transfer_jax.data.sources import ArraySource, Example

# Seconds of a step -> resolution token; 0 is any other. Networks with a vocabulary of 8 know the
# first seven.
TOKENS = {60: 1, 120: 2, 300: 3, 600: 4, 900: 5, 1800: 6, 3600: 7, 86400: 8, 604800: 9}


def resolution_token(seconds: float, vocab: int = 10) -> int:
    """Returns the token of a resolution; 0 where it has none below ``vocab``."""
    token = TOKENS.get(round(seconds), 0)
    return token if token < vocab else 0


@dataclasses.dataclass(frozen=True, eq=False)
class Series:
    """Equally spaced rows.

    Attributes:
      values: float32 [T, C].
      columns: names, C of them.
      seconds: between rows; 0 = unknown.
      name: for messages and tables.
      train: leading rows that its scaler may know; None = all.
    """

    values: np.ndarray
    columns: tuple[str, ...]
    seconds: float
    name: str = ""
    train: int | None = None

    def scaled(self, clip: float = 0.0) -> np.ndarray:
        """Returns the z-scored values, clipped to +-clip (0 = not): counts can have heavy tails."""
        values = Scaler.of(self.values[: self.train]).transform(self.values)
        return np.clip(values, -clip, clip) if clip else values


@dataclasses.dataclass(frozen=True)
class Scaler:
    """z-scores by column: ``(x - mean) / std`` with the population deviation (1 where it is 0)."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> "Scaler":
        """Fits the rows [T, C] given, NaN left out."""
        std = np.nanstd(values, axis=0, dtype=np.float64)
        mean = np.nanmean(values, axis=0, dtype=np.float64)
        return cls(np.asarray(mean), np.where(std > 0, std, 1.0))

    def transform(self, values: np.ndarray) -> np.ndarray:
        return ((values - self.mean) / self.std).astype(np.float32)

    def inverse(self, values: np.ndarray) -> np.ndarray:
        return values * self.std + self.mean


# -- files ----------------------------------------------------------------------------------------


def read_csv(
    path: str | Path,
    time_column: str | None,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> tuple[np.ndarray | None, tuple[str, ...], np.ndarray]:
    """Reads a CSV file with a header; ``.gz`` files too.

    Args:
      path: the file.
      time_column: column of ISO timestamps; None = there is none.
      only: the columns to read, in this order; () = all.
      skip: columns to leave out.

    Returns:
      The timestamps (datetime64[s] [T], or None), the names of the other columns and their values,
      float64 [T, C]; empty cells are NaN.

    Raises:
      ValueError: a column is missing, the time column holds no timestamps, or a cell is no number.
    """
    path = require_file(path, "Give the path of a CSV file with a header.")
    with _opened(path) as file:
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader, [])]
        rows = [row for row in reader if row]
    if absent := [name for name in only if name not in header]:
        raise ValueError(f"{path} has no column {absent[0]!r}; it has {', '.join(header)}.")
    if time_column is not None and time_column not in header:
        raise ValueError(
            f"{path} has no column {time_column!r}; it has {', '.join(header)}. Name the column "
            "of the timestamps."
        )
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(
                f"{path}, line {i + 2}: {len(row)} cells under {len(header)} names of columns."
            )
    columns = tuple(c for c in only or header if c != time_column and c not in skip)
    values = np.empty((len(rows), len(columns)))
    for j, name in enumerate(columns):
        cells = [row[header.index(name)].strip() for row in rows]
        try:
            values[:, j] = [float(cell) if cell else np.nan for cell in cells]
        except ValueError:
            i = next(i for i, cell in enumerate(cells) if cell and not _is_number(cell))
            raise ValueError(
                f"{path}, line {i + 2}: column {name!r} has {cells[i]!r}, which is no number. "
                "Leave the column out, or correct it."
            ) from None
    if time_column is None:
        return None, columns, values
    cells = [row[header.index(time_column)].strip() for row in rows]
    try:
        times = np.array([_moment(cell) for cell in cells], "datetime64[s]")
    except ValueError as e:
        raise ValueError(
            f"{path}: column {time_column!r} must hold ISO timestamps such as 2024-01-31 or "
            f"2024-01-31 18:00:00 ({e})."
        ) from None
    return times, columns, values


def read_header(path: str | Path) -> list[str]:
    """Returns the names of the columns of a CSV file."""
    path = require_file(path, "Give the path of a CSV file with a header.")
    with _opened(path) as file:
        return [name.strip() for name in next(csv.reader(file), [])]


def _opened(path: Path) -> IO[str]:
    return gzip.open(path, "rt") if path.suffix == ".gz" else path.open()


def _moment(cell: str) -> np.datetime64:
    return np.datetime64(datetime.datetime.fromisoformat(cell).replace(tzinfo=None), "s")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


# name -> (folder/file in TRANSFER_JAX_DATA, seconds of a step, rows of train, validation, test);
# None = 70, 10 and 20 % of the rows.
_ETT_HOURS = (8640, 2880, 2880)
BENCHMARKS: dict[str, tuple[str, int, tuple[int, int, int] | None]] = {
    "etth1": ("ett_small/ETTh1.csv", 3600, _ETT_HOURS),
    "etth2": ("ett_small/ETTh2.csv", 3600, _ETT_HOURS),
    "ettm1": ("ett_small/ETTm1.csv", 900, (34560, 11520, 11520)),
    "ettm2": ("ett_small/ETTm2.csv", 900, (34560, 11520, 11520)),
    "weather": ("weather/weather.csv", 600, None),
    "electricity": ("electricity/electricity.csv", 3600, None),
    "traffic": ("traffic/traffic.csv", 3600, None),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Benchmark:
    """A series, z-scored with its training rows, and where its splits begin and end.

    Attributes:
      series: z-scored, without rows that belong to no split.
      scaler: fitted on the training rows.
      borders: split -> (first row, row after the last).
      targets: columns to forecast; () = all.
      exogenous: columns whose future is known.
    """

    series: Series
    scaler: Scaler
    borders: Mapping[str, tuple[int, int]]
    targets: tuple[int, ...] = ()
    exogenous: tuple[int, ...] = ()

    @classmethod
    def of(cls, raw: Series, rows: tuple[int, int, int], **roles: Any) -> "Benchmark":
        """Cuts ``rows`` of train, validation and test off the start, in the order of time."""
        ends = np.cumsum(rows).tolist()
        if ends[-1] > len(raw.values):
            raise ValueError(f"{raw.name} has {len(raw.values)} rows; its splits need {ends[-1]}.")
        scaler = Scaler.of(raw.values[: ends[0]])
        series = dataclasses.replace(raw, values=scaler.transform(raw.values[: ends[-1]]))
        names = ("train", "validation", "test")
        borders = {name: (end - n, end) for name, n, end in zip(names, rows, ends)}
        return cls(series, scaler, borders, **roles)

    def starts(self, split: str, context: int, horizon: int) -> np.ndarray:
        """Returns the first rows of all windows whose horizon lies in a split, int32 [N].

        Validation and test read their first context before their border, so that their first
        horizon begins at it: N = rows - horizon + 1. Training: N = rows - context - horizon + 1.

        Raises:
          ValueError: there is none.
        """
        first, end = self.borders[split]
        return window_starts(first, end, context, horizon, f"{self.series.name}, {split}")

    def few_shot(
        self, fraction: float, context: int, horizon: int, *, location: str = "first", seed: int = 0
    ) -> np.ndarray:
        """Returns the training windows of a share of the training rows.

        Args:
          fraction: in (0, 1].
          context, horizon: of the windows.
          location: 'first': the windows within the first
            ``int(fraction * (rows - context)) + context`` rows; 'uniform': as many, drawn at
            random from all training windows.
          seed: of 'uniform'.
        """
        rows = self.borders["train"][1]
        kept = int(fraction * (rows - context)) + context
        starts = window_starts(0, kept, context, horizon, f"{self.series.name}, {fraction:g}")
        if location == "first":
            return starts
        if location != "uniform":
            raise ValueError(f"location={location!r}; choose 'first' or 'uniform'.")
        every = self.starts("train", context, horizon)
        return np.sort(np.random.default_rng(seed).choice(every, len(starts), replace=False))


def window_starts(first: int, end: int, context: int, horizon: int, name: str = "") -> np.ndarray:
    """Returns the starts of the windows whose horizon lies in rows first .. end - 1, int32 [N]."""
    begin = max(first - context, 0)
    count = end - begin - context - horizon + 1
    if count < 1:
        raise ValueError(
            f"{name or 'the rows'}: {end - begin} rows hold no window of {context} + {horizon} "
            f"steps; {context + horizon} rows are the least."
        )
    return np.arange(begin, begin + count, dtype=np.int32)


def benchmark(name: str, path: str = "") -> Benchmark:
    """Reads a benchmark set with its published splits.

    Args:
      name: a key of ``BENCHMARKS``, or 'bike_sharing'.
      path: its CSV file; '' = its place under the directory TRANSFER_JAX_DATA.

    Raises:
      ValueError: no such set, or too few rows.
      FileNotFoundError: the file is missing.
    """
    if name == "bike_sharing":
        return bike_sharing(path)
    if name not in BENCHMARKS:
        known = ", ".join(sorted([*BENCHMARKS, "bike_sharing"]))
        raise ValueError(f"no forecasting benchmark is named {name!r}; there are {known}.")
    place, seconds, rows = BENCHMARKS[name]
    file = Path(path) if path else require(*place.split("/"))
    _, columns, values = read_csv(file, "date")
    if rows is None:
        train, test = int(0.7 * len(values)), int(0.2 * len(values))
        rows = (train, len(values) - train - test, test)
    return Benchmark.of(Series(values.astype(np.float32), columns, seconds, name), rows)


_BIKE_TARGETS = ("casual", "registered", "cnt")


def bike_sharing(path: str = "") -> Benchmark:
    """Reads UCI Bike Sharing by the hour: 3 targets, 11 exogenous columns; 50, 25 and 25 %.

    The few missing hours are left out: rows are taken as consecutive. The year is held at its first
    value: but for two days all training rows are of one year, so that its z-score would be 14 in
    validation and test.
    """
    file = Path(path) if path else require("bike_sharing", "hour.csv")
    _, columns, values = read_csv(file, None, skip=("instant", "dteday", "hr"))
    values[:, columns.index("yr")] = values[0, columns.index("yr")]
    targets = tuple(columns.index(name) for name in _BIKE_TARGETS)
    exogenous = tuple(i for i in range(len(columns)) if i not in targets)
    total = len(values)
    rows = (total // 2, total // 4, total - total // 2 - total // 4)
    raw = Series(values.astype(np.float32), columns, 3600, "bike_sharing")
    return Benchmark.of(raw, rows, targets=targets, exogenous=exogenous)


def nab() -> list[Series]:
    """Reads the series of the Numenta Anomaly Benchmark (``nab_multires``), one column each.

    Their steps are 5 minutes, 30 minutes or an hour; rows are taken as consecutive.
    """
    series = []
    for file in sorted(require("nab_multires").glob("*.csv.gz")):
        times, columns, values = read_csv(file, "timestamp")
        assert times is not None
        seconds = float(np.median(np.diff(times).astype(np.int64)))
        name = file.name.removesuffix(".csv.gz")
        series.append(Series(values.astype(np.float32), columns, seconds, name))
    return series


def csv_series(directory: str | Path) -> list[Series]:
    """Reads every CSV file of a directory as a series; the first column holds timestamps."""
    series = []
    for file in sorted(
        p for p in Path(directory).glob("*") if p.name.endswith((".csv", ".csv.gz"))
    ):
        times, columns, values = read_csv(file, read_header(file)[0])
        assert times is not None
        seconds = float(np.median(np.diff(times).astype(np.int64)))
        series.append(Series(values.astype(np.float32), columns, seconds, file.name))
    if not series:
        raise FileNotFoundError(f"{directory} has no CSV files.")
    return series


def generated(
    count: int,
    rows: int,
    seed: int,
    *,
    resolutions: Sequence[int] = (900, 1800, 3600),
    channels: int = 1,
) -> list[Series]:
    """Draws series: daily and weekly seasons of random shape, a trend, noise that remembers.

    Args:
      count: how many; their resolutions take turns.
      rows: of each.
      seed: of the draw.
      resolutions: seconds of a step.
      channels: columns of each, drawn independently.
    """
    result = []
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        seconds = resolutions[i % len(resolutions)]
        time = np.arange(rows) * seconds / 86400.0  # days
        columns = []
        for _ in range(channels):
            x = rng.normal(0, 0.5) * time / max(time[-1], 1e-9)
            for period, harmonics in ((1.0, 4), (7.0, 3)):
                for k in range(1, harmonics + 1):
                    phase = rng.uniform(0, 2 * np.pi)
                    x = x + rng.normal(0, 1 / k) * np.cos(2 * np.pi * k * time / period + phase)
            noise = rng.normal(size=rows)
            memory = rng.uniform(0.5, 0.9)
            for t in range(1, rows):
                noise[t] += memory * noise[t - 1]
            columns.append(x + rng.uniform(0.1, 0.4) * noise)
        values = np.stack(columns, axis=1).astype(np.float32)
        result.append(
            Series(values, tuple(f"x{c}" for c in range(channels)), seconds, f"series{i}")
        )
    return result


def generated_benchmark(
    rows: int, seed: int, *, channels: int = 3, exogenous: bool = False
) -> Benchmark:
    """Draws a set by the hour, cut 60, 20 and 20 %: columns of ``generated``.

    Args:
      rows: in all.
      seed: of the draw.
      channels: columns to forecast.
      exogenous: adds a last column whose future is known, noise that remembers, and adds it to the
        others at the same step.
    """
    raw = generated(1, rows, seed, resolutions=(3600,), channels=channels)[0]
    if exogenous:
        cause = np.random.default_rng([seed, 1_000_000]).normal(size=(rows, 1))
        for t in range(1, rows):
            cause[t] += 0.5 * cause[t - 1]
        values = np.concatenate([raw.values + 0.8 * cause, cause], axis=1).astype(np.float32)
        raw = dataclasses.replace(raw, values=values, columns=(*raw.columns, "cause"))
    part = rows // 5
    return Benchmark.of(
        dataclasses.replace(raw, name="generated"), (rows - 2 * part, part, part),
        targets=tuple(range(channels)), exogenous=(channels,) if exogenous else (),
    )  # fmt: skip


# -- resolutions ----------------------------------------------------------------------------------


def coarsen(series: Series, factor: int, method: str = "average") -> Series:
    """Returns the series at a ``factor`` times longer step; an incomplete last group is left out.

    Args:
      series: to coarsen.
      factor: k.
      method: 'average' of k consecutive rows, or 'decimate': every k-th row.
    """
    rows = len(series.values) // factor
    groups = series.values[: rows * factor].reshape(rows, factor, -1)
    if method not in ("average", "decimate"):
        raise ValueError(f"method={method!r}; choose 'average' or 'decimate'.")
    values = groups.mean(axis=1, dtype=np.float64) if method == "average" else groups[:, 0]
    return dataclasses.replace(
        series, values=values.astype(np.float32), seconds=series.seconds * factor,
        name=f"{series.name}/{factor}", train=series.train and series.train // factor,
    )  # fmt: skip


def diverse_resolutions(
    series: Sequence[Series],
    least: int,
    *,
    method: str = "average",
    resolutions: Sequence[int] = tuple(TOKENS),
) -> list[Series]:
    """Returns the series and their coarser copies (diverse resolution sampling).

    Args:
      series: of any resolutions.
      least: rows that a copy must have, such as context plus horizon.
      method: see ``coarsen``.
      resolutions: seconds of a step; a series gets a copy at each that is a multiple of its own.
    """
    result = list(series)
    for one in series:
        for seconds in resolutions:
            factor = seconds / one.seconds if one.seconds else 0
            if factor > 1 and factor == int(factor) and len(one.values) // int(factor) >= least:
                result.append(coarsen(one, int(factor), method))
    return result


# -- windows --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Windows:
    """Gathers windows on the device: ``prepare`` of ``objectives.Prepared``.

    ``carried["values"]`` [T, C] and a batch of ``start`` [B] become ``inputs`` [B, context, C] and
    ``targets`` [B, horizon, C]; the rest of the batch is passed on.

    Attributes:
      context, horizon: steps.
    """

    context: int
    horizon: int

    def __call__(self, carried: Any, batch: Any) -> dict[str, jax.Array]:
        length = self.context + self.horizon
        rows = carried["values"][batch["start"][:, None] + jnp.arange(length)]
        rest = {name: value for name, value in batch.items() if name != "start"}
        inputs, targets = rows[:, : self.context], rows[:, self.context :]
        return {**rest, "inputs": inputs, "targets": targets}


def window_source(starts: np.ndarray, token: int) -> ArraySource:
    """Returns a source of the windows of one set, all of one resolution."""
    tokens = np.full(len(starts), token, np.int32)
    return ArraySource({"start": np.asarray(starts, np.int32), "freq_token": tokens})


class Corpus(NamedTuple):
    """Univariate series, one after the other.

    Attributes:
      values: float32 [N, 1], z-scored; every column of every series.
      offsets: int64 [S], where each begins.
      lengths: int64 [S].
      tokens: int32 [S], resolutions.
    """

    values: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(
        cls, series: Sequence[Series], least: int, *, vocab: int = 10, clip: float = 0.0
    ) -> "Corpus":
        """Joins the series.

        Args:
          series: of any resolutions.
          least: rows of a window; shorter series are left out.
          vocab: number of resolution tokens.
          clip: see ``Series.scaled``.

        Raises:
          ValueError: no series is long enough, or there are more rows than int32 counts.
        """
        parts: list[np.ndarray] = []
        tokens: list[int] = []
        for one in series:
            if len(one.values) >= least:
                parts += list(one.scaled(clip).T)
                tokens += [resolution_token(one.seconds, vocab)] * one.values.shape[1]
        if not parts:
            raise ValueError(f"none of {len(series)} series has the {least} rows of a window.")
        lengths = np.array([len(part) for part in parts])
        if lengths.sum() >= 2**31:
            raise ValueError(f"{lengths.sum()} rows are more than int32 can number.")
        values = np.concatenate(parts)[:, None]
        return cls(values, np.cumsum(lengths) - lengths, lengths, np.array(tokens, np.int32))


class SampledWindows:
    """Windows of a corpus, drawn for ever.

    A series is drawn with probability proportional to ``min(its windows, cap)``, so that long ones
    do not dominate, then one of its windows. Window i is a pure function of (seed, i): read it with
    ``repeat=True`` and no shuffling.

    Args:
      corpus: the series.
      length: rows of a window, context and horizon.
      cap: see above.
      seed: of the draw.

    Attributes:
      weights: float64 [S], the probabilities.
    """

    def __init__(self, corpus: Corpus, length: int, *, cap: int, seed: int):
        self.corpus = corpus
        self.counts = corpus.lengths - length + 1
        weights = np.minimum(self.counts, cap)
        self.weights = weights / weights.sum()
        self._edges = np.cumsum(self.weights)
        self.seed = seed

    def __len__(self) -> int:
        return 2**31 - 1

    def __getitem__(self, index: int, /) -> Example:
        return {name: value[0] for name, value in self.take(np.array([index])).items()}

    def take(self, indices: np.ndarray) -> Example:
        which, where = _uniform(self.seed, 2 * indices), _uniform(self.seed, 2 * indices + 1)
        chosen = np.minimum(np.searchsorted(self._edges, which, side="right"), len(self.counts) - 1)
        start = self.corpus.offsets[chosen] + (where * self.counts[chosen]).astype(np.int64)
        return {"start": start.astype(np.int32), "freq_token": self.corpus.tokens[chosen]}


def _uniform(seed: int, counters: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), each a hash (splitmix64) of the seed and a counter."""
    key = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    x = key + counters.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**53
