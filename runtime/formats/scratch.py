"""Memory that widening needs beside the weight. It is kept from weight to weight.

If it were allocated for each weight, the system would often take it back in between, and clear it page by page for the next one. That
takes longer than the widening.
"""

from __future__ import annotations

import threading

import torch


class Scratch(threading.local):
    """One thread's memory on the CPU, as large as was needed so far."""

    def __init__(self) -> None:
        self._held = torch.empty(0, dtype=torch.uint8, device="cpu")

    def take(self, size: int, device: torch.device) -> torch.Tensor:
        """So many bytes, uint8 `[size]`, of any values. On a CPU they are the thread's until it takes some again."""
        if device.type != "cpu":  # torch keeps the memory of other devices itself
            return torch.empty(size, dtype=torch.uint8, device=device)
        if len(self._held) < size:
            with torch.inference_mode(False):  # what is made in that mode can't be written to outside of it
                self._held = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self._held[:size]


SCRATCH = Scratch()
