"""The environment of the processes that tests start."""

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent
_DEVICES = "--xla_force_host_platform_device_count"


def environment(devices=1, **others):
    """This process's, quick compilation and shared programs included, with its own devices."""
    flags = [f for f in os.environ["XLA_FLAGS"].split() if not f.startswith(_DEVICES)]
    return {
        **os.environ, "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": " ".join([*flags, f"{_DEVICES}={devices}"]), **others,
    }  # fmt: skip
