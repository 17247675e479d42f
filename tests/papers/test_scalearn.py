"""ScaLearn in networks: insertion, dropout, folding, what is trained, stages, full scale."""

import functools
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax import trees
from transfer_jax.configuration import ConfigError, apply_overrides, get_config, list_configs
from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.sources import ArraySource
from transfer_jax.interop import save_pretrained
from transfer_jax.models import Bert, BertConfig, bert_stack
from transfer_jax.nn import TransformerStack, adapter_fusion, petl, stack_layers
from transfer_jax.objectives import Classification, Regression, Variables
from transfer_jax.papers import scalearn
from transfer_jax.papers.scalearn import Joint, Mixture, MultiLabel, Probing, Task
from transfer_jax.training import Experiment, FitConfig, Layout, OptimizerConfig, fit, make_mesh
from transfer_jax.training.aot import lower_step

CONFIG = apply_overrides(get_config("scalearn:glue"), ["adapter.bottleneck=3", "model.scan=False"])
SOURCES, FEATURES, LAYERS = 3, 8, 2
BATCH = {
    "inputs": jnp.asarray(np.random.default_rng(0).integers(0, 11, (4, 5))),
    "lengths": jnp.array([5, 3, 4, 5]),
    "labels": jnp.array([0, 1, 1, 0]),
}
STACK = functools.partial(
    bert_stack, features=FEATURES, num_layers=LAYERS, num_heads=2, hidden=16, dropout=0.0,
    attention_dropout=0.0, init_scale=0.3,
)  # fmt: skip


def network(scan=False):
    config = BertConfig(
        vocab_size=11, stack=STACK(scan=scan), max_positions=10, position_offset=2, token_types=1,
        roberta=True, head="classification", num_classes=2, classifier_dropout=0.0,
    )  # fmt: skip
    return Classification(module=scalearn.TextClassifier(config))


TASK = network()
PARAMS = jax.jit(TASK.init)(jax.random.key(0), BATCH).params
BASE = trees.partition(PARAMS, scalearn.HEAD)[1]
HEAD = trees.partition(PARAMS, scalearn.HEAD)[0]
SITES = scalearn.find_sites(CONFIG, TASK, PARAMS, BATCH)


def adapter(seed):
    drawn = adapter_fusion.init_adapter(jax.random.key(0), LAYERS, FEATURES, 3, stddev=1.0)
    key = jax.random.key(seed)
    return trees.map_with_path(
        lambda path, x: 0.5 * jax.random.normal(trees.leaf_key(key, path), x.shape), drawn
    )


ADAPTERS = [adapter(s) for s in range(SOURCES)]
BANK = adapter_fusion.stack_adapters(ADAPTERS)


def build(method, **options):
    return scalearn.stage_two(CONFIG, method, TASK, BASE, SITES, BANK, **options)


@jax.jit
def logits(objective, params):
    return objective.predict(Variables(params, {}), BATCH)


def predict(objective, combination, head=HEAD):
    return logits(objective, {"combination": combination, "full": head})


def stage_one(adapter):
    """Logits of the network with one adapter."""
    params = {"added": {"adapter": adapter_fusion.spread(adapter, SITES)}, "full": HEAD}
    return logits(scalearn.stage_one(CONFIG, TASK, BASE), params)


def draw(variant, seed=1):
    shape = adapter_fusion.scale_shape(variant, LAYERS, SOURCES, FEATURES)
    return jax.random.normal(jax.random.key(seed), shape)


# -- insertion ----------------------------------------------------------------------------------


