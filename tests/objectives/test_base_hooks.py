"""``at`` and ``proximal``: what an objective does to itself and to the parameters in each step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from transfer_jax import trees
from transfer_jax.objectives import Aux, Objective, Trainable, Variables, WarmStart
from transfer_jax.training.config import FitConfig, OptimizerConfig
from transfer_jax.training.loop import Report, TrainState, make_step
from transfer_jax.training.sharding import Layout, make_mesh


class Ramp(Objective):
    """The loss is ``slope * sum(params)``, and the slope at step t is t + 1; clipped at -5."""

    slope: jax.Array | float = 0.0

    def init(self, rng, batch):
        return Variables({"a": jnp.zeros(2), "b": jnp.zeros(3)}, {})

    def loss(self, variables, batch, rng):
        total = sum(x.sum() for x in jax.tree.leaves(variables.params))
        return self.slope * total, Aux(variables.state, {}, 1.0)

    def at(self, step):
        return self.replace(slope=step + 1.0)

    def proximal(self, params, learning_rate):
        return jax.tree.map(lambda x: jnp.maximum(x, -5.0 * learning_rate), params)


def steps(objective, count, rate=0.5):
    config = FitConfig(
        steps=10, optimizer=OptimizerConfig(name="sgd", b1=0.0, learning_rate=rate, clip_norm=0.0)
    )
    tx = optax.sgd(rate)
    batch = {"inputs": jnp.zeros((8, 1))}
    variables = objective.init(jax.random.key(0), batch)
    state = TrainState(
        step=jnp.int32(0), variables=variables, opt_state=tx.init(variables.params), ema=None,
        lr_scale=jnp.float32(1), sums=jnp.zeros((2, 2)), bad_step=jnp.int32(-1),
        bad=jnp.zeros(2, bool),
    )  # fmt: skip
    step = jax.jit(make_step(tx, config, Layout(make_mesh())))
    for _ in range(count):
        state, report = step(state, objective, batch, jax.random.key(1))
        assert isinstance(report, Report)
    return state.variables.params


def test_coefficients_follow_the_step_and_the_map_follows_the_update():
    # Slopes 1, 2, 3 at rate 0.5: -0.5, -1.5, then -3.0, which the map lifts to -2.5.
    np.testing.assert_allclose(steps(Ramp(), 2)["a"], -1.5)
    np.testing.assert_allclose(steps(Ramp(), 3)["a"], -2.5)


def test_a_trainable_subset_keeps_the_inner_map_and_its_frozen_leaves():
    given = {"a": jnp.full(2, -9.0), "b": jnp.zeros(3)}
    objective = Trainable.of(WarmStart(inner=Ramp(), params=given), given, "^b")
    params = steps(objective, 3)
    assert trees.paths(params) == ["b"]
    np.testing.assert_allclose(params["b"], -2.5)
