"""CSTRL: what its objectives reduce to, what the stages may see, and the recipe."""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests import toy
from transfer_jax import trees
from transfer_jax.configuration import ConfigError, apply_overrides, get_config, list_configs
from transfer_jax.data.reports import encode_pairs, summary_pairs
from transfer_jax.objectives import Penalized, Seq2Seq, Variables, WarmStart, losses
from transfer_jax.papers import cstrl
from transfer_jax.papers.cstrl import TokenDistilled, Unfreezing
from transfer_jax.training import Experiment, FitConfig, Layout, OptimizerConfig, fit, make_mesh
from transfer_jax.training.aot import lower_step

KEY = jax.random.key(0)
SMALL = [
    "model.features=8", "model.num_layers=1", "model.decoder_layers=1", "model.num_heads=2",
    "model.head_dim=4", "model.hidden=16", "data.count=80", "data.min_freq=1",
    "gsg.batch_size=8", "gsg.fit.steps=2", "gsg.fit.eval_every=2", "gsg.source_length=40",
    "gsg.target_length=24", "summary.batch_size=8", "summary.fit.steps=2",
    "summary.source_length=40", "summary.target_length=12", "fisher.examples=16",
    "fisher.batch_size=8", "kd.fit.steps=2", "kd.batch_size=8", "kd.students.x8.features=4",
    "kd.students.x8.num_heads=1", "eval_batch_size=8", "decode.max_new_tokens=12",
]  # fmt: skip


@jax.jit
def loss_of(objective, variables, batch):
    return objective.loss(variables, batch, None)


predict = jax.jit(lambda objective, variables, batch: objective.predict(variables, batch))


def single():
    return Layout(make_mesh({"data": 1}, jax.devices()[:1]))


def close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.fixture(scope="module")
def world():
    """A tiny T5 on generated reports: corpus, objective, parameters, eight examples."""
    config = apply_overrides(get_config("cstrl:grammar"), SMALL)
    corpus = cstrl.Corpus.of(config)
    task = Seq2Seq(module=cstrl.network(config.model, len(corpus.tokenizer)))
    batch = corpus.summaries("train").take(np.arange(8))
    variables = jax.jit(task.init)(KEY, batch)

    def nll(params, batch):
        return task.example_nll(Variables(params, {}), batch, unit="token_mean")

    def fisher(batch):
        return trees.fisher_diagonal(nll, variables.params, batch, kind="empirical", chunk_size=8)

    return World(corpus, task, variables, batch, fisher)


class World(NamedTuple):
    corpus: Any
    task: Any
    variables: Any
    batch: Any
    fisher: Any


def padded(batch, source, target):
    """The same examples, with more padding that holds anything."""
    wider = {"inputs": source, "targets": target}
    return {**batch, **{
        name: np.pad(batch[name], ((0, 0), (0, more)), constant_values=3)
        for name, more in wider.items()
    }}  # fmt: skip


def test_padding_reaches_neither_loss_nor_fisher_information_nor_summaries(world):
    corpus, task, variables, batch, fisher = world
    longer = padded(batch, 7, 5)

    def everything(batch):
        loss = loss_of(task, variables, batch)[0]
        options = corpus.config.decode
        tokens = cstrl.write(
            task.module, variables.params, batch["inputs"], batch["lengths"], options
        )
        return loss, fisher(batch), tokens

    loss, diagonal, tokens = everything(batch)
    longer_loss, longer_diagonal, longer_tokens = everything(longer)
    np.testing.assert_allclose(loss, longer_loss, rtol=1e-5)
    close(diagonal, longer_diagonal, rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(tokens, longer_tokens)
    # Written step by step, each token is the most likely one of a full pass.
    logits = predict(task, variables, {**batch, "targets": np.asarray(tokens)})
    done = np.cumsum(np.asarray(tokens) == 1, axis=1) - (np.asarray(tokens) == 1) > 0
    np.testing.assert_array_equal(np.where(done, 0, jnp.argmax(logits, -1)), tokens)


def test_loss_penalty_and_fisher_information_are_those_of_one_device(world):
    _, task, variables, batch, fisher = world
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))

    one = fisher(batch)
    close(fisher(rows), one, rtol=1e-4)
    moved = Variables(jax.tree.map(lambda x: x + 0.01, variables.params), {})
    objective = Penalized(inner=task, anchor=variables.params, fisher=one, strength=10.0)
    split = lambda x: NamedSharding(  # noqa: E731
        mesh, PartitionSpec("data") if x.ndim and x.shape[0] % 8 == 0 else PartitionSpec()
    )
    place = lambda tree: jax.tree.map(lambda x: jax.device_put(x, split(x)), tree)  # noqa: E731
    sharded = objective.replace(anchor=place(variables.params), fisher=place(one))
    np.testing.assert_allclose(
        loss_of(sharded, place(moved), rows)[0], loss_of(objective, moved, batch)[0], rtol=1e-5
    )


