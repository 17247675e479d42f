"""What the benchmarks measure with: the median time of a call, and the memory of this process."""

import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def resident() -> float:
    """MiB of this process now."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024


def peak() -> float:
    """MiB of this process at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def median(step: Callable[[], Any], budget: float, most: int = 30) -> float:
    """Seconds of a call, after two that warm up; at least 3 calls, at most ``most``."""
    for _ in range(2):
        step()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget and len(times) < most):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return float(np.median(times))
