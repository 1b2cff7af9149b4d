"""The bookkeeping of one layer's slots, as small tensors on the device, and the two kernels that work on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import triton

from ...predictors.reuse import HALF_LIFE
from .kernels import assign_slots, copy_blocks, count_uses

WORDS, WARPS = 1024, 8
"""Words of 8 bytes that a program copies at once, and its warps."""
MEASURED = 8
"""Blocks that are copied to measure how fast it goes."""


class Books(NamedTuple):
    """Who is in which slot of one layer. All are views of one int32 tensor or array `[experts + 3 * most]`."""

    slot_of: torch.Tensor
    """`[experts]`: the slot of each expert, or -1."""
    owner: torch.Tensor
    """`[slots]`: the expert in each slot, or -1."""
    used: torch.Tensor
    """`[slots]`: when each was last used, in half passes. The least goes first."""
    pool: torch.Tensor
    """`[slots]`: where each slot lies in the memory of all layers."""

    @classmethod
    def of(cls, row: torch.Tensor, experts: int, slots: int) -> Self:
        slot_of, *rest = row.split([experts, *[(len(row) - experts) // 3] * 3])
        return cls(slot_of, *(part[:slots] for part in rest))


@dataclass
class Link:
    """What the copies of all layers share."""

    memory: torch.Tensor
    """The slots of all layers, int64 `[slots, words]`."""
    clock: torch.Tensor
    """The number of the decode step, int32 `[1]`."""
    programs: int
    """How many programs copy. Many fill the link better, and leave fewer of the device's processors to compute."""


def decay(tokens: int) -> float:
    """What is left of a use's count after so many tokens."""
    return float(2.0 ** (-tokens / HALF_LIFE))


class LayerTables:
    """The slots of one layer."""

    def __init__(
        self, books: Books, counters: torch.Tensor, blocks: torch.Tensor, link: Link, score: torch.Tensor | None = None
    ):
        """`counters` is int64 `[3]`: copies, hits, misses. `blocks`, uint8 `[experts, bytes]`, are in host memory.

        `score` fp32 `[experts]` are the decayed counts that decide who leaves a slot, or None.
        """
        self.books, self.counters, self._link, self.score = books, counters, link, score
        self.slots = len(books.owner)
        self._blocks = blocks.view(torch.int64)
        self._moved = torch.zeros(2 * self.slots + 1, dtype=torch.int32, device=books.owner.device)
        """Experts to copy and their places, and last how many they are."""

    def assign(self, ids: torch.Tensor, late: bool) -> torch.Tensor:
        """Gives the experts `ids` slots. Returns their places, int32, in the shape of `ids`.

        There must be no more distinct ids than slots. `late` says that the router has decided.
        """
        ids = ids.to(torch.int64).contiguous()
        table = torch.empty_like(ids, dtype=torch.int32)
        experts = len(self.books.slot_of)
        assign_slots[(1,)](
            ids, *self.books, self._link.clock, self.books.used if self.score is None else self.score, int(late), table,
            self._moved, self._moved[2 * self.slots :], self.counters, ids.numel(), self.slots, experts, decay(len(ids)),
            ROWS=triton.next_power_of_2(ids.numel()), SLOTS=triton.next_power_of_2(self.slots),
            EXPERTS=triton.next_power_of_2(experts), COUNTS=self.score is not None, num_warps=1,
        )  # fmt: skip
        return table

    def executes(self, ids: torch.Tensor) -> None:
        """Says that the experts `ids` `[tokens, k]` are executed, all of which have slots since an earlier `assign`."""
        self.counters[1].add_(ids.numel())
        if self.score is not None:
            experts = len(self.score)
            count_uses[(1,)](
                self.score, ids.to(torch.int64).contiguous(), ids.numel(), experts, decay(len(ids)),
                ROWS=triton.next_power_of_2(ids.numel()), EXPERTS=triton.next_power_of_2(experts), num_warps=1,
            )  # fmt: skip

    def copy(self) -> None:
        """Copies those that had none before `assign`."""
        copy_blocks[(self._link.programs,)](
            self._blocks, self._link.memory, self._moved, self._moved[2 * self.slots :], self._blocks.shape[1],
            self._link.programs, WORDS=WORDS, num_warps=WARPS,
        )  # fmt: skip

    def measure_copy(self) -> float:
        """The milliseconds in which some blocks are copied while nothing computes. The slots must be empty."""
        count = min(self.slots, len(self._blocks), MEASURED)
        pairs = torch.stack([torch.arange(count, device="cpu"), self.books.pool[:count].cpu()], dim=1)
        self._moved[: 2 * count] = pairs.flatten()
        self._moved[-1] = count
        begun, over = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        self.copy()
        over.record()
        over.synchronize()
        return begun.elapsed_time(over)
