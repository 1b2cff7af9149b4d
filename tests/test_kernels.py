"""The kernels that keep the books, copy and count, against plain Python. Without a GPU they run in Triton's interpreter."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from predict_train.predictors.reuse import HALF_LIFE
from predict_train.runtime.device.hits import DeviceHitCount
from predict_train.runtime.device.kernels import copy_blocks
from predict_train.runtime.device.tables import Books, LayerTables, Link
from predict_train.runtime.hits import HitCount
from test_device import DEVICE

# --- who gets a slot -------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    ids: list[list[int]]
    late: bool
    steps: int
    """How many decode steps after the call before."""


class Calls(NamedTuple):
    experts: int
    pool: list[int]
    """The place of each slot."""
    resident: list[int]
    """Experts that are in the first slots, the least recently used first."""
    calls: list[Call]


@st.composite
def calls(draw: st.DrawFn) -> Calls:
    experts = draw(st.integers(1, 9))
    slots = draw(st.integers(1, experts))
    found = []
    for _ in range(6):
        needed = draw(st.lists(st.integers(0, experts - 1), min_size=1, max_size=slots, unique=True))
        k = draw(st.integers(1, 4))
        row = st.lists(st.sampled_from(needed), min_size=k, max_size=k)
        ids = draw(st.lists(row, min_size=1, max_size=3))
        found.append(Call(ids, draw(st.booleans()), draw(st.integers(0, 2))))
    pool = draw(st.permutations(range(2 * slots)))[:slots]
    resident = draw(st.lists(st.integers(0, experts - 1), max_size=slots, unique=True))
    return Calls(experts, pool, resident, found)


class Model:
    """What `assign_slots` does, in Python. Experts have the numbers of their slots, or none."""

    def __init__(self, case: Calls, by_count: bool):
        self.counts = [0.0] * case.experts if by_count else None
        slots = len(case.pool)
        self.pool, self.clock = case.pool, 0
        self.slot_of = {expert: slot for slot, expert in enumerate(case.resident)}
        self.used = [slot - (3 if slot >= len(case.resident) else 2) * slots for slot in range(slots)]
        self.counters = [0, 0, 0]

    @property
    def owner(self) -> list[int]:
        expert_in = {slot: expert for expert, slot in self.slot_of.items()}
        return [expert_in.get(slot, -1) for slot in range(len(self.pool))]

    def execute(self, ids: list[int], tokens: int) -> None:
        if self.counts is not None:
            used, left = Counter(ids), 2 ** (-tokens / HALF_LIFE)
            self.counts = [left * count + used[expert] for expert, count in enumerate(self.counts)]

    def leaves_first(self, slot: int) -> tuple[float, int]:
        """Something that is the least for the slot whose expert leaves first."""
        if self.counts is None:
            return self.used[slot], slot
        owner = self.owner[slot]
        return (-1.0 if owner < 0 else np.float32(self.counts[owner]).item()), slot

    def assign(self, ids: list[int], late: bool, tokens: int) -> list[tuple[int, int]]:
        """Returns the experts to copy, and their places."""
        missing = [expert for expert in ids if expert not in self.slot_of]
        moved = []
        if late:
            self.execute(ids, tokens)
        for expert in dict.fromkeys(missing):
            free = [slot for slot, owner in enumerate(self.owner) if owner not in ids]
            slot = min(free, key=self.leaves_first)
            self.slot_of.pop(self.owner[slot], None)
            self.slot_of[expert] = slot
            moved.append((expert, self.pool[slot]))
        for expert in ids:
            self.used[self.slot_of[expert]] = 2 * self.clock + late
        added = [len(moved), len(ids) - len(missing) if late else 0, len(missing) if late else 0]
        self.counters = [total + more for total, more in zip(self.counters, added, strict=True)]
        return moved


def device_tables(
    experts: int, slots: int, memory: torch.Tensor, blocks: torch.Tensor, programs: int, by_count: bool
) -> LayerTables:
    """Empty books, on the device. `memory` is int64, `blocks` are uint8."""
    books = Books.of(torch.full((experts + 3 * slots,), -1, dtype=torch.int32, device=DEVICE), experts, slots)
    clock = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    counters = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    score = torch.zeros(experts, device=DEVICE) if by_count else None
    return LayerTables(books, counters, blocks, Link(memory, clock, programs), score)


@settings(max_examples=25)
@given(calls(), st.integers(1, 5), st.booleans())
def test_slots_are_assigned_as_in_python(case: Calls, programs: int, by_count: bool) -> None:
    """After each of six calls the books are the model's, nothing that is needed was evicted, and the memory holds the owners."""
    slots, model = len(case.pool), Model(case, by_count)
    blocks = torch.randint(256, (case.experts, 64), dtype=torch.uint8, device=DEVICE)
    memory = torch.zeros(2 * slots, 8, dtype=torch.int64, device=DEVICE)
    tables = device_tables(case.experts, slots, memory, blocks, programs, by_count)
    slot_of, owner, used, pool = books = tables.books
    pool.copy_(torch.tensor(case.pool))
    used.copy_(torch.tensor(model.used))
    for slot, expert in enumerate(case.resident):
        slot_of[expert], owner[slot] = slot, expert
        memory[case.pool[slot]] = blocks[expert].view(torch.int64)
    for ids, late, steps in case.calls:
        tables._link.clock += steps
        model.clock += steps
        flat = list(chain(*ids))
        there = [expert for expert in set(flat) if slot_of[expert] >= 0]
        before = slot_of.clone()
        table = tables.assign(torch.tensor(ids, device=DEVICE), late)
        moved = model.assign(flat, late, len(ids))
        amount = int(tables._moved[-1])
        assert tables._moved[: 2 * amount].view(-1, 2).tolist() == [list(pair) for pair in moved]
        assert all(slot_of[expert] == before[expert] for expert in there), "an expert that the call needs lost its slot"
        assert table.dtype == torch.int32
        assert table.tolist() == [[case.pool[model.slot_of[expert]] for expert in row] for row in ids]
        expected = [[model.slot_of.get(e, -1) for e in range(case.experts)], model.owner, model.used, case.pool]
        assert [part.tolist() for part in books] == expected
        assert tables.counters.tolist() == model.counters
        if not late:  # what is executed then has slots already
            tables.executes(torch.tensor(ids, device=DEVICE))
            model.counters[1] += len(flat)
            model.execute(flat, len(ids))
        if tables.score is not None and model.counts is not None:
            assert tables.score.tolist() == pytest.approx(model.counts, rel=1e-4)
        tables.copy()
        for slot, expert in enumerate(owner.tolist()):
            assert (slot_of == slot).sum() == (expert >= 0)
            assert expert < 0 or torch.equal(memory[pool[slot]].view(torch.uint8), blocks[expert])


