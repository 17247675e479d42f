"""Runs an experiment on Google Kubernetes Engine, as a JobSet through ``kubectl``.

    python -m launch.gke run --name=s4 --image=REGISTRY/transfer_jax:TAG \\
        --tpu=tpu-v5-lite-podslice --topology=4x4 --config=configs/s4.py:listops \\
        --workdir=gs://BUCKET/s4

The image comes from ``launch/Dockerfile``. A pod that is evicted, preempted or killed ends its job;
the JobSet then starts all pods again and they resume. Secrets are Kubernetes secrets, given by name
(``--secret``), whose keys become environment variables.

TPUs: JAX finds the other processes by what GKE tells every pod, in one slice or (``--slices``)
several. GPUs: the JobSet's coordinator and the pod's index tell them.
"""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from launch import common
from launch.common import quote
from transfer_jax import cli
from transfer_jax.configuration import ConfigError

_PORT = 8476


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``python -m launch.gke`` and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.gke", description="Experiments on Google Kubernetes Engine."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run", help="start an experiment and show its log", allow_abbrev=False,
        description="Starts an experiment and shows the log of process 0.",
        epilog=cli.OVERRIDES_HELP, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    common.add_job_options(run, "gs://BUCKET/DIRECTORY")
    run.add_argument("--image", type=_image, required=True, help="see launch/Dockerfile")
    run.add_argument("--tpu", type=_word, help="such as tpu-v5-lite-podslice or tpu-v6e-slice")
    run.add_argument("--topology", type=_topology, help="of a slice, such as 4x4")
    run.add_argument("--slices", type=common.positive, default=1, metavar="N")
    run.add_argument(
        "--chips_per_node", type=common.positive, default=4, metavar="N", help="default: 4"
    )
    run.add_argument("--gpu", type=_word, help="such as nvidia-h100-80gb")
    run.add_argument("--gpus_per_node", type=common.positive, default=8, metavar="N")
    run.add_argument("--nodes", type=common.positive, default=1, metavar="N", help="with --gpu")
    run.add_argument("--spot", action="store_true", help="on spot nodes")
    run.add_argument(
        "--restarts", type=common.positive, default=100, metavar="N",
        help="after so many the experiment has failed; default: 100",
    )  # fmt: skip
    run.add_argument(
        "--grace", type=common.positive, default=300, metavar="SECONDS",
        help="from SIGTERM to SIGKILL: time to save a checkpoint; default: 300",
    )  # fmt: skip
    run.add_argument(
        "--secret", type=common.name, action="append", default=[], metavar="NAME",
        help="of a Kubernetes secret; its keys become environment variables",
    )  # fmt: skip
    run.add_argument("--service_account", type=common.name, help="of Kubernetes, for the bucket")
    run.add_argument("--detach", action="store_true", help="start it and return")
    for name, text in {
        "attach": "show the log of process 0",
        "status": "state of the job set and of its pods",
        "stop": "SIGTERM to the experiment, which saves a checkpoint; then it is deleted",
    }.items():
        sub = commands.add_parser(name, help=text, description=f"{text.capitalize()}.")
        common.add_dry_run(sub)
    for sub in commands.choices.values():
        sub.add_argument("--name", type=common.name, required=True, help="of the job set")
        sub.add_argument("--namespace", type=common.name)
    arguments, overrides = cli.split_overrides(parser, list(sys.argv[1:] if argv is None else argv))
    options = parser.parse_args(arguments)
    if overrides and options.command != "run":
        parser.error(f"--config.{overrides[0]}: only run has a config")
    actions = {"run": _run, "attach": _attach, "status": _status, "stop": _stop}
    return common.guarded(lambda: actions[options.command](options, overrides))


