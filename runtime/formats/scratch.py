"""Memory that widening needs beside the weight. It is kept from weight to weight.

If it were allocated for each weight, the system would often take it back in between, and clear it page by page for the next one. That
takes longer than the widening. Torch also takes some microseconds to make a view of it, or to make a tensor of a number in an
operation, which adds up: so both are kept, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, TypeVar

import torch

Views = TypeVar("Views")


class Scratch(threading.local):
    """One thread's memory on the CPU, as large as was needed so far."""

    def __init__(self) -> None:
        self._held = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._views: dict[Hashable, Any] = {}

    def views(self, key: Hashable, size: int, device: torch.device, make: Callable[[torch.Tensor], Views]) -> Views:
        """What `make` returns for so many bytes, uint8 `[size]`, of any values: views of them.

        On a CPU the bytes are the caller's until the thread asks for some again, and the views are made once for each `key`.
        """
        if device.type != "cpu":  # torch keeps the memory of other devices itself
            return make(torch.empty(size, dtype=torch.uint8, device=device))
        if len(self._held) < size:
            with torch.inference_mode(False):  # what is made in that mode can't be written to outside of it
                self._held = torch.empty(size, dtype=torch.uint8, device="cpu")
            self._views.clear()
        if key not in self._views:
            with torch.inference_mode(False):
                self._views[key] = make(self._held[:size])
        found: Views = self._views[key]
        return found


SCRATCH = Scratch()


@cache
def number(value: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without dimensions, which goes with tensors on all devices."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")
