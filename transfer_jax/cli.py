"""The command line: ``transfer-jax list | run | report | compare | merge | recommend |
forecast``.

``launch/local.py`` shares the options of ``run``.

Exit codes: 0 done; 1 failed; 2 the command line is wrong; 75 stopped by SIGTERM or Ctrl-C after a
checkpoint was saved, so that the same command resumes.
"""

import argparse
import collections
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import transfer_jax
from transfer_jax import configuration
from transfer_jax.configuration import ConfigError
from transfer_jax.training.files import as_path
from transfer_jax.training.host import keep_memory

OK, FAILED, USAGE, PREEMPTED = 0, 1, 2, 75

_LEAVE_AFTER = 1.0  # seconds between the error of a process of a job of several and its end
_KILL_AFTER = 10.0  # seconds that processes are given once another one of the job has failed

OVERRIDES_HELP = """\
Any value of the config can be replaced:
  --config.optimizer.learning_rate=1e-3 --config.model.widths=64,64
A misspelt key or a value of the wrong type is refused before anything is computed.

A job that was stopped or killed resumes with the same command.
Exit codes: 0 done, 1 failed, 2 wrong command line, 75 stopped with a checkpoint saved.
"""

_MERGE_HELP = """\
A checkpoint is a safetensors file, or a directory with model.safetensors or with shards and
model.safetensors.index.json. Methods and their options: docs/merge.md.

  transfer-jax merge --method ties --base A --models B C --option density=0.3 --out D
  transfer-jax merge --recipe recipe.yaml --out D

OUT appears when the merge is complete; a merge that was killed is run again.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``transfer-jax`` and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="transfer-jax", description="Sequence modelling and knowledge transfer in JAX."
    )
    parser.add_argument("--version", action="version", version=transfer_jax.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    listing = commands.add_parser(
        "list", help="list configs and their variants", description="Lists configs and variants."
    )
    listing.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    run = commands.add_parser(
        "run",
        help="run an experiment, or resume it",
        description="Runs the experiment of a config, or resumes it.",
        epilog=OVERRIDES_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    run.add_argument("config", metavar="NAME[:VARIANT]", help="see 'list'; or path/to/config.py")
    add_run_options(run)
    report = commands.add_parser(
        "report", help="write the report of a run", description="Writes WORKDIR/report/report.md."
    )
    report.add_argument("workdir", metavar="WORKDIR", type=_directory)
    report.add_argument("--debug", action="store_true", help="show tracebacks of all errors")
    compare = commands.add_parser(
        "compare",
        help="compare finished runs",
        description="Prints a table over finished work directories, with the settings in which "
        "they differ and the results that they share; --out writes it with plots.",
        allow_abbrev=False,
    )
    compare.add_argument(
        "workdirs", metavar="DIR", nargs="+", type=_directory,
        help="a work directory, or a directory of work directories, such as that of a sweep",
    )  # fmt: skip
    compare.add_argument(
        "--out", metavar="DIR", type=Path, help="write compare.md, compare.csv and plots there"
    )
    compare.add_argument(
        "--metrics", metavar="REGEX", default="", help="only results in whose name this is found"
    )
    compare.add_argument("--debug", action="store_true", help="show tracebacks of all errors")
    merge = commands.add_parser(
        "merge",
        help="merge checkpoints",
        description="Merges checkpoints in safetensors files, tensor by tensor.",
        epilog=_MERGE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_merge_options(merge)
    recommend = commands.add_parser(
        "recommend",
        help="recommend items with a trained model",
        description="Writes the best items of every user of a file of interactions, by a model of "
        "a finished run of a recommender such as bert4rec. See docs/recommend.md.",
        allow_abbrev=False,
    )
    _add_recommend_options(recommend)
    forecast = commands.add_parser(
        "forecast",
        help="forecast the columns of a CSV file",
        description="Forecasts the columns of a CSV file with a trained Tiny Time Mixer; writes a "
        "CSV file and a plot. See docs/forecast.md.",
        allow_abbrev=False,
    )
    _add_forecast_options(forecast)

    arguments, overrides = split_overrides(parser, arguments)
    options = parser.parse_args(arguments)
    if options.command == "list":
        return _guarded(options.debug, _list)
    if options.command == "report":
        return _guarded(options.debug, lambda: _report(options.workdir))
    if options.command == "compare":
        return _guarded(options.debug, lambda: _compare(options))
    if options.command == "merge":
        return _merge(options)
    if options.command == "recommend":
        return _recommend(options)
    if options.command == "forecast":
        return _forecast(options)
    return run_experiment(options, overrides, ["transfer-jax", "run"])


def _directory(text: str) -> Path:
    try:
        return as_path(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``run``, which ``launch.local`` shares."""

    def positive(text: str) -> int:
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f"{value} is less than 1")
        return value

    parser.add_argument(
        "--workdir", type=_directory, help="local, gs://… or s3://…; default: runs/NAME-VARIANT"
    )
    parser.add_argument(
        "--processes", type=positive, default=1, metavar="N",
        help="run N processes on this machine, one job together; on GPU machines each gets its "
        "share of the GPUs",
    )  # fmt: skip
    parser.add_argument("--platform", choices=["cpu", "gpu", "tpu"], help="default: what JAX finds")
    parser.add_argument(
        "--devices", type=positive, metavar="N", help="N virtual CPU devices in each process"
    )
    parser.add_argument(
        "--distributed", action="store_true",
        help="join the processes that a TPU pod, Slurm, Open MPI or GKE has started, as JAX "
        "detects them",
    )  # fmt: skip
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT",
        help="where process 0 listens; default: as detected, or a free port of this machine",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=positive, default=300, metavar="SECONDS",
        help="how long processes wait for each other at the start; default: 300",
    )  # fmt: skip
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true",
        help="print the resolved config, work directory and processes, and compute nothing",
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show tracebacks of all errors")
    # Set for the processes of --processes: the command that the user typed.
    parser.add_argument("--launched_by", help=argparse.SUPPRESS)


