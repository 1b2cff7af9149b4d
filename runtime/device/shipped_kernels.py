"""The Triton kernels over blocks that are kept as they are shipped. They round a widened weight to the model's dtype, as its format does."""

from __future__ import annotations

import triton
import triton.language as tl

from .quantized_kernels import _gated, _rounded


@triton.jit
def _dot_fp8(
    weight, scales, x, first, rows, IN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HIGH: tl.constexpr,
    WIDE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """ROWS rows from row `first` of `weight [.., IN]` times `x [IN]`, in float32; of them only the first `rows` count.

    Weights are e4m3, with a scale in float32 for each block of HIGH by WIDE. See `Fp8Format.widen`.
    """
    row, total = first + tl.arange(0, ROWS), tl.zeros((ROWS,), tl.float32)
    for begin in range(0, IN, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        mask = (row < first + rows)[:, None] & (column < IN)[None, :]
        codes = tl.load(weight + row[:, None] * IN + column[None, :], mask=mask, other=0).to(tl.int8, bitcast=True)
        numbers = ((codes.to(tl.int32) << 20) & -2014314496).to(tl.float32, bitcast=True)
        block = (row // HIGH)[:, None] * (IN // WIDE) + (column // WIDE)[None, :]
        factor = tl.load(scales + block, mask=mask, other=0) * 1.329227995784916e36  # 2 ** 120
        values = tl.load(x + column, mask=column < IN, other=0).to(tl.float32)
        total += tl.sum((numbers * factor).to(dtype).to(tl.float32) * values[None, :], 1)
    return total


@triton.jit
def fp8_linear(
    x, codes, numbers, biases, table, output, size, weight, scales, bias, k, width, rows_of_x,
    IN: tl.constexpr, OUT: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HIGH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """As `int8_linear`, for weights of `Fp8Format` in blocks of HIGH by WIDE. `numbers` are float32."""
    pair, first = tl.program_id(0), tl.program_id(1) * ROWS
    dtype: tl.constexpr = output.dtype.element_ty
    place = tl.load(table + (pair // k) * width + pair % k).to(tl.int64)
    codes += place * size + weight
    scale = numbers + place * (size // 4) + scales
    inputs, row = x + (pair // rows_of_x) * IN, tl.arange(0, ROWS)
    total = _dot_fp8(codes, scale, inputs, first, OUT - first, IN, ROWS, COLUMNS, HIGH, WIDE, dtype)
    if GATED:
        up = _dot_fp8(codes, scale, inputs, OUT + first, OUT - first, IN, ROWS, COLUMNS, HIGH, WIDE, dtype)
        result = _gated(total, up, dtype)
    else:
        result = _rounded(total, biases, place * size, bias, first + row, OUT, dtype)
    tl.store(output + pair * OUT + first + row, result, mask=row < OUT - first)


@triton.jit
def _e2m1(codes, factor, dtype: tl.constexpr):
    """Numbers of four bits, times a power of two that is greater by what they lack, in `dtype`. See `Mxfp4Format.widen`."""
    bits = ((codes & 8) << 28) | ((codes & 7) << 22)
    return (bits.to(tl.float32, bitcast=True) * factor).to(dtype).to(tl.float32)


@triton.jit
def _dot_mxfp4(
    weight, scales, x, first, rows, TOTAL: tl.constexpr, IN: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """ROWS rows from row `first` of a weight times `x [IN]`, in float32; of them only the first `rows` count.

    `weight [IN / GROUP, GROUP / 2, TOTAL]` has in each byte two inputs of a row, and `scales [IN / GROUP, TOTAL]` are exponents.
    """
    row, group, inner = first + tl.arange(0, ROWS), tl.arange(0, GROUPS), tl.arange(0, GROUP // 2)
    total = tl.zeros((GROUPS, GROUP // 2, ROWS), tl.float32)
    for begin in range(0, IN // GROUP, GROUPS):
        known = (begin + group)[:, None] < IN // GROUP
        mask = known & (row < first + rows)[None, :]
        exponent = tl.load(scales + (begin + group)[:, None] * TOTAL + row[None, :], mask=mask, other=0)
        factor = ((exponent.to(tl.int32) + 126) << 23).to(tl.float32, bitcast=True)[:, None, :]
        pair = (begin + group)[:, None] * (GROUP // 2) + inner[None, :]
        codes = tl.load(weight + pair[:, :, None] * TOTAL + row[None, None, :], mask=mask[:, None, :], other=0)
        even = tl.load(x + 2 * pair, mask=known, other=0).to(tl.float32)[:, :, None]
        odd = tl.load(x + 2 * pair + 1, mask=known, other=0).to(tl.float32)[:, :, None]
        codes = codes.to(tl.int32)
        total += _e2m1(codes & 15, factor, dtype) * even + _e2m1(codes >> 4, factor, dtype) * odd
    return tl.sum(tl.sum(total, 1), 0)


@triton.jit
def mxfp4_linear(
    x, codes, numbers, biases, table, output, size, weight, scales, bias, k, width, rows_of_x,
    IN: tl.constexpr, OUT: tl.constexpr, GATED: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """As `int8_linear`, for weights of `Mxfp4Format`. `numbers` are bytes."""
    pair, first = tl.program_id(0), tl.program_id(1) * ROWS
    dtype: tl.constexpr = output.dtype.element_ty
    total: tl.constexpr = 2 * OUT if GATED else OUT
    place = tl.load(table + (pair // k) * width + pair % k).to(tl.int64)
    codes += place * size + weight
    scale = numbers + place * size + scales
    inputs, row = x + (pair // rows_of_x) * IN, tl.arange(0, ROWS)
    found = _dot_mxfp4(codes, scale, inputs, first, OUT - first, total, IN, GROUP, ROWS, GROUPS, dtype)
    if GATED:
        up = _dot_mxfp4(codes, scale, inputs, OUT + first, OUT - first, total, IN, GROUP, ROWS, GROUPS, dtype)
        result = _gated(found, up, dtype)
    else:
        result = _rounded(found, biases, place * size, bias, first + row, OUT, dtype)
    tl.store(output + pair * OUT + first + row, result, mask=row < OUT - first)
