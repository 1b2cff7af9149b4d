"""Peaks of memory use, on the host and on the device."""

from __future__ import annotations

from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peaks(device: torch.device) -> None:
    """Begins the measurement that `peaks` returns."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if _CLEAR.exists():
        _CLEAR.write_text("5")  # resets the peak of the resident memory to its present size


def peaks(device: torch.device) -> tuple[int | None, int | None]:
    """The peaks since `reset_peaks`, in bytes: of resident host memory (None where not on Linux) and of CUDA memory (or None)."""
    host = None
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        host = 1024 * int(line.split()[1])
    return host, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