def _add_merge_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="a new directory")
    parser.add_argument("--method", help="soup, task_arithmetic, ties, dare_linear, slerp, …")
    parser.add_argument("--base", metavar="PATH", help="what the models were fine-tuned from")
    parser.add_argument("--models", metavar="PATH", nargs="+", help="one or more models")
    parser.add_argument("--weights", metavar="W", nargs="+", type=float, help="one per model")
    parser.add_argument(
        "--option", metavar="KEY=VALUE", nargs="+", action="extend",
        help="options of the method, such as density=0.3 scope=leaf",
    )  # fmt: skip
    parser.add_argument(
        "--fisher", metavar="PATH", nargs="+", help="Fisher diagonals, one file per model"
    )
    parser.add_argument("--dtype", help="of the result; default: that of the base")
    parser.add_argument("--seed", type=int, help="of random methods; default: 0")
    parser.add_argument(
        "--missing", choices=["error", "base", "skip"],
        help="what becomes of a tensor that some input lacks or has in another shape; default: "
        "error",
    )  # fmt: skip
    parser.add_argument("--recipe", metavar="FILE", help="all of these, except --out, in YAML")
    parser.add_argument(
        "--max_shard_size", "--max-shard-size", default="5GB", metavar="SIZE", help="default: 5GB"
    )
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="print the plan, and compute nothing"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of all errors")


def _add_recommend_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workdir", metavar="WORKDIR", type=_directory, help="of a finished run")
    parser.add_argument(
        "--interactions", required=True, metavar="FILE", type=Path,
        help="CSV or TSV with a header, also .gz: who used what, and when",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="FILE", type=Path, help="CSV to write")
    parser.add_argument("--k", type=int, default=10, help="items per user; default: 10")
    parser.add_argument("--model", help="which of the run's models; default: the first")
    parser.add_argument("--user", default="user_id", help="column; default: user_id")
    parser.add_argument("--item", default="item_id", help="column; default: item_id")
    parser.add_argument(
        "--time", default="timestamp",
        help="column of numbers; '' if rows are in order of time; default: timestamp",
    )  # fmt: skip
    parser.add_argument(
        "--keep_seen", "--keep-seen", action="store_true", help="recommend known items as well"
    )
    parser.add_argument(
        "--batch_size", "--batch-size", type=int, default=256, help="users at a time; default: 256"
    )
    parser.add_argument(
        "--shards", type=int, default=1, metavar="N",
        help="devices over which the item table is split; default: 1",
    )  # fmt: skip
    parser.add_argument("--platform", choices=["cpu", "gpu", "tpu"], help="default: what JAX finds")
    parser.add_argument("--devices", type=int, metavar="N", help="N virtual CPU devices")
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true",
        help="read the files, print what would be done, and compute nothing",
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show tracebacks of all errors")