def test_a_strength_of_zero_is_fine_tuning_bit_for_bit():
    task = toy.classifier()
    params = task.init(KEY, toy.source(8).take(np.arange(8))).params
    start = WarmStart(inner=task, params=params)
    fisher = jax.tree.map(jnp.ones_like, params)
    ways = (
        start,
        Penalized(inner=start, anchor=params, fisher=fisher, strength=0.0),
        Penalized(inner=start, anchor=params, strength=0.0, penalty_step="proximal"),
    )
    batch = toy.source(8).take(np.arange(8))

    def update(way):  # operation by operation: how the compiler fuses may change the last bit
        slope = jax.grad(lambda p: way.loss(Variables(p, {}), batch, KEY)[0])(params)
        return way.proximal(jax.tree.map(lambda p, g: p - 0.1 * g, params, slope), 0.1)

    plain, *others = map(update, ways)
    assert all(toy.leaves_equal(plain, other) for other in others)
    config = FitConfig(steps=4, optimizer=OptimizerConfig(name="sgd", learning_rate=1e-1))
    plain, *others = (fit(w, toy.train_data(), config, layout=single()).params for w in ways)
    for other in others:
        close(plain, other, atol=1e-7)


def test_distillation_by_hand(world):
    _, task, variables, batch, _ = world
    teacher = Variables(jax.tree.map(lambda x: x * 3.0, variables.params), {})
    distilled = TokenDistilled(
        inner=task, teacher=task, teacher_variables=teacher, weight=0.7, temperature=20.0
    )
    s, t = (predict(task, v, batch) for v in (variables, teacher))
    kl = losses.temperature_kl(s, t, temperature=20.0)
    counts = np.arange(kl.shape[1]) < batch["target_lengths"][:, None]
    alone = loss_of(task, variables, batch)[0]
    loss, aux = loss_of(distilled, variables, batch)
    mean = float(kl[counts].mean())
    # At this temperature the divergence is a small difference of large numbers.
    assert float(aux.metrics["distance"].value()) == pytest.approx(mean, rel=1e-2)
    assert float(loss) == pytest.approx(0.3 * float(alone) + 0.7 * mean, rel=1e-3)
    released = distilled.replace(released=True, inner=task.replace(count_padding=True))
    loss, _ = loss_of(released, variables, batch)
    counted = losses.cross_entropy(s, batch["targets"]).mean()
    expected = 0.3 * float(counted) + 0.7 * float(kl.mean()) / 64
    assert float(loss) == pytest.approx(expected, rel=1e-3)


def test_tensors_thaw_in_the_order_of_definition():
    # T5-small: 50 tensors and 20 epochs; 5 at the start, then 3 after each epoch.
    epochs = cstrl.thaw_epochs(50, 20)
    assert [epochs.count(e) for e in range(3)] == [5, 3, 3] and max(epochs) == 15
    paths = [
        "encoder/norm/scale", "encoder/layers_10/mlp/up/kernel", "encoder/layers_2/mlp_norm/scale",
        "encoder/layers_2/attention/value/kernel", "encoder/relative_bias/embedding",
        "encoder/layers_0/mlp/up/kernel", "encoder/layers_0/attention/out/kernel",
    ]  # fmt: skip
    order = [6, 4, 5, 3, 2, 1, 0]
    assert cstrl.definition_order(paths) == [paths[i] for i in order]


