"""Weights of eight bits with one scale for each output."""

from __future__ import annotations

import torch

from .made import MadeFormat
from .quantized import COMPUTED, Shaped

MOST = 127
PIECE = 16
"""Inputs that torch's kernel for CPUs reads at once. It does not notice the end of a row, so other widths are not given to it."""


class Int8Format(MadeFormat):
    """`weight = packed * scale`, with `packed` int8 `[outputs, inputs]` and `scales` `[outputs]`."""

    @classmethod
    def shapes(cls, name: str, outputs: int, inputs: int) -> tuple[Shaped, Shaped]:  # noqa: ARG003
        return (torch.int8, torch.Size([outputs, inputs])), (COMPUTED, torch.Size([outputs]))

    @staticmethod
    def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scales = (weight.abs().amax(1) / MOST).to(COMPUTED)
        steps = scales.float().clamp(min=torch.finfo(COMPUTED).tiny)[:, None]  # a row of zeros has scale 0
        return (weight / steps).round().clamp(-MOST, MOST).to(torch.int8), scales

    @staticmethod
    def widen(packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (packed.float() * scales.float()[:, None]).to(dtype)

    @staticmethod
    def multiply(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor | None:
        if x.shape[1] % PIECE:
            return None
        return torch.ops.aten._weight_int8pack_mm(x, packed, scales)
