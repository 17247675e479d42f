"""UniPT: ranking losses by loops, what each method trains, the published settings, the recipe."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transfer_jax.configuration import ConfigError, apply_overrides, get_config
from transfer_jax.metrics.retrieval import retrieval
from transfer_jax.objectives import Variables
from transfer_jax.objectives.matching import PairMatching, ranking_hinge
from transfer_jax.papers import unipt
from transfer_jax.training import Experiment, Layout, make_mesh
from transfer_jax.training.aot import lower_step
from transfer_jax.training.profiling import parameter_count
from transfer_jax.trees import paths

# -- pairs ------------------------------------------------------------------------------------


def hinge_by_loops(s, margin, hardest, rows):
    total = np.zeros(len(s))
    for i in rows:
        others = [j for j in rows if j != i]
        of_image = [max(0.0, margin + s[i, j] - s[i, i]) for j in others]
        of_text = [max(0.0, margin + s[j, i] - s[i, i]) for j in others]
        reduce = max if hardest else sum
        total[i] = reduce(of_image) + reduce(of_text)
    return total


@pytest.mark.parametrize("hardest", [False, True])
def test_hinge_against_loops(hardest):
    s = np.random.default_rng(0).uniform(-1, 1, (6, 6))
    s[2, 3] = s[2, 4] = 0.9  # the nearest wrong one, twice
    mask = np.array([1, 1, 1, 1, 1, 0.0])
    for margin in (0.0, 0.2):
        loss = ranking_hinge(jnp.asarray(s), margin, hardest=hardest)
        np.testing.assert_allclose(loss, hinge_by_loops(s, margin, hardest, range(6)), atol=1e-6)
    loss = ranking_hinge(jnp.asarray(s), 0.2, hardest=hardest, mask=jnp.asarray(mask))
    np.testing.assert_allclose(loss, hinge_by_loops(s, 0.2, hardest, range(5)), atol=1e-6)
    assert not ranking_hinge(2 * jnp.eye(6), 0.0, hardest=hardest).any()
    assert not ranking_hinge(jnp.eye(6), 0.2, hardest=hardest).any()


class Given(unipt.nn.Module):
    """The vectors themselves, times a parameter."""

    @unipt.nn.compact
    def __call__(self, inputs, images, *, train=False):
        scale = self.param("scale", unipt.nn.initializers.ones, ())
        return unipt.unit(scale * images), unipt.unit(scale * inputs)


@pytest.fixture(scope="module")
def pairs():
    keys = jax.random.split(jax.random.key(0))
    texts = jax.random.normal(keys[0], (6, 8))
    images = texts + 1.5 * jax.random.normal(keys[1], (6, 8))
    batch = {"inputs": texts, "images": images}
    return batch, PairMatching(module=Given()).init(keys[0], batch)


def test_info_nce_is_the_mean_of_both_cross_entropies(pairs):
    batch, variables = pairs
    task = PairMatching(module=Given(), scale=20.0)
    loss, aux = task.loss(variables, batch, None)
    images, texts = task.predict(variables, batch)
    logits, labels = 20.0 * images @ texts.T, jnp.arange(6)
    both = [optax.softmax_cross_entropy_with_integer_labels(x, labels) for x in (logits, logits.T)]
    assert float(loss) == pytest.approx(float((both[0] + both[1]).mean() / 2), rel=1e-5)
    # The shares of the batch are the recall at one; padding changes nothing.
    scores = retrieval(np.asarray(logits), ks=(1,))
    assert 100 * aux.metrics["image_to_text"].value() == pytest.approx(scores["i2t_r1"])
    assert 100 * aux.metrics["text_to_image"].value() == pytest.approx(scores["t2i_r1"])
    padded = {k: jnp.concatenate([v, 3 * v[:2]]) for k, v in batch.items()}
    padded["mask"] = jnp.array([1.0] * 6 + [0, 0])
    for kind in ("info_nce", "hinge"):
        a, b = (
            PairMatching(module=Given(), kind=kind, scale=20.0).loss(variables, x, None)
            for x in (batch, padded)
        )
        assert float(a[0]) == pytest.approx(float(b[0]), rel=1e-5)
        for name in a[1].metrics:
            np.testing.assert_allclose(
                a[1].metrics[name].value(), b[1].metrics[name].value(), rtol=1e-5
            )


def test_the_hinge_starts_with_all_and_grows_in_the_second_epoch(pairs):
    batch, variables = pairs
    task = PairMatching(module=Given(), kind="hinge", margin=0.2, epoch_steps=10)
    images, texts = task.predict(variables, batch)
    everything, nearest = (
        float(ranking_hinge(images @ texts.T, 0.2, hardest=hardest).sum())
        for hardest in (False, True)
    )
    assert everything > nearest > 0

    def loss(objective):
        return float(objective.loss(variables, batch, None)[0])

    steps = {0: everything, 9: everything, 10: 0.0, 15: nearest / 2, 20: nearest, 99: nearest}
    for step, expected in steps.items():
        assert loss(task.at(jnp.int32(step))) == pytest.approx(expected, rel=1e-5)
    assert loss(task) == pytest.approx(nearest)
    with pytest.raises(ValueError, match="kind='nce'; choose"):
        PairMatching(module=Given(), kind="nce")


# -- questions --------------------------------------------------------------------------------


def test_answers_are_scored_by_what_people_gave():
    assert unipt.vqa_accuracy("a", ["a"] * 4 + ["b"] * 6) == 1.0
    assert unipt.vqa_accuracy("a", ["a", *"bcdefghij"]) == pytest.approx(0.3)
    assert unipt.vqa_accuracy("z", list("abcdefghij")) == 0.0

    class Logits(unipt.nn.Module):
        @unipt.nn.compact
        def __call__(self, inputs):
            return inputs

    logits = jnp.array([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0], [9.0, 9.0, 9.0]])
    scores = jnp.array([[0.3, 0.0, 1.0], [0.0, 0.9, 0.0], [1.0, 1.0, 1.0]])
    batch = {"inputs": logits, "labels": scores, "mask": jnp.array([1.0, 1.0, 0.0])}
    loss, aux = unipt.SoftAnswers(module=Logits()).loss(Variables({}, {}), batch, None)
    p, y = 1 / (1 + np.exp(-logits[:2])), scores[:2]
    expected = -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum(1).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(aux.metrics["score"].value()) == pytest.approx((0.3 + 0.9) / 2)


# -- the published settings -------------------------------------------------------------------

GPO = 2 * (2 * 3 * 32 * 33) + 32  # two GRUs and the scores


@pytest.mark.parametrize(
    "variant, trained",
    [
        ("flickr30k", 5_921_281 + 6_433_537 + 2 * GPO),
        ("msrvtt", 9_584_642),
        ("vqa", 4_736_641 + 768 * 1536 + 3 * 1536 + 1536 * 3129 + 3129),
    ],
)
def test_published_settings_lower_with_their_numbers_of_parameters(variant, trained):
    objective, batch, stage = unipt.plan(get_config(f"unipt:{variant}"))
    layout = Layout(make_mesh({"data": 2, "fsdp": 4}))
    lowered, held = lower_step(objective, batch, stage, layout)
    assert "mhlo.num_partitions = 8" in lowered.as_text()[:2000]
    assert parameter_count(held["params"]) == trained
    moments = parameter_count(held["optimizer"])
    assert moments == pytest.approx(2 * trained, rel=1e-3)  # none for the network
    assert parameter_count(held["carried"]) > 85e6
    if variant == "flickr30k":
        assert {p.split("/")[0] for p in paths(held["state"])} == {"batch_stats"}


# -- the digits -------------------------------------------------------------------------------

TINY = [
    "source.steps=2", "source.optimizer.warmup_steps=0", "target.steps=2",
    "target.optimizer.warmup_steps=0", "model.depth=2", "model.features=8", "model.num_heads=2",
    "side.features=4", "side.lst_matched.features=4", "methods=probe,unipt,lora",
    "side.lst.features=4", "side.lst.num_heads=2",
]  # fmt: skip


def test_every_method_trains_what_it_should():
    config = apply_overrides(get_config("unipt:mnist"), TINY)
    config.data.image_size = 14
    task = unipt.Classification(module=unipt.encoder(config, "classification"))
    batch = {
        "inputs": jax.ShapeDtypeStruct((64, 14, 14, 1), jnp.float32),
        "labels": jax.ShapeDtypeStruct((64,), jnp.int32),
    }
    source = jax.eval_shape(task.init, jax.random.key(0), batch).params
    everything = parameter_count(source)

    def trained(method):
        build = unipt.tuner if method in unipt.TUNERS else unipt.frozen
        objective = jax.eval_shape(lambda p: build(method, config, p), source)
        init = lambda o, key, batch: o.init(key, batch)  # noqa: E731
        return jax.eval_shape(init, objective, jax.random.key(0), batch).params

    head = 8 * 5 + 5
    assert parameter_count(trained("full")) == everything
    assert parameter_count(trained("probe")) == head
    assert parameter_count(trained("scalar_mix")) == head + 3
    assert parameter_count(trained("lora")) == head + 2 * 3 * 2 * 8 * 4
    assert all(p.startswith("classifier/") or p.endswith("/bias") for p in paths(trained("bitfit")))
    config.inside.layers = 1
    last = {p.split("/")[1] for p in paths(trained("partial")) if p.startswith("stack")}
    assert last == {"layers_1", "norm"}
    assert parameter_count(trained("every other layer")) < parameter_count(trained("unipt"))
    assert parameter_count(trained("adapters")) < parameter_count(trained("full"))
    with pytest.raises(ConfigError, match="no method 'loar'"):
        unipt.tuner("loar", config, source)


def test_a_step_holds_less_than_two_fifths_of_fine_tuning_and_less_than_lora(tmp_path):
    shapes = ["batch_size=16", "model.features=32", "model.num_heads=2", "side.features=16"]
    overrides = ["depths=3", "methods=full,lora,unipt", *(f"shapes.{shape}" for shape in shapes)]
    config = apply_overrides(get_config("unipt:memory"), [f"memory.{x}" for x in overrides])
    table = Experiment(config, tmp_path).run()["tables"]["A training step, as compiled"]
    rows = {row[1]: dict(zip(table["columns"], row)) for row in table["rows"]}
    print(table["columns"], *rows.values(), sep="\n")
    held = {method: row["peak, MiB"] for method, row in rows.items()}
    assert held["unipt"] < 0.4 * held["full"]
    assert held["unipt"] < held["lora"]
    assert rows["unipt"]["share of full"] == pytest.approx(held["unipt"] / held["full"])
    assert rows["unipt"]["GFLOP"] < 0.6 * rows["full"]["GFLOP"]


@pytest.mark.slow
def test_the_recipe_gives_one_result_on_one_and_on_several_devices(tmp_path):
    tables = []
    for devices, methods in ((1, "probe,unipt,lora"), (2, "probe,unipt")):
        overrides = [*TINY, f"methods={methods}"]
        experiment = Experiment(
            apply_overrides(get_config("unipt:digits"), overrides), tmp_path / str(devices)
        )
        experiment.layout = Layout(make_mesh({"data": devices}, jax.devices()[:devices]))
        results = json.loads(json.dumps(experiment.run()))
        tables.append({row[0]: row for row in results["tables"]["Digits 5 to 9"]["rows"]})
    assert list(tables[0]) == ["probe", "unipt", "lora"]
    one, several = (table["unipt"] for table in tables)
    np.testing.assert_allclose(one[1:3], several[1:3], atol=0.02)
    assert one[3] == several[3]


def test_configs_that_cannot_run_say_why(tmp_path):
    for variant, override, message in (
        ("flickr30k", "seed=1", "are not part of this project"),
        ("digits", "methods=probe,unipl", "config.methods has .'unipl'."),
    ):
        config = apply_overrides(get_config(f"unipt:{variant}"), [override])
        with pytest.raises(ConfigError, match=message):
            Experiment(config, tmp_path / variant).run()
    with pytest.raises(ConfigError, match="has no plan"):
        unipt.plan(get_config("unipt:digits"))
