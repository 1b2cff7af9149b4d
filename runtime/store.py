"""Stores: they hold all experts of a model, as blocks. Here are their interface and the store in host memory."""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..predictors.architecture import MoELayer
from .errors import StoreError
from .formats import PAGE, ExpertFormat
from .formats.full import FullFormat

Bytes = NDArray[np.uint8]


def empty_blocks(count: int, size: int, device: torch.device, pinned: bool = False) -> torch.Tensor:
    """Memory for blocks of `size` bytes, uint8 `[count, size]`. In host memory it begins at a multiple of `PAGE`.

    Raises `StoreError` where the device has too little memory.
    """
    try:
        if device.type != "cpu":
            return torch.empty(count, size, dtype=torch.uint8, device=device)
        if pinned:
            memory = torch.empty(count * size + PAGE, dtype=torch.uint8, pin_memory=True)
            begin = -memory.data_ptr() % PAGE
            memory = memory[begin : begin + count * size]
        else:
            memory = torch.frombuffer(_pages(count * size), dtype=torch.uint8)
    except (RuntimeError, OSError, OverflowError) as error:  # on CUDA torch raises a RuntimeError, `mmap` the others
        kind = "pinned memory" if pinned else str(device)
        raise StoreError(
            f"{count} experts take {count * size / 2**30:.1f} GiB, which {kind} has not left; ask for fewer slots or a packed file"
        ) from error
    return memory.view(count, size)


def _pages(size: int) -> mmap.mmap:
    """Host memory, in huge pages where the system has them: a direct read into small pages takes half as long again."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # the system may know huge pages and have none
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


class ExpertStore(Protocol):
    """Holds all experts of a model. Whoever opens a store closes it."""

    format: ExpertFormat
    extent: tuple[int, int]
    """The number of MoE layers, and of experts in each."""

    def read(self, layer: int, expert: int, into: Bytes) -> None:
        """Fills `into` `[format.bytes]`, which begins at a multiple of `PAGE`, with the block of one expert.

        `layer` counts the MoE layers from 0, in the model's order. Several threads may call it at once. Raises
        `StoreError` where the block can't be read.
        """

    def close(self) -> None:
        """Frees what the store holds, and gives the model back what it took. The store is not read afterwards."""


class HostStore:
    """The experts in host memory, pinned for CUDA: blocks `[experts, bytes]`, uint8, for each MoE layer.

    While the store is open, the model's expert parameters are views of these blocks. So each weight is in memory once, and
    `state_dict` and `save_pretrained` work. `close` gives the parameters their own memory again.
    """

    def __init__(self, layers: list[MoELayer], pinned: bool):
        self.format: ExpertFormat = FullFormat.common([layer.experts for layer in layers])
        self.extent = len(layers), layers[0].num_experts
        self.blocks: list[torch.Tensor] = []
        self._bytes: list[Bytes] = []
        self._parameters: list[dict[str, nn.Parameter]] = []
        self._devices: list[torch.device] = []
        try:
            for layer in layers:
                self._take(layer, pinned)
        except BaseException:
            self.close()
            raise

    def _take(self, layer: MoELayer, pinned: bool) -> None:
        blocks = empty_blocks(layer.num_experts, self.format.bytes, torch.device("cpu"), pinned)
        parameters = dict(layer.experts.named_parameters(recurse=False))
        views = self.format.views(blocks)
        for name, view in views.items():
            view.copy_(parameters[name].data)
        self._devices.append(next(iter(parameters.values())).device)
        self._parameters.append(parameters)
        self.blocks.append(blocks)
        self._bytes.append(blocks.numpy())
        for name, view in views.items():
            parameters[name].data = view

    def block(self, layer: int, expert: int) -> torch.Tensor:
        """The block `[bytes]` of one expert."""
        return self.blocks[layer][expert]

    def read(self, layer: int, expert: int, into: Bytes) -> None:
        np.copyto(into, self._bytes[layer][expert])

    def close(self) -> None:
        self._bytes.clear()
        while self._parameters:  # layer by layer, so that only one layer is in memory twice
            device = self._devices.pop()
            for parameter in self._parameters.pop().values():
                parameter.data = parameter.data.to(device, copy=True, memory_format=torch.contiguous_format)
            self.blocks.pop()
