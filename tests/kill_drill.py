"""Kills a run at random moments and restarts it until it is done: is the result the same?

    python -m tests.kill_drill --count 20

The run has two stages and an artifact and saves a checkpoint after every step, so that many kills
fall into the writing of one. After each kill what was finished must still be there; in the end the
metric lines, the results and the bits of the parameters must be those of a run that nobody killed.
Every run is a process of its own, forked from one that has imported all and computed nothing.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path

import jax

# Imported at their first use elsewhere, here once for all runs.
import matplotlib.backends.backend_agg  # noqa: F401
import numpy as np
import orbax.checkpoint  # noqa: F401
import tensorboardX  # noqa: F401

from tests import toy
from transfer_jax.objectives import WarmStart
from transfer_jax.training import Experiment, base_config, fit_config

STAGES = ("source", "target")


def recipe(exp):
    task, settings = toy.classifier(), exp.config.fit
    evaluate = {"validation": toy.eval_data()}
    source = exp.fit("source", task, toy.train_data(), settings, evaluate=evaluate)
    anchor = exp.artifact("anchor", lambda: source.params)
    start = WarmStart(inner=task, params=anchor)
    target = exp.fit("target", start, toy.train_data(seed=3), settings, evaluate=evaluate)
    for name, leaf in zip("abcd", jax.tree.leaves(target.params)):
        exp.record(f"bits of {name}", zlib.crc32(np.asarray(leaf).tobytes()))
    exp.record("accuracy", target.metrics["validation/accuracy"])
    exp.record("done", "yes")


def start(workdir, steps):
    """Forks a process that runs the recipe; its output goes to ``WORKDIR.log``."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(f"{workdir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        config = base_config("tests.kill_drill:recipe")
        config.fit = fit_config(steps=steps, log_every=1, eval_every=4, checkpoint_every=1, keep=3)
        Experiment(config, workdir).run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(workdir, steps):
    """Runs it to its end."""
    _, status = os.waitpid(start(workdir, steps), 0)
    if status:
        raise SystemExit(f"the run has failed:\n{Path(f'{workdir}.log').read_text()}")


def lines(workdir):
    """How many metric lines there are: how far the run is."""
    return sum(p.read_bytes().count(b"\n") for p in workdir.glob("stages/*/metrics.jsonl"))


def kill(child, workdir, steps, choose):
    """Kills the run between here and its end, somewhere; returns whether it was still running.

    Somewhere: some metric lines further on, and up to a tenth of a second after that.
    """
    whole = 2 * (steps + steps // 4)  # metric lines
    wanted = lines(workdir) + choose.randrange(whole)
    while lines(workdir) < wanted:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    time.sleep(choose.uniform(0.0, 0.1))
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def facts(workdir):
    """Everything that has to come out the same: results and metric lines, but for the clock."""
    lines = {}
    for stage in STAGES:
        text = (workdir / "stages" / stage / "metrics.jsonl").read_text()
        records = [json.loads(line) for line in text.splitlines()]
        lines[stage] = [{k: v for k, v in r.items() if not k.startswith("time/")} for r in records]
    return json.loads((workdir / "results.json").read_text()), lines


def kept(workdir):
    """What must outlive a kill: finished stages, and the newest checkpoint of the others."""
    found = {p.parent.name: "finished" for p in workdir.glob("stages/*/summary.json")}
    for directory in workdir.glob("stages/*/checkpoints"):
        steps = [int(p.name) for p in directory.iterdir() if p.name.isdigit()]
        found.setdefault(directory.parent.name, max(steps, default=0))
    return found


def drill(count, seed, steps, directory):
    """Kills ``count`` runs; returns how many of them wrote a checkpoint when they were killed."""
    choose = random.Random(seed)
    # What is compiled in the first run is read in the others.
    jax.config.update("jax_compilation_cache_dir", str(directory / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    reference = directory / "reference"
    finish(reference, steps)
    expected = facts(reference)
    killed = writing = whole = 0
    while killed < count:
        workdir = directory / f"run{whole}"
        while killed < count:
            before = kept(workdir)
            if not kill(start(workdir, steps), workdir, steps, choose):
                break  # it was faster
            killed += 1
            after = kept(workdir)
            assert all(after[name] == "finished" or after[name] >= step  # nothing is lost
                       for name, step in before.items() if step != "finished")  # fmt: skip
            assert {n for n, s in before.items() if s == "finished"} <= {
                n for n, s in after.items() if s == "finished"
            }
            halves = list(workdir.glob("stages/*/checkpoints/*.orbax-checkpoint-tmp*"))
            writing += bool(halves)
            print(f"kill {killed}: {after}{' while writing' if halves else ''}", flush=True)
        finish(workdir, steps)
        whole += 1
        assert kept(workdir) == dict.fromkeys(STAGES, "finished")
        assert facts(workdir) == expected, f"another result in {workdir}"
        assert "cannot be read" not in Path(f"{workdir}.log").read_text()
    print(
        f"{killed} kills, {writing} of them while a checkpoint was being written; {whole} runs "
        "completed, all with the metric lines and parameters of the run that was not killed"
    )
    return writing


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    parser.add_argument("--steps", type=int, default=12, help="of each of the two stages")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        drill(options.count, options.seed, options.steps, Path(directory))


if __name__ == "__main__":
    sys.exit(main())
