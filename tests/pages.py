"""For tests of memory: the pages that are made, and a CUDA runtime that registers memory and isn't there."""

from __future__ import annotations

import mmap
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from predict_train.runtime import store as store_module

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
ERROR_ALREADY_MAPPED, ERROR_NO_MEMORY = 712, 2


class Pages:
    """All pages that `runtime.store` makes while a test runs."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self._made: list[weakref.ref[mmap.mmap]] = []
        make = store_module._pages

        def pages(size: int) -> mmap.mmap:
            made = make(size)
            self._made.append(weakref.ref(made))
            return made

        patch.setattr(store_module, "_pages", pages)

    @property
    def made(self) -> int:
        return len(self._made)

    @property
    def left(self) -> int:
        """How many are not given back to the system yet."""
        return sum(pages() is not None for pages in self._made)


class Cudart:
    """`torch.cuda.cudart()` and what else registering memory calls.

    It registers at most `limit` bytes at a time. Like CUDA, it keeps the error of a call that fails, and the next operation on
    the device raises it. What is made on CUDA is really made on `made_on`.
    """

    def __init__(self, patch: pytest.MonkeyPatch, limit: int = 1 << 40, made_on: torch.device = CPU):
        self.limit = limit
        self.registered: dict[int, int] = {}
        """Bytes by address."""
        self.calls = 0
        self._error = 0
        zeros = torch.zeros

        def raising(*size: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            if torch.device(device or "cpu").type == "cuda":
                error, self._error = self._error, 0
                if error:
                    raise RuntimeError(f"CUDA error: {error}")
                device = made_on
            return zeros(*size, device=device, **kwargs)

        patch.setattr(torch, "zeros", raising)
        patch.setattr(torch.cuda, "cudart", lambda: self)
        patch.setattr(torch.cuda, "device", lambda _: nullcontext())
        patch.setattr(torch.cuda, "synchronize", lambda _: None)

    @property
    def bytes(self) -> int:
        return sum(self.registered.values())

    def cudaHostRegister(self, begin: int, size: int, flags: int) -> int:  # noqa: N802
        assert self._error == 0, "an error is left of the call before"
        assert flags == 3
        assert 0 < size < 1 << 39
        assert is_mapped(begin, size)
        self.calls += 1
        if any(begin < other + length and other < begin + size for other, length in self.registered.items()):
            self._error = ERROR_ALREADY_MAPPED
        elif self.bytes + size > self.limit:
            self._error = ERROR_NO_MEMORY
        else:
            self.registered[begin] = size
        return self._error

    def cudaHostUnregister(self, begin: int) -> int:  # noqa: N802
        assert self._error == 0, "an error is left of the call before"
        size = self.registered.pop(begin)  # a KeyError where it is not registered, or twice unregistered
        assert is_mapped(begin, size), "its pages are gone already"
        return 0


def is_mapped(begin: int, size: int) -> bool:
    """Whether all pages are this process's."""
    end = begin + size
    for line in Path("/proc/self/maps").read_text().splitlines():  # sorted by address
        low, high = (int(bound, 16) for bound in line.split(maxsplit=1)[0].split("-"))
        if low <= begin < high:
            begin = high
    return begin >= end
