"""SRA-CL's recipe: published sizes, tables that must not change, recommending without them."""

import csv
import math

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from transfer_jax import recommendation
from transfer_jax.configuration import ConfigError, apply_overrides, get_config
from transfer_jax.data import recommend
from transfer_jax.objectives.recommend import NextOfPrefix
from transfer_jax.objectives.recommend_contrastive import Contrasted
from transfer_jax.papers import sra_cl
from transfer_jax.training import Experiment, Layout, make_mesh
from transfer_jax.training.aot import lower_step
from transfer_jax.trees import path_str

PREFIXES = {"yelp": 148_144, "sports": 189_543, "beauty": 131_413, "office_text": 38_543}


@pytest.mark.parametrize("variant", PREFIXES)
def test_published_settings_lower_with_their_tables_as_arguments(variant):
    config = get_config(f"sra_cl:{variant}")
    objective, batch, settings = sra_cl.plan(config)
    assert isinstance(objective, Contrasted)
    assert batch["inputs"].shape == (256, 20)
    # Actions less three for each user.
    assert objective.tables.user_vectors.shape == (PREFIXES[variant], 1024)
    rules = tuple((pattern, PartitionSpec(*spec)) for pattern, spec in config.sharding.rules)
    layout = Layout(make_mesh({"data": 2, "fsdp": 2, "model": 2}), rules)
    lowered, arrays = lower_step(objective, batch, settings, layout)
    text = lowered.as_text()
    assert "sdy.mesh" in text or "num_partitions = 8" in text
    assert len(text) < 3e6  # no table is a constant of the program
    leaves = {path_str(kp): x for kp, x in jax.tree_util.tree_leaves_with_path(arrays)}
    table = leaves["carried/tables/user_vectors"]
    assert math.prod(table.sharding.shard_shape(table.shape)) == math.prod(table.shape) // 2
    assert not any("tables" in path for path in leaves if not path.startswith("carried/"))


TINY = (
    "models=('no_cl','full')", "baselines=('pop',)", "data.options.users=60",
    "data.options.items=40", "vectors.options.items=40", "vectors.dim=8", "model.features=8",
    "model.hidden=8", "model.num_layers=1", "batch_size=16", "evaluation_batch_size=16",
    "train.steps=4", "train.eval_every=2", "train.log_every=2", "train.checkpoint_every=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sra_cl") / "run"
    return workdir, experiment(workdir).run()


def experiment(workdir, *overrides):
    exp = Experiment(apply_overrides(get_config("sra_cl"), (*TINY, *overrides)), workdir)
    exp.layout = Layout(make_mesh(devices=jax.devices()[:1]))
    return exp


def test_the_report(run):
    workdir, results = run
    tables = results["tables"]
    (title,) = [t for t in tables if t.startswith("Test")]
    assert title == (
        "Test: leave one out, full ranking of 40 items, seen items kept, ties count against the "
        "right item"
    )
    assert [row[0] for row in tables[title]["rows"]] == ["no_cl", "full", "pop"]
    paired = tables["NDCG@20 of full against the others, paired over users"]["rows"]
    assert paired[-1][:2] == ["all (60 users)", "no_cl"]
    full = next(row for row in tables[title]["rows"] if row[0] == "full")
    assert paired[-1][2] == full[tables[title]["columns"].index("NDCG@20")]
    assert "TF-IDF/SVD" in results["scalars"]["vectors"]
    assert experiment(workdir).run()["tables"] == tables  # everything is read back


def test_other_tables_are_refused(run, monkeypatch):
    workdir, _ = run
    read = sra_cl.item_vectors

    def changed(config, log):
        vectors, what = read(config, log)
        vectors[3] *= -1
        return vectors, what

    monkeypatch.setattr(sra_cl, "item_vectors", changed)
    with pytest.raises(ConfigError, match="tables of full are not those"):
        experiment(workdir).run()


def test_lists_are_made_without_tables(run, tmp_path):
    workdir, _ = run
    exp = experiment(workdir)
    log = recommend.load_log(exp.config.data.name, **exp.config.data.options).by_frequency()
    plan = recommendation.plan(workdir, log, "full")
    recommendation.export(plan, tmp_path / "lists.csv", k=3)
    with (tmp_path / "lists.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3 * log.num_users


def test_models_are_named_and_terms_of_no_strength_are_none():
    config = get_config("sra_cl")
    with pytest.raises(ConfigError, match=r"nearest: .*no_inter"):
        sra_cl.recommender(config, "no_intr", 9)
    kinds = {name: sra_cl.recommender(config, name, 9) for name in sra_cl.MODELS}
    assert [n for n, o in kinds.items() if isinstance(o, NextOfPrefix)] == ["no_cl"]
    config.cl.alpha = config.cl.beta = 0.0
    assert sra_cl.recommender(config, "full", 9) == kinds["no_cl"]
    config.backbone = "gru"
    with pytest.raises(ConfigError, match="gru4rec"):
        sra_cl.recommender(config, "full", 9)


def test_paired():
    other = np.random.default_rng(0).uniform(size=200)
    gain, t, signed = sra_cl.paired(other + 0.1 * np.arange(200) / 100 - 0.02, other)
    assert max(t, signed) < 1e-6
    np.testing.assert_allclose(gain, (0.0995 - 0.02) / other.mean(), rtol=1e-6)
    worse = sra_cl.paired(other, other + 0.1 * np.arange(1, 201))
    assert min(worse[1:]) > 0.999
    assert sra_cl.paired(other, other) == (0.0, 1.0, 1.0)
