"""The S4 recipe and its configs: the published numbers, tiny runs of every task, misuse."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transfer_jax.configuration import (
    ConfigError,
    apply_overrides,
    config_to_json,
    get_config,
    list_configs,
)
from transfer_jax.data.bundle import DatasetInfo
from transfer_jax.data.pipeline import Pipeline
from transfer_jax.nn import SSM_PARAMETERS
from transfer_jax.papers import s4
from transfer_jax.training import Experiment, Layout, make_mesh
from transfer_jax.training.optimizers import group_labels, make_optimizer
from transfer_jax.trees import path_str

VARIANTS = list(list_configs()["s4"].variants)
TRAINED = [v for v in VARIANTS if v not in ("recurrence", "memory")]

TINY = [
    "model.features=8", "model.depth=1", "s4.state_size=4", "batch_size=16", "train.steps=4",
    "train.eval_every=2",
    "train.checkpoint_every=2", "train.log_every=1", "train.optimizer.warmup_steps=1",
]  # fmt: skip


def configured(variant, *overrides, **options):
    """A config with overrides; ``options`` replace those of the dataset."""
    config = apply_overrides(get_config(f"s4:{variant}"), overrides)
    if options:
        with config.unlocked():
            config.data.options = options
    return config


def experiment(config, workdir):
    """On one device, for which programs compile sooner; test_full_scale.py runs on eight."""
    exp = Experiment(config, workdir)
    exp.layout = Layout(make_mesh(devices=jax.devices()[:1]))
    return exp


# -- configs ---------------------------------------------------------------------------------------

# depth, features, norm, prenorm, dropout, rate, batch, epochs x batches, decay, patience, pool
ORIGINAL = {
    "listops_v1": (6, 128, "batch", False, 0.0, 0.01, 100, 50 * 960, 0.01, 5, "mean"),
    "text_v1": (4, 64, "batch", True, 0.0, 0.001, 50, 20 * 500, 0.0, 5, "last"),
    "retrieval_v1": (6, 256, "batch", True, 0.0, 0.002, 64, 20 * 2299, 0.0, 20, "mean"),
    "image_v1": (6, 512, "layer", False, 0.2, 0.004, 50, 200 * 900, 0.01, 20, "mean"),
    "pathfinder_v1": (6, 256, "batch", True, 0.1, 0.004, 100, 200 * 1600, 0.0, 10, "last"),
    "pathx_v1": (6, 256, "batch", True, 0.0, 0.0005, 32, 100 * 5000, 0.0, 20, "mean"),
    "scifar_v1": (6, 1024, "layer", False, 0.25, 0.01, 50, 200 * 900, 0.01, 20, "mean"),
    "sc10": (6, 128, "batch", True, 0.1, 0.01, 20, 150 * 1350, 0.0, 10, "mean"),
}

# depth, features, norm, prenorm, dropout, rate, rate of A and B, of dt, batch, steps, warm-up,
# decay, n_ssm, dt_min, pool
UPDATED = {
    "listops": (8, 128, "batch", False, 0.0, 0.01, 1e-3, 0.01, 50, 80_000, 1_000, 0.05, None, 1e-3,
                "mean"),
    "text": (6, 256, "batch", True, 0.0, 0.01, 1e-3, 0.01, 16, 50_000, 1_000, 0.05, None, 1e-3,
             "mean"),
    "retrieval": (6, 256, "batch", True, 0.0, 0.01, 1e-3, 0.01, 64, 50_000, 2_500, 0.05, None, 1e-3,
                  "mean"),
    "image": (6, 512, "layer", False, 0.1, 0.01, 1e-3, 0.01, 50, 180_000, 900, 0.05, 2, 1e-3,
              "mean"),
    "pathfinder": (6, 256, "batch", True, 0.0, 0.004, 1e-3, 1e-3, 64, 500_000, 2_500, 0.03, None,
                   1e-3, "last"),
    "pathx": (6, 256, "batch", True, 0.0, 0.001, 5e-4, 5e-4, 16, 500_000, 50_000, 0.05, None, 1e-4,
              "mean"),
    "scifar": (6, 512, "layer", False, 0.1, 0.01, 1e-3, 0.01, 50, 180_000, 900, 0.05, 2, 1e-3,
               "mean"),
}  # fmt: skip


def architecture(config):
    m = config.model
    return m.depth, m.features, m.norm, m.prenorm, m.dropout


@pytest.mark.parametrize("variant", ORIGINAL)
def test_original_settings_are_those_of_the_paper(variant):
    config, row = get_config(f"s4:{variant}"), ORIGINAL[variant]
    optimizer = config.train.optimizer
    assert architecture(config) == row[:5]
    assert (optimizer.learning_rate, config.batch_size, config.train.steps) == row[5:8]
    assert (optimizer.weight_decay, optimizer.plateau_patience, config.model.pool) == row[8:]
    assert (optimizer.schedule, optimizer.plateau_factor) == ("plateau", 0.2)
    assert config.train.steps % config.train.eval_every == 0  # patience counts epochs
    assert (config.s4.bidirectional, config.s4.output, config.s4.state_size) == (
        False, "linear", 64,
    )  # fmt: skip
    assert (config.s4.dt_min, config.s4.dt_max) == (0.001, 0.1)
    assert optimizer.groups.ssm.learning_rate == min(row[5], 1e-3)


@pytest.mark.parametrize("variant", UPDATED)
def test_updated_settings_are_the_published_ones(variant):
    config, row = get_config(f"s4:{variant}"), UPDATED[variant]
    optimizer = config.train.optimizer
    assert architecture(config) == row[:5]
    groups = optimizer.groups
    assert optimizer.learning_rate == row[5]
    assert (groups.ssm.learning_rate, groups.dt.learning_rate) == row[6:8]
    assert (config.batch_size, config.train.steps, optimizer.warmup_steps) == row[8:11]
    assert (optimizer.weight_decay, config.s4.n_ssm, config.s4.dt_min) == row[11:14]
    assert (config.model.pool, optimizer.schedule) == (row[14], "cosine")
    assert (config.s4.bidirectional, config.s4.output, config.s4.state_size) == (True, "glu", 64)


def test_language_model_settings_are_the_published_ones():
    config = get_config("s4:wikitext103")
    assert (config.model.depth, config.model.features) == (16, 1024)
    assert config.model.pattern == ("mixer", "mixer", "ffn")
    assert (config.model.dropout, config.model.div_val) == (0.25, 4)
    assert config.model.cutoffs == (19_997, 39_997, 199_997)
    optimizer = config.train.optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay) == (5e-4, 0.1)
    assert (config.train.steps, optimizer.warmup_steps) == (800_000, 1_000)
    assert (config.batch_size, config.data.options.length) == (8, 8192)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_config_can_be_written_to_a_file(variant):
    assert json.loads(config_to_json(get_config(f"s4:{variant}")))["recipe"] == "s4"


def grouped(variant, *overrides):
    """Parameter path -> its group's (learning rate, weight decay), and the whole settings."""
    # One layer has all kinds of parameters.
    task, batch, settings = s4.plan(
        configured(variant, "model.depth=1", "model.features=8", "s4.state_size=4", *overrides)
    )
    params = jax.eval_shape(task.init, jax.random.key(0), batch).params
    labels = group_labels(settings.optimizer, params)
    main = settings.optimizer
    found = {}
    for kp, label in jax.tree_util.tree_leaves_with_path(labels):
        group = main if label == "main" else main.groups[label]
        found[path_str(kp)] = label, group.learning_rate, group.weight_decay
    return found, settings


