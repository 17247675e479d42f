"""The training loop: what it computes does not depend on how it is run."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import toy
from transfer_jax.objectives import Classification, Objective, Penalized, Trainable, Variables
from transfer_jax.objectives.base import Aux, Mean
from transfer_jax.training import Layout, NonFiniteError, evaluate, fit, make_mesh
from transfer_jax.training.checkpoint import CheckpointError, load_variables
from transfer_jax.training.config import ConfigError, FitConfig, OptimizerConfig
from transfer_jax.training.loop import TrainState, make_step
from transfer_jax.training.sharding import bytes_per_device


def config(steps=20, **kwargs):
    optimizer = {"learning_rate": 1e-2, "schedule": "cosine", "warmup_steps": 2}
    optimizer |= kwargs.pop("optimizer", {})
    return FitConfig(steps=steps, log_every=5, optimizer=OptimizerConfig(**optimizer), **kwargs)


def layout(devices=1, **sizes):
    return Layout(make_mesh(sizes or None, jax.devices()[:devices]), min_size=64)


def lines(path):
    """metrics.jsonl without what the clock decides."""
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in records]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """One device, uninterrupted."""
    path = tmp_path_factory.mktemp("reference")
    result = fit(
        toy.classifier(rate=0.1), toy.train_data(), config(eval_every=10, checkpoint_every=10),
        layout=layout(), evaluate={"validation": toy.eval_data()}, workdir=path,
    )  # fmt: skip
    return result, path


def test_it_learns_and_reports(reference):
    result, path = reference
    written = lines(path)
    assert [r["step"] for r in written] == [5, 10, 10, 15, 20, 20]
    losses = [r["train/loss"] for r in written if "train/loss" in r]
    assert losses[-1] < losses[0]
    assert result.metrics["validation/accuracy"] == written[-1]["validation/accuracy"]
    assert result.summary["parameters"] == 16 * 32 + 32 + 32 * 4 + 4
    rate = [r["train/learning_rate"] for r in written if "train/loss" in r]
    assert rate[0] == pytest.approx(1e-2 * 0.5 * (1 + np.cos(np.pi * 2 / 18)), rel=1e-5)
    assert (path / "metrics.csv").exists() and list((path / "tensorboard").iterdir())
    assert "params/body/kernel" in (path / "layout.txt").read_text()


@pytest.mark.parametrize(
    "sizes", [{"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "model": 2}]
)
def test_eight_devices_match_one(reference, tmp_path, sizes):
    """Data parallel, fully sharded, and mixed meshes give the losses of one device."""
    result = fit(
        toy.classifier(rate=0.1), toy.train_data(), config(eval_every=10),
        layout=layout(8, **sizes), evaluate={"validation": toy.eval_data()}, workdir=tmp_path,
    )  # fmt: skip
    for ours, theirs in zip(lines(tmp_path), lines(reference[1]), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-5, atol=1e-6)
    for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(reference[0].params)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_fsdp_divides_parameters_and_optimizer_state(tmp_path):
    """Bytes per device fall to about 1/n, and the table says so."""
    held = {}
    for n in (1, 8):
        from transfer_jax.training.optimizers import make_optimizer

        place = layout(n, data=1, fsdp=n)
        variables = place.place(
            toy.classifier().init(jax.random.key(0), toy.source(4).take([0, 1]))
        )
        tx, _ = make_optimizer(OptimizerConfig(), 10, variables.params)
        shapes = jax.eval_shape(tx.init, variables.params)
        state = jax.jit(tx.init, out_shardings=place.optimizer_shardings(shapes, variables.params))(
            variables.params
        )
        held[n] = bytes_per_device((variables, state))
    biases = 3 * 4 * (32 + 4) + 4  # too small to split
    assert held[8] <= held[1] / 8 + biases
    fit(toy.classifier(), toy.train_data(), config(steps=3), layout=layout(8, data=1, fsdp=8),
        workdir=tmp_path)  # fmt: skip
    table = (tmp_path / "layout.txt").read_text()
    row = next(line for line in table.splitlines() if line.startswith("params/body/kernel"))
    assert "fsdp" in row and row.split()[-1] == f"{16 * 32 * 4 // 8}"
    total = int(table.splitlines()[-1].split()[-1].replace(",", ""))
    assert total <= held[8] + 64


class Broken(Exception):
    pass


class Failing:
    """Training data that breaks after some batches, as a killed process would."""

    def __init__(self, data, after):
        self.data, self.after = data, after

    def example_batch(self):
        return self.data.example_batch()

    def iterator(self, *args):
        inner = self.data.iterator(*args)
        outer = self

        class Iterator:
            count = 0

            def __next__(self):
                self.count += 1
                if self.count > outer.after:
                    raise Broken
                return next(inner)

            get_state, set_state, close = inner.get_state, inner.set_state, inner.close

        return Iterator()


@pytest.mark.parametrize("after", [4, 13, 17])
def test_resumed_equals_uninterrupted_bit_for_bit(reference, tmp_path, after):
    run = lambda data: fit(  # noqa: E731
        toy.classifier(rate=0.1), data, config(eval_every=10, checkpoint_every=10),
        layout=layout(), evaluate={"validation": toy.eval_data()}, workdir=tmp_path,
    )  # fmt: skip
    with pytest.raises(Broken):
        run(Failing(toy.train_data(), after))
    result = run(toy.train_data())
    assert toy.leaves_equal(result.variables, reference[0].variables)
    assert lines(tmp_path) == lines(reference[1])
    assert result.metrics == reference[0].metrics


def test_variables_can_be_read_without_the_objective(reference):
    variables = load_variables(reference[1])
    assert toy.leaves_equal(variables.params, reference[0].variables.params)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_variables(reference[1] / "nothing")


def test_a_finished_stage_is_read_not_trained(reference):
    again = fit(
        toy.classifier(rate=0.1), Failing(toy.train_data(), 0),
        config(eval_every=10, checkpoint_every=10), layout=layout(), workdir=reference[1],
    )  # fmt: skip
    assert toy.leaves_equal(again.variables, reference[0].variables)
    assert again.metrics == reference[0].metrics


def test_resume_on_another_mesh(reference, tmp_path):
    """A checkpoint of one device goes on, sharded, on eight."""
    with pytest.raises(Broken):
        fit(toy.classifier(rate=0.1), Failing(toy.train_data(), 12), config(checkpoint_every=10),
            layout=layout(), workdir=tmp_path)  # fmt: skip
    result = fit(
        toy.classifier(rate=0.1), toy.train_data(), config(checkpoint_every=10),
        layout=layout(8, data=2, fsdp=4), workdir=tmp_path,
    )  # fmt: skip
    assert "fsdp" in str(result.params["body"]["kernel"].sharding.spec)
    for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(reference[0].params)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def damage(checkpoint):
    for file in (checkpoint / "variables").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_damaged_checkpoint_falls_back_to_the_one_before(reference, tmp_path, caplog):
    settings = config(checkpoint_every=5)
    with pytest.raises(Broken):
        fit(toy.classifier(rate=0.1), Failing(toy.train_data(), 18), settings, layout=layout(),
            workdir=tmp_path)  # fmt: skip
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["10", "15"]
    damage(tmp_path / "checkpoints" / "15")
    with caplog.at_level(logging.WARNING):
        result = fit(toy.classifier(rate=0.1), toy.train_data(), settings, layout=layout(),
                     workdir=tmp_path)  # fmt: skip
    assert "step 15" in caplog.text and "trying the one before" in caplog.text
    assert toy.leaves_equal(result.variables, reference[0].variables)
    assert (tmp_path / "checkpoints" / "15.damaged").exists()


def test_only_damaged_checkpoints_stop_with_the_cause(reference, tmp_path):
    shutil.copytree(reference[1], tmp_path / "copy")
    for step in ("10", "20"):
        damage(tmp_path / "copy" / "checkpoints" / step)
    with pytest.raises(CheckpointError, match=r"none of the checkpoints .* step 20.*step 10"):
        fit(toy.classifier(rate=0.1), toy.train_data(), config(eval_every=10, checkpoint_every=10),
            layout=layout(), workdir=tmp_path / "copy")  # fmt: skip


class Exploding(Objective):
    """A parabola whose loss is NaN from the third step on; counts its steps in the state."""

    def init(self, rng, batch):
        return Variables({"w": jnp.ones(3)}, {"count": jnp.int32(0)})

    def loss(self, variables, batch, rng):
        count = variables.state["count"]
        spoiled = jnp.where(count >= 12, jnp.nan, 1.0)
        loss = jnp.sum(variables.params["w"] ** 2)
        metrics = {"spoiled": Mean.of(spoiled), "fine": Mean.of(loss)}
        return loss, Aux({"count": count + 1}, metrics)


def test_a_non_finite_metric_stops_there_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(NonFiniteError, match=r"spoiled became NaN or infinite at step 13.*step 12"):
        fit(Exploding(), toy.train_data(), config(steps=100, checkpoint_every=4),
            layout=layout(), workdir=tmp_path)  # fmt: skip
    assert max(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) <= 12
    assert not (tmp_path / "summary.json").exists()
    assert all(r["step"] <= 12 for r in lines(tmp_path))


def test_the_first_bad_step_is_remembered():
    """However late the host looks."""
    place = layout()
    step = jax.jit(make_step(optax.sgd(0.1), config(), place))
    state = TrainState(
        step=jnp.int32(10), variables=Variables({"w": jnp.ones(3)}, {"count": jnp.int32(10)}),
        opt_state=optax.sgd(0.1).init({"w": jnp.ones(3)}), ema=None, lr_scale=jnp.float32(1),
        sums=jnp.zeros((4, 2)), bad_step=jnp.int32(-1), bad=jnp.zeros(4, bool),
    )  # fmt: skip
    batch = toy.train_data().example_batch()
    seen = []
    for _ in range(6):
        state, report = step(state, Exploding(), batch, jax.random.key(0))
        seen.append(int(report.bad_step))
    assert seen == [-1, -1, 12, 12, 12, 12]
    assert report.bad.tolist() == [False, False, False, True]


class Masked:
    """Training data with unequal numbers of real rows."""

    def __init__(self):
        self.data = toy.train_data()

    def mask(self, batch):
        return {**batch, "mask": (np.arange(32) % 7 != 0).astype(np.float32)}

    def example_batch(self):
        return self.mask(self.data.example_batch())

    def iterator(self, *args):
        inner, outer = self.data.iterator(*args), self

        class Iterator:
            def __next__(self):
                return outer.mask(next(inner))

            get_state, set_state, close = inner.get_state, inner.set_state, inner.close

        return Iterator()


def test_accumulated_microbatches_are_the_whole_batch():
    """Weighted by content: the microbatches have unequal numbers of real rows."""
    whole, parts = (
        fit(toy.classifier(), Masked(), config(steps=5, accumulate=n), layout=layout(2))
        for n in (1, 4)
    )
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_frozen_parameters_cost_no_optimizer_state_and_no_share_of_the_norm(tmp_path):
    task = toy.classifier()
    variables = task.init(jax.random.key(0), toy.source(4).take([0, 1]))
    objective = Trainable.of(task, variables.params, "head")
    result = fit(objective, toy.train_data(), config(steps=3, checkpoint_every=3),
                 layout=layout(), workdir=tmp_path)  # fmt: skip
    table = (tmp_path / "layout.txt").read_text()
    moments = [
        line for line in table.splitlines() if line.startswith("optimizer/") and "/mu/" in line
    ]
    assert len(moments) == 2 and all("head" in line for line in moments)
    assert "carried/frozen/body/kernel" in table
    assert result.summary["parameters"] == 32 * 4 + 4
    head = lambda p: task.loss(  # noqa: E731
        Variables({**variables.params, "head": p}, {}), toy.train_data().example_batch(), None
    )[0]
    start = objective.init(jax.random.split(jax.random.key(0))[0], toy.source(1).take([0]))
    norm = jnp.sqrt(
        sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(head)(start.params["head"])))
    )
    one = fit(objective, toy.train_data(), FitConfig(steps=1, log_every=1), layout=layout(),
              workdir=tmp_path / "one")  # fmt: skip
    assert one.summary["steps"] == 1
    np.testing.assert_allclose(lines(tmp_path / "one")[0]["train/grad_norm"], norm, rtol=1e-4)


def test_the_average_is_the_recursion(tmp_path):
    """SGD at rate r on a fixed objective: the mean of the iterates by hand."""

    class Line(Objective):
        def init(self, rng, batch):
            return Variables({"w": jnp.zeros(())}, {})

        def loss(self, variables, batch, rng):
            return variables.params["w"], Aux({}, {})

    settings = FitConfig(
        steps=4, ema_decay=0.5, log_every=2, optimizer=OptimizerConfig("sgd", 1.0, b1=0.0)
    )
    result = fit(Line(), toy.train_data(), settings, layout=layout(), workdir=tmp_path)
    mean = 0.0
    for w in (-1.0, -2.0, -3.0, -4.0):
        mean = 0.5 * mean + 0.5 * w
    assert float(result.params["w"]) == mean
    again = fit(Line(), toy.train_data(), settings, layout=layout(), workdir=tmp_path)
    assert float(again.params["w"]) == mean


class Parabola(Objective):
    """w goes down by the learning rate each step; the metric is best at w = -3."""

    def init(self, rng, batch):
        return Variables({"w": jnp.zeros(())}, {})

    def loss(self, variables, batch, rng):
        w = variables.params["w"]
        return w, Aux({}, {"score": Mean.of(-((w + 3.0) ** 2))})


def test_selection_patience_and_resume_keep_the_best(tmp_path):
    settings = FitConfig(
        steps=30, eval_every=1, log_every=1, checkpoint_every=2, monitor="v/score",
        select_best=True, patience=4, optimizer=OptimizerConfig("sgd", 1.0, b1=0.0),
    )  # fmt: skip
    data = {"v": toy.eval_data(size=32)}
    with pytest.raises(Broken):
        fit(Parabola(), Failing(toy.train_data(), 5), settings, layout=layout(), evaluate=data,
            workdir=tmp_path)  # fmt: skip
    result = fit(Parabola(), toy.train_data(), settings, layout=layout(), evaluate=data,
                 workdir=tmp_path)  # fmt: skip
    assert float(result.params["w"]) == -3.0 and result.metrics["v/score"] == 0.0
    assert result.summary["steps"] == 7  # the best at step 3, then four without improvement
    again = fit(Parabola(), toy.train_data(), settings, layout=layout(), workdir=tmp_path)
    assert float(again.params["w"]) == -3.0


def test_plateau_cuts_the_rate():
    settings = FitConfig(
        steps=8, eval_every=1, log_every=1, monitor="v/score",
        optimizer=OptimizerConfig(
            "sgd", 1.0, "plateau", b1=0.0, plateau_factor=0.5, plateau_patience=1
        ),
    )  # fmt: skip
    result = fit(Parabola(), toy.train_data(), settings, layout=layout(),
                 evaluate={"v": toy.eval_data(size=32)})  # fmt: skip
    # Best at step 3; cuts after steps 5 and 7: -1 * 5 - 0.5 * 2 - 0.25.
    assert float(result.params["w"]) == -6.25


def test_evaluation_is_exact_over_a_padded_last_batch():
    task = toy.classifier()
    everything = toy.source(100, 1).take(np.arange(100))
    variables = task.init(jax.random.key(0), everything)
    values = evaluate(task, variables, toy.eval_data(batch_size=32, size=100), layout(4))
    loss, aux = task.loss(variables, everything, None)
    np.testing.assert_allclose(values["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(values["accuracy"], aux.metrics["accuracy"].value(), rtol=1e-6)


def test_batch_statistics_are_global():
    """Two devices normalise with the statistics of the whole batch, as one does."""
    runs = [
        fit(Classification(module=toy.Normed()), toy.train_data(), config(steps=4),
            layout=layout(n)) for n in (1, 8)
    ]  # fmt: skip
    for a, b in zip(jax.tree.leaves(runs[0].variables), jax.tree.leaves(runs[1].variables)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_the_objective_given_survives(tmp_path):
    """Donation must not reach arrays of the caller: anchor and start are used again."""
    task = toy.classifier()
    variables = task.init(jax.random.key(0), toy.source(4).take([0, 1]))
    from transfer_jax.objectives import WarmStart

    objective = Penalized(
        inner=WarmStart(inner=task, params=variables.params), anchor=variables.params
    )
    first, second = (
        fit(objective, toy.train_data(), config(steps=3), layout=layout()) for _ in range(2)
    )
    assert toy.leaves_equal(first.params, second.params)
    assert float(jax.tree.leaves(variables.params)[0].sum()) == 0.0  # still readable


def test_impossible_batches_and_monitors_are_refused():
    with pytest.raises(ConfigError, match=r"batch of 30 .* multiple of 8"):
        fit(toy.classifier(), toy.train_data(batch_size=30), config(), layout=layout(8))
    with pytest.raises(ConfigError, match=r"multiple of 16"):
        fit(toy.classifier(), toy.train_data(batch_size=24), config(accumulate=2), layout=layout(8))
    settings = FitConfig(steps=2, monitor="v/acuracy", select_best=True)
    with pytest.raises(ConfigError, match=r"v/acuracy.*v/accuracy"):
        fit(toy.classifier(), toy.train_data(), settings, layout=layout(),
            evaluate={"v": toy.eval_data()})  # fmt: skip
