import subprocess
import sys

import pytest

from tests.children import environment
from transfer_jax.training import keep_memory

# Minor page faults of a step with 95 MiB of temporaries: the median of ten. Steps may overlap with
# the release of what the step before has used, so that the first few still grow the heap.
_FAULTS = """
import resource, statistics, sys
from transfer_jax.training import keep_memory
if sys.argv[1] == "kept" and not keep_memory():
    raise SystemExit("not glibc")
import jax, jax.numpy as jnp
step = jax.jit(lambda x: (jnp.sin(x[:, None] * x) @ x).sum())
x = jnp.linspace(0.0, 1.0, 5000)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(int(statistics.median([faults() for _ in range(20)][10:])))
print(step.lower(x).compile().memory_analysis().temp_size_in_bytes // resource.getpagesize())
"""


def faults(what):
    command = [sys.executable, "-c", _FAULTS, what]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    if "not glibc" in done.stderr:
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def test_memory_is_kept():
    without, pages = faults("plain")
    kept, same = faults("kept")
    assert pages == same
    if without < pages / 2:
        pytest.skip("this kernel does not count the faults, or maps large pages")
    assert kept < pages / 20


@pytest.mark.parametrize("platforms", ["cuda", "tpu,cpu"])
def test_nothing_is_changed_for_accelerators(platforms, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert not keep_memory()
