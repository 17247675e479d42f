"""What the process asks of the machine that it runs on."""

import ctypes
import platform

# Parameters of mallopt(3), from malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_memory() -> bool:
    """Has the C library keep what is freed for what is allocated next. Call it before JAX starts.

    On CPUs, XLA allocates all temporaries of a step as one block and frees it after the step. By
    default glibc maps blocks of more than 32 MiB anew each time, so that every step touches fresh
    pages, which the kernel finds and clears one by one: of a training step with 75 MiB of
    temporaries that was half the time. With this, freed memory stays with the process, which
    therefore never shrinks below what it once needed. Steps on accelerators are as before.

    Returns:
      Whether it did: False where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No mappings of their own for large blocks, one heap for all threads (others are limited to
    # 64 MiB), which grows in large pieces and is never given back.
    settings = ((_MMAP_MAX, 0), (_ARENA_MAX, 1), (_TOP_PAD, 64 << 20), (_TRIM_THRESHOLD, -1))
    return all([mallopt(parameter, value) for parameter, value in settings])