# --- copies ----------------------------------------------------------------------------------------------------------


class Copy(NamedTuple):
    moved: list[tuple[int, int]]
    amount: int
    experts: int
    slots: int
    words: int
    programs: int
    at_once: int


@st.composite
def copies(draw: st.DrawFn) -> Copy:
    experts, slots = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    places = draw(st.permutations(range(slots)))
    moved = [(draw(st.integers(0, experts - 1)), place) for place in places]
    amount, words, programs = draw(st.integers(0, slots)), draw(st.integers(1, 40)), draw(st.integers(1, 9))
    return Copy(moved, amount, experts, slots, words, programs, draw(st.sampled_from([4, 16])))


@settings(max_examples=100)
@given(copies())
def test_copies_fill_their_places_and_no_others(case: Copy) -> None:
    host = torch.randint(-(2**62), 2**62, (case.experts, case.words), device=DEVICE)
    memory = torch.randint(-(2**62), 2**62, (case.slots + 1, case.words), device=DEVICE)
    expected = memory.clone()
    for expert, place in case.moved[: case.amount]:
        expected[place] = host[expert]
    moved = torch.tensor([*chain(*case.moved), case.amount], dtype=torch.int32, device=DEVICE)
    copy_blocks[(case.programs,)](
        host, memory, moved, moved[-1:], case.words, case.programs, WORDS=case.at_once, num_warps=1
    )
    assert torch.equal(memory, expected)


# --- hits ------------------------------------------------------------------------------------------------------------


class Guessed(NamedTuple):
    k: int
    counted: list[tuple[list[list[int]], list[list[int]]]]
    """Pairs of candidates, and the router's own ids or logits."""


@st.composite
def guessed(draw: st.DrawFn, by_rank: bool) -> Guessed:
    experts = draw(st.integers(1, 9))
    k = draw(st.integers(1, experts))
    m = draw(st.integers(1, experts))
    orders, found = st.permutations(range(experts)), []
    logits = st.lists(st.integers(-2, 2), min_size=experts, max_size=experts)  # many ties
    for _ in range(draw(st.integers(1, 3))):
        tokens = draw(st.integers(1, 3))
        candidates = [draw(orders)[:m] for _ in range(tokens)]
        found.append((candidates, [draw(logits) if by_rank else draw(orders)[:k] for _ in range(tokens)]))
    return Guessed(k, found)


def across(rows: torch.Tensor) -> torch.Tensor:
    """The same on the device, where neighbours in memory are of different rows."""
    return rows.to(DEVICE).T.contiguous().T


@settings(max_examples=60)
@given(guessed(by_rank=False), st.sampled_from([torch.int32, torch.int64]))
def test_hits_by_ids_are_those_of_the_host(case: Guessed, dtype: torch.dtype) -> None:
    count, host = DeviceHitCount(case.k, torch.device(DEVICE)), HitCount(case.k)
    for candidates, own in case.counted:
        count.add(across(torch.tensor(candidates, dtype=dtype)), across(torch.tensor(own)))
        host.add(torch.tensor(candidates), torch.tensor(own))
    assert count.totals() == host.totals()
    count.clear()
    assert count.totals() == (0, 0)


@settings(max_examples=60)
@given(guessed(by_rank=True), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_hits_by_rank_are_those_of_the_largest_logits(case: Guessed, dtype: torch.dtype) -> None:
    """Of equal logits the first are taken, which is one of the choices that `topk` may make."""
    count, hits, seen = DeviceHitCount(case.k, torch.device(DEVICE)), 0, 0
    for candidates, own in case.counted:
        logits = torch.tensor(own).to(dtype)
        count.add(across(torch.tensor(candidates)), across(logits))
        largest = logits.argsort(dim=-1, descending=True, stable=True)[:, : case.k].tolist()
        hits += sum(len(set(ours) & set(theirs)) for ours, theirs in zip(candidates, largest, strict=True))
        seen += case.k * len(candidates)
    assert count.totals() == (hits, seen)
