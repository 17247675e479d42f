"""Sequential recommenders beside plain PyTorch and RecBole, and a catalogue of a million items.

    python benchmarks/recommend.py [--only=training|ranking|million|recbole] [--items=3416]
                                   [--batch=64] [--log=ml100k] [--models=bert4rec,sasrec_ce]
                                   [--epochs=10] [--seed=0] [--threads=0]

* ``training``: examples per second of BERT4Rec (Cloze, softmax over all items) as in the paper's
  ablations (d = 64, two layers, two heads), by default with the items of MovieLens-1M and rows of
  50; ours, and ``BertForMaskedLM`` of ``transformers`` with the same number of masked positions
  gathered before the head, with torch's AdamW.
* ``ranking``: users per second of a full ranking with seen items removed, of the same two.
* ``million``: trains a causal model of width 16 on a million items with sampled softmax, and ranks
  all of them for rows it was trained on. The table and its moments are split over eight virtual
  devices of this machine. Prints the peak memory of the process.

* ``recbole``, where that is installed: trains BERT4Rec and SASRec with softmax over all items, ours
  and RecBole's, on the same log with the same last two items of each user left out, and ranks all
  items, seen ones among them. RecBole has its defaults but for the length of the rows, 20: one
  example for every prefix of a user's items. Ours have the settings of ``bert4rec:ml100k``, on
  windows. Both see as many examples: ``epochs`` of RecBole's. Both are evaluated on the
  validation items ``epochs`` times and tested with the best parameters. ``--log=ml100k`` needs
  TRANSFER_JAX_DATA; the default log is generated. Examples and users per second are those of the
  whole loops, data included. SASRec's examples per second are of prefixes on both sides; the
  windows that ours is trained on have a prediction at every place.

Every row is a process of its own. Times are medians after two calls that warm up, in float32.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from meter import median, peak

FEATURES, LENGTH, MASKS, SEEN = 64, 50, 10, 100
SECTIONS = ("training", "ranking", "million", "recbole")
# A model of configs/bert4rec.py and its name in RecBole.
RECBOLE = {"bert4rec": "BERT4Rec", "sasrec_ce": "SASRec", "gru4rec": "GRU4Rec"}
SHOWN = ("examples/s", "users/s", "validation NDCG@10", "HR@10", "NDCG@10", "seconds")


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


def split_log(options: argparse.Namespace) -> Any:
    """The log, without the last two items of each user."""
    from transfer_jax.data.interactions import leave_one_out
    from transfer_jax.data.recommend import load_log

    return leave_one_out(load_log(options.log).by_frequency())


def prefixes(split: Any) -> int:
    """RecBole's examples of an epoch: every training item but the first of each user."""
    return int((split.train.lengths - 1).clip(0).sum())


def logged_speed(directory: str) -> float:
    """Examples per second of a finished stage, without its compilation."""
    from transfer_jax.training import read_metrics

    key = "time/examples_per_second"
    lines = read_metrics(Path(directory) / "metrics.jsonl")
    return float(np.median([line[key] for line in lines if key in line][1:]))


def prefix_speed(objective: Any, train: Any, options: argparse.Namespace) -> float:
    """Examples per second where an example is a prefix and what follows it, as RecBole's are."""
    from transfer_jax.data import recommend
    from transfer_jax.data.pipeline import Pipeline
    from transfer_jax.objectives.recommend import NextOfPrefix
    from transfer_jax.training import FitConfig, fit

    module = objective.module
    source = recommend.prefixes(train, module.max_length, side=module.alignment)
    data = Pipeline(source, options.recbole_batch, shuffle=True, repeat=True)
    with tempfile.TemporaryDirectory() as directory:
        config = FitConfig(steps=200, log_every=50, checkpoint_every=0)
        fit(NextOfPrefix(module=module), data, config, workdir=directory, label="prefixes")
        return logged_speed(directory)