def test_the_layer_is_pfeiffers_read_line_by_line():
    """One post-norm layer: v = LN(u + y), o = u + sum w e(v), output LN(o + y)."""
    config = STACK(num_layers=1)
    stack = TransformerStack(config)
    x = jax.random.normal(jax.random.key(0), (2, 5, FEATURES))
    params = stack.init(jax.random.key(1), x)["params"]
    w = draw("scalearn")[0]
    bank = adapter_fusion.at_site(BANK, 0)
    part = adapter_fusion.Sources(
        name="a", where=("mlp$",), modified="normed", insertion="sequential", dropout=0.0
    )
    with petl.adapted((part,), {"a": {"layers_0": {"mlp": {"bank": bank, "scales": w}}}}):
        got = stack.apply({"params": params}, x)

    def attended(stack, x):
        layer = stack.layers[0]
        return layer.attention_norm(x + layer.attention(x))

    y = np.asarray(stack.apply({"params": params}, x, method=attended))
    params = params["layers_0"]

    def norm(x):
        p = params["mlp_norm"]
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.norm_eps)
        return x * np.asarray(p["scale"]) + np.asarray(p["bias"])

    mlp = params["mlp"]
    hidden = nn.gelu(y @ mlp["up"]["kernel"] + mlp["up"]["bias"], approximate=False)
    u = np.asarray(hidden @ mlp["down"]["kernel"] + mlp["down"]["bias"])
    v = norm(u + y)
    o = u.copy()
    for s, a in enumerate(ADAPTERS):
        inner = np.maximum(v @ a["down"]["kernel"][0] + a["down"]["bias"][0], 0)
        o += np.asarray(w[s]) * np.asarray(inner @ a["up"]["kernel"][0] + a["up"]["bias"][0])
    np.testing.assert_allclose(got, norm(o + y), atol=1e-4)


@pytest.mark.parametrize("variant", adapter_fusion.VARIANTS)
def test_no_scales_is_the_frozen_network_and_one_hot_scales_are_stage_one(variant):
    objective = build(variant)
    zero = jnp.zeros_like(draw(variant))
    frozen = logits(TASK, PARAMS)
    np.testing.assert_allclose(predict(objective, {"scales": zero}), frozen, atol=1e-6)
    for s in (0, 2):
        expected = stage_one(ADAPTERS[s])
        assert np.abs(expected - frozen).max() > 1e-2
        got = predict(objective, {"scales": zero.at[:, s].set(1.0)})
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_folded_scales_give_the_same_logits():
    for variant in ("scalearn", "uniform++"):
        objective = build(variant)
        params = {"combination": {"scales": draw(variant)}, "full": HEAD}
        single, folded = objective.fold(params)
        wide = adapter_fusion.gather(folded["added"]["adapter"], SITES)
        assert wide["down"]["kernel"].shape == (LAYERS, FEATURES, SOURCES * 3)
        np.testing.assert_allclose(logits(single, folded), logits(objective, params), atol=1e-5)


def test_a_scanned_stack_gives_the_same():
    task = network(scan=True)
    params = stack_layers(PARAMS)
    sites = scalearn.find_sites(CONFIG, task, params, BATCH)
    assert [site.layers for site in sites] == [LAYERS]
    base = trees.partition(params, scalearn.HEAD)[1]
    for method, combination in (
        ("scalearn", {"scales": draw("scalearn")}),
        ("fusion", build("fusion").inner.draw(jax.random.key(3))),
    ):
        scanned = scalearn.stage_two(CONFIG, method, task, base, sites, BANK)
        head = trees.partition(params, scalearn.HEAD)[0]
        expected = predict(build(method), combination)
        np.testing.assert_allclose(predict(scanned, combination, head), expected, atol=1e-5)


# -- dropout ------------------------------------------------------------------------------------


@pytest.fixture
def used(monkeypatch):
    """The scales that each site has used, in order."""
    seen, inner = [], adapter_fusion.scaled_sum

    def spy(bank, scales, v):
        seen.append(np.asarray(scales))
        return inner(bank, scales, v)

    monkeypatch.setattr(adapter_fusion, "scaled_sum", spy)
    return seen


@pytest.mark.parametrize("variant", adapter_fusion.VARIANTS)
def test_parameters_are_dropped_not_activations(variant, used):
    objective = build(variant)
    w = np.abs(draw(variant)) + 0.1
    variables = Variables({"combination": {"scales": jnp.asarray(w)}, "full": HEAD}, {})
    every = np.broadcast_to(w, (LAYERS, *w.shape[1:]))
    objective.loss(variables, BATCH, None)
    np.testing.assert_array_equal(used, every)  # evaluation: none is dropped
    masks = []
    for seed in range(8):
        used.clear()
        objective.loss(variables, BATCH, jax.random.key(seed))
        assert len(used) == LAYERS  # [n, 1 or d] each: one mask for all examples and tokens
        kept = np.stack(used) != 0
        rate = 0.0 if variant == "uniform++" else 0.3
        np.testing.assert_allclose(used, np.where(kept, every / (1 - rate), 0), rtol=1e-6)
        masks.append(kept)
    share = np.mean(masks)
    if variant == "uniform++":
        assert share == 1
    else:
        assert 0.4 < share < 0.95
        assert any(np.any(m[0] != m[1]) for m in masks)  # the shared parameter too


