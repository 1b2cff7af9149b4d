"""Every expert of a model as one contiguous block, hence one copy: how a block is laid out, and blocks in host memory."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..predictors.architecture import MoELayer
from ..predictors.errors import UserError

ALIGNMENT = 64  # bytes; keeps every tensor of a block as well aligned as torch's own allocations
PAGE = 4096  # bytes; blocks and slots begin at multiples of it, which direct reads ask for

Bytes = NDArray[np.uint8]


class StoreError(UserError):
    """Experts that can't be stored, read or held; the message says why and what to do."""


@dataclass(frozen=True)
class BlockLayout:
    """Where the tensors of one expert lie within its block."""

    dtype: torch.dtype
    shapes: dict[str, torch.Size]
    """By parameter name (`gate_up_proj`, `down_proj`, ...), the shape of one expert's part."""
    offsets: dict[str, int]
    """Counted in elements."""
    size: int
    """Elements of a block, padding to a multiple of `PAGE` bytes included."""

    @property
    def bytes(self) -> int:
        return self.size * self.dtype.itemsize

    def views(self, block: torch.Tensor) -> dict[str, torch.Tensor]:
        """One expert's tensors as views of its block `[size]`, or all experts' of stacked blocks `[experts, size]`."""
        return {
            name: block.narrow(-1, self.offsets[name], shape.numel()).unflatten(-1, shape)
            for name, shape in self.shapes.items()
        }


def block_layout(experts: nn.Module) -> BlockLayout:
    """The layout of one expert of a stacked experts module. Raises `StoreError` where its tensors differ in dtype."""
    parameters = dict(experts.named_parameters(recurse=False))
    dtypes = {p.dtype for p in parameters.values()}
    if len(dtypes) != 1:
        raise StoreError(f"the experts mix the dtypes {sorted(map(str, dtypes))}; load the model in one dtype")
    (dtype,) = dtypes
    unit = ALIGNMENT // dtype.itemsize
    offsets, size = {}, 0
    for name, parameter in parameters.items():
        offsets[name] = size
        size += math.ceil(parameter[0].numel() / unit) * unit
    page = PAGE // dtype.itemsize
    size = math.ceil(size / page) * page
    return BlockLayout(dtype, {name: p.shape[1:] for name, p in parameters.items()}, offsets, size)


def common_layout(modules: list[nn.Module]) -> BlockLayout:
    """The layout that all experts modules of a model have. Raises `StoreError` where they differ."""
    layouts = [block_layout(experts) for experts in modules]
    if any(layout != layouts[0] for layout in layouts):
        raise StoreError("the experts of this model's layers differ in shape; offloading needs them alike")
    return layouts[0]


def empty_blocks(count: int, layout: BlockLayout, device: torch.device, pinned: bool = False) -> torch.Tensor:
    """Memory for blocks, `[count, layout.size]`, that in host memory begins at a multiple of `PAGE`.

    Raises `StoreError` where the device has not that much.
    """
    size = count * layout.bytes
    try:
        if device.type != "cpu":
            return torch.empty(count, layout.size, dtype=layout.dtype, device=device)
        if pinned:
            memory = torch.empty(size + PAGE, dtype=torch.uint8, pin_memory=True)
            begin = -memory.data_ptr() % PAGE
            memory = memory[begin : begin + size]
        else:
            memory = torch.frombuffer(_pages(size), dtype=torch.uint8)
    except (RuntimeError, OSError, OverflowError) as error:  # on CUDA torch raises a RuntimeError, `mmap` the others
        kind = "pinned memory" if pinned else str(device)
        raise StoreError(
            f"{count} experts take {size / 2**30:.1f} GiB, which {kind} has not left; ask for fewer slots or a packed file"
        ) from error
    return memory.view(layout.dtype).view(count, layout.size)


def _pages(size: int) -> mmap.mmap:
    """Host memory in huge pages where the system has them: a direct read into small ones takes half as long again."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system may know the word and have none
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def as_bytes(blocks: torch.Tensor) -> Bytes:
    """Blocks in host memory as bytes, without a copy: `[..., size]` becomes `[..., layout.bytes]`."""
    return blocks.view(torch.uint8).numpy()


class ExpertStore(Protocol):
    """Where all experts of a model are. `layer` counts the MoE layers from 0, in the model's order."""

    layout: BlockLayout

    def read(self, layer: int, expert: int, into: Bytes) -> None:
        """Fills `into` `[layout.bytes]`, which begins at a multiple of `PAGE`, with the block of one expert.

        Several threads may call it at once. Raises `StoreError` where the block can't be had.
        """

    def restore(self) -> None:
        """Puts the model's expert parameters back as they were before the store took them."""

    def close(self) -> None:
        """Gives back what the store holds. Nothing is read from it afterwards."""


class HostStore:
    """The experts of all MoE layers, as blocks `[experts, block]` per layer in host memory, pinned for CUDA.

    While the store holds them, the model's own expert parameters are views of these blocks, so there is one copy of
    each weight, and `state_dict` and `save_pretrained` go on working. `restore` gives the parameters their own memory
    back, where it was.
    """

    def __init__(self, layers: list[MoELayer], pinned: bool):
        self.layout = common_layout([layer.experts for layer in layers])
        self.blocks: list[torch.Tensor] = []
        self._bytes: list[Bytes] = []
        self._parameters: list[dict[str, nn.Parameter]] = []
        self._devices: list[torch.device] = []
        try:
            for layer in layers:
                self._take(layer, pinned)
        except BaseException:
            self.restore()
            raise

    def _take(self, layer: MoELayer, pinned: bool) -> None:
        blocks = empty_blocks(layer.num_experts, self.layout, torch.device("cpu"), pinned)
        parameters = dict(layer.experts.named_parameters(recurse=False))
        views = self.layout.views(blocks)
        for name, view in views.items():
            view.copy_(parameters[name].data)
        self._devices.append(next(iter(parameters.values())).device)
        self._parameters.append(parameters)
        self.blocks.append(blocks)
        self._bytes.append(as_bytes(blocks))
        for name, view in views.items():
            parameters[name].data = view

    def block(self, layer: int, expert: int) -> torch.Tensor:
        """The block `[size]` of one expert."""
        return self.blocks[layer][expert]

    def read(self, layer: int, expert: int, into: Bytes) -> None:
        np.copyto(into, self._bytes[layer][expert])

    def restore(self) -> None:
        """Gives the model's expert parameters memory of their own again, on the device they came from."""
        self._bytes.clear()
        while self._parameters:  # layer by layer, so that no more than one layer stands twice in memory
            device = self._devices.pop()
            for parameter in self._parameters.pop().values():
                parameter.data = parameter.data.to(device, copy=True, memory_format=torch.contiguous_format)
            self.blocks.pop()

    def close(self) -> None:
        self.blocks.clear()
        self._bytes.clear()
