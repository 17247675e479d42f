"""aTLAS: composition, gradients and memory, selection, adapters, unlabelled data, the recipe."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transfer_jax import trees
from transfer_jax.configuration import ConfigError, apply_overrides, get_config, list_configs
from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.sources import ArraySource
from transfer_jax.models import ResidualMLP, VisionTransformer
from transfer_jax.objectives import Variables, WarmStart
from transfer_jax.papers import atlas
from transfer_jax.papers.atlas import (
    AnisotropicScaling,
    EmbeddingClassification,
    LinearizedClassification,
    TipAdapter,
    UnsupervisedFixMatch,
)
from transfer_jax.training import Experiment, FitConfig, Layout, OptimizerConfig, fit, make_mesh
from transfer_jax.training.aot import lower_step

NAMES = ("one", "two", "three")


def tree_close(a, b, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), a, b)


def gradient_of(loss):
    """As one program."""
    return jax.jit(jax.grad(loss))


@pytest.fixture(scope="module")
def world():
    """An encoder, a base, three task vectors, a head and a batch."""
    module = ResidualMLP(embedding=5, features=6, depth=2)
    rng = np.random.default_rng(0)
    heads = rng.normal(size=(1, 4, 5))
    heads = jnp.asarray(heads / np.linalg.norm(heads, axis=-1, keepdims=True), jnp.float32)
    task = EmbeddingClassification(module=module, heads=heads, scale=5.0)
    batch = {
        "inputs": jnp.asarray(rng.uniform(size=(8, 3, 3, 1)), jnp.float32),
        "labels": jnp.asarray(rng.integers(0, 4, 8)),
    }
    base = jax.jit(task.init)(jax.random.key(0), batch).params
    vectors = {
        name: trees.map_with_path(
            lambda path, x, i=i: 0.3 * jax.random.normal(
                trees.leaf_key(jax.random.key(i), path), x.shape
            ),
            base,
        )
        for i, name in enumerate(NAMES)
    }  # fmt: skip
    return task, base, vectors, batch


def scaled(world, **options):
    task, base, vectors, _ = world
    return AnisotropicScaling.of(task, base, vectors, **options)


def some(coefficients, seed=0):
    """Random coefficients of the given structure."""
    return trees.map_with_path(
        lambda path, c: jax.random.normal(trees.leaf_key(jax.random.key(seed), path), c.shape),
        coefficients,
    )


# -- composition -------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", atlas.GRANULARITIES)
def test_coefficients_of_zero_are_the_base_and_unit_coefficients_a_fine_tuned_model(
    world, granularity
):
    task, base, vectors, batch = world
    objective = scaled(world, granularity=granularity, num_parts=3, key=jax.random.key(1))
    zero = objective.init(jax.random.key(2), batch)
    assert not any(np.any(c) for c in jax.tree.leaves(zero.params))
    plain = task.predict(Variables(base, {}), batch)
    np.testing.assert_array_equal(objective.predict(zero, batch), plain)
    composed = objective.inner_params(objective.isotropic(jnp.array([0.0, 1.0, 0.0])))
    tree_close(composed, trees.add(base, vectors["two"]), atol=1e-6)


def test_vectors_stored_in_float16_give_the_model_to_three_digits(world):
    _, base, vectors, _ = world
    objective = scaled(world, dtype=jnp.float16)
    assert {x.dtype.name for x in jax.tree.leaves(objective.vectors)} == {"float16"}
    composed = objective.inner_params(objective.isotropic(jnp.array([1.0, 0.0, 0.0])))
    tree_close(composed, trees.add(base, vectors["one"]), atol=1e-3)
    assert {x.dtype.name for x in jax.tree.leaves(composed)} == {"float32"}


def test_every_tensor_has_one_coefficient_per_vector_and_filters_leave_the_rest(world):
    _, base, _vectors, _ = world
    objective = scaled(world)
    assert [c.shape for c in jax.tree.leaves(objective.zeros())] == [(3,)] * len(trees.paths(base))
    weights = scaled(world, where="kernel$")
    coefficients = some(weights.zeros())
    assert all(path.endswith("kernel") for path in trees.paths(coefficients))
    composed = weights.inner_params(coefficients)
    changed = {
        path for path, a, b in zip(
            trees.paths(base), jax.tree.leaves(composed), jax.tree.leaves(base)
        ) if np.any(a != b)
    }  # fmt: skip
    assert changed == {path for path in trees.paths(base) if path.endswith("kernel")}


def test_tied_leaves_share_a_coefficient(world):
    _, base, vectors, _ = world
    objective = scaled(world, tie=((r"blocks_\d", "blocks"),))
    coefficients = some(objective.zeros())
    assert len(trees.paths(base)) - len(trees.paths(coefficients)) == 4  # up, down: two leaves each
    composed = objective.inner_params(coefficients)
    c = coefficients["blocks_0"]["up"]["kernel"]
    expected = base["blocks_1"]["up"]["kernel"] + sum(
        c[i] * v["blocks_1"]["up"]["kernel"] for i, v in enumerate(vectors.values())
    )
    np.testing.assert_allclose(composed["blocks_1"]["up"]["kernel"], expected, atol=1e-5)


def test_rows_and_columns_have_their_own_coefficients(world):
    _, base, vectors, _ = world
    for granularity, axis in (("row", 0), ("column", 1)):
        objective = scaled(world, granularity=granularity)
        coefficients = some(objective.zeros())
        c = np.asarray(coefficients["stem"]["kernel"])
        assert c.size == 3 * base["stem"]["kernel"].shape[axis]
        c = np.expand_dims(c.reshape(3, -1), 2 - axis)
        expected = base["stem"]["kernel"] + sum(
            c[i] * v["stem"]["kernel"] for i, v in enumerate(vectors.values())
        )
        composed = objective.inner_params(coefficients)
        np.testing.assert_allclose(composed["stem"]["kernel"], expected, atol=1e-5)
        assert coefficients["stem"]["bias"].shape == (3,)


def test_random_parts_are_disjoint_cover_all_and_reduce_to_whole_tensors(world):
    _, base, _, _batch = world
    objective = scaled(world, granularity="random", num_parts=4, key=jax.random.key(1))
    for part, x in zip(jax.tree.leaves(objective.parts), jax.tree.leaves(base)):
        assert part.dtype == jnp.int16 and part.shape == x.shape
        np.testing.assert_array_equal(sum((part == k).astype(int) for k in range(4)), 1)
    # Equal shapes have parts of their own; biases and norms are composed as well.
    parts = objective.parts
    up = parts["blocks_0"]["up"]["kernel"], parts["blocks_1"]["up"]["kernel"]
    assert np.any(up[0] != up[1])
    assert {c.shape for c in jax.tree.leaves(objective.zeros())} == {(3, 4)}

    whole = scaled(world)
    coefficients = some(whole.zeros())
    for parts in (1, 4):
        objective = scaled(world, granularity="random", num_parts=parts, key=jax.random.key(1))
        equal = jax.tree.map(lambda c, p=parts: jnp.tile(c[:, None], p), coefficients)
        tree_close(
            objective.inner_params(equal), whole.inner_params(coefficients), rtol=1e-5, atol=1e-5
        )
    different = some(objective.zeros())
    mask = objective.parts["stem"]["kernel"]
    expected = base["stem"]["kernel"] + sum(
        different["stem"]["kernel"][i, k] * (mask == k) * v["stem"]["kernel"]
        for i, v in enumerate(world[2].values()) for k in range(4)
    )  # fmt: skip
    composed = objective.inner_params(different)
    np.testing.assert_allclose(composed["stem"]["kernel"], expected, atol=1e-5)


@pytest.mark.parametrize("granularity", ["tensor", "random"])
def test_gradients_are_derivatives_along_the_task_vectors(world, granularity):
    task, _, vectors, batch = world
    objective = scaled(world, granularity=granularity, num_parts=2, key=jax.random.key(1))
    coefficients = jax.tree.map(lambda c: 0.3 * c, some(objective.zeros()))

    @jax.jit
    def loss(c):
        return objective.loss(Variables(c, {}), batch, None)[0]

    gradient = jax.grad(loss)(coefficients)
    direction = jax.tree.map(lambda c: 0.3 * c, some(coefficients, seed=1))
    for path in ("stem/kernel", "norm_0/scale", "blocks_1/down/bias"):
        one = trees.map_with_path(lambda p, d, path=path: d * (p == path), direction)
        eps = 1e-2
        up, down = (loss(trees.add(coefficients, trees.scale(one, s * eps))) for s in (1, -1))
        assert float(up - down) / (2 * eps) == pytest.approx(
            float(trees.dot(gradient, one)), rel=1e-3, abs=5e-4
        )
    # The gradient in theta, projected onto a task vector.
    composed = objective.inner_params(coefficients)
    by_theta = gradient_of(lambda p: task.loss(Variables(p, {}), batch, None)[0])(composed)
    expected = np.vdot(by_theta["stem"]["bias"], vectors["two"]["stem"]["bias"])
    got = gradient["stem"]["bias"][1]
    np.testing.assert_allclose(jnp.sum(got), expected, rtol=1e-4)


@pytest.mark.parametrize("granularity", ["tensor", "random"])
def test_a_step_holds_no_more_models_with_more_vectors(granularity):
    module = ResidualMLP(embedding=8, features=128, depth=1)
    heads = jnp.eye(8)[None]
    task = EmbeddingClassification(module=module, heads=heads)
    batch = {"inputs": jnp.zeros((2, 16)), "labels": jnp.zeros(2, jnp.int32)}
    base = task.init(jax.random.key(0), batch).params
    size = 4 * sum(x.size for x in jax.tree.leaves(base))
    temporary = []
    for n in (2, 16):
        objective = AnisotropicScaling.of(
            task, base, {str(i): base for i in range(n)},
            granularity=granularity, num_parts=3, key=jax.random.key(0),
        )  # fmt: skip

        @jax.jit
        def gradient(objective, params, batch):
            return jax.grad(lambda p: objective.loss(Variables(p, {}), batch, None)[0])(params)

        compiled = gradient.lower(objective, objective.zeros(), batch).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    assert temporary[1] - temporary[0] < size  # 14 more models would be 14 x size
    assert temporary[1] < 5 * size


def test_training_moves_the_coefficients_alone_and_sharding_changes_nothing(world):
    task, base, vectors, batch = world
    source = ArraySource(jax.tree.map(np.asarray, batch))
    data = Pipeline(source, 8, repeat=True, num_threads=0)
    config = FitConfig(steps=4, optimizer=OptimizerConfig(learning_rate=0.1))
    before = jax.tree.map(np.array, (base, vectors, task.heads))
    results = []
    for mesh in ({"data": 1}, {"data": 2, "fsdp": 2}):
        count = int(np.prod(list(mesh.values())))
        layout = Layout(make_mesh(mesh, jax.devices()[:count]), min_size=1)
        fitted = fit(scaled(world), data, config, layout=layout)
        assert set(trees.paths(fitted.params)) == set(trees.paths(scaled(world).zeros()))
        results.append(jax.device_get(fitted.params))
    tree_close(results[0], results[1], atol=1e-4)
    assert all(np.any(c != 0) for c in jax.tree.leaves(results[0]))
    jax.tree.map(np.testing.assert_array_equal, before, (base, vectors, task.heads))


def test_the_target_is_excluded_by_name(world):
    objective = scaled(world, exclude=["two"])
    assert objective.names == ("one", "three")
    left = objective.inner_params(objective.isotropic(jnp.array([0.0, 1.0])))
    tree_close(left, trees.add(world[1], world[2]["three"]), atol=1e-6)
    with pytest.raises(ValueError, match=r"exclude=.'tow'.*'one', 'three', 'two'"):
        scaled(world, exclude=["tow"])
    with pytest.raises(ValueError, match="no task vector is left"):
        scaled(world, exclude=NAMES)
    with pytest.raises(ValueError, match="granularity='tensors'; choose one of vector, tensor"):
        scaled(world, granularity="tensors")
    with pytest.raises(ValueError, match="needs a key"):
        scaled(world, granularity="random", num_parts=4)


def test_the_penalty_is_half_the_mean_norm_over_vectors():
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.0, 3.0], [4.0, 0.0]])}
    penalty = lambda p: atlas.CoefficientPenalty(inner=None, p=p).penalty(params)  # noqa: E731
    assert float(penalty(1.0)) == pytest.approx(0.5 * np.mean([3.0, 4.0, 3.0]))
    assert float(penalty(2.0)) == pytest.approx(0.5 * np.mean([5**0.5, 4.0, 3.0]))


# -- heads -------------------------------------------------------------------------------------


def test_logits_are_scaled_cosines_with_the_head_of_each_example(world):
    task, base, _, batch = world
    other = jnp.roll(task.heads, 1, axis=-1).at[0, 3].set(0.0)  # three classes
    both = task.replace(heads=jnp.concatenate([task.heads, other]), tasks=("a", "b"))
    z = np.asarray(task.module.apply({"params": base}, batch["inputs"]))
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    which = np.arange(8) % 2
    logits = both.predict(Variables(base, {}), {**batch, "task": jnp.asarray(which)})
    for i, t in enumerate(which):
        expected = 5.0 * z[i] @ np.asarray(both.heads[t]).T
        np.testing.assert_allclose(logits[i, : 4 - t], expected[: 4 - t], atol=1e-5)
    assert np.all(logits[which == 1, 3] < -1e8)
    features = task.features().predict(Variables(base, {}), batch)
    np.testing.assert_allclose(features, z, atol=1e-6)


def test_the_loss_is_the_weighted_sum_over_tasks_and_its_metrics_are_separate(world):
    task, base, _, batch = world
    heads = jnp.concatenate([task.heads, jnp.roll(task.heads, 1, axis=1)])
    both = task.replace(
        heads=heads, tasks=("a", "b"), weights=jnp.array([-1.0, 1.0]),
        references=jnp.array([0.5, 1.0]),
    )  # fmt: skip
    which = jnp.arange(8) % 2
    loss, aux = both.loss(Variables(base, {}), {**batch, "task": which}, None)
    parts = []
    for t in range(2):
        alone = task.replace(heads=heads[t : t + 1])
        value, one = alone.loss(
            Variables(base, {}), {**batch, "mask": (which == t).astype(jnp.float32)}, None
        )
        parts.append((float(value), float(one.metrics["accuracy"].value())))
        assert float(aux.metrics[f"accuracy_{'ab'[t]}"].value()) == parts[t][1]
    assert float(loss) == pytest.approx(parts[1][0] - parts[0][0], rel=1e-5)
    assert float(aux.metrics["normalised"].value()) == pytest.approx(
        (parts[0][1] / 0.5 + parts[1][1]) / 2
    )


def test_a_tangent_model_is_affine_and_first_order(world):
    task, base, vectors, batch = world
    tangent = LinearizedClassification(module=task.module, heads=task.heads, scale=5.0, base=base)
    empty = jax.tree.map(jnp.zeros_like, base)

    @jax.jit
    def g(delta):
        return tangent.apply(Variables(trees.add(base, delta), {}), batch, None)[0]

    @jax.jit
    def f(delta):
        return task.apply(Variables(trees.add(base, delta), {}), batch, None)[0]

    origin = g(empty)
    np.testing.assert_allclose(origin, f(empty), atol=1e-6)
    one, two = vectors["one"], vectors["two"]
    mixed = trees.add(trees.scale(one, 0.7), trees.scale(two, -1.3))
    np.testing.assert_allclose(
        g(mixed) - origin, 0.7 * (g(one) - origin) - 1.3 * (g(two) - origin), atol=1e-4
    )
    gap = [float(jnp.abs(f(trees.scale(one, e)) - g(trees.scale(one, e))).max())
           for e in (0.1, 0.05)]  # fmt: skip
    assert gap[0] / gap[1] == pytest.approx(4.0, rel=0.25)
    # The product with the explicit Jacobian.
    flat, unravel = jax.flatten_util.ravel_pytree(base)
    jacobian = jax.jacobian(lambda p: f(trees.sub(unravel(p), base)))(flat)
    direct = jacobian @ jax.flatten_util.ravel_pytree(one)[0]
    np.testing.assert_allclose(g(one) - origin, direct, atol=1e-4)
    # It can be composed and learned like the plain one.
    objective = AnisotropicScaling.of(tangent, base, vectors)
    gradient, plain = (
        gradient_of(lambda c, o=o: o.loss(Variables(c, {}), batch, None)[0])(o.zeros())
        for o in (objective, scaled(world))
    )
    tree_close(gradient, plain, atol=1e-5)  # one tangent, one gradient at the base


# -- selection ---------------------------------------------------------------------------------


def test_block_gradients_are_those_of_the_coefficients_at_zero(world):
    task, base, vectors, batch = world
    halves = [jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(0, 3), slice(3, 8))]
    gradients = atlas.block_gradients(task, Variables(base, {}), vectors, halves)
    objective = scaled(world)
    expected = gradient_of(lambda c: objective.loss(Variables(c, {}), batch, None)[0])(
        objective.zeros()
    )
    for i, name in enumerate(NAMES):
        tree_close(gradients[name], jax.tree.map(lambda c, i=i: c[i], expected), atol=1e-5)


def test_selection_by_gradient(world):
    _, base, vectors, _ = world
    fill = lambda x: jax.tree.map(lambda _: jnp.float32(x), base)  # noqa: E731
    gradients = {"one": fill(0.1), "two": fill(-2.0), "three": fill(1.0)}
    gradients["one"]["stem"]["bias"] = jnp.float32(9.0)
    mixed = atlas.select_vectors(gradients, vectors, 2, "blockwise")
    expected = {**vectors["two"], "stem": {**vectors["two"]["stem"]}}
    expected["stem"]["bias"] = vectors["one"]["stem"]["bias"]
    tree_close(mixed["choice_0"], expected)
    assert list(atlas.select_vectors(gradients, vectors, 1, "whole")) == ["two"]
    assert list(atlas.select_vectors(gradients, vectors, 2, "whole")) == ["two", "three"]
    random = atlas.select_vectors(gradients, vectors, 2, "random", jax.random.key(0))
    assert len(random) == 2 and set(random) < set(NAMES)
    assert len(atlas.select_vectors(gradients, vectors, 3, "blockwise")) == 3
    with pytest.raises(ValueError, match="budget=4; choose from 1 to the 3"):
        atlas.select_vectors(gradients, vectors, 4)
    with pytest.raises(ValueError, match="strategy='block'"):
        atlas.select_vectors(gradients, vectors, 1, "block")


def test_random_vectors_have_the_norms_and_not_the_directions(world):
    vectors = world[2]
    noise = atlas.random_vectors(vectors, jax.random.key(0))
    for name in NAMES:
        for a, b in zip(jax.tree.leaves(noise[name]), jax.tree.leaves(vectors[name])):
            np.testing.assert_allclose(jnp.linalg.norm(a), jnp.linalg.norm(b), rtol=1e-5)
        assert abs(trees.cosine(noise[name], vectors[name])) < 0.3


def test_ties_trims_over_the_whole_vector_and_elects_by_magnitude():
    rng = np.random.default_rng(0)
    base = {"a": jnp.zeros(60), "b": jnp.zeros((4, 10))}
    rows = rng.normal(size=(3, 100)) * np.r_[np.ones(60), np.full(40, 5.0)]
    vectors = [{"a": jnp.asarray(r[:60]), "b": jnp.asarray(r[60:]).reshape(4, 10)} for r in rows]
    kept = np.stack([np.where(np.abs(r) >= np.sort(np.abs(r))[-20], r, 0.0) for r in rows])
    agree = np.where(np.sign(kept) == np.where(kept.sum(0) >= 0, 1, -1), kept, 0.0)
    expected = 0.9 * agree.sum(0) / np.maximum((agree != 0).sum(0), 1)
    merged = trees.merge(base, vectors, "ties", vectors=True, density=0.2, lambda_=0.9)
    np.testing.assert_allclose(
        np.r_[merged["a"], np.ravel(merged["b"])], expected, rtol=1e-5, atol=1e-6
    )
    assert np.count_nonzero(merged["a"]) < np.count_nonzero(merged["b"])  # not per leaf


# -- adapters ----------------------------------------------------------------------------------


def test_tip_adapter_adds_the_cache_and_learns_jointly(world):
    task, base, vectors, batch = world
    features, frozen = task.features(), Variables(base, {})
    z = features.predict(frozen, batch)
    one_hot = jax.nn.one_hot(batch["labels"], 4)
    tip = TipAdapter(
        inner=features, keys=z, values=one_hot, head=task.heads[0], scale=5.0, frozen=frozen
    )
    variables = tip.init(jax.random.key(0), batch)
    assert sorted(variables.params) == ["alpha", "beta", "keys"]
    expected = 5.0 * z @ task.heads[0].T + 2 * np.exp(-(1 - z @ z.T)) @ one_hot
    np.testing.assert_allclose(tip.predict(variables, batch), expected, atol=1e-5)
    without = variables._replace(params={**variables.params, "alpha": jnp.float32(0)})
    np.testing.assert_allclose(tip.predict(without, batch), task.predict(frozen, batch), atol=1e-5)
    joint = tip.replace(inner=AnisotropicScaling.of(features, base, vectors), frozen=None)
    variables = joint.init(jax.random.key(0), batch)
    np.testing.assert_allclose(joint.predict(variables, batch), expected, atol=1e-5)
    gradient = gradient_of(lambda p: joint.loss(Variables(p, {}), batch, None)[0])(variables.params)
    assert all(np.any(g != 0) for g in jax.tree.leaves(gradient))


def test_lp_plus_plus_descends_to_the_optimum_of_its_convex_loss(world):
    task, base, _, batch = world
    z = task.features().predict(Variables(base, {}), batch)
    head, labels = task.heads[0], batch["labels"]

    def loss(probe, alpha):
        logits = z @ probe.T + alpha * (z @ head.T)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    values = [float(loss(*atlas.lp_plus_plus(z, labels, head, passes=n))) for n in (0, 10, 300)]
    assert values[0] > values[1] > values[2]
    # Its start, by hand.
    probe, alpha = atlas.lp_plus_plus(z, labels, head, passes=0)
    members = [np.asarray(z)[np.asarray(labels) == c] for c in range(4)]
    np.testing.assert_allclose(probe, [m.sum(0) for m in members], atol=1e-5)
    cosines = [m.mean(0) @ np.asarray(head[c]) if len(m) else 0.0 for c, m in enumerate(members)]
    np.testing.assert_allclose(alpha, np.full(4, 250 * np.mean(cosines)), rtol=1e-4, atol=1e-4)


# -- without labels ----------------------------------------------------------------------------


def test_the_weak_view_has_no_gradient_and_no_accepted_example_gives_zero(world):
    task, _base, _vectors, batch = world
    match = UnsupervisedFixMatch(inner=scaled(world), power=0.5, threshold=0.0,
                                 final_threshold=0.0)  # fmt: skip
    variables = match.init(jax.random.key(0), batch)
    batch = {
        **batch, "strong": batch["inputs"][::-1], "trusted": jnp.asarray([1.0, 0, 0, 0] * 2),
    }  # fmt: skip

    def loss(params, match=match, **changes):
        return match.loss(Variables(params, variables.state), {**batch, **changes},
                          jax.random.key(0))  # fmt: skip

    # By hand, with the weak view's probabilities as constants.
    weak = np.asarray(match.predict(variables, batch), np.float64)
    p = np.exp(weak) / np.exp(weak).sum(1, keepdims=True)
    sigma = p**0.5 / (p**0.5).sum(1, keepdims=True)
    target = np.where(batch["trusted"][:, None] > 0, np.eye(4)[batch["labels"]], sigma)

    def reference(params):
        logits = task.predict(
            Variables(scaled(world).inner_params(params), {}), {"inputs": batch["strong"]}
        )
        return -(jnp.asarray(target) * jax.nn.log_softmax(logits)).sum(1).mean()

    assert float(loss(variables.params)[0]) == pytest.approx(float(reference(variables.params)))
    got = gradient_of(lambda c: loss(c)[0])(variables.params)
    tree_close(got, gradient_of(reference)(variables.params), atol=1e-5)

    strict = match.replace(threshold=1.0, final_threshold=1.0)
    value, aux = loss(variables.params, strict, trusted=jnp.zeros(8))
    gradient = gradient_of(lambda c: loss(c, strict, trusted=jnp.zeros(8))[0])(variables.params)
    assert float(value) == 0.0 and float(aux.metrics["accepted"].value()) == 0.0
    assert not any(np.any(g != 0) for g in jax.tree.leaves(gradient))
    # Trusted examples count whatever the threshold.
    assert float(loss(variables.params, strict)[1].metrics["accepted"].value()) == 0.25


def test_the_threshold_rises_linearly(world):
    _task, _base, _, batch = world
    match = UnsupervisedFixMatch(inner=scaled(world), power=1.0, threshold=0.2,
                                 final_threshold=1.0, steps=4.0)  # fmt: skip
    variables = match.init(jax.random.key(0), batch)
    batch = {**batch, "strong": batch["inputs"], "trusted": jnp.zeros(8)}
    top = np.asarray(jax.nn.softmax(match.predict(variables, batch)).max(axis=1))
    state = variables.state
    for step in range(4):
        _, aux = match.loss(Variables(variables.params, state), batch, jax.random.key(0))
        assert float(aux.metrics["accepted"].total) == np.sum(top > 0.2 + 0.2 * step)
        state = aux.state


def test_a_quarter_of_every_batch_is_trusted_and_balanced():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(5, 0.3), size=60)
    inputs = np.arange(60, dtype=np.float32).reshape(60, 1, 1, 1)
    source = atlas.unlabelled_source(inputs, probabilities, limit=4)
    indices, labels = atlas.trusted_set(probabilities, limit=4)
    assert len(indices) == 20 and np.bincount(labels).tolist() == [4] * 5
    for c in range(5):
        best = np.sort(probabilities[:, c])[-4:]
        np.testing.assert_allclose(np.sort(probabilities[indices[labels == c], c]), best)
    assert len(atlas.trusted_set(probabilities)[0]) == 5 * 12  # N / C
    assert len(atlas.trusted_set(probabilities, share=0.1)[0]) == 5 * 1
    pipeline = Pipeline(source, 20, repeat=True, num_threads=0)
    iterator = pipeline.iterator()
    for _ in range(4):
        batch = next(iterator)
        assert batch["trusted"].sum() == 5
        trusted = batch["trusted"] == 1
        assert sorted(batch["labels"][trusted]) == [0, 1, 2, 3, 4]
        others = batch["inputs"][~trusted].ravel().astype(int)
        assert not set(others) & set(indices)


def test_entropy_leaves_out_what_is_uncertain(world):
    _, _base, _, batch = world
    objective = scaled(world)
    variables = objective.init(jax.random.key(0), batch)
    p = np.asarray(jax.nn.softmax(objective.predict(variables, batch)), np.float64)
    entropy = -(p * np.log(p)).sum(1)
    share = float(np.median(entropy) / np.log(4))
    loss, aux = atlas.EntropyMinimisation(inner=objective, share=share).loss(
        variables, batch, jax.random.key(0)
    )
    assert float(loss) == pytest.approx(entropy[entropy < share * np.log(4)].mean(), rel=1e-4)
    assert float(aux.metrics["accepted"].value()) == 0.5
    loss, _ = atlas.EntropyMinimisation(inner=objective, share=0.0).loss(
        variables, batch, jax.random.key(0)
    )
    assert float(loss) == 0.0


def test_a_strong_view_is_a_shift_with_noise():
    image = np.arange(16, dtype=np.float32).reshape(4, 4, 1)
    element = {"inputs": image}
    same = atlas.StrongView(shift=0, noise=0.0).random_map(element, np.random.default_rng(0))
    np.testing.assert_array_equal(same["strong"], image)
    moved = atlas.StrongView(shift=1, noise=0.0)
    views = {
        moved.random_map(element, np.random.default_rng(i))["strong"].tobytes() for i in range(60)
    }
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    windows = {padded[r : r + 4, c : c + 4].tobytes() for r in range(3) for c in range(3)}
    assert views == windows


# -- disentanglement, data ---------------------------------------------------------------------


def test_vectors_that_change_nothing_are_disentangled(world):
    task, base, vectors, batch = world
    silent = {**vectors, "two": trees.scale(vectors["two"], 0.0)}
    objective = AnisotropicScaling.of(task, base, silent, exclude=["three"])
    strong = Variables(objective.isotropic(2.0), {})
    error = functools.partial(atlas.disentanglement_error, objective, strong)
    assert error({"one": [batch]}) == 0.0
    changed = error({"two": [batch]})
    assert changed > 0.0
    louder = objective.replace(inner=task.replace(scale=50.0))
    assert atlas.disentanglement_error(louder, strong, {"two": [batch]}) == changed
    assert error({"one": [batch], "two": [batch]}) == pytest.approx(changed / 2)


def test_interleaved_batches_have_equal_parts():
    sources = [
        ArraySource({"x": np.arange(n) + 100 * t, "task": np.full(n, t)})
        for t, n in enumerate((7, 5, 9))
    ]
    mixed = atlas.Interleaved(sources)
    assert len(mixed) == 15
    batch = mixed.take(np.array([4, 0, 14, 2]))
    assert batch["x"].tolist() == [101, 0, 204, 200]
    assert [mixed[i]["x"] for i in (4, 0, 14, 2)] == batch["x"].tolist()
    rows = next(Pipeline(mixed, 6, repeat=True, num_threads=0).iterator())
    assert np.bincount(rows["task"]).tolist() == [2, 2, 2]


def test_domains_are_permutations_or_inversions_with_training_images_of_their_own():
    tasks = atlas.make_tasks(get_config("atlas:digits"))
    images = np.random.default_rng(0).uniform(size=(2, 8, 8, 1)).astype(np.float32)
    seen = []
    for name, domain in atlas.DOMAINS.items():
        out = domain(images)
        assert out.shape == images.shape
        if name in ("plain", "blocks", "flipped", "rotated"):
            np.testing.assert_array_equal(np.sort(out.ravel()), np.sort(images.ravel()))
        seen.append(out.tobytes())
    assert len(set(seen)) == len(atlas.DOMAINS)
    sizes = [len(s["train"]) for s in tasks.splits.values()]
    assert sizes[5:] == [sizes[5]] * 3 and sum(sizes[:6]) == pytest.approx(0.6 * 1797, abs=6)
    heads = list(tasks.heads.values())
    np.testing.assert_allclose(np.linalg.norm(heads[0], axis=1), 1, rtol=1e-5)
    assert all(np.array_equal(h, heads[0]) for h in heads)


def test_the_control_limits_the_choice():
    scores = [(0.5, 0.9), (0.4, 0.85), (0.2, 0.7), (0.1, 0.86)]
    assert atlas.best_under_constraint(scores, 0.8) == 3
    assert atlas.best_under_constraint(scores, 0.8, stop=True) == 1
    assert atlas.best_under_constraint(scores, 0.0) == 3
    assert atlas.best_under_constraint(scores, 0.95) is None


# -- configs and the recipe --------------------------------------------------------------------


def test_the_published_setting_has_3192_coefficients_and_its_step_lowers():
    config = get_config("atlas:clip_vit_b32")
    module = atlas.encoder(config)
    assert isinstance(module, VisionTransformer)
    size, n = config.model.image_size, config.num_vectors
    batch = {
        "inputs": jax.ShapeDtypeStruct((config.batch_size, size, size, 3), jnp.float32),
        "labels": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
        "task": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
    }
    task = EmbeddingClassification(
        module=module, heads=jax.ShapeDtypeStruct((8, 397, 512), jnp.float32),
        tasks=tuple(config.data.sources), scale=config.logit_scale,
    )  # fmt: skip
    base = jax.eval_shape(lambda k, b: task.init(k, b).params, jax.random.key(0), batch)

    def build(base):
        return AnisotropicScaling.of(
            task, base, {str(i): base for i in range(n)}, tie=config.tie, dtype=jnp.float16
        )

    objective = jax.eval_shape(build, base)
    coefficients = jax.eval_shape(objective.zeros)
    assert len(jax.tree.leaves(coefficients)) == 152
    assert sum(c.size for c in jax.tree.leaves(coefficients)) == 21 * 152 == 3192
    layout = Layout(make_mesh({"data": 2, "fsdp": 4}))
    stage = FitConfig(steps=2500, optimizer=OptimizerConfig(learning_rate=1e-3, clip_norm=1.0))
    _, held = lower_step(objective, batch, stage, layout)
    assert sum(x.size for x in jax.tree.leaves(held["params"])) == 3192
    carried = sum(x.size for x in jax.tree.leaves(held["carried"]))
    assert carried > 22 * 87_000_000


def test_the_published_schedules_are_those_of_the_paper():
    config = get_config("atlas:clip_vit_b32")
    tune, add, shots = config.finetune, config.addition.fit, config.few_shot.coefficients
    assert (tune.optimizer.learning_rate, tune.optimizer.warmup_steps) == (1e-5, 500)
    assert (add.optimizer.learning_rate, add.optimizer.schedule) == (1e-3, "constant")
    assert (shots.optimizer.learning_rate, shots.optimizer.schedule) == (1e-1, "cosine")
    for stage in (tune, add, shots):
        assert (stage.optimizer.weight_decay, stage.optimizer.clip_norm) == (0.1, 1.0)
    alphas = get_config("atlas:digits").addition.alphas
    np.testing.assert_allclose(alphas, np.linspace(0, 1, 21), atol=1e-9)


TINY = [
    "model.features=16", "model.depth=1", "model.embedding=12", "base.steps=10",
    "finetune.steps=60", "addition.fit.steps=20", "addition.fit.eval_every=10",
    "addition.alphas=0.0,0.2", "addition.ties=1.0", "few_shot.shots=2",
    "few_shot.targets=rotated", "few_shot.rates=1e-3",
    "few_shot.coefficients.steps=20", "few_shot.weights.steps=5", "few_shot.adapter.steps=5",
    "few_shot.joint.steps=5", "test_time.epochs=1", "test_time.fit.steps=3",
    "negation.base.steps=10", "negation.fit.steps=10", "negation.fit.checkpoint_every=5",
    "negation.alphas=0.0,0.5", "data.sources=plain,flipped",
    "negation.control=flipped", "batch_size=64",
]  # fmt: skip


def run(config, workdir):
    """Runs on one device, for which programs compile faster, and returns the results."""
    experiment = Experiment(config, workdir)
    experiment.layout = Layout(make_mesh({"data": 1}, jax.devices()[:1]))
    return json.loads(json.dumps(experiment.run()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run of all parts: the work directory and what it recorded."""
    config = apply_overrides(get_config("atlas:digits"), TINY)
    workdir = tmp_path_factory.mktemp("atlas")
    return config, workdir, run(config, workdir)