def test_ablations_and_fixed_scales_go_without_dropout(used):
    variables = Variables({"combination": {"scales": draw("scalearn")}, "full": HEAD}, {})
    for method in ("scalearn:mean", "scalearn:softmax"):
        used.clear()
        build(method).loss(variables, BATCH, jax.random.key(0))
        np.testing.assert_allclose(np.stack(used).sum(axis=1), 1.0, atol=1e-4)
    used.clear()
    fixed = build("uniform++", fixed=jnp.array([0.3, 0.0, 0.9])[None, :, None])
    drawn = fixed.init(jax.random.key(0), BATCH)
    assert jax.tree.leaves(drawn.params["combination"]) == []
    fixed.loss(drawn, BATCH, jax.random.key(0))
    np.testing.assert_allclose(np.squeeze(used), [[0.3, 0.0, 0.9]] * LAYERS)


# -- what is trained ----------------------------------------------------------------------------

D, L, N, R = 768, 12, 8, 48
HEAD_SIZE = D * D + D + 3 * D + 3
PUBLISHED = [
    ("glue", "mnli", "scalearn", 73_728 + HEAD_SIZE),
    ("glue", "stsb", "fusion", 3 * D * D * L + 2 * D * L + D * D + D + D + 1),
    ("glue_few_shot", "rte", "adapter", L * (2 * D * R + R + D) + D * D + D + 2 * D + 2),
    ("superglue", "copa", "uniform++", 8 + D * D + D + D + 1),
    ("humset", "sectors", "scalearn++", 5 * D + D * D + D + 11 * D + 11),
]


@pytest.mark.parametrize("variant, name, method, count", PUBLISHED)
def test_published_experiments_lower_and_train_as_many_parameters(variant, name, method, count):
    config = get_config(f"scalearn:{variant}")
    layout = Layout(make_mesh({"data": 2, "fsdp": 4}))
    objective, batch, stage = scalearn.plan(config, name, method)
    lowered, held = lower_step(objective, batch, stage, layout)
    assert "mhlo.num_partitions = 8" in (text := lowered.as_text()) or "sdy.mesh" in text
    assert sum(x.size for x in jax.tree.leaves(held["params"])) == count
    moments = [x for x in jax.tree.leaves(held["optimizer"]) if x.ndim]
    assert sum(x.size for x in moments) == 2 * count  # nothing else has an optimiser slot
    if method == "scalearn":
        assert adapter_fusion.scale_shape("scalearn++", L, N, D) == (1, N, D)
        size = config.data.tasks[name].size
        assert stage.steps == 30 * math.ceil(size / 32) and stage.patience == 0
        assert stage.optimizer.learning_rate == 6e-3
    if variant == "glue_few_shot":
        assert (stage.steps, stage.patience) == (1000, 20)


def test_fusion_has_its_penalty_and_shared_scales_can_have_one():
    objective = build("fusion")
    drawn = objective.init(jax.random.key(0), BATCH)
    params = jax.tree.map(lambda x: x + 0.1, drawn.params)
    loss, aux = objective.loss(Variables(params, {}), BATCH, None)
    plain, _ = objective.inner.loss(Variables(params, {}), BATCH, None)
    kernel = params["combination"]["fusion"]["value"]["kernel"]
    expected = np.square(np.eye(FEATURES) - kernel).sum()
    np.testing.assert_allclose(loss - plain, 0.01 * expected, rtol=1e-3)
    np.testing.assert_allclose(aux.metrics["penalty"].value(), expected, rtol=1e-5)
    config = apply_overrides(CONFIG, ["scale_penalty=0.1", "scale_norm=1"])
    regular = scalearn.stage_two(config, "uniform++", TASK, BASE, SITES, BANK)
    scales = {"combination": {"scales": draw("uniform++")}}
    np.testing.assert_allclose(regular.penalty(scales), np.abs(draw("uniform++")).sum(), rtol=1e-6)


# -- several tasks, several scales --------------------------------------------------------------