def _word(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no value of a node label")
    return text


def _image(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:/@-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of an image")
    return text


def _topology(text: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*){1,2}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no topology such as 4x4 or 2x2x4")
    return text


def _kubectl(options: argparse.Namespace, *rest: str) -> list[str]:
    namespace = [f"--namespace={options.namespace}"] if options.namespace else []
    return ["kubectl", *namespace, *rest]


def _run(options: argparse.Namespace, overrides: list[str]) -> int:
    job = common.resolve_packaged(options.config, options.workdir, overrides)
    run = common.Runner(options.dry_run)
    text = yaml.safe_dump(manifest(options, job), sort_keys=False, width=1000)
    run(*_kubectl(options, "apply", "--filename=-"), input=text)
    if options.detach:
        return common.OK
    ready = f"--for=jsonpath={{.status.replicatedJobsStatus[0].ready}}={options.slices}"
    run(*_kubectl(options, "wait", f"jobset/{options.name}", ready, "--timeout=24h"))
    return _attach(options, [])


def _attach(options: argparse.Namespace, _: list[str]) -> int:
    run = common.Runner(options.dry_run)
    labels = {
        "jobset.sigs.k8s.io/jobset-name": options.name,
        "jobset.sigs.k8s.io/job-index": "0",
        "batch.kubernetes.io/job-completion-index": "0",
    }
    selector = "--selector=" + ",".join(f"{key}={value}" for key, value in labels.items())
    try:
        run(*_kubectl(options, "logs", "--follow", selector, "--tail=100"))
    except KeyboardInterrupt:
        namespace = [f"--namespace={options.namespace}"] if options.namespace else []
        again = ["python", "-m", "launch.gke", "attach", f"--name={options.name}", *namespace]
        common.say(f"the experiment goes on. To see it again: {quote(again)}")
        return 130
    return _status(options, [])


def _status(options: argparse.Namespace, _: list[str]) -> int:
    run = common.Runner(options.dry_run)
    run(*_kubectl(options, "get", "jobset", options.name))
    run(
        *_kubectl(
            options, "get", "pods", f"--selector=jobset.sigs.k8s.io/jobset-name={options.name}"
        )
    )
    return common.OK


def _stop(options: argparse.Namespace, _: list[str]) -> int:
    run = common.Runner(options.dry_run)
    run(*_kubectl(options, "delete", "jobset", options.name, "--cascade=foreground"))
    return common.OK


def manifest(options: argparse.Namespace, job: common.Job) -> dict[str, Any]:
    """Returns the JobSet of an experiment.

    Args:
      options: of the command line.
      job: with a config that the image has and a work directory in an object store.

    Raises:
      ConfigError: not exactly one of TPUs and GPUs is asked for, or the topology does not divide
        into nodes.
    """
    if bool(options.tpu) == bool(options.gpu):
        raise ConfigError("give --tpu with --topology, or --gpu.")
    environment: list[dict[str, Any]] = []
    if options.tpu:
        if not options.topology:
            raise ConfigError("--tpu needs --topology, such as 4x4.")
        chips = math.prod(map(int, options.topology.split("x")))
        per_node = min(options.chips_per_node, chips)
        if chips % per_node:
            raise ConfigError(
                f"--topology={options.topology} has {chips} chips, which do not divide into nodes "
                f"of {per_node} (--chips_per_node)."
            )
        nodes, slices = chips // per_node, options.slices
        selector = {
            "cloud.google.com/gke-tpu-accelerator": options.tpu,
            "cloud.google.com/gke-tpu-topology": options.topology,
        }
        resources: dict[str, Any] = {"google.com/tpu": per_node}
        flags = ["--platform=tpu", *(["--distributed"] if nodes * slices > 1 else [])]
    else:
        nodes, slices = options.nodes, 1
        selector = {"cloud.google.com/gke-accelerator": options.gpu}
        resources = {"nvidia.com/gpu": options.gpus_per_node}
        flags = ["--platform=gpu"]
        if nodes > 1:
            index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
            environment = [
                {
                    "name": "JAX_COORDINATOR_ADDRESS",
                    "value": f"{options.name}-workers-0-0.{options.name}:{_PORT}",
                },
                {"name": "JAX_NUM_PROCESSES", "value": str(nodes)},
                {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
            ]
    if options.spot:
        selector["cloud.google.com/gke-spot"] = "true"

    container: dict[str, Any] = {
        "name": "transfer-jax",
        "image": options.image,
        # The image's entry point is `python -m transfer_jax.cli`. "$(" would be expanded.
        "args": [a.replace("$", "$$") for a in job.command("python", *flags)[3:]],
        "env": [{"name": "PYTHONUNBUFFERED", "value": "1"}, *environment],
        "ports": [{"containerPort": _PORT}, {"containerPort": 8471}],
        "resources": {"limits": resources},
    }
    if options.secret:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in options.secret]
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace,
        "nodeSelector": selector,
        "containers": [container],
    }
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    if options.spot:
        pod["tolerations"] = [
            {
                "key": "cloud.google.com/gke-spot",
                "operator": "Equal",
                "value": "true",
                "effect": "NoSchedule",
            }
        ]
    annotations = {}
    if options.tpu and nodes * slices > 1:
        # One slice per node pool: what GKE needs to tell the pods of several slices of each other.
        annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": options.name, "annotations": annotations},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": options.name},
            "coordinator": {"replicatedJob": "workers", "jobIndex": 0, "podIndex": 0},
            "failurePolicy": {
                "maxRestarts": options.restarts,
                "rules": [
                    {
                        "name": "wrongCommandLine",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    },
                ],
            },
            "replicatedJobs": [
                {
                    "name": "workers",
                    "replicas": slices,
                    "template": {
                        "spec": {
                            "parallelism": nodes,
                            "completions": nodes,
                            "completionMode": "Indexed",
                            "backoffLimit": 0,
                            # A wrong command line stays wrong.
                            "podFailurePolicy": {
                                "rules": [
                                    {
                                        "action": "FailJob",
                                        "onExitCodes": {
                                            "containerName": "transfer-jax",
                                            "operator": "In",
                                            "values": [common.USAGE],
                                        },
                                    }
                                ]
                            },
                            "template": {"spec": pod},
                        }
                    },
                }
            ],
        },
    }


if __name__ == "__main__":
    sys.exit(main())
