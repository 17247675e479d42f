"""Timings of ``transfer_jax.trees`` beside loops of single examples and plain copies of memory.

    python -m benchmarks.trees [--examples=64] [--million_params=25] [--only=files]

* Fisher diagonal of a multilayer perceptron and a small vision transformer of 10 M parameters
  each, against a loop over examples in JAX (compiled gradient, compiled sum) and in PyTorch.
* Merging three models in memory, against copying the bytes of all inputs.
* Merging two models in files, base and models of 42 M parameters each in the layout of Llama,
  against copying the files and against mergekit, if ``mergekit-yaml`` is found (or is where
  ``--mergekit`` says). Each is a command of its own, whose peak memory the system tells.

Every number is the best of a few runs; those in memory after one that compiles.
"""

import argparse
import functools
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from transfer_jax import trees
from transfer_jax.trees.files import save_safetensors


def seconds(function: Callable[[], Any], repeats: int) -> float:
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return min(times)


def peak_mib() -> float:
    """The largest amount of memory that the process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (2048, 2048, 2048):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class VisionTransformer(nn.Module):
    """16 patches of 7 by 7 pixels, 5 pre-norm blocks of width 408."""

    width: int = 408

    @nn.compact
    def __call__(self, x):
        x = x.reshape(-1, 4, 7, 4, 7).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 49)
        x = nn.Dense(self.width)(x)
        x = x + self.param("positions", nn.initializers.normal(0.02), (16, self.width))
        for _ in range(5):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(6)(h, h)
            h = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(h)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


def loss(model: nn.Module, params: Any, batch: Any) -> jax.Array:
    log_probs = jax.nn.log_softmax(model.apply({"params": params}, batch["inputs"]))
    return -jnp.take_along_axis(log_probs, batch["labels"][:, None], 1)[:, 0]


def torch_loop(params: Any, batch: Any) -> Callable[[], Any] | None:
    """Returns the loop over examples for ``Perceptron`` in PyTorch, if that is installed."""
    try:
        import torch
    except ImportError:
        return None
    layers = [params[f"Dense_{i}"] for i in range(4)]
    weights = [
        torch.tensor(np.asarray(x), requires_grad=True)
        for layer in layers
        for x in (layer["kernel"], layer["bias"])
    ]
    inputs, labels = torch.tensor(batch["inputs"]), torch.tensor(batch["labels"])

    def run() -> float:
        total = [torch.zeros_like(w) for w in weights]
        for i in range(len(inputs)):
            x = inputs[i : i + 1]
            for j in range(0, 8, 2):
                x = x @ weights[j] + weights[j + 1]
                x = torch.relu(x) if j < 6 else x
            value = torch.nn.functional.cross_entropy(x, labels[i : i + 1])
            for t, g in zip(total, torch.autograd.grad(value, weights)):
                t.addcmul_(g, g)
        return float(total[-1].sum())

    return run


def fisher(name: str, model: nn.Module, examples: int) -> None:
    rng = np.random.default_rng(0)
    batch = {
        "inputs": rng.normal(size=(examples, 784)).astype(np.float32),
        "labels": rng.integers(0, 10, examples),
    }
    params = jax.jit(model.init)(jax.random.key(0), batch["inputs"][:1])["params"]
    size = sum(x.size for x in jax.tree.leaves(params))
    function = functools.partial(loss, model)

    ours = seconds(
        lambda: trees.fisher_diagonal(function, params, batch, kind="empirical"), repeats=3
    )
    peak = peak_mib()

    gradient = jax.jit(jax.grad(lambda p, b: function(p, b)[0]))
    accumulate = jax.jit(lambda t, g: jax.tree.map(lambda a, b: a + b * b, t, g), donate_argnums=0)
    few = examples // 4

    def loop() -> Any:
        total = jax.tree.map(jnp.zeros_like, params)
        for i in range(few):
            row = jax.tree.map(lambda x: x[i : i + 1], batch)  # noqa: B023
            total = accumulate(total, gradient(params, row))
        return total

    per_example = 1e3 * ours / examples
    print(f"Fisher diagonal, {name}, {size / 1e6:.1f} M parameters, {examples} examples")
    print(f"  transfer_jax      {per_example:8.2f} ms per example, peak {peak:.0f} MiB")
    theirs = 1e3 * seconds(loop, repeats=1) / few
    print(f"  loop in JAX       {theirs:8.2f} ms per example: {theirs / per_example:.1f} x")
    if isinstance(model, Perceptron):
        run = torch_loop(params, jax.tree.map(lambda x: x[:few], batch))
        if run is None:
            print("  loop in PyTorch     absent: PyTorch is not installed")
        else:
            theirs = 1e3 * seconds(run, repeats=1) / few
            print(f"  loop in PyTorch   {theirs:8.2f} ms per example: {theirs / per_example:.1f} x")


def merging(million_params: int) -> None:
    rng = np.random.default_rng(0)
    num, side = max(1, million_params * 10**6 // 1024**2), 1024

    def model() -> Any:
        return {f"layer_{i:03}": jnp.asarray(rng.standard_normal((side, side), np.float32))
                for i in range(num)}  # fmt: skip

    base = model()
    models = [trees.add(base, trees.scale(model(), 0.1)) for _ in range(3)]
    given = [np.asarray(x) for tree in (base, *models) for x in jax.tree.leaves(tree)]
    size = sum(x.nbytes for x in given)
    target = [np.empty_like(x) for x in given]

    def copy() -> None:
        for x, y in zip(given, target):
            np.copyto(y, x)

    copied = seconds(copy, repeats=5)
    print(f"Merging 3 models of {num * side**2 / 1e6:.0f} M parameters in {num} float32 tensors")
    print(f"  copy of all inputs       {size / copied / 1e9:6.2f} GB/s")
    key = jax.random.key(0)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("task_arithmetic", {"weight": 0.3}),
        ("soup", {}),
        ("ties", {"scope": "leaf"}),
        ("ties", {"scope": "global"}),
        ("dare_linear", {"density": 0.5, "key": key}),
        ("delta_guided", {}),
        ("model_stock", {}),
    ]
    for method, options in cases:
        merge = functools.partial(trees.merge, base, models, method, **options)
        took = seconds(merge, repeats=3)
        label = f"{method} {options['scope']}" if "scope" in options else method
        print(
            f"  {label:<24} {size / took / 1e9:6.2f} GB/s: {100 * copied / took:3.0f} % "
            f"({took / copied:.1f} x the time of the copy), peak {peak_mib():.0f} MiB"
        )


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
    "hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 8000, "num_hidden_layers": 2,
    "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": False,
}  # fmt: skip


def llama(rng: np.random.Generator, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns random tensors of ``LLAMA``, or a small change of others."""
    hidden, inner, words = 1024, 2816, 8000
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, hidden)}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{x}_proj.weight": (hidden, hidden) for x in "qkvo"}
        shapes |= {f"{layer}.mlp.{x}_proj.weight": (inner, hidden) for x in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{layer}.{x}_layernorm.weight": (hidden,)
                   for x in ("input", "post_attention")}  # fmt: skip
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (words, hidden)}
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    if base is None:
        return tensors
    return {name: base[name] + np.float32(0.1) * x for name, x in tensors.items()}


