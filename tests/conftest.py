"""Eight virtual CPU devices for every test, set before jax starts."""

import os
import sys

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_flag = "--xla_force_host_platform_device_count"
if _flag not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}=8".strip()


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Compiled programs of a finished file are of no use to the next one, and large."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
