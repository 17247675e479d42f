"""Several processes as one job: joining, meeting, and stopping together.

A job of one process never touches ``jax.distributed``; every function here is then free.
"""

import atexit
import itertools
import logging
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

import jax
import numpy as np

logger = logging.getLogger(__name__)

# Numbers the steps of all stages of this process, for the protocol behind ``should_stop``.
_steps = itertools.count(1)


def initialize(
    coordinator: str | None = None,
    process_count: int | None = None,
    process_id: int | None = None,
    *,
    detect: bool = False,
    timeout: int = 300,
) -> None:
    """Joins the processes of this job, if there are several; call it before any computation.

    Args:
      coordinator: ``host:port`` at which process 0 listens; default the environment variable
        ``JAX_COORDINATOR_ADDRESS``.
      process_count: default ``JAX_NUM_PROCESSES``, else 1.
      process_id: 0 to ``process_count - 1``; default ``JAX_PROCESS_ID``.
      detect: find what is not given as JAX does: on TPU pods, Slurm, Open MPI and GKE.
      timeout: seconds to wait for the others.

    Raises:
      ValueError: only some of the three are known, or ``detect`` found no cluster.
      TimeoutError: process 0 cannot be reached in time.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    process_count = _from_environment(process_count, "JAX_NUM_PROCESSES")
    process_id = _from_environment(process_id, "JAX_PROCESS_ID")
    local_devices = None
    if detect:
        coordinator, process_count, process_id, local_devices = _detect(
            coordinator, process_count, process_id, timeout
        )
    if process_count in (None, 1) and coordinator is None and process_id in (None, 0):
        return
    known = {
        "JAX_COORDINATOR_ADDRESS": coordinator,
        "JAX_NUM_PROCESSES": process_count,
        "JAX_PROCESS_ID": process_id,
    }
    missing = [name for name, value in known.items() if value is None]
    if missing and detect:
        raise ValueError(
            "no TPU pod, Slurm, Open MPI or GKE job was found around this process. Start it with "
            f"srun, mpirun or one of the launchers, or set {', '.join(missing)}."
        )
    if missing:
        given = ", ".join(f"{k}={v}" for k, v in known.items() if v is not None)
        raise ValueError(
            f"a job of several processes needs {', '.join(known)}; {', '.join(missing)} is not set "
            f"(given: {given})."
        )
    assert coordinator is not None and process_count is not None and process_id is not None
    if not 0 <= process_id < process_count:
        raise ValueError(f"process {process_id} is none of 0 to {process_count - 1}.")
    if process_count == 1:
        return

    who = f"process {process_id} of {process_count}"
    if process_id == 0:
        others = "process 1" if process_count == 2 else f"processes 1 to {process_count - 1}"
        _say(f"{who}: coordinator at {coordinator}, waits up to {timeout} s for {others}")
    else:
        _say(f"{who}: waits up to {timeout} s for the coordinator at {coordinator}")
        _wait_for(coordinator, who, timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator, process_count, process_id, local_device_ids=local_devices,
        cluster_detection_method="deactivate", initialization_timeout=timeout,
    )  # fmt: skip
    atexit.register(_leave)
    _say(f"{who}: all have joined")


def is_primary() -> bool:
    """Whether this is process 0, the one that writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is true in any process; all must ask at the same point."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


class PreemptionGuard:
    """Within it, SIGTERM and the first SIGINT (Ctrl-C) ask for a stop instead of killing.

    A second SIGINT interrupts at once. In a job of several processes SIGTERM stays with JAX, which
    spreads it to all of them; ``should_stop`` says when. Outside the main thread signals cannot be
    caught and the guard does nothing.
    """

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[int, Any] = {}

    def requested(self) -> bool:
        """Whether this process was asked to stop (in a job of one process)."""
        return self._requested

    def __enter__(self) -> "PreemptionGuard":
        if threading.current_thread() is threading.main_thread():
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupted)
            if not jax.distributed.is_initialized():
                self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._terminated)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _say("stopping after this step; press Ctrl-C again to stop at once")
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)
        self._requested = True


def should_stop(step: int, guard: PreemptionGuard) -> bool:
    """Whether the job stops after ``step``: the same answer in every process of the job.

    All processes call it once after each step. A SIGTERM that one of them gets is spread by JAX's
    preemption service, which agrees on the first step that none of them has passed.
    """
    if not jax.distributed.is_initialized():
        return guard.requested()
    from jax.experimental import multihost_utils

    # Counted over all stages: the protocol takes numbers that only grow, steps start again at 1.
    stop = multihost_utils.reached_preemption_sync_point(next(_steps))
    if stop:
        logger.info("all processes stop after step %d", step)
    return stop


def _leave() -> None:
    """Ends the job together; runs before JAX's own shutdown.

    A SIGTERM at the very end starts JAX's protocol in one process while another has shut its part
    down already, and both wait for minutes. So no process shuts down before every one ignores the
    signal and has noticed what came earlier: JAX looks once per second.
    """
    if getattr(sys, "last_value", None) is not None:  # ended by an error: the others are not here
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1.5)
    barrier("transfer_jax leaves")


def _detect(
    coordinator: str | None, process_count: int | None, process_id: int | None, timeout: int
) -> tuple[str | None, int | None, int | None, Any]:
    """Coordinator, count, index and local devices, found as ``jax.distributed.initialize`` does.

    It does not say what it has found, and where process 0 is not there it ends the process; the
    caller waits with a message instead.
    """
    from jax._src import clusters

    ids = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    return clusters.ClusterEnv.auto_detect_unset_distributed_params(
        coordinator, process_count, process_id,
        [int(i) for i in ids.split(",")] if ids else None, None, timeout,
    )  # fmt: skip


def _from_environment(value: int | None, name: str) -> int | None:
    text = os.environ.get(name)
    if value is not None or text is None:
        return value
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"the environment variable {name}={text!r} must be an integer.") from None


def _wait_for(coordinator: str, who: str, timeout: float) -> None:
    """Waits for a listener, because JAX ends the process without a word where there is none."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"the coordinator {coordinator!r} is not of the form host:port.")
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"{who} could not reach the coordinator at {coordinator} within {timeout:g} s "
                    f"({error}). Is process 0 running, and is the port open between the machines?"
                ) from None
        time.sleep(0.2)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")  # one write: lines of several processes do not mix
    sys.stderr.flush()
