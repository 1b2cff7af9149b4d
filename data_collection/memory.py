"""How the C library keeps the memory that a pass or a training step frees and the next one takes again."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """Has this process's malloc keep what is freed, where it is glibc's; elsewhere nothing happens.

    A recorded pass holds what it records until its end and then frees all of it at once, as a training step does its states.
    Left to itself, malloc gives that back to the system, and the next one touches new pages, each of them a fault: on a
    virtual machine that took a tenth of a collection's time. The most memory that is in use stays the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
