"""What quantised formats have in common: each weight is packed with its scales, and biases are unchanged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn

from . import ExpertFormat, Place, laid_out
from .full import FullFormat

Shaped = tuple[torch.dtype, torch.Size]
SCALES = "_scales"
"""The scales of the weight `down_proj` are called `down_proj_scales`."""
COMPUTED = torch.bfloat16
"""The dtype of the scales that are made here. On a CPU the products with weights that are not widened are computed in it, whatever
the model's dtype: torch's kernels are fast in no other."""


@dataclass(frozen=True)
class QuantizedFormat(ExpertFormat):
    """Weights in few bits, `[outputs, inputs]` whatever way the model has them."""

    unquantized: FullFormat
    is_transposed: bool
    """Whether the model's weights are `[inputs, outputs]`."""

    @property
    def full(self) -> FullFormat:
        return self.unquantized

    @classmethod
    def of(cls, full: FullFormat, is_transposed: bool, rooms: Mapping[str, int] | None = None) -> Self:  # noqa: ARG003
        """The quantised format of experts of format `full`. Raises `StoreError` where a weight can't be packed.

        `rooms` are the bytes of each weight, for a format that has no size of its own.
        """
        tensors = {}
        for name, place in full.places.items():
            if len(place.shape) != 2:
                tensors[name] = place[:2]
                continue
            packed, scales = cls.shapes(name, *_extent(place, is_transposed))
            tensors |= {name: packed, name + SCALES: scales}
        return cls(*laid_out(tensors), full, is_transposed)

    @classmethod
    @abstractmethod
    def shapes(cls, name: str, outputs: int, inputs: int) -> tuple[Shaped, Shaped]:
        """Dtype and shape of a packed weight, and of its scales. Raises `StoreError` where it can't be packed."""

    @staticmethod
    @abstractmethod
    def widen(packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight `[outputs, inputs]` in `dtype`, on the device of `packed`."""

    @staticmethod
    def multiply(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor | None:  # noqa: ARG004
        """`x` `[n, inputs]`, contiguous, on a CPU and in `COMPUTED`, times a weight: `[n, outputs]`.

        None where there is no kernel for it. The weight is widened then.
        """
        return None

    def extent_of(self, name: str) -> tuple[int, int]:
        """Outputs and inputs of a weight."""
        return _extent(self.full.places[name], self.is_transposed)

    def read(self, blocks: torch.Tensor) -> dict[str, torch.Tensor]:
        views, found = self.views(blocks), {}
        for name, place in self.full.places.items():
            found[name] = torch.empty(len(blocks), *place.shape, dtype=place.dtype, device=blocks.device)
            for expert, values in enumerate(found[name]):
                if name + SCALES in views:
                    wide = self.widen(views[name][expert], views[name + SCALES][expert], place.dtype)
                    values.copy_(wide.mT if self.is_transposed else wide)
                else:
                    values.copy_(views[name][expert])
        return found

    def linear(self, experts: nn.Module, tensors: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        packed, scales, bias = tensors[name], tensors[name + SCALES], tensors.get(f"{name}_bias")
        output = None if x.device.type != "cpu" else self.multiply(x.to(COMPUTED).contiguous(), packed, scales)
        output = F.linear(x, self.widen(packed, scales, x.dtype)) if output is None else output.to(x.dtype)
        return output if bias is None else output.add_(bias)


def _extent(place: Place, is_transposed: bool) -> tuple[int, int]:
    outputs, inputs = reversed(place.shape) if is_transposed else place.shape
    return outputs, inputs
