"""The launchers as processes, with stand-ins for the programs that they call."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess

import pytest
import yaml

from launch import gke, local, slurm, sweep, tpu_vm
from tests.launch.fakes import Fakes
from transfer_jax.configuration import ConfigError

TPU = ("--name=s4", "--zone=us-west4-a")
RUN = ("--config=quickstart", "--workdir=gs://bucket/run")
# A value that would run commands, end words, lines, here-documents and YAML strings if it could.
HOSTILE = "a'b\"c; touch pwned $(touch pwned) `touch pwned` \\\n- x: &y {z}\nEOF\n#"


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path)


def check_script(text):
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(
            ["shellcheck", "--severity=warning", "-"], input=text, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stdout


# -- what they share ------------------------------------------------------------------------------


COMMANDS = {
    "slurm": (slurm, ["--config=quickstart", "--workdir=/shared/run"], "sbatch"),
    "gke": (gke, ["run", "--name=a", "--image=i", "--gpu=nvidia-l4", *RUN], "kubectl"),
    "tpu_vm": (tpu_vm, ["create", *TPU, "--type=v5litepod-16"], "gcloud"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_missing_client_is_named_with_where_it_comes_from(name, monkeypatch, tmp_path, capsys):
    module, arguments, client = COMMANDS[name]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module.main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {client} was not found on PATH. It is ")
    assert ("https://" in err) != (name == "slurm")
    assert module.main([*arguments, "--dry_run"]) == 0  # which needs no client


@pytest.mark.parametrize(
    "module, arguments, message",
    [
        (slurm, ["--config=quckstart"], "no config 'quckstart'. The nearest: quickstart"),
        (slurm, ["--config=quickstart", "--config.sed=1"], "no key 'sed'. The nearest: seed"),
        (slurm, ["--config=quickstart", "--workdir=a b"], "Slurm's output cannot go below it"),
        (slurm, ["--config=quickstart", "--workdir=ftp://x"], "use a local path, gs://"),
        (tpu_vm, ["run", *TPU, "--config=quickstart", "--workdir=/x"], "be in an object store"),
        (gke, ["run", "--name=a", "--image=i", *RUN], "give --tpu with --topology, or --gpu"),
        (gke, ["run", "--name=a", "--image=i", "--tpu=t", *RUN], "--tpu needs --topology"),
        (gke, ["run", "--name=a", "--image=i", "--tpu=t", "--topology=3x3", *RUN],
         "9 chips, which do not divide into nodes of 4"),
        (local, ["--config=quickstart", "--sweep=nowhere.py"], "no sweep file nowhere.py"),
    ],
)  # fmt: skip
def test_wrong_command_lines(module, arguments, message, capsys):
    assert module.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "module, arguments",
    [(tpu_vm, ["create", "--name=A;b", "--zone=z", "--type=t"]), (slurm, ["--partition=a b"]),
     (tpu_vm, ["create", *TPU, "--type=$(x)"]), (gke, ["status", "--name=a/b"]),
     (tpu_vm, ["run", *TPU, *RUN, "--watch"]), (tpu_vm, ["stop", *TPU, "--config.seed=1"])],
)  # fmt: skip
def test_names_are_names(module, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(arguments)
    assert stop.value.code == 2


# -- Slurm ----------------------------------------------------------------------------------------


def test_slurm_submits_a_script_that_runs_exactly_these_arguments(fakes):
    done = fakes.launch(
        "slurm", "--config=quickstart", "--workdir=runs/a", f"--config.recipe={HOSTILE}",
        "--nodes=2", "--gpus_per_node=4", "--time=1:00:00", "--partition=gpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ((program, arguments, script),) = fakes.calls()
    assert (program, arguments) == ("sbatch", [])
    check_script(script)
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))
    assert directives["ntasks-per-node"] == directives["gpus-per-node"] == "4"
    assert directives["signal"] == "TERM@300" and "requeue" in directives

    # The script as it is, with programs in the place of Slurm's.
    (fakes.home / "bin" / "srun").write_text('#!/bin/bash\nprintf "%s\\0" "$@" > srun; exit 75\n')
    (fakes.home / "bin" / "scontrol").write_text('#!/bin/bash\necho "$@" > scontrol\n')
    for name in ("srun", "scontrol"):
        (fakes.home / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{fakes.home / 'bin'}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    ran = subprocess.run(["bash"], input=script, text=True, env=environment, cwd=fakes.home)
    assert ran.returncode == 75
    given = (fakes.home / "srun").read_text().split("\0")[:-1]
    assert given[2:] == [
        "-m", "transfer_jax.cli", "run", "quickstart", "--workdir=runs/a",
        f"--config.recipe={HOSTILE}", "--distributed", "--platform=gpu",
    ]  # fmt: skip
    assert (fakes.home / "scontrol").read_text() == "requeue 7\n"

    # What a dry run prints is safe to paste, too.
    fakes.calls_file().unlink()
    planned = fakes.launch(
        "slurm", "--config=quickstart", "--workdir=runs/a", f"--config.recipe={HOSTILE}",
        "--nodes=2", "--gpus_per_node=4", "--time=1:00:00", "--partition=gpu", "--dry_run",
    )  # fmt: skip
    subprocess.run(["bash"], input=planned.stdout, text=True, env=environment, cwd=fakes.home)
    assert fakes.calls() == [["sbatch", [], script]]
    assert not list(fakes.home.rglob("pwned"))


def test_slurm_arrays_run_the_entries_of_a_sweep(fakes):
    (fakes.home / "sweep.py").write_text(
        "def get_sweep():\n    return [{'seed': s, 'lora.rank': 2} for s in range(3)]\n"
    )
    done = fakes.launch("slurm", "--config=quickstart", "--workdir=runs/a", "--sweep=sweep.py",
                        "--parallel=2", "--gpus_per_node=2", "--process_per=node")  # fmt: skip
    assert done.returncode == 0, done.stderr
    script = fakes.calls()[0][2]
    check_script(script)
    assert "#SBATCH --array=0-2%2\n" in script
    assert "export JAX_LOCAL_DEVICE_IDS=0,1\n" in script
    commands = [shlex.split(c) for c in re.findall(r"^  \d\) set -- (.*) ;;$", script, re.M)]
    directories = [re.fullmatch(r"--workdir=runs/a/rank=2,seed=(\d)-\w{6}", c[5]) for c in commands]
    assert [found and found[1] for found in directories] == ["0", "1", "2"]
    assert ["--config.seed=1" in c for c in commands] == [False, True, False]


def test_sweeps_are_checked_and_keep_their_names(tmp_path):
    file = tmp_path / "sweep.py"

    def names(text):
        file.write_text(f"def get_sweep():\n    return {text}\n")
        return [e.name for e in sweep.load(str(file), "quickstart", "w", [])]

    first = names("[{'seed': 1}, {'pretrain.steps': 3, 'transfer.steps': 4}]")
    assert first[1].startswith("pretrain.steps=3,transfer.steps=4-")
    # Neither the place in the list nor the order of the keys matters.
    again = names("[{'transfer.steps': 4, 'pretrain.steps': 3}, {'seed': 0}, {'seed': 1}]")
    assert again[0] == first[1] and again[2] == first[0]
    for text, message in (
        ("[{'sed': 1}]", "entry 0 of .*no key 'sed'"),
        ("[]", "needs a function get_sweep"),
        ("[{'seed': 1}, {'seed': 1}]", "these entries twice: seed=1"),
    ):
        with pytest.raises(ConfigError, match=message):
            names(text)


# -- TPU VMs --------------------------------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="building needs hatchling"
)
def test_watch_creates_a_preempted_slice_again_until_the_experiment_is_done(fakes):
    """Real scripts on the stand-in's two workers; the first slice is lost after a third."""
    (fakes.home / "secrets").write_text("# a comment\nSECRET_TOKEN=to $(touch pwned) ken\n")
    done = fakes.launch(
        "tpu_vm", "run", *TPU, *RUN, "--watch", "--type=v5litepod-16", "--spot", "--poll=0.05",
        f"--config.recipe={HOSTILE}", "--env_file=secrets", PREEMPT=str(fakes.home / "state"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the slice s4 is PREEMPTED: deleting it" in done.stderr
    assert "starts at 1" in done.stdout and "finished" in done.stdout
    calls = fakes.calls()
    verbs = [call[1][3] for call in calls]
    assert verbs.count("create") == 2 and verbs.count("delete") == 1
    creation = next(call[1] for call in calls if call[1][3] == "create")
    assert creation == [
        "compute", "tpus", "tpu-vm", "create", "s4", "--zone=us-west4-a",
        "--accelerator-type=v5litepod-16", "--version=tpu-ubuntu2204-base", "--spot",
    ]  # fmt: skip

    # What ran there got every argument whole, and nothing in it was run.
    given = (fakes.home / "bucket" / "arguments").read_text()
    assert f"--workdir=gs://bucket/run\n--config.recipe={HOSTILE}\n--distributed\n" in given
    assert not list(fakes.home.rglob("pwned"))
    # The secret has reached the experiment by a file that is gone, and never a command line.
    assert "token: to $(touch pwned) ken" in done.stdout
    assert not any("ken" in argument for call in calls for argument in call[1])
    home = fakes.home / "slice-2" / "0" / "transfer_jax_job"
    assert {p.name for p in home.iterdir()} >= {"log.txt", "code", "constraints.txt"}
    assert not (home / "env").exists()
    assert re.search(r"^jax==\d", (home / "constraints.txt").read_text(), re.MULTILINE)
    assert list(home.glob("transfer_jax-*.whl"))
    for script in ("job.sh", "install.sh"):
        check_script((home / script).read_text())


def test_a_queued_slice_is_waited_for_and_what_runs_there_can_be_seen_and_stopped(fakes):
    created = fakes.launch("tpu_vm", "create", *TPU, "--type=t", "--queued", "--poll=0.05")
    assert created.returncode == 0, created.stderr
    assert "is WAITING_FOR_RESOURCES; waiting" in created.stderr
    assert [call[1][3] for call in fakes.calls()] == ["create", *["describe"] * 3]

    # An experiment that takes its time, started by the script that the launcher sends.
    for worker in "01":
        home = fakes.home / "slice-1" / worker / "transfer_jax_job"
        home.mkdir(parents=True)
        child = "bash -c 'trap \"exit 75\" TERM; echo ready; while :; do sleep 0.1; done'"
        (home / "job.sh").write_text(tpu_vm.job_script(child, grace=20))
    first = fakes.home / "slice-1" / "0"
    start = ["bash", str(first / "transfer_jax_job" / "job.sh"), "start"]
    subprocess.run(start, env={"HOME": str(first), "PATH": "/usr/bin:/bin"}, check=True)
    status = fakes.launch("tpu_vm", "status", *TPU)
    assert status.stdout == "slice: READY\nexperiment: running\n"
    assert fakes.launch("tpu_vm", "stop", *TPU).returncode == 0
    attached = fakes.launch("tpu_vm", "attach", *TPU)
    assert attached.returncode == 75 and "ready" in attached.stdout
    assert fakes.launch("tpu_vm", "delete", *TPU, "--queued").returncode == 0
    assert "queued-resources" in fakes.calls()[-1][1] and "--force" in fakes.calls()[-1][1]
    assert fakes.launch("tpu_vm", "status", *TPU).stdout == "slice: there is none of this name\n"


# -- GKE ------------------------------------------------------------------------------------------


def closed(required, **properties):
    """A schema of an object without other keys."""
    return {
        "type": "object", "properties": properties, "required": required,
        "additionalProperties": False,
    }  # fmt: skip


TEXT, NUMBER = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}


def items(schema):
    return {"type": "array", "items": schema, "minItems": 1}


CONTAINER = closed(
    ["name", "image", "args", "resources"], name=TEXT, image=TEXT, args=items(TEXT),
    env=items(closed(["name"], name=TEXT, value=TEXT, valueFrom=closed(
        ["fieldRef"], fieldRef=closed(["fieldPath"], fieldPath=TEXT)))),
    envFrom=items(closed(["secretRef"], secretRef=closed(["name"], name=TEXT))),
    ports=items(closed(["containerPort"], containerPort=NUMBER)),
    resources=closed(["limits"], limits={"type": "object", "additionalProperties": NUMBER}),
)  # fmt: skip
POD = closed(
    ["restartPolicy", "containers"], restartPolicy={"const": "Never"},
    terminationGracePeriodSeconds=NUMBER, nodeSelector=TEXTS, containers=items(CONTAINER),
    serviceAccountName=TEXT,
    tolerations=items(closed(["key"], key=TEXT, operator={"enum": ["Equal", "Exists"]}, value=TEXT,
                             effect={"enum": ["NoSchedule", "NoExecute", "PreferNoSchedule"]})),
)  # fmt: skip
JOB = closed(
    ["template"], parallelism=NUMBER, completions=NUMBER, completionMode={"const": "Indexed"},
    backoffLimit=NUMBER, template=closed(["spec"], spec=POD),
    podFailurePolicy=closed(["rules"], rules=items(closed(
        ["action"], action={"enum": ["FailJob", "Ignore", "Count", "FailIndex"]},
        onExitCodes=closed(["operator", "values"], containerName=TEXT,
                           operator={"enum": ["In", "NotIn"]}, values=items(NUMBER))))),
)  # fmt: skip
JOBSET = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"}, kind={"const": "JobSet"},
    metadata=closed(["name"], name=TEXT, annotations=TEXTS),
    spec=closed(
        ["replicatedJobs"],
        network=closed([], enableDNSHostnames={"type": "boolean"}, subdomain=TEXT),
        coordinator=closed(["replicatedJob"], replicatedJob=TEXT, jobIndex=NUMBER, podIndex=NUMBER),
        failurePolicy=closed([], maxRestarts=NUMBER, rules=items(closed(
            ["name", "action"], name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*)$"},
            action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
            onJobFailureReasons=items(TEXT)))),
        replicatedJobs=items(closed(
            ["name", "template"], name=TEXT, replicas=NUMBER,
            template=closed(["spec"], spec=JOB))),
    ),
)  # fmt: skip


