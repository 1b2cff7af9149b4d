"""How a process keeps memory that is free: much, which saves time, or little, where there is little."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


PRIMITIVES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def spare_memory() -> None:
    """Has torch's products on a CPU keep fewer of what they prepare for each shape, in a process that has not computed yet.

    In bfloat16 it prepares something for each number of rows, and an expert may have any. By default it keeps a thousand of them,
    which are hundreds of megabytes.
    """
    os.environ.setdefault(PRIMITIVES, "64")


def keep_freed_memory() -> None:
    """Makes this process's malloc keep freed memory, if it is glibc's; otherwise does nothing.

    A pass or a training step frees all its tensors at its end. By default malloc gives them back to the system, and the
    next one causes a page fault for each new page: on a virtual machine that took a tenth of a collection's time. The
    peak stays.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
