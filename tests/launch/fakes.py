"""Stand-ins for gcloud, kubectl and sbatch: real programs on PATH that record how they are called.

The stand-in for gcloud also keeps a slice: `create`, `describe` and `delete` change and tell its
state, `scp` copies files into the home directories of its two workers, and `ssh` runs the command
there with bash, so that the scripts which the launcher sends are run as they are.
"""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

_RECORD = """#!{python}
import json, os, shutil, subprocess, sys
from pathlib import Path

home = Path({home!r})
arguments = sys.argv[1:]
text = "" if sys.stdin is None or sys.stdin.isatty() else ({read} and sys.stdin.read())
with (home / "calls").open("a") as f:
    f.write(json.dumps([{name!r}, arguments, text or ""]) + "\\n")
"""

_GCLOUD = """
state = home / "state"
kind, verb = arguments[2:4]
values = dict(a[2:].split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
life = len(list(home.glob("slice-*")))
here = home / f"slice-{life}"

def fail(text):
    print("ERROR: " + text, file=sys.stderr)
    sys.exit(1)

if kind == "queued-resources" and verb == "describe":
    asked = home / "asked"
    asked.write_text(asked.read_text() + "." if asked.exists() else ".")
    print("ACTIVE" if len(asked.read_text()) > 2 else "WAITING_FOR_RESOURCES")
elif verb == "create":
    if state.exists():
        fail("ALREADY_EXISTS")
    for worker in "01":
        (home / f"slice-{life + 1}" / worker).mkdir(parents=True)
    state.write_text("READY")
elif not state.exists():
    fail("NOT_FOUND")
elif verb == "describe":
    print(state.read_text())
elif verb == "delete":
    state.unlink()
elif state.read_text() != "READY":
    fail("the connection was refused")
elif verb == "scp":
    *sources, target = [a for a in arguments[4:] if not a.startswith("--")]
    for worker in "01":
        for source in sources:
            shutil.copy(source, here / worker / target.partition(":")[2])
elif verb == "ssh":
    for worker in ("01" if values["worker"] == "all" else values["worker"]):
        environment = {**os.environ, "HOME": str(here / worker), "WORKER": worker,
                       "PATH": str(home / "machine") + ":" + os.environ["PATH"]}
        done = subprocess.run(["bash", "-c", values["command"]], env=environment)
    sys.exit(done.returncode)
"""

# `python3` of the machines. Its environments hold a program that trains in three pieces and keeps
# what it has done in the bucket; the first slice is preempted in the middle.
_MACHINE = """#!/bin/bash
case "$*" in
  *"uv venv"*)
    mkdir -p venv/bin
    cat > venv/bin/python <<'END'
#!/bin/bash
[ "$WORKER" = 0 ] || exit 0
echo "command: $*"
echo "token: $SECRET_TOKEN"
printf '%s\\n' "$@" > "$BUCKET/arguments"
done=$(cat "$BUCKET/done" 2>/dev/null || echo 0)
echo "starts at $done"
while [ "$done" -lt 3 ]; do
  done=$((done + 1))
  echo $done > "$BUCKET/done"
  if [ "$done" -eq 1 ] && [ -n "$PREEMPT" ]; then
    echo PREEMPTED > "$PREEMPT"
    kill -9 $PPID $$
  fi
done
echo finished
exit "${CODE:-0}"
END
    chmod +x venv/bin/python ;;
esac
"""


class Fakes:
    """A directory with the stand-ins, and what they have recorded."""

    def __init__(self, home: Path):
        self.home = home
        for directory in ("bin", "machine", "bucket"):
            (home / directory).mkdir()
        self._program("gcloud", _GCLOUD, read=False)
        self._program("kubectl", "", read=True)
        self._program("sbatch", "print('Submitted batch job 1')\n", read=True)
        self._write("machine/python3", _MACHINE)

    def _program(self, name, body, read):
        head = _RECORD.format(python=sys.executable, home=str(self.home), name=name, read=read)
        self._write(f"bin/{name}", head + body)

    def _write(self, name, text):
        path = self.home / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def launch(self, module, *arguments, path=None, **environment):
        """Runs ``python -m launch.MODULE`` as a process that finds the stand-ins."""
        return subprocess.run(
            [sys.executable, "-m", f"launch.{module}", *map(str, arguments)],
            cwd=self.home, capture_output=True, text=True, timeout=120, check=False,
            env={
                **os.environ, "PYTHONPATH": str(ROOT), "BUCKET": str(self.home / "bucket"),
                "PATH": path or f"{self.home / 'bin'}:{os.environ['PATH']}",
                "PIP_NO_BUILD_ISOLATION": "0", **environment,
            },
        )  # fmt: skip

    def calls_file(self):
        return self.home / "calls"

    def calls(self):
        """(program, arguments, standard input) of every call, in order."""
        file = self.calls_file()
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
