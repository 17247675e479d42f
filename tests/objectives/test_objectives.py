"""Objectives and their transformations: identities that define them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toy
from transfer_jax import trees
from transfer_jax.objectives import (
    Classification,
    Distilled,
    LinearFloor,
    LowRank,
    Mean,
    NextToken,
    Penalized,
    Regression,
    Trainable,
    Variables,
    WarmStart,
    losses,
)

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def batch():
    return toy.source(12).take(np.arange(12))


@pytest.fixture(scope="module")
def task():
    return toy.classifier()


@pytest.fixture(scope="module")
def variables(task, batch):
    return task.init(KEY, batch)


def shifted(params, by=0.1):
    return jax.tree.map(lambda x: x + by, params)


def tree_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def grad(objective, variables, batch):
    return jax.grad(lambda p: objective.loss(Variables(p, variables.state), batch, KEY)[0])(
        variables.params
    )


def test_cross_entropy_is_the_negative_log_softmax():
    logits = jax.random.normal(KEY, (5, 3))
    labels = jnp.array([0, 2, 1, 1, 0])
    expected = -jax.nn.log_softmax(logits)[jnp.arange(5), labels]
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), expected, rtol=1e-6)
    target = 0.9 * jax.nn.one_hot(labels, 3) + 0.1 / 3
    np.testing.assert_allclose(
        losses.cross_entropy(logits, labels, label_smoothing=0.1),
        -(target * jax.nn.log_softmax(logits)).sum(-1), rtol=1e-6,
    )  # fmt: skip


def test_temperature_kl_is_zero_on_itself_and_matches_the_logit_limit():
    student, teacher = jax.random.normal(KEY, (2, 4, 6))
    assert float(jnp.abs(losses.temperature_kl(teacher + 3.0, teacher)).max()) < 1e-6
    # For large T: T^2 KL -> the halved variance of the logit difference over the classes.
    difference = student - teacher
    limit = 0.5 * jnp.var(difference, axis=-1)
    np.testing.assert_allclose(
        losses.temperature_kl(student, teacher, temperature=30.0), limit, rtol=0.1
    )


def test_mean_ignores_whatever_padding_holds():
    values = jnp.array([1.0, jnp.nan, 3.0, jnp.inf])
    mean = Mean.of(values, jnp.array([1.0, 0.0, 1.0, 0.0]))
    assert float(mean.value()) == 2.0 and float(mean.weight) == 2.0
    assert float(Mean.of(values, jnp.zeros(4)).value()) == 0.0


def test_padded_rows_change_nothing(task, variables, batch):
    loss, aux = task.loss(variables, {**batch, "mask": np.ones(12, np.float32)}, None)
    padded = {k: np.concatenate([v, np.zeros_like(v[:4])]) for k, v in batch.items()}
    padded["mask"] = np.r_[np.ones(12), np.zeros(4)].astype(np.float32)
    loss_padded, aux_padded = task.loss(variables, padded, None)
    np.testing.assert_allclose(loss, loss_padded, rtol=1e-6)
    assert float(aux_padded.weight) == 12
    np.testing.assert_allclose(
        aux.metrics["accuracy"].value(), aux_padded.metrics["accuracy"].value()
    )


def test_labels_of_a_wrong_shape_are_refused(task, variables, batch):
    with pytest.raises(ValueError, match="do not fit labels"):
        task.loss(variables, {**batch, "labels": np.zeros((12, 2), np.int32)}, None)
    with pytest.raises(ValueError, match=r"batch\['inputs'\]"):
        task.loss(variables, {"x": batch["inputs"]}, None)


def test_state_is_updated_in_training_only(batch):
    task = Classification(module=toy.Normed())
    variables = task.init(KEY, batch)
    trained = task.loss(variables, batch, KEY)[1].state
    evaluated = task.loss(variables, batch, None)[1].state
    assert toy.leaves_equal(evaluated, variables.state)
    assert not toy.leaves_equal(trained, variables.state)
    assert jax.tree.structure(trained) == jax.tree.structure(variables.state)


def test_label_smoothing_counts_in_training_only(task, variables, batch):
    smooth = task.replace(label_smoothing=0.2)
    assert float(smooth.loss(variables, batch, None)[0]) == float(
        task.loss(variables, batch, None)[0]
    )
    assert float(smooth.loss(variables, batch, KEY)[0]) != float(
        task.loss(variables, batch, KEY)[0]
    )


class Bigram(nn.Module):
    """Logits that depend on the current token alone."""

    @nn.compact
    def __call__(self, tokens, *, lengths=None, train=False):
        return nn.Embed(7, 7)(tokens)

    def nll(self, tokens, targets, *, lengths=None, train=False):
        return losses.cross_entropy(self(tokens), targets)


def test_next_token_counts_exactly_the_valid_targets():
    task = NextToken(module=Bigram())
    tokens = jax.random.randint(KEY, (3, 6), 0, 7)
    batch = {"inputs": tokens, "lengths": jnp.array([6, 3, 1])}
    variables = task.init(KEY, batch)
    loss, aux = task.loss(variables, batch, None)
    table = variables.params["Embed_0"]["embedding"]
    expected = [
        -jax.nn.log_softmax(table[tokens[b, i]])[tokens[b, i + 1]]
        for b, length in enumerate((6, 3, 1))
        for i in range(length - 1)
    ]
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-6)
    assert float(aux.weight) == len(expected)
    np.testing.assert_allclose(aux.metrics["bits"].value(), loss / np.log(2), rtol=1e-6)
    direct = NextToken(module=Bigram(), use_nll=True)
    np.testing.assert_allclose(
        direct.loss(direct.init(KEY, batch), batch, None)[0], loss, rtol=1e-6
    )
    with pytest.raises(ValueError, match="windows of at least two"):
        task.loss(variables, {"inputs": tokens[:, :1]}, None)


def test_regression_is_the_mean_squared_error():
    class Scale(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x * self.param("w", nn.initializers.ones, ())

    task = Regression(module=Scale())
    batch = {"inputs": jnp.arange(6.0).reshape(3, 2), "labels": jnp.zeros((3, 2))}
    loss, _ = task.loss(task.init(KEY, batch), batch, None)
    np.testing.assert_allclose(loss, jnp.mean(jnp.arange(6.0) ** 2), rtol=1e-6)


class TestWarmStart:
    def test_given_leaves_are_used_and_the_rest_drawn(self, task, variables, batch):
        body, _ = trees.partition(shifted(variables.params), "body")
        start = WarmStart(inner=task, params=body).init(KEY, batch).params
        assert toy.leaves_equal(start["body"], shifted(variables.params)["body"])
        assert toy.leaves_equal(start["head"], task.init(KEY, batch).params["head"])

    def test_release_drops_the_arrays(self, task, variables):
        objective = WarmStart(inner=task, params=variables.params)
        assert objective.release() == task
        nested = Penalized(inner=objective, anchor=variables.params)
        assert nested.release().inner == task

    def test_what_loads_nothing_or_does_not_fit_raises(self, task, variables, batch):
        nothing = jax.tree.map(lambda x: None, variables.params)
        with pytest.raises(ValueError, match="nothing would be loaded"):
            WarmStart(inner=task, params=nothing).init(KEY, batch)
        with pytest.raises(ValueError, match="does not have"):
            WarmStart(inner=task, params={"tail": {"kernel": jnp.ones(3)}}).init(KEY, batch)
        wrong = {"head": {"kernel": jnp.ones((3, 3)), "bias": None}}
        with pytest.raises(ValueError, match=r"head/kernel.*\(3, 3\)"):
            WarmStart(inner=task, params=wrong).init(KEY, batch)


class TestTrainable:
    def test_frozen_leaves_have_no_gradient_and_the_loss_is_the_same(self, task, variables, batch):
        objective = Trainable.of(
            WarmStart(inner=task, params=variables.params), variables.params, "head"
        )
        mine = objective.init(KEY, batch)
        assert trees.paths(mine.params) == ["head/bias", "head/kernel"]
        np.testing.assert_array_equal(
            objective.loss(mine, batch, KEY)[0], task.loss(variables, batch, KEY)[0]
        )
        gradient = grad(objective, mine, batch)
        assert trees.paths(gradient) == ["head/bias", "head/kernel"]
        full = grad(task, variables, batch)
        np.testing.assert_allclose(gradient["head"]["kernel"], full["head"]["kernel"], rtol=1e-6)

    def test_foreign_leaves_and_empty_choices_raise(self, task, variables, batch):
        with pytest.raises(ValueError, match="matches none"):
            Trainable.of(task, variables.params, "tail")
        with pytest.raises(ValueError, match="not parameters"):
            Trainable(inner=task, frozen={"x": jnp.ones(2)}).init(KEY, batch)


class TestLowRank:
    def test_starts_at_the_base_and_counts_its_parameters(self, task, variables, batch):
        objective = LowRank.of(task, variables.params, "body/kernel", rank=2)
        mine = objective.init(KEY, batch)
        assert sum(x.size for x in jax.tree.leaves(mine.params)) == 2 * (16 + 32)
        np.testing.assert_allclose(
            objective.predict(mine, batch), task.predict(variables, batch), rtol=1e-6
        )

    def test_equals_the_merged_weights(self, task, variables, batch):
        objective = LowRank.of(task, variables.params, "kernel", rank=2, alpha=6.0)
        mine = objective.init(KEY, batch)
        mine = Variables(shifted(mine.params), mine.state)
        factors = mine.params["factors"]["head"]["kernel"]
        merged = objective.inner_variables(mine)
        np.testing.assert_allclose(
            merged.params["head"]["kernel"],
            variables.params["head"]["kernel"] + 3.0 * factors["a"] @ factors["b"], rtol=1e-5,
        )  # fmt: skip
        np.testing.assert_allclose(
            objective.predict(mine, batch), task.predict(merged, batch), rtol=1e-5
        )

    def test_a_full_rank_change_reaches_any_matrix(self, task, variables, batch):
        objective = LowRank.of(task, variables.params, "head/kernel", rank=4)
        mine = objective.init(KEY, batch)
        target = jax.random.normal(KEY, (32, 4))
        factors = {"a": target - variables.params["head"]["kernel"], "b": jnp.eye(4)}
        params = {**mine.params, "factors": {**mine.params["factors"], "head":
                  {"bias": None, "kernel": factors}}}  # fmt: skip
        inner = objective.inner_params(params)
        np.testing.assert_allclose(inner["head"]["kernel"], target, atol=1e-5)

    def test_full_leaves_are_trained_beside_the_factors(self, task, variables, batch):
        objective = LowRank.of(task, variables.params, "body/kernel", rank=2, train="head")
        mine = objective.init(KEY, batch)
        gradient = grad(objective, mine, batch)
        assert float(jnp.abs(gradient["full"]["head"]["kernel"]).max()) > 0
        with pytest.raises(ValueError, match="both adapted"):
            LowRank.of(task, variables.params, "kernel", train="head")
        with pytest.raises(ValueError, match="matches none"):
            LowRank.of(task, variables.params, "query")


class TestPenalized:
    def test_is_zero_at_the_anchor_and_quadratic_away_from_it(self, task, variables, batch):
        objective = Penalized(inner=task, anchor=variables.params, strength=3.0)
        loss = task.loss(variables, batch, KEY)[0]
        assert float(objective.loss(variables, batch, KEY)[0]) == float(loss)
        count = sum(x.size for x in jax.tree.leaves(variables.params))
        moved = Variables(shifted(variables.params, 0.2), variables.state)
        penalty = objective.loss(moved, batch, KEY)[1].metrics["penalty"].value()
        np.testing.assert_allclose(penalty, 0.5 * 0.2**2 * count, rtol=1e-4)
        np.testing.assert_allclose(
            objective.loss(moved, batch, KEY)[0],
            task.loss(moved, batch, KEY)[0] + 3.0 * penalty, rtol=1e-5,
        )  # fmt: skip

    def test_fisher_weights_the_directions(self, task, variables, batch):
        fisher = jax.tree.map(jnp.zeros_like, variables.params)
        fisher["head"]["bias"] = jnp.arange(4.0)
        objective = Penalized(inner=task, anchor=variables.params, fisher=fisher)
        moved = shifted(variables.params, 1.0)
        np.testing.assert_allclose(objective.penalty(moved), 0.5 * 6.0, rtol=1e-6)
        gradient = jax.grad(objective.penalty)(moved)
        np.testing.assert_allclose(gradient["head"]["bias"], jnp.arange(4.0), rtol=1e-5)
        assert not np.any(gradient["body"]["kernel"])

    def test_the_strength_follows_its_schedule(self, task, variables):
        schedule = LinearFloor(initial=0.9, floor=0.2, steps_per_epoch=10, epochs=20)
        objective = Penalized(inner=task, anchor=variables.params, schedule=schedule)
        strengths = [
            float(jax.jit(lambda o, s: o.at(s).strength)(objective, step))
            for step in (0, 9, 10, 155, 160, 10_000)
        ]
        # The floor is reached in epoch 16: 0.9 (1 - 15 / 20) = 0.225, then 0.18.
        np.testing.assert_allclose(strengths, [0.9, 0.9, 0.855, 0.225, 0.2, 0.2], rtol=1e-6)
        assert objective.strength == 1.0
        nested = Penalized(inner=objective, anchor=variables.params).at(jnp.int32(10))
        assert float(nested.inner.strength) == pytest.approx(0.855)

    def test_the_proximal_step_takes_the_place_of_the_gradient(self, task, variables, batch):
        moved = Variables(shifted(variables.params, 0.2), variables.state)
        gradient = Penalized(inner=task, anchor=variables.params, strength=3.0)
        proximal = gradient.replace(penalty_step="proximal")

        def of(objective):
            return jax.value_and_grad(
                lambda p: objective.loss(Variables(p, moved.state), batch, KEY)[0]
            )(moved.params)

        assert float(of(proximal)[0]) == float(of(gradient)[0])
        tree_close(of(proximal)[1], of(task)[1])
        # One step from theta to (theta + r l anchor) / (1 + r l), and nothing in the other form.
        after = proximal.proximal(moved.params, jnp.float32(0.5))
        expected = jax.tree.map(lambda a, t: (t + 1.5 * a) / 2.5, variables.params, moved.params)
        tree_close(after, expected)
        assert gradient.proximal(moved.params, jnp.float32(0.5)) is moved.params

    def test_the_proximal_step_is_the_limit_of_small_gradient_steps(self, task, variables):
        # theta' = lambda F (anchor - theta) over the time r, and implicitly in one step.
        fisher = jax.tree.map(lambda x: jnp.full_like(x, 2.0), variables.params)
        objective = Penalized(inner=task, anchor=variables.params, fisher=fisher, strength=5.0)
        proximal = objective.replace(penalty_step="proximal")
        start = shifted(variables.params, 1.0)
        rate = 1e-3
        params = start
        one = jax.jit(lambda p: proximal.proximal(p, jnp.float32(rate)))
        gradient = jax.jit(jax.grad(objective.penalty))
        for _ in range(100):
            params = one(params)
        flow = start
        for _ in range(100):
            flow = jax.tree.map(lambda p, g: p - rate * 5.0 * g, flow, gradient(flow))
        tree_close(params, flow, rtol=0.02, atol=0.01)
        held = proximal.replace(strength=1e30).proximal(start, jnp.float32(0.1))
        tree_close(held, variables.params)

    def test_an_unknown_form_of_the_step_raises(self, task, variables, batch):
        objective = Penalized(inner=task, anchor=variables.params, penalty_step="prox")
        with pytest.raises(ValueError, match="'gradient' or 'proximal'"):
            objective.loss(variables, batch, KEY)

    def test_an_empty_anchor_raises(self, task, variables, batch):
        with pytest.raises(ValueError, match="nothing would be protected"):
            Penalized(inner=task).loss(variables, batch, KEY)

    def test_the_order_of_nesting_means_something(self, task, variables, batch):
        lora = LowRank.of(task, variables.params, "body/kernel", rank=2)
        factors = lora.init(KEY, batch)
        protects_factors = Penalized(inner=lora, anchor=factors.params)
        protects_weights = LowRank.of(
            Penalized(inner=task, anchor=variables.params), variables.params, "body/kernel", rank=2
        )
        moved = Variables(shifted(factors.params, 0.3), factors.state)
        a = moved.params["factors"]["body"]["kernel"]
        merged = lora.inner_params(moved.params)["body"]["kernel"]
        expected_weights = 0.5 * jnp.sum((merged - variables.params["body"]["kernel"]) ** 2)
        np.testing.assert_allclose(
            protects_weights.loss(moved, batch, KEY)[1].metrics["penalty"].value(),
            expected_weights, rtol=1e-5,
        )  # fmt: skip
        expected_factors = 0.5 * 0.3**2 * sum(x.size for x in jax.tree.leaves(a))
        np.testing.assert_allclose(
            protects_factors.loss(moved, batch, KEY)[1].metrics["penalty"].value(),
            expected_factors, rtol=1e-4,
        )  # fmt: skip


class TestDistilled:
    def test_limits_and_gradient(self, task, variables, batch):
        teacher = Variables(shifted(variables.params, 0.5), variables.state)
        make = lambda weight: Distilled(  # noqa: E731
            inner=task, teacher=task, teacher_variables=teacher, weight=weight, temperature=2.0
        )
        loss = task.loss(variables, batch, KEY)[0]
        np.testing.assert_allclose(make(0.0).loss(variables, batch, KEY)[0], loss, rtol=1e-6)
        logits = task.predict(variables, batch), task.predict(teacher, batch)
        distance = losses.temperature_kl(*logits, temperature=2.0).mean()
        np.testing.assert_allclose(make(1.0).loss(variables, batch, KEY)[0], distance, rtol=1e-5)
        assert float(distance) > 0
        # A student that is its teacher's copy sits at a minimum of the distance.
        flat = jax.tree.leaves(grad(make(1.0), teacher, batch))
        assert max(float(jnp.abs(g).max()) for g in flat) < 1e-6

    def test_one_forward_pass_of_the_student(self, batch):
        dropped = toy.classifier(rate=0.5)
        variables = dropped.init(KEY, batch)
        objective = Distilled(
            inner=dropped, teacher=dropped, teacher_variables=variables, weight=1.0
        )
        _, aux = objective.loss(variables, batch, KEY)
        # The compared logits are those of the pass with dropout, not of a second, clean one.
        assert float(aux.metrics["distance"].value()) > 1e-3
        assert float(objective.loss(variables, batch, None)[1].metrics["distance"].value()) < 1e-6

    def test_unequal_logits_raise(self, task, variables, batch):
        class Wide(nn.Module):
            @nn.compact
            def __call__(self, x, train=False):
                return nn.Dense(5)(x)

        teacher = Classification(module=Wide())
        objective = Distilled(
            inner=task, teacher=teacher, teacher_variables=teacher.init(KEY, batch)
        )
        with pytest.raises(ValueError, match="must agree"):
            objective.loss(variables, batch, KEY)


def test_carried_arrays_are_arguments_not_constants(task, variables, batch):
    objective = Penalized(inner=task, anchor=variables.params)
    jaxpr = jax.make_jaxpr(lambda o, v, b: o.loss(v, b, KEY)[0])(objective, variables, batch)
    big = [c for c in jaxpr.consts if getattr(c, "size", 0) > 16]
    assert not big
    compiled = jax.jit(lambda o, v, b: o.loss(v, b, KEY)[0])
    compiled(objective, variables, batch)
    compiled(objective.replace(strength=2.0), variables, batch)
    assert compiled._cache_size() == 1
