"""Copies from the store into slots: by reader threads, or on a CUDA stream of their own."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch


class Transfers(Protocol):
    """What the runtime asks of copies. `slots` is `[slots, block]`; a slot is named by its number."""

    slots: torch.Tensor

    def start(self, slot: int, block: torch.Tensor) -> None:
        """Begins to copy `block` into a slot that no computation begun from now on reads until `wait`."""

    def wait(self, slot: int) -> None:
        """Computation begun from now on sees what was last copied into the slot. Raises what the copy raised."""

    def computed(self, slot: int) -> None:
        """Says that the computation that reads the slot has been begun: a later copy must not overtake it."""

    def stalled_seconds(self) -> float:
        """Time that computation has waited for copies so far."""

    def close(self) -> None:
        """Ends all copies and whatever makes them."""


class ThreadTransfers:
    """Reader threads for a device that is the CPU: they copy while torch computes (both release the GIL)."""

    def __init__(self, slots: torch.Tensor, readers: int):
        self.slots = slots
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="expert-reader")
        self._copies: dict[int, Future[None]] = {}
        self._stalled = 0.0

    def start(self, slot: int, block: torch.Tensor) -> None:
        self._copies[slot] = self._pool.submit(self._copy, self.slots[slot], block, self._copies.pop(slot, None))

    @staticmethod
    def _copy(slot: torch.Tensor, block: torch.Tensor, before: Future[None] | None) -> None:
        if before is not None and not before.cancel():
            before.exception()  # the copy that this one replaces must have left the slot, whatever became of it
        slot.copy_(block)

    def wait(self, slot: int) -> None:
        copy = self._copies.pop(slot, None)
        if copy is None:
            return
        if not copy.done():
            begun = time.perf_counter()
            copy.exception()
            self._stalled += time.perf_counter() - begun
        copy.result()

    def computed(self, slot: int) -> None:
        pass  # computation on the CPU is over when its call returns

    def stalled_seconds(self) -> float:
        return self._stalled

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class CudaTransfers:
    """One copy stream beside the compute stream, ordered by one pair of events a slot; the host never waits here."""

    def __init__(self, slots: torch.Tensor):
        self.slots = slots
        self._stream = torch.cuda.Stream(slots.device)
        self._stream.wait_stream(torch.cuda.current_stream(slots.device))  # the slots' memory may have just been freed
        self._copied = [torch.cuda.Event() for _ in range(len(slots))]
        self._read = [torch.cuda.Event() for _ in range(len(slots))]
        self._pending: set[int] = set()
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._spare: list[torch.cuda.Event] = []
        self._stalled = 0.0

    def start(self, slot: int, block: torch.Tensor) -> None:
        self._stream.wait_event(self._read[slot])  # of an event never recorded this is no wait
        with torch.cuda.stream(self._stream):
            self.slots[slot].copy_(block, non_blocking=True)
            self._copied[slot].record(self._stream)
        self._pending.add(slot)

    def wait(self, slot: int) -> None:
        if slot not in self._pending:
            return
        self._pending.discard(slot)
        if self._copied[slot].query():
            return
        before, after = self._timer(), self._timer()
        stream = torch.cuda.current_stream(self.slots.device)
        before.record(stream)
        stream.wait_event(self._copied[slot])
        after.record(stream)
        self._waits.append((before, after))
        if len(self._waits) >= 4096:
            self._settle(synchronize=False)

    def computed(self, slot: int) -> None:
        self._read[slot].record(torch.cuda.current_stream(self.slots.device))

    def stalled_seconds(self) -> float:
        self._settle(synchronize=True)
        return self._stalled

    def close(self) -> None:
        self._stream.synchronize()

    def _timer(self) -> torch.cuda.Event:
        return self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)

    def _settle(self, synchronize: bool) -> None:
        """Adds up the waits that are over, and keeps their events for the next ones."""
        if synchronize and self._waits:
            self._waits[-1][1].synchronize()
        open_waits = []
        for before, after in self._waits:
            if after.query():
                self._stalled += before.elapsed_time(after) / 1000
                self._spare += (before, after)
            else:
                open_waits.append((before, after))
        self._waits = open_waits


def make_transfers(slots: torch.Tensor, readers: int) -> Transfers:
    """The transfers for the device that `slots` lies on."""
    return CudaTransfers(slots) if slots.is_cuda else ThreadTransfers(slots, readers)