@pytest.mark.parametrize("variant", TRAINED)
def test_state_spaces_train_slowly_and_without_decay(variant):
    overrides = ["model.cutoffs=(100,)"] if variant == "wikitext103" else []
    found, settings = grouped(variant, *overrides)
    rest = settings.optimizer.learning_rate, settings.optimizer.weight_decay
    ssm = [path for path in found if re.search(SSM_PARAMETERS, path)]
    assert {path.rpartition("/")[2] for path in ssm} >= {"log_dt", "lambda_re", "b", "p"}
    for path, (label, rate, decay) in found.items():
        if path not in ssm or path.endswith("/q"):  # Q stays with C in the original code
            assert (label, rate, decay) == ("main", *rest), path
        elif label == "dt":  # the updated setting gives dt a rate of its own
            assert path.endswith("log_dt") and decay == 0
        else:
            assert label == "ssm" and rate <= 1e-3 and decay == 0, path


def test_the_partition_is_what_the_optimiser_does():
    task, batch, settings = s4.plan(
        configured("listops", "model.depth=1", "model.features=8", "train.optimizer.warmup_steps=0")
    )
    params = jax.jit(task.init)(jax.random.key(0), jax.tree.map(
        lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), batch)).params  # fmt: skip
    tx, _ = make_optimizer(settings.optimizer, settings.steps, params)
    # Without a gradient only decay is left; with one, Adam's first step is the rate.
    still = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[0]
    moved = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)[0]
    ssm = {k: np.asarray(v) for k, v in still["blocks_0"]["layer"]["ssm"].items()}
    assert all(not ssm[k].any() for k in ("log_dt", "lambda_re", "lambda_im", "b", "p"))
    c = params["blocks_0"]["layer"]["ssm"]["c"]
    np.testing.assert_allclose(ssm["c"], -0.01 * 0.05 * c, rtol=1e-5)
    step = moved["blocks_0"]["layer"]["ssm"]
    np.testing.assert_allclose(step["lambda_re"], -1e-3, rtol=1e-4)
    np.testing.assert_allclose(step["log_dt"], -1e-2, rtol=1e-4)
    assert optax.tree.norm(step["c"]) > 0


