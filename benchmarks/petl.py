"""Training steps and generation beside PyTorch with transformers and peft, in one run.

    python benchmarks/petl.py [--layers=2] [--batch=8] [--length=128] [--only=training]

* A training step of a classifier with layers of BERT-base's shape: full fine-tuning, LoRA of rank 8
  at queries and values, MAM (prefixes of 16, bottlenecks of 16) and UniPT (384 wide, beside the
  network), each with AdamW. In PyTorch, LoRA and prefixes are those of peft; the adapters beside
  the feed-forward layers are written here. Beside UniPT, which peft has not, stands its LoRA.
* Greedy generation with a cache, of GPT-2's shape, beside ``generate`` of transformers.

Every row is a process of its own, whose peak memory beyond the imported libraries is printed: it
holds the parameters, moments, activations and, for JAX, the compiler. Times are medians after two
steps that warm up, without dropout, all in float32.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from meter import median, peak, resident, training_step

METHODS = ("full", "lora", "mam", "unipt")
VOCABULARY, CLASSES = 30_522, 2


def data(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (options.batch, options.length))
    return tokens, rng.integers(0, CLASSES, options.batch)


def ours_training(method: str, options: argparse.Namespace) -> dict[str, float]:
    import jax
    import optax

    from transfer_jax.models import Bert, BertConfig, bert_stack
    from transfer_jax.nn import petl
    from transfer_jax.nn.unipt import UniPT, unipt_config
    from transfer_jax.objectives import Adapted, Classification, Frozen, Variables, WarmStart
    from transfer_jax.papers.unipt import StatesClassifier

    before = resident()
    tokens, labels = data(options)
    stack = bert_stack(num_layers=options.layers, dropout=0.0, attention_dropout=0.0)
    module = Bert(
        BertConfig(
            vocab_size=VOCABULARY, stack=stack, head="classification", classifier_dropout=0.0
        )
    )  # fmt: skip
    task = Classification(module=module)
    batch = jax.device_put({"inputs": tokens.astype(np.int32), "labels": labels})
    methods = {
        "full": petl.full(), "lora": petl.lora(8, dropout=0.0), "mam": petl.mam(16, 16, scale=2.0)
    }  # fmt: skip
    params = jax.jit(task.init)(jax.random.key(0), batch).params
    start = WarmStart(inner=task, params=params)
    objective: Any
    if method == "unipt":
        reader = UniPT(unipt_config("clip_vil"))
        objective = Frozen(
            inner=Classification(module=StatesClassifier(CLASSES, reader, hidden=768)),
            variables=Variables(params, {}), module=module, method=_states,
        )  # fmt: skip
    else:
        train = None if method == "full" else "^(pooler|classifier)"
        objective = Adapted.of(start, params, methods[method], train=train)
    variables = jax.jit(lambda o, b: o.init(jax.random.key(0), b))(objective, batch)
    objective = objective.release()
    del params, start
    tx = optax.adamw(1e-4)
    result = training_step(objective, variables, tx, itertools.repeat(batch), options.budget)
    return {**result, "memory": peak() - before}


def _states(module: Any, inputs: Any) -> Any:
    return module.features(inputs, hidden_states=True)[1]


def theirs_training(method: str, options: argparse.Namespace) -> dict[str, float]:
    import peft
    import torch
    import transformers

    before = resident()
    tokens, labels = (torch.tensor(x) for x in data(options))
    config = transformers.BertConfig(
        num_hidden_layers=options.layers, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, num_labels=CLASSES,
    )  # fmt: skip
    model: Any = transformers.BertForSequenceClassification(config)
    if method in ("lora", "unipt"):
        settings = peft.LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])
        model = peft.get_peft_model(model, settings)
    if method == "mam":
        prefixes = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=16)
        model = peft.get_peft_model(model, prefixes)
        for layer in model.base_model.bert.encoder.layer:
            _add_adapter(layer.output, torch)
    if method != "full":
        for name, parameter in model.named_parameters():
            if "pooler" in name:
                parameter.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4)
    mask = torch.ones_like(tokens)
    model.train()

    def step() -> None:
        loss = torch.nn.functional.cross_entropy(model(tokens, attention_mask=mask).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    taken = median(step, options.budget)
    return {"seconds": taken, "memory": peak() - before}


def _add_adapter(output: Any, torch: Any) -> None:
    """``LN(y + FFN(y) + 2 a(y))`` in place of ``LN(y + FFN(y))``."""
    output.adapter = torch.nn.Sequential(
        torch.nn.Linear(768, 16), torch.nn.ReLU(), torch.nn.Linear(16, 768)
    )

    def forward(hidden: Any, read: Any) -> Any:
        return output.LayerNorm(output.dense(hidden) + read + 2.0 * output.adapter(read))

    output.forward = forward


def ours_generation(method: str, options: argparse.Namespace) -> dict[str, float]:
    del method
    import jax

    from transfer_jax.models import GPT2, Decoding, GPT2Config, generate_continuations, gpt2_stack

    before = resident()
    tokens = jax.device_put(data(options)[0][:, : options.prompt].astype(np.int32))
    module = GPT2(
        GPT2Config(vocab_size=50_257, stack=gpt2_stack(num_layers=options.layers), head="lm")
    )
    variables = jax.jit(module.init)(jax.random.key(0), tokens)
    decoding = Decoding(max_tokens=options.tokens)

    def run() -> None:
        generate_continuations(module, variables, tokens, decoding).tokens.block_until_ready()

    return {"seconds": median(run, options.budget), "memory": peak() - before}


def theirs_generation(method: str, options: argparse.Namespace) -> dict[str, float]:
    del method
    import torch
    import transformers

    before = resident()
    tokens = torch.tensor(data(options)[0][:, : options.prompt])
    config = transformers.GPT2Config(n_layer=options.layers, eos_token_id=None, pad_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    mask = torch.ones_like(tokens)

    def run() -> None:
        with torch.no_grad():
            model.generate(
                tokens, attention_mask=mask, do_sample=False, use_cache=True,
                max_new_tokens=options.tokens, min_new_tokens=options.tokens,
            )  # fmt: skip

    return {"seconds": median(run, options.budget), "memory": peak() - before}


ROWS: dict[str, Callable[[str, argparse.Namespace], dict[str, float]]] = {
    "ours-training": ours_training, "theirs-training": theirs_training,
    "ours-generation": ours_generation, "theirs-generation": theirs_generation,
}  # fmt: skip


def measure(row: str, method: str) -> dict[str, float]:
    """Runs one row in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], f"--row={row}", f"--method={method}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def show(
    name: str, ours: dict[str, float], theirs: dict[str, float], per: float, unit: str
) -> None:
    """One line: both, and how many times faster and smaller ours is."""

    def number(result: dict[str, float]) -> float:
        return per / result["seconds"] if unit == "tokens/s" else per * result["seconds"]

    print(
        f"  {name:12}{number(ours):12.1f}{number(theirs):12.1f}"
        f"{theirs['seconds'] / ours['seconds']:10.2f} x"
        f"{ours['memory']:12.0f}{theirs['memory']:12.0f}"
        + (f"{ours['temporaries']:14.0f}" if "temporaries" in ours else ""),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds of each measurement")
    parser.add_argument("--only", choices=("training", "generation"))
    parser.add_argument("--row", choices=tuple(ROWS), help=argparse.SUPPRESS)
    parser.add_argument("--method", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(ROWS[options.row](options.method, options)))
        return
    size = f"{options.layers} layers of 768, batch {options.batch}"
    head = f"{'ours':>12}{'theirs':>12}{'ratio':>12}{'MiB ours':>12}{'MiB theirs':>12}"
    if options.only != "generation":
        print(f"\nTraining step, ms; {size} x {options.length} tokens")
        print(f"  {'':12}{head}{'XLA temporaries':>18}")
        for method in METHODS:
            ours, theirs = (measure(f"{who}-training", method) for who in ("ours", "theirs"))
            show(method, ours, theirs, 1e3, "ms")
    if options.only != "training":
        print(f"\nGreedy generation with a cache, tokens/s; {size}, {options.tokens} new tokens")
        print(f"  {'':12}{head}")
        ours, theirs = (measure(f"{who}-generation", "greedy") for who in ("ours", "theirs"))
        show("greedy", ours, theirs, options.batch * options.tokens, "tokens/s")


if __name__ == "__main__":
    main()