def test_frozen_tensors_do_not_move_until_their_time(world):
    _, task, variables, batch, _ = world
    params = variables.params
    objective = Unfreezing.of(WarmStart(inner=task, params=params), params, 2, 10)
    frozen = trees.paths(objective.thaw)
    assert all(p.startswith("encoder/") for p in frozen) and "tokens/embedding" not in frozen
    when = {p: int(x) for p, x in zip(frozen, jax.tree.leaves(objective.thaw))}
    first, last = min(when.values()), max(when.values())
    assert first < last and first % 2 == last % 2 == 0

    @jax.jit
    def at(step):
        now = objective.at(step)
        gradient = jax.grad(lambda p: now.loss(Variables(p, {}), batch, None)[0])(params)
        shifted = jax.tree.map(lambda x: x + 1.0, params)
        return gradient, now.proximal(shifted, jnp.float32(0.1))

    for step in (0, first, last):
        gradient, after = at(step)
        for path, g, new, old in zip(
            trees.paths(params), *map(jax.tree.leaves, (gradient, after, params)), strict=True
        ):
            trained = step >= when.get(path, 0)
            assert bool(jnp.any(g != 0)) == trained, path
            np.testing.assert_allclose(new, old + (1.0 if trained else 0.0), rtol=1e-6)


def test_permuted_tasks_are_permutations_and_the_first_is_none():
    data = {"inputs": np.random.default_rng(0).normal(size=(5, 64)), "labels": np.arange(5)}
    first, second, third = cstrl.permuted(data, 3)
    assert first.arrays["inputs"] is not None
    np.testing.assert_array_equal(first.arrays["inputs"], data["inputs"])
    for task in (second, third):
        assert not np.array_equal(task.arrays["inputs"], data["inputs"])
        np.testing.assert_array_equal(
            np.sort(task.arrays["inputs"], axis=1), np.sort(data["inputs"], axis=1)
        )
    np.testing.assert_array_equal(
        second.arrays["inputs"], cstrl.permuted(data, 2)[1].arrays["inputs"]
    )


def test_separate_penalties_add_up():
    task = toy.classifier()
    batch = toy.source(8).take(np.arange(8))
    params = task.init(KEY, batch).params
    moved, other = (jax.tree.map(lambda x, by=by: x + by, params) for by in (0.1, -0.2))
    ones = jax.tree.map(jnp.ones_like, params)
    state = trees.Consolidated((params, other), (ones, trees.scale(ones, 3.0)))
    loss = loss_of(cstrl.consolidating(task, state, 2.0), Variables(moved, {}), batch)[0]
    count = sum(x.size for x in jax.tree.leaves(params))
    expected = loss_of(task, Variables(moved, {}), batch)[0] + count * (0.1**2 + 3 * 0.3**2)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