@pytest.mark.parametrize("variant", ["digits", "listops_small", "pathfinder_small", "chars"])
def test_plans_have_the_shapes_of_the_data(variant):
    config = configured(variant)
    if variant != "digits":
        small = {"num_train": 100, "num_validation": 100, "num_test": 100}
        if variant == "chars":
            small = dict.fromkeys(small, 5_000)
        config = configured(variant, **{**config.data.options, **small})
    bundle = s4._load(config)
    expected = {k: v for k, v in config.data.expected.items() if k != "lengths"}
    assert {k: getattr(bundle.info, k) for k in expected} == expected
    real = Pipeline(bundle.splits["train"], config.batch_size, repeat=True).abstract_batch()
    _, planned, _ = s4.plan(config)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), planned) == jax.tree.map(
        lambda x: (x.shape, x.dtype), real
    )


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    config = configured("digits", *TINY, "half_rate=True")
    workdir = tmp_path_factory.mktemp("digits")
    return config, workdir, experiment(config, workdir).run()


def test_classify_records_accuracy_at_both_rates(digits_run):
    _, workdir, results = digits_run
    table = dict(results["tables"]["Test accuracy (s4)"]["rows"])
    assert list(table) == ["full rate", "half rate, rate=1", "half rate, rate=2"]
    assert all(0 <= accuracy <= 1 for accuracy in table.values())
    scalars = results["scalars"]
    assert scalars["test accuracy"] == pytest.approx(table["full rate"], abs=1e-4)
    summary = json.loads((workdir / "stages/train/summary.json").read_text())
    assert scalars["parameters"] == summary["parameters"]
    # Selected on validation, over the evaluations at steps 2 and 4.
    lines = [json.loads(x) for x in (workdir / "stages/train/metrics.jsonl").open()]
    seen = [x["validation/accuracy"] for x in lines if "validation/accuracy" in x]
    assert scalars["validation accuracy"] == pytest.approx(max(seen))


def test_a_finished_run_gives_its_results_again(digits_run, monkeypatch):
    config, workdir, results = digits_run
    before = json.dumps(results, sort_keys=True)
    exp = experiment(config, workdir)

    def evaluated_again(*args):
        raise AssertionError("the test split was read twice")

    monkeypatch.setattr(exp, "evaluate", evaluated_again)
    assert json.dumps(exp.run(), sort_keys=True) == before


