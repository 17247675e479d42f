"""Merging tensor by tensor gives what merging whole trees gives, in bounded memory."""

import gc
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from transfer_jax import cli, trees
from transfer_jax.trees import files, streaming
from transfer_jax.trees.files import Checkpoint, load_safetensors, save_safetensors
from transfer_jax.trees.streaming import Recipe, plan_merge, write_merge

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
SHAPES = {
    "embed.weight": (20, 8), "layers.0.attn.weight": (6, 8), "layers.0.mlp.weight": (6, 8),
    "layers.1.attn.weight": (6, 8), "layers.1.mlp.weight": (6, 8), "norm.weight": (8,),
    "scale": (),
}  # fmt: skip


def random(scale=1.0):
    return {name: np.float32(scale * RNG.normal(size=s)) for name, s in SHAPES.items()}


BASE = {name: np.asarray(x) for name, x in random().items()}
MODELS = [jax.tree.map(lambda b, d: np.asarray(b + d), BASE, random(0.1)) for _ in range(3)]
FISHERS = [jax.tree.map(lambda x: np.asarray(x * x), random()) for _ in MODELS]
CASES = {
    "soup": {"weight": [0.5, 1.0, 0.25]},
    "task_arithmetic": {"weight": {"attn": [1.0, 0.5, 0.0], ".*": 0.3}, "lambda": 0.7},
    "ties": {"density": [0.3, 1.0, 0.0], "weight": [0.5, 1.0, -0.25]},
    "ties leaf": {"density": 0.4, "scope": "leaf", "normalize": False},
    "dare_linear": {"density": 0.4},
    "dare_ties": {"density": [0.4, 0.5, 0.6], "rescale": False},
    "breadcrumbs": {"density": 0.6, "gamma": 0.2},
    "della": {"density": 0.6, "epsilon": 0.2},
    "lerp": {"t": 0.3},
    "slerp": {"t": {"attn": 0.2, ".*": 0.5}},
    "fisher": {"weight": [1.0, 2.0, 3.0]},
    "delta_guided": {"granularity": "row", "p": 2.0},
    "model_stock": {},
}


