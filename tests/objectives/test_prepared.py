"""Batches made inside the step: equal to those made outside, on any mesh, after any resume."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.data import IndexSource, Pipeline
from transfer_jax.objectives import Generated, Prepared, Regression
from transfer_jax.training import FitConfig, Layout, OptimizerConfig, fit, make_mesh


class Line(nn.Module):
    @nn.compact
    def __call__(self, inputs):
        return nn.Dense(1)(inputs)[..., 0]


def example(key, settings):
    """A point of four coordinates, of which ``settings['dims']`` are not zero, and their sum."""
    x = jax.random.normal(key, (4,)) * (jnp.arange(4) < settings["dims"])
    return {"inputs": x, "labels": x.sum()}


def widen(settings, step):
    return {"dims": jnp.where(step < 2, settings["dims"] - 2, settings["dims"])}


TASK = Generated(
    Regression(Line()), jnp.uint32(3), {"dims": jnp.int32(4)}, generate=example, schedule=widen
)
NUMBERS = Pipeline(IndexSource(), 8, repeat=True)


def test_an_example_is_a_function_of_its_seed_and_number():
    batch = TASK.batch({"index": jnp.array([5, 0, 5])})
    alone = example(jax.random.fold_in(jax.random.key(3), 5), TASK.settings)
    for name in alone:
        for row in (0, 2):
            np.testing.assert_array_equal(batch[name][row], alone[name])
    other = TASK.replace(seed=jnp.uint32(4)).batch({"index": jnp.array([5])})
    assert (np.asarray(other["inputs"]) != np.asarray(batch["inputs"][0])).all()
    kept = TASK.batch({"index": jnp.array([1]), "mask": jnp.array([0.0])})
    assert set(kept) == {"inputs", "labels", "mask"}


def test_the_schedule_holds_in_training_only():
    narrow = TASK.at(jnp.int32(1)).batch({"index": jnp.arange(3)})["inputs"]
    assert (narrow[:, 2:] == 0).all() and (narrow[:, :2] != 0).all()
    for wide in (TASK, TASK.at(jnp.int32(2))):
        assert (wide.batch({"index": jnp.arange(3)})["inputs"] != 0).all()


def test_numbers_follow_each_other_and_do_not_end():
    plan = NUMBERS.rows()
    assert NUMBERS.collate(plan(3))["index"].tolist() == list(range(24, 32))
    held_out = Pipeline(IndexSource(10), 8)
    assert [int(held_out.collate(held_out.rows()(s))["mask"].sum()) for s in range(2)] == [8, 2]
    with pytest.raises(ValueError, match="length"):
        IndexSource(2**31)


def test_training_draws_the_same_examples_on_any_number_of_devices():
    def run(devices):
        config = FitConfig(steps=4, optimizer=OptimizerConfig(learning_rate=0.1))
        layout = Layout(make_mesh(devices=jax.devices()[:devices]))
        return fit(TASK, NUMBERS, config, layout=layout).variables.params

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), run(1), run(8))


def test_windows_of_a_series_that_is_held_on_the_device():
    def windows(series, batch):
        rows = batch["start"][:, None] + jnp.arange(3)
        return {"inputs": series[rows], "labels": series[batch["start"] + 3]}

    series = jnp.arange(10.0)
    task = Prepared(Regression(Line()), series, prepare=windows)
    start = {"start": jnp.array([0, 4])}
    outside = {"inputs": jnp.array([[0.0, 1, 2], [4, 5, 6]]), "labels": jnp.array([3.0, 7])}
    variables = task.init(jax.random.key(0), start)
    inside = task.loss(variables, start, None)[0]
    np.testing.assert_allclose(inside, task.inner.loss(variables, outside, None)[0], rtol=1e-6)
    np.testing.assert_allclose(
        task.predict(variables, start), task.inner.predict(variables, outside), rtol=1e-6
    )


def test_a_batch_without_numbers_is_refused():
    with pytest.raises(ValueError, match="IndexSource"):
        TASK.batch({"inputs": jnp.zeros((2, 4))})
