"""The Triton kernels over weights in GGML's types, in the order of bytes that `formats.ggml` gives them.

They round a widened weight as `GgmlType.widen` does. Where that is in float32, a product of a code and a scale is exact: a scale has
at most 18 bits and a code 6. So nothing changes where a compiler adds to such a product without rounding it first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .quantized_kernels import _gated

Q4_0, Q4_1, Q8_0 = tl.constexpr(2), tl.constexpr(3), tl.constexpr(8)
Q4_K, Q5_K, Q6_K = tl.constexpr(12), tl.constexpr(13), tl.constexpr(14)


@triton.jit
def _byte(weight, number, place, mask, STRIDE: tl.constexpr):
    """Of the bytes that the parts of a weight share, those of a `number`, int32. They begin STRIDE bytes apart."""
    return tl.load(weight + number * STRIDE + place, mask=mask, other=0).to(tl.int32)


@triton.jit
def _codes(weight, row, column, mask, TOTAL: tl.constexpr, IN: tl.constexpr, KIND: tl.constexpr):
    """The codes of the rows `row` at `column [groups, inputs of a group]`, int32. See `IN_TWO` and the others in `formats.ggml`."""
    parts: tl.constexpr = 1 if KIND == Q8_0 else (8 if KIND == Q5_K else (4 if KIND == Q6_K else 2))
    rows: tl.constexpr = TOTAL // parts
    part, mask = (row // rows)[:, None, None], mask[:, :, None]
    place = (row % rows)[:, None, None] * IN + column[None, :, :]
    if KIND == Q8_0:
        codes = _byte(weight, 0, place, mask, rows * IN)
    elif KIND == Q5_K:
        is_late, is_last = mask & (part >= 5), mask & (part == 7)
        found = _byte(weight, part - tl.where(part < 5, 0, 5), place, mask, rows * IN)
        more = _byte(weight, tl.where(part == 6, 4, 3), place, is_late, rows * IN)
        last = _byte(weight, 4, place, is_last, rows * IN)
        high = tl.where(part == 7, ((more >> 4) & 8) | ((last >> 3) & 16), (more >> 2) & 24)
        codes = tl.where(part < 5, found & 31, (found >> 5) | high)
    elif KIND == Q6_K:
        is_late = mask & (part == 3)
        found = _byte(weight, part % 3, place, mask, rows * IN)
        more, last = _byte(weight, 1, place, is_late, rows * IN), _byte(weight, 2, place, is_late, rows * IN)
        codes = tl.where(part < 3, found >> 2, ((found & 3) << 4) | ((more & 3) << 2) | (last & 3))
    else:
        codes = (_byte(weight, 0, place, mask, rows * IN) >> (4 * part)) & 15
    return codes


@triton.jit
def _halves(bits):
    """Numbers of 16 bits in the low bits of words, as float32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scales(heads, row, group, mask, TOTAL: tl.constexpr, IN: tl.constexpr, KIND: tl.constexpr):
    """Of the groups `group` of the rows `row` the scales, and what is subtracted from their weights, `[rows, groups]`, float32.

    What is subtracted is 0 for the types that have no such number. See `GgmlType.scales`.
    """
    each: tl.constexpr = 1 if KIND < Q4_K else (16 if KIND == Q6_K else 8)  # groups of a block
    wide: tl.constexpr = 16 * each if KIND == Q6_K else 32 * each
    blocks: tl.constexpr = TOTAL * IN // wide
    block, own = row[:, None] * (IN // wide) + (group // each)[None, :], (group % each)[None, :]
    halves = heads.to(tl.pointer_type(tl.int16))
    if KIND == Q6_K:
        code = tl.load(heads + block * 16 + own, mask=mask, other=0).to(tl.int8, bitcast=True)
        scale = code.to(tl.float32) * _halves(tl.load(halves + 8 * blocks + block, mask=mask, other=0))
        least = tl.zeros_like(scale)
    elif KIND >= Q4_K:
        words, shift = heads.to(tl.pointer_type(tl.int32)) + block, 8 * (own % 4)
        both = tl.load(words, mask=mask, other=0)
        low = tl.load(words + blocks, mask=mask, other=0) >> shift
        middle = tl.load(words + 2 * blocks, mask=mask, other=0) >> shift
        high = tl.load(words + 3 * blocks, mask=mask, other=0) >> shift
        step = tl.where(own < 4, low & 63, (high & 15) | ((low >> 2) & 48))
        below = tl.where(own < 4, middle & 63, ((high >> 4) & 15) | ((middle >> 2) & 48))
        scale, least = step.to(tl.float32) * _halves(both), below.to(tl.float32) * _halves(both >> 16)
    else:
        scale = _halves(tl.load(halves + block, mask=mask, other=0))
        least = tl.zeros_like(scale)
        if KIND == Q4_1:
            least -= _halves(tl.load(halves + blocks + block, mask=mask, other=0))
    return scale, least


@triton.jit
def _widened(codes, scale, least, BITS: tl.constexpr, KIND: tl.constexpr, IN_DTYPE: tl.constexpr, dtype: tl.constexpr):
    """Weights `[rows, groups, inputs of a group]` as they are in `dtype`, float32. See `GgmlType.widen`."""
    if IN_DTYPE:
        scale, least = scale.to(dtype).to(tl.float32), least.to(dtype).to(tl.float32)
    if KIND == Q4_1 or KIND == Q4_K or KIND == Q5_K:  # noqa: SIM109  # Triton has no `in`
        moved = codes.to(tl.float32) * scale[:, :, None]
        if IN_DTYPE:
            moved = moved.to(dtype).to(tl.float32)
        moved -= least[:, :, None]
    else:
        middle: tl.constexpr = 1 << (BITS - 1)
        moved = ((codes ^ middle) - middle).to(tl.float32) * scale[:, :, None]
    return moved.to(dtype).to(tl.float32)


@triton.jit
def _dot_ggml(
    weight, x, row, mask, TOTAL: tl.constexpr, IN: tl.constexpr, KIND: tl.constexpr, IN_DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The rows `row [ROWS]` of a `weight` of TOTAL rows and the type KIND times `x [IN]`, in float32."""
    bits: tl.constexpr = 8 if KIND == Q8_0 else (5 if KIND == Q5_K else (6 if KIND == Q6_K else 4))
    size: tl.constexpr = 16 if KIND == Q6_K else 32
    groups: tl.constexpr = COLUMNS // size
    inner, total = tl.arange(0, size), tl.zeros((ROWS, groups, size), tl.float32)
    for begin in range(0, IN // size, groups):
        group = begin + tl.arange(0, groups)
        known = group < IN // size
        column, some = group[:, None] * size + inner[None, :], mask[:, None] & known[None, :]
        codes = _codes(weight, row, column, some, TOTAL, IN, KIND)
        scale, least = _scales(weight + TOTAL * IN * bits // 8, row, group, some, TOTAL, IN, KIND)
        values = tl.load(x + column, mask=known[:, None], other=0).to(tl.float32)
        total += _widened(codes, scale, least, bits, KIND, IN_DTYPE, dtype) * values[None, :, :]
    return tl.sum(tl.sum(total, 2), 1)


@triton.jit
def ggml_linear(
    x, memory, table, output, size, step, weight, up, k, width, rows_of_x,
    IN: tl.constexpr, OUT: tl.constexpr, KIND: tl.constexpr, UP: tl.constexpr, IN_DTYPE: tl.constexpr,
    PARTS: tl.constexpr, PART: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One linear layer of each row's expert, or a part of its outputs: `output [rows, OUT]`, whose rows begin `step` numbers apart.

    `table`, `x`, `k`, `width` and `rows_of_x` are as in `int8_linear`. In `memory`, bytes, a block has `size` of them. The weight
    `[OUT, IN]` of GGML's type KIND begins at byte `weight` of it. Unless UP is 0, another one of that type begins at byte `up`, and
    `silu(first product) * second product` is the output. IN_DTYPE says how both are widened.

    A byte has bits of codes of rows that are far apart. So a program multiplies PART rows of each of PARTS parts of the weight.
    """
    pair, index = tl.program_id(0), tl.arange(0, PARTS * PART)
    dtype: tl.constexpr = output.dtype.element_ty
    rows: tl.constexpr = OUT // PARTS
    within = tl.program_id(1) * PART + index % PART
    row, mask = index // PART * rows + within, within < rows
    block = memory + tl.load(table + (pair // k) * width + pair % k).to(tl.int64) * size
    inputs = x + (pair // rows_of_x) * IN
    result = _dot_ggml(block + weight, inputs, row, mask, OUT, IN, KIND, IN_DTYPE, PARTS * PART, COLUMNS, dtype).to(
        dtype
    )
    if UP > 0:
        other = _dot_ggml(block + up, inputs, row, mask, OUT, IN, UP, IN_DTYPE, PARTS * PART, COLUMNS, dtype)
        result = _gated(result, other, dtype)
    tl.store(output + pair * step + row, result, mask=mask)