# -- configs and the recipe ------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["t5_small", "released"])
def test_the_published_setting_lowers(variant):
    config = get_config(f"cstrl:{variant}")
    objective, batch, settings = cstrl.plan(config)
    lowered, held = lower_step(
        objective, batch, settings, Layout(make_mesh({"data": 2, "fsdp": 4}))
    )
    assert sum(x.size for x in jax.tree.leaves(held["params"])) == 60_506_624
    # The anchor, its Fisher diagonal, and two coefficients: strength and label smoothing.
    assert sum(x.size for x in jax.tree.leaves(held["carried"])) == 2 * 60_506_624 + 2
    assert "bf16" in lowered.as_text()
    assert settings.steps == 20 * (100_229 // 16)
    strengths = [
        float(objective.at(jnp.int32(s)).strength) if objective.schedule else None
        for s in (0, 10**6)
    ]
    expected = [0.9, 0.2] if variant == "t5_small" else [None, None]
    assert strengths == [x if x is None else pytest.approx(x) for x in expected]
    released = variant == "released"
    assert config.gsg.count_padding == released == (config.fisher.kind == "batched")
    assert config.decode.max_new_tokens == (20 if released else 64)


def test_students_shrink_the_encoder_and_keep_six_decoder_layers():
    config = get_config("cstrl:t5_small")
    for name, layers in (("x8", 4), ("x16", 3), ("x32", 2)):
        fields = {**config.model.to_dict(), **config.kd.students[name].to_dict()}
        module = cstrl.network(fields, 32_100)
        assert module.config.encoder.num_layers == layers
        assert module.config.decoder.num_layers == 6 and module.config.encoder.head_dim == 64


def run(config, workdir, layout=None):
    experiment = Experiment(config, workdir)
    if layout is not None:
        experiment.layout = layout
    return json.loads(json.dumps(experiment.run()))


@pytest.mark.slow
def test_the_recipe_sees_no_test_report(tmp_path, monkeypatch):
    few = ["methods=ewc", "kd.teacher=ewc"]
    config = apply_overrides(get_config("cstrl:grammar"), [*SMALL, *few])
    seen = []
    original = Experiment.fit

    def watched(self, name, objective, train, *args, **kwargs):
        seen.append((name, train.source))
        return original(self, name, objective, train, *args, **kwargs)

    monkeypatch.setattr(Experiment, "fit", watched)
    results = run(config, tmp_path, single())
    assert [name for name, _ in seen] == [
        "gap-sentences", "ewc-64", "x8-alone", "x8-distilled",
    ]  # fmt: skip
    methods = [row[0] for row in results["tables"]["Summaries of 8 test reports"]["rows"]]
    assert methods[:4] == ["constant", "lead-1", "LexRank-1", "nearest neighbour"]
    assert methods[4:] == ["ewc", "x8, alone", "x8, distilled"]

    # No stage sees a test report, with its Impression or, in gap sentences, without.
    corpus = cstrl.Corpus.of(config)
    sizes = config.summary.source_length, config.summary.target_length
    tested = rows_of(encode_pairs(summary_pairs(corpus.splits["test"]), corpus.tokenizer, *sizes))
    for name, source in seen[1:]:
        assert not tested & rows_of(source), name
    assert not rows_of(corpus.gaps("test")) & rows_of(seen[0][1])


def rows_of(source):
    pairs = zip(source.arrays["inputs"].tolist(), source.arrays["targets"].tolist())
    return {(*inputs, -1, *targets) for inputs, targets in pairs}


@pytest.mark.slow
def test_the_digits_recipe_tells_divergence_from_a_result(tmp_path):
    config = apply_overrides(
        get_config("cstrl:fisher"), ["tasks=2", "train.steps=30", "fisher.examples=64",
                                     "model.hidden=16,", "enforce=False"]
    )  # fmt: skip
    config.arms = (("none", 0.0, "gradient"), ("exact", 1e7, "gradient"),
                   ("exact", 1e7, "proximal"), ("l2", 0.1, "gradient"))  # fmt: skip
    results = run(config, tmp_path / "a", single())
    rows = results["tables"]["2 tasks of permuted digits, at the end"]["rows"]
    assert rows[1][3] == "diverged" and 0 < rows[2][3] < 1
    assert len(rows) == 4 and "traces" not in results.get("scalars", {})
    with config.unlocked():
        config.enforce = True
    with pytest.raises(RuntimeError, match=r"not reached: gain: 0.5000, not >= 1"):
        cstrl._require(
            Experiment(config, tmp_path / "b"), {"gain": (0.5, ">=", 1.0), "cost": (0, "<=", 1)}
        )


def test_configs_that_cannot_run_say_why(tmp_path):
    assert list(list_configs()["cstrl"].variants) == [
        "grammar", "open_i", "t5_small", "released", "fisher", "fisher_optdigits",
    ]  # fmt: skip
    for name, overrides, message in (
        ("t5_small", [], "config.data.path is empty"),
        ("grammar", ["data.name=mimic"], "choose one of csv, generated, open_i"),
        ("grammar", ["task=reprots"], "choose one of fisher, reports"),
        ("fisher", ["data.name=mnist"], "'digits' or 'optdigits'"),
        ("grammar", ["pretrained=somewhere"], "config.data.tokenizer"),
        ("grammar", ["kd.teacher=tags"], "kd.teacher='tags' must be one of"),
    ):
        config = apply_overrides(get_config(f"cstrl:{name}"), overrides)
        with pytest.raises(ConfigError, match=message):
            Experiment(config, tmp_path / f"{name}{len(message)}").run()
    for change, message in (
        ({"start": "gap"}, "start='gap'"), ({"regulariser": "l1"}, "regulariser='l1'"),
        ({"start": "none", "regulariser": "ewc"}, "needs start='gsg'"),
    ):  # fmt: skip
        method = {**get_config("cstrl:grammar").method["fine-tuning"].to_dict(), **change}
        with pytest.raises(ConfigError, match=message):
            cstrl.transferred(None, _Fields(method), {}, {}, 1.0, 1, 1)
    with pytest.raises(ConfigError, match="below the tokeniser's 50"):
        cstrl.network({**get_config("cstrl:grammar").model.to_dict(), "vocab_size": 9}, 50)


class _Fields(dict):
    __getattr__ = dict.__getitem__
