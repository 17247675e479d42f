"""What the benchmarks measure with: times of a call or a training step, and memory."""

import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from transfer_jax.training import keep_memory

keep_memory()  # as every run does; whichever side this process measures


def resident() -> float:
    """MiB of this process now."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024


def peak() -> float:
    """MiB of this process at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def median(step: Callable[[], Any], budget: float, most: int = 30) -> float:
    """Seconds of a call, after two that warm up; at least 3 calls, at most ``most``."""
    for _ in range(2):
        step()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget and len(times) < most):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def training_step(
    objective: Any, variables: Any, tx: Any, batches: Iterator[Any], budget: float
) -> dict[str, float]:
    """Seconds of a step of an objective, and the MiB of temporaries that XLA reports for it."""
    import jax
    import optax

    state, batch = (variables, tx.init(variables.params)), next(batches)

    def update(objective: Any, state: Any, batch: Any, key: Any) -> Any:
        variables, moments = state

        def loss(params: Any) -> Any:
            return objective.loss(variables._replace(params=params), batch, key)[0]

        value, gradient = jax.value_and_grad(loss)(variables.params)
        updates, moments = tx.update(gradient, moments, variables.params)
        params = optax.apply_updates(variables.params, updates)
        return (variables._replace(params=params), moments), value

    compiled = (
        jax.jit(update, donate_argnums=1)
        .lower(objective, state, batch, jax.random.key(0))
        .compile()
    )

    def step() -> None:
        nonlocal state, batch
        state, value = compiled(objective, state, batch, jax.random.key(0))
        value.block_until_ready()
        batch = next(batches)

    taken = median(step, budget)
    temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return {"seconds": taken, "temporaries": temporaries}