def test_rate_two_reads_every_second_sample_of_a_smooth_signal():
    config = configured("speech", "model.features=8", "s4.state_size=8")
    model = s4.classifier(config, DatasetInfo(num_classes=10, length=512, features=1))
    t = np.linspace(0, 1, 512)
    signal = np.sin(2 * np.pi * np.array([3.0, 5.0, 7.0])[:, None] * t)
    x = jnp.asarray(signal[..., None], jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    whole = jax.jit(model.apply)(variables, x)
    same = jax.jit(model.apply)(variables, x[:, ::2])
    slower = jax.jit(model.clone(rate=2.0).apply)(variables, x[:, ::2])
    error = lambda logits: float(jnp.abs(logits - whole).max() / jnp.abs(whole).max())  # noqa: E731
    assert error(slower) < 0.05 < error(same)


def test_buckets_change_nothing_but_the_padding(tmp_path):
    options = {"num_train": 100, "num_validation": 60, "num_test": 60, "min_length": 8,
               "max_length": 64, "max_depth": 3, "max_arguments": 4}  # fmt: skip
    config = configured("listops_small", *TINY, **options)
    exp = experiment(config, tmp_path)
    exp.run()
    bundle = s4._load(config)
    source = bundle.splits["test"]
    bucketed = s4._pipeline(config, source)
    shapes = {batch["inputs"].shape[1] for batch in bucketed.iterator()}
    assert len(shapes) > 1 and shapes <= {16, 32, 64}
    task, *_ = s4.plan(config)
    variables = jax.jit(task.init)(jax.random.key(1), bucketed.example_batch())
    a = exp.evaluate(task, variables, bucketed)
    b = exp.evaluate(task, variables, Pipeline(source, config.batch_size))
    assert a["nll"] == pytest.approx(b["nll"], rel=1e-5)
    assert a["accuracy"] == pytest.approx(b["accuracy"])


def test_language_model(tmp_path):
    config = configured(
        "chars", *TINY, "sample.tokens=12", "sample.prompt=5",
        length=32, num_train=3_000, num_validation=600, num_test=600,
    )  # fmt: skip
    results = experiment(config, tmp_path).run()
    scalars = results["scalars"]
    rows = results["tables"]["Language modelling (s4)"]["rows"]
    assert [row[0] for row in rows] == ["validation", "test"]
    for _, nats, bits, perplexity in rows:
        assert perplexity == pytest.approx(np.exp(nats), rel=1e-5)
        assert bits == pytest.approx(nats / np.log(2), rel=1e-5)
    bundle = s4._load(config)
    text = "".join(bundle.info.vocabulary[i] for i in bundle.splits["test"][0]["inputs"][:5])
    assert scalars["prompt"] == text
    assert len(scalars["sample"]) == 12
    assert set(scalars["sample"]) <= set(bundle.info.vocabulary)
    assert experiment(config, tmp_path).run()["scalars"]["sample"] == scalars["sample"]


def test_random_matrices_follow_the_seed_and_keep_the_shapes():
    info = DatasetInfo(num_classes=10, length=32, features=1)
    x = jnp.zeros((1, 32, 1))

    def spectrum(*overrides):
        model = s4.classifier(configured("digits", *TINY, *overrides), info)
        params = jax.jit(model.init)(jax.random.key(0), x)["params"]
        return params["blocks_0"]["layer"]["ssm"]["lambda_im"]

    legs, drawn = spectrum(), spectrum("s4.a_init=random_nplr")
    assert legs.shape == drawn.shape
    np.testing.assert_array_equal(legs, spectrum("seed=1"))
    assert np.abs(legs - drawn).max() > 0.1
    assert np.abs(drawn - spectrum("s4.a_init=random_nplr", "seed=1")).max() > 0.1
    assert np.ptp(np.asarray(legs), axis=0).max() == 0  # all features alike
    assert np.ptp(np.asarray(drawn), axis=0).min() > 0


@pytest.mark.parametrize(
    "mixer", ["s4d", "conv", "lstm", "gru", "attention", "linear_attention"]
)  # fmt: skip
def test_every_baseline_is_one_override(mixer):
    config = configured("digits", *TINY, f"model.mixer={mixer}")
    task, batch, settings = s4.plan(config)
    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype), batch)
    variables = jax.eval_shape(task.init, jax.random.key(0), row)
    make_optimizer(settings.optimizer, settings.steps, variables.params)  # no group is empty
    logits = jax.eval_shape(task.predict, variables, row)
    assert logits.shape == (2, 10)
    assert bool(settings.optimizer.groups) == (mixer == "s4d")