def test_gke_applies_a_job_set_and_shows_its_log(fakes):
    jsonschema = pytest.importorskip("jsonschema")
    done = fakes.launch(
        "gke", "run", "--name=s4", "--namespace=team", "--image=registry/t:1",
        "--tpu=tpu-v5-lite-podslice", "--topology=4x4", "--slices=2", "--spot", "--secret=wandb",
        *RUN, f"--config.recipe={HOSTILE}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    calls = fakes.calls()
    assert [call[1][1] for call in calls] == ["apply", "wait", "logs", "get", "get"]
    assert all(call[1][0] == "--namespace=team" for call in calls)
    manifest = yaml.safe_load(calls[0][2])
    jsonschema.validate(manifest, JOBSET)
    (workers,) = manifest["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert (workers["replicas"], job["parallelism"], job["completions"]) == (2, 4, 4)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    # Kubernetes replaces $(NAME) in arguments; $$ is its way to write $.
    given = [argument.replace("$$", "$") for argument in container["args"]]
    assert given == [
        "run", "quickstart:digits", "--workdir=gs://bucket/run", f"--config.recipe={HOSTILE}",
        "--platform=tpu", "--distributed",
    ]  # fmt: skip
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]
    assert pod["terminationGracePeriodSeconds"] == 300


def test_gke_tells_gpu_pods_of_each_other(capsys):
    jsonschema = pytest.importorskip("jsonschema")
    arguments = ["run", "--name=s4", "--image=i", "--gpu=nvidia-h100-80gb", "--nodes=2", *RUN]
    assert gke.main([*arguments, "--dry_run"]) == 0
    manifest = yaml.safe_load(capsys.readouterr().out.split("<<'EOF'\n")[1].split("EOF\n")[0])
    jsonschema.validate(manifest, JOBSET)
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    values = {e["name"]: e.get("value", e.get("valueFrom")) for e in container["env"]}
    # The names that training.distributed.initialize reads; the address is that of the coordinator.
    assert values["JAX_COORDINATOR_ADDRESS"] == "s4-workers-0-0.s4:8476"
    assert values["JAX_NUM_PROCESSES"] == "2"
    assert "job-completion-index" in json.dumps(values["JAX_PROCESS_ID"])
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert "--distributed" not in container["args"]
