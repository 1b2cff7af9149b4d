"""Weights of eight bits (e4m3) with a scale for each block of 128 by 128, as the checkpoints of DeepSeek-V3 and Qwen3 are shipped.

Widening by `Tensor.to` takes several times as long as all of what is done here: an e4m3 number is moved to the places that its sign,
exponent and mantissa have in a float32, subnormal numbers too. It is then too small by a power of two, by which the scales are
multiplied. No product is rounded by this but where its float32 is rounded, so the weights are those of transformers.
"""

from __future__ import annotations

import torch

from ..errors import StoreError
from .quantized import SCALES, Shaped
from .scratch import SCRATCH, number
from .shipped import ShippedFormat

BLOCK = 128
"""Outputs, and inputs, that share a scale. Weights with fewer are a block by themselves."""
AT_ONCE = 1 << 20
"""Weights that are widened at once, so that they stay in a processor's cache."""
MOVED = 1 << 20
"""By moving e4m3's 7 bits up by 20 places they come to float32's."""
SIGN_AND_MOVED = 0x87F00000 - (1 << 32)
LACKING = 2.0**120
"""The exponent's bias is 7 in e4m3 and 127 in float32."""
MOST = 2.0**7
"""Larger scales, times `LACKING`, would not be finite. Weights near 1 have scales near 1 / 448."""
NOT_A_NUMBER = 0x7F


class Fp8Format(ShippedFormat):
    """`weight = packed * scale of the block`, with `packed` `[outputs, inputs]` and `scales` `[blocks, blocks]`, float32.

    The blocks of `gate_up_proj` do not reach from its gate into its other half.
    """

    @classmethod
    def shapes(cls, name: str, outputs: int, inputs: int) -> tuple[Shaped, Shaped]:
        halves = 2 if name.startswith("gate_up") else 1
        rows, columns = (min(BLOCK, outputs // halves), min(BLOCK, inputs))
        if outputs % (halves * rows) or inputs % columns:
            raise StoreError(
                f"{name} has {outputs // halves} outputs and {inputs} inputs, and blocks of {BLOCK} by {BLOCK} don't divide them; "
                "give a checkpoint that is not quantised"
            )
        packed = torch.Size([outputs, inputs])
        return (torch.float8_e4m3fn, packed), (torch.float32, torch.Size([outputs // rows, inputs // columns]))

    @staticmethod
    def are_sound(name: str, values: torch.Tensor) -> torch.Tensor:
        if name.endswith(SCALES):
            return (values.abs() < MOST).flatten(1).all(1)
        # Expert by expert, since the comparison takes twice their memory.
        return torch.stack([(expert.view(torch.uint8) & NOT_A_NUMBER != NOT_A_NUMBER).all() for expert in values])

    @staticmethod
    def widen(packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        outputs, inputs = packed.shape
        rows, columns = outputs // scales.shape[0], inputs // scales.shape[1]
        factors = (scales * LACKING).repeat_interleave(columns, 1)[:, None]
        at_once = max(1, AT_ONCE // (rows * inputs)) * rows
        wide = torch.empty(outputs, inputs, dtype=dtype, device=packed.device)
        pieces = packed.split(at_once), factors.split(at_once // rows), wide.split(at_once)
        for part, factor, into in zip(*pieces, strict=True):
            _widen(part, factor, into)
        return wide


def _widen(packed: torch.Tensor, factors: torch.Tensor, into: torch.Tensor) -> None:
    """Some rows, of which `factors` `[blocks, 1, inputs]` are the scales."""
    moved = into
    if into.dtype != torch.float32:
        shape = into.shape
        moved = SCRATCH.views(
            ("fp8", shape), 4 * shape.numel(), into.device, lambda m: m.view(torch.float32).view(shape)
        )
    # As signed numbers, so that the sign fills all bits above it.
    bits = moved.view(torch.int32).copy_(packed.view(torch.int8))
    bits.mul_(number(MOVED, torch.int32)).bitwise_and_(number(SIGN_AND_MOVED, torch.int32))
    moved.unflatten(0, (len(factors), -1)).mul_(factors)
    if moved is not into:
        into.copy_(moved)
