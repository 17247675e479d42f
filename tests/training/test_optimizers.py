"""Optimisers from config: the groups, the decay, the schedules, against closed forms and optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transfer_jax.training.config import ConfigError, OptimizerConfig, from_dict
from transfer_jax.training.optimizers import OPTIMIZERS, make_optimizer, schedule_shape

PARAMS = {
    "layers": {"ssm": {"log_dt": jnp.ones(3)}, "kernel": jnp.full((2, 2), 2.0)},
    "head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "unused": None},
}


def first_update(config, grads=None, steps=10):
    tx, _ = make_optimizer(config, steps, PARAMS)
    grads = jax.tree.map(jnp.ones_like, PARAMS) if grads is None else grads
    return tx.update(grads, tx.init(PARAMS), PARAMS)[0]


def test_groups_have_their_own_rate_and_decay():
    config = from_dict(
        OptimizerConfig,
        {
            "learning_rate": 0.1,
            "weight_decay": 0.5,
            "groups": {"ssm": {"where": "ssm", "learning_rate": 0.001, "weight_decay": 0.0}},
            "decay_mask": "kernel",
        },
    )
    update = first_update(config)
    # Adam's first step is the sign of the gradient; decay adds wd * parameter.
    np.testing.assert_allclose(update["layers"]["ssm"]["log_dt"], -0.001, rtol=1e-4)
    np.testing.assert_allclose(update["layers"]["kernel"], -0.1 * (1 + 0.5 * 2), rtol=1e-4)
    np.testing.assert_allclose(update["head"]["bias"], -0.1, rtol=1e-4)
    assert update["head"]["unused"] is None


@pytest.mark.parametrize("name", ["adamw", "lion", "lamb", "rmsprop", "sgd"])
def test_equals_the_optax_optimizer(name):
    config = OptimizerConfig(name, 0.03, weight_decay=0.1, b1=0.9, b2=0.99)
    params = {"w": jnp.array([1.0, -2.0, 0.5])}
    peer = {
        "adamw": lambda: optax.adamw(0.03, 0.9, 0.99, weight_decay=0.1),
        "lion": lambda: optax.lion(0.03, 0.9, 0.99, weight_decay=0.1),
        "lamb": lambda: optax.lamb(0.03, 0.9, 0.99, eps=1e-8, weight_decay=0.1),
        "rmsprop": lambda: optax.chain(
            optax.scale_by_rms(0.99, 1e-8, eps_in_sqrt=False),
            optax.trace(0.9),
            optax.add_decayed_weights(0.1),
            optax.scale(-0.03),
        ),
        "sgd": lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.03, 0.9)),
    }[name]()
    ours, _ = make_optimizer(config, 10, params)
    a, b = params, params
    state_a, state_b = ours.init(a), peer.init(b)
    for i in range(3):
        grads = {"w": jnp.array([0.3, -0.1, 0.2]) * (i + 1)}
        update, state_a = ours.update(grads, state_a, a)
        a = optax.apply_updates(a, update)
        update, state_b = peer.update(grads, state_b, b)
        b = optax.apply_updates(b, update)
    np.testing.assert_allclose(a["w"], b["w"], rtol=1e-5)


def test_bert_adamw_has_no_bias_correction():
    config = OptimizerConfig(
        "bert_adamw", 0.01, weight_decay=0.5, decay_mask="kernel$", eps=1e-6, warmup_steps=1
    )
    tx, _ = make_optimizer(config, 10, PARAMS)
    grads = jax.tree.map(lambda x: jnp.full_like(x, 0.3), PARAMS)
    first, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert float(jnp.abs(first["head"]["bias"]).max()) == 0  # rate 0: only the moments move
    second = tx.update(grads, state, PARAMS)[0]
    m, v = 0.19 * 0.3, (0.001 + 0.999 * 0.001) * 0.3**2
    step = m / (np.sqrt(v) + 1e-6)
    np.testing.assert_allclose(second["head"]["bias"], -0.01 * step, rtol=1e-5)
    np.testing.assert_allclose(second["head"]["kernel"], -0.01 * (step + 0.5), rtol=1e-5)
    one = first_update(OptimizerConfig("bert_adamw", 0.01, eps=1e-6), grads)
    np.testing.assert_allclose(
        one["head"]["bias"], -0.01 * 0.1 * 0.3 / (np.sqrt(0.001) * 0.3 + 1e-6), rtol=1e-5
    )


def test_clipping_is_over_all_groups_together():
    config = from_dict(
        OptimizerConfig,
        {"name": "sgd", "b1": 0.0, "learning_rate": 1.0, "clip_norm": 1.0,
         "groups": {"ssm": {"where": "ssm", "learning_rate": 1.0}}},
    )  # fmt: skip
    update = first_update(config)
    np.testing.assert_allclose(optax.global_norm(update), 1.0, rtol=1e-5)
    config = OptimizerConfig("sgd", 1.0, b1=0.0, clip_value=0.25)
    assert float(jnp.abs(first_update(config)["head"]["bias"]).max()) == 0.25


def test_schedules_at_their_ends():
    def shape(name, **kwargs):
        return schedule_shape(OptimizerConfig(schedule=name, warmup_steps=10, **kwargs), 110)

    for name in ("constant", "cosine", "linear", "rsqrt", "plateau"):
        assert float(shape(name)(0)) == 0.0
        assert float(shape(name)(5)) == pytest.approx(0.5)
        assert float(shape(name)(10)) == pytest.approx(1.0)
    assert float(shape("cosine")(60)) == pytest.approx(0.5)
    assert float(shape("cosine")(110)) == pytest.approx(0.0, abs=1e-6)
    assert float(shape("linear", final_fraction=0.2)(110)) == pytest.approx(0.2)
    assert float(shape("rsqrt")(40)) == pytest.approx(0.5)
    with pytest.raises(ConfigError, match="not shorter than the stage"):
        schedule_shape(OptimizerConfig(warmup_steps=10), 10)


def test_one_cycle_is_that_of_torch():
    """AdamW under OneCycleLR: rates, cycled b1 and parameters, over a whole cycle."""
    torch = pytest.importorskip("torch")
    steps, peak = 17, 0.05
    config = OptimizerConfig("adamw", peak, schedule="onecycle", weight_decay=0.01)
    start = np.array([1.0, -2.0, 0.5], np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start))
    peer = torch.optim.AdamW([theirs], lr=peak, weight_decay=0.01)
    cycle = torch.optim.lr_scheduler.OneCycleLR(peer, max_lr=peak, total_steps=steps)
    params = {"w": jnp.array(start)}
    tx, rate = make_optimizer(config, steps, params)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(steps):
        assert float(rate(step)) == pytest.approx(peer.param_groups[0]["lr"], rel=1e-4)
        grad = np.sin(np.arange(3) + step).astype(np.float32)
        theirs.grad = torch.tensor(grad)
        peer.step()
        if step < steps - 1:
            cycle.step()
        changes, state = update({"w": jnp.array(grad)}, state, params)
        params = optax.apply_updates(params, changes)
        np.testing.assert_allclose(params["w"], theirs.detach(), rtol=2e-5)
    with pytest.raises(ConfigError, match="its own warm-up"):
        from_dict(OptimizerConfig, {"schedule": "onecycle", "warmup_steps": 5})


def test_a_group_that_matches_nothing_is_refused():
    config = from_dict(OptimizerConfig, {"groups": {"a": {"where": "lamda", "learning_rate": 0.1}}})
    with pytest.raises(ConfigError, match=r"lamda.*matches none.*ssm/log_dt"):
        make_optimizer(config, 10, PARAMS)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_descends(name):
    tx, _ = make_optimizer(OptimizerConfig(name, 0.05), 40, {"w": jnp.ones((2, 2))})
    params = {"w": jnp.full((2, 2), 2.0)}
    state = tx.init(params)
    for _ in range(40):
        update, state = tx.update(params, state, params)
        params = optax.apply_updates(params, update)
    assert float(jnp.abs(params["w"]).max()) < 1.5
