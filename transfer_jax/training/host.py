"""What the process asks of the machine that it runs on."""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform

# Parameters of mallopt(3), from malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_memory() -> bool:
    """Has the C library keep what is freed for what is allocated next. Call it before JAX starts.

    On CPUs, XLA allocates all temporaries of a step as one block and frees it after the step. By
    default glibc maps blocks of more than 32 MiB anew each time, so that every step touches fresh
    pages, which the kernel finds and clears one by one: of a training step with 75 MiB of
    temporaries that was half the time. With this, freed memory stays with the process, which
    therefore never shrinks below what it once needed.

    Nothing is changed where JAX may use an accelerator (``JAX_PLATFORMS`` names one first, or names
    none and a plugin for one is installed), or where the C library is not glibc.

    Returns:
      Whether it was.
    """
    if platform.libc_ver()[0] != "glibc" or not _computes_on_cpu():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No mappings of their own for large blocks, one heap for all threads (others are limited to
    # 64 MiB), which grows in large pieces and is never given back.
    settings = ((_MMAP_MAX, 0), (_ARENA_MAX, 1), (_TOP_PAD, 64 << 20), (_TRIM_THRESHOLD, -1))
    return all([mallopt(parameter, value) for parameter, value in settings])


def _computes_on_cpu() -> bool:
    chosen = os.environ.get("JAX_PLATFORMS")
    if chosen:
        return chosen.split(",")[0] == "cpu"
    # How JAX finds plugins, and the one that it knows by name.
    found = importlib.metadata.entry_points(group="jax_plugins")
    return not found and not any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