def _add_forecast_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="CSV", type=Path, help="a header, timestamps and numbers")
    parser.add_argument(
        "--model", required=True, metavar="DIR", type=Path,
        help="a work directory of 'ttm', or a granite-tsfm directory",
    )  # fmt: skip
    parser.add_argument(
        "--out", default="forecast.csv", metavar="CSV", type=Path,
        help="default: forecast.csv; the plot has the same name with .png",
    )  # fmt: skip
    parser.add_argument("--horizon", type=int, default=0, help="steps; default: the network's")
    parser.add_argument("--columns", nargs="+", metavar="NAME", help="default: all but the time")
    parser.add_argument(
        "--time_column", "--time-column", default="", metavar="NAME",
        help="default: date, timestamp, time, datetime or ds",
    )  # fmt: skip
    parser.add_argument(
        "--stage", default="pretrain", help="of a work directory; default: pretrain"
    )
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="print the plan, and compute nothing"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of all errors")


def split_overrides(
    parser: argparse.ArgumentParser, arguments: list[str]
) -> tuple[list[str], list[str]]:
    """Takes ``--config.key=value`` and ``--config.key value`` out of the arguments."""
    rest, overrides = [], []
    prefix = "--config."
    position = iter(arguments)
    for argument in position:
        if not argument.startswith(prefix):
            rest.append(argument)
            continue
        override = argument.removeprefix(prefix)
        if "=" not in override:
            value = next(position, None)
            if value is None or value.startswith("--"):
                parser.error(f"{argument} has no value: write {argument}=VALUE")
            override = f"{override}={value}"
        overrides.append(override)
    return rest, overrides


# -- run ------------------------------------------------------------------------------------------


def run_experiment(options: argparse.Namespace, overrides: list[str], program: list[str]) -> int:
    """Runs what the parsed command line says and returns the exit code.

    Args:
      options: of a parser with ``add_run_options`` and ``config``.
      overrides: ``key=value``.
      program: how the command began, for the message that says how to resume.
    """
    if options.devices and options.platform not in (None, "cpu"):
        _error("--devices makes virtual CPU devices; it goes with --platform=cpu only.")
        return USAGE
    if options.processes > 1 and options.distributed:
        _error("--processes starts processes itself, --distributed joins those of a cluster.")
        return USAGE
    set_platform(options.platform, options.devices)

    resolved: list[Any] = []

    def resolve() -> int:
        spec = configuration.find_config(options.config)
        if spec.path.parent != configuration.config_directory():
            sys.path.insert(0, str(spec.path.parent.absolute()))  # its recipe may lie beside it
        config = configuration.apply_overrides(configuration.load_config(options.config), overrides)
        workdir = options.workdir or Path("runs", "-".join(filter(None, spec[1:])))
        gpus = gpus_per_process(options.processes) if options.processes > 1 else None
        resolved.extend([config, workdir, gpus])
        return OK

    code = _guarded(options.debug, resolve, failed=USAGE)
    if code != OK:
        return code
    config, workdir, gpus = resolved

    arguments = [f"--workdir={workdir}", *(f"--config.{o}" for o in overrides)]
    arguments += [f"--platform={options.platform}"] if options.platform else []
    arguments += [f"--devices={options.devices}"] if options.devices else []
    arguments += ["--debug"] if options.debug else []
    if program[0] == "transfer-jax":
        command = [*program, options.config, *arguments]
    else:
        command = [*program, f"--config={options.config}", *arguments]
    command += [f"--processes={options.processes}"] if options.processes > 1 else []
    command += ["--distributed"] if options.distributed else []
    command += [f"--coordinator={options.coordinator}"] if options.coordinator else []
    command += [f"--timeout={options.timeout}"] if options.timeout != 300 else []
    typed = options.launched_by or shlex.join(command)

    if options.dry_run:
        return _dry_run(options, config, workdir, gpus)
    if options.processes > 1:
        child = [sys.executable, "-m", "transfer_jax.cli", "run", options.config, *arguments]
        child += [f"--timeout={options.timeout}", f"--launched_by={typed}"]
        return _run_processes(child, options.processes, gpus, options.coordinator)
    if options.launched_by:
        _stop_with_parent()
    keep_memory()
    code = _guarded(options.debug, lambda: _run_job(options, config, workdir, typed))
    if code not in (OK, PREEMPTED):
        _leave_job(code)
    return code


def set_platform(platform: str | None, devices: int | None) -> None:
    """Tells JAX by environment variables, which it reads when it starts its backend."""
    if devices:
        flag = "--xla_force_host_platform_device_count"
        others = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(flag)]
        os.environ["XLA_FLAGS"] = " ".join([*others, f"{flag}={devices}"])
        platform = "cpu"
    if platform:
        os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(platform, platform)


