"""CoDyRA: thresholds, gated low-rank changes, merging, label spaces, the recipe."""

import json
import math
import shutil
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transfer_jax import trees
from transfer_jax.configuration import ConfigError, apply_overrides, get_config
from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.sources import ArraySource
from transfer_jax.interop import save_pretrained
from transfer_jax.models.clip import Clip, ClipConfig, ClipTextConfig
from transfer_jax.models.vit import ViTConfig
from transfer_jax.nn.transformer import TransformerConfig, stack_layers
from transfer_jax.objectives import Variables
from transfer_jax.objectives.contrastive import ImageTextClassification, ZeroShotClassification
from transfer_jax.papers import codyra
from transfer_jax.papers.codyra import GatedLowRank, GatePenalty, Prototypes, Thresholds, TwoTower
from transfer_jax.training import Experiment, FitConfig, Layout, OptimizerConfig, fit, make_mesh
from transfer_jax.training.aot import lower_step
from transfer_jax.training.loop import TrainState, make_step
from transfer_jax.training.sharding import bytes_per_device

ONE = Layout(make_mesh({"data": 1}, jax.devices()[:1]))


# -- thresholds --------------------------------------------------------------------------------


def test_both_operators_on_a_grid():
    k = 0.25
    grid = jnp.array([0.0, 1.0, 1.5, 2.0, 3.0]) * k
    for sign in (1.0, -1.0):
        released = codyra.shrink(sign * grid, k, "released")
        exact = codyra.shrink(sign * grid, k, "exact")
        np.testing.assert_array_equal(released, sign * k * np.array([0, 0, 0, 1, 2.0]))
        np.testing.assert_array_equal(exact, sign * k * np.array([0, 0, 0.5, 1, 2.0]))
    for prox in codyra.PROX:
        np.testing.assert_array_equal(codyra.shrink(grid, 0.0, prox), grid)
    with pytest.raises(ValueError, match="'soft'; choose one of released, exact"):
        codyra.shrink(grid, k, "soft")


def test_the_exact_operator_is_the_proximal_operator():
    w = np.random.default_rng(0).normal(size=50)
    u = np.linspace(-4, 4, 80_001)
    for k in (0.1, 0.7):
        best = u[np.argmin(0.5 * (u - w[:, None]) ** 2 + k * np.abs(u), axis=1)]
        np.testing.assert_allclose(codyra.shrink(jnp.asarray(w), k, "exact"), best, atol=1e-4)


