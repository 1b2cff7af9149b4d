"""What a machine has for a model: memory, and the speeds of its device, its link and its disk. What is not known is measured here."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from ...predictors.errors import UserError
from ..formats import PAGE
from ..registered import register
from ..store import empty_blocks

BLOCK, BLOCKS, READERS = 4 << 20, 48, 2
"""What is copied, or read from a disk, to measure how fast that is."""


@dataclass(frozen=True)
class Machine:
    """Memory in bytes, and speeds in bytes per second."""

    is_cuda: bool
    device_memory: int
    """Free memory of the device. On a CPU it is the host's."""
    memory_bandwidth: float
    """Of the device's memory."""
    link: float
    """From host memory to the device. On a CPU, how fast experts are read from a file."""
    ram: int | None = None
    """Free memory of the host beside a GPU. None where it is not known."""
    disk: float | None = None
    """How fast a GPU's experts are read from a file. None where it is not known."""


def free_ram() -> int:
    """Bytes of host memory that are free, or hold files."""
    return psutil.virtual_memory().available


def measured_bandwidth(device: torch.device) -> float:
    """How fast the memory of a device is read, in bytes per second, by products of a matrix with a vector."""
    matrix = torch.ones(
        1 << 12, 1 << 13, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    vector = torch.ones(1 << 13, device=device, dtype=matrix.dtype)
    return matrix.nbytes / _least_time(lambda: torch.mv(matrix, vector), device)


def measured_link(device: torch.device) -> float:
    """How fast blocks in registered host memory are copied to a CUDA device, in bytes per second."""
    blocks = empty_blocks(8, BLOCK, torch.device("cpu")).zero_()
    registration = register(blocks, device)
    there = torch.empty_like(blocks, device=device)
    seconds = _least_time(lambda: there.copy_(blocks, non_blocking=True), device)
    del registration
    return blocks.nbytes / seconds


def measured_disk(folder: Path) -> float:
    """How fast a file in `folder` is read past the page cache, by two threads, in bytes per second.

    For this it writes a file of 192 MiB, and removes it. Raises `UserError` where that fails.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            for _ in range(BLOCKS):
                file.write(os.urandom(BLOCK))
            file.flush()
            os.fsync(file.fileno())
            return BLOCKS * BLOCK / _reading_time(Path(file.name))
    except OSError as error:
        raise UserError(
            f"how fast {folder} is read can't be measured ({error.strerror}); give the speed of the disk, or name another folder"
        ) from error


def _reading_time(path: Path) -> float:
    """Seconds to read a file in blocks."""
    direct = getattr(os, "O_DIRECT", 0)
    try:
        file = os.open(path, os.O_RDONLY | direct)
        os.preadv(file, [empty_blocks(1, PAGE, torch.device("cpu")).numpy()[0].data], 0)
    except OSError:  # some file systems know no direct reads
        file = os.open(path, os.O_RDONLY)
    with suppress(AttributeError, OSError):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    targets = empty_blocks(BLOCKS, BLOCK, torch.device("cpu")).zero_().numpy()
    try:
        begun = time.perf_counter()
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(lambda n: os.preadv(file, [targets[n].data], n * BLOCK), range(BLOCKS)))
        return time.perf_counter() - begun
    finally:
        os.close(file)


def _least_time(work: Callable[[], object], device: torch.device) -> float:
    """The least seconds of several calls."""
    times = []
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times)
