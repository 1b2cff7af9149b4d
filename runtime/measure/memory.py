"""The most memory that was in use, of the host and of the device."""

from __future__ import annotations

from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peaks(device: torch.device) -> None:
    """What `peaks` tells is counted from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if _CLEAR.exists():
        _CLEAR.write_text("5")  # sets the peak of the resident memory back to what it is now


def peaks(device: torch.device) -> tuple[int | None, int | None]:
    """Most bytes of resident host memory (Linux) and of device memory since `reset_peaks`."""
    host = None
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        host = 1024 * int(line.split()[1])
    return host, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
