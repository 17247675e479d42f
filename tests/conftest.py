"""Eight virtual CPU devices for every test, and quick compilation, set before jax starts."""

import os
import sys

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
for _flag, _value in (
    ("--xla_force_host_platform_device_count", 8),
    # Most tests compile more than they compute: without LLVM's optimisations, in half the time.
    ("--xla_backend_optimization_level", 0),
):
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Compiled programs of a finished file are of no use to the next one, and large."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