def _run_job(options: argparse.Namespace, config: Any, workdir: Path, command: str) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s")
    from transfer_jax.training import distributed

    # --coordinator of --processes has reached its processes by the environment.
    distributed.initialize(options.coordinator, detect=options.distributed, timeout=options.timeout)

    from transfer_jax.training import Experiment, Preempted
    from transfer_jax.training.report import print_results

    try:
        experiment = Experiment(config, workdir)
        results = experiment.run()
    except Preempted as stop:
        if distributed.is_primary():
            _say(f"{stop}\nTo resume, run the same command again:\n  {command}")
        return PREEMPTED
    if distributed.is_primary():
        report = experiment.report()
        print_results(results)
        print(f"report: {report}", flush=True)
    return OK


def _dry_run(
    options: argparse.Namespace, config: Any, workdir: Path, gpus: list[str] | None
) -> int:
    print(configuration.config_to_json(config), end="")
    print(f"workdir: {workdir}{' (exists: the run would resume)' if workdir.exists() else ''}")
    if options.distributed:
        print("processes: those of the cluster, as JAX detects them")
    else:
        print(f"processes: {options.processes}")
    devices = "what JAX finds"
    if options.devices:
        devices = f"{options.devices} virtual CPU device{'s' * (options.devices > 1)}"
    elif options.platform:
        devices = f"all {options.platform.upper()} devices"
    if gpus:
        devices = "; ".join(f"process {i}: GPU {ids}" for i, ids in enumerate(gpus))
    print(f"devices of each process: {devices}" if not gpus else f"devices: {devices}")
    print("dry run: nothing was computed or written")
    return OK


# -- several processes on this machine ------------------------------------------------------------