# A small process between, as a process begins with the peak of the one that starts it.
MEASURE = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([status, time.perf_counter() - start, usage.ru_maxrss / 1024]))
"""


def command(arguments: list[str], folder: Path) -> tuple[float, float, str]:
    """Runs a command; returns its seconds, its peak memory in MiB and what it wrote."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], cwd=folder, capture_output=True, text=True
    )
    status, took, peak = json.loads(done.stdout)
    if status:
        raise SystemExit(f"{arguments} failed:\n{done.stderr[-2000:]}")
    return took, peak, done.stderr


def files(mergekit: str | None) -> None:
    """Merges files with the command, and with mergekit's."""
    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), np.random.default_rng(0)
        base = llama(rng)
        for model in ("base", "a", "b"):
            save_safetensors(base if model == "base" else llama(rng, base), folder / model)
            (folder / model / "config.json").write_text(json.dumps(LLAMA))
        size = sum(x.nbytes for x in base.values())
        del base

        def copy() -> None:
            for model in ("base", "a", "b"):
                shutil.copy(folder / model / "model.safetensors", folder / "copy")

        copied = seconds(copy, repeats=3)
        print(f"Merging 2 models of {size / 4e6:.0f} M parameters in float32 files")
        print(f"  inputs {3 * size / 2**20:.0f} MiB; copying them takes {copied:.2f} s")
        program = mergekit or shutil.which("mergekit-yaml")
        if program is None:
            print("  mergekit-yaml absent: mergekit is not installed")
        python = [sys.executable, "-c"]
        _, started, _ = command([*python, "import jax; jax.numpy.zeros(1)"], folder)
        print(f"  of the peaks, JAX alone holds {started:.0f} MiB")
        cases: list[tuple[str, dict[str, Any]]] = [
            ("task_arithmetic", {"weight": 0.5}),
            ("ties", {"weight": 0.5, "density": 0.3, "scope": "leaf"}),
            ("ties", {"weight": 0.5, "density": 0.3, "scope": "global"}),
            ("model_stock", {}),
        ]
        for method, options in cases:
            recipe = {
                "merge_method": method, "base_model": "base",
                "models": [{"model": "a"}, {"model": "b"}], "parameters": options,
                "dtype": "float32",
            }  # fmt: skip
            label = f"{method} {options.get('scope', '')}".strip()
            program_ours = [sys.executable, "-m", "transfer_jax.cli", "merge"]
            ours = run_merge([*program_ours, "--recipe=recipe.yaml", "--out=out"], recipe, folder)
            merged = ours[2].split(" s; peak")[0].rsplit(" ", 1)[-1]
            print(
                f"  {label:<16} transfer_jax {ours[0]:6.2f} s ({merged} s without starting: "
                f"{3 * size / 1e9 / float(merged):.2f} GB/s in), peak {ours[1]:.0f} MiB"
            )
            if program is None or options.get("scope") == "global":  # mergekit has no such ties.
                continue
            options.pop("scope", None)
            theirs = run_merge(
                [program, "recipe.yaml", "out", "--no-write-model-card"], recipe, folder
            )
            print(
                f"  {label:<16} mergekit     {theirs[0]:6.2f} s: {theirs[0] / ours[0]:.1f} x the "
                f"time, peak {theirs[1]:.0f} MiB: {theirs[1] / ours[1]:.1f} x the memory"
            )


def run_merge(
    arguments: list[str], recipe: dict[str, Any], folder: Path
) -> tuple[float, float, str]:
    """Returns what ``command`` does for the faster of two runs."""
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML.
    runs = []
    for _ in range(2):
        shutil.rmtree(folder / "out", ignore_errors=True)
        runs.append(command(arguments, folder))
    return min(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--million_params", type=int, default=25, help="of each merged model")
    parser.add_argument("--only", choices=["fisher", "memory", "files"])
    parser.add_argument("--mergekit", help="path of mergekit-yaml")
    args = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind} x {jax.device_count()}")
    if args.only in (None, "fisher"):
        fisher("perceptron", Perceptron(), args.examples)
        fisher("vision transformer", VisionTransformer(), args.examples)
    if args.only in (None, "memory"):
        merging(args.million_params)
    if args.only in (None, "files"):
        files(args.mergekit)


if __name__ == "__main__":
    main()
