"""Runs an experiment on a Cloud TPU slice, through ``gcloud``.

    python -m launch.tpu_vm create --name=s4 --zone=us-west4-a --type=v5litepod-16 --spot
    python -m launch.tpu_vm run --name=s4 --zone=us-west4-a --config=configs/s4.py:listops \\
        --workdir=gs://BUCKET/s4
    python -m launch.tpu_vm delete --name=s4 --zone=us-west4-a

``run`` installs this checkout on every machine of the slice, starts the experiment there and shows
the log of process 0; Ctrl-C leaves it running. ``run --watch`` also creates the slice, and creates
it again when it was preempted, until the experiment is done. A slice has one experiment at a time.

Secrets such as WANDB_API_KEY go into a file of NAME=VALUE lines, ``--env_file``: it is copied, and
never on a command line.
"""

import argparse
import importlib.metadata
import re
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import transfer_jax
from launch import common
from launch.common import LaunchError, quote
from transfer_jax import cli

_HOME = "transfer_jax_job"  # directory on the machines, below the user's home

# The slice is lost: it exists no more, or never again in this form.
_LOST = ("", "PREEMPTED", "TERMINATED", "STOPPED", "SUSPENDED", "FAILED")

# One script on every machine; what it does is its argument.
_SCRIPT = """\
#!/bin/bash
# Written by launch.tpu_vm: start, follow, state or stop the experiment on this machine.
cd ~/{home} || exit 1
running() {{ [ -f pid ] && kill -0 "$(cat pid)" 2>/dev/null; }}
case "$1" in
  start)
    if running; then echo "an experiment is running here already"; exit 1; fi
    rm -f code pid
    setsid bash job.sh work > log.txt 2>&1 < /dev/null &
    until [ -s pid ]; do sleep 0.1; done ;;
  work)
    trap : TERM  # at a shutdown: stay until the experiment has saved its checkpoint
    echo $$ > pid
    if [ -f env ]; then
      while IFS= read -r line; do
        case "$line" in [A-Za-z_]*=*) export "${{line?}}" ;; esac
      done < ./env
      rm -f env
    fi
    {command}
    echo $? > code ;;
  follow)
    if running; then tail -n {tail} --pid="$(cat pid)" -F log.txt
    else tail -n {tail} log.txt; fi ;;
  state)
    if running; then echo running
    elif [ -f code ]; then echo "ended $(cat code)"
    elif [ -f pid ]; then echo lost
    else echo none; fi ;;
  stop)
    running && pkill -TERM -P "$(cat pid)"
    for _ in $(seq {grace}); do running || break; sleep 1; done
    if running; then pkill -KILL -P "$(cat pid)"; fi ;;
esac
"""