def gpus_per_process(count: int) -> list[str] | None:
    """The CUDA_VISIBLE_DEVICES of each process, None where JAX would not use GPUs."""
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if os.environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu"):
        return None
    if not any(find_spec(plugin) for plugin in plugins):
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        ids = [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    else:
        ids = [i for i in visible.split(",") if i]
    if not ids:
        return None
    if len(ids) % count:
        raise ConfigError(
            f"{count} processes cannot share the {len(ids)} GPU(s) of this machine evenly; "
            "choose another number, or --platform=cpu."
        )
    share = len(ids) // count
    return [",".join(ids[i * share : (i + 1) * share]) for i in range(count)]


def _run_processes(
    command: list[str], count: int, gpus: list[str] | None, address: str | None = None
) -> int:
    """Runs the command ``count`` times as one job and returns one exit code for all.

    SIGTERM and Ctrl-C are passed on; a second one kills. If one process fails the others are ended.
    """
    if address is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
    signals: list[int] = []
    previous = {
        number: signal.signal(number, lambda n, _frame: signals.append(n))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    processes: list[subprocess.Popen[str]] = []
    tails: list[collections.deque[str]] = [collections.deque(maxlen=20) for _ in range(count)]
    readers: list[threading.Thread] = []
    try:
        for i in range(count):
            environment = {
                **os.environ,
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_COORDINATOR_BIND_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(i),
                "PYTHONUNBUFFERED": "1",
            }
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = gpus[i]
            # A session of its own: Ctrl-C in the terminal reaches the process through us alone.
            # We never write to its input; its end tells the process that we are gone.
            process = subprocess.Popen(
                command, env=environment, start_new_session=True, text=True, errors="replace",
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            processes.append(process)
            for source, sink in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                reader = threading.Thread(
                    target=_copy_lines, args=(source, sink, f"[{i}] ", tails[i]), daemon=True
                )
                reader.start()
                readers.append(reader)
        first = _wait(processes, signals)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for reader in readers:
            reader.join(timeout=5)
        for number, handler in previous.items():
            signal.signal(number, handler)

    codes = [process.returncode for process in processes]
    if first is None:
        return PREEMPTED if PREEMPTED in codes else OK
    code = codes[first]
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    last = "".join(f"  {line}\n" for line in tails[first]) or "  (it wrote nothing)\n"
    _say(f"process {first} of {count} {how}, the others were ended. Its last lines:\n{last}")
    return 128 - code if code < 0 else code


def _wait(processes: list[subprocess.Popen[str]], signals: list[int]) -> int | None:
    """Waits for all processes; returns which one failed first, None if none did."""
    ended: list[int] = []  # in the order in which they did: what fails later may be a consequence

    def note(i: int) -> None:
        processes[i].wait()
        ended.append(i)

    for i in range(len(processes)):
        threading.Thread(target=note, args=(i,), daemon=True).start()
    failed: int | None = None
    passed_on = 0
    deadline = float("inf")
    while len(ended) < len(processes):
        running = [p for i, p in enumerate(processes) if i not in ended]
        if len(signals) > passed_on:
            passed_on += 1
            if passed_on == 1:
                _say("asked to stop: the processes save a checkpoint and end; once more kills them")
            for process in running:
                process.send_signal(signal.SIGTERM if passed_on == 1 else signal.SIGKILL)
        if failed is None:
            failed = _first_failed(processes, ended)
            if failed is not None:
                deadline = time.monotonic() + _KILL_AFTER
                for process in running:
                    process.terminate()
        if time.monotonic() > deadline:
            for process in running:
                process.kill()
        time.sleep(0.05)
    return _first_failed(processes, ended) if failed is None else failed


def _first_failed(processes: list[subprocess.Popen[str]], ended: list[int]) -> int | None:
    bad = (i for i in ended if processes[i].returncode not in (OK, PREEMPTED))
    return next(bad, None)


def _copy_lines(source: IO[str], sink: IO[str], prefix: str, tail: collections.deque[str]) -> None:
    for line in source:
        if "[Gloo] Rank" in line:  # which sockets are connected, several times a process
            continue
        line = line.rstrip("\n")
        tail.append(line)
        sink.write(f"{prefix}{line}\n")
        sink.flush()


def _stop_with_parent() -> None:
    """Asks this process to stop when the one that launched it is gone, however it went."""

    def watch() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _leave_job(code: int) -> None:
    """Ends a failed process of a job of several at once.

    An ordinary exit waits for the others, who wait in a collective for this one. They fail when it
    is gone, and since they wait here as well, whoever started the job sees the cause end first.
    """
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(_LEAVE_AFTER)
        os._exit(code)


# -- list and report ------------------------------------------------------------------------------


def _list() -> int:
    configs = configuration.list_configs()
    if not configs:
        print(f"no configs in {configuration.config_directory()}")
    for name, info in configs.items():
        print(f"{name}: {info.summary}" if info.summary else name)
        width = max(map(len, info.variants), default=0) + len(name) + 1
        for variant, summary in info.variants.items():
            print(f"  {f'{name}:{variant}'.ljust(width)}  {summary}")
    return OK


def _compare(options: argparse.Namespace) -> int:
    from transfer_jax.training.compare import compare, write_comparison
    from transfer_jax.training.report import format_table

    comparison = compare(options.workdirs, options.metrics)
    print(format_table(comparison.columns, comparison.rows))
    for text in comparison.notes:
        _say(text)
    if options.out is not None:
        print(f"comparison: {write_comparison(comparison, options.out)}")
    return OK


def _report(workdir: Path) -> int:
    from transfer_jax.training.report import print_results, write_report

    path = write_report(workdir)
    results = workdir / "results.json"
    if results.exists():
        print_results(json.loads(results.read_text()))
    print(f"report: {path}")
    return OK


# -- merge ----------------------------------------------------------------------------------------


def _planned(
    options: argparse.Namespace, plan: Callable[[], Any], carry_out: Callable[[Any], None]
) -> int:
    """Makes a plan, prints it and, unless this is a dry run, carries it out.

    What keeps a plan from being made is how the command was used.
    """
    made: list[Any] = []

    def make() -> int:
        made.append(plan())
        return OK

    def run() -> int:
        carry_out(made[0])
        return OK

    if code := _guarded(options.debug, make, failed=USAGE):
        return code
    print(made[0].describe(), flush=True)
    if options.dry_run:
        print(f"out: {options.out}\ndry run: nothing was computed or written")
        return OK
    keep_memory()
    return _guarded(options.debug, run)


def _merge(options: argparse.Namespace) -> int:
    def plan() -> Any:
        from transfer_jax.trees import files, streaming

        streaming.parse_size(options.max_shard_size)
        files.check_new(options.out)
        return streaming.plan_merge(_merge_recipe(options))

    return _planned(
        options, plan, lambda plan: _write_merge(plan, options.max_shard_size, options.out)
    )


def _merge_recipe(options: argparse.Namespace) -> Any:
    from transfer_jax.trees import streaming

    names = (
        "method", "base", "models", "weights", "option", "fisher", "dtype", "seed", "missing"
    )  # fmt: skip
    given = [f"--{name}" for name in names if getattr(options, name) is not None]
    if options.recipe:
        if given:
            raise ConfigError(f"{', '.join(given)} with --recipe: write it in {options.recipe}.")
        return streaming.read_recipe(options.recipe)
    if not options.method or not options.models:
        raise ConfigError("give --method and --models, or --recipe.")
    method_options = dict(map(streaming.parse_option, options.option or []))
    if options.weights:
        method_options["weight"] = options.weights
    return streaming.Recipe(
        method=options.method,
        models=tuple(options.models),
        base=options.base,
        options=method_options,
        fishers=tuple(options.fisher or ()),
        dtype=options.dtype,
        seed=options.seed or 0,
        missing=options.missing or "error",
    )


def _write_merge(plan: Any, max_shard_size: str, out: Path) -> None:
    import resource

    from transfer_jax.training.progress import Progress
    from transfer_jax.trees import streaming

    def peak() -> float:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

    before, start = peak(), time.monotonic()
    progress: list[Progress] = []

    def report(done: int, total: int) -> None:
        if not progress:
            progress.append(Progress(total, "merge"))
        progress[0].update(done, {"peak MiB": peak()})

    try:
        written = streaming.write_merge(
            plan, out, max_shard_size=streaming.parse_size(max_shard_size), report=report,
            note=f"Made by `transfer-jax merge`, version {transfer_jax.__version__}.",
        )  # fmt: skip
    finally:
        for bar in progress:
            bar.close()
    print(
        f"wrote {out} ({len(written)} file{'s' * (len(written) > 1)}) in "
        f"{time.monotonic() - start:.1f} s; peak memory {peak():.0f} MiB, {before:.0f} MiB of it "
        "before the merge",
        flush=True,
    )


# -- recommend ------------------------------------------------------------------------------------


def _recommend(options: argparse.Namespace) -> int:
    set_platform(options.platform, options.devices)

    def plan() -> Any:
        from transfer_jax import recommendation

        if not options.out.parent.is_dir():
            raise ConfigError(f"--out={options.out}: there is no directory {options.out.parent}.")
        columns = {"user": options.user, "item": options.item, "time": options.time}
        log = recommendation.read_log(options.interactions, **columns)
        return recommendation.plan(options.workdir, log, options.model)

    def carry_out(plan: Any) -> None:
        from transfer_jax import recommendation

        began = time.monotonic()
        lines = recommendation.export(
            plan, options.out, k=options.k, batch_size=options.batch_size, shards=options.shards,
            keep_seen=options.keep_seen,
        )  # fmt: skip
        print(f"wrote {options.out} ({lines:,} lines) in {time.monotonic() - began:.1f} s")

    return _planned(options, plan, carry_out)


# -- forecast -------------------------------------------------------------------------------------


def _forecast(options: argparse.Namespace) -> int:
    def plan() -> Any:
        from transfer_jax.forecast import plan_forecast

        return plan_forecast(
            options.file, options.model, horizon=options.horizon, columns=options.columns or (),
            time_column=options.time_column, stage=options.stage,
        )  # fmt: skip

    def carry_out(plan: Any) -> None:
        from transfer_jax.forecast import run_forecast, write_forecast

        table, plot = write_forecast(plan, run_forecast(plan), options.out)
        print(f"wrote {table} and {plot}")

    return _planned(options, plan, carry_out)


# -- errors ---------------------------------------------------------------------------------------


def _guarded(debug: bool, call: Callable[[], int], failed: int = FAILED) -> int:
    """Runs ``call``; errors that are the user's are one paragraph, others keep their traceback."""
    try:
        return call()
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except Exception as error:
        if debug or not _is_for_the_user(error):
            traceback.print_exc()
            return FAILED
        _error(str(error))
        return failed


def _is_for_the_user(error: Exception) -> bool:
    """Whether the message alone says what to do.

    True for what the operating system refused, and for what this package (or a config file) has
    raised on purpose: by a ``raise`` statement, not from within a library or by a bug.
    """
    if isinstance(error, OSError):
        return True
    if not isinstance(error, (ValueError, ArithmeticError, RuntimeError, ImportError)):
        return False
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(transfer_jax.__file__).parent, configuration.config_directory()
    return any(Path(frame.filename).is_relative_to(p) for p in ours) and (
        frame.line or ""
    ).startswith("raise")


def _error(text: str) -> None:
    _say(f"error: {text}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
