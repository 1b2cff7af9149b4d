"""The Triton kernels over quantised blocks: they widen weights on the way into the product. See `kernels`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rounded(total, biases, block, bias, row, OUT: tl.constexpr, dtype: tl.constexpr):
    """A product in `dtype`, with its bias if there is one, for the rows `row` of a block that begins at byte `block`.

    As in transformers, the product is rounded before the bias is added.
    """
    total = total.to(dtype)
    if bias >= 0:
        itemsize: tl.constexpr = biases.dtype.element_ty.primitive_bitwidth // 8
        added = tl.load(biases + block // itemsize + bias + row, mask=row < OUT, other=0)
        total = (total.to(tl.float32) + added.to(tl.float32)).to(dtype)
    return total


@triton.jit
def _gated(gate, up, dtype: tl.constexpr):
    """`silu(gate) * up`, rounded where torch rounds."""
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    return ((gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up).to(dtype)


@triton.jit
def _dot8(weight, scales, x, rows, IN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`weight [rows, IN] x [IN]` in float32 for the first ROWS rows, of int8 with a scale a row."""
    row, total = tl.arange(0, ROWS), tl.zeros((ROWS,), tl.float32)
    for begin in range(0, IN, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        mask = (row < rows)[:, None] & (column < IN)[None, :]
        codes = tl.load(weight + row[:, None] * IN + column[None, :], mask=mask, other=0).to(tl.float32)
        total += tl.sum(codes * tl.load(x + column, mask=column < IN, other=0).to(tl.float32)[None, :], 1)
    return total * tl.load(scales + row, mask=row < rows, other=0).to(tl.float32)


@triton.jit
def int8_linear(
    x, codes, numbers, biases, table, output, size, weight, scales, bias, k, width, rows_of_x,
    IN: tl.constexpr, OUT: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One linear layer of each row's expert: `output [rows, OUT]`.

    `table [tokens, width]` has the places of the first `k` experts of each token. `x` is `[tokens, IN]` if `rows_of_x` is `k`,
    and `[rows, IN]` if it is 1. `codes`, `numbers` and `biases` are one memory, in bytes, as bfloat16 and in the model's dtype. A
    block has `size` bytes. The weight begins at byte `weight` of it, its scales at number `scales`, and its biases at number
    `bias`, which is -1 where there is none. If GATED, the weight is `[2 OUT, IN]`, and `silu(first half) * second half` is the output.
    """
    pair, first = tl.program_id(0), tl.program_id(1) * ROWS
    dtype: tl.constexpr = output.dtype.element_ty
    place = tl.load(table + (pair // k) * width + pair % k).to(tl.int64)
    codes += place * size + weight + first * IN
    scale = numbers + place * (size // 2) + scales + first
    inputs, row = x + (pair // rows_of_x) * IN, tl.arange(0, ROWS)
    total = _dot8(codes, scale, inputs, OUT - first, IN, ROWS, COLUMNS)
    if GATED:
        up = _dot8(codes + OUT * IN, scale + OUT, inputs, OUT - first, IN, ROWS, COLUMNS)
        result = _gated(total, up, dtype)
    else:
        result = _rounded(total, biases, place * size, bias, first + row, OUT, dtype)
    tl.store(output + pair * OUT + first + row, result, mask=row < OUT - first)


@triton.jit
def _widened(codes, scales, mask):
    """Weights in float32 from codes `[groups, inputs of a group, rows]` and the address of their scales `[groups, rows]`.

    A scale and its zero are two bfloat16 in one word, the scale in its low half: one load for both, and for neighbours.
    """
    words = tl.load(scales, mask=mask[:, None], other=0)
    step = (words << 16).to(tl.float32, bitcast=True)
    zero = (words & -65536).to(tl.float32, bitcast=True) - 8 * step
    return codes.to(tl.float32) * step[:, None, :] + zero[:, None, :]


@triton.jit
def _dot4(
    weight, scales, x, rows, IN: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, PART: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """PART rows of the first half of a tile, and the same of its second half, times `x [IN]`, in float32.

    `weight [IN, HALF]` has in each byte one row of either half, and `scales [IN / GROUP, rows]` are words. Both begin at the
    first of the rows.
    """
    j, group, inner = tl.arange(0, PART), tl.arange(0, GROUPS), tl.arange(0, GROUP)
    low = tl.zeros((GROUPS, GROUP, PART), tl.float32)
    high = tl.zeros((GROUPS, GROUP, PART), tl.float32)
    for begin in range(0, IN // GROUP, GROUPS):
        mask = begin + group < IN // GROUP
        column = (begin + group)[:, None] * GROUP + inner[None, :]
        values = tl.load(x + column, mask=mask[:, None], other=0).to(tl.float32)[:, :, None]
        codes = tl.load(weight + column[:, :, None] * HALF + j[None, None, :], mask=mask[:, None, None], other=0)
        word = scales + (begin + group)[:, None] * rows + j[None, :]
        low += _widened(codes & 15, word, mask) * values
        high += _widened(codes >> 4, word + HALF, mask) * values
    return tl.sum(tl.sum(low, 1), 0), tl.sum(tl.sum(high, 1), 0)


@triton.jit
def int4_linear(
    x, codes, numbers, biases, table, output, size, weight, scales, bias, k, width, rows_of_x,
    IN: tl.constexpr, OUT: tl.constexpr, GATED: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """As `int8_linear`, for weights of `Int4Format`: a program multiplies a part of a tile. `numbers` are words of 4 bytes."""
    pair = tl.program_id(0)
    dtype: tl.constexpr = output.dtype.element_ty
    half: tl.constexpr = TILE // 2
    total: tl.constexpr = 2 * OUT if GATED else OUT
    tile, part = tl.program_id(1) // (half // PART), tl.program_id(1) % (half // PART) * PART
    place = tl.load(table + (pair // k) * width + pair % k).to(tl.int64)
    codes += place * size + weight + tile * IN * half + part
    first = tile * TILE + part
    words = numbers + place * (size // 4) + scales + first
    inputs, row = x + (pair // rows_of_x) * IN, first + tl.arange(0, PART)
    low, high = _dot4(codes, words, inputs, total, IN, GROUP, half, PART, GROUPS)
    if GATED:
        up_low, up_high = _dot4(codes + OUT * IN // 2, words + OUT, inputs, total, IN, GROUP, half, PART, GROUPS)
        result_low, result_high = _gated(low, up_low, dtype), _gated(high, up_high, dtype)
    else:
        result_low = _rounded(low, biases, place * size, bias, row, OUT, dtype)
        result_high = _rounded(high, biases, place * size, bias, row + half, OUT, dtype)
    tl.store(output + pair * OUT + row, result_low)
    tl.store(output + pair * OUT + row + half, result_high)


@triton.jit
def weighted_sum(outputs, weights, result, k, HIDDEN: tl.constexpr, SUMMED: tl.constexpr):
    """`result [tokens, HIDDEN]`: the weighted sum of the `outputs [tokens * k, HIDDEN]`.

    As in transformers, each product with a weight is rounded, and they are summed in float32.
    """
    token, column = tl.program_id(0), tl.program_id(1) * SUMMED + tl.arange(0, SUMMED)
    mask, total = column < HIDDEN, tl.zeros((SUMMED,), tl.float32)
    for choice in range(k):
        pair = token * k + choice
        weight = tl.load(weights + pair)
        one = tl.load(outputs + pair * HIDDEN + column, mask=mask, other=0).to(tl.float32)
        total += (one * weight.to(tl.float32)).to(weight.dtype).to(tl.float32)
    tl.store(result + token * HIDDEN + column, total.to(result.dtype.element_ty), mask=mask)