_INSTALL = """\
#!/bin/bash
# Written by launch.tpu_vm: an environment with the versions of the machine that it came from.
set -e
cd ~/{home}
python3 -m pip install --quiet --user uv
[ -d venv ] || python3 -m uv venv --quiet --python {python} venv
python3 -m uv pip install --quiet --python venv/bin/python --constraint constraints.txt \\
  'jax[tpu]' gcsfs --reinstall-package transfer_jax ./transfer_jax-*.whl
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``python -m launch.tpu_vm`` and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.tpu_vm", description="Experiments on Cloud TPU slices."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    actions: dict[str, Callable[[argparse.Namespace, list[str]], int]] = {
        "create": lambda o, _: _Slice(o).create(),
        "install": lambda o, _: _Slice(o).install(),
        "run": _run,
        "attach": lambda o, _: _attach(_Slice(o)),
        "status": lambda o, _: _status(_Slice(o)),
        "stop": lambda o, _: _Slice(o).on_workers("stop", worker="all"),
        "delete": lambda o, _: _Slice(o).delete(),
    }
    helps = {
        "create": "create a slice",
        "install": "install this checkout on it (run does so too)",
        "run": "install, start the experiment and show its log",
        "attach": "show the log of the experiment that runs there",
        "status": "state of the slice and of the experiment",
        "stop": "SIGTERM to the experiment: it saves a checkpoint and ends",
        "delete": "delete the slice",
    }
    for name in actions:
        sub = commands.add_parser(
            name, help=helps[name], description=f"{helps[name].capitalize()}.", allow_abbrev=False,
            epilog=cli.OVERRIDES_HELP if name == "run" else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        if name == "run":
            common.add_job_options(sub, "gs://BUCKET/DIRECTORY")
        else:
            common.add_dry_run(sub)
        sub.add_argument("--name", type=common.name, required=True, help="of the slice")
        sub.add_argument("--zone", type=_word, required=True, help="such as us-west4-a")
        sub.add_argument("--project", type=_word, help="default: that of gcloud's configuration")
        if name in ("create", "run"):
            _add_slice_options(sub, required=name == "create")
        if name in ("delete", "status"):
            sub.add_argument("--queued", action="store_true", help="it was created with --queued")
        if name == "run":
            sub.add_argument(
                "--env_file", type=Path, metavar="FILE",
                help="NAME=VALUE lines for the environment of the experiment; for secrets",
            )  # fmt: skip
            sub.add_argument("--detach", action="store_true", help="start it and return")
            sub.add_argument(
                "--watch", action="store_true",
                help="create the slice if there is none, and again when it was preempted, and run "
                "until the experiment is done",
            )  # fmt: skip
            sub.add_argument(
                "--attempts", type=common.positive, default=100, metavar="N",
                help="with --watch: slices to create at most; default: 100",
            )  # fmt: skip
        if name in ("run", "stop"):
            sub.add_argument(
                "--grace", type=common.positive, default=300, metavar="SECONDS",
                help="what stop allows for the checkpoint; default: 300",
            )  # fmt: skip
    arguments, overrides = cli.split_overrides(parser, list(sys.argv[1:] if argv is None else argv))
    options = parser.parse_args(arguments)
    if overrides and options.command != "run":
        parser.error(f"--config.{overrides[0]}: only run has a config")
    if getattr(options, "watch", False) and not (options.type and not options.detach):
        parser.error("--watch creates slices and stays: give --type, and no --detach")
    return common.guarded(lambda: actions[options.command](options, overrides))


def _add_slice_options(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--type", type=_word, required=required, help="accelerator type, such as v5litepod-16"
    )
    parser.add_argument(
        "--version", type=_word, default="tpu-ubuntu2204-base",
        help="software of the machines, such as v2-alpha-tpuv6e; default: tpu-ubuntu2204-base",
    )  # fmt: skip
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--spot", action="store_true", help="cheaper, and may be preempted")
    kind.add_argument("--reserved", action="store_true", help="from the project's reservation")
    parser.add_argument(
        "--queued", action="store_true", help="as a queued resource: waits until there is room"
    )
    parser.add_argument(
        "--poll", type=float, default=30.0, metavar="SECONDS", help=argparse.SUPPRESS
    )


def _word(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} has characters that gcloud does not take")
    return text


class _Slice:
    """A TPU slice and the gcloud commands for it."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.run = common.Runner(options.dry_run)
        self._built: tempfile.TemporaryDirectory[str] | None = None

    def _gcloud(self, kind: str, verb: str, *rest: str) -> list[str]:
        project = [f"--project={self.options.project}"] if self.options.project else []
        where = [f"--zone={self.options.zone}", *project]
        return ["gcloud", "compute", "tpus", kind, verb, *rest, *where]

    def create(self) -> int:
        o = self.options
        kind = ["--spot"] if o.spot else ["--reserved"] if o.reserved else []
        if not o.queued:
            self.run(
                *self._gcloud("tpu-vm", "create", o.name), f"--accelerator-type={o.type}",
                f"--version={o.version}", *kind,
            )  # fmt: skip
            return common.OK
        self.run(
            *self._gcloud("queued-resources", "create", o.name), f"--node-id={o.name}",
            f"--accelerator-type={o.type}", f"--runtime-version={o.version}", *kind,
        )  # fmt: skip
        state: str | None = ""
        while state != "ACTIVE":
            state = self.run.ask(
                *self._gcloud("queued-resources", "describe", o.name), "--format=value(state.state)"
            )  # fmt: skip
            if o.dry_run:
                print("# … until it is ACTIVE")
                break
            if state in ("FAILED", "SUSPENDED"):
                see = quote(self._gcloud("queued-resources", "describe", o.name))
                raise LaunchError(
                    f"the queued resource {o.name} is {state}; `{see}` says why. Delete it and try "
                    "another zone or type."
                )
            if state != "ACTIVE":
                common.say(f"the queued resource {o.name} is {state or 'not known yet'}; waiting")
                time.sleep(o.poll)
        return common.OK

    def delete(self) -> int:
        if self.options.queued:
            command = self._gcloud("queued-resources", "delete", self.options.name)
            self.run(*command, "--force", "--quiet")
        else:
            self.run(*self._gcloud("tpu-vm", "delete", self.options.name), "--quiet")
        return common.OK

    def state(self) -> str:
        """READY, CREATING, PREEMPTED, …; empty if there is no such slice."""
        answer = self.run.ask(
            *self._gcloud("tpu-vm", "describe", self.options.name), "--format=value(state)"
        )
        return answer or ""

    def ssh(self, command: str, worker: str) -> list[str]:
        rest = (self.options.name, f"--worker={worker}", f"--command={command}")
        return self._gcloud("tpu-vm", "ssh", *rest)

    def copy(self, *paths: Path) -> None:
        rest = (*map(str, paths), f"{self.options.name}:{_HOME}/", "--worker=all")
        self.run(*self._gcloud("tpu-vm", "scp", *rest))

    def install(self) -> int:
        """The wheel of this checkout and the versions of this environment, on every machine."""
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        contents = {
            "constraints.txt": constraints(),
            "install.sh": _INSTALL.format(home=_HOME, python=version),
        }
        with common.files(self.options.dry_run, contents) as directory:
            wheel = self._wheel()
            # A wheel of another version would be installed too.
            self.run(*self.ssh(f"mkdir -p ~/{_HOME} && rm -f ~/{_HOME}/*.whl", "all"))
            self.copy(wheel, *(directory / name for name in contents))
            self.run(*self.ssh(f"bash ~/{_HOME}/install.sh", "all"))
        return common.OK

    def _wheel(self) -> Path:
        """The wheel of this checkout, built once: a slice that is created again gets the same."""
        if self._built is None:
            self._built = tempfile.TemporaryDirectory(prefix="transfer_jax-wheel-")
            command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
            self.run(*command, f"--wheel-dir={self._built.name}", str(common.ROOT))
        if self.options.dry_run:
            return (
                Path(self._built.name) / f"transfer_jax-{transfer_jax.__version__}-py3-none-any.whl"
            )
        (wheel,) = Path(self._built.name).glob("*.whl")
        return wheel

    def start(self, job: common.Job) -> None:
        command = quote(job.command("venv/bin/python", "--distributed", "--platform=tpu"))
        script = job_script(command, self.options.grace)
        with common.files(self.options.dry_run, {"job.sh": script}) as directory:
            paths = [directory / "job.sh"]
            if self.options.env_file is not None:
                paths.append(directory / "env")
                if not self.options.dry_run:
                    paths[1].touch(mode=0o600)
                    paths[1].write_text(self.options.env_file.read_text())
            self.copy(*paths)
        self.on_workers("start", worker="all")

    def on_workers(self, action: str, worker: str) -> int:
        self.run(*self.ssh(f"bash ~/{_HOME}/job.sh {action}", worker))
        return common.OK

    def experiment(self) -> str:
        """``running``, ``ended CODE``, ``lost`` or ``none``; empty if the slice does not answer."""
        answer = self.run.ask(*self.ssh(f"bash ~/{_HOME}/job.sh state", "0"))
        return (answer or "").splitlines()[-1] if answer else ""

    def follow(self) -> None:
        """Shows the log of process 0 until the experiment ends or the connection breaks."""
        self.run.code(*self.ssh(f"bash ~/{_HOME}/job.sh follow", "0"))


