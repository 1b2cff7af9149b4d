"""The Triton kernels of a decode step in which the device decides: who gets a slot, what is copied, and the experts' arithmetic.

Numbers of slots, experts and words fit in 32 bits; offsets into memory are computed in 64. A *row* is one (token, choice) pair.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEVER = tl.constexpr(2**31 - 1)


@triton.jit
def _count(score, ids, rows, experts, decay, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Makes all counts `score [experts]` smaller by the factor `decay`, and the count of each of `ids [rows]` larger by 1."""
    every, row = tl.arange(0, EXPERTS), tl.arange(0, ROWS)
    tl.store(score + every, tl.load(score + every, mask=every < experts) * decay, mask=every < experts)
    tl.debug_barrier()
    tl.atomic_add(score + tl.load(ids + row, mask=row < rows, other=0), 1.0, mask=row < rows)
    tl.debug_barrier()


@triton.jit
def count_uses(score, ids, rows, experts, decay, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """See `_count`. One program."""
    _count(score, ids, rows, experts, decay, ROWS, EXPERTS)


@triton.jit
def assign_slots(
    ids, slot_of, owner, used, pool, clock, score, late, table, moved, amount, counters, rows, slots, experts, decay,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, EXPERTS: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """Gives the experts `ids [rows]` of one layer slots. One program: this is bookkeeping, not work.

    `slot_of [experts]` and `owner [slots]` say which expert is in which of the layer's slots, -1 for none. `pool [slots]` says
    where each slot lies in the memory of all layers. `used [slots]` is when each was last used, in half passes of `clock`. An
    expert without a slot takes the least recently used one. No slot that is needed is taken: meanwhile it is marked as NEVER.
    If it COUNTS, the slot is taken whose expert has the least `score [experts]`, not negative; and if `late`, it counts the uses
    (see `_count`).

    Writes `table [rows]`, each row's place in the memory; and `moved [amount, 2]`, the experts to copy and their places.
    Adds to `counters`: copies, and if `late` (the router has decided) hits and misses.
    """
    now = 2 * tl.load(clock) + late
    row = tl.arange(0, ROWS)
    expert = tl.load(ids + row, mask=row < rows, other=0)
    slot = tl.load(slot_of + expert, mask=row < rows, other=0)
    is_here = (row < rows) & (slot >= 0)
    is_missing = ((row < rows) & (slot < 0)).to(tl.int32)
    tl.store(used + slot, NEVER, mask=is_here)
    tl.store(table + row, tl.load(pool + slot, mask=is_here, other=0), mask=is_here)
    missing, copies = tl.sum(is_missing, 0), 0
    tl.debug_barrier()
    # Whether it counts is known when it is compiled, and `late` is not.
    if COUNTS:  # noqa: SIM102
        if late:
            _count(score, ids, rows, experts, decay, ROWS, EXPERTS)
    if missing > 0:
        place = tl.arange(0, SLOTS)
        since = tl.load(used + place, mask=place < slots, other=NEVER)
        if COUNTS:
            who = tl.load(owner + place, mask=place < slots, other=-1)
            counted = tl.load(score + who, mask=who >= 0, other=0.0)
            # The bits of numbers that are not negative are in the order of the numbers.
            by_count = tl.where(who >= 0, counted.to(tl.int32, bitcast=True), -1)
            since = tl.where(since == NEVER, NEVER, by_count)
        for i in range(rows):
            if tl.sum(tl.where(row == i, is_missing, 0), 0) > 0:
                wanted = tl.load(ids + i).to(tl.int32)
                taken = tl.load(slot_of + wanted)
                if taken < 0:  # else a row before has the same expert
                    taken = tl.argmin(since, 0)
                    since = tl.where(place == taken, NEVER, since)
                    before = tl.load(owner + taken)
                    if before >= 0:
                        tl.store(slot_of + before, -1)
                    tl.store(slot_of + wanted, taken)
                    tl.store(owner + taken, wanted)
                    tl.store(used + taken, now)
                    tl.store(moved + 2 * copies, wanted)
                    tl.store(moved + 2 * copies + 1, tl.load(pool + taken))
                    copies += 1
                tl.store(table + i, tl.load(pool + taken))
                tl.debug_barrier()
    tl.store(used + slot, now, mask=is_here)
    tl.store(amount, copies)
    tl.store(counters, tl.load(counters) + copies)
    if late:
        tl.store(counters + 1, tl.load(counters + 1) + rows - missing)
        tl.store(counters + 2, tl.load(counters + 2) + missing)


@triton.jit
def copy_blocks(host, memory, moved, amount, words, programs, WORDS: tl.constexpr):
    """Copies blocks of 8-byte `words` from registered host memory, which the device reads itself, to their places.

    All programs share the blocks, however few there are, so the same number of bytes is always on its way.
    """
    parts = tl.cdiv(words, WORDS)
    for part in range(tl.program_id(0), tl.load(amount) * parts, programs):
        which = part // parts
        source = host + tl.load(moved + 2 * which).to(tl.int64) * words
        target = memory + tl.load(moved + 2 * which + 1).to(tl.int64) * words
        word = (part % parts) * WORDS + tl.arange(0, WORDS)
        tl.store(target + word, tl.load(source + word, mask=word < words, other=0), mask=word < words)


@triton.jit
def count_hits(
    candidates, own, counters, rows, m, k, experts, M: tl.constexpr, WIDTH: tl.constexpr, BY_RANK: tl.constexpr
):
    """Counts how many of a router's own choices are among the `candidates [rows, m]`; adds to `counters`: hits, seen.

    `own` is the choice `[rows, k]`, or `BY_RANK` the logits `[rows, experts]` of which the router takes the `k` largest.
    """
    j, column, hits = tl.arange(0, M), tl.arange(0, WIDTH), 0
    for row in range(rows):
        candidate = tl.load(candidates + row * m + j, mask=j < m, other=-1)
        if BY_RANK:
            logits = tl.load(own + row * experts + column, mask=column < experts, other=float("-inf")).to(tl.float32)
            mine = tl.load(own + row * experts + candidate, mask=j < m, other=float("-inf")).to(tl.float32)
            larger = logits[None, :] > mine[:, None]
            larger |= (logits[None, :] == mine[:, None]) & (column[None, :] < candidate[:, None])
            hits += tl.sum(((tl.sum(larger.to(tl.int32), 1) < k) & (j < m)).to(tl.int32), 0)
        else:
            chosen = tl.load(own + row * k + column, mask=column < k, other=-2)
            hits += tl.sum(tl.sum((chosen[None, :] == candidate[:, None]).to(tl.int32), 1), 0)
    tl.store(counters, tl.load(counters) + hits)
    tl.store(counters + 1, tl.load(counters + 1) + rows * k)


@triton.jit
def _dot(weight, x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, rows, columns, down, across):
    """`weight [rows, columns] x [columns]` in float32 for the first ROWS rows. A step in `weight` is `down` or `across` elements."""
    row, total = tl.arange(0, ROWS), tl.zeros((ROWS,), tl.float32)
    for begin in range(0, columns, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        block = tl.load(weight + row[:, None] * down + column[None, :] * across, mask=mask, other=0).to(tl.float32)
        total += tl.sum(block * tl.load(x + column, mask=column < columns, other=0).to(tl.float32)[None, :], 1)
    return total


@triton.jit
def gate_up(
    x, memory, table, hidden, size, k, width, offset,
    IN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`silu(gate x) * (up x)` of each row's expert, rounded where torch rounds: `hidden [rows, OUT]`.

    `table [tokens, width]` has the places of the first `k` experts of each token, `x` is `[tokens, IN]`. A block has `size`
    elements, and the weight `[2 OUT, IN]` begins at element `offset`.
    """
    pair, first = tl.program_id(0), tl.program_id(1) * ROWS
    token = pair // k
    dtype: tl.constexpr = hidden.dtype.element_ty
    block = memory + tl.load(table + token * width + pair % k).to(tl.int64) * size + offset
    gate, up = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    row = first + tl.arange(0, ROWS)
    for begin in range(0, IN, COLUMNS):  # both halves at once, so that twice as many bytes are on their way
        column = begin + tl.arange(0, COLUMNS)
        mask = (row < OUT)[:, None] & (column < IN)[None, :]
        place = block + row[:, None] * IN + column[None, :]
        inputs = tl.load(x + token * IN + column, mask=column < IN, other=0).to(tl.float32)[None, :]
        gates, ups = tl.load(place, mask=mask, other=0), tl.load(place + OUT * IN, mask=mask, other=0)
        gate += tl.sum(gates.to(tl.float32) * inputs, 1)
        up += tl.sum(ups.to(tl.float32) * inputs, 1)
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    product = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up
    tl.store(hidden + pair * OUT + row, product.to(dtype), mask=row < OUT)


@triton.jit
def down_sum(
    hidden, weights, memory, table, output, size, k, width, offset,
    IN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The experts' weighted sum `output [tokens, OUT]` of `hidden [tokens * k, IN]`; the rest is as in `gate_up`.

    As in transformers, each expert's output and each product with a weight is rounded, and they are summed in float32.
    """
    token, first = tl.program_id(0), tl.program_id(1) * ROWS
    dtype: tl.constexpr = output.dtype.element_ty
    total = tl.zeros((ROWS,), tl.float32)
    for choice in range(k):
        block = memory + tl.load(table + token * width + choice).to(tl.int64) * size + offset
        pair = token * k + choice
        one = (
            _dot(block + first * IN, hidden + pair * IN, ROWS, COLUMNS, OUT - first, IN, IN, 1).to(dtype).to(tl.float32)
        )
        weight = tl.load(weights + pair)
        total += (one * weight.to(tl.float32)).to(weight.dtype).to(tl.float32)
    row = first + tl.arange(0, ROWS)
    tl.store(output + token * OUT + row, total.to(dtype), mask=row < OUT)


@triton.jit
def expert_linear(
    x, memory, table, output, size, k, width, offset, bias, rows_of_x,
    IN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """One linear layer of each row's expert: `output [rows, OUT]`. `bias` is the bias' element in the block, -1 for none.

    `x` is `[tokens, IN]` if `rows_of_x` is `k`, and `[rows, IN]` if it is 1. A weight of another layout has other strides
    DOWN (from one output to the next) and ACROSS. The rest is as in `gate_up`.
    """
    pair, first = tl.program_id(0), tl.program_id(1) * ROWS
    block = memory + tl.load(table + (pair // k) * width + pair % k).to(tl.int64) * size
    total = _dot(
        block + offset + first * DOWN, x + (pair // rows_of_x) * IN, ROWS, COLUMNS, OUT - first, IN, DOWN, ACROSS
    )
    row = first + tl.arange(0, ROWS)
    dtype: tl.constexpr = output.dtype.element_ty
    if bias >= 0:  # as in transformers, the product is rounded before
        total = total.to(dtype).to(tl.float32) + tl.load(block + bias + row, mask=row < OUT, other=0).to(tl.float32)
    tl.store(output + pair * OUT + row, total.to(dtype), mask=row < OUT)
