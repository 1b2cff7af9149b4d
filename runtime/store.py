"""Every expert of a model, packed in host memory: one expert is one contiguous block, hence one copy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from predictors.architecture import MoELayer
from predictors.errors import UserError

ALIGNMENT = 64  # bytes; keeps every tensor of a block as well aligned as torch's own allocations


@dataclass(frozen=True)
class BlockLayout:
    """Where the tensors of one expert lie within its block."""

    dtype: torch.dtype
    shapes: dict[str, torch.Size]
    """By parameter name (`gate_up_proj`, `down_proj`, ...), the shape of one expert's part."""
    offsets: dict[str, int]
    """Counted in elements."""
    size: int
    """Elements of a block, padding included."""

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
    """The layout of one expert of a stacked experts module. Raises `UserError` where its tensors differ in dtype."""
    parameters = dict(experts.named_parameters(recurse=False))
    dtypes = {p.dtype for p in parameters.values()}
    if len(dtypes) != 1:
        raise UserError(f"the experts mix the dtypes {sorted(map(str, dtypes))}; load the model in one dtype")
    (dtype,) = dtypes
    unit = math.lcm(ALIGNMENT, dtype.itemsize) // dtype.itemsize
    offsets, size = {}, 0
    for name, parameter in parameters.items():
        offsets[name] = size
        size += math.ceil(parameter[0].numel() / unit) * unit
    return BlockLayout(dtype, {name: p.shape[1:] for name, p in parameters.items()}, offsets, size)


class ExpertStore:
    """The experts of all MoE layers, as blocks `[experts, block]` per layer in host memory, pinned for CUDA.

    While the store holds them, the model's own expert parameters are views of these blocks, so there is one copy of
    each weight, and `state_dict` and `save_pretrained` go on working. `restore` gives the parameters their own memory
    back, where it was.
    """

    def __init__(self, layers: list[MoELayer], pinned: bool):
        layouts = [block_layout(layer.experts) for layer in layers]
        if any(layout != layouts[0] for layout in layouts):
            raise UserError("the experts of this model's layers differ in shape; offloading needs them alike")
        self.layout = layouts[0]
        self.num_experts = [layer.num_experts for layer in layers]
        self.blocks: list[torch.Tensor] = []
        self._parameters: list[dict[str, nn.Parameter]] = []
        self._devices: list[torch.device] = []
        for layer in layers:
            parameters = dict(layer.experts.named_parameters(recurse=False))
            blocks = torch.empty(layer.num_experts, self.layout.size, dtype=self.layout.dtype, pin_memory=pinned)
            self._devices.append(next(iter(parameters.values())).device)
            for name, view in self.layout.views(blocks).items():
                view.copy_(parameters[name].data)
                parameters[name].data = view
            self.blocks.append(blocks)
            self._parameters.append(parameters)

    def block(self, layer: int, expert: int) -> torch.Tensor:
        """The block `[size]` of one expert; `layer` counts the MoE layers from 0."""
        return self.blocks[layer][expert]

    def restore(self) -> None:
        """Gives the model's expert parameters memory of their own again, on the device they came from."""
        for parameters, device in zip(self._parameters, self._devices, strict=True):
            for parameter in parameters.values():
                parameter.data = parameter.data.to(device, copy=True, memory_format=torch.contiguous_format)
        self.blocks.clear()
