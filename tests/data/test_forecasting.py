"""Forecasting data: the published numbers of windows, scalers, resolutions, the sampler."""

import csv
import os

import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.data import forecasting as data
from transfer_jax.data.pipeline import Pipeline


@pytest.fixture(scope="module")
def ett(tmp_path_factory):
    """A file of ETTh1's shape."""
    path = tmp_path_factory.mktemp("ett") / "ETTh1.csv"
    values = np.random.default_rng(0).normal(3, 2, (14_500, 2)).astype(np.float32)
    values[8640:] += 100  # must not reach the scaler
    start = np.datetime64("2016-07-01T00:00:00")
    with path.open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["date", "a", "b"])
        for i, row in enumerate(values):
            writer.writerow([str(start + np.timedelta64(i, "h")).replace("T", " "), *row])
    return data.benchmark("etth1", str(path)), values


def test_published_windows_and_scaler(ett):
    bench, values = ett
    assert [len(bench.starts("test", 512, h)) for h in (96, 192)] == [2785, 2689]
    assert bench.starts("test", 512, 96)[0] == 11_520 - 512
    assert len(bench.starts("train", 512, 96)) == 8640 - 512 - 96 + 1
    few = bench.few_shot(0.05, 512, 96)
    assert len(few) == 311 and few[-1] + 512 + 96 == 918
    uniform = bench.few_shot(0.05, 512, 96, location="uniform")
    assert len(set(uniform.tolist())) == 311 and uniform.max() > 5000
    train = values[:8640].astype(np.float64)
    np.testing.assert_allclose(bench.scaler.mean, train.mean(0), rtol=1e-6)
    np.testing.assert_allclose(bench.scaler.std, train.std(0), rtol=1e-6)
    assert len(bench.series.values) == 14_400
    back = bench.scaler.inverse(bench.series.values)
    np.testing.assert_allclose(back, values[:14_400], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="12000 rows are the least"):
        data.window_starts(0, 9, 11_904, 96)


def test_weather_has_the_published_number_of_few_shot_windows():
    raw = data.Series(np.zeros((52_696, 1), np.float32), ("x",), 600, "weather")
    train, test = int(0.7 * 52_696), int(0.2 * 52_696)
    bench = data.Benchmark.of(raw, (train, 52_696 - train - test, test))
    assert len(bench.few_shot(0.05, 512, 96)) == 1723


@pytest.mark.skipif(not os.environ.get("TRANSFER_JAX_DATA"), reason="needs TRANSFER_JAX_DATA")
def test_files_of_the_data_directory():
    for name in ("etth1", "etth2"):
        bench = data.benchmark(name)
        assert bench.series.values.shape == (14_400, 7)
        np.testing.assert_allclose(bench.series.values[:8640].std(0), 1, rtol=1e-4)
    bike = data.benchmark("bike_sharing")
    assert len(bike.targets) == 3 and len(bike.exogenous) == 11
    assert bike.borders["test"][1] == 17_379 and np.abs(bike.series.values).max() < 12
    series = data.nab()
    steps = {int(one.seconds) for one in series}
    assert len(series) == 27 and steps == {300, 1800, 3600}


def test_windows_are_rows():
    values = jnp.arange(40.0).reshape(20, 2)
    batch = {"start": jnp.array([0, 7]), "mask": jnp.ones(2)}
    made = data.Windows(4, 3)({"values": values}, batch)
    np.testing.assert_array_equal(made["inputs"][1], values[7:11])
    np.testing.assert_array_equal(made["targets"][1], values[11:14])
    assert set(made) == {"inputs", "targets", "mask"}


def test_coarser_copies():
    """Windows of the averaged series are averages of windows, and carry the coarser token."""
    rng = np.random.default_rng(0)
    fine = data.Series(rng.normal(size=(1000, 1)).astype(np.float32), ("x",), 300.0, "s")
    copies = data.diverse_resolutions([fine], least=20)
    assert [data.resolution_token(c.seconds) for c in copies] == [3, 4, 5, 6, 7]
    assert [len(c.values) for c in copies] == [1000, 500, 333, 166, 83]
    start, length, k = 5, 20, 3
    window = copies[2].values[start : start + length]
    raw = fine.values[start * k : (start + length) * k].reshape(length, k, 1)
    np.testing.assert_allclose(window, raw.mean(1), rtol=1e-5, atol=1e-6)
    decimated = data.coarsen(fine, 3, "decimate")
    np.testing.assert_array_equal(decimated.values, fine.values[:999:3])
    assert data.resolution_token(86_400, vocab=8) == 0 == data.resolution_token(1234)


def test_sampled_windows_follow_the_capped_counts():
    lengths, cap = (30, 60, 500), 40
    series = [
        data.Series(np.arange(n, dtype=np.float32)[:, None], ("x",), s, str(n))
        for n, s in zip(lengths, (300.0, 900.0, 3600.0))
    ]
    corpus = data.Corpus.of(series, 11)
    source = data.SampledWindows(corpus, 11, cap=cap, seed=1)
    counts = np.array([n - 10 for n in lengths])
    np.testing.assert_allclose(source.weights, np.minimum(counts, cap) / 100)
    drawn = source.take(np.arange(20_000))
    shares = [(drawn["freq_token"] == t).mean() for t in (3, 5, 7)]
    np.testing.assert_allclose(shares, source.weights, atol=0.015)
    last = drawn["start"][drawn["freq_token"] == 7] - 90
    assert last.min() >= 0 and last.max() <= 489
    # Uniform over the windows of a series.
    np.testing.assert_allclose(np.histogram(last, 7, (0, 490))[0] / len(last), 1 / 7, atol=0.02)
    # No window crosses into the next series: steps within one are equal.
    rows = corpus.values[drawn["start"][:500, None] + np.arange(11), 0]
    assert (np.diff(rows, axis=1) > 0).all()
    # Window i depends on (seed, i) alone: two processes together read what one does.
    whole = Pipeline(source, 8, repeat=True)
    parts = [whole.iterator(p, 2) for p in range(2)]
    for _ in range(2):
        both = np.concatenate([next(it)["start"] for it in parts])
    np.testing.assert_array_equal(both, source.take(np.arange(8, 16))["start"])
    for it in parts:
        it.close()
    other = data.SampledWindows(corpus, 11, cap=cap, seed=2)
    assert (other.take(np.arange(50))["start"] != drawn["start"][:50]).any()


def test_errors_of_files(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("time,x,y\n2024-01-01,1,\n2024-01-02,2,b\n")
    with pytest.raises(ValueError, match=r"line 3: column 'y' has 'b'"):
        data.read_csv(file, "time")
    with pytest.raises(ValueError, match="no column 'date'; it has time, x, y"):
        data.read_csv(file, "date")
    with pytest.raises(ValueError, match="ISO timestamps"):
        data.read_csv(file, "x", skip=("time", "y"))
    _, columns, values = data.read_csv(file, "time", skip=("y",))
    assert columns == ("x",) and values[:, 0].tolist() == [1, 2]


def test_generated_series_repeat():
    first, again = (data.generated(3, 200, 5)[1].values for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert [s.seconds for s in data.generated(3, 10, 5)] == [900, 1800, 3600]
