"""Formats of experts: which tensors are in an expert's block of bytes, and how its output is computed from them.

Stores, packed files, copies and slots move blocks without knowing what is in them. Each format is one file of this folder.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from ...predictors.experts import expert_outputs

if TYPE_CHECKING:
    from .full import FullFormat

ALIGNMENT = 64  # bytes; the tensors of a block are aligned like torch's own allocations
PAGE = 4096  # bytes; blocks and slots begin at multiples of it, which direct reads need


class Place(NamedTuple):
    """The place of one tensor of an expert in its block."""

    dtype: torch.dtype
    shape: torch.Size
    offset: int
    """In bytes."""

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def laid_out(tensors: dict[str, tuple[torch.dtype, torch.Size]]) -> tuple[dict[str, Place], int]:
    """Places for tensors one after another, and the size of a block that holds them."""
    places, size = {}, 0
    for name, (dtype, shape) in tensors.items():
        places[name] = Place(dtype, shape, size)
        size += math.ceil(places[name].bytes / ALIGNMENT) * ALIGNMENT
    return places, math.ceil(size / PAGE) * PAGE


@dataclass(frozen=True)
class ExpertFormat(ABC):
    """The places of the tensors in an expert's block, and how its output is computed from them."""

    places: dict[str, Place]
    """By name. Those of unchanged parameters have the parameter's name (`gate_up_proj`, `down_proj`, ...)."""
    bytes: int
    """Size of a block, a multiple of `PAGE`."""

    def views(self, blocks: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors in a block `[bytes]`, or in stacked blocks `[experts, bytes]`, uint8, without a copy."""
        return {
            name: blocks.narrow(-1, place.offset, place.bytes).view(place.dtype).unflatten(-1, place.shape)
            for name, place in self.places.items()
        }

    @property
    @abstractmethod
    def full(self) -> FullFormat:
        """The format of the same experts before they were quantised."""

    @property
    def loaded(self) -> dict[str, Place]:
        """The tensors that a checkpoint gives for each expert, by the names that `write` takes."""
        return self.full.places

    @abstractmethod
    def write(self, name: str, values: torch.Tensor, blocks: torch.Tensor) -> None:
        """Writes the tensor `name` of all experts, one of `loaded`, `values` `[experts, ...]`, into their `blocks` `[experts, bytes]`, uint8.

        Raises `StoreError` where the format can't hold it.
        """

    @abstractmethod
    def read(self, blocks: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parameters in stacked `blocks` `[experts, bytes]`, each `[experts, ...]`, as the model has them."""

    @abstractmethod
    def linear(self, experts: nn.Module, tensors: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
        """The linear layer `name` of an expert of which `tensors` are the `views`; see `predictors.experts.Linear`."""

    def outputs(
        self, experts: nn.Module, tensors: Sequence[dict[str, torch.Tensor]], inputs: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """The unweighted outputs `[rows, hidden]` of some experts for the `inputs` of each, `[n, hidden]`, in their dtype; under
        autocast in the format's own. The rows of the first expert come first.

        `tensors` are each expert's `views`. Only the gate and the norm are taken from `experts`, the model's module.
        """
        kind = inputs[0].device.type
        if not torch.is_autocast_enabled(kind):
            return expert_outputs(experts, tensors, inputs, self.linear)
        with torch.autocast(kind, enabled=False):  # transformers' product knows nothing of autocast
            return expert_outputs(experts, tensors, [x.to(self.full.dtype) for x in inputs], self.linear)