def test_convolution_scans_and_generation_agree(tmp_path):
    config = apply_overrides(
        get_config("s4:recurrence"),
        ["recurrence.features=2", "recurrence.state_size=16", "recurrence.length=256",
         "recurrence.generate=128"],
    )  # fmt: skip
    results = Experiment(config, tmp_path).run()
    (name,) = [name for name in results["tables"] if name.startswith("Largest error")]
    rows = results["tables"][name]["rows"]
    assert {row[1] for row in rows} == {
        "scan", "blocks", "parallel scan", "scan in the eigenbasis",
    }  # fmt: skip
    assert max(row[2] for row in rows) < 1e-4
    scalars = results["scalars"]
    assert scalars["generated = convolved, relative error"] < 1e-4
    assert scalars["state bytes per sequence"] == 2 * 8 * 8  # complex64, half of the modes


def test_memory_of_legs_grows_and_of_a_random_matrix_does_not(tmp_path):
    config = apply_overrides(
        get_config("s4:memory"),
        ["memory.length=1024", "memory.state_sizes=(8,64)", "memory.signals=4"],
    )
    Experiment(config, tmp_path).run()
    errors = json.loads((tmp_path / "artifacts/errors.json").read_text())
    assert errors["LegS"][1] < 0.2 * errors["LegS"][0]
    assert errors["random A"][1] > 0.8 * errors["random A"][0]


def test_the_best_readout_is_a_projection():
    rng = np.random.default_rng(0)
    u = rng.normal(size=(3, 64))
    a, b = rng.normal(size=(6, 6)) - 4 * np.eye(6), rng.normal(size=6)
    read = s4.best_readout(u, a, b, 2.0)
    np.testing.assert_allclose(s4.best_readout(read, a, b, 2.0), read, atol=1e-10)
    np.testing.assert_allclose(np.sum(read * (u - read)), 0, atol=1e-10)


def test_legs_reads_polynomials_of_the_warped_time_back():
    horizon, length = 3.0, 4096
    age = horizon / length * (np.arange(length)[::-1] + 0.5)
    z = np.exp(-age) - np.exp(-horizon)  # 0 where the signal begins
    u = np.stack([z**2, z**3])
    read = s4.legs_readout(u, 64, horizon)
    assert s4._relative(read, u) < 1e-3


# -- misuse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "overrides", "message"),
    [
        ("digits", ["task=clasify"], "choose one of classify"),
        ("digits", ["model.mixer=lsmt"], "did you mean 'lstm'"),
        ("listops_small", ["half_rate=True"], "has tokens"),
        ("digits", ["data.name=digit"], "nearest: digits"),
        ("chars", ["s4.bidirectional=True"], "must not see the future"),
        ("chars", ["model.mixer=attention", "attention.causal=False"], "must not see the future"),
        ("digits", ["s4.a_init=lin", "batch_size=16"], "choose legs"),
    ],
)
def test_misuse_is_named(variant, overrides, message, tmp_path):
    exp = Experiment(configured(variant, *overrides), tmp_path)
    with pytest.raises(ValueError, match=message):
        exp.run()


def test_data_of_the_wrong_kind_is_named():
    tokens, labels = DatasetInfo(vocab_size=5, length=9), DatasetInfo(num_classes=2, length=8)
    with pytest.raises(ConfigError, match="has no classes"):
        s4.classifier(get_config("s4:digits"), tokens)
    with pytest.raises(ConfigError, match="no windows of tokens"):
        s4.next_token_model(get_config("s4:chars"), labels)
    with pytest.raises(ConfigError, match="bucket_boundaries"):
        s4.classifier(get_config("s4:digits"), DatasetInfo(num_classes=2))


def test_pairs_cannot_be_bucketed():
    config = configured("retrieval", "bucket_boundaries=(8,)")
    with pytest.raises(ConfigError, match="pairs"):
        s4._pipeline(config, [{}])


def test_a_plateau_needs_a_validation_split(tmp_path, monkeypatch):
    config = configured("digits", *TINY, "train.optimizer.schedule=plateau")
    bundle = s4._load(config)
    part = {k: v for k, v in bundle.splits.items() if k != "validation"}
    monkeypatch.setattr(s4, "load", lambda name, **_: type(bundle)(part, bundle.info))
    with pytest.raises(ConfigError, match="validation split"):
        Experiment(config, tmp_path).run()
