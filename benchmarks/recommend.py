"""Sequential recommenders beside plain PyTorch, and a catalogue of a million items.

    python benchmarks/recommend.py [--only=training|ranking|million] [--items=3416] [--batch=64]

* ``training``: examples per second of BERT4Rec (Cloze, softmax over all items) as in the paper's
  ablations (d = 64, two layers, two heads), by default with the items of MovieLens-1M and rows of
  50; ours, and ``BertForMaskedLM`` of ``transformers`` with the same number of masked positions
  gathered before the head, with torch's AdamW.
* ``ranking``: users per second of a full ranking with seen items removed, of the same two.
* ``million``: trains a causal model of width 16 on a million items with sampled softmax, and ranks
  all of them for rows it was trained on. The table and its moments are split over eight virtual
  devices of this machine. Prints the peak memory of the process.

Every row is a process of its own. Times are medians after two calls that warm up, in float32.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
from meter import median, peak

FEATURES, LENGTH, MASKS, SEEN = 64, 50, 10, 100
SECTIONS = ("training", "ranking", "million")


def data(options: argparse.Namespace) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    size = (options.batch, LENGTH)
    return {
        "inputs": rng.integers(1, options.items + 1, size).astype(np.int32),
        "labels": rng.integers(1, options.items + 1, options.batch).astype(np.int32),
        "seen": rng.integers(1, options.items + 1, (options.batch, SEEN)).astype(np.int32),
    }


def ours(section: str, options: argparse.Namespace) -> float:
    import jax
    import optax

    from transfer_jax.models.recommender import SequentialRecommender, encoder_stack
    from transfer_jax.objectives import Variables
    from transfer_jax.objectives.recommend import Cloze

    stack = encoder_stack(FEATURES, dropout=0.1, attention_dropout=0.1)
    module = SequentialRecommender(num_items=options.items, max_length=LENGTH, stack=stack)
    task = Cloze(module=module, share=0.2, maximum=MASKS)
    batch = jax.device_put(data(options))
    variables = jax.jit(task.init)(jax.random.key(0), batch)
    if section == "ranking":
        rank = jax.jit(lambda v, b: task.loss(v, b, None)[1].metrics["ndcg@10"])
        return median(lambda: jax.block_until_ready(rank(variables, batch)), options.seconds)
    tx = optax.adamw(1e-3)
    state = (variables.params, tx.init(variables.params))

    def update(state, batch, key):
        params, moments = state
        slope = jax.grad(lambda p: task.loss(Variables(p, {}), batch, key)[0])(params)
        updates, moments = tx.update(slope, moments, params)
        return optax.apply_updates(params, updates), moments

    compiled = jax.jit(update, donate_argnums=0)

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(compiled(state, batch, jax.random.key(1)))

    return median(step, options.seconds)


def torch_peer(section: str, options: argparse.Namespace) -> float:
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    config = transformers.BertConfig(
        vocab_size=options.items + 2, hidden_size=FEATURES, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=4 * FEATURES, max_position_embeddings=LENGTH,
        type_vocab_size=1, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config)
    batch = {name: torch.tensor(array, dtype=torch.long) for name, array in data(options).items()}
    rows = torch.arange(options.batch)[:, None]
    if section == "ranking":
        model.eval()

        @torch.no_grad()
        def rank() -> float:
            hidden = model.bert(batch["inputs"]).last_hidden_state[:, -1]
            scores = model.cls(hidden)
            own = scores.gather(1, batch["labels"][:, None])
            scores[:, [0, -1]] = -torch.inf
            scores.scatter_(1, batch["seen"], -torch.inf)
            place = (scores > own).sum(1)
            return float(torch.where(place < 10, 1 / torch.log2(place + 2.0), 0.0).mean())

        return median(rank, options.seconds)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        places = torch.rand(batch["inputs"].shape).argsort(1)[:, :MASKS]
        labels = batch["inputs"].gather(1, places)
        masked = batch["inputs"].scatter(1, places, options.items + 1)
        hidden = model.bert(masked).last_hidden_state[rows, places]
        logits = model.cls(hidden)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return median(step, options.seconds)


def million(options: argparse.Namespace) -> dict[str, float]:
    import jax

    from transfer_jax.data.pipeline import Pipeline
    from transfer_jax.data.sources import ArraySource
    from transfer_jax.models.recommender import (
        PARTITION_RULES,
        SequentialRecommender,
        encoder_stack,
    )
    from transfer_jax.objectives.recommend import NextItem
    from transfer_jax.training import FitConfig, Layout, OptimizerConfig, fit, make_mesh

    items, batch, length = 1_000_000, 32, 10
    stack = encoder_stack(16, num_layers=1, num_heads=1, causal=True)
    module = SequentialRecommender(
        num_items=items, max_length=length, stack=stack, head="dot", round_rows_to=8
    )
    task = NextItem(module=module, kind="sampled", negatives=512)
    rng = np.random.default_rng(0)
    rows = rng.integers(1, items, (256, length + 1)).astype(np.int32)
    rows[:, 1:] = (rows[:, :1] + np.arange(length)) % items + 1  # item k is followed by k + 1
    train = Pipeline(ArraySource({"inputs": rows}), batch, shuffle=True, repeat=True)
    test = ArraySource({"inputs": rows[:64, :-1], "labels": rows[:64, -1], "seen": rows[:64, :-1]})
    layout = Layout(make_mesh({"data": 1, "model": 8}), PARTITION_RULES)
    began = time.perf_counter()
    config = FitConfig(steps=60, log_every=20, optimizer=OptimizerConfig(learning_rate=0.05))
    fitted = fit(
        task, train, config, layout=layout,
        evaluate={"test": Pipeline(test, batch)},
    )  # fmt: skip
    table = fitted.params["items"]["embedding"]
    return {
        "rows of the table on a device": table.sharding.shard_shape(table.shape)[0],
        "NDCG@10": fitted.metrics["test/ndcg@10"],
        "seconds": time.perf_counter() - began,
        "peak MiB": peak(),
        "devices": jax.device_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SECTIONS)
    parser.add_argument("--items", type=int, default=3_416)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0, help="of every measurement")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        section, _, peer = options.row.partition(":")
        if section == "million":
            print(json.dumps(million(options)))
        else:
            measure = {"transfer_jax": ours, "torch": torch_peer}[peer]
            print(json.dumps(options.batch / measure(section, options)))
        return

    def row(name: str, **environment: str) -> Any:
        command = [sys.executable, __file__, *sys.argv[1:], f"--row={name}"]
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, **environment},
        )
        return json.loads(done.stdout.splitlines()[-1])

    for section in (options.only,) if options.only else SECTIONS:
        if section == "million":
            flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
            for name, value in row("million", JAX_PLATFORMS="cpu", **flags).items():
                print(f"a million items: {name}: {value:,.4g}")
            continue
        what = {"training": "examples", "ranking": "users"}[section]
        for peer in ("transfer_jax", "torch"):
            speed = row(f"{section}:{peer}")
            print(f"{section}, {options.items:,} items: {peer}: {speed:,.0f} {what}/s", flush=True)


if __name__ == "__main__":
    main()
