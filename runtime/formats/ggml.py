"""GGML's types of weights: how their blocks are rearranged, without loss, and how they are widened.

In a GGUF file a block holds the scales and the codes of 32 or 256 weights of a row. Here all codes of a weight come first and all
scales after them, so that an operation works on many numbers that lie side by side. A byte holds the codes of rows that are far
apart. Types that are not in `TYPES` are kept as they are, and transformers widens them, which takes several times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

AT_ONCE = 1 << 19
"""Weights that are widened at once, so that they stay in a processor's cache."""
NIBBLE = 15
Scales = tuple[torch.Tensor, torch.Tensor | None]
"""Of each group of weights its scale, and what is subtracted from its weights; float32 `[groups of a block, blocks]`."""
PLAIN = {0: ("F32", torch.float32), 1: ("F16", torch.float16), 30: ("BF16", torch.bfloat16)}
"""Types that are no blocks, by GGML's number."""


@dataclass(frozen=True)
class GgmlType:
    """A type: `weight = code * scale - least`. Codes are signed where nothing is subtracted."""

    number: int
    """GGML's own."""
    weights: int
    """Of a block."""
    bytes: int
    """Of a block."""
    planes: tuple[int, ...]
    """How the bits of a code are split, the lowest first. A plane has the same bits of all codes."""
    group: int
    """Weights that share a scale."""
    head: slice
    """The bytes of a block that hold its scales."""
    codes: Callable[[torch.Tensor], torch.Tensor]
    """The codes in blocks `[..., bytes]`, uint8: `[..., weights]`, uint8. Those that stand for signed numbers begin at 0."""
    scales: Callable[[torch.Tensor], Scales]
    """The scales in the heads of blocks `[bytes of a head, blocks]`, uint8."""

    @property
    def bits(self) -> int:
        return sum(self.planes)

    @property
    def parts(self) -> int:
        """In how many parts the rows of a weight are split. One code of each may share a byte."""
        return max(8 // bits for bits in self.planes)

    def arrange(self, raw: torch.Tensor) -> torch.Tensor:
        """The bytes `[rows, bytes of a row]` of a weight, which come as in a file, in the order that `widen` reads: `[all bytes]`."""
        blocks = raw.unflatten(-1, (-1, self.bytes))
        head = blocks[..., self.head].flatten(0, 1).T
        codes, found, below = self.codes(blocks).flatten(1), [head.flatten()], 0
        if self.scales(head[:, :1])[1] is None:
            codes = codes ^ (1 << self.bits - 1)  # a number less the middle of all, as a signed one
        for bits in self.planes:
            first, *others = (codes >> below & (1 << bits) - 1).unflatten(0, (8 // bits, -1))
            plane = first.clone()
            for number, field in enumerate(others, 1):
                plane |= field << bits * number
            found.insert(-1, plane.flatten())
            below += bits
        return torch.cat(found)

    def are_finite(self, arranged: torch.Tensor, shape: tuple[int, int]) -> bool:
        """Whether the scales in the bytes that `arrange` returned are."""
        return all(
            found is None or bool(found.isfinite().all()) for found in self.scales(self._split(arranged, shape)[1])
        )

    def widen(
        self, arranged: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, in_dtype: bool = False
    ) -> torch.Tensor:
        """The weight of `shape` `[rows, inputs]` in `dtype`, from the bytes that `arrange` returned.

        It is computed in float32 and then rounded, or `in_dtype`: the scales and the result of each operation are rounded.
        """
        rows, inputs = shape
        planes, head = self._split(arranged, shape)
        each = (self.parts, rows // self.parts, inputs // self.weights, -1, 1)
        scale, least = (
            None if found is None else found.to(dtype if in_dtype else torch.float32).float().T.reshape(each)
            for found in self.scales(head)
        )
        assert scale is not None
        scale *= 2.0 ** (self.bits - 8)  # codes come in the highest bits
        wide = torch.empty(*each[:2], inputs, dtype=dtype, device=arranged.device)
        at_once = max(1, min(AT_ONCE // (self.parts * inputs), rows // self.parts))
        codes = torch.empty(self.parts, at_once, inputs, dtype=torch.uint8, device=arranged.device)
        numbers = torch.empty_like(codes, dtype=torch.float32)
        groups = (*scale.shape[2:4], self.group)
        for begin in range(0, rows // self.parts, at_once):
            some = slice(begin, begin + at_once)
            into = wide[:, some]
            found = self._unpack([plane[:, some] for plane in planes], codes[:, : into.shape[1]])
            moved = numbers[:, : into.shape[1]].copy_(found if least is not None else found.view(torch.int8))
            moved.unflatten(-1, groups).mul_(scale[:, some])
            if in_dtype or least is None:
                into.copy_(moved)
            if least is not None:
                (into if in_dtype else moved).unflatten(-1, groups).sub_(least[:, some])
            if not in_dtype and least is not None:
                into.copy_(moved)
        return wide.flatten(0, 1)

    def _split(self, arranged: torch.Tensor, shape: tuple[int, int]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The planes `[parts that bytes stand for, rows of a part, inputs]`, and the heads `[bytes, blocks]`."""
        rows, inputs = shape
        sizes = [rows * inputs * bits // 8 for bits in self.planes]
        *planes, head = arranged.split([*sizes, arranged.numel() - sum(sizes)])
        found = [p.view(self.parts * bits // 8, -1, inputs) for p, bits in zip(planes, self.planes, strict=True)]
        return found, head.view(-1, rows * inputs // self.weights)

    def _unpack(self, planes: list[torch.Tensor], codes: torch.Tensor) -> torch.Tensor:
        """The codes `[parts, rows, inputs]`, uint8, in the highest bits, from some rows of all planes; they may be put into `codes`."""
        if self.bits == 8:
            return planes[0]
        at = 8 - self.bits
        for bits, plane in zip(self.planes, planes, strict=True):
            found = codes if at + self.bits == 8 else torch.empty_like(codes)
            for number, field in enumerate(found.unflatten(0, (8 // bits, -1))):
                _move(plane, at - bits * number, ((1 << bits) - 1) << at, field)
            if found is not codes:
                codes |= found
            at += bits
        return codes


def _move(plane: torch.Tensor, by: int, mask: int, into: torch.Tensor) -> None:
    """Bits of `plane`, moved up `by` places and masked."""
    if by > 0:
        torch.bitwise_left_shift(plane, by, out=into)
    elif by < 0:
        torch.bitwise_right_shift(plane, -by, out=into)
    torch.bitwise_and(plane if by == 0 else into, mask, out=into)


def _half(rows: torch.Tensor) -> torch.Tensor:
    """Numbers of 16 bits `[2, blocks]`, uint8, as float32 `[1, blocks]`."""
    return rows.T.contiguous().view(torch.float16).float().T


def _scale(head: torch.Tensor) -> Scales:
    return _half(head), None


def _scale_and_least(head: torch.Tensor) -> Scales:
    return _half(head[:2]), -_half(head[2:])


def _scales_of_8(head: torch.Tensor) -> Scales:
    """Scale and `least` of 8 groups, each in 6 bits: GGML's `get_scale_min_k4`."""
    low, middle, high = head[4:8], head[8:12], head[12:]
    scale = torch.cat([low & 63, high & NIBBLE | low >> 6 << 4])
    least = torch.cat([middle & 63, high >> 4 | middle >> 6 << 4])
    return scale * _half(head[:2]), least * _half(head[2:4])


def _scales_of_16(head: torch.Tensor) -> Scales:
    return head[:16].view(torch.int8) * _half(head[16:]), None


def _nibbles(bytes_: torch.Tensor, together: int) -> torch.Tensor:
    """The low halves of so many bytes, then their high halves, and so on: `[..., 2 * bytes]`."""
    some = bytes_.unflatten(-1, (-1, 1, together))
    return torch.cat([some & NIBBLE, some >> 4], -2).flatten(-3)


def _fields(bytes_: torch.Tensor, bits: int, together: int) -> torch.Tensor:
    """The lowest bits of so many bytes, then the next ones, and so on: `[..., bytes * 8 / bits]`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).view(-1, 1)
    return (bytes_.unflatten(-1, (-1, 1, together)) >> shifts & (1 << bits) - 1).flatten(-3)


TYPES = {
    "Q4_0": GgmlType(2, 32, 18, (4,), 32, slice(0, 2), lambda b: _nibbles(b[..., 2:], 16), _scale),
    "Q4_1": GgmlType(3, 32, 20, (4,), 32, slice(0, 4), lambda b: _nibbles(b[..., 4:], 16), _scale_and_least),
    "Q8_0": GgmlType(8, 32, 34, (8,), 32, slice(0, 2), lambda b: b[..., 2:] ^ 128, _scale),
    "Q4_K": GgmlType(12, 256, 144, (4,), 32, slice(0, 16), lambda b: _nibbles(b[..., 16:], 32), _scales_of_8),
    "Q5_K": GgmlType(
        13, 256, 176, (4, 1), 32, slice(0, 16),
        lambda b: _nibbles(b[..., 48:], 32) | _fields(b[..., 16:48], 1, 32) << 4, _scales_of_8,
    ),
    "Q6_K": GgmlType(
        14, 256, 210, (4, 2), 16, slice(192, 210),
        lambda b: _nibbles(b[..., :128], 64) | _fields(b[..., 128:192], 2, 32) << 4, _scales_of_16,
    ),
}  # fmt: skip
BY_NUMBER = {kind.number: kind for kind in TYPES.values()}


def arranged(number: int, raw: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor | None:
    """The bytes `[rows, bytes of a row]` of a weight of the type `number` as `widened` reads them, `[all bytes]`.

    None where its scales, or its numbers, are not finite.
    """
    kind = _kind(number, shape[0])
    if kind is None:
        return raw.flatten() if widened(number, raw.flatten(), shape, torch.float32).isfinite().all() else None
    found = kind.arrange(raw)
    return found if kind.are_finite(found, shape) else None


def widened(
    number: int, found: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, in_dtype: bool = False
) -> torch.Tensor:
    """A weight of the type `number`, of `shape` `[rows, inputs]`, in `dtype`, from the bytes that `arranged` returned.

    For `in_dtype` see `GgmlType.widen`.
    """
    kind = _kind(number, shape[0])
    if kind is not None:
        return kind.widen(found, shape, dtype, in_dtype)
    if number in PLAIN:
        return found.view(PLAIN[number][1]).view(shape).to(dtype)
    from transformers.integrations.gguf.dequant import dequantize  # older releases have none

    return dequantize(found, number, dtype if in_dtype else torch.float32).view(shape).to(dtype)


def kept_kind(number: int, rows: int) -> str | None:
    """The name of the type `number` if a weight of so many rows is kept as it is in the file. None if it is rearranged."""
    if _kind(number, rows) is not None:
        return None
    if number in PLAIN:
        return PLAIN[number][0]
    from transformers.integrations.gguf.dequant import GGML_NAME  # older releases have none

    return f"{GGML_NAME[number]} with {rows} rows" if number in BY_NUMBER else GGML_NAME[number]


def _kind(number: int, rows: int) -> GgmlType | None:
    """The type `number`, if it is one of ours and so many rows can be split as it splits them."""
    kind = BY_NUMBER.get(number)
    return None if kind is None or rows % kind.parts else kind