def cast(tree, dtype):
    return jax.tree.map(lambda x: np.asarray(x.astype(dtype)), tree)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with the base, in shards, three models and their Fisher diagonals."""
    monkeypatch.chdir(tmp_path)
    save_safetensors(BASE, "base", max_shard_size=300)
    save_safetensors(MODELS[0], "m0.safetensors")
    save_safetensors(dict(reversed(MODELS[1].items())), "m1", max_shard_size=500)
    save_safetensors(MODELS[2], "m2")
    for i, fisher in enumerate(FISHERS):
        save_safetensors(fisher, f"f{i}.safetensors")
    return tmp_path


PATHS = ("m0.safetensors", "m1", "m2")


def recipe(case="soup", **changes):
    method = case.split()[0]
    number = 1 if method in ("slerp", "lerp") else 3
    given = {"fishers": ("f0.safetensors", "f1.safetensors", "f2.safetensors")}
    fields = {
        "method": method, "models": PATHS[:number], "base": "base", "options": CASES[case],
        "seed": 5, **(given if method == "fisher" else {}), **changes,
    }  # fmt: skip
    return Recipe(**fields)


def expected(case, base=BASE, models=MODELS):
    method, options = case.split()[0], dict(CASES[case])
    if method in ("slerp", "lerp"):
        models = models[:1]
    if "key" in trees.METHODS[method].options:
        options["key"] = jax.random.key(5)
    if method == "fisher":
        options["fishers"] = FISHERS
    return trees.merge(base, models, method, **options)


def merge(given, out="out", **options):
    write_merge(plan_merge(given), out, **options)
    return load_safetensors(out)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


def test_every_method_is_streamed_or_said_to_be_for_python_only():
    assert {case.split()[0] for case in CASES} == trees.METHODS.keys() - {"regmean"}
    for method in ("regmean", "greedy_soup"):
        with pytest.raises(ValueError, match=r"in memory, transfer_jax.trees.merge, only: it "):
            plan_merge(Recipe(method, ("m",)))


@pytest.mark.parametrize("case", CASES)
def test_same_bits_as_the_tree_function(case, place):
    same(merge(recipe(case), max_shard_size=400), expected(case))
    assert len(list((place / "out").glob("*.safetensors"))) > 1
    whole = [f"single{i}.safetensors" for i in range(4)]
    for path, tree in zip(whole, (BASE, *MODELS)):
        save_safetensors(tree, path)
    number = len(recipe(case).models)
    single = recipe(case, base=whole[0], models=tuple(whole[1 : 1 + number]))
    same(merge(single, "single"), load_safetensors("out"))


def test_narrow_dtypes(place):
    narrow = [cast(tree, ml_dtypes.bfloat16) for tree in (BASE, *MODELS)]
    for path, tree in zip(("b", "x", "y", "z"), narrow):
        save_safetensors(tree, path)
    for case in ("ties", "delta_guided"):
        given = recipe(case, base="b", models=("x", "y", "z"))
        same(merge(given, f"{case} narrow"), expected(case, narrow[0], narrow[1:]))
        # A wide result is not rounded to the inputs' dtype on the way.
        wide = Recipe(**{**vars(given), "dtype": "float32"})
        start = cast(narrow[0], np.float32)
        same(merge(wide, f"{case} wide"), expected(case, start, narrow[1:]))


def test_any_dtype_in_and_the_chosen_one_out(place):
    eight = jnp.dtype("float8_e4m3fn")
    save_safetensors(cast(BASE, eight), "b8")
    save_safetensors(cast(MODELS[1], np.float64), "m64")
    given = Recipe("soup", ("m0.safetensors", "m64", "b8"), "b8")
    mean = trees.merge(
        None, [MODELS[0], MODELS[1], cast(cast(BASE, eight), np.float32)], "soup"
    )  # fmt: skip
    same(merge(given), cast(jax.tree.map(np.asarray, mean), eight))
    for dtype in streaming.OUTPUT_DTYPES:
        merged = merge(Recipe(**{**vars(given), "dtype": dtype}), dtype)
        same(merged, cast(jax.tree.map(np.asarray, mean), jnp.dtype(dtype)))


def test_soup_without_a_base(place):
    given = Recipe("soup", PATHS)
    same(merge(given), trees.merge(None, MODELS, "soup"))
    narrow = Recipe("soup", PATHS, dtype="bfloat16")
    rounded = jax.tree.map(
        lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), load_safetensors("out")
    )
    same(merge(narrow, "narrow"), rounded)


@pytest.mark.parametrize("density", [0.001, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["distinct", "few values", "unchanged"])
def test_global_threshold_is_the_order_statistic(kind, density, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(streaming, "_CHUNK", 64)  # Tensors are counted in several pieces.
    delta = RNG.normal(size=600)
    if kind == "few values":
        delta = np.round(delta)
    if kind == "unchanged":
        delta[RNG.random(600) < 0.6] = 0
    base = {"a": np.zeros(100, np.float32), "b": np.zeros((50, 10), np.float32)}
    model = {"a": np.float32(delta[:100]), "b": np.float32(delta[100:].reshape(50, 10))}
    save_safetensors(base, "base")
    save_safetensors(model, "model")
    plan = plan_merge(Recipe("ties", ("model",), "base", {"density": density}))
    magnitudes = np.sort(np.abs(np.float32(delta)))[::-1]
    kept = max(1, int(density * 600))
    wanted = 0 if density == 1 else magnitudes[kept - 1]
    assert float(streaming._thresholds(plan, lambda: None)[0]) == wanted


def test_one_tensor_of_each_model_is_in_memory(place, monkeypatch):
    alive, most = dict[Path, int](), dict[Path, int]()
    read = Checkpoint.read

    def counted(self, name):
        # Threads of JAX may still be letting go of what was computed with.
        deadline = time.monotonic() + 10
        while alive.get(self.path) and time.monotonic() < deadline:
            time.sleep(0.001)
            gc.collect(0)
        x = read(self, name)
        alive[self.path] = alive.get(self.path, 0) + 1
        most[self.path] = max(most.get(self.path, 0), alive[self.path])
        # The memory itself, of which x and what is made of it are views.
        weakref.finalize(x.base, lambda: alive.update({self.path: alive[self.path] - 1}))
        return x

    monkeypatch.setattr(Checkpoint, "read", counted)
    for case in ("ties", "task_arithmetic", "fisher"):
        alive.clear(), most.clear()
        write_merge(plan_merge(recipe(case)), case)
        assert most.keys() >= {Path(p) for p in ("base", *PATHS)}
        assert set(most.values()) == {1}


# --- Tensors that differ --------------------------------------------------------------------------


def test_integers_are_copied_if_they_agree(place):
    ids = {"ids": np.arange(4), "flag": np.array(True)}
    for path, tree in zip(("b", "x"), (BASE, MODELS[0])):
        save_safetensors({**tree, **ids}, path)
    merged = merge(Recipe("task_arithmetic", ("x",), "b", dtype="bfloat16"))
    np.testing.assert_array_equal(merged["ids"], ids["ids"])
    assert merged["ids"].dtype == np.int64 and merged["flag"].dtype == np.bool_
    save_safetensors({**MODELS[0], "ids": np.ones(4, np.int64), "flag": ids["flag"]}, "y")
    with pytest.raises(ValueError, match="'ids', of int64, has other values in b than in y"):
        plan_merge(Recipe("task_arithmetic", ("y",), "b"))


@pytest.fixture
def differing(place):
    """Models with a larger vocabulary, without a tensor, with one too many."""
    larger = np.float32(RNG.normal(size=(23, 8)))
    save_safetensors({**MODELS[0], "embed.weight": larger}, "larger")
    save_safetensors({k: v for k, v in MODELS[1].items() if k != "scale"}, "lacking")
    save_safetensors({**MODELS[2], "head.bias": np.ones(2, np.float32)}, "more")
    return ("larger", "lacking", "more")


def test_differences_are_errors_that_name_tensor_and_shapes(differing):
    with pytest.raises(ValueError) as error:
        plan_merge(Recipe("task_arithmetic", differing, "base"))
    for part in (
        "'embed.weight' is (20, 8) in base, (23, 8) in larger (another vocabulary?)",
        "'scale' () is in base, not in lacking",
        "'head.bias' (2,) is in more, not in base",
        "missing=base", "missing=skip",
    ):  # fmt: skip
        assert part in str(error.value)


def test_the_base_or_nothing_in_place_of_what_differs(differing):
    whole = trees.merge(BASE, MODELS, "task_arithmetic")
    agree = set(SHAPES) - {"embed.weight", "scale"}
    skipped = merge(Recipe("task_arithmetic", differing, "base", missing="skip"), "skipped")
    assert set(skipped) == agree
    kept = merge(Recipe("task_arithmetic", differing, "base", missing="base"), "kept")
    assert set(kept) == set(SHAPES)
    for name in SHAPES:
        np.testing.assert_array_equal(kept[name], whole[name] if name in agree else BASE[name])
    with pytest.raises(ValueError, match="needs a base"):
        plan_merge(Recipe("soup", differing, missing="base"))
    card = Path("skipped/README.md").read_text()
    assert "left out: `embed.weight`, `scale`, `head.bias`" in card


# --- Recipes --------------------------------------------------------------------------------------


def written(text):
    Path("recipe.yaml").write_text(text)
    return streaming.read_recipe("recipe.yaml")


def test_a_recipe_as_mergekit_users_write_them(place):
    given = written("""
        merge_method: dare_ties
        base_model: base
        models:
          - model: base   # no parameters necessary for the base
          - model: m0.safetensors
            parameters: {weight: 0.3, density: 0.5}
          - model: m1
            parameters:
              weight:
                - {filter: attn, value: 1e-1}
                - value: 0.7
          - m2
        parameters: {density: 0.9, lambda: 1.5, normalize: true}
        dtype: bfloat16
        seed: 3
    """)
    assert given == Recipe(
        "dare_ties", PATHS, "base",
        {"density": [0.5, 0.9, 0.9], "lambda": 1.5, "normalize": True,
         "weight": [0.3, {"attn": 0.1, ".*": 0.7}, 1.0]},
        dtype="bfloat16", seed=3,
    )  # fmt: skip
    merged = merge(given)
    wanted = trees.merge(
        cast(BASE, np.float32), MODELS, "dare_ties", density=[0.5, 0.9, 0.9], lambda_=1.5,
        normalize=True, key=jax.random.key(3),
        weight={"attn": [0.3, 0.1, 1.0], ".*": [0.3, 0.7, 1.0]},
    )  # fmt: skip
    same(merged, cast(jax.tree.map(np.asarray, wanted), ml_dtypes.bfloat16))


def test_linear_is_soup_and_keeps_its_base_among_the_models(place):
    given = written("{merge_method: linear, base_model: base, models: [base, m2]}")
    assert given.method == "soup" and given.models == ("base", "m2")
    same(merge(given), trees.merge(None, [BASE, MODELS[2]], "soup"))


@pytest.mark.parametrize("case", CASES)
def test_the_recipe_of_the_model_card_makes_the_same_model(case, place):
    given = recipe(case, missing="skip")
    write_merge(plan_merge(given), "out", note="The end.")
    card = Path("out/README.md").read_text()
    assert card.startswith("---\ntags:\n- merge\n---\n") and card.endswith("The end.\n")
    assert all(f"`{path}`" in card for path in ("base", *given.models))
    again = written(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    assert {**vars(again), "options": {}} == {**vars(given), "options": {}}
    same(merge(again, "again"), load_safetensors("out"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("{merge_methd: ties, models: [a]}", "unknown key 'merge_methd' in recipe.yaml. "
         "Did you mean merge_method?"),
        ("{merge_method: ties, models: [{modl: a}]}", r"'modl' in models\[0\].*model"),
        ("{merge_method: ties, models: [{model: a, parameters: {densty: 1}}]}", "mean density"),
        ("{merge_method: ties, models: [{parameters: {}}]}", "needs model"),
        ("{merge_method: ties}", "models, a list"),
        ("{merge_method: ties, models: [a], slices: []}", "unknown key 'slices'"),
        ("{merge_method: slerp, models: [a], parameters: {t: [0, 0.5, 1]}}", "Gradients over"),
        ("{merge_method: dare_ties, models: [{model: a, parameters: {density: 0.5}}, b]}",
         "density is given for some models of recipe.yaml, not for b"),
        ("[ties", "is not YAML"),
        ("just text", "must be a mapping"),
    ],
)  # fmt: skip
def test_mistakes_in_recipes(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        written(text)


@pytest.mark.parametrize("text", ["5", "5 TB", "GB", "0GB", "-1MB", "5GBs"])
def test_sizes(text):
    if text == "5":
        assert streaming.parse_size(text) == 5
        return
    with pytest.raises(ValueError, match="is no size"):
        streaming.parse_size(text)


MERGEKIT = shutil.which("mergekit-yaml")
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8,
    "intermediate_size": 12, "vocab_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
LAYER = "model.layers.0"
LLAMA_SHAPES = {
    "model.embed_tokens.weight": (20, 8), "lm_head.weight": (20, 8), "model.norm.weight": (8,),
    **{f"{LAYER}.{x}_layernorm.weight": (8,) for x in ("input", "post_attention")},
    **{f"{LAYER}.self_attn.{x}_proj.weight": (8, 8) for x in "qkvo"},
    **{f"{LAYER}.mlp.{x}_proj.weight": (12, 8) for x in ("gate", "up")},
    f"{LAYER}.mlp.down_proj.weight": (8, 12),
}  # fmt: skip
WEIGHTED = """
base_model: base
models:
  - {model: a, parameters: {weight: 0.6, density: 0.5}}
  - {model: b, parameters: {weight: [{filter: mlp, value: 0.9}, {value: 0.3}], density: 0.7}}
