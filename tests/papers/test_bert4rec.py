"""BERT4Rec's recipe: published sizes, one result on any devices, positions, the ring's bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from transfer_jax.configuration import ConfigError, apply_overrides, get_config
from transfer_jax.data import recommend
from transfer_jax.models.recommender import SequentialRecommender, encoder_stack
from transfer_jax.objectives import Variables
from transfer_jax.objectives.recommend import Cloze, NextItem
from transfer_jax.papers import bert4rec
from transfer_jax.training import Experiment, Layout, make_mesh
from transfer_jax.training.aot import lower_step
from transfer_jax.trees import path_str

ROWS = {"ml1m": 3_420, "ml20m": 26_748, "beauty": 54_546, "steam": 13_048}


@pytest.mark.parametrize("variant", ROWS)
def test_published_settings_lower_with_the_table_split(variant):
    config = get_config(f"bert4rec:{variant}")
    objective, batch, settings = bert4rec.plan(config)
    module = objective.module
    assert module.num_items + module.special_rows == ROWS[variant] <= module.rows
    assert batch["inputs"].shape == (256, module.max_length)
    rules = tuple((pattern, PartitionSpec(*spec)) for pattern, spec in config.sharding.rules)
    layout = Layout(make_mesh({"data": 2, "model": 4}), rules)
    lowered, arrays = lower_step(objective, batch, settings, layout)
    assert "sdy.mesh" in lowered.as_text() or "num_partitions = 8" in lowered.as_text()
    tables = [
        x for kp, x in jax.tree_util.tree_leaves_with_path(arrays)
        if path_str(kp).endswith("items/embedding")
    ]  # fmt: skip
    assert len(tables) == 3  # the table and its two moments
    for table in tables:
        assert table.sharding.shard_shape(table.shape) == (module.rows // 4, module.stack.features)


TINY = (
    "models=('bert4rec',)", "baselines=('pop',)", "data.options.users=60",
    "data.options.items=40", "model.features=8", "model.hidden=8", "model.num_layers=1",
    "model.length=12", "batch_size=16", "negatives=10", "evaluation_batch_size=16",
    "train.steps=4", "train.eval_every=2", "train.log_every=2",
    "train.optimizer.warmup_steps=0", "model.dropout=0.1",
)  # fmt: skip


def test_one_result_on_one_and_on_four_devices(tmp_path):
    config = apply_overrides(get_config("bert4rec"), TINY)
    results = []
    for mesh in ({"data": 1}, {"data": 2, "model": 2}):
        devices = jax.devices()[: int(np.prod(list(mesh.values())))]
        exp = Experiment(config, tmp_path / str(len(devices)))
        exp.layout = Layout(make_mesh(mesh, devices), exp.layout.rules, exp.layout.min_size)
        results.append(exp.run())
    one, many = (r["tables"] for r in results)
    assert [t for t in one if t.startswith("Test")] == [
        "Test: leave one out, full ranking of 40 items, seen items removed, ties count against "
        "the right item",
        "Test: leave one out, full ranking of 40 items, seen items kept, ties count against the "
        "right item",
        "Test: leave one out, among 10 sampled negatives (popularity), seen items removed, ties "
        "count against the right item",
        "Test: leave one out, among 10 sampled negatives (uniform), seen items removed, ties "
        "count against the right item",
    ]
    for title, table in one.items():
        if title.startswith("Test"):
            for a, b in zip(table["rows"], many[title]["rows"]):
                assert a[0] == b[0]
                np.testing.assert_allclose(a[1:], b[1:], atol=2e-2)  # a user may change places
    rows = next(iter(one.values()))["rows"]
    assert [row[0] for row in rows] == ["bert4rec", "pop"]
    again = Experiment(config, tmp_path / "1")
    assert again.run()["tables"] == one  # everything is read back


def test_models_are_named():
    config = get_config("bert4rec")
    with pytest.raises(ConfigError, match="nearest: bert4rec"):
        bert4rec.recommender(config, "bert4re", 9)
    kinds = {name: bert4rec.recommender(config, name, 9) for name in bert4rec.MODELS}
    assert kinds["bert4rec_1mask"].maximum == 1 and kinds["bert4rec_1mask"].share == 0
    for objective in kinds.values():
        cloze = isinstance(objective, Cloze)
        causal = objective.module.stack.causal
        assert cloze != causal and (objective.mask_id is not None) == cloze
    assert {o.kind for o in kinds.values() if isinstance(o, NextItem)} == {
        "ce", "bce", "gbce", "sampled", "bpr_max"
    }  # fmt: skip


def test_gru4rec_as_published_has_a_gru_and_a_table_alone():
    objective = bert4rec.recommender(get_config("bert4rec"), "gru4rec_plus", 9)
    batch = {"inputs": jnp.ones((2, 5), jnp.int32)}
    params = jax.eval_shape(objective.init, jax.random.key(0), batch).params
    assert sorted(params) == ["body_0", "items"]
    loss, aux = objective.loss(objective.init(jax.random.key(0), batch), batch, jax.random.key(1))
    assert float(loss) > 0 and aux.metrics["nll"].weight == 8


def test_rank_flips():
    found = {
        "a": {"removed": {"m": 0.3}, "popularity": {"m": 0.5}, "uniform": {"m": 0.9}},
        "b": {"removed": {"m": 0.2}, "popularity": {"m": 0.6}, "uniform": {"m": 0.8}},
        "c": {"removed": {"m": 0.1}, "popularity": {"m": 0.1}, "uniform": {"m": 0.8}},
    }
    assert bert4rec.rank_flips(found, "m") == [["a", "b", 0.3, 0.2, "popularity", 0.5, 0.6]]


def test_the_best_guess_on_the_ring():
    """5/9 with both neighbours and 1/3 with one, by counting; and how a walk is asked for."""
    log = recommend.random_walks(users=30_000, items=10, length=3)
    number = np.array([int(name) for name in log.item_names[1:]])
    walks = number[log.items - 1].reshape(-1, 3)
    steps = np.diff(walks, axis=1)
    steps = (steps + 1) % 10 - 1
    assert set(np.unique(steps)) == {-1, 0, 1}
    # The sign of the sum is the best guess of the first step: always, half, a third of the time.
    right = steps[:, 0] == np.sign(steps.sum(axis=1))
    assert abs(right.mean() - 5 / 9) < 4 * np.sqrt(20 / 81 / 30_000)
    assert abs((steps[:, 1] == 0).mean() - 1 / 3) < 4 * np.sqrt(2 / 9 / 30_000)

    source = bert4rec.walk_source(walks + 1, 1, 99).arrays
    assert (source["inputs"][:, 1] == 99).all() and (source["positions"] == 1).all()
    left = bert4rec.walk_source(walks + 1, 1, None).arrays
    assert (left["inputs"] == walks + 1).all() and (left["positions"] == 0).all()
    assert (left["labels"] == walks[:, 1] + 1).all()


def test_positions_are_needed_to_copy_from_a_place():
    """The last of six items repeats the third: a bag of items can only guess among five."""

    def accuracy(positions):
        stack = encoder_stack(16, num_layers=1, num_heads=1, hidden=16)
        module = SequentialRecommender(num_items=20, max_length=6, stack=stack, positions=positions)
        objective = Cloze(module=module, share=0.0, maximum=1, last=1.0)
        tx = optax.adam(1e-2)

        def draw(key, rows):
            first = jax.vmap(lambda k: jax.random.permutation(k, 20)[:5] + 1)(
                jax.random.split(key, rows)
            )
            return jnp.concatenate([first, first[:, 2:3]], axis=1)

        def step(carry, key):
            params, moments = carry
            data, own = jax.random.split(key)
            batch = {"inputs": draw(data, 32)}
            slope = jax.grad(lambda p: objective.loss(Variables(p, {}), batch, own)[0])(params)
            updates, moments = tx.update(slope, moments, params)
            return (optax.apply_updates(params, updates), moments), None

        @jax.jit
        def run(key):
            first, second, third = jax.random.split(key, 3)
            params = objective.init(first, {"inputs": draw(first, 2)}).params
            keys = jax.random.split(second, 300)
            (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
            test = draw(third, 500)
            batch = {"inputs": test.at[:, 5].set(module.mask_id), "labels": test[:, 5]}
            return objective.loss(Variables(params, {}), batch, None)[1].metrics["hr@1"].value()

        return float(run(jax.random.key(0)))

    assert accuracy(True) > 0.9
    assert accuracy(False) < 0.3
