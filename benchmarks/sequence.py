"""Training steps of sequence models beside PyTorch, in one run.

    python benchmarks/sequence.py [--only=lstm|icl|ttm] [--budget=4]

* ``lstm``: one layer of 256 cells over 100 steps of 64 sequences, with a squared error and SGD,
  beside ``torch.nn.LSTM``, ``GRU`` and ``RNN``; on a GPU where JAX and PyTorch see one.
* ``icl``: in-context learning of ReLU windows (d = 20, 20 points, batch 64, prompts drawn anew in
  every step on both sides), with a tiny and a small GPT-2, beside ``GPT2Model`` of transformers.
* ``ttm``: forecasts of 64 windows (512 steps to 96), no training: TTM-B beside ``granite-tsfm``
  where it is installed, and a flat mixer of the same width (8 layers, no levels, no decoder) beside
  ``PatchTSMixerForPrediction`` of transformers.

Every row is a process of its own, whose peak memory beyond the imported libraries is printed: it
holds the parameters, moments, activations and, for JAX, the compiler. Times are medians after two
steps that warm up, without dropout, all in float32.
"""

import argparse
import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from meter import median, peak, resident, training_step

LSTM_CELLS = {"lstm": "LSTM", "gru": "GRU", "elman": "RNN"}
LSTM_BATCH, LSTM_LENGTH, LSTM_WIDTH = 64, 100, 256


def lstm_data() -> np.ndarray:
    """Inputs and targets, [2, B, L, H]."""
    shape = (2, LSTM_BATCH, LSTM_LENGTH, LSTM_WIDTH)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def ours_lstm(cell: str, options: argparse.Namespace) -> dict[str, float]:
    import jax

    from transfer_jax.nn.recurrent import CELLS

    before = resident()
    module = CELLS[cell](LSTM_WIDTH)
    x, y = jax.device_put(lstm_data())
    params = jax.jit(module.init)(jax.random.key(0), x)

    def update(params, x, y):
        def loss(params):
            return ((module.apply(params, x) - y) ** 2).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), value

    compiled = jax.jit(update, donate_argnums=0).lower(params, x, y).compile()

    def step() -> None:
        nonlocal params
        params, value = compiled(params, x, y)
        value.block_until_ready()

    taken = median(step, options.budget)
    temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return {"seconds": taken, "memory": peak() - before, "temporaries": temporaries}


