"""Counting parameters and floating-point operations, and taking traces."""

import logging
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

logger = logging.getLogger(__name__)

# Dense bfloat16 operations per second of one JAX device, by ``device.device_kind`` (float16 for
# T4 and V100, which have no bfloat16 units). A TPU v2 or v3 chip shows as two devices, later
# chips as one. First match wins.
_PEAK_FLOPS = (
    (r"TPU v2", 23e12),
    (r"TPU v3", 61.5e12),
    (r"TPU v4 lite|TPU v4i", 138e12),
    (r"TPU v4", 275e12),
    (r"TPU v5 ?(lite|e)", 197e12),
    (r"TPU v5", 459e12),
    (r"TPU v6 ?(lite|e)", 918e12),
    (r"\bB200\b", 2250e12),
    (r"\bH200\b|\bGH200\b", 989e12),
    (r"\bH100\b.*\bPCIe\b", 756e12),
    (r"\bH100\b.*\bNVL\b", 835e12),
    (r"\bH100\b", 989e12),
    (r"\bA100\b", 312e12),
    (r"\bL4\b", 121e12),
    (r"\bT4\b", 65e12),
    (r"\bV100\b", 125e12),
)


def parameter_count(tree: Any) -> int:
    """Returns the number of array elements in a pytree (arrays or shape structures)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape"))


def compiled_flops(compiled: Any) -> float | None:
    """Returns XLA's count of floating-point operations of one call, None if it gives none.

    The count is of the program that one device runs. The body of a loop (``lax.scan``) is counted
    once, however often it runs.

    Args:
      compiled: what ``jax.jit(f).lower(...).compile()`` returns.
    """
    try:
        analysis = compiled.cost_analysis()
    except NotImplementedError:  # some plug-in backends
        return None
    if isinstance(analysis, (list, tuple)):  # older JAX: one dictionary per program
        analysis = analysis[0] if analysis else None
    flops = (analysis or {}).get("flops")
    return float(flops) if flops is not None and flops > 0 else None


def peak_flops(device: jax.Device) -> float | None:
    """Returns the dense bfloat16 peak of a device in operations per second, None if unknown."""
    if device.platform == "cpu":
        return None
    for pattern, flops in _PEAK_FLOPS:
        if re.search(pattern, device.device_kind):
            return flops
    return None


def model_flops_utilisation(
    flops_per_step: float | None, seconds: float, devices: Sequence[jax.Device]
) -> float | None:
    """Returns the fraction of the devices' peak that a step reached, None if it is unknown.

    Args:
      flops_per_step: operations of one step over all devices (``compiled_flops`` times the number
        of devices).
      seconds: duration of one step.
      devices: the devices that took part.
    """
    peaks = [peak_flops(device) for device in devices]
    if flops_per_step is None or seconds <= 0 or not peaks or None in peaks:
        return None
    return flops_per_step / (seconds * math.fsum(p for p in peaks if p is not None))


class ProfileWindow:
    """Traces the steps ``start <= step < stop`` with ``jax.profiler``.

        with ProfileWindow(directory, 10, 13) as profile:
            for step in range(steps):
                profile.step(step)      # before the step runs
                ...

    Args:
      directory: where TensorBoard and Perfetto find the trace.
      start: first step to trace; None for no trace at all.
      stop: first step not to trace. A run that ends sooner closes the trace.

    Raises:
      ValueError: ``stop`` does not come after ``start``.
    """

    def __init__(
        self, directory: str | os.PathLike[str], start: int | None = None, stop: int | None = None
    ):
        if start is not None and (stop is None or stop <= start):
            raise ValueError(f"the profile must stop after it starts: start={start}, stop={stop}.")
        self._directory, self._start, self._stop = os.fspath(directory), start, stop
        self._active = False

    def step(self, step: int) -> None:
        """Starts or stops the trace if ``step``, about to run, is where that happens."""
        if self._start is None or self._stop is None:
            return
        if self._active and step >= self._stop:
            self._end()
        elif not self._active and self._start <= step < self._stop:
            try:
                jax.profiler.start_trace(self._directory)
                self._active = True
            except RuntimeError as error:  # somebody else is tracing this process
                logger.warning("no profile is taken: %s", error)
                self._start = None

    def _end(self) -> None:
        self._active = False
        self._start = None
        jax.profiler.stop_trace()

    def __enter__(self) -> "ProfileWindow":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._active:
            self._end()
