"""Weights of four bits (e2m1) in groups of 32 inputs, each with a power of two as its scale: MXFP4, as gpt-oss is shipped.

As in `fp8`, the bits of a number are moved to the places that they have in a bfloat16, which is then too small by a power of two.
Scales are made greater by it. A bfloat16 holds every such weight exactly.
"""

from __future__ import annotations

import torch

from ..errors import StoreError
from . import Place
from .quantized import SCALES, Shaped
from .shipped import ShippedFormat

GROUP = 32
"""Inputs that share a scale."""
AT_ONCE = 1 << 19
"""Weights that are widened at once, so that they stay in a processor's cache."""
MOST = 128
"""The largest exponent that is read, which stands for 2. Greater ones, times what is lacking, would not be finite."""
LACKING = 126
"""The exponent's bias is 1 in e2m1 and 127 in bfloat16. A scale has the same bias as bfloat16."""
MOVED = (1 << 12) + (1 << 6)
"""By this factor the four bits of a number come twice to greater places: the sign to bfloat16's, and the other ones to theirs."""
SIGN_AND_MOVED = 0x81C0 - (1 << 16)


class Mxfp4Format(ShippedFormat):
    """`weight = number * 2 ** (scale - 127)`, with uint8 scales `[inputs / 32, outputs]`.

    `packed` is uint8 `[inputs / 32, 16, outputs]`: a byte has an even input in its low bits and the next one in its high bits. Outputs
    are side by side, unlike in the checkpoint: the widened weight then lies in memory as transformers' does.
    """

    @classmethod
    def shapes(cls, name: str, outputs: int, inputs: int) -> tuple[Shaped, Shaped]:
        if inputs % GROUP:
            raise StoreError(
                f"{name} has {inputs} inputs, and groups of {GROUP} don't divide them; give a checkpoint that is not quantised"
            )
        groups = inputs // GROUP
        packed = torch.Size([groups, GROUP // 2, outputs])
        return (torch.uint8, packed), (torch.uint8, torch.Size([groups, outputs]))

    @property
    def loaded(self) -> dict[str, Place]:
        def outputs_first(place: Place) -> Place:
            return place._replace(shape=torch.Size([place.shape[-1], *place.shape[:-1]]))

        return {n: outputs_first(place) if place.dtype == torch.uint8 else place for n, place in self.places.items()}

    def write(self, name: str, values: torch.Tensor, blocks: torch.Tensor) -> None:
        super().write(name, values.movedim(1, -1) if values.dtype == torch.uint8 else values, blocks)

    @staticmethod
    def are_sound(name: str, values: torch.Tensor) -> torch.Tensor:
        if name.endswith(SCALES):
            return (values <= MOST).flatten(1).all(1)
        return ShippedFormat.are_sound(name, values)

    @staticmethod
    def widen(packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        groups, _, outputs = packed.shape
        # A float32 is a bfloat16 with 16 bits more, so that wider weights need no second pass.
        is_wide = dtype == torch.float32
        kind, whole, more = (torch.float32, torch.int32, 16) if is_wide else (torch.bfloat16, torch.int16, 0)
        factors = (scales.to(whole) + LACKING).bitwise_left_shift_(7 + more).view(kind).unsqueeze(1)
        wide = torch.empty(groups, GROUP // 2, 2, outputs, dtype=kind, device=packed.device)
        at_once = max(1, AT_ONCE // (GROUP * outputs))
        for part, into, factor in zip(*(tensor.split(at_once) for tensor in (packed, wide, factors)), strict=True):
            pairs, moved = part.to(whole), into.view(whole)
            torch.bitwise_and(pairs, 15, out=moved[:, :, 0])
            torch.bitwise_right_shift(pairs, 4, out=moved[:, :, 1])
            moved.mul_(MOVED << more).bitwise_and_(SIGN_AND_MOVED << more)
            into.flatten(1, 2).mul_(factor)
        return wide.flatten(0, 2).to(dtype).mT