@pytest.mark.slow
def test_a_finished_run_is_read_back_bit_for_bit(finished):
    config, workdir, results = finished
    stages = sorted(p.name for p in (workdir / "stages").iterdir())
    before = {s: (workdir / "stages" / s / "metrics.jsonl").stat().st_mtime_ns for s in stages}
    assert run(config, workdir) == results
    after = {s: (workdir / "stages" / s / "metrics.jsonl").stat().st_mtime_ns for s in stages}
    assert before == after


@pytest.mark.slow
def test_every_method_is_in_the_report_and_its_stage_trains_what_it_should(finished):
    _, workdir, results = finished
    tables = results["tables"]
    addition = {row[0].split(",")[0]: row for row in tables["Task addition, test accuracy"]["rows"]}
    assert set(addition) == {
        "pre-trained", "fine-tuned", "weight average", "task arithmetic", "TIES", "isotropic",
        "aTLAS",
    }  # fmt: skip
    few = {row[0]: row[1] for row in tables["Few-shot test accuracy on 'rotated'"]["rows"]}
    assert {"zero-shot", "aTLAS", "full fine-tuning", "LP++", "aTLAS + Tip-Adapter"} <= set(few)

    def trained(stage):
        return json.loads((workdir / "stages" / stage / "summary.json").read_text())["parameters"]

    blocks = 2 + 2 + 4 + 2 + 1  # stem, norm, two layers, norm, projection
    assert trained("addition-tensor") == 2 * blocks
    assert trained("addition-vector") == 2
    assert trained("rotated-2-atlas") == 2 * blocks
    assert trained("rotated-2-atlas-x-20") == 2 * blocks * 20
    assert trained("negation") == blocks
    assert trained("rotated-2-tip") == 2 * 10 * 12 + 2
    assert trained("rotated-2-atlas-tip") == 2 * 10 * 12 + 2 + 2 * blocks
    assert trained("test-time-norms-0") == 4 * 16
    assert trained("base") == 64 * 16 + 16 + 32 + 2 * (16 * 32) + 48 + 32 + 16 * 12


