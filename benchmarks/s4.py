"""S4 against LSTM and attention, in one run on this machine.

    python benchmarks/s4.py [--quick]

Prints: the cost of generating the S4 kernel beside that of the convolution it feeds; one layer's
forward and backward pass with its memory over sequence length; generation with a full context
against a Transformer of the same width and depth with a KV cache.
"""

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from transfer_jax.models import LanguageModel
from transfer_jax.nn import LSTM, Attention, S4Layer, SSMKernel
from transfer_jax.ops import fft_convolve

GIB = 2**30


def hardware() -> str:
    """One line: processor or accelerator, cores, versions."""
    device = jax.devices()[0]
    name = device.device_kind
    cpuinfo = Path("/proc/cpuinfo")
    if device.platform == "cpu" and cpuinfo.exists():
        models = [l for l in cpuinfo.read_text().splitlines() if l.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else platform.processor()
        name += f", {len(models)} logical cores"
    return (
        f"{name}; {platform.system()}, Python {platform.python_version()}, jax {jax.__version__}, "
        f"flax {flax.__version__}, float32"
    )


def seconds(function: Callable[..., Any], *arguments: Any, budget: float = 2.0) -> float:
    """Median wall time of a call, after one that warms up."""
    jax.block_until_ready(function(*arguments))
    times: list[float] = []
    while len(times) < 2 or (sum(times) < budget and len(times) < 15):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def gradient(apply: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Forward and backward pass of ``apply(variables, x)`` towards both arguments."""
    return jax.grad(lambda *arguments: jnp.sum(apply(*arguments) ** 2), argnums=(0, 1))


def kernel_against_convolution(budget: float) -> None:
    batch, features, size, length = 16, 256, 64, 1024
    print(f"\nKernel generation and convolution, B={batch} H={features} N={size} L={length}")
    x = jax.random.normal(jax.random.key(0), (batch, length, features))
    taps = jax.random.normal(jax.random.key(1), (features, length)) / length

    def convolve(taps, x):
        return jnp.swapaxes(fft_convolve(jnp.swapaxes(x, 1, 2), taps), 1, 2)

    print(f"  {'':30}{'forward':>12}{'fwd + bwd':>12}")

    def row(name: str, forward, backward, *arguments) -> None:
        one = seconds(jax.jit(forward), *arguments, budget=budget)
        two = seconds(jax.jit(backward), *arguments, budget=budget)
        print(f"  {name:30}{1e3 * one:9.1f} ms{1e3 * two:9.1f} ms")

    row("FFT convolution", convolve, gradient(convolve), taps, x)
    for label, kernel in (("S4 (dplr)", "dplr"), ("S4D (diag)", "diag")):
        module = SSMKernel(features, size, kernel=kernel, l_max=length)
        variables = jax.jit(lambda key, m=module: m.init(key, length))(jax.random.key(2))

        def generate(variables, m=module):
            return m.apply(variables, length)

        def backward(variables, g=generate):
            return jax.grad(lambda v: jnp.sum(g(v) ** 2))(variables)

        row(f"{label} kernel alone", generate, backward, variables)
        layer = S4Layer(features, size, kernel=kernel, l_max=length)
        variables = jax.jit(layer.init)(jax.random.key(2), x)
        row(f"{label} whole layer", layer.apply, gradient(layer.apply), variables, x)


def layers_over_length(lengths: tuple[int, ...], budget: float, memory: float) -> None:
    features, tokens = 128, 16384
    print(f"\nOne layer, forward + backward, H={features}, {tokens} positions per batch")
    print(f"  {'L':>6} {'B':>3} {'layer':22}{'time':>12}{'temporaries':>14}")
    for length in lengths:
        batch = max(1, tokens // length)
        x = jax.random.normal(jax.random.key(0), (batch, length, features))
        for name, module in (
            ("S4 (N=64)", S4Layer(features, l_max=length)),
            ("S4D (N=64)", S4Layer(features, kernel="diag")),
            ("LSTM", LSTM(features)),
            ("attention (4 heads)", Attention(features, causal=True)),
        ):
            variables = jax.jit(module.init)(jax.random.key(1), x[:1, :8])
            compiled = jax.jit(gradient(module.apply)).lower(variables, x).compile()
            need = compiled.memory_analysis().temp_size_in_bytes
            head = f"  {length:6} {batch:3} {name:22}"
            if need > memory:
                print(f"{head}     skipped: needs {need / GIB:.1f} GiB > {memory / GIB:.1f} GiB")
                continue
            took = seconds(compiled, variables, x, budget=budget)
            print(f"{head}{1e3 * took:9.0f} ms{need / 2**20:10.0f} MiB", flush=True)


def full_state(module: LanguageModel, batch: int, context: int, left: int) -> Callable[..., Any]:
    """Compiles: decoding matrices, and a state as after ``context - left`` tokens.

    The state holds zeros, which cost the same time as any others.
    """

    @jax.jit
    def prepare(variables):
        systems = module.apply(variables, method="discretise")
        prompt = jnp.zeros((batch, 1), jnp.int32)
        _, state = module.apply(variables, prompt, systems, None, context, method="prefill")
        seen = context - left
        return systems, jax.tree.map(
            lambda x: jnp.full_like(x, seen if x.dtype == jnp.int32 else 0), state
        )

    return prepare


def generation(contexts: tuple[int, ...], batch: int, steps: dict[str, int]) -> None:
    features, depth, vocabulary = 256, 4, 256
    print(f"\nGeneration, width {features}, {depth} x (mixer, FFN), batch {batch}, context full")
    print(f"  {'context':>8} {'model':16}{'tokens/s':>12}{'ms/step':>10}{'state':>12}")

    def build(name: str) -> LanguageModel:
        return LanguageModel(
            features=features, depth=depth, mixer=name, pattern=("mixer", "ffn"),
            vocab_size=vocabulary, l_max=1024,
            mixer_options={"rotary": True} if name == "attention" else {},
        )  # fmt: skip

    for context in contexts:
        speed = {}
        for name, label in (("s4", "S4"), ("s4d", "S4D"), ("attention", "Transformer")):
            module, count = build(name), steps[name]
            variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 16), jnp.int32))

            def decode(variables, systems, state, module=module, count=count):
                def body(carry, _):
                    token, state = carry
                    logits, state = module.apply(
                        variables, token, state, systems, method="step_logits"
                    )
                    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
                    return (token, state), token

                start = jnp.zeros((batch,), jnp.int32), state
                return jax.lax.scan(body, start, None, length=count)

            run = jax.jit(decode, donate_argnums=2)

            prepare = full_state(module, batch, context, count)
            _, state = jax.block_until_ready(prepare(variables))
            size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
            times = []
            for _ in range(3):  # the first compiles; each run gives its state away
                systems, state = jax.block_until_ready(prepare(variables))
                start = time.perf_counter()
                jax.block_until_ready(run(variables, systems, state))
                times.append(time.perf_counter() - start)
            speed[name] = batch * count / min(times)
            print(
                f"  {context:8} {label:16}{speed[name]:12.0f}{1e3 * min(times) / count:10.2f}"
                f"{size / 2**20:8.1f} MiB",
                flush=True,
            )
        ratio = speed["s4"] / speed["attention"]
        diagonal = speed["s4d"] / speed["attention"]
        print(f"  {context:8} ratio to the Transformer: S4 {ratio:.1f}x, S4D {diagonal:.1f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short lengths, few repetitions")
    parser.add_argument("--max-memory", type=float, default=6.0, help="GiB a layer may need")
    options = parser.parse_args()
    print(hardware())
    budget = 0.3 if options.quick else 2.0
    kernel_against_convolution(budget)
    lengths = (1024,) if options.quick else (1024, 4096, 16384)
    layers_over_length(lengths, budget, options.max_memory * GIB)
    steps = {"s4": 128, "s4d": 128, "attention": 8 if options.quick else 24}
    generation((1024,) if options.quick else (4096, 16384), 8, steps)


if __name__ == "__main__":
    main()