def job_script(command: str, grace: int, tail: int = 100) -> str:
    """Returns the script that starts, follows and stops a command on one machine."""
    return _SCRIPT.format(home=_HOME, command=command, grace=grace, tail=tail)


def constraints() -> str:
    """Returns the versions of this environment of everything that transfer_jax needs."""
    project = tomllib.loads((common.ROOT / "pyproject.toml").read_text())["project"]
    versions: dict[str, str] = {}
    wanted = list(project["dependencies"])
    while wanted:
        name = re.split(r"[^A-Za-z0-9_.-]", wanted.pop(), maxsplit=1)[0]
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in versions:
            continue
        try:
            found = importlib.metadata.distribution(key)
        except importlib.metadata.PackageNotFoundError:
            continue
        versions[key] = found.version
        wanted += [r for r in found.requires or () if "extra ==" not in r]
    return "".join(f"{key}=={versions[key]}\n" for key in sorted(versions))


def _run(options: argparse.Namespace, overrides: list[str]) -> int:
    job = common.resolve_packaged(options.config, options.workdir, overrides)
    secret = options.env_file
    if secret is not None and not secret.is_file() and not options.dry_run:
        raise LaunchError(f"there is no file {secret} (--env_file).")
    tpu = _Slice(options)
    if options.watch:
        return _watch(tpu, job)
    tpu.install()
    tpu.start(job)
    if options.detach:
        common.say(f"started. To see it: {_this(tpu, 'attach')}")
        return common.OK
    return _attach(tpu)


