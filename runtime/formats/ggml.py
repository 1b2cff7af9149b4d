"""GGML's types of weights: how their blocks are rearranged, without loss, and how they are widened.

In a GGUF file a block holds the scales and the codes of 32 or 256 weights of a row. Here all codes of a weight come first and all
scales after them, so that an operation works on many numbers that lie side by side. A byte holds bits of codes of rows that are far
apart. Types that are not in `TYPES` are kept as they are, and transformers widens them, which takes several times as long.

Widening is a few passes over memory: codes are unpacked, become float32, are multiplied by scales, and are rounded. Most of the rest
is the time in which torch starts an operation. So there are few of them, over many weights at once.

Tried on a processor with AVX2, and slower: scale and `least` in one pass, by `addcmul` or by the inference of `batch_norm`; tensors
with per-channel scales and their `dequantize`; smaller parts, which stay in the second cache; and `torch.compile`, whose loop is not
vectorised where 32 weights share a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch

from .scratch import SCRATCH, number

AT_ONCE = 1 << 20
"""Weights that are widened at once, so that they stay in a processor's cache."""
NIBBLE = 15
Scales = tuple[torch.Tensor, torch.Tensor | None]
"""Of each group of weights its scale, and what is subtracted from its weights; float32 `[blocks, groups of a block]`."""
PLAIN = {0: ("F32", torch.float32), 1: ("F16", torch.float16), 30: ("BF16", torch.bfloat16)}
"""Types that are no blocks, by GGML's number."""


class Space(NamedTuple):
    """Memory in which some rows of a weight are widened."""

    moves: list[tuple[Move, torch.Tensor, torch.Tensor]]
    """Each move with where the codes are, and where its bits come first. None where codes are bytes."""
    codes: torch.Tensor
    """`[parts, rows, inputs]`, uint8. Of no parts where codes are bytes."""
    moved: torch.Tensor
    """The same as float32."""


class Move(NamedTuple):
    """Where some bits of codes are. The rows of a weight are split into equal parts, and some bytes hold one code of each part."""

    codes: slice
    """Of which parts."""
    bytes: slice
    """In which of the bytes."""
    up: int
    """By so many places the bits are moved up from their places in the bytes to those in the codes; down, if it is negative."""
    mask: int
    """Their places in the codes."""
    size: int
    """Of how many parts."""
    adds: bool
    """Whether moves before have put other bits into these codes."""


def _moves(*moves: tuple[int, int, int, int, int]) -> tuple[Move, ...]:
    """Moves of so many codes, from the first of them and the first of the bytes on; then `up` and `mask`."""
    found, done = [], 0
    for count, code, byte, up, mask in moves:
        found.append(Move(slice(code, code + count), slice(byte, byte + count), up, mask, count, code < done))
        done = max(done, code + count)
    return tuple(found)


IN_TWO = _moves((1, 0, 0, 0, 0x0F), (1, 1, 0, -4, 0x0F))
IN_TWO_SIGNED = _moves((1, 0, 0, 4, 0xF0), (1, 1, 0, 0, 0xF0))
IN_FIVE = _moves((5, 0, 0, 0, 0x1F), (3, 5, 0, -5, 0x07), (2, 5, 3, -2, 0x18), (1, 7, 3, -4, 0x08), (1, 7, 4, -3, 0x10))
"""8 codes of 5 bits in 5 bytes: 5 codes in the low bits, and the last 3 in what is above them."""
IN_THREE_SIGNED = _moves((3, 0, 0, 0, 0xFC), (1, 3, 0, 6, 0xC0), (1, 3, 1, 4, 0x30), (1, 3, 2, 2, 0x0C))
"""4 codes of 6 bits in 3 bytes: 3 codes in the high bits, and the last one in what is below them."""
WHOLE = _moves((1, 0, 0, 0, 0xFF))


