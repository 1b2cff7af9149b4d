"""The form of an expert in memory: a block of bytes, the tensors in it, and the expert's output from these tensors.

Stores, packed files, copies and slots move blocks and know nothing of what is in them. Each format is a file of this folder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

ALIGNMENT = 64  # bytes; every tensor of a block is as well aligned as torch's own allocations
PAGE = 4096  # bytes; blocks and slots begin at multiples of it, which direct reads ask for


class Place(NamedTuple):
    """One tensor of an expert within its block."""

    dtype: torch.dtype
    shape: torch.Size
    offset: int
    """Counted in bytes."""

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class ExpertFormat(ABC):
    """Which tensors lie where in the block of an expert, and how its output is computed from them."""

    places: dict[str, Place]
    """By the name of the parameter (`gate_up_proj`, `down_proj`, ...)."""
    bytes: int
    """Of a block, with the padding to a multiple of `PAGE`."""

    def views(self, blocks: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors in a block `[bytes]`, or in stacked ones `[experts, bytes]`, uint8, without a copy."""
        return {
            name: blocks.narrow(-1, place.offset, place.bytes).view(place.dtype).unflatten(-1, place.shape)
            for name, place in self.places.items()
        }

    @abstractmethod
    def output(self, experts: nn.Module, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """One expert's unweighted output `[n, hidden]` for `x` `[n, hidden]`, in the dtype of `x`.

        `tensors` are the expert's `views`. Of `experts`, the model's module, only the gate and the norm are read.
        """
