"""Frozen networks with added parameters: what trains, what stays, and that LoRA is LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transfer_jax import trees
from transfer_jax.models import Bert, BertConfig, bert_stack
from transfer_jax.nn import petl
from transfer_jax.objectives import Classification, LowRank, Variables, WarmStart
from transfer_jax.objectives.petl import Adapted
from transfer_jax.training.config import OptimizerConfig
from transfer_jax.training.optimizers import make_optimizer

STACK = bert_stack(features=8, num_layers=2, num_heads=2, hidden=12, init_scale=0.3)
MODULE = Bert(BertConfig(vocab_size=13, stack=STACK, max_positions=8, head="classification"))
TASK = Classification(module=MODULE)
BATCH = {
    "inputs": jax.random.randint(jax.random.key(0), (4, 6), 0, 13),
    "labels": jnp.array([0, 1, 1, 0]),
    "lengths": jnp.array([6, 5, 3, 6]),
}
PARAMS = jax.jit(TASK.init)(jax.random.key(1), BATCH).params
START = WarmStart(inner=TASK, params=PARAMS)


def initialise(objective):
    return jax.jit(lambda objective, key: objective.init(key, BATCH))(objective, jax.random.key(2))


def test_only_the_added_parameters_and_the_head_move():
    """Ten steps with weight decay: the frozen leaves keep their bits, moments are few."""
    head = trees.partition(PARAMS, "^classifier")[1]  # the body is given, a head is drawn
    objective = Adapted.of(
        WarmStart(inner=TASK, params=head), PARAMS, petl.mam(2, 3, scale=2.0), train="^classifier"
    )
    before = jax.tree.map(np.array, objective.frozen)
    variables = first = initialise(objective)
    assert {path.split("/")[1] for path in trees.paths(first.params)} == {
        "adapter_ffn", "classifier", "prefix",
    }  # fmt: skip
    assert not np.allclose(
        first.params["full"]["classifier"]["kernel"], PARAMS["classifier"]["kernel"]
    )
    tx, _ = make_optimizer(
        OptimizerConfig(learning_rate=0.01, weight_decay=0.1, decay_mask="."), 20, first.params
    )
    state = tx.init(first.params)
    small = sum(x.size for x in jax.tree.leaves(first.params))
    assert 2 * small <= sum(x.size for x in jax.tree.leaves(state)) <= 2 * small + 4

    @jax.jit
    def step(objective, variables, state, key):
        def loss(params):
            return objective.loss(variables._replace(params=params), BATCH, key)[0]

        updates, state = tx.update(jax.grad(loss)(variables.params), state, variables.params)
        return variables._replace(params=optax.apply_updates(variables.params, updates)), state

    for i in range(10):
        variables, state = step(objective, variables, state, jax.random.key(i))
    jax.tree.map(np.testing.assert_array_equal, objective.frozen, before)
    for path, a, b in zip(
        trees.paths(first.params), jax.tree.leaves(first.params), jax.tree.leaves(variables.params)
    ):
        assert not np.array_equal(a, b), path
    evaluation = [objective.loss(variables, BATCH, None)[0] for _ in range(2)]
    assert evaluation[0] == evaluation[1]


def test_lora_in_the_layer_is_lora_in_the_weights():
    """Losses and gradients of both, and of the merged weights."""
    where = r"mlp/(up|down)"
    inside = Adapted.of(START, PARAMS, petl.lora_ffn(2, alpha=6.0, dropout=0.0))
    outside = LowRank.of(START, PARAMS, f"{where}/kernel$", rank=2, alpha=6.0)
    variables = initialise(inside)
    keys = iter(jax.random.split(jax.random.key(3), 20))
    params = jax.tree.map(lambda x: x + jax.random.normal(next(keys), x.shape), variables.params)
    drawn = initialise(outside).params
    factors = params["added"]["lora_ffn"]["stack"]
    other = jax.tree_util.tree_map_with_path(
        lambda kp, _: _at(factors, trees.path_str(kp).split("/")[2:]), drawn
    )

    def run(objective, params):
        return jax.jit(
            jax.value_and_grad(lambda p, o: o.loss(Variables(p, {}), BATCH, None)[0])
        )(params, objective)  # fmt: skip

    (a, first), (b, second) = run(inside, params), run(outside, other)
    np.testing.assert_allclose(a, b, atol=1e-5)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    merged = inside.merge(Variables(params, {}))
    np.testing.assert_allclose(TASK.loss(merged, BATCH, None)[0], a, atol=1e-5)
    np.testing.assert_allclose(
        inside.predict(Variables(params, {}), BATCH), TASK.predict(merged, BATCH), atol=1e-5
    )


def _at(tree, keys):
    for key in keys:
        tree = tree[key]
    return tree


def test_bitfit_trains_the_biases_from_where_they_are():
    objective = Adapted.of(START, PARAMS, petl.bitfit(), train="^classifier")
    variables = initialise(objective)
    names = trees.paths(variables.params["full"])
    assert set(names) == {
        path for path in trees.paths(PARAMS) if path.endswith("bias") or "classifier" in path
    }
    assert "stack/layers_0/mlp_norm/bias" in names
    jax.tree.map(np.testing.assert_array_equal, objective.backbone(variables).params, PARAMS)
    np.testing.assert_array_equal(objective.merge(variables).params["tokens"]["embedding"],
                                  PARAMS["tokens"]["embedding"])  # fmt: skip
    everything = Adapted.of(START, PARAMS, petl.full())
    assert not jax.tree.leaves(everything.frozen)


def test_folding_drops_the_network_that_makes_prefixes():
    objective = Adapted.of(START, PARAMS, petl.prefix(3, mlp=20))
    variables = initialise(objective)
    folded, small = objective.fold(variables)
    np.testing.assert_allclose(
        folded.predict(small, BATCH), objective.predict(variables, BATCH), atol=1e-6
    )
    assert sum(x.size for x in jax.tree.leaves(small.params)) == 2 * 3 * 8 * 2


def test_what_is_trained_must_exist():
    with pytest.raises(ValueError, match="Nearest paths"):
        Adapted.of(START, PARAMS, petl.bitfit(), train="^clasifier")
