"""Runs an experiment on a Slurm cluster, or every entry of a sweep as an array job.

    python -m launch.slurm --config=configs/s4.py:listops --workdir=/shared/runs/s4 \\
        --nodes=2 --gpus_per_node=8 --time=24:00:00

Writes an sbatch script and submits it. Slurm sends SIGTERM before the time limit and on preemption;
all processes then save a checkpoint of the same step and the job puts itself into the queue again,
until it is done. The checkout, the environment of ``--python`` and the work directory must be on a
file system that the nodes share. Stop a job with ``scancel``, see it with ``squeue``.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import common, sweep
from launch.common import quote
from transfer_jax import cli
from transfer_jax.configuration import ConfigError

_SCRIPT = """\
#!/bin/bash
{directives}
set -u
cd {directory} || exit 1
export PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}
{prologue}{choose}
# Slurm sends SIGTERM to the processes of srun, not to this script. A process that ends without the
# others leaves them in a collective: they are given a minute.
status=0
srun --wait=60 "$@" || status=$?
if [ "$status" -eq {preempted} ]; then
  echo "stopped with a checkpoint saved; into the queue again"
  task=${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}
  scontrol requeue "${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}$task"
fi
exit "$status"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``python -m launch.slurm`` and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.slurm",
        description="Submits the experiment of a config to Slurm.",
        epilog=cli.OVERRIDES_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    common.add_job_options(parser, "on a shared file system; default: runs/NAME-VARIANT")
    parser.add_argument("--name", type=common.name, help="default: from the config's name")
    parser.add_argument("--nodes", type=common.positive, default=1, metavar="N")
    parser.add_argument(
        "--gpus_per_node", type=int, default=0, metavar="N", help="default: none, the nodes' CPUs"
    )
    parser.add_argument(
        "--process_per", choices=["gpu", "node"], default="gpu",
        help="one process for every GPU (default), or one for all GPUs of a node",
    )  # fmt: skip
    parser.add_argument("--cpus_per_task", type=common.positive, metavar="N")
    parser.add_argument("--mem", type=_word, metavar="SIZE", help="memory of a node, such as 200G")
    parser.add_argument("--time", type=_word, metavar="TIME", help="limit, such as 24:00:00")
    parser.add_argument("--partition", type=_word)
    parser.add_argument("--account", type=_word)
    parser.add_argument("--qos", type=_word)
    parser.add_argument("--constraint", type=_word, help="features that the nodes must have")
    parser.add_argument(
        "--signal_before", type=common.positive, default=300, metavar="SECONDS",
        help="when SIGTERM comes before the limit: time to save a checkpoint; default: 300",
    )  # fmt: skip
    parser.add_argument(
        "--python", default=sys.executable, help="the environment's Python, as the nodes see it"
    )
    parser.add_argument(
        "--prologue", metavar="FILE", help="shell commands to run first, such as `module load cuda`"
    )
    parser.add_argument("--sweep", metavar="FILE", help="one array task for each of its entries")
    parser.add_argument(
        "--parallel", type=common.positive, metavar="N", help="tasks of the array at a time"
    )
    arguments, overrides = cli.split_overrides(parser, list(sys.argv[1:] if argv is None else argv))
    options = parser.parse_args(arguments)
    return common.guarded(lambda: _submit(options, overrides))


def _word(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.:,+&|@/-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} has characters that Slurm does not take")
    return text


def _submit(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.sweep:
        entries = sweep.load(options.sweep, options.config, options.workdir, overrides)
        jobs = [entry.job for entry in entries]
    else:
        jobs = [common.resolve(options.config, options.workdir, overrides)]
    prologue = ""
    if options.prologue:
        prologue = Path(options.prologue).read_text().rstrip("\n") + "\n"
    parent = jobs[0].workdir.rpartition("/")[0] if options.sweep else jobs[0].workdir
    # Slurm writes output to local paths only, and not into directories that do not exist.
    logs = "runs/logs" if "://" in parent else f"{parent}/slurm"
    if re.search(r"[^A-Za-z0-9_./,=+-]", logs):
        raise ConfigError(
            f"--workdir={parent}: Slurm's output cannot go below it; use letters, digits and "
            "'_', '-', '.', ',', '=', '+'."
        )
    text = script(options, jobs, logs, prologue)
    runner = common.Runner(options.dry_run)
    if options.dry_run:
        print(quote(["mkdir", "-p", logs]))
    else:
        common.need("sbatch")
        Path(logs).mkdir(parents=True, exist_ok=True)
    runner("sbatch", input=text)
    return common.OK


def script(
    options: argparse.Namespace, jobs: Sequence[common.Job], logs: str, prologue: str = ""
) -> str:
    """Returns the sbatch script of a job, or of an array of jobs.

    Args:
      options: of the command line.
      jobs: one, or the tasks of an array.
      logs: directory of the output files.
      prologue: shell commands that come first.
    """
    array = bool(options.sweep)
    gpus = options.gpus_per_node
    tasks = gpus if gpus and options.process_per == "gpu" else 1
    name = options.name or re.sub(r"[^a-z0-9-]+", "-", Path(options.config).name.lower())[:40]
    directives = {
        "job-name": name,
        "output": f"{logs}/%A_%a.txt" if array else f"{logs}/%j.txt",
        "open-mode": "append",
        "nodes": options.nodes,
        "ntasks-per-node": tasks,
        "gpus-per-node": gpus or None,
        "cpus-per-task": options.cpus_per_task,
        "mem": options.mem,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "signal": f"TERM@{options.signal_before}",
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in directives.items() if value is not None]
    lines.append("#SBATCH --requeue")
    if array:
        limit = f"%{options.parallel}" if options.parallel else ""
        lines.append(f"#SBATCH --array=0-{len(jobs) - 1}{limit}")
    if gpus and tasks == 1:
        # JAX gives every Slurm process one GPU unless it is told which ones.
        prologue += f"export JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(gpus)))}\n"

    flags = ["--distributed"] if options.nodes * tasks > 1 else []
    flags += [f"--platform={'gpu' if gpus else 'cpu'}"]
    commands = [quote(job.command(options.python, *flags)) for job in jobs]
    if array:
        choose = 'case "$SLURM_ARRAY_TASK_ID" in\n'
        choose += "".join(f"  {i}) set -- {c} ;;\n" for i, c in enumerate(commands))
        choose += '  *) echo "no such task"; exit 2 ;;\nesac'
    else:
        choose = f"set -- {commands[0]}"
    return _SCRIPT.format(
        directives="\n".join(lines), directory=quote([str(Path.cwd())]),
        root=quote([str(common.ROOT)]), prologue=prologue, choose=choose,
        preempted=common.PREEMPTED,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
