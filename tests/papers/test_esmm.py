"""ESMM's recipe on eight devices, its competitors, and its full-scale plans."""

import json
import math
import os

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from scipy.special import log_expit

from transfer_jax.configuration import ConfigError, apply_overrides, get_config, list_configs
from transfer_jax.data.conversions import ALICPP_SLOTS
from transfer_jax.data.pipeline import Pipeline
from transfer_jax.metrics.classification import auc
from transfer_jax.models.conversion import partition_rules
from transfer_jax.papers import esmm
from transfer_jax.training import Experiment, Layout, load_variables, make_mesh
from transfer_jax.training.aot import lower_step
from transfer_jax.training.sharding import bytes_per_device
from transfer_jax.trees import path_str

TINY = [
    "data.options.train=3200", "data.options.test=800", "epochs=1", "batch_size=160",
    "clicked.epochs=1", "clicked.batch_size=32", "eval_batch_size=200", "model.features=4",
    "model.hidden=(8,)", "model.multiple=4", "mesh.data=2", "mesh.model=4",
    "train.optimizer.learning_rate=0.02",
]  # fmt: skip

METHODS = ("unbias", "division", "esmm")


def config_of(variant, *overrides, rules=True):
    config = apply_overrides(get_config(variant), overrides)
    with config.unlocked():
        config.data.options.cardinalities = (60, 40)
        if rules:
            config.sharding.rules = tuple((p, tuple(spec)) for p, spec in partition_rules())
    return config


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Tables over four devices and batches over two."""
    config = config_of("esmm", *TINY, f"methods={METHODS!r}")
    exp = Experiment(config, tmp_path_factory.mktemp("esmm"))
    exp.run()
    return exp


def flat(tree):
    return {path_str(kp): x for kp, x in jax.tree_util.tree_leaves_with_path(tree)}


def table(exp, name):
    found = exp.results["tables"][name]
    return {row[0]: dict(zip(found["columns"][1:], row[1:])) for row in found["rows"]}


def test_every_method_is_scored_where_the_truth_is_known(ran):
    areas = ran.results["tables"]["AUC on test impressions"]
    names = ["CVR AUC, clicked", "CTCVR AUC", "CVR AUC, entire space"]
    assert [c for c in areas["columns"] if c in names] == names
    assert [row[0] for row in areas["rows"]] == list(METHODS)
    calibration = table(ran, "Calibration on test impressions")
    test = esmm.load_data(ran.config)["test"]
    truth = ran.results["scalars"]["conversion rate, entire space"]
    assert truth == pytest.approx(test.truth.mean())
    for row in calibration.values():
        gap = abs(row["mean pCVR, all"] - truth)
        assert gap <= row["mean |pCVR - truth|"] + 1e-4
        assert gap <= row["ECE, all"] + 1e-4
    # The last checkpoint's area in the curve is that of the table.
    curve = {k: x["last epoch"] for k, x in table(ran, "Entire-space CVR AUC by epoch").items()}
    place = areas["columns"].index("CVR AUC, entire space")
    for row in areas["rows"]:
        if row[0] != "division":
            assert curve[row[0]] == pytest.approx(row[place], abs=1e-4)


def test_scores_are_products_and_ratios_of_the_networks_own(ran):
    """CTCVR multiplies by one separate CTR; DIVISION divides by it."""
    data = esmm.load_data(ran.config)
    test = data["test"]

    def logits(name):
        objective = esmm.task(ran.config, test.fields, name)
        variables = load_variables(ran.workdir / "stages" / name, layout=ran.layout)
        return esmm.scores(ran, objective, variables, test)

    click = log_expit(logits("click")[:, 0])
    own = log_expit(logits("esmm")[:, 1])
    ratio = log_expit(logits("division")[:, 0]) - click
    rows = {row[0]: row for row in ran.results["tables"]["AUC on test impressions"]["rows"]}
    bought = test.labels.prod(axis=1)
    assert rows["esmm"][3] == pytest.approx(auc(own + click, bought), abs=1e-4)
    assert rows["division"][5] == pytest.approx(auc(ratio, test.outcomes), abs=1e-4)
    share = ran.results["scalars"]["division: share of impressions with pCVR > 1"]
    assert share == pytest.approx((ratio > 0).mean(), abs=2e-3)
    stream = esmm.area(own, test.outcomes, limit=10)
    assert stream == pytest.approx(esmm.area(own, test.outcomes), abs=1e-3)


def test_methods_differ_in_loss_and_rows_alone(ran):
    fields = esmm.load_data(ran.config)["train"].fields
    shapes = {}
    for method in ("click", *esmm.METHODS):
        objective = esmm.task(ran.config, fields, method)
        batch = {"inputs": {"ids": np.ones((2, len(fields)), np.int32)}}
        params = jax.eval_shape(objective.init, jax.random.key(0), batch).params
        shapes[method] = {p: x.shape for p, x in flat(params).items()}
    saved = load_variables(ran.workdir / "stages/esmm").params
    assert {p: x.shape for p, x in flat(saved).items()} == shapes["esmm"]
    one = shapes["base"]
    assert one == shapes["aman"] == shapes["unbias"] == shapes["oversampling"]
    assert one.items() <= shapes["esmm"].items() and shapes["esmm"] == shapes["ctcvr_only"]
    both = {p for p in shapes["esmm_ns"] if "_embeddings/" in p}
    assert len(both) == 2 * len(fields)
    weights = {m: esmm.task(ran.config, fields, m).event_weights for m in ("esmm", "ctcvr_only")}
    assert weights == {"esmm": (1.0, 1.0), "ctcvr_only": (0.0, 1.0)}


def test_tables_are_split_and_a_second_run_reads_the_first(ran):
    layout = (ran.workdir / "stages/esmm/layout.txt").read_text()
    lines = [line for line in layout.splitlines() if "embeddings/field_0" in line]
    assert lines and all("'model'" in line for line in lines)
    before = json.dumps(ran.results)
    again = Experiment(ran.config, ran.workdir)
    assert json.dumps(again.run()) == before


def test_one_device_finds_what_eight_do(ran, tmp_path):
    config = config_of("esmm", *TINY, "methods=('esmm',)", "curve=False", rules=False)
    exp = Experiment(config, tmp_path)
    exp.layout = Layout(make_mesh({"data": 1}, jax.devices()[:1]))
    exp.run()
    for name in ("AUC on test impressions", "Calibration on test impressions"):
        one, eight = table(exp, name)["esmm"], table(ran, name)["esmm"]
        for column, value in one.items():
            if not isinstance(value, str):
                assert value == pytest.approx(eight[column], abs=2e-3), column


@pytest.mark.parametrize("variant", ["alicpp", "alicpp_released"])
def test_full_scale_plans_lower_with_tables_over_the_model_axis(variant):
    config = get_config(f"esmm:{variant}")
    rules = tuple((p, PartitionSpec(*spec)) for p, spec in config.sharding.rules)
    layout = Layout(make_mesh({"data": 2, "model": 4}), rules, config.sharding.min_size)
    objective, batch, settings = esmm.plan(config)
    assert len(ALICPP_SLOTS) == 23 and settings.steps == 2 * config.data.rows // 5000
    lowered, arrays = lower_step(objective, batch, settings, layout)
    assert "sdy.mesh" in lowered.as_text() or "mhlo.num_partitions = 8" in lowered.as_text()
    tables = {
        p: x for p, x in flat(arrays["params"]).items() if p.startswith("embeddings/")
    }  # fmt: skip
    assert len(tables) == 23
    features = 12 if variant == "alicpp_released" else 18
    for path, x in tables.items():
        assert x.shape == (config.data.sizes[path.removeprefix("embeddings/")], features)
        assert x.sharding.shard_shape(x.shape) == (x.shape[0] // 4, features)
    towers = flat(arrays["params"])
    assert towers["click_tower/dense_0/kernel"].shape == (23 * features, 200)
    assert ("click_tower/prelu_0/negative_slope" in towers) == (features == 12)
    whole = sum(math.prod(x.shape) * 4 for x in tables.values())
    # Parameters and two moments, a quarter of each table.
    kept = bytes_per_device({k: arrays[k] for k in ("params", "optimizer")})
    assert kept == pytest.approx(3 * whole / 4, rel=0.01)


def test_variants_and_what_is_refused(tmp_path):
    assert set(list_configs()["esmm"].variants) == {
        "funnel", "coat", "sample", "alicpp", "alicpp_released",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="did you mean 'esmm_ns'"):
        esmm.check_methods(("esmmns",))
    with pytest.raises(ConfigError, match="is empty"):
        esmm.check_methods(())
    with pytest.raises(ConfigError, match=r"Impressions\.save"):
        esmm.load_data(get_config("esmm:alicpp"))
    with pytest.raises(ConfigError, match="there are funnel, coat"):
        esmm.load_data(apply_overrides(get_config("esmm"), ["data.kind=funnels"]))


@pytest.mark.skipif(not os.environ.get("TRANSFER_JAX_DATA"), reason="needs TRANSFER_JAX_DATA")
def test_rows_of_alicpp_give_the_same_loss_in_padded_batches():
    config = get_config("esmm:sample")
    train = esmm.load_data(config)["train"]
    objective = esmm.task(config, train.fields, "esmm")
    whole = Pipeline(train, 100).example_batch()
    variables = jax.jit(objective.init)(jax.random.key(0), whole)
    loss = jax.jit(lambda batch: objective.loss(variables, batch, None)[1].metrics)
    plan = (pipeline := Pipeline(train, 64)).rows()
    parts = [loss(pipeline.collate(plan(i))) for i in range(2)]
    for name, mean in loss(whole).items():
        total = sum(part[name].total for part in parts) / sum(part[name].weight for part in parts)
        np.testing.assert_allclose(total, mean.value(), rtol=1e-5)
