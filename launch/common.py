"""What the launchers share: the job, its command, and the programs that start it elsewhere.

Every launcher builds lists of arguments and hands them to a program without a shell. Where a shell
has to read them (a script, a command on another machine) they are quoted by ``quote``.
"""

import argparse
import contextlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from transfer_jax import configuration
from transfer_jax.configuration import ConfigError
from transfer_jax.training.files import check_address, is_remote

ROOT = Path(__file__).resolve().parent.parent

OK, FAILED, USAGE, PREEMPTED = 0, 1, 2, 75

# Client programs and where they come from.
_CLIENTS = {
    "gcloud": "the Google Cloud command line, https://cloud.google.com/sdk/docs/install; then "
    "`gcloud auth login`",
    "kubectl": "the Kubernetes command line, https://kubernetes.io/docs/tasks/tools; then "
    "`gcloud container clusters get-credentials CLUSTER`",
    "sbatch": "Slurm's commands, to be found on the login nodes of a cluster",
}


class LaunchError(RuntimeError):
    """A job could not be started or reached."""


class Job(NamedTuple):
    """What runs, wherever it does.

    Attributes:
      config: ``NAME:VARIANT``, or a config file with its variant.
      workdir: local, ``gs://…`` or ``s3://…``.
      overrides: ``key=value``, checked against the config.
    """

    config: str
    workdir: str
    overrides: tuple[str, ...]

    def command(self, python: str, *flags: str) -> list[str]:
        """The command of one process of this job."""
        return [
            python, "-m", "transfer_jax.cli", "run", self.config, f"--workdir={self.workdir}",
            *(f"--config.{override}" for override in self.overrides), *flags,
        ]  # fmt: skip


def add_job_options(parser: argparse.ArgumentParser, workdir: str) -> None:
    """The arguments that every launcher has."""
    parser.add_argument(
        "--config", required=True, metavar="FILE[:VARIANT]", help="config file, or a config's name"
    )
    parser.add_argument("--workdir", help=workdir)
    add_dry_run(parser)


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true",
        help="print exactly what would run, and run nothing",
    )  # fmt: skip


def positive(text: str) -> int:
    """Argument type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def name(text: str) -> str:
    """Argument type: a name as Google Cloud, Kubernetes and Slurm all take it."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no name: use up to 40 lower-case letters, digits and '-', a letter first"
        )
    return text


def resolve(config: str, workdir: str | None, overrides: Sequence[str]) -> Job:
    """Checks config and overrides here, before anything is started elsewhere.

    Raises:
      ConfigError: see ``configuration.load_config`` and ``apply_overrides``.
    """
    spec = configuration.find_config(config)
    if spec.path.parent != configuration.config_directory():
        sys.path.insert(0, str(spec.path.parent.absolute()))  # its recipe may lie beside it
    configuration.apply_overrides(configuration.load_config(config), overrides)
    default = "/".join(("runs", "-".join(filter(None, spec[1:]))))
    if workdir is not None:
        check_address(workdir)
    return Job(config, workdir or default, tuple(overrides))


def resolve_packaged(config: str, workdir: str | None, overrides: Sequence[str]) -> Job:
    """The same for a job that runs from the wheel or image of this checkout, on other machines.

    Raises:
      ConfigError: the config does not travel with the package, or the work directory is local.
    """
    job = resolve(config, workdir, overrides)
    path, stem, variant = configuration.find_config(config)
    if path.resolve().parent != configuration.config_directory():
        raise ConfigError(
            f"{path} does not travel with the package: put it into {ROOT / 'configs'} and its "
            "recipe into transfer_jax/papers."
        )
    if workdir is None or not is_remote(workdir):
        raise ConfigError(
            f"--workdir={workdir or ''} must be in an object store that every machine of the job "
            "reaches: gs://BUCKET/DIRECTORY."
        )
    return job._replace(config=":".join(filter(None, (stem, variant))))


# -- programs -------------------------------------------------------------------------------------


def quote(command: Sequence[str]) -> str:
    """One line that a shell reads as exactly these arguments."""
    return shlex.join(command)


def here_document(text: str) -> str:
    """The end of a command line that gives it ``text`` (whole lines) on its standard input."""
    end = "EOF"
    while end in text.splitlines():  # else the text would end there, and the rest would be run
        end += "_"
    return f" <<'{end}'\n{text}{end}"


def need(program: str) -> None:
    """Raises LaunchError if a client program is not installed, and says where it comes from."""
    if shutil.which(program) is None:
        raise LaunchError(f"{program} was not found on PATH. It is {_CLIENTS[program]}.")


class Runner:
    """Runs commands, or, in a dry run, prints them."""

    def __init__(self, dry_run: bool):
        self.dry_run = dry_run

    def __call__(self, *command: str, input: str | None = None) -> None:
        """Runs a command; its output goes to ours.

        Raises:
          LaunchError: it failed.
        """
        code = self.code(*command, input=input)
        if code:
            raise LaunchError(f"this command failed with exit code {code}:\n  {quote(command)}")

    def code(self, *command: str, input: str | None = None) -> int:
        """Runs a command and returns its exit code; 0 in a dry run."""
        if self.dry_run:
            print(quote(command) + ("" if input is None else here_document(input)))
            return OK
        need(command[0])
        say(f"$ {quote(command)}")
        return subprocess.run(command, input=input, text=True, check=False).returncode

    def ask(self, *command: str) -> str | None:
        """Returns what a command prints, None if it failed; it is a question and changes nothing.

        In a dry run it is printed and the answer is empty.
        """
        if self.dry_run:
            print(quote(command))
            return ""
        need(command[0])
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None


@contextlib.contextmanager
def files(dry_run: bool, contents: Mapping[str, str]) -> Iterator[Path]:
    """A temporary directory with some files, or, in a dry run, their contents printed."""
    if dry_run:
        for filename, text in contents.items():
            print(f"# {filename}:\n{text}# end of {filename}")
        yield Path(tempfile.gettempdir()) / "transfer_jax"
        return
    with tempfile.TemporaryDirectory(prefix="transfer_jax-") as directory:
        for filename, text in contents.items():
            (Path(directory) / filename).write_text(text)
        yield Path(directory)


def guarded(call: Callable[[], int]) -> int:
    """Runs a launcher; what the user can mend is one paragraph."""
    try:
        return call()
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except ConfigError as error:
        say(f"error: {error}")
        return USAGE
    except (LaunchError, OSError) as error:
        say(f"error: {error}")
        return FAILED


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