def fit_ours(name: str, options: argparse.Namespace) -> dict[str, float]:
    from transfer_jax.configuration import load_config
    from transfer_jax.objectives.recommend import NextItem
    from transfer_jax.papers import bert4rec
    from transfer_jax.training import FitConfig, evaluate, fit, read_metrics
    from transfer_jax.training.config import from_dict

    config, split = load_config("bert4rec:ml100k"), split_log(options)
    objective = bert4rec.recommender(config, name, split.num_items)
    every = max(1, prefixes(split) // config.batch_size)
    with config.train.unlocked():
        config.train.update(
            {"steps": every * options.epochs, "eval_every": every, "log_every": every // 2,
             "checkpoint_every": every, "patience": 0}
        )  # fmt: skip
        config.train.optimizer.schedule = "linear"

    def data(part: str) -> Any:
        return bert4rec.evaluation_data(config, objective, split, part, seen=False)

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        fitted = fit(
            objective, bert4rec.training_data(config, objective, split.train, options.seed),
            from_dict(FitConfig, config.train, "train"),
            evaluate={"validation": data("validation")},
            workdir=directory, seed=options.seed, label=name,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        lines, speed = read_metrics(Path(directory) / "metrics.jsonl"), logged_speed(directory)
    if isinstance(objective, NextItem):  # which predicts at all places of its windows
        speed = prefix_speed(objective, split.train, options)
    found = evaluate(objective, fitted.variables, data("test"))
    began = time.perf_counter()
    evaluate(objective, fitted.variables, data("test"))
    return {
        "examples/s": speed,
        "users/s": len(split.evaluated()) / (time.perf_counter() - began),
        "validation NDCG@10": max(line.get("validation/ndcg@10", 0.0) for line in lines),
        "HR@10": found["hr@10"], "NDCG@10": found["ndcg@10"], "seconds": seconds,
    }  # fmt: skip


def fit_recbole(name: str, options: argparse.Namespace) -> dict[str, float]:
    # RecBole and what it imports ask for names that NumPy has given up.
    for old, new in {
        "bool8": np.bool_, "complex_": np.complex128, "float_": np.float64, "unicode_": np.str_,
    }.items():  # fmt: skip
        if not hasattr(np, old):
            setattr(np, old, new)
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    if options.threads:
        torch.set_num_threads(options.threads)
    split, model_name = split_log(options), RECBOLE[name]
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "log"
        folder.mkdir()
        with open(folder / "log.inter", "w") as file:
            file.write("user_id:token\titem_id:token\ttimestamp:float\n")
            for user, (known, last) in enumerate(zip(split.history("test"), split.test)):
                items = [*known, last] if last else known  # the order is the time
                file.writelines(f"{user}\t{item}\t{at}\n" for at, item in enumerate(items))
        settings = Config(
            model=model_name, dataset="log",
            config_dict={
                "data_path": directory, "checkpoint_dir": directory, "use_gpu": False,
                "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
                "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full",
                              "group_by": "user"},
                "train_neg_sample_args": None, "MAX_ITEM_LIST_LENGTH": 20, "state": "ERROR",
                "train_batch_size": options.recbole_batch, "epochs": options.epochs,
                "metrics": ["Hit", "NDCG"], "topk": [10], "valid_metric": "NDCG@10",
                "show_progress": False, "seed": options.seed,
            },
        )  # fmt: skip
        init_seed(options.seed, True)
        train, validation, test = data_preparation(settings, create_dataset(settings))
        examples = len(train.dataset)
        if examples != prefixes(split):
            raise RuntimeError(f"RecBole has {examples} examples, not {prefixes(split)}")
        model = get_model(model_name)(settings, train.dataset)
        trainer = get_trainer(settings["MODEL_TYPE"], model_name)(settings, model)
        best, kept, speeds = -1.0, {}, []
        began = time.perf_counter()
        for epoch in range(options.epochs):
            start = time.perf_counter()
            trainer._train_epoch(train, epoch, show_progress=False)
            speeds.append(examples / (time.perf_counter() - start))
            value = float(trainer.evaluate(validation, load_best_model=False)["ndcg@10"])
            done = f"RecBole {model_name}: epoch {epoch + 1}/{options.epochs}"
            print(done, f"{speeds[-1]:,.0f} examples/s", value, file=sys.stderr, flush=True)
            if value > best:
                best, kept = value, {k: v.clone() for k, v in model.state_dict().items()}
        seconds = time.perf_counter() - began
        model.load_state_dict(kept)
        start = time.perf_counter()
        found = trainer.evaluate(test, load_best_model=False)
        taken = time.perf_counter() - start
    return {
        "examples/s": float(np.median(speeds)), "users/s": len(split.evaluated()) / taken,
        "validation NDCG@10": best, "HR@10": float(found["hit@10"]),
        "NDCG@10": float(found["ndcg@10"]), "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SECTIONS)
    parser.add_argument("--items", type=int, default=3_416)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0, help="of every measurement")
    parser.add_argument("--log", default="generated", help="a log that needs no options")
    parser.add_argument("--models", default="bert4rec,sasrec_ce", help="beside RecBole's")
    parser.add_argument("--epochs", type=int, default=5, help="of RecBole")
    parser.add_argument("--recbole_batch", type=int, default=256, help="RecBole's own is 2048")
    parser.add_argument("--threads", type=int, default=0, help="of RecBole; 0 = torch's choice")
    parser.add_argument("--seed", type=int, default=0, help="of the training beside RecBole")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        section, _, peer = options.row.partition(":")
        if section == "million":
            print(json.dumps(million(options)))
        elif section == "recbole":
            library, _, name = peer.partition(":")
            run = {"transfer_jax": fit_ours, "recbole": fit_recbole}[library]
            print(json.dumps(run(name, options)))
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
        if section == "recbole":
            if importlib.util.find_spec("recbole") is None:
                print("recbole is not installed: pip install recbole 'setuptools<81'")
                continue
            for name in options.models.split(","):
                found = {lib: row(f"recbole:{lib}:{name}") for lib in ("transfer_jax", "recbole")}
                for what in SHOWN:
                    us, them = (values[what] for values in found.values())
                    print(f"{options.log}, {name}: {what}: {us:,.4g}; RecBole: {them:,.4g}; "
                          f"ratio {us / them:.2f}", flush=True)  # fmt: skip
            continue
        what = {"training": "examples", "ranking": "users"}[section]
        for peer in ("transfer_jax", "torch"):
            speed = row(f"{section}:{peer}")
            print(f"{section}, {options.items:,} items: {peer}: {speed:,.0f} {what}/s", flush=True)


if __name__ == "__main__":
    main()
