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
def _bits(plane, row, column, mask, TOTAL: tl.constexpr, IN: tl.constexpr, BITS: tl.constexpr):
    """Of the codes of the rows `row` at `column [groups, inputs of a group]` the bits that a plane has of them, int32."""
    rows: tl.constexpr = TOTAL * BITS // 8  # of bytes
    bytes = tl.load(plane + (row % rows)[:, None, None] * IN + column[None, :, :], mask=mask[:, :, None], other=0)
    return (bytes.to(tl.int32) >> (row // rows * BITS)[:, None, None]) & ((1 << BITS) - 1)


@triton.jit
def _half(low, blocks, mask):
    """Numbers of 16 bits as float32, from the addresses of their low bytes. Their high bytes are `blocks` bytes further on."""
    bits = tl.load(low, mask=mask, other=0).to(tl.int16) | (tl.load(low + blocks, mask=mask, other=0).to(tl.int16) << 8)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scales(heads, row, group, mask, TOTAL: tl.constexpr, IN: tl.constexpr, KIND: tl.constexpr):
    """Of the groups `group` of the rows `row` the scales, and what is subtracted from their weights, `[rows, groups]`, float32.

    What is subtracted is 0 for the types that have no such number. See `GgmlType.scales`.
    """
    each: tl.constexpr = 1 if KIND < Q4_K else (16 if KIND == Q6_K else 8)  # groups of a block
    wide: tl.constexpr = 16 * each if KIND == Q6_K else 32 * each
    blocks: tl.constexpr = TOTAL * IN // wide
    head = heads + row[:, None] * (IN // wide) + (group // each)[None, :]
    own = (group % each)[None, :]
    if KIND == Q6_K:
        code = tl.load(head + own * blocks, mask=mask, other=0).to(tl.int8, bitcast=True)
        scale = code.to(tl.float32) * _half(head + 16 * blocks, blocks, mask)
        least = tl.zeros_like(scale)
    elif KIND >= Q4_K:
        low = tl.load(head + (4 + own % 4) * blocks, mask=mask, other=0)
        middle = tl.load(head + (8 + own % 4) * blocks, mask=mask, other=0)
        high = tl.load(head + (12 + own % 4) * blocks, mask=mask, other=0)
        is_first = own < 4
        step = tl.where(is_first, low & 63, (high & 15) | (low >> 6 << 4))
        below = tl.where(is_first, middle & 63, (high >> 4) | (middle >> 6 << 4))
        scale = step.to(tl.float32) * _half(head, blocks, mask)
        least = below.to(tl.float32) * _half(head + 2 * blocks, blocks, mask)
    else:
        scale = _half(head, blocks, mask)
        least = -_half(head + 2 * blocks, blocks, mask) if KIND == Q4_1 else tl.zeros_like(scale)
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
    low: tl.constexpr = 8 if KIND == Q8_0 else 4
    high: tl.constexpr = 1 if KIND == Q5_K else (2 if KIND == Q6_K else 0)
    size: tl.constexpr = 16 if KIND == Q6_K else 32
    groups: tl.constexpr = COLUMNS // size
    inner, total = tl.arange(0, size), tl.zeros((ROWS, groups, size), tl.float32)
    for begin in range(0, IN // size, groups):
        group = begin + tl.arange(0, groups)
        known = group < IN // size
        column, some = group[:, None] * size + inner[None, :], mask[:, None] & known[None, :]
        codes = _bits(weight, row, column, some, TOTAL, IN, low)
        if high > 0:
            codes |= _bits(weight + TOTAL * IN * low // 8, row, column, some, TOTAL, IN, high) << low
        scale, least = _scales(weight + TOTAL * IN * (low + high) // 8, row, group, some, TOTAL, IN, KIND)
        values = tl.load(x + column, mask=known[:, None], other=0).to(tl.float32)
        total += _widened(codes, scale, least, low + high, KIND, IN_DTYPE, dtype) * values[None, :, :]
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

    A byte has codes of rows that are far apart. So a program multiplies PART rows of each of PARTS parts of the weight.
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
