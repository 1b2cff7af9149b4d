"""Memory of the host that a CUDA device may read and write itself, while it is registered.

Torch's own pinned memory takes up to twice as much (it rounds up to powers of two), and torch keeps it when it is freed.
"""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from typing import Any

import torch

_PORTABLE_AND_MAPPED = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped: for every device, and for kernels too
_MOST_BYTES = 1 << 39  # of one call; CUDA takes less


class Registration:
    """Says that some memory is registered. It ends with `close`, or when nothing refers to it any more.

    The memory lives at least as long. Before it ends, what the device has begun is waited for.
    """

    def __init__(self, memory: torch.Tensor, device: torch.device):
        self.close = weakref.finalize(self, _unregister, memory, device, os.getpid())


def register(memory: torch.Tensor, device: torch.device) -> Registration | None:
    """Registers `memory`, a contiguous tensor on the CPU, for `device`. Returns None where it can't be locked.

    Its pages must not hold anything else that is registered. Memory that was written before is registered faster. How much
    can be locked, no system says beforehand: containers and WSL2 allow little.
    """
    if not 0 < memory.nbytes < _MOST_BYTES:
        return None
    with torch.cuda.device(device):
        result = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE_AND_MAPPED)
        return Registration(memory, device) if _succeeded(result, device) else None


def _unregister(memory: torch.Tensor, device: torch.device, process: int) -> None:
    if os.getpid() != process:  # a fork has the object, but no CUDA
        return
    with torch.cuda.device(device):
        torch.cuda.synchronize(device)
        _succeeded(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()), device)


def _succeeded(result: Any, device: torch.device) -> bool:
    """Whether a call returned no error. If it did, CUDA keeps the error, and the next operation would raise it: here one does."""
    if int(result) == 0:
        return True
    with suppress(RuntimeError):
        torch.zeros(1, device=device).add_(1)
    return False