def test_the_joint_loss_is_each_tasks_own():
    rng = np.random.default_rng(0)

    class Outputs(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            self.param("w", nn.initializers.ones, ())
            return inputs

    sizes = (40, 10, 20)
    tasks = [
        Task("classes", 3, "accuracy", {}), Task("score", 1, "pearson", {}),
        Task("labels", 2, "macro_f1", {}),
    ]  # fmt: skip
    labels = [rng.integers(0, 3, 40), rng.normal(size=(10, 1)), rng.integers(0, 2, (20, 2))]
    sources = [
        ArraySource({"inputs": rng.normal(size=(n, 6)).astype(np.float32), "labels": y})
        for n, y in zip(sizes, labels)
    ]
    mixture = Mixture(tasks, sources, 1.0, 4000, seed=0)
    np.testing.assert_allclose(np.bincount(mixture.which) / 4000, np.array(sizes) / 70, atol=0.03)
    np.testing.assert_allclose(scalearn.temperature_shares(sizes, math.inf), 1 / 3)
    shares = scalearn.temperature_shares(sizes, 2.0)
    np.testing.assert_allclose(shares, np.sqrt(sizes) / np.sqrt(sizes).sum())
    batch = mixture.take(np.arange(30))
    variables = Variables({"w": jnp.ones(())}, {})
    joint = Joint(module=Outputs(), spans=mixture.spans)
    got, _ = joint.loss(variables, batch, None)
    total = 0.0
    for i in range(30):
        t, example = mixture.which[i], mixture.example[i]
        _, start, stop = mixture.spans[t]
        own = scalearn.objective_of(tasks[t], Outputs())
        assert isinstance(own, (Classification, Regression, MultiLabel)[t])
        one = {"inputs": batch["inputs"][i : i + 1, start:stop], "labels": labels[t][[example]]}
        total += own.loss(variables, jax.tree.map(jnp.asarray, one), None)[0]
    np.testing.assert_allclose(got, total / 30, rtol=1e-5)
    logits = np.array([0.3, -1.2])
    expected = np.mean(np.log1p(np.exp(-np.array([0.3, 1.2]))))
    loss = MultiLabel(module=Outputs()).loss(
        variables, {"inputs": logits[None], "labels": np.array([[1.0, 0.0]])}, None
    )[0]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_probing_trains_every_head_as_if_it_were_alone():
    grid = scalearn.probing_grid((0.0, 0.5, 1.0), SOURCES)
    assert grid.shape == (2 * 9, SOURCES) and np.all((grid[:, :-1] != 0).sum(axis=1) <= 1)
    grid = grid[[1, 5]]
    inner = build("uniform++", fixed=jnp.ones((1, 1, 1)))
    probing = Probing(inner=inner, grid=jnp.asarray(grid))
    variables = probing.init(jax.random.key(0), BATCH)

    @jax.jit
    def gradient(objective, params):
        return jax.grad(lambda p: objective.loss(Variables(p, {}), BATCH, None)[0])(params)

    grads = gradient(probing, variables.params)
    outputs = logits(probing, variables.params)
    for g in range(2):
        alone = inner.replace(fixed=jnp.asarray(grid[g])[None, :, None])
        params = jax.tree.map(lambda x, g=g: x[g], variables.params)
        expected = gradient(alone, params)
        jax.tree.map(
            lambda a, b, g=g: np.testing.assert_allclose(a[g], b, atol=1e-5), grads, expected
        )
        np.testing.assert_allclose(outputs[g], logits(alone, params), atol=1e-5)


def test_random_adapters_have_the_norms_of_the_true_ones():
    noise = scalearn.random_adapters(ADAPTERS[0], jax.random.key(5))

    def check(a, b):
        norms = [np.linalg.norm(np.asarray(x).reshape(LAYERS, -1), axis=1) for x in (a, b)]
        np.testing.assert_allclose(*norms, rtol=1e-4)
        assert np.abs(a - b).max() > 0.1

    jax.tree.map(check, noise, ADAPTERS[0])


# -- the recipe ---------------------------------------------------------------------------------

TINY = [
    "sources=plain,flipped", "targets=rotated", "shots=2", "model.width=16",
    "model.depth=2", "adapter.bottleneck=4", "fits.base.steps=10", "fits.source.steps=10",
    "fits.joint.steps=5", "fits.probing.steps=3", "probing=0.0,1.0",
    "methods=adapter,scalearn,soup,joint,probing",
    *(f"fits.{name}.{field}" for name in ("adapter", "head", "full", "fusion", "scales")
      for field in ("steps=4", "eval_every=2")),
]  # fmt: skip


def run(config, workdir, monkeypatch=None):
    """Runs on one device; returns the results and the examples that each stage was given."""
    experiment = Experiment(config, workdir)
    experiment.layout = Layout(make_mesh({"data": 1}, jax.devices()[:1]))
    given = {}
    if monkeypatch is not None:
        inner = experiment.fit

        def spy(name, objective, train, *args, **kwargs):
            given[name] = train.source
            return inner(name, objective, train, *args, **kwargs)

        monkeypatch.setattr(experiment, "fit", spy)
    return json.loads(json.dumps(experiment.run())), given


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = apply_overrides(get_config("scalearn:digits"), TINY)
    workdir = tmp_path_factory.mktemp("scalearn")
    with pytest.MonkeyPatch.context() as monkeypatch:
        results, given = run(config, workdir, monkeypatch)
    return config, workdir, results, given


@pytest.mark.slow
def test_the_recipe_trains_what_it_should_on_what_it_may(finished):
    _, workdir, results, given = finished
    table = {row[0]: row[1] for row in results["tables"]["Test scores"]["rows"]}
    assert set(table) == {"adapter", "scalearn", "soup", "joint", "probing"}
    # The target's own adapter has seen the few examples and no others; nothing else of the target.
    ids = json.loads((workdir / "artifacts/rotated-2-examples.json").read_text())
    assert len(ids) == 20
    for stage in ("adapter", "scalearn", "soup", "probing"):
        assert given[f"rotated-2-{stage}"].indices.tolist() == ids
    mixture = given["rotated-2-joint"]
    assert mixture.sources[-1].indices.tolist() == ids
    pool = given["rotated-2-adapter"].source
    images = {np.rot90(x, -1).tobytes() for x in pool.arrays["inputs"]}
    assert not images & {x.tobytes() for x in given["source-plain"].arrays["inputs"]}

    def trained(stage):
        return json.loads((workdir / "stages" / stage / "summary.json").read_text())["parameters"]

    head = 16 * 10 + 10
    single = 2 * (2 * 16 * 4 + 4 + 16)
    assert trained("source-plain") == trained("rotated-2-adapter") == single + head
    assert trained("rotated-2-scalearn") == 2 * 3 * 16 + head
    assert trained("rotated-2-soup") == head
    assert trained("rotated-2-joint") == single + 16 * 30 + 30


@pytest.mark.slow
def test_stage_two_runs_from_saved_adapters_in_any_order(finished, tmp_path):
    config, workdir, _, given = finished
    names = ["source-plain", "source-flipped", "rotated-2-adapter"]
    task = Classification(module=scalearn.network(config, 10))
    batch = Pipeline(given["rotated-2-adapter"], 20).example_batch()
    params = task.init(jax.random.key(0), batch).params
    sites = scalearn.find_sites(config, task, params, batch)
    base = trees.partition(params, scalearn.HEAD)[1]
    order = [1, 0, 2]
    bank = scalearn.load_bank(workdir, names, sites)
    moved = scalearn.load_bank(workdir, [names[i] for i in order], sites)
    w = jax.random.normal(jax.random.key(1), (2, 3, 16))
    head = {"full": trees.partition(params, scalearn.HEAD)[0]}
    first, second = (
        scalearn.stage_two(config, "scalearn", task, base, sites, bank).predict(
            Variables({"combination": {"scales": w}, **head}, {}), batch
        )
        for bank, w in ((bank, w), (moved, w[:, jnp.array(order)]))
    )
    np.testing.assert_allclose(first, second, atol=1e-5)
    # Another work directory, no stage 1, another order.
    again = apply_overrides(
        config, [f"bank={workdir}", "sources=flipped,plain", "methods=uniform++"]
    )
    results, _ = run(again, tmp_path / "a")
    assert [p.name for p in (tmp_path / "a" / "stages").iterdir() if "source" in p.name] == []
    stored = json.loads((tmp_path / "a/artifacts/rotated-2-sources.json").read_text())
    before = json.loads((workdir / "artifacts/rotated-2-sources.json").read_text())
    assert [s for s, _ in stored] == [names[i] for i in order]
    assert dict(stored[:2]).items() <= dict(before).items()  # the same adapters, by digest
    assert 0 <= results["scalars"]["k = 2, uniform++"] <= 1


def test_one_device_and_eight_learn_the_same_scales():
    data = Pipeline(ArraySource({k: np.asarray(v) for k, v in BATCH.items()}), 8, repeat=True)
    config = FitConfig(steps=3, optimizer=OptimizerConfig(learning_rate=1e-2))
    objective = build("uniform++")
    before = jax.tree.map(np.array, (BASE, BANK))
    one, eight = (
        fit(objective, data, config, layout=Layout(make_mesh({"data": n}, jax.devices()[:n])))
        for n in (1, 8)
    )
    start = objective.init(jax.random.key(0), BATCH).params["combination"]["scales"]
    scales = one.params["combination"]["scales"]
    assert np.abs(scales - start).max() > 1e-3
    np.testing.assert_allclose(scales, eight.params["combination"]["scales"], atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, before, (BASE, BANK))  # frozen, bit for bit
    assert set(one.params) == {"combination", "full"}
    assert trees.paths(one.params["full"]) == trees.paths(HEAD)


@pytest.mark.slow
def test_tokens_and_a_backbone_are_read_from_files(tmp_path):
    """Two of the published tasks on a tiny RoBERTa, a score and a choice, both as sources."""
    config = BertConfig(
        vocab_size=11, stack=STACK(norm_eps=1e-5), max_positions=10, position_offset=2,
        token_types=1, roberta=True, head="classification",
    )  # fmt: skip
    save_pretrained(tmp_path / "roberta", Bert(config), PARAMS["encoder"])
    rng = np.random.default_rng(0)
    for name, shape, labels in (
        ("stsb", (), lambda n: rng.normal(size=(n, 1)).astype(np.float32)),
        ("copa", (2,), lambda n: rng.integers(0, 2, n)),
    ):
        (tmp_path / name).mkdir()
        for split, n in (("train", 40), ("validation", 12), ("test", 12)):
            np.savez(
                tmp_path / name / f"{split}.npz", labels=labels(n),
                inputs=rng.integers(0, 11, (n, *shape, 5), dtype=np.int32),
                lengths=rng.integers(1, 6, (n, *shape), dtype=np.int32),
            )  # fmt: skip
    config = get_config("scalearn:superglue")
    stsb = get_config("scalearn:glue").data.tasks.stsb
    with config.unlocked():
        config.data.tasks = {"stsb": stsb, "copa": config.data.tasks.copa}
    fields = {
        "features": FEATURES, "num_layers": LAYERS, "num_heads": 2, "hidden": 16, "vocab_size": 11,
    }  # fmt: skip
    config = apply_overrides(config, [
        f"backbone={tmp_path / 'roberta'}", f"data.directory={tmp_path}", "sources=stsb,copa",
        "targets=stsb", "methods=adapter,scalearn", "data.tasks.stsb.epochs=1",
        "data.tasks.copa.epochs=1", "adapter.bottleneck=3", "model.max_positions=10",
        "model.dtype=float32", *(f"model.{k}={v}" for k, v in fields.items()),
    ])  # fmt: skip
    results, given = run(config, tmp_path / "run", pytest.MonkeyPatch())
    assert set(given) == {"source-stsb", "source-copa", "stsb-scalearn"}
    rows = dict(results["tables"]["Test scores"]["rows"])
    assert set(rows) == {"adapter", "scalearn"} and all(0 < abs(r) <= 1 for r in rows.values())
    summary = tmp_path / "run/stages/stsb-scalearn/summary.json"
    head = FEATURES**2 + FEATURES + FEATURES + 1
    assert json.loads(summary.read_text())["parameters"] == LAYERS * 2 * FEATURES + head


def test_configs_that_cannot_run_say_why(tmp_path):
    assert list(list_configs()["scalearn"].variants) == [
        "digits", "handwriting", "glue", "glue_few_shot", "superglue", "humset",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="directory is empty"):
        Experiment(get_config("scalearn:glue"), tmp_path / "a").run()
    for override, message in (
        ("methods=scalern", "config.methods has .'scalern'"),
        ("sources=turned", "no domain 'turned'"),
    ):
        config = apply_overrides(get_config("scalearn:digits"), [override])
        with pytest.raises(ConfigError, match=message):
            Experiment(config, tmp_path / override.split("=")[0]).run()