def _this(tpu: _Slice, action: str) -> str:
    o = tpu.options
    project = [f"--project={o.project}"] if o.project else []
    return quote(
        ["python", "-m", "launch.tpu_vm", action, f"--name={o.name}", f"--zone={o.zone}", *project]
    )


def _attach(tpu: _Slice) -> int:
    try:
        tpu.follow()
    except KeyboardInterrupt:
        common.say(
            f"the experiment goes on. To see it again: {_this(tpu, 'attach')}\n"
            f"To stop it with a checkpoint: {_this(tpu, 'stop')}"
        )
        return 130
    if tpu.options.dry_run:
        return common.OK
    state = tpu.experiment()
    if state.startswith("ended "):
        return int(state.removeprefix("ended "))
    raise LaunchError(
        f"the connection to {tpu.options.name} has ended and the experiment has not (it is "
        f"{state or 'out of reach'}). See: {_this(tpu, 'status')}"
    )


def _status(tpu: _Slice) -> int:
    state = tpu.state()
    if not tpu.options.dry_run:
        print(f"slice: {state or 'there is none of this name'}")
    if state == "READY" or tpu.options.dry_run:
        experiment = tpu.experiment()
        if not tpu.options.dry_run:
            print(f"experiment: {experiment or 'out of reach'}")
    return common.OK


def _watch(tpu: _Slice, job: common.Job) -> int:
    """Creates, installs, starts and follows until the experiment has ended by itself."""
    if tpu.options.dry_run:
        print("# if there is no slice, or it was preempted (then it is deleted first):")
        tpu.create()
        print("# then:")
        tpu.install()
        tpu.start(job)
        tpu.follow()
        tpu.experiment()
        print("# and from the start again, until the experiment has ended by itself")
        return common.OK
    created = silent = 0
    started = False
    while True:
        state = tpu.state()
        if state in _LOST:
            if created == tpu.options.attempts:
                raise LaunchError(f"{created} slices were created and lost; giving up.")
            if state:
                common.say(f"the slice {tpu.options.name} is {state}: deleting it")
                tpu.delete()
            created, silent, started = created + 1, 0, False
            tpu.create()
        elif state != "READY":
            common.say(f"the slice {tpu.options.name} is {state}; waiting")
            time.sleep(tpu.options.poll)
        elif (experiment := tpu.experiment()) == "running":
            started, silent = True, 0
            tpu.follow()
        elif started and experiment.startswith("ended "):
            code = int(experiment.removeprefix("ended "))
            if code == common.OK or _stays(tpu):
                return code
        elif started and not experiment:
            silent += 1
            if silent > 10:
                raise LaunchError(f"{tpu.options.name} is READY and does not answer.")
            time.sleep(tpu.options.poll)
        else:  # a new slice, one without this experiment, or one that was restarted
            try:
                tpu.install()
                tpu.start(job)
            except LaunchError:
                if _stays(tpu):
                    raise
                continue
            started = True
            tpu.follow()


def _stays(tpu: _Slice) -> bool:
    """Whether the slice is still there after a while: what failed was not its loss."""
    for _ in range(3):
        if tpu.state() in _LOST:
            return False
        time.sleep(tpu.options.poll)
    return True


if __name__ == "__main__":
    sys.exit(main())
