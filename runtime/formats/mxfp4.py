"""Weights of four bits (e2m1) in groups of 32 inputs, each with a power of two as its scale: MXFP4, as gpt-oss is shipped.

As in `fp8`, the bits of a number are moved to the places that they have in a bfloat16, which is then too small by a power of two.
Scales are made greater by it. A bfloat16 holds every such weight exactly.
"""

from __future__ import annotations

import torch

from ..errors import StoreError
from .quantized import SCALES, Shaped
from .shipped import ShippedFormat

GROUP = 32
"""Inputs that share a scale."""
AT_ONCE = 1 << 18
"""Weights that are widened at once, so that they stay in a processor's cache."""
MOST = 128
"""The largest exponent that is read, which stands for 2. Greater ones, times what is lacking, would not be finite."""
LACKING = 126
"""The exponent's bias is 1 in e2m1 and 127 in bfloat16. A scale has the same bias as bfloat16."""
SIGN, NUMBER = 0x80008000 - (1 << 32), 0x01C001C0
"""Where the sign and the other bits of two numbers are, in two bfloat16 side by side."""


class Mxfp4Format(ShippedFormat):
    """`weight = number * 2 ** (scale - 127)`, with uint8 scales `[outputs, inputs / 32]`.

    `packed` is uint8 `[outputs, inputs / 32, 16]`: a byte has an even input in its low bits and the next one in its high bits.
    """

    @classmethod
    def shapes(cls, name: str, outputs: int, inputs: int) -> tuple[Shaped, Shaped]:
        if inputs % GROUP:
            raise StoreError(
                f"{name} has {inputs} inputs, and groups of {GROUP} don't divide them; give a checkpoint that is not quantised"
            )
        groups = torch.Size([outputs, inputs // GROUP])
        return (torch.uint8, torch.Size([*groups, GROUP // 2])), (torch.uint8, groups)

    @staticmethod
    def are_sound(name: str, values: torch.Tensor) -> torch.Tensor:
        if name.endswith(SCALES):
            return (values <= MOST).flatten(1).all(1)
        return torch.ones(len(values), dtype=torch.bool)

    @staticmethod
    def widen(packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        outputs, groups, _ = packed.shape
        factors = (scales.to(torch.int16) + LACKING).bitwise_left_shift_(7).view(torch.bfloat16)
        wide = torch.empty(outputs, groups * GROUP, dtype=torch.bfloat16, device=packed.device)
        at_once = max(1, AT_ONCE // (groups * GROUP))
        for part, into, factor in zip(*(tensor.split(at_once) for tensor in (packed, wide, factors)), strict=True):
            # A word has two numbers: of its low half the byte's low bits, of its high half the byte's high bits.
            words = part.flatten(1).int()
            words |= words << 12
            signs = (words << 12).bitwise_and_(SIGN)
            into.view(torch.int32).copy_(words.bitwise_left_shift_(6).bitwise_and_(NUMBER).bitwise_or_(signs))
            into.unflatten(1, (-1, GROUP)).mul_(factor[..., None])
        return wide.to(dtype)
