"""Experiments: named stages, artifacts, and a work directory that belongs to one config."""

import json
import os

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from tests import toy
from transfer_jax import trees
from transfer_jax.objectives import Penalized, WarmStart
from transfer_jax.training import Experiment, base_config, fit_config
from transfer_jax.training.config import ConfigError
from transfer_jax.training.experiment import resolve_recipe

CALLS: list[str] = []


def recipe(exp):
    task = toy.classifier()
    data = {"validation": toy.eval_data()}
    source = exp.fit("source", task, toy.train_data(), exp.config.fit, evaluate=data)

    def squares():
        CALLS.append("fisher")
        return trees.scale(source.params, 2.0)

    fisher = exp.artifact("fisher", squares)
    chosen = exp.artifact("chosen", lambda: {"strength": 0.5, "name": "ewc"})
    objective = Penalized(
        inner=WarmStart(inner=task, params=source.params), strength=chosen["strength"],
        anchor=source.params, fisher=trees.scale(fisher, 0.1),
    )  # fmt: skip
    target = exp.fit("target", objective, toy.train_data(seed=3), exp.config.fit, evaluate=data)
    exp.record("accuracy", target.metrics["validation/accuracy"])
    exp.table(
        "result", ["stage", "accuracy"], [["target", np.float32(0.5)], ["source", jnp.int32(1)]]
    )
    exp.curve("line", [1, 2], {"a": [0.1, 0.2]}, xlabel="x", ylabel="y")
    exp.bars("bar", ["old", "new"], {"a": [0.1, 0.2]}, ylabel="y")


def make_config(**kwargs):
    config = base_config("tests.training.test_experiment:recipe")
    config.mesh.data = 8
    config.fit = fit_config(steps=4, log_every=2)
    config.update(ml_collections.ConfigDict(kwargs))
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("experiment")
    CALLS.clear()
    exp = Experiment(make_config(), path)
    exp.run()
    return path, json.loads((path / "results.json").read_text())


def test_the_work_directory_holds_everything(finished):
    path, results = finished
    assert {p.name for p in path.iterdir()} == {
        "config.json",
        "stages",
        "artifacts",
        "results.json",
    }
    assert {p.name for p in (path / "stages").iterdir()} == {"source", "target"}
    assert results["tables"]["result"]["rows"] == [["target", 0.5], ["source", 1]]
    assert 0.0 <= results["scalars"]["accuracy"] <= 1.0


def test_running_again_reads_what_is_there(finished):
    path, results = finished
    assert CALLS == ["fisher"]
    exp = Experiment(make_config(), path)
    recipe(exp)
    assert CALLS == ["fisher"]
    assert exp.results == results


def test_artifacts_keep_values_and_holes(tmp_path):
    exp = Experiment(make_config(), tmp_path)
    tree = {"a": {"w": jnp.arange(6.0).reshape(2, 3), "hole": None}, "n": jnp.int32(3)}
    first = exp.artifact("tree", lambda: tree)
    again = Experiment(make_config(), tmp_path).artifact("tree", lambda: 1 / 0)
    for read in (first, again):
        assert toy.leaves_equal(read, tree)
        assert trees.paths(read) == trees.paths(tree)
        assert read["a"]["hole"] is None
    assert exp.artifact("number", lambda: [1, "two"]) == [1, "two"]


def test_seeds_depend_on_config_seed_and_name(tmp_path):
    a = Experiment(make_config(), tmp_path / "a")
    b = Experiment(make_config(seed=1), tmp_path / "b")
    assert a.seed("x") == Experiment(make_config(), tmp_path / "c").seed("x")
    assert len({a.seed("x"), a.seed("y"), b.seed("x")}) == 3


def test_names_are_unique_and_plain(tmp_path):
    exp = Experiment(make_config(), tmp_path)
    exp.artifact("one", lambda: 1)
    with pytest.raises(ValueError, match="called 'one'"):
        exp.artifact("one", lambda: 1)
    with pytest.raises(ValueError, match="names no stage"):
        exp.artifact("../one", lambda: 1)


def test_a_work_directory_of_another_config_is_refused(finished):
    path, _ = finished
    other = make_config()
    other.fit.steps = 5
    with pytest.raises(ConfigError, match=r"another config: fit.steps is 4 there and 5 now"):
        Experiment(other, path)
    elsewhere = make_config()
    elsewhere.mesh.data, elsewhere.mesh.fsdp = 4, 2
    assert Experiment(elsewhere, path).layout.mesh.shape["fsdp"] == 2


def test_an_unwritable_work_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        Experiment(make_config(), tmp_path / "file" / "run")
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(ConfigError, match="cannot be written"):
            Experiment(make_config(), tmp_path / "locked" / "run")


def test_recipes_that_do_not_exist_are_named():
    with pytest.raises(ConfigError, match=r"no module transfer_jax\.papers\.nothing"):
        resolve_recipe("nothing")
    with pytest.raises(ConfigError, match="has no nothing"):
        resolve_recipe("tests.toy:nothing")


def test_an_impossible_setting_of_a_later_stage_stops_before_the_first(tmp_path):
    config = make_config()
    config.later = {"inner": fit_config(steps=3)}
    config.later.inner.optimizer.learning_rate = -1.0
    with pytest.raises(ConfigError, match=r"later\.inner\.optimizer.learning_rate=-1.0"):
        Experiment(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_directory_in_which_nothing_was_computed_takes_another_config(tmp_path):
    Experiment(make_config(), tmp_path)
    other = make_config(seed=5)
    Experiment(other, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 5


def test_the_report_can_be_shown_in_a_notebook(finished):
    pytest.importorskip("IPython")
    text = Experiment(make_config(), finished[0]).show().data
    assert "| target | 0.5 |" in text and text.count("data:image/png;base64,") >= 4
    assert ".png)" not in text