@dataclass(frozen=True)
class GgmlType:
    """A type: `weight = code * scale - least`."""

    number: int
    """GGML's own."""
    weights: int
    """Of a block."""
    bytes: int
    """Of a block."""
    bits: int
    """Of a code."""
    moves: tuple[Move, ...]
    is_signed: bool
    """Whether codes are signed, and nothing is subtracted. Unpacked codes are in the highest bits of a byte then, else in the lowest."""
    group: int
    """Weights that share a scale."""
    head: slice
    """The bytes of a block that hold its scales."""
    fields: tuple[int, ...]
    """How many of these bytes lie together."""
    codes: Callable[[torch.Tensor], torch.Tensor]
    """The codes in blocks `[..., bytes]`, uint8: `[..., weights]`, uint8. Those that stand for signed numbers begin at 0."""
    scales: Callable[[torch.Tensor, int], Scales]
    """The scales in so many heads, uint8 `[all bytes]`, of which each field comes for all blocks before the next field."""

    @cached_property
    def parts(self) -> int:
        """In how many parts the rows of a weight are split."""
        return max(move.codes.stop for move in self.moves)

    @cached_property
    def unpacked(self) -> int:
        """For how many parts unpacking needs memory: for all codes, and for bits that are added to some. None where codes are bytes."""
        return 0 if self.bits == 8 else self.parts + max((move.size for move in self.moves if move.adds), default=0)

    def arrange(self, raw: torch.Tensor) -> torch.Tensor:
        """The bytes `[rows, bytes of a row]` of a weight, which come as in a file, in the order that `widen` reads: `[all bytes]`."""
        blocks = raw.unflatten(-1, (-1, self.bytes))
        codes = self.codes(blocks).flatten(1)
        if self.is_signed:
            codes = codes << 8 - self.bits ^ 128  # a number less the middle of all, as a signed one
        codes = codes.unflatten(0, (self.parts, -1))
        packed = torch.zeros(self.parts * self.bits // 8, *codes.shape[1:], dtype=torch.uint8, device=raw.device)
        for move in self.moves:
            bits = codes[move.codes] & move.mask
            packed[move.bytes] |= bits >> move.up if move.up > 0 else bits << -move.up
        heads = blocks[..., self.head].flatten(0, 1).split(self.fields, -1)
        return torch.cat([packed.flatten(), *(field.flatten() for field in heads)])

    def are_finite(self, arranged: torch.Tensor, shape: tuple[int, int]) -> bool:
        """Whether the scales in the bytes that `arrange` returned are."""
        found = self.scales(self._split(arranged, shape)[1], shape[0] * shape[1] // self.weights)
        return all(scales is None or bool(scales.isfinite().all()) for scales in found)

    def widen(self, arranged: torch.Tensor, into: torch.Tensor, in_dtype: bool = False) -> None:
        """Writes a weight `into` a tensor `[rows, inputs]`, from the bytes that `arrange` returned.

        It is computed in float32 and then rounded, or `in_dtype` of `into`: the scales and the result of each operation are rounded.
        """
        (rows, inputs), parts = into.shape, self.parts
        packed, head = self._split(arranged, (rows, inputs))
        scale, least = self.scales(head, rows * inputs // self.weights)
        if in_dtype:
            scale, least = scale.to(into.dtype).float(), None if least is None else least.to(into.dtype)
        if self.is_signed:
            scale = scale * 2.0 ** (self.bits - 8)
        wide, groups = into.view(parts, -1, inputs), (parts, -1, inputs // self.group, 1)
        scale, least = scale.view(groups), None if least is None else least.view(groups)
        at_once = max(1, AT_ONCE // (parts * inputs))
        for begin in range(0, rows // parts, at_once):
            if at_once < rows // parts:
                some = slice(begin, begin + at_once)
                below = None if least is None else least[:, some]
                self._widen(packed[:, some], scale[:, some], below, wide[:, some], in_dtype)
            else:
                self._widen(packed, scale, least, wide, in_dtype)

    def _widen(
        self, packed: torch.Tensor, scale: torch.Tensor, least: torch.Tensor | None, into: torch.Tensor, in_dtype: bool
    ) -> None:
        """Some rows of all parts; `into` is `[parts, rows, inputs]`."""
        parts, rows, inputs = into.shape
        is_wide = into.dtype == torch.float32  # it is computed where it is to be
        size = ((0 if is_wide else 4 * parts) + self.unpacked) * rows * inputs
        key, make = (self.number, is_wide, rows, inputs), partial(self._space, is_wide, rows, inputs)
        space = SCRATCH.views(key, size, into.device, make)
        codes, moved = packed if self.bits == 8 else space.codes, into if is_wide else space.moved
        for move, place, found in space.moves:
            _move(packed[move.bytes], move, found)
            if move.adds:
                place.bitwise_or_(found)
        moved.copy_(codes.view(torch.int8) if self.is_signed else codes)
        grouped = (parts, rows, -1, self.group)
        moved.view(grouped).mul_(scale)
        if in_dtype and not is_wide:
            moved = into.copy_(moved)
        if least is not None:
            moved.view(grouped).sub_(least)
        if moved is not into:
            into.copy_(moved)

    def _space(self, is_wide: bool, rows: int, inputs: int, memory: torch.Tensor) -> Space:
        """The views of `memory`, which has room for so many rows of each part."""
        size = 0 if is_wide else 4 * self.parts * rows * inputs
        moved = memory[:size].view(torch.float32).view(-1, rows, inputs)
        bits = memory[size:].view(-1, rows, inputs)
        moves = []
        for move in self.moves if self.unpacked else ():
            place = bits[move.codes]
            moves.append((move, place, bits[self.parts : self.parts + move.size] if move.adds else place))
        return Space(moves, bits[: self.parts], moved)

    def _split(self, arranged: torch.Tensor, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The bytes of codes `[bytes of one code of each part, rows of a part, inputs]`, and those of the heads `[all bytes]`."""
        rows, inputs = shape
        size = rows * inputs * self.bits // 8
        return arranged[:size].view(self.parts * self.bits // 8, -1, inputs), arranged[size:]


def _move(packed: torch.Tensor, move: Move, into: torch.Tensor) -> None:
    """Bits of `packed`, moved up and masked."""
    mask = number(move.mask, torch.uint8)
    if move.up == 0:
        torch.bitwise_and(packed, mask, out=into)
        return
    shift = torch.bitwise_left_shift if move.up > 0 else torch.bitwise_right_shift
    shift(packed, number(abs(move.up), torch.uint8), out=into)
    if move.mask != (255 << move.up & 255 if move.up > 0 else 255 >> -move.up):
        into.bitwise_and_(mask)


def _halves(head: torch.Tensor) -> torch.Tensor:
    """Numbers of 16 bits in bytes, as float32."""
    return head.view(torch.float16).float()


def _scale(head: torch.Tensor, blocks: int) -> Scales:
    return _halves(head).view(blocks, 1), None


def _scale_and_least(head: torch.Tensor, blocks: int) -> Scales:
    scale, least = _halves(head).view(2, blocks, 1)
    return scale, least.neg_()


def _scales_of_8(head: torch.Tensor, blocks: int) -> Scales:
    """Scale and `least` of 8 groups, each in 6 bits: GGML's `get_scale_min_k4`. A word has bytes of 4 groups."""
    words = head.view(torch.int32).view(4, blocks)
    first, high = words[1:3], words[3]
    codes = torch.empty(2, blocks, 2, dtype=torch.int32, device=head.device)
    early, late = codes.unbind(2)
    torch.bitwise_and(first, _word(0x3F), out=early)
    torch.bitwise_right_shift(first, number(2, torch.int32), out=late).bitwise_and_(_word(0x30))
    late[0].bitwise_or_(high & _word(0x0F))
    late[1].bitwise_or_((high >> number(4, torch.int32)).bitwise_and_(_word(0x0F)))
    scale, least = codes.view(torch.uint8).float().mul_(_halves(head[: 4 * blocks]).view(blocks, 2).T.unsqueeze(-1))
    return scale, least


def _word(byte: int) -> torch.Tensor:
    """A word of four such bytes."""
    return number(0x01010101 * byte, torch.int32)


def _scales_of_16(head: torch.Tensor, blocks: int) -> Scales:
    codes, scale = head.split([16 * blocks, 2 * blocks])
    return codes.view(torch.int8).view(blocks, 16) * _halves(scale).view(blocks, 1), None


def _nibbles(bytes_: torch.Tensor, together: int) -> torch.Tensor:
    """The low halves of so many bytes, then their high halves, and so on: `[..., 2 * bytes]`."""
    some = bytes_.unflatten(-1, (-1, 1, together))
    return torch.cat([some & NIBBLE, some >> 4], -2).flatten(-3)


def _fields(bytes_: torch.Tensor, bits: int, together: int) -> torch.Tensor:
    """The lowest bits of so many bytes, then the next ones, and so on: `[..., bytes * 8 / bits]`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).view(-1, 1)
    return (bytes_.unflatten(-1, (-1, 1, together)) >> shifts & (1 << bits) - 1).flatten(-3)


TYPES = {
    "Q4_0": GgmlType(
        2, 32, 18, 4, IN_TWO_SIGNED, True, 32, slice(0, 2), (2,), lambda b: _nibbles(b[..., 2:], 16), _scale
    ),
    "Q4_1": GgmlType(
        3, 32, 20, 4, IN_TWO, False, 32, slice(0, 4), (2, 2), lambda b: _nibbles(b[..., 4:], 16), _scale_and_least
    ),
    "Q8_0": GgmlType(8, 32, 34, 8, WHOLE, True, 32, slice(0, 2), (2,), lambda b: b[..., 2:] ^ 128, _scale),
    "Q4_K": GgmlType(
        12, 256, 144, 4, IN_TWO, False, 32, slice(0, 16), (4, 4, 4, 4), lambda b: _nibbles(b[..., 16:], 32), _scales_of_8
    ),
    "Q5_K": GgmlType(
        13, 256, 176, 5, IN_FIVE, False, 32, slice(0, 16), (4, 4, 4, 4),
        lambda b: _nibbles(b[..., 48:], 32) | _fields(b[..., 16:48], 1, 32) << 4, _scales_of_8,
    ),
    "Q6_K": GgmlType(
        14, 256, 210, 6, IN_THREE_SIGNED, True, 16, slice(192, 210), (16, 2),
        lambda b: _nibbles(b[..., :128], 64) | _fields(b[..., 128:192], 2, 32) << 4, _scales_of_16,
    ),
}  # fmt: skip
BY_NUMBER = {kind.number: kind for kind in TYPES.values()}


def arranged(number: int, raw: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor | None:
    """The bytes `[rows, bytes of a row]` of a weight of the type `number` as `widen` reads them, `[all bytes]`.

    None where its scales, or its numbers, are not finite.
    """
    kind = _kind(number, shape[0])
    if kind is None:
        widen(number, raw.flatten(), wide := torch.empty(shape, device=raw.device))
        return raw.flatten() if wide.isfinite().all() else None
    found = kind.arrange(raw)
    return found if kind.are_finite(found, shape) else None


def widen(number: int, found: torch.Tensor, into: torch.Tensor, in_dtype: bool = False) -> None:
    """Writes a weight of the type `number` `into` a tensor `[rows, inputs]`, from the bytes that `arranged` returned.

    For `in_dtype` see `GgmlType.widen`.
    """
    kind = _kind(number, len(into))
    if kind is not None:
        kind.widen(found, into, in_dtype)
    elif number in PLAIN:
        into.copy_(found.view(PLAIN[number][1]).view(into.shape))
    else:
        from transformers.integrations.gguf.dequant import dequantize  # older releases have none

        into.copy_(dequantize(found, number, into.dtype if in_dtype else torch.float32).view(into.shape))


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