def test_the_published_schedule():
    """T = 500, 50 levels: level 1 at 250, one more every 5, the last at 490; none up to 250."""
    table = Thresholds(steps=500).table(0.005)
    level = np.clip(1 + (np.arange(500) - 250) // 5, 0, 49)
    expected = np.where(np.arange(500) > 250, np.linspace(0, 0.005, 50)[level], 0.0)
    np.testing.assert_allclose(table, expected, rtol=1e-6)
    assert table[250] == 0 < table[251] and table[489] < table[490] == pytest.approx(0.005)
    assert Thresholds(steps=500).total(0.005) == pytest.approx(0.650, abs=5e-4)
    with pytest.raises(ValueError, match=r"50 levels over the last 0\.5 of 60 steps"):
        Thresholds(steps=60)


@pytest.mark.parametrize("prox", codyra.PROX)
def test_the_null_model_is_what_thresholds_leave_of_untrained_weights(prox):
    thresholds = Thresholds(steps=500)
    w = jax.random.normal(jax.random.key(0), (40_000,))
    w, _ = jax.lax.scan(
        lambda w, k: (codyra.shrink(w, k, prox), None), w, jnp.asarray(thresholds.table(0.005))
    )
    share = thresholds.null_share(0.005, prox)
    assert float((w != 0).mean()) == pytest.approx(share, abs=0.01)
    assert 16 * share == pytest.approx(8.2, abs=0.06)


# -- gated low-rank changes --------------------------------------------------------------------


class Image(nn.Module):
    @nn.compact
    def __call__(self, inputs, *, train=False):
        x = nn.tanh(nn.Dense(8, name="up")(inputs.reshape(len(inputs), -1)))
        return nn.Dense(5, name="down")(x)


class Text(nn.Module):
    @nn.compact
    def __call__(self, tokens, *, lengths=None, train=False):
        return nn.Dense(5, name="out")(nn.tanh(nn.Embed(9, 6, name="words")(tokens)).sum(axis=1))


@pytest.fixture(scope="module")
def world():
    """A two-tower model, its task, parameters and a batch."""
    module = TwoTower(Image(), Text(), scale=5.0)
    texts = jnp.array([[1, 2], [3, 4], [5, 6], [7, 8]], jnp.int32)
    task = ImageTextClassification(module=module, texts=texts)
    batch = {
        "inputs": jax.random.uniform(jax.random.key(0), (8, 3, 3, 1)),
        "labels": jnp.arange(8, dtype=jnp.int32) % 4,
    }
    return task, begin(task, jax.random.key(1), batch).params, batch


@jax.jit
def begin(objective, key, batch):
    return objective.init(key, batch)


@jax.jit
def answer(objective, params, batch):
    return objective.predict(Variables(params, {}), batch)


def gated(world, **options):
    task, params, _ = world
    return GatedLowRank.of(task, params, "kernel", **{"rank": 3, **options})


def some(params, seed=0):
    """The factors with a random b, so that they change something."""
    return trees.map_with_path(
        lambda path, x: jax.random.normal(trees.leaf_key(jax.random.key(seed), path), x.shape)
        if path.endswith("/b") else x, params,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trainer(world):
    """Runs some steps of Adam from one initialisation; one compilation per kind of objective."""
    config = FitConfig(steps=8, optimizer=OptimizerConfig(name="adam", learning_rate=0.05))
    tx = optax.adam(0.05)
    step = jax.jit(make_step(tx, config, ONE))

    def run(objective, count):
        variables = begin(objective, jax.random.key(2), world[2])
        names = 5 + isinstance(objective, GatePenalty)
        state = TrainState(
            step=jnp.int32(0), variables=variables, opt_state=tx.init(variables.params), ema=None,
            lr_scale=jnp.float32(1), sums=jnp.zeros((names, 2)), bad_step=jnp.int32(-1),
            bad=jnp.zeros(names, bool),
        )  # fmt: skip
        for _ in range(count):
            state, _ = step(state, objective, world[2], jax.random.key(3))
        return state

    return run


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_it_starts_at_the_base_with_the_published_initialisation(world):
    _, base, batch = world
    objective = gated(world)
    params = begin(objective, jax.random.key(0), batch).params
    equal(objective.inner_params(params), base)
    assert jax.tree.structure(objective.inner_params(params)) == jax.tree.structure(base)
    big = GatedLowRank.of(None, {"kernel": jnp.zeros((400, 300))}, "kernel", rank=200)
    drawn = big.initial_params(jax.random.key(0), None)["kernel"]
    assert jnp.abs(drawn["a"]).max() == pytest.approx(400**-0.5, rel=1e-3)
    assert drawn["a"].std() == pytest.approx((3 * 400) ** -0.5, rel=0.01)
    assert drawn["w"].std() == pytest.approx(1.0, abs=0.15) and not drawn["b"].any()


def close(a, b):
    """Two programs of one arithmetic: the compiler may fuse them differently, to the last bit."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-7), a, b)


def test_thresholds_of_zero_change_nothing_and_large_ones_leave_the_base(world, trainer):
    _, base, _ = world
    schedule = Thresholds(steps=8, levels=4)
    plain = gated(world)
    none, huge = (gated(world, thresholds=schedule, largest=k) for k in (0.0, 10.0))
    close(trainer(none, 8).variables.params, trainer(plain, 8).variables.params)
    ended = trainer(huge, 8).variables.params
    assert all(not w.any() for w in codyra.gates(ended).values())
    equal(huge.inner_params(ended), base)
    assert all(n == 0 for n in codyra.active_ranks(ended).values())


@pytest.mark.parametrize("prox", codyra.PROX)
def test_the_threshold_follows_the_update_and_leaves_the_moments(world, trainer, prox):
    schedule = Thresholds(steps=8, levels=4)  # from step 5 on: 4 + 1
    objective = gated(world, thresholds=schedule, largest=0.9, prox=prox)
    before, after = trainer(objective, 5), trainer(objective, 6)
    free = trainer(gated(world, thresholds=schedule, largest=0.0, prox=prox), 6)
    close(before.variables.params, trainer(gated(world), 5).variables.params)
    equal(after.opt_state, free.opt_state)
    kappa = schedule.table(0.9)[5]
    assert kappa == pytest.approx(0.6)
    updated = codyra.gates(free.variables.params)
    for path, w in codyra.gates(after.variables.params).items():
        np.testing.assert_allclose(w, codyra.shrink(updated[path], kappa, prox), atol=1e-6)
    factors = [
        {p: x for p, x in zip(trees.paths(t), jax.tree.leaves(t)) if not p.endswith("/w")}
        for t in (after.variables.params, free.variables.params)
    ]
    equal(*factors)


def test_a_penalty_gives_no_exact_zeros_where_thresholds_do(world, trainer):
    objective = GatePenalty(inner=gated(world), strength=2.0)
    params = trainer(objective.inner, 0).variables.params
    expected = sum(np.abs(w).sum() for w in codyra.gates(params).values())
    assert float(objective.penalty(params)) == pytest.approx(expected, rel=1e-5)
    slope = jax.grad(objective.penalty)(params)
    for path, w in codyra.gates(params).items():
        np.testing.assert_array_equal(codyra.gates(slope)[path], np.sign(w))
    counts = codyra.active_ranks(trainer(objective, 8).variables.params)
    assert all(n == 3 for n in counts.values())
    schedule = Thresholds(steps=8, levels=4)
    cut = trainer(gated(world, thresholds=schedule, largest=0.15), 8).variables.params
    assert 0 < sum(codyra.active_ranks(cut).values()) < sum(counts.values())


def test_both_towers_learn(world):
    """With b = 0 the first gradient of a is exactly zero and that of b is not; then both are."""
    _, _, batch = world
    objective = gated(world)

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: objective.loss(Variables(p, {}), batch, None)[0])(params)

    params = begin(objective, jax.random.key(2), batch).params
    for step in range(2):
        grads = gradient(params)
        leaves = dict(zip(trees.paths(grads), jax.tree.leaves(grads)))
        assert {path.split("/")[0] for path in leaves} == {"image", "text"}
        for path, g in leaves.items():
            zero = path.endswith(("/a", "/w")) and step == 0
            assert bool(jnp.any(g != 0)) != zero, (path, step)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


def test_merging_keeps_the_logits_the_structure_and_the_rank(world):
    task, base, batch = world
    objective = gated(world)
    params = some(begin(objective, jax.random.key(0), batch).params)
    off = trees.map_with_path(
        lambda path, x: x.at[jnp.array([0, 2])].set(0.0)
        if path.endswith("/w") and "up" in path else x, params,
    )  # fmt: skip
    counts = codyra.active_ranks(off)
    assert counts["image/up/kernel"] == 1 and counts["image/down/kernel"] == 3
    before = answer(objective, off, batch)
    merged = objective.inner_params(off)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    assert [x.shape for x in jax.tree.leaves(merged)] == [x.shape for x in jax.tree.leaves(base)]
    again = GatedLowRank.of(task, merged, "kernel", rank=3)
    fresh = begin(again, jax.random.key(5), batch)
    np.testing.assert_allclose(answer(again, fresh.params, batch), before, atol=1e-5)
    np.testing.assert_allclose(answer(task, merged, batch), before, atol=1e-5)

    change = dict(zip(trees.paths(base), jax.tree.leaves(trees.sub(merged, base))))
    for path, count in counts.items():
        matrix = np.asarray(change[path])
        assert np.linalg.matrix_rank(matrix, tol=1e-5) <= count
        node = off
        for key in path.split("/"):
            node = node[key]
        bound = count**0.5 * np.prod(
            [np.linalg.norm(m, 2) for m in (node["a"], node["w"][:, None] * node["b"])]
        )
        assert np.linalg.norm(matrix) <= bound * (1 + 1e-5)  # the bound on an update of rank rho

    # What a pruned rank's factors hold does not matter, and they need not be kept.
    other = trees.map_with_path(
        lambda path, x: x.at[..., 0].set(7.0) if path.endswith("up/kernel/a") else x, off
    )
    np.testing.assert_array_equal(answer(objective, other, batch), before)
    kept = codyra.prune(off)
    assert kept["image"]["up"]["kernel"]["a"].shape == (9, 1)
    sizes = [sum(x.size for x in jax.tree.leaves(t)) for t in (kept, off)]
    assert sizes[0] < sizes[1]
    restored = trees.lora_merge(base, kept)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), restored, merged)


def test_kernels_of_every_layout_are_adapted_as_matrices():
    """Query, key, value: fused in one matrix, with heads, or stacked by a scan over layers."""
    rng = np.random.default_rng(0)
    separate = {
        name: jnp.asarray(rng.normal(size=(6, 6)), jnp.float32)
        for name in ("key", "query", "value")
    }
    fused = {"in": jnp.concatenate(list(separate.values()), axis=1)}
    heads = {"qkv": jnp.stack([w.reshape(6, 2, 3) for w in separate.values()], axis=1)}
    stacked = {"q": jnp.stack([w.reshape(6, 2, 3) for w in separate.values()])}
    out = {"o": jnp.stack(list(separate.values())).reshape(3, 2, 3, 6)}

    def adapt(params, layout=None):
        axes = () if layout is None else ((".", layout),)
        return GatedLowRank.of(None, params, ".", rank=2, axes=axes)

    one = adapt(separate)
    params = some(one.initial_params(jax.random.key(0), None))
    apart = one.inner_params(params)
    for name, w in separate.items():
        f = params[name]
        expected = np.asarray(w) + np.asarray(f["a"]) @ np.diag(f["w"]) @ np.asarray(f["b"])
        np.testing.assert_allclose(apart[name], expected, atol=1e-5)
    together = jax.tree.map(lambda *xs: jnp.stack(xs), *params.values())
    for tree, layout, form in (
        (fused, "io:3", lambda ws: jnp.concatenate(ws, axis=1)),
        (heads, "iboo", lambda ws: jnp.stack([w.reshape(6, 2, 3) for w in ws], axis=1)),
        (stacked, "bioo", lambda ws: jnp.stack([w.reshape(6, 2, 3) for w in ws])),
        (out, "biio", lambda ws: jnp.stack([w.reshape(2, 3, 6) for w in ws])),
    ):
        objective = adapt(tree, layout)
        (leaf,) = tree
        drawn = objective.initial_params(jax.random.key(1), None)[leaf]
        assert [drawn[k].shape for k in ("a", "b", "w")] == [(3, 6, 2), (3, 2, 6), (3, 2)]
        merged = objective.inner_params({leaf: together})[leaf]
        np.testing.assert_allclose(merged, form(list(apart.values())), atol=1e-5)
        assert codyra.active_ranks({leaf: together})[leaf].tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match=r"layout 'ioo' does not fit leaf 'in' of shape \(6, 18\)"):
        adapt(fused, "ioo").initial_params(jax.random.key(0), None)
    with pytest.raises(ValueError, match="need gated=True"):
        GatedLowRank.of(None, fused, ".", gated=False, thresholds=Thresholds(steps=100))


def test_sharding_changes_nothing(world):
    batch = world[2]
    source = ArraySource(jax.tree.map(np.asarray, batch))
    data = Pipeline(source, 8, repeat=True, num_threads=0)
    config = FitConfig(steps=6, optimizer=OptimizerConfig(name="adam", learning_rate=0.02))
    schedule = Thresholds(steps=6, levels=3)
    results = []
    for mesh in ({"data": 1}, {"data": 4, "fsdp": 2}):
        devices = jax.devices()[: math.prod(mesh.values())]
        layout = Layout(make_mesh(mesh, devices), min_size=1)
        objective = gated(world, thresholds=schedule, largest=0.2)
        fitted = fit(objective, data, config, layout=layout)
        results.append(jax.device_get((fitted.params, objective.inner_params(fitted.params))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *results)
    w = np.concatenate([w.ravel() for w in codyra.gates(results[0][0]).values()])
    assert (w == 0).any() and (w != 0).any()


# -- label spaces ------------------------------------------------------------------------------


def test_a_class_name_of_two_sets_is_two_classes_in_one_label_space(world):
    task, params, _ = world
    first, own = codyra.label_spaces([2, 3])
    assert first.tolist() == [0, 2]
    assert own.tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]]
    # Both sets have the class "5 6": the images of the second set's class look alike to the model.
    texts = jnp.array([[1, 2], [5, 6], [3, 4], [5, 6], [7, 8]], jnp.int32)
    inputs = jax.random.uniform(jax.random.key(4), (64, 3, 3, 1))
    features = task.replace(texts=texts).text_features(Variables(params, {}))
    union = ZeroShotClassification(
        module=task.module, features=features, candidates=jnp.asarray(own[1])
    )
    batch = {"inputs": inputs, "labels": jnp.full(64, 3)}
    logits = answer(union, params, batch)
    assert not jnp.any(jnp.argmax(logits, axis=-1) == 3)  # equal texts: the first of them wins
    metrics = union.loss(Variables(params, {}), batch, None)[1].metrics
    assert float(metrics["accuracy_all"].value()) == 0
    among = float((jnp.argmax(logits[:, 2:], axis=-1) == 1).mean())
    assert float(metrics["accuracy"].value()) == pytest.approx(among) and among > 0


def test_texts_become_words_and_prototypes_depend_on_the_text_alone():
    tokens, size = codyra.tokenise([["plain digit one", "digit two"], ["plain digit one"]])
    assert size == 5 and [t.shape for t in tokens] == [(2, 3), (1, 3)]
    assert tokens[0][1, 2] == 0 and tokens[0].min() == 0
    vectors = Prototypes(16).apply({}, jnp.asarray(np.concatenate(tokens)))
    np.testing.assert_array_equal(vectors[0], vectors[2])
    assert abs(np.corrcoef(vectors[0], vectors[1])[0, 1]) < 0.8


# -- recipe ------------------------------------------------------------------------------------

TINY = [
    "model.kind=prototypes", "adapted.text=", "model.image.features=16", "model.image.depth=1",
    "model.embedding=12", "batch_size=32", "data.tasks=inverted,turned", "data.shots=2",
    "base.steps=20", "full.steps=8", "adapt.steps=8", "joint.steps=4", "codyra.levels=4",
    "codyra.largest=0.2", "codyra.rank=2", "lora.ranks=1", "keep_models=true",
    "methods=zero_shot,wise_ft,lwf,lora,codyra",
]  # fmt: skip


def run(config, workdir):
    experiment = Experiment(config, workdir)
    experiment.layout = ONE
    return json.loads(json.dumps(experiment.run()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = apply_overrides(get_config("codyra:digits"), TINY)
    workdir = tmp_path_factory.mktemp("codyra")
    return config, workdir, run(config, workdir)


@pytest.mark.slow
def test_every_method_is_reported_and_trains_what_it_should(finished):
    _, workdir, results = finished
    table = results["tables"]["Continual learning, test accuracy"]
    rows = {row[0]: dict(zip(table["columns"], row)) for row in table["rows"]}
    assert list(rows) == ["zero-shot", "WiSE-FT", "LwF", "LoRA r = 1", "CoDyRA 0.2"]
    everything = json.loads((workdir / "stages/base/summary.json").read_text())["parameters"]
    assert rows["WiSE-FT"]["trained"] == rows["LwF"]["trained"] == everything
    matrices = [(64, 16), (16, 32), (32, 16), (16, 12)]
    factors = sum(m + n for m, n in matrices)
    assert rows["LoRA r = 1"]["trained"] == factors
    assert rows["CoDyRA 0.2"]["trained"] == 2 * (factors + len(matrices))
    assert rows["CoDyRA 0.2"]["active ranks"] < 2
    assert rows["zero-shot"]["drift"] == 0 < rows["CoDyRA 0.2"]["drift"]
    ranks = results["tables"]["Active ranks of 2, largest threshold 0.2"]
    assert len(ranks["rows"]) == len(matrices)
    assert set(results["curves"]["Plasticity and stability"]["series"]) == {"LoRA", "CoDyRA"}


@pytest.mark.slow
def test_a_resumed_run_gives_the_same_and_tasks_share_no_optimiser_state(finished):
    config, workdir, results = finished
    stages = workdir / "stages"
    before = (stages / "base/metrics.jsonl").stat().st_mtime_ns
    # The second task alone, from the stored model before it: fresh moments, hence the same end.
    shutil.rmtree(stages / "codyra-0.2-1")
    shutil.rmtree(workdir / "artifacts" / "codyra-0.2-1-model")
    assert run(config, workdir) == results
    assert (stages / "base/metrics.jsonl").stat().st_mtime_ns == before


def test_the_toy_clip_has_the_matrices_that_its_config_adapts():
    config = get_config("codyra:digits")
    module, _, tokens = codyra.make_model(config, [["plain digit one", "plain digit two"]])
    task = ImageTextClassification(module=module, texts=jnp.asarray(tokens[0]))
    batch = {"inputs": jnp.zeros((1, 8, 8, 1)), "labels": jnp.zeros(1, jnp.int32)}
    params = jax.eval_shape(lambda b: task.init(jax.random.key(0), b), batch).params
    adapted = codyra.gated_low_rank(
        config, task, params, rank=8, placement="all", gated=True, largest=0.1, prox="exact",
        steps=200,
    )  # fmt: skip
    shapes = jax.eval_shape(lambda o, b: o.init(jax.random.key(0), b), adapted, batch).params
    image = [(64, 96), (96, 192), (192, 96)] + [(96, 192), (192, 96)] * 2 + [(96, 64)]
    text = [(32, 32)] * 4 + [(32, 64), (64, 32)]
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(shapes)]
    assert sum(sizes) == 8 * sum(m + n + 1 for m, n in image + text)
    for placement, count in (("image", len(image)), ("text", len(text))):
        part = codyra.gated_low_rank(
            config, task, params, rank=8, placement=placement, gated=False, largest=0.0,
            prox="exact", steps=200,
        )  # fmt: skip
        shapes = jax.eval_shape(lambda o, b: o.init(jax.random.key(0), b), part, batch).params
        assert len(jax.tree.leaves(shapes)) == 2 * count


# -- CLIP at full scale ------------------------------------------------------------------------


def test_the_published_setting_has_the_published_size_and_lowers():
    config = get_config("codyra:xtail")
    sets = [[entry[0] for entry in get_config(f"codyra:{v}").data.sets] for v in ("xtail", "mtil")]
    assert len(sets[0]) == 10 and set(sets[1]) - set(sets[0]) == {"CIFAR100"}
    objective, batch, fit = codyra.plan(config)
    layout = Layout(make_mesh({"data": 4, "fsdp": 2}))
    lowered, arrays = lower_step(objective, batch, fit, layout)
    factors = [
        x.size for p, x in zip(trees.paths(arrays["params"]), jax.tree.leaves(arrays["params"]))
    ]
    # 12 layers of 4 attention and 2 MLP matrices of two towers: factors of rank 16, and gates.
    assert sum(factors) == 4_425_984
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(objective.base)]
    assert sum(sizes) == 149_620_737  # CLIP's own; what is deployed has no more
    assert "sdy.mesh" in lowered.as_text() or "mhlo.num_partitions = 8" in lowered.as_text()
    memory = lowered.compile().memory_analysis()
    print(
        f"\nMiB on a device: arrays {bytes_per_device(arrays) / 2**20:.0f}, "
        f"temporaries {memory.temp_size_in_bytes / 2**20:.0f}"
    )
    assert memory.argument_size_in_bytes > bytes_per_device(arrays)
    a = arrays["params"]["image"]["stack"]["layers"]["mlp"]["up"]["kernel"]
    assert a["a"].sharding.shard_shape(a["a"].shape) == (12, 384, 16)  # follows the input axis
    assert a["b"].sharding.shard_shape(a["b"].shape) == (12, 16, 1536)  # the output axis
    assert a["w"].sharding.shard_shape(a["w"].shape) == (12, 16)


class Prepared(list):
    """Stands for a data set that TensorFlow Datasets has prepared."""

    def __init__(self, examples, names):
        super().__init__(examples)
        label = types.SimpleNamespace(names=names)
        self.dataset_info = types.SimpleNamespace(features={"label": label})


def test_published_sets_are_drawn_once_and_seen_as_clip_sees_them(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    labels = [0, 0, 0, 0, 1, 1, 1, 2]

    def source(name, split, directory):
        assert directory is None
        rows = labels if split == "train" else labels[:2]
        images = rng.integers(0, 256, (len(rows), 12, 9, 3), np.uint8)
        examples = [{"image": x, "label": y} for x, y in zip(images, rows)]
        return Prepared(examples, ["a_b", "c", "d"])

    monkeypatch.setattr(codyra, "tfds_source", source)
    config = apply_overrides(get_config("codyra:mtil"), ["data.shots=2", "model.image_size=6"])
    with config.unlocked():
        config.data.sets = (("First", "first", 3, "a photo of a {}.", "train", "test"),)
    stream = codyra._published(Experiment(config, tmp_path))
    (task,) = stream.tasks
    assert task.prompts == ("a photo of a a b.", "a photo of a c.", "a photo of a d.")
    assert sorted(int(task.train[i]["labels"]) for i in range(len(task.train))) == [0, 0, 1, 1, 2]
    drawn = (tmp_path / "artifacts" / "shots-First.json").read_text()
    assert len(set(json.loads(drawn))) == 5 and len(task.test) == 2
    example = task.train[0]["inputs"]
    assert example.shape == (6, 6, 3) and example.dtype == np.float32

    flat = np.full((12, 9, 1), 128, np.uint8)
    assert np.all(codyra.clip_image(flat, 6) == 128)
    wide = np.zeros((6, 10, 3), np.uint8)
    wide[:, 2:8] = 255  # the centre of 6 x 10 is 6 x 6
    assert np.all(codyra.clip_image(wide, 6) == 255)
    with config.unlocked():
        config.data.sets = (("First", "first", 4, "{}", "train", "test"),)
    with pytest.raises(ConfigError, match="'first' has 3 classes, not 4"):
        codyra._published(Experiment(config, tmp_path / "b"))


@pytest.mark.slow
def test_a_pretrained_clip_learns_a_stream_of_prepared_sets(tmp_path, monkeypatch):
    """The recipe of the published configs on a small CLIP in Hugging Face's files."""
    tokenizers = pytest.importorskip("tokenizers")
    stack = {"features": 8, "num_layers": 2, "num_heads": 2, "activation": "quick_gelu"}
    module = Clip(
        ClipConfig(
            image=ViTConfig(
                stack=TransformerConfig(**stack), image_size=6, patch_size=3, patch_bias=False,
                norm_before=True, head="projection", projection=4,
            ),
            text=ClipTextConfig(
                vocab_size=9, stack=TransformerConfig(**stack, causal=True), projection=4,
            ),
        )
    )  # fmt: skip
    tokens = jnp.ones((1, 3), jnp.int32)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 6, 6, 3)), tokens)["params"]
    save_pretrained(tmp_path / "clip", module, params)
    words = {"[UNK]": 0, "a": 1, "photo": 2, "of": 3, "c": 4, "d": 5, ".": 6, "<end>": 8}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", 8)]
    )
    backend.save(str(tmp_path / "clip" / "tokenizer.json"))

    def source(name, split, directory):
        images = np.random.default_rng(0).integers(0, 256, (16, 6, 6, 3), np.uint8)
        examples = [{"image": x, "label": i % 2} for i, x in enumerate(images)]
        return Prepared(examples, ["c", "d"])

    monkeypatch.setattr(codyra, "tfds_source", source)
    overrides = [
        f"model.path={tmp_path / 'clip'}", "model.image_size=6", "batch_size=8",
        "eval_batch_size=16", "adapt.steps=8", "codyra.levels=4", "codyra.rank=2", "text_chunk=0",
        "model.remat=false", "model.dtype=float32",
    ]  # fmt: skip
    config = apply_overrides(get_config("codyra:xtail"), overrides)
    with config.unlocked():
        entry = (2, "a photo of a {}.", "train", "test")
        config.data.sets = (("First", "first", *entry), ("Second", "second", *entry))
    exp = Experiment(config, tmp_path / "run")
    exp.layout = ONE
    lab = codyra.Laboratory.of(exp)
    before = lab.model.params
    assert trees.paths(before) == trees.paths(stack_layers(params))
    assert lab.model.tokens[0].tolist() == [[1, 2, 3, 1, 4, 6, 8], [1, 2, 3, 1, 5, 6, 8]]
    learn = lab.low_rank(rank=2, placement="all", largest=0.3)
    learned = learn("second", 1, before)
    assert len(learned.ranks) == 2 * 6 * 2  # towers, matrices, layers
    assert "image/stack/layers/mlp/up/kernel[1]" in learned.ranks
    assert 0 < sum(learned.ranks.values()) < 2 * len(learned.ranks)
    changed = trees.sub(learned.params, before)
    moved = {p for p, x in zip(trees.paths(changed), jax.tree.leaves(changed)) if np.any(x)}
    assert moved <= {path.split("[")[0] for path in learned.ranks}
    assert {path.split("/")[0] for path in moved} == {"image", "text"}
    own, union = lab.scores(learned.params)
    assert own[0] == own[1] >= union[0] and union[1] == 0  # the two sets are the same


def test_configs_that_cannot_run_say_why(tmp_path):
    for override, message in (
        ("methods=codira", "config.methods has 'codira'; there are zero_shot, full"),
        ("data.base=plain,round", "no style 'round'"),
        ("data.kind=letters", "config.data.kind='letters'; choose one of digits, handwriting"),
        ("model.kind=vit", "config.model.kind='vit'; choose one of"),
    ):
        config = apply_overrides(get_config("codyra:digits"), [override])
        with pytest.raises(ConfigError, match=message):
            Experiment(config, tmp_path / override.split("=")[1].replace(",", "-")).run()
