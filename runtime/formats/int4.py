"""Weights of four bits in groups of 64 inputs, each with a scale and a zero.

Scale and zero are those with the least squared error. They are found in turns: the best codes for a scale and a zero, and then
the best scale and zero for these codes, which is a linear regression.
"""

from __future__ import annotations

from functools import cache

import torch

from ..errors import StoreError
from .made import MadeFormat
from .quantized import COMPUTED, Shaped

GROUP = 64
"""Inputs that share a scale and a zero."""
TILE = 64
"""Outputs that lie side by side, in pairs of two to a byte, as torch's kernel for CPUs with AVX-512 reads them."""
MIDDLE, MOST = 8, 15
STEPS = 10
"""More turns bring less than a thousandth of the error."""
AT_ONCE = 1 << 14
"""Weights that are quantised at once, so that they stay in a processor's cache."""


class Int4Format(MadeFormat):
    """`weight = (packed - 8) * scale + zero`.

    `packed` is uint8 `[outputs / 64, inputs, 32]`: byte j of a row has output j of 64 in its low bits and output j + 32 in its
    high bits. `scales` is `[inputs / 64, outputs, 2]`: scale and zero.
    """

    @classmethod
    def shapes(cls, name: str, outputs: int, inputs: int) -> tuple[Shaped, Shaped]:
        if outputs % TILE or inputs % GROUP:
            raise StoreError(
                f"{name} has {outputs} outputs and {inputs} inputs, and int4 needs multiples of {GROUP}; use int8"
            )
        packed = torch.Size([outputs // TILE, inputs, TILE // 2])
        return (torch.uint8, packed), (COMPUTED, torch.Size([inputs // GROUP, outputs, 2]))

    @staticmethod
    def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = weight.split(max(1, AT_ONCE // weight.shape[1]))
        codes, scales = map(torch.cat, zip(*map(_quantized, parts), strict=True))
        low, high = codes.unflatten(0, (-1, 2, TILE // 2)).unbind(1)
        return (low | high << 4).transpose(1, 2), scales.transpose(0, 1)

    @staticmethod
    def widen(packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        codes = torch.stack([packed & 15, packed >> 4], dim=1).permute(0, 1, 3, 2).flatten(0, 2)
        step, zero = scales.float().transpose(0, 1).unsqueeze(-1).unbind(2)
        return ((codes.float() - MIDDLE).unflatten(1, (-1, GROUP)) * step + zero).flatten(1).to(dtype)

    @staticmethod
    def multiply(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor | None:
        if not kernel_reads_tiles():
            return None
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed.view(-1, x.shape[1] // 2), GROUP, scales)


def _quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `[outputs, inputs]`, uint8, and `[outputs, inputs / 64, 2]`: scales and zeros."""
    values, least = weight.unflatten(1, (-1, GROUP)), torch.finfo(COMPUTED).tiny
    zero, mean = values.amin(-1, keepdim=True), values.mean(-1, keepdim=True)
    step = ((values.amax(-1, keepdim=True) - zero) / MOST).clamp_(min=least)
    for _ in range(STEPS):
        codes = ((values - zero) / step).round_().clamp_(0, MOST)
        middle = codes.mean(-1, keepdim=True)
        codes -= middle
        steps = (codes * values).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True).clamp_(min=least)
        step = steps.clamp_(min=least)
        zero = mean - step * middle
    scales = torch.cat([step, zero + MIDDLE * step], -1).to(COMPUTED)
    step, zero = scales.float().unsqueeze(-2).unbind(-1)  # rounded as they are stored
    codes = ((values - zero) / step + MIDDLE).round_().clamp_(0, MOST)
    return codes.to(torch.uint8).flatten(1), scales


@cache
def kernel_reads_tiles() -> bool:
    """Whether torch's kernel on this CPU reads weights in the order of this format."""
    codes = torch.arange(TILE * GROUP, dtype=torch.int32).view(TILE, GROUP) * 7 % 16
    expected = (codes[: TILE // 2] | codes[TILE // 2 :] << 4).T.flatten()
    try:
        return torch.equal(
            torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1).flatten(), expected.to(torch.uint8)
        )
    except RuntimeError:
        return False
