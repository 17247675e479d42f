"""A training step of ESMM beside PyTorch, in one run.

    python benchmarks/conversion.py [--batch=1024] [--rows=20000] [--budget=4]

One step of Adam on both losses, five fields with one id each, embeddings of 18, towers of 64 and
32, in float32. In PyTorch it is the network of deepctr-torch where that is installed; else the same
list of embeddings and two perceptrons, written here.

Every row is a process of its own, whose peak memory beyond the imported libraries is printed: it
holds the parameters, moments, activations and, for JAX, the compiler. Times are medians after two
steps that warm up; processor time, a mean, tells more where other jobs run. The fields have
``rows`` ids each: Adam updates every row of every table, which is what a step of large tables
costs.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from meter import peak, resident

FIELDS, FEATURES, HIDDEN = 5, 18, (64, 32)


def timed(step: Callable[[], Any], budget: float) -> dict[str, float]:
    """Seconds of a call (median) and of processor time (mean), after two that warm up."""
    for _ in range(2):
        step()
    times: list[float] = []
    used = time.process_time()
    while len(times) < 5 or sum(times) < budget:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    used = time.process_time() - used
    return {"seconds": float(np.median(times)), "processor": used / len(times)}


def data(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = rng.integers(1, options.rows, (options.batch, FIELDS)).astype(np.int32)
    clicks = rng.random(options.batch) < 0.06
    bought = clicks & (rng.random(options.batch) < 0.6)
    return ids, np.stack([clicks, bought], axis=1).astype(np.float32)


def ours(options: argparse.Namespace) -> dict[str, float]:
    import jax
    import optax

    from transfer_jax.models.conversion import ConversionNetwork, Tower
    from transfer_jax.objectives import Variables
    from transfer_jax.objectives.conversion import EntireSpace

    before = resident()
    ids, labels = data(options)
    network = ConversionNetwork(
        fields=tuple((f"field_{i}", options.rows, 1) for i in range(FIELDS)),
        features=FEATURES, tower=Tower(HIDDEN),
    )  # fmt: skip
    objective, optimiser = EntireSpace(module=network), optax.adam(1e-3)
    host = {"inputs": {"ids": ids}, "labels": labels}
    params = jax.jit(objective.init)(jax.random.key(0), host).params
    state = jax.jit(optimiser.init)(params)

    def update(params: Any, state: Any, batch: Any) -> tuple[Any, Any, Any]:
        loss, grads = jax.value_and_grad(
            lambda p: objective.loss(Variables(p, {}), batch, jax.random.key(0))[0]
        )(params)
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    compiled = jax.jit(update, donate_argnums=(0, 1))

    def step() -> None:
        nonlocal params, state
        params, state, loss = compiled(params, state, jax.device_put(host))
        loss.block_until_ready()

    return {**timed(step, options.budget), "memory": peak() - before}


def theirs(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(options.threads)
    try:
        from deepctr_torch.inputs import SparseFeat
        from deepctr_torch.models import ESMM
    except ImportError:
        ESMM = None

    before = resident()
    ids, labels = data(options)
    if ESMM is not None:
        columns = [SparseFeat(f"field_{i}", options.rows, FEATURES) for i in range(FIELDS)]
        model = ESMM(columns, HIDDEN, l2_reg_embedding=0.0, l2_reg_linear=0.0)
        inputs = torch.tensor(ids).float()  # its embeddings read floats
    else:
        model = plain(options.rows)
        inputs = torch.tensor(ids).long()
    events = torch.tensor(labels)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> None:
        optimiser.zero_grad()
        predicted = model(inputs)
        # As deepctr-torch's fit: one loss per task, summed over the batch.
        losses = [
            torch.nn.functional.binary_cross_entropy(predicted[:, k], events[:, k], reduction="sum")
            for k in range(2)
        ]
        (losses[0] + losses[1]).backward()
        optimiser.step()

    name = "deepctr-torch" if ESMM is not None else "PyTorch"
    return {**timed(step, options.budget), "memory": peak() - before, "name": name}


def plain(rows: int) -> Any:
    """Embeddings and two perceptrons, as deepctr-torch has them."""
    import torch
    from torch import nn

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(rows, FEATURES) for _ in range(FIELDS))
            sizes = (FIELDS * FEATURES, *HIDDEN)

            def tower() -> Any:
                pairs = itertools.pairwise(sizes)
                hidden = [layer for a, b in pairs for layer in (nn.Linear(a, b), nn.ReLU())]
                return nn.Sequential(*hidden, nn.Linear(sizes[-1], 1))

            self.click, self.conversion = tower(), tower()

        def forward(self, ids: Any) -> Any:
            h = torch.cat([table(ids[:, i]) for i, table in enumerate(self.tables)], dim=1)
            p, q = self.click(h).sigmoid(), self.conversion(h).sigmoid()
            return torch.cat([p, p * q], dim=1)

    return Plain()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds per row")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps({"ours": ours, "theirs": theirs}[options.side](options)))
        return
    found = {}
    for side in ("ours", "theirs"):
        command = [sys.executable, __file__, *sys.argv[1:], f"--side={side}"]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[side] = json.loads(output.splitlines()[-1])
    print(f"batch {options.batch}, {FIELDS} fields of {options.rows} ids")
    for row in found.values():
        name = row.get("name", "transfer_jax")
        print(
            f"{name:>14}  {1e3 * row['seconds']:8.2f} ms  {1e3 * row['processor']:8.2f} ms of "
            f"processor time  {row['memory']:6.0f} MiB"
        )
    for key in ("seconds", "processor", "memory"):
        ratio = found["theirs"][key] / found["ours"][key]
        print(f"{key}: {ratio:.2f} times that of transfer_jax")


if __name__ == "__main__":
    main()
