"""What ``fit`` costs over the bare jitted step, and over an optax loop written by hand.

    python benchmarks/loop.py [--step_ms 50] [--steps 200] [--repeats 3]

All three loops run the same model, data and optimiser in one process, in turn, several times; the
least time of each counts. ``fit`` runs as users run it: metrics lines, checkpoints, data pipeline,
checks for non-finite values.
"""

import argparse
import platform
import tempfile
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from transfer_jax.data.pipeline import Pipeline
from transfer_jax.data.sources import ArraySource
from transfer_jax.objectives import Classification, Variables
from transfer_jax.training import FitConfig, Layout, OptimizerConfig, fit, make_mesh
from transfer_jax.training.loop import make_step
from transfer_jax.training.optimizers import make_optimizer


class Network(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train=False):
        for _ in range(3):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step_ms", type=float, default=50.0, help="about how long a step takes")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(4096, 784)).astype(np.float32)
    source = ArraySource({"inputs": inputs, "labels": rng.integers(0, 10, 4096).astype(np.int32)})
    layout = Layout(make_mesh({"data": 1}, jax.devices()[:1]))
    batch_size = 256

    def pipeline() -> Pipeline:
        return Pipeline(source, batch_size, shuffle=True, repeat=True)

    def setup(width: int):
        task = Classification(module=Network(width))
        config = FitConfig(
            steps=args.steps, log_every=50, checkpoint_every=100, optimizer=OptimizerConfig()
        )
        return task, config

    def bare(width: int, steps: int) -> float:
        """Seconds per step of the jitted step alone, on one batch that stays on the device."""
        from transfer_jax.training.loop import TrainState

        task, config = setup(width)
        batch = layout.place_batch(pipeline().example_batch())
        variables = task.init(jax.random.key(0), batch)
        tx, _ = make_optimizer(config.optimizer, config.steps, variables.params)
        k = 4
        state = layout.place(
            TrainState(
                step=jnp.int32(0), variables=variables, opt_state=tx.init(variables.params),
                ema=None, lr_scale=jnp.float32(1), sums=jnp.zeros((k, 2)), bad_step=jnp.int32(-1),
                bad=jnp.zeros(k, bool),
            )
        )  # fmt: skip
        key = jax.random.key(1)
        step = jax.jit(make_step(tx, config, layout), donate_argnums=0)
        step = step.lower(state, task, batch, key).compile()
        state, report = step(state, task, batch, key)
        jax.block_until_ready(report)
        began = time.perf_counter()
        for _ in range(steps):
            state, report = step(state, task, batch, key)
        jax.block_until_ready(report)
        return (time.perf_counter() - began) / steps

    def by_hand(width: int) -> float:
        """Seconds per step of the loop that one would write without this library."""
        task, _ = setup(width)
        iterator = pipeline().iterator()
        batch = next(iterator)
        variables = task.init(jax.random.key(0), batch)
        tx = optax.adamw(1e-3, weight_decay=0.0)

        @jax.jit
        def step(params, opt_state, batch):
            def loss(p):
                return task.loss(Variables(p, {}), batch, jax.random.key(0))[0]

            value, grads = jax.value_and_grad(loss)(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, value

        params, opt_state = variables.params, tx.init(variables.params)
        params, opt_state, value = step(params, opt_state, batch)
        jax.block_until_ready(value)
        began = time.perf_counter()
        for i in range(args.steps):
            params, opt_state, value = step(params, opt_state, next(iterator))
            if i % 50 == 49:
                float(value)
        jax.block_until_ready(value)
        seconds = (time.perf_counter() - began) / args.steps
        iterator.close()
        return seconds

    def whole(width: int) -> float:
        """Seconds per step of ``fit``, without its compilation."""
        task, config = setup(width)
        with tempfile.TemporaryDirectory() as workdir:
            result = fit(task, pipeline(), config, layout=layout, workdir=workdir)
        return (result.summary["seconds"] - result.summary["compile_seconds"]) / args.steps

    width = 256
    while bare(width, 5) * 1e3 < args.step_ms and width < 16384:
        width = int(width * 1.25)
    print(f"{platform.processor() or platform.machine()}, {jax.devices()[0].device_kind}, "
          f"jax {jax.__version__}; 3 hidden layers of {width}, batch {batch_size}")  # fmt: skip
    times: dict[str, list[float]] = {"bare step": [], "loop by hand": [], "fit": []}
    for _ in range(args.repeats):
        times["bare step"].append(bare(width, args.steps))
        times["loop by hand"].append(by_hand(width))
        times["fit"].append(whole(width))
    base = min(times["bare step"])
    for name, values in times.items():
        print(f"{name:14s} {min(values) * 1e3:8.3f} ms per step   {min(values) / base:6.3f} x bare")


if __name__ == "__main__":
    main()
