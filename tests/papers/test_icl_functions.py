"""In-context learning: no leak, parity with GPT-2, the predictors' closed forms, the recipe."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfer_jax.configuration import ConfigError, apply_overrides, get_config, list_configs
from transfer_jax.data import IndexSource, Pipeline
from transfer_jax.data.function_classes import FunctionClass, settings
from transfer_jax.objectives import Variables
from transfer_jax.papers import icl_functions as icl
from transfer_jax.training import Experiment, Layout, make_mesh
from transfer_jax.training.aot import lower_step
from transfer_jax.training.profiling import parameter_count

POINTS, DIMS = 5, 3
STACK = icl.gpt2_stack(
    num_layers=2, num_heads=2, features=8, dropout=0.0, attention_dropout=0.0, init_scale=0.3
)


@pytest.fixture(scope="module")
def gpt2():
    module = icl.PromptModel(icl.VectorGPT2(STACK, 2 * POINTS), DIMS)
    prompt = jax.random.normal(jax.random.key(0), (2, 2 * POINTS, DIMS))
    task = icl.InContext(module=module, kind="norm")
    return task, jax.jit(task.init)(jax.random.key(1), {"inputs": prompt}), prompt


# -- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["transformer", "lstm", "s4"])
def test_a_prediction_sees_what_is_before_it_and_nothing_else(gpt2, name):
    module = gpt2[0].module
    prompt = gpt2[2]
    if name != "transformer":
        backbone = icl.SequenceModel(features=8, depth=2, mixer=name, l_max=2 * POINTS)
        module = icl.PromptModel(backbone, DIMS)
    variables = jax.jit(module.init)(jax.random.key(1), prompt)
    predict = jax.jit(lambda x: module.apply(variables, x))
    before = np.asarray(predict(prompt))
    assert before.shape == (2, POINTS, DIMS)
    for i in range(POINTS):
        # y_i and all later vectors.
        after = np.asarray(predict(prompt.at[:, 2 * i + 1 :].add(1e3 if name != "s4" else 1.0)))
        if name == "s4":  # a convolution by FFT rounds differently
            np.testing.assert_allclose(after[:, : i + 1], before[:, : i + 1], atol=1e-4)
        else:
            np.testing.assert_array_equal(after[:, : i + 1], before[:, : i + 1])
        for seen in {2 * i, max(0, 2 * i - 1)}:  # x_i and y_{i-1}
            after = np.asarray(predict(prompt.at[:, seen].add(1.0)))
            assert np.abs(after[:, i] - before[:, i]).max() > 1e-4


def test_longer_prompts_are_refused(gpt2):
    task, variables, prompt = gpt2
    with pytest.raises(ValueError, match="12 vectors do not fit: the position table has 10 rows"):
        task.predict(variables, {"inputs": jnp.pad(prompt, ((0, 0), (0, 2), (0, 0)))})


def test_parity_with_gpt2(gpt2, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.interop.peers import to_torch
    from transfer_jax.interop import save_pretrained
    from transfer_jax.models import GPT2, GPT2Config

    task, variables, prompt = gpt2
    params = variables.params["backbone"]
    tokens = {"embedding": jnp.zeros((2, STACK.features))}  # not used
    config = GPT2Config(vocab_size=2, stack=STACK, max_positions=2 * POINTS, head=None)
    theirs = {"tokens": tokens, "positions": params["positions"], "stack": params["stack"]}
    save_pretrained(tmp_path, GPT2(config), theirs)
    peer = transformers.GPT2Model.from_pretrained(tmp_path).eval()
    embedded = prompt @ params["read_in"]["kernel"] + params["read_in"]["bias"]
    expected = peer(inputs_embeds=to_torch(embedded)).last_hidden_state.detach().numpy()
    backbone = task.module.backbone
    found = backbone.apply({"params": params}, prompt)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    head = variables.params["read_out"]
    expected = expected[:, 0::2] @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(task.predict(variables, {"inputs": prompt}), expected, atol=1e-4)


def test_initial_values_are_those_of_the_reference():
    stack = icl.prompt_stack("tiny")
    task = icl.InContext(module=icl.PromptModel(icl.VectorGPT2(stack, 32), 4))
    params = jax.jit(task.init)(jax.random.key(0), {"inputs": jnp.zeros((1, 32, 4))}).params
    backbone, layer = params["backbone"], params["backbone"]["stack"]["layers_1"]
    for x, expected in (
        (backbone["positions"]["embedding"], 0.02),
        (layer["attention"]["query"]["kernel"], 0.02),
        (layer["mlp"]["up"]["kernel"], 0.02),
        (layer["attention"]["out"]["kernel"], 0.02 / np.sqrt(6)),
        (layer["mlp"]["down"]["kernel"], 0.02 / np.sqrt(6)),
        (backbone["read_in"]["kernel"], 1 / np.sqrt(4) / np.sqrt(3)),
        (params["read_out"]["kernel"], 1 / np.sqrt(64) / np.sqrt(3)),
    ):
        assert float(jnp.std(x)) == pytest.approx(expected, rel=0.15)
    assert float(jnp.abs(backbone["read_in"]["kernel"]).max()) <= 0.5


@pytest.mark.parametrize("name", ["lstm", "s4"])
def test_compared_models_have_as_many_parameters(name):
    config = get_config("icl_functions:window")
    prompt = jax.ShapeDtypeStruct((1, 32, 4), jnp.float32)

    def count(name):
        module = icl.prompt_model(config, name)
        return parameter_count(jax.eval_shape(module.init, jax.random.key(0), prompt)["params"])

    assert count(name) == pytest.approx(count("transformer"), rel=0.05)


# -- the objective --------------------------------------------------------------------------------


def test_errors_and_their_gradients():
    y = jnp.array([[3.0, 4.0]])
    for kind, expected in (("squared", 25.0), ("norm", 5.0), ("normalised", 1.0)):
        error, gradient = jax.value_and_grad(lambda p, kind=kind: icl.pointwise(kind, p, y)[0])(
            jnp.zeros((1, 2))
        )
        assert float(error) == pytest.approx(expected, rel=1e-6)
        at_target = jax.grad(lambda p, kind=kind: icl.pointwise(kind, p, y)[0])(y)
        assert jnp.isfinite(gradient).all() and not at_target.any()
    logits, classes = jnp.array([[2.0], [-1.0]]), jnp.array([1.0, 1.0])
    np.testing.assert_allclose(
        icl.pointwise("bce", logits, classes), np.log1p(np.exp([-2.0, 1.0])), rtol=1e-6
    )
    np.testing.assert_array_equal(icl.pointwise("zero_one", logits, classes), [0.0, 1.0])


def test_the_loss_leaves_out_what_does_not_count(gpt2):
    task, variables, prompt = gpt2
    labels = jnp.ones((2, POINTS, DIMS))
    weights = jnp.ones((2, POINTS)).at[0, 3:].set(0.0)
    batch = {"inputs": prompt, "labels": labels, "weights": weights, "dead": jnp.array([0.0, 1])}
    loss, aux = task.loss(variables, batch, None)
    error = np.linalg.norm(np.asarray(task.predict(variables, batch) - labels), axis=-1)
    assert float(loss) == pytest.approx((error * np.asarray(weights)).sum() / 8, rel=1e-5)
    assert float(aux.weight) == 8 and float(aux.metrics["dead"].value()) == 0.5
    masked, _ = task.loss(variables, {**batch, "mask": jnp.array([1.0, 0.0])}, None)
    assert float(masked) == pytest.approx(error[0, :3].mean(), rel=1e-5)
    # One prompt for every position: position i of prompt i.
    every = jnp.stack([prompt + i for i in range(POINTS)], axis=1)
    found = task.predict(variables, {"inputs": every})
    expected = [task.predict(variables, {"inputs": prompt + i})[:, i] for i in range(POINTS)]
    np.testing.assert_allclose(found, jnp.stack(expected, axis=1), atol=1e-5)


@pytest.mark.parametrize("share", [1, 4])
def test_prompts_are_the_same_on_any_number_of_devices_and_after_a_restart(gpt2, share):
    task = FunctionClass(name="seq_rec_linear", dims=DIMS, points=POINTS, window=2)
    prompts = icl.Prompts(gpt2[0], jnp.uint32(3), settings(task), generate=task, share=share)
    draw = jax.jit(lambda o, b: o.batch(b)["xs"])
    plan = Pipeline(IndexSource(), 8, repeat=True)
    batches = [plan.collate(plan.rows()(step)) for step in range(3)]
    first = [np.asarray(draw(prompts, batch)) for batch in batches]
    layout = Layout(make_mesh({"data": 8}))
    again = np.asarray(draw(prompts, layout.place_batch(batches[2])))  # from the third step on
    np.testing.assert_array_equal(again, first[2])
    assert len(np.unique(np.concatenate(first)[:, 0, 0])) == 24  # every x_1 is new
    functions, _ = jax.random.split(jax.random.key(3))
    for row in (0, 5):
        keys = jax.random.fold_in(functions, row // share)
        function = _draw_function(task, keys)
        s = first[0][row, 0] @ function[0]
        np.testing.assert_allclose(first[0][row, 1], s / np.linalg.norm(s), atol=1e-5)
    other = draw(prompts.replace(seed=jnp.uint32(4)), batches[0])
    assert (np.asarray(other) != first[0]).all()  # evaluation has another seed


def _draw_function(task, key):
    from transfer_jax.data.function_classes import draw_function

    return np.asarray(draw_function(task, key)["w"], np.float64)


def test_dead_prompts_do_not_stop_training():
    """With h = 2 a quarter of the prompts die at x_2; the loss stays finite and counts them."""
    task = FunctionClass(name="seq_relu_2nn", dims=DIMS, points=POINTS, window=2, hidden=2)
    module = icl.PromptModel(icl.VectorGPT2(STACK, 2 * POINTS), DIMS)
    prompts = icl.Prompts(
        icl.InContext(module=module, kind="norm"), jnp.uint32(0), settings(task), generate=task
    )

    @jax.jit
    def step(batch):
        variables = prompts.init(jax.random.key(0), batch)
        loss = lambda p: prompts.loss(Variables(p, {}), batch, jax.random.key(1))  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(variables.params)

    (loss, aux), gradient = step({"index": jnp.arange(256)})
    assert jnp.isfinite(loss) and all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradient))
    assert 0.2 < aux.metrics["dead"].value() < 0.7
    assert aux.weight == POINTS * round(256 * (1 - float(aux.metrics["dead"].value())))


# -- predictors and statistics --------------------------------------------------------------------


@pytest.fixture(scope="module")
def linear():
    task = FunctionClass(name="linear", dims=4, points=9)
    prompts = icl.Prompts(None, jnp.uint32(0), settings(task), generate=task)
    found = jax.jit(lambda b: prompts.batch(b))({"index": jnp.arange(1280)})
    return task, {name: np.asarray(value) for name, value in found.items()}


def test_least_squares_is_the_best_predictor_of_linear_functions(linear):
    """Given i < d examples, w is known on their span alone: the error is 1 - i / d."""
    task, asked = linear
    config = get_config("icl_functions:linear")
    error = icl.errors(config, task, icl.predictor("least squares", task, asked), asked)
    bands = icl.summarise(error)
    for i in range(9):
        expected = max(0.0, 1 - i / 4)
        assert bands["low"][i] - 0.02 <= expected <= bands["high"][i] + 0.02
    x, y = asked["xs"][7].astype(np.float64), asked["ys"][7].astype(np.float64)
    found = icl.predictor("least squares", task, asked)[7, :, 0]
    for i in (2, 6):
        assert found[i] == pytest.approx(x[i] @ np.linalg.lstsq(x[:i], y[:i])[0], abs=1e-6)
    zero = icl.errors(config, task, icl.predictor("zero", task, asked), asked)
    assert np.mean(zero) == pytest.approx(1.0, abs=0.05)


def test_other_predictors_against_loops_and_scikit_learn(linear):
    task, asked = linear
    few = {name: value[:3] for name, value in asked.items()}
    x, y = (few[name].astype(np.float64) for name in ("xs", "ys"))
    from sklearn.linear_model import Ridge
    from sklearn.neighbors import KNeighborsRegressor

    for name, make in (
        ("3 nearest", lambda i: KNeighborsRegressor(min(i, 3))),
        ("ridge", lambda i: Ridge(0.1, fit_intercept=False)),
    ):
        found = icl.predictor(name, task, few)
        for row, i in ((0, 2), (2, 8)):
            expected = make(i).fit(x[row, :i], y[row, :i]).predict(x[row, i : i + 1])
            assert found[row, i, 0] == pytest.approx(expected[0], abs=1e-8), name
    found = icl.predictor("averaging", task, few)
    assert found[1, 5, 0] == pytest.approx((y[1, :5, None] * x[1, :5]).mean(0) @ x[1, 5])
    for name in ("lasso", "greedy tree", "network"):  # they fit what they have seen
        again = {**few, "queries": np.roll(few["xs"], 1, axis=1)}
        error = icl.predictor(name, task, again)[:, 4:, 0] - np.roll(y, 1, axis=1)[:, 4:]
        assert np.square(error).mean() < 0.5 * np.square(y).mean(), name


def test_predictors_of_sequences():
    task = FunctionClass(name="seq_rec_linear", dims=2, points=14, window=2,
                         linear_init="orthogonal")  # fmt: skip
    prompts = icl.Prompts(None, jnp.uint32(0), settings(task), generate=task)
    found = jax.jit(lambda b: prompts.batch(b))({"index": jnp.arange(64)})
    asked = {name: np.asarray(value) for name, value in found.items()}
    np.testing.assert_array_equal(icl.predictor("persistence", task, asked), asked["xs"])
    two = icl.predictor("period 2", task, asked)
    np.testing.assert_array_equal(two[:, 1:], asked["xs"][:, :-1])
    config = get_config("icl_functions:window")
    least = icl.predictor("least squares", task, asked)
    lengths = np.linalg.norm(least[:, 1:], axis=-1)
    np.testing.assert_allclose(lengths, 1.0, atol=1e-6)
    median = np.median(icl.errors(config, task, least, asked), axis=0)
    assert median[-1] < 0.05 < median[2]  # the window holds what determines the next vector
    with pytest.raises(ConfigError, match="is for sequences"):
        icl.predictor("persistence", FunctionClass(name="linear", dims=2, points=2), asked)


def test_the_band_resamples_prompts():
    rng = np.random.default_rng(0)
    one = rng.exponential(size=(400, 1))
    error = np.concatenate([one, one, rng.permutation(one), np.where(one > 3, np.nan, one)], 1)
    found = icl.summarise(error, resamples=4000)
    half = 1.645 * one.std() / 20
    assert found["high"][0] - found["low"][0] == pytest.approx(2 * half, rel=0.06)
    # Whole prompts: equal columns have equal bands, the same numbers in another order have not.
    assert found["low"][0] == found["low"][1] and found["high"][0] == found["high"][1]
    assert found["low"][0] != found["low"][2]
    assert found["std"][0] == pytest.approx(one.std(ddof=1))
    assert found["mean"][3] == pytest.approx(np.nanmean(error[:, 3]))
    assert found["low"][3] < found["mean"][3] < found["high"][3]


# -- configs --------------------------------------------------------------------------------------

PUBLISHED = [
    variant
    for variant in list_configs()["icl_functions"].variants
    if get_config(f"icl_functions:{variant}").model.size == "standard"
]


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_settings_lower(variant):
    objective, batch, stage = icl.plan(get_config(f"icl_functions:{variant}"))
    devices = {"data": 2, "fsdp": 4} if batch["index"].shape[0] > 1 else {"model": 8, "data": 1}
    lowered, held = lower_step(objective, batch, stage, Layout(make_mesh(devices)))
    assert "mhlo.num_partitions = 8" in lowered.as_text()[:2000]
    task = objective.generate
    width, outputs = 256, task.dims if task.sequential else 1
    expected = (
        12 * (12 * width**2 + 13 * width) + 2 * width + 2 * task.points * width
        + width * task.dims + width + width * outputs + outputs
    )  # fmt: skip
    assert parameter_count(held["params"]) == expected


def tiny(variant, *overrides):
    return apply_overrides(
        get_config(f"icl_functions:{variant}"),
        ["train.steps=2", "train.optimizer.warmup_steps=0", "evaluation.prompts=20",
         "evaluation.slow_prompts=2", "evaluation.batch_size=16", "task.points=5",
         "evaluation.resamples=20", "batch_size=8", *overrides],
    )  # fmt: skip


@pytest.mark.slow
def test_the_recipe_gives_one_result_on_one_and_on_two_devices(tmp_path, monkeypatch):
    monkeypatch.setitem(icl.SIZES, "tiny", (1, 1, 8))
    config = tiny(
        "window", "evaluation.random=2,5", "required.graded=2,5",
        "required.recovered=2,4,0.5", "baselines=zero,persistence,least squares",
    )  # fmt: skip
    results = []
    for devices in (1, 2):
        exp = Experiment(config, tmp_path / str(devices))
        exp.layout = Layout(make_mesh({"data": devices}, jax.devices()[:devices]))
        results.append(json.loads(json.dumps(exp.run())))
    for one, two in zip(*(r["tables"]["Error by position"]["rows"] for r in results)):
        np.testing.assert_allclose(one, two, atol=1e-4)
    others = results[0]["tables"]["Last position that counts, other prompts"]["rows"]
    assert [row[0] for row in others] == ["clean", "fresh query"]
    ends = results[0]["curves"]["Last position by the random prefix"]["series"]
    clean = results[0]["curves"]["Error by position"]["series"]["transformer"]
    # Nothing is replaced at 0; where all five are, the answers are not what they were.
    assert ends["y"][0] == ends["x"][0] == clean[-1] and ends["y"][2] != clean[-1]
    assert len(results[0]["tables"]["Required"]["rows"]) == 4


def test_conditions_and_mistakes():
    linear = icl.conditions(get_config("icl_functions:garg_linear"))
    assert set(icl.SHIFTS) <= set(linear) and "fresh query" not in linear
    pool = icl.conditions(apply_overrides(get_config("icl_functions:window"), ["task.pool=3"]))
    assert pool["clean"][0].pool == 3 and pool["new functions"][0].pool == 0
    for variant, override, message in (
        ("linear", "evaluation.shifts=('random quadrant',)", "has 'random quadrant'"),
        ("tree", "evaluation.shifts=('skewed covariance',)", "for linear functions"),
        ("window", "evaluation.random=(17,)", "has 17; there are 16"),
        ("window", "task.window=5", "takes 1 to 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            icl.conditions(apply_overrides(get_config(f"icl_functions:{variant}"), [override]))
    for override, message in (
        ("functions_per_batch=all", "choose 'each' or 'one'"), ("model.size=large", "choose one of")
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            icl.plan(apply_overrides(get_config("icl_functions:window"), [override]))
    with pytest.raises(ConfigError, match="choose from transformer, lstm, s4"):
        icl.prompt_model(get_config("icl_functions:window"), "gru")
    with pytest.raises(ConfigError, match="is no error"):
        icl.pointwise("l2", jnp.zeros((1, 1)), jnp.zeros(1))