def theirs_lstm(cell: str, options: argparse.Namespace) -> dict[str, float]:
    import torch

    before = resident()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = torch.tensor(lstm_data(), device=device)
    module = getattr(torch.nn, LSTM_CELLS[cell])(LSTM_WIDTH, LSTM_WIDTH, batch_first=True)
    module = module.to(device)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)

    def step() -> None:
        loss = ((module(x)[0] - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device

    taken = median(step, options.budget)
    return {"seconds": taken, "memory": peak() - before}


ICL_SIZES = {"tiny": (3, 2, 64), "small": (6, 4, 128)}
ICL_DIMS, ICL_POINTS, ICL_HIDDEN, ICL_BATCH = 20, 20, 100, 64


def ours_icl(size: str, options: argparse.Namespace) -> dict[str, float]:
    """Steps of ``configs/icl_functions.py:seq_relu_2nn`` with a smaller model."""
    import jax
    import optax

    from transfer_jax.configuration import get_config
    from transfer_jax.papers.icl_functions import plan

    before = resident()
    config = get_config("icl_functions:seq_relu_2nn")
    config.model.update(size=size, scan=False)
    objective, shapes, _ = plan(config)
    assert shapes["index"].shape == (ICL_BATCH,)
    numbers = np.arange(ICL_BATCH, dtype=np.int32)
    variables = jax.jit(lambda o, b: o.init(jax.random.key(0), b))(objective, {"index": numbers})
    tx = optax.adamw(1e-4, weight_decay=0.01)
    batches = ({"index": numbers + i * ICL_BATCH} for i in itertools.count())
    result = training_step(objective, variables, tx, batches, options.budget)
    return {**result, "memory": peak() - before}


def theirs_icl(size: str, options: argparse.Namespace) -> dict[str, float]:
    """The same prompts and the same model: ``GPT2Model`` on embedded vectors."""
    import torch
    import transformers

    before = resident()
    layers, heads, width = ICL_SIZES[size]
    d, n, h = ICL_DIMS, ICL_POINTS, ICL_HIDDEN
    config = transformers.GPT2Config(
        vocab_size=1, n_positions=2 * n, n_layer=layers, n_head=heads, n_embd=width,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    gpt2 = transformers.GPT2Model(config)
    read_in, read_out = torch.nn.Linear(d, width), torch.nn.Linear(width, d)
    parameters = [p for m in (gpt2, read_in, read_out) for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-4, weight_decay=0.01)

    @torch.no_grad()
    def prompts() -> tuple[Any, Any]:
        """One function for the batch, at both places of a window of two, as in the paper's code."""
        first, second = torch.randn(d, h), torch.randn(h, d)

        def f(x: Any) -> Any:
            return (2 / h) ** 0.5 * torch.relu(x @ first) @ second

        xs = [torch.randn(ICL_BATCH, d)]
        for t in range(n):
            s = f(xs[t]) if t == 0 else f(xs[t]) + f(xs[t - 1])
            xs.append(s / s.norm(dim=-1, keepdim=True))
        return torch.stack(xs[:-1], 1), torch.stack(xs[1:], 1)

    def step() -> None:
        xs, ys = prompts()
        inputs = torch.stack([xs, ys], 2).reshape(ICL_BATCH, 2 * n, d)
        hidden = gpt2(inputs_embeds=read_in(inputs)).last_hidden_state
        loss = (read_out(hidden[:, 0::2]) - ys).norm(dim=-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    taken = median(step, options.budget)
    return {"seconds": taken, "memory": peak() - before}


TTM_BATCH = 64
TTM_FLAT: dict[str, Any] = {
    "adaptive_patching_levels": 0, "num_layers": 8, "use_decoder": False
}  # fmt: skip


def ttm_windows() -> np.ndarray:
    windows = np.random.default_rng(0).normal(size=(TTM_BATCH, 512, 1)).cumsum(1)
    return windows.astype(np.float32)


def ours_ttm(kind: str, options: argparse.Namespace) -> dict[str, float]:
    import jax

    from transfer_jax.models.ttm import TTM, ttm_b

    before = resident()
    module, x = TTM(ttm_b(**TTM_FLAT) if kind == "flat" else ttm_b()), ttm_windows()
    params = jax.jit(module.init)(jax.random.key(0), x)
    run = jax.jit(module.apply)
    taken = median(lambda: run(params, x).block_until_ready(), options.budget)
    return {"seconds": taken, "memory": peak() - before}


def theirs_ttm(kind: str, options: argparse.Namespace) -> dict[str, float]:
    import torch
    import transformers

    before = resident()
    sizes: dict[str, Any] = {
        "context_length": 512, "prediction_length": 96, "patch_length": 64, "patch_stride": 64,
        "num_input_channels": 1, "d_model": 192, "scaling": "std",
    }  # fmt: skip
    if kind == "flat":
        config = transformers.PatchTSMixerConfig(num_layers=TTM_FLAT["num_layers"], **sizes)
        model = transformers.PatchTSMixerForPrediction(config).eval()
    else:
        from tsfm_public.models import tinytimemixer as granite

        config = granite.TinyTimeMixerConfig(
            num_layers=2, adaptive_patching_levels=3, decoder_num_layers=2, decoder_d_model=128,
            **sizes,
        )  # fmt: skip
        model = granite.TinyTimeMixerForPrediction(config).eval()
    x = torch.tensor(ttm_windows())
    with torch.inference_mode():
        taken = median(lambda: model(x), options.budget)
    return {"seconds": taken, "memory": peak() - before}


ROWS: dict[str, Callable[[str, argparse.Namespace], dict[str, float]]] = {
    "ours-lstm": ours_lstm, "theirs-lstm": theirs_lstm, "ours-icl": ours_icl,
    "theirs-icl": theirs_icl, "ours-ttm": ours_ttm, "theirs-ttm": theirs_ttm,
}  # fmt: skip


def measure(row: str, what: str) -> dict[str, float]:
    """Runs one row in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], f"--row={row}", f"--what={what}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def compare(title: str, row: str, kinds: Iterable[str], shown: Callable[[float], str]) -> None:
    """Prints ours beside theirs.

    Args:
      title: of the table.
      row: without ``ours-`` and ``theirs-``.
      kinds: what to measure.
      shown: a number of seconds, as the table has it.
    """
    print(f"\n{title}")
    columns = ("ours", "theirs", "ratio", "MiB ours", "MiB theirs", "XLA temporaries")
    print(f"  {'':8}" + "".join(f"{name:>{max(10, len(name) + 2)}}" for name in columns))
    for kind in kinds:
        ours, theirs = (measure(f"{who}-{row}", kind) for who in ("ours", "theirs"))
        ratio = theirs["seconds"] / ours["seconds"]
        temporaries = f"{ours['temporaries']:17.0f}" if "temporaries" in ours else ""
        print(
            f"  {kind:8}{shown(ours['seconds']):>10}{shown(theirs['seconds']):>10}{ratio:9.2f}x"
            f"{ours['memory']:10.0f}{theirs['memory']:12.0f}{temporaries}",
            flush=True,
        )


def lstm() -> None:
    """Training steps of one recurrent layer."""
    size = f"{LSTM_BATCH} x {LSTM_LENGTH} steps, {LSTM_WIDTH} cells"
    title = f"One recurrent layer, a training step in ms; {size}"
    compare(title, "lstm", LSTM_CELLS, lambda seconds: f"{1e3 * seconds:.1f}")


def icl() -> None:
    """Training steps per second of in-context learners."""
    size = f"{ICL_POINTS} points, d = {ICL_DIMS}, batch {ICL_BATCH}"
    title = f"In-context learning, steps/s; {size}"
    compare(title, "icl", ICL_SIZES, lambda seconds: f"{1 / seconds:.1f}")


def ttm() -> None:
    """Forecasts per second of Tiny Time Mixers."""
    title = f"Tiny Time Mixers, windows/s; 512 steps to 96, batch {TTM_BATCH}"
    kinds = ["flat"]
    if importlib.util.find_spec("tsfm_public") is None:
        title += " (granite-tsfm is not installed)"
    else:
        kinds.append("ttm-b")
    compare(title, "ttm", kinds, lambda seconds: f"{TTM_BATCH / seconds:.0f}")


SECTIONS = {"lstm": lstm, "icl": icl, "ttm": ttm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--budget", type=float, default=4.0, help="seconds of each measurement")
    parser.add_argument("--only", choices=tuple(SECTIONS))
    parser.add_argument("--row", choices=tuple(ROWS), help=argparse.SUPPRESS)
    parser.add_argument("--what", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(ROWS[options.row](options.what, options)))
        return
    for name, section in SECTIONS.items():
        if options.only in (None, name):
            section()


if __name__ == "__main__":
    main()