"""
FILTERED = "{t: [{filter: self_attn, value: 0.2}, {value: 0.5}]}"
SHARED = {
    "linear": "models: [{model: a, parameters: {weight: 0.6}}, "
    "{model: b, parameters: {weight: 1}}]",
    "task_arithmetic": WEIGHTED.replace(", density: 0.5", "").replace(", density: 0.7", ""),
    "ties": WEIGHTED,
    "breadcrumbs": f"{WEIGHTED}\nparameters: {{gamma: 0.1, lambda: 0.8}}",
    "model_stock": "base_model: base\nmodels: [{model: a}, {model: b}]",
    "slerp": f"base_model: base\nmodels: [{{model: base}}, {{model: b}}]\nparameters: {FILTERED}",
}


@pytest.mark.slow
@pytest.mark.skipif(MERGEKIT is None, reason="mergekit-yaml is not installed")
@pytest.mark.parametrize("method", SHARED)
def test_the_same_recipe_as_mergekit(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = {name: np.float32(RNG.normal(size=s)) for name, s in LLAMA_SHAPES.items()}
    for path in ("base", "a", "b"):
        change = 0.0 if path == "base" else 0.1
        model = {n: np.float32(x + change * RNG.normal(size=x.shape)) for n, x in base.items()}
        save_safetensors(model, path)
        Path(path, "config.json").write_text(json.dumps(LLAMA))
    text = f"merge_method: {method}\ndtype: float32\n{SHARED[method]}"
    Path("theirs.yaml").write_text(text)
    subprocess.run([MERGEKIT, "theirs.yaml", "theirs", "--no-write-model-card"], check=True)
    given = written(text)
    if method == "ties":
        given = Recipe(**{**vars(given), "options": {**given.options, "scope": "leaf"}})
    ours, theirs = merge(given), load_safetensors("theirs")
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        np.testing.assert_allclose(ours[name], x, rtol=0, atol=1e-6)


# --- The command ----------------------------------------------------------------------------------

TIES = ["merge", "--method=ties", "--base=base", "--models", *PATHS]


def test_command(place, capsys):
    (place / "base/config.json").write_text('{"torch_dtype": "float32", "width": 8}')
    (place / "base/tokenizer.json").write_text("{}")
    (place / "base/optimizer.pt").touch()
    command = [*TIES, "--weights", "0.5", "1", "2", "--option", "density=3e-1", "lambda=0.5"]
    command += ["--option", "scope=leaf", "--dtype=bfloat16", "--max_shard_size=300", "--out=out"]
    assert cli.main([*command, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "result: 7 tensors merged, 0 copied, 0 left out; 722 bytes of bfloat16" in shown
    assert shown.endswith("out: out\ndry run: nothing was computed or written\n")
    assert not (place / "out").exists()
    assert cli.main(command) == 0
    captured = capsys.readouterr()
    assert re.search(r"wrote out \(\d files\) in .*; peak memory \d+ MiB", captured.out)
    assert re.search(r"merge: step 7/7  peak MiB \d+", captured.err)
    wanted = trees.merge(BASE, MODELS, "ties", weight=[0.5, 1.0, 2.0], density=0.3, lambda_=0.5,
                         scope="leaf")  # fmt: skip
    same(load_safetensors("out"), cast(jax.tree.map(np.asarray, wanted), ml_dtypes.bfloat16))
    names = {p.name for p in (place / "out").iterdir() if p.suffix != ".safetensors"}
    assert names == {"README.md", "config.json", "tokenizer.json", files.INDEX}
    config = json.loads((place / "out/config.json").read_text())
    assert config == {"torch_dtype": "bfloat16", "width": 8}
    assert cli.main(command) == 2  # A result is not overwritten.
    assert "out exists already" in capsys.readouterr().err
    assert not (place / ".out.partial").exists()


def change(arguments, *more):
    return [a for a in TIES if a.partition("=")[0] not in arguments] + list(more)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (change(["--method"], "--method=tis"), "unknown method 'tis'. Did you mean ties"),
        (change(["--method"], "--method=regmean"), "it needs Gram matrices"),
        (change(["--method"], "--method=greedy_soup"), "it scores whole models"),
        (change(["--method"], "--method=dare_ties"), "needs density=..."),
        (change(["--method"], "--method=slerp", "--option", "t=0.5"), "got 3 models"),
        (change(["--method"], "--method=fisher"), "needs 3 files of Fisher diagonals"),
        (change(["--method"]), "give --method and --models, or --recipe"),
        (change(["--base"]), "'ties' needs a base"),
        (change(["--base"], "--base=org/name"), "there is no checkpoint org/name"),
        ([*TIES, "--option", "densty=0.5"], "Did you mean density?"),
        ([*TIES, "--option", "density=2"], "fractions from 0 to 1"),
        ([*TIES, "--option", "density"], "not of the form key=value"),
        ([*TIES, "--option", "scope=globl"], "Did you mean global?"),
        ([*TIES, "--option", "key=3"], "unknown option 'key'"),
        ([*TIES, "--option", "weight={nothing: 1, .*: 2}"], "'nothing'"),
        ([*TIES, "--weights", "1", "2"], "3 values, one for each model"),
        ([*TIES, "--fisher", "f0.safetensors"], "are for method 'fisher'"),
        ([*TIES, "--dtype=bfloat"], "Did you mean bfloat16 or"),
        ([*TIES, "--max_shard_size=5TB"], "is no size"),
        ([*TIES, "--recipe=r.yaml"], "--method, --base, --models with --recipe: write"),
        (["merge", "--recipe=r.yaml"], "r.yaml"),
    ],
)  # fmt: skip
def test_wrong_commands_are_one_paragraph_and_exit_code_2(place, capsys, arguments, message):
    assert cli.main([*arguments, "--out=out"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and message in captured.err
    assert "Traceback" not in captured.err and captured.err.count("\n") == 1
    assert not (place / "out").exists() and not (place / ".out.partial").exists()


def test_usage_errors(capsys):
    for arguments in (["merge"], [*TIES, "--out=o", "--missing=all"], [*TIES, "--out=o", "--opt"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
        assert "usage: transfer-jax" in capsys.readouterr().err


_SLOW = """
import sys, time
from transfer_jax import cli
from transfer_jax.trees.files import Checkpoint
read = Checkpoint.read
Checkpoint.read = lambda self, name: (time.sleep(0.2), read(self, name))[1]
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_killed_merge_leaves_no_result_and_is_run_again(place, capsys):
    command = ["merge", "--method=soup", "--models", *PATHS, "--max_shard_size=300", "--out=out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", _SLOW, *command], env=environment)
    deadline = time.monotonic() + 100
    while len(list(place.glob(".out.partial/*.safetensors"))) < 2:  # In the middle.
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    # While it works, nobody else writes there.
    assert cli.main(command) == 1
    assert "another process is writing out" in capsys.readouterr().err
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (place / "out").exists()
    assert cli.main(command) == 0
    same(load_safetensors("out"), trees.merge(None, MODELS, "soup"))
    assert not (place / ".out.partial").exists()


