"""Eight virtual CPU devices for every test, and quick compilation, set before jax starts."""

import gc
import importlib.metadata
import os
import sys
import tempfile

import pytest

# Most tests compile more than they compute: without LLVM's optimisations, in half the time.
_FLAGS = {"--xla_force_host_platform_device_count": 8, "--xla_backend_optimization_level": 0}
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    # The older of two ways to compile fusions, and the quicker. XLA stops at flags that it does
    # not know, and gives up this one.
    _FLAGS["--xla_cpu_use_fusion_emitters"] = "false"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
for _flag, _value in _FLAGS.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()

# What one file, worker or child process has compiled, the others load, during this session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="compiled-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# Tracing makes many objects and little garbage: at Python's own thresholds a fifth of the time
# goes into looking for it.
gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Compiled programs of a finished file are of no use to the next one, and large."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
