"""Runs an experiment on this machine, in one process or several, or a sweep of experiments.

    python -m launch.local --config=configs/s4.py:listops --workdir=runs/s4 \\
        --config.optimizer.learning_rate=1e-3

``--processes=N`` runs N processes as one job, as a cluster would; ``--devices=8`` gives each of
them 8 virtual CPU devices. ``--sweep=FILE`` runs a list of overrides, see ``launch/sweep.py``. See
``--help``.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch import common, sweep
from transfer_jax import cli

_PROGRAM = ["python", "-m", "launch.local"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``python -m launch.local`` and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog=" ".join(_PROGRAM),
        description="Runs the experiment of a config on this machine, or resumes it.",
        epilog=cli.OVERRIDES_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE[:VARIANT]", help="config file, or a config's name"
    )
    cli.add_run_options(parser)
    parser.add_argument(
        "--sweep", metavar="FILE",
        help="run every entry of get_sweep() in this Python file, each in a directory of its own "
        "below --workdir",
    )  # fmt: skip
    parser.add_argument(
        "--parallel", type=common.positive, default=1, metavar="N",
        help="so many runs of the sweep at a time; on GPU machines each gets its share of the GPUs",
    )  # fmt: skip
    arguments, overrides = cli.split_overrides(parser, list(sys.argv[1:] if argv is None else argv))
    options = parser.parse_args(arguments)
    if options.sweep is None:
        return cli.run_experiment(options, overrides, _PROGRAM)
    if options.processes > 1 or options.distributed:
        parser.error("--sweep runs one process per entry: leave out --processes and --distributed")
    return common.guarded(lambda: _sweep(options, overrides))


def _sweep(options: argparse.Namespace, overrides: list[str]) -> int:
    workdir = None if options.workdir is None else str(options.workdir)
    entries = sweep.load(options.sweep, options.config, workdir, overrides)
    cli.set_platform(options.platform, options.devices)
    gpus = cli.gpus_per_process(options.parallel) if options.parallel > 1 else None
    flags = [f"--platform={options.platform}"] if options.platform else []
    flags += [f"--devices={options.devices}"] if options.devices else []
    flags += ["--debug"] if options.debug else []
    if options.dry_run:
        for entry in entries:
            print(common.quote(entry.job.command("python", *flags)))
        print(f"dry run: {len(entries)} runs, {options.parallel} at a time; nothing was started")
        return common.OK
    typed = [*_PROGRAM, f"--config={options.config}", f"--sweep={options.sweep}"]
    typed += [f"--workdir={workdir}"] if workdir else []
    typed += [f"--parallel={options.parallel}"] if options.parallel > 1 else []
    typed += [*flags, *(f"--config.{override}" for override in overrides)]
    flags.append(f"--launched_by={common.quote(typed)}")
    return _run_all(entries, flags, options.parallel, gpus)


def _run_all(
    entries: list[sweep.Entry], flags: list[str], parallel: int, gpus: list[str] | None
) -> int:
    """Runs every entry; SIGTERM and Ctrl-C are passed on, and then no further one is started."""
    signals: list[int] = []
    previous = {
        number: signal.signal(number, lambda n, _frame: signals.append(n))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    waiting = list(enumerate(entries))
    running: dict[int, tuple[int, subprocess.Popen[bytes]]] = {}  # slot -> entry, process
    codes: dict[int, int] = {}
    passed_on = 0
    try:
        while running or (waiting and not signals):
            for slot in range(parallel):
                if slot not in running and waiting and not signals:
                    index, entry = waiting.pop(0)
                    common.say(f"[{index + 1}/{len(entries)}] {entry.name}: started")
                    running[slot] = (index, _start(entry, flags, gpus[slot] if gpus else None))
            if len(signals) > passed_on:
                passed_on = len(signals)
                common.say("asked to stop: runs save a checkpoint and end; once more kills them")
                for _, process in running.values():
                    process.send_signal(signal.SIGTERM if passed_on == 1 else signal.SIGKILL)
            for slot, (index, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    codes[index] = process.returncode
                    common.say(
                        f"[{index + 1}/{len(entries)}] {_ended(entries[index], codes[index])}"
                    )
            time.sleep(0.05)
    finally:
        for _, process in running.values():
            process.kill()
            process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)

    # A run that was stopped before it had begun to listen has nothing to save.
    stopped = (common.PREEMPTED, *([-signal.SIGTERM] if signals else []))
    failed = [i for i, code in codes.items() if code != common.OK and code not in stopped]
    parent = entries[0].job.workdir.rpartition("/")[0]
    done = list(codes.values()).count(common.OK)
    common.say(
        f"{done} of {len(entries)} runs are done. To compare them: "
        f"{common.quote(['transfer-jax', 'compare', parent])}"
    )
    if failed:
        return common.FAILED
    return common.PREEMPTED if done < len(entries) else common.OK


def _start(entry: sweep.Entry, flags: list[str], gpus: str | None) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus
    log = _log(entry)
    log.parent.mkdir(parents=True, exist_ok=True)
    # A session of its own: Ctrl-C in the terminal reaches the run through us alone. The end of its
    # input, which we never write to, tells it that we are gone.
    with log.open("ab") as f:
        return subprocess.Popen(
            entry.job.command(sys.executable, *flags), env=environment, start_new_session=True,
            stdin=subprocess.PIPE, stdout=f, stderr=subprocess.STDOUT,
        )  # fmt: skip


def _log(entry: sweep.Entry) -> Path:
    """Where a run's output goes: into its directory, or here if that is in an object store."""
    if "://" in entry.job.workdir:
        return Path("runs", "logs", f"{entry.name}.txt")
    return Path(entry.job.workdir, "log.txt")


def _ended(entry: sweep.Entry, code: int) -> str:
    if code == common.OK:
        return f"{entry.name}: done"
    if code == common.PREEMPTED:
        return f"{entry.name}: stopped with a checkpoint saved"
    how = f"killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
    last = _log(entry).read_text(errors="replace").splitlines()[-5:]
    return "\n  ".join([f"{entry.name}: {how}; the last lines of {_log(entry)}:", *last])


if __name__ == "__main__":
    sys.exit(main())