# --- The page -------------------------------------------------------------------------------------

PAGE = (ROOT / "docs/merge.md").read_text()
BLOCKS = re.findall(r"^```(\w+) *(\S*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [
    line.removeprefix("$ ")
    for language, _, body in BLOCKS if language == "console"
    for line in body.replace("\\\n", " ").splitlines() if line.startswith("$ transfer-jax merge")
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page(command, place, capsys):
    for name in ("llama", "llama-code", "llama-math", "llama-chat"):
        save_safetensors(BASE if name == "llama" else MODELS[0], name)
    for name in ("code-fisher", "math-fisher"):
        save_safetensors(FISHERS[0], f"{name}.safetensors")
    for language, title, body in BLOCKS:
        if language == "yaml":
            (place / title).write_text(body)
    program, *arguments = shlex.split(command)
    assert program == "transfer-jax"
    assert cli.main([*arguments, "--dry_run"]) == 0, capsys.readouterr().err


def test_the_page_has_every_method_and_flag_and_its_code_runs(place, capsys):
    assert len(COMMANDS) >= 5
    save_safetensors(BASE, "llama")
    for language, _, body in BLOCKS:
        if language == "python":
            exec(body, {})
    named = set(re.findall(r"`(\w+)`", PAGE))
    assert set(trees.METHODS) | {"greedy_soup"} <= named
    with pytest.raises(SystemExit):
        cli.main(["merge", "--help"])
    flags = set(re.findall(r"--\w+", capsys.readouterr().out))
    flags -= {"--help", "--debug", "--dry", "--max"}  # The last two are parts of spellings.
    assert flags <= set(re.findall(r"--\w+", PAGE))