def test_without_the_control_term_the_control_collapses():
    """A negation that only raises the target's loss breaks the model; the term keeps it."""
    config = apply_overrides(get_config("atlas:digits"), TINY)
    tasks, module = atlas.make_tasks(config), atlas.encoder(config)
    names = ("plain", "flipped")
    heads = jnp.stack([tasks.heads[n] for n in names])
    objective = EmbeddingClassification(module=module, heads=heads, scale=20.0, tasks=names)

    def mixture(split, part=slice(None)):
        tagged = [atlas._tagged(tasks.splits[n][split], t) for t, n in enumerate(names)]
        return Pipeline(atlas.Interleaved(tagged[part]), 60, repeat=True, num_threads=0)

    layout = Layout(make_mesh({"data": 1}, jax.devices()[:1]))
    steps = functools.partial(FitConfig, optimizer=OptimizerConfig(learning_rate=3e-3))
    base = fit(objective, mixture("train"), steps(steps=150), layout=layout).params
    start = WarmStart(inner=objective, params=base)
    tuned = fit(start, mixture("train", slice(1)), steps(steps=80), layout=layout).params
    vectors = {"plain": trees.task_vector(tuned, base)}
    test = {n: tasks.splits[n]["test"].arrays for n in names}
    predict = jax.jit(objective.predict)

    def accuracies(weights):
        signed = objective.replace(weights=jnp.asarray(weights))
        scaled = AnisotropicScaling.of(signed, base, vectors)
        config = FitConfig(steps=60, optimizer=OptimizerConfig(learning_rate=5e-2))
        fitted = fit(scaled, mixture("validation"), config, layout=layout)
        params = scaled.inner_params(fitted.params)
        return [
            float(np.mean(
                jnp.argmax(predict(Variables(params, {}), {
                    "inputs": test[n]["inputs"], "task": jnp.full(len(test[n]["labels"]), t),
                }), axis=-1) == test[n]["labels"]
            ))
            for t, n in enumerate(names)
        ]  # fmt: skip

    alone, held = accuracies([-1.0, 0.0]), accuracies([-1.0, 2.0])
    assert alone[0] < 0.4 and held[0] < 0.75
    assert held[1] > alone[1] + 0.2


def test_configs_that_cannot_run_say_why(tmp_path):
    assert list(list_configs()["atlas"].variants) == ["digits", "vit", "clip_vit_b32"]
    with pytest.raises(ConfigError, match="CLIP weights and 22 data sets cannot be read"):
        Experiment(get_config("atlas:clip_vit_b32"), tmp_path / "a").run()
    for override, message in (
        ("parts=adition", "config.parts has .'adition'"),
        ("test_time.target=turned", "no domain 'turned'"),
        ("model.kind=cnn", "config.model.kind='cnn'; choose one of residual_mlp, vit"),
    ):
        config = get_config("atlas:digits")
        config = apply_overrides(config, [override])
        with pytest.raises(ConfigError, match=message):
            Experiment(config, tmp_path / override.split("=")[0]).run()
