"""TTM's experiments: references in closed form, the frozen backbone, recipes, published plans."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.configuration import apply_overrides, get_config
from transfer_jax.data import forecasting as data
from transfer_jax.forecast import read_network
from transfer_jax.objectives import Variables
from transfer_jax.papers import ttm
from transfer_jax.training import Experiment, Layout, load_variables, make_mesh
from transfer_jax.training.aot import lower_step
from transfer_jax.training.checkpoint import read_tree
from transfer_jax.trees import paths

SIZES = [
    "model.context_length=16", "model.prediction_length=4", "model.patch_length=8",
    "model.patch_stride=8", "model.d_model=8", "model.decoder_d_model=6",
    "model.adaptive_patching_levels=1", "model.num_layers=1", "model.decoder_layers=1",
    "eval_batch_size=64",
]  # fmt: skip
TRANSFER = [
    *SIZES, "corpus.count=3", "corpus.rows=200", "corpus.resolutions=(900,3600)",
    "target.rows=400", "batch_size=16", "tune_batch_size=16", "tune_epochs=1", "pretrain.steps=3",
    "ways=('head',)", "dlinear=False", "horizons=(6,)", "fractions=(0.3,)", "profile_days=1",
]  # fmt: skip


# -- recipes ------------------------------------------------------------------------------------


def run(variant, workdir, *overrides, devices=1):
    exp = Experiment(apply_overrides(get_config(f"ttm:{variant}"), overrides), workdir)
    exp.layout = Layout(make_mesh({"data": devices}, jax.devices()[:devices]))
    exp.run()
    return exp


@pytest.fixture(scope="module")
def transferred(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ttm")
    return run("generated", workdir, *TRANSFER), workdir


def test_only_the_head_is_trained(transferred):
    """The backbone keeps its bits under weight decay, and the optimiser holds nothing for it."""
    _, workdir = transferred
    source = load_variables(workdir / "stages/pretrain").params
    tuned = load_variables(workdir / "stages/head_30").params
    assert {path.split("/")[0] for path in paths(tuned)} == {"decoder", "head"}
    (checkpoint,) = (workdir / "stages/head_30/checkpoints").glob("[0-9]*")
    training = paths(read_tree(checkpoint / "training"))
    assert not [p for p in training if "backbone" in p] and [p for p in training if "decoder" in p]
    config, load = read_network(workdir, "head_30")
    merged = load()
    jax.tree.map(np.testing.assert_array_equal, merged["backbone"], source["backbone"])
    jax.tree.map(np.testing.assert_array_equal, merged["head"], tuned["head"])
    assert (np.asarray(tuned["head"]["kernel"]) != source["head"]["kernel"]).mean() > 0.9
    assert config == ttm.network(get_config("ttm"), **config.__dict__).config


def test_transfer_on_two_devices(transferred, tmp_path):
    one, _ = transferred
    many = run("generated", tmp_path, *TRANSFER, "ways=()", "horizons=()", devices=2)
    (name,) = (n for n in one.results["tables"] if n.startswith("Forecasts"))
    first, second = (
        {row[0]: row[2:] for row in exp.results["tables"][name]["rows"]} for exp in (one, many)
    )
    assert {"TTM, head only", "ridge 30%", "profile"} <= set(first)
    zero_shot = "TTM zero-shot, pre-trained on generated"
    np.testing.assert_allclose(second[zero_shot], first[zero_shot], rtol=1e-4)
    horizons = one.results["tables"]["Pruned and recursive forecasts, MSE"]["rows"]
    assert [row[:2] for row in horizons] == [[6, 2]]


def test_the_prefix_and_exogenous_recipes_run(tmp_path):
    prefix = run(
        "rpt", tmp_path / "rpt", *SIZES, "prefix.sources=('generated',)", "pretrain.steps=2",
        "prefix.resolutions=(900,3600)", "corpus.count=3", "corpus.rows=400", "batch_size=16",
    )  # fmt: skip
    (rows,) = (t["rows"] for t in prefix.results["tables"].values())
    assert [row[0] for row in rows] == ["with prefix", "without"]
    assert rows[0][1] != rows[1][1] and np.isfinite(rows[0][1:]).all()
    bike = run(
        "bike_sharing", tmp_path / "bike", *SIZES, "target.name=generated", "target.rows=400",
        "exogenous_ways=('exogenous',)", "tune.steps=2", "tune.eval_every=2",
        "tune_batch_size=16", "fcm.fcm_use_mixer=False",
    )  # fmt: skip
    (rows,) = (t["rows"] for t in bike.results["tables"].values())
    assert [row[0] for row in rows] == ["and known future", "seasonal-naive", "profile", "ridge"]


@pytest.mark.parametrize("variant, total", [("ttm_b", 854_972), ("ttm_a", 3_243_996)])
def test_published_plans_lower_for_eight_devices(variant, total):
    config = get_config(f"ttm:{variant}")
    objective, batch, settings = ttm.plan(config)
    lowered, arrays = lower_step(objective, batch, settings, Layout(make_mesh({"data": 8})))
    assert sum(x.size for x in jax.tree.leaves(arrays["params"])) == total
    # Rows of the corpus enter as an argument, never as a constant; the batch holds numbers alone.
    carried = sorted(jax.tree.leaves(arrays["carried"]), key=lambda x: x.size)
    assert carried[-1].shape == (1_000_000_000, 1) and carried[-2].size == 1
    assert "bf16" in lowered.as_text()


# -- references ---------------------------------------------------------------------------------


def test_references_on_periodic_series():
    period, context, horizon = 6, 24, 9
    season = np.random.default_rng(0).normal(size=(period, 2))
    values = np.tile(season, (10, 1))
    starts = np.arange(len(values) - context - horizon + 1)
    for way in (ttm.seasonal_naive, ttm.profile):
        found = ttm.score_windows(
            values, starts, context, horizon, lambda x, way=way: way(x, horizon, period)
        )
        assert found["mse"] < 1e-20
    # Errors of a constant forecast, by hand.
    truth = np.stack([values[s + context : s + context + horizon] for s in starts])
    found = ttm.score_windows(
        values, starts, context, horizon, lambda x: np.zeros((len(x), horizon, 2))
    )
    assert found["mse"] == pytest.approx((truth**2).mean())
    assert found["mae"] == pytest.approx(abs(truth).mean())


def test_ridge_is_the_closed_form():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(300, 2)).cumsum(0)
    starts = np.arange(0, 280, 3)
    weights = ttm.ridge(values, starts, 8, 3, strength=0.2)
    x = np.stack([values[s : s + 8, c] for s in starts for c in range(2)])
    y = np.stack([values[s + 8 : s + 11, c] for s in starts for c in range(2)])
    loc, scale = x.mean(1, keepdims=True), np.sqrt(x.var(1, keepdims=True) + 1e-5)
    x, y = (x - loc) / scale, (y - loc) / scale
    used = np.abs(np.concatenate([x, y], axis=1)).max(1) < 10
    assert 0.9 < used.mean() < 1
    x, y = x[used], y[used]
    gram = x.T @ x
    # The gradient of |Y - XW|^2 + a |W|^2 is zero.
    a = 0.2 * np.trace(gram) / 8
    np.testing.assert_allclose(x.T @ (y - x @ weights), a * weights, atol=1e-8)
    # It moves with the window: shift and scale of the context are those of the forecast.
    context = values[None, :8]
    moved = ttm.apply_ridge(weights, 3 * context + 7)
    np.testing.assert_allclose(moved, 3 * ttm.apply_ridge(weights, context) + 7, rtol=1e-4)


@pytest.mark.skipif(not os.environ.get("TRANSFER_JAX_DATA"), reason="needs TRANSFER_JAX_DATA")
def test_closed_forms_on_etth1():
    """The figures that were computed independently: 0.512, 0.400, 0.364."""
    bench = data.benchmark("etth1")
    values, test = bench.series.values, bench.starts("test", 512, 96)
    for way, expected in ((ttm.seasonal_naive, 0.5122), (ttm.profile, 0.4000)):
        found = ttm.score_windows(values, test, 512, 96, lambda x, way=way: way(x, 96, 24))
        assert found["mse"] == pytest.approx(expected, abs=5e-4)
    weights = ttm.ridge(values, bench.starts("train", 512, 96), 512, 96)
    found = ttm.score_windows(values, test, 512, 96, lambda x: ttm.apply_ridge(weights, x))
    assert found["mse"] == pytest.approx(0.364, abs=0.003)


def test_dlinear_sees_trend_and_rest():
    module = ttm.DLinear(3, width=5)
    x = jax.random.normal(jax.random.key(0), (2, 12, 2))
    params = jax.tree.map(jnp.zeros_like, module.init(jax.random.key(1), x)["params"])
    padded = np.pad(np.asarray(x), ((0, 0), (2, 2), (0, 0)), mode="edge")
    trend = np.stack([padded[:, i : i + 5].mean(1) for i in range(12)], axis=1)
    for part, signal in (("trend", trend), ("rest", np.asarray(x) - trend)):
        kernel = jnp.zeros((12, 3)).at[4, 1].set(1.0)
        given = {**params, part: {**params[part], "kernel": kernel}}
        np.testing.assert_allclose(
            module.apply({"params": given}, x)[:, 1], signal[:, 4], atol=1e-5
        )


# -- learning rate ------------------------------------------------------------------------------


def test_valley_is_the_rule_as_first_written():
    def reference(rates, losses):
        n, end, start = len(losses), 0, 0
        lengths = [1] * n
        for i in range(1, n):
            for j in range(i):
                if losses[i] < losses[j] and lengths[i] < lengths[j] + 1:
                    lengths[i] = lengths[j] + 1
                if lengths[end] < lengths[i]:
                    end = i
                    start = end - lengths[end]
        third = (end - start) / 3
        return rates[start + int(third) + int(third / 2)]

    rng = np.random.default_rng(0)
    for _ in range(20):
        losses = (rng.normal(size=40).cumsum() + 5).tolist()
        assert ttm.valley(list(range(40)), losses) == reference(list(range(40)), losses)


def test_range_test_finds_a_usable_rate():
    bench = data.generated_benchmark(300, seed=0)
    config = apply_overrides(get_config("ttm"), [*SIZES, "tune_batch_size=16"])
    target = ttm.Target(bench, config)
    module = ttm.DLinear(4, width=3)
    task = target.objective(module)
    pipeline = target.batches(target.starts("train"), seed=0)
    variables = task.init(jax.random.key(0), pipeline.example_batch())
    kept = jax.tree.map(np.array, variables.params)
    rate, rates, losses = ttm.lr_range_test(
        task, Variables(variables.params, {}), pipeline.iterator(), jax.random.key(1)
    )
    assert 1e-6 < rate < 1 and len(rates) == len(losses) < 100  # it exploded before 10
    jax.tree.map(np.testing.assert_array_equal, variables.params, kept)
