import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from tests import children
from transfer_jax.training import distributed
from transfer_jax.training.distributed import PreemptionGuard, initialize, should_stop

_JOB = """
import json, os, sys, time
import jax
from transfer_jax.training import distributed

distributed.initialize()
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

me = jax.process_index()
mesh = Mesh(np.array(jax.devices()), "x")
rows = np.full(jax.local_device_count(), me + 1.0, np.float32)
x = jax.make_array_from_process_local_data(NamedSharding(mesh, P("x")), rows)
total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "x"), mesh=mesh, in_specs=P("x"),
                              out_specs=P()))
facts = {
    "devices": jax.device_count(),
    "primary": distributed.is_primary(),
    "sum": float(total(x)[0]),
    "one_says_yes": distributed.any_process(me == 1),
    "none_says_yes": distributed.any_process(False),
}
distributed.barrier("ready")
if sys.argv[1] == "late":  # a signal when the work is done: one process leaves, the other waits
    if me == 0:
        os.kill(os.getpid(), 15)
        time.sleep(1.5)
    sys.exit()
with distributed.PreemptionGuard() as guard:
    for stage in range(2):
        for step in range(1, 10 if stage == 0 else 10**9):  # steps start again in each stage
            total(x).block_until_ready()
            time.sleep(0.003 * me)
            if distributed.should_stop(step, guard):
                facts["stopped"] = [stage, step]
                print(json.dumps(facts), flush=True)
                sys.exit()
            if stage == 1 and step == 5:
                open(sys.argv[1] + str(me), "w").close()
"""


def _start(directory, argument):
    (directory / "job.py").write_text(_JOB)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = children.environment(
        devices=2, JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES="2"
    )
    return [
        subprocess.Popen(
            [sys.executable, str(directory / "job.py"), argument],
            env={**environment, "JAX_PROCESS_ID": str(i)},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip


def test_two_processes_compute_agree_and_stop_at_the_same_step(tmp_path):
    processes = _start(tmp_path, str(tmp_path / "ready"))
    try:
        deadline = time.monotonic() + 120
        while not ((tmp_path / "ready0").exists() and (tmp_path / "ready1").exists()):
            assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGTERM)  # to one of them only
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    facts = [json.loads(out.strip().splitlines()[-1]) for out, _ in outputs]
    assert facts[0].pop("primary") and not facts[1].pop("primary")
    assert facts[0] == facts[1]
    assert facts[0].pop("stopped")[0] == 1
    assert facts[0] == {"devices": 4, "sum": 6.0, "one_says_yes": True, "none_says_yes": False}
    assert "process 0 of 2: coordinator at 127.0.0.1" in outputs[0][1]
    assert "process 1 of 2: waits up to 300 s for the coordinator at 127.0.0.1" in outputs[1][1]


def test_a_signal_at_the_very_end_does_not_hang_the_job(tmp_path):
    processes = _start(tmp_path, "late")
    try:
        errors = [process.communicate(timeout=90)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors


def test_a_job_of_one_process_never_touches_jax_distributed(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: pytest.fail("touched"))
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    initialize()
    initialize("127.0.0.1:1", 1, 0)
    assert distributed.is_primary()
    distributed.barrier("alone")
    assert distributed.any_process(True) is True
    assert distributed.any_process(False) is False


@pytest.mark.parametrize(
    "arguments, environment, message",
    [
        (("h:1", 2), {}, "JAX_PROCESS_ID is not set .given: JAX_COORDINATOR_ADDRESS=h:1"),
        ((None, 2, 0), {}, "JAX_COORDINATOR_ADDRESS is not set"),
        (("h:1", 2, 2), {}, "process 2 is none of 0 to 1"),
        (("h:1",), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two' must be an integer"),
        (("nowhere", 2, 1), {}, "'nowhere' is not of the form host:port"),
    ],
)
def test_incomplete_settings_say_what_is_missing(arguments, environment, message, monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        initialize(*arguments)


def test_a_coordinator_that_is_not_there_is_named(capfd):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(TimeoutError, match=f"process 1 of 2 could not reach .* at {address}"):
        initialize(address, 2, 1, timeout=0)
    assert (
        f"process 1 of 2: waits up to 0 s for the coordinator at {address}"
        in capfd.readouterr().err
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_guard_turns_a_signal_into_a_request(number, capfd):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with PreemptionGuard() as guard:
        assert not should_stop(1, guard)
        os.kill(os.getpid(), number)
        assert guard.requested() and should_stop(2, guard)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_interrupt_is_immediate(capfd):
    with PreemptionGuard(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert "press Ctrl-C again" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def test_outside_the_main_thread_the_guard_does_nothing():
    asked = []

    def work():
        with PreemptionGuard() as guard:
            asked.append(guard.requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked == [False]
