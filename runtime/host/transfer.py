"""Copies from the store into slots: by reader threads, on a CUDA stream of their own, or first by threads and then on a stream."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..errors import StoreError
from ..observer import Observer
from ..registered import register
from ..store import ExpertStore, MemoryStore, empty_blocks
from .cache import Key
from .readers import Copy, Readers
from .schedule import Copies


class Transfers(Copies, Protocol):
    """Copies into `slots` `[slots, bytes]`, uint8, in the right order with the computation that reads them.

    Only the thread that computes calls these methods. After `wait`, new computation sees what was last copied into the slot.
    After `computed`, a later copy into the slot waits for the computation that reads it.
    """

    slots: torch.Tensor

    def observe(self, observer: Observer | None) -> None:
        """Tells `observer` of the copies that threads make; None tells nobody."""

    def computed(self, slot: int) -> None:
        """Says that the computation that reads the slot has begun."""

    def stalled_seconds(self) -> float:
        """Seconds that the computation has waited for copies so far."""

    def copy_seconds(self) -> float | None:
        """What one copy takes, as measured lately, or None if it was not."""

    def close(self) -> None:
        """Ends all copies, and the threads that make them. Nothing here holds the memory of the slots then."""


class ThreadTransfers:
    """Reader threads for a device that is the CPU: they read into the slots while torch computes (both release the GIL)."""

    def __init__(self, store: ExpertStore, slots: torch.Tensor, readers: int):
        self.slots = slots
        targets = list(slots.numpy())  # made once, so that a read allocates nothing
        self._begin(readers, lambda copy: store.read(*copy.key, targets[copy.slot]), targets)

    def _begin(self, readers: int, copy: Callable[[Copy], None], memory: list[Any] | deque[Any]) -> None:
        """`memory` is what `copy` reads into. It is emptied at `close`, since an error's frames may still refer to `copy`."""
        self._readers, self._memory = Readers(readers, copy), memory
        self._copies: dict[int, Copy] = {}
        self._stalled = 0.0
        # The threads do not refer to this object. So it can be collected, and ends them, where nobody closes it.
        self._close = weakref.finalize(self, self._readers.close)

    def observe(self, observer: Observer | None) -> None:
        self._readers.observer = observer

    def start(self, slot: int, key: Key, urgent: bool) -> None:
        before = self._copies.get(slot)
        if before is not None and not before.cancel():
            self._readers.wait(before)  # even a copy that failed must have left the slot
        self._copies[slot] = copy = Copy(slot, key)
        self._readers.ask(copy, urgent)

    def hurry(self, slot: int) -> None:
        copy = self._copies.get(slot)
        if copy is not None and not copy.has_begun:
            self._readers.ask(copy, urgent=True)

    def cancel(self, slot: int) -> bool:
        copy = self._copies.get(slot)
        if copy is None or not copy.cancel():
            return False
        del self._copies[slot]
        return True

    def copying(self, slot: int) -> bool:
        copy = self._copies.get(slot)
        return copy is not None and not copy.is_over

    def wait(self, slot: int) -> None:
        copy = self._copies.get(slot)
        if copy is None:
            return
        if not copy.is_over:
            begun = time.perf_counter()
            self._readers.wait(copy)
            self._stalled += time.perf_counter() - begun
        del self._copies[slot]
        error, copy.error = copy.error, None
        try:
            if error is not None and not isinstance(error, Exception):  # SystemExit should not end the program
                name = type(error).__name__
                raise StoreError(f"a read was broken off ({name}); run the model again") from error
            if error is not None:
                raise error
        finally:
            del error  # it refers to the frames, and so to what they hold

    def computed(self, slot: int) -> None:
        pass  # computation on the CPU is over when its call returns

    def abandon(self) -> None:
        for copy in self._copies.values():
            if not copy.cancel():
                self._readers.wait(copy)
        self._copies.clear()

    def stalled_seconds(self) -> float:
        return self._stalled

    def copy_seconds(self) -> float | None:
        return self._readers.seconds

    def close(self) -> None:
        self._close()
        self._memory.clear()
        self.slots = torch.empty(0)


class CudaTransfers:
    """One copy stream beside the compute stream. A pair of events for each slot keeps their order; the host never waits.

    Copies are enqueued as they are asked for, so none can be taken back. A layer asks for what it is missing before it asks for
    the guesses for the next layer. So only guesses for the layer itself can stand before a copy that it is missing.
    """

    def __init__(self, slots: torch.Tensor, block: Callable[[int, int], torch.Tensor] | None = None):
        """`block(layer, expert)` gives the blocks for `start`; who calls `enqueue` gives the block itself."""
        self.slots, self._block = slots, block
        self.stream = torch.cuda.Stream(slots.device)
        self.stream.wait_stream(
            torch.cuda.current_stream(slots.device)
        )  # the computation before may still use the memory of the slots
        self.copied = [torch.cuda.Event() for _ in range(len(slots))]
        self._read = [torch.cuda.Event() for _ in range(len(slots))]
        self.pending: set[int] = set()
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._spare: list[torch.cuda.Event] = []
        self._stalled = 0.0

    def observe(self, observer: Observer | None) -> None:
        pass  # no thread makes these copies; the profiler of the device shows them

    def start(self, slot: int, key: Key, urgent: bool) -> None:  # noqa: ARG002
        assert self._block is not None
        self.enqueue(slot, self._block(*key))
        self.pending.add(slot)

    def enqueue(self, slot: int, block: torch.Tensor) -> None:
        """Enqueues the copy of a block. It is best registered: else the host waits here until the block is read."""
        self.stream.wait_event(self._read[slot])  # returns at once where it was never recorded
        with torch.cuda.stream(self.stream):
            self.slots[slot].copy_(block, non_blocking=True)
            self.copied[slot].record(self.stream)

    def hurry(self, slot: int) -> None:
        pass

    def cancel(self, slot: int) -> bool:  # noqa: ARG002
        return False

    def copying(self, slot: int) -> bool:
        return slot in self.pending and not self.copied[slot].query()

    def wait(self, slot: int) -> None:
        if slot not in self.pending:
            return
        self.pending.discard(slot)
        if self.copied[slot].query():
            return
        before, after = self._timer(), self._timer()
        stream = torch.cuda.current_stream(self.slots.device)
        before.record(stream)
        stream.wait_event(self.copied[slot])
        after.record(stream)
        self._waits.append((before, after))
        if len(self._waits) >= 4096:
            self._settle(synchronize=False)

    def computed(self, slot: int) -> None:
        self._read[slot].record(torch.cuda.current_stream(self.slots.device))

    def abandon(self) -> None:
        self.stream.synchronize()
        self.pending.clear()

    def stalled_seconds(self) -> float:
        self._settle(synchronize=True)
        return self._stalled

    def copy_seconds(self) -> float | None:
        return None

    def close(self) -> None:
        self.stream.synchronize()
        self.slots = torch.empty(0)

    def _timer(self) -> torch.cuda.Event:
        return self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)

    def _settle(self, synchronize: bool) -> None:
        """Adds up the waits that are over. Their events are used again."""
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


class StagedTransfers(ThreadTransfers):
    """Reader threads that read into a ring of registered buffers. From there the copy stream copies each block to its slot."""

    def __init__(self, store: ExpertStore, slots: torch.Tensor, readers: int):
        self.slots, device = slots, slots.device
        cuda = CudaTransfers(slots)
        count = 2 * readers  # a reader fills one while the other is copied to the device
        buffers = empty_blocks(count, store.format.bytes, torch.device("cpu")).zero_()
        self._registration = register(buffers, device)
        # No reader has more than one, so there is always one to take.
        ring = deque(
            (buffer, target, torch.cuda.Event()) for buffer, target in zip(buffers, buffers.numpy(), strict=True)
        )
        one_at_a_time = threading.Lock()

        def copy(job: Copy) -> None:
            buffer, target, left = ring.popleft()
            try:
                left.synchronize()  # returns at once where it was never recorded
                store.read(*job.key, target)
                with one_at_a_time, torch.cuda.device(device):
                    cuda.enqueue(job.slot, buffer)
                    left.record(cuda.stream)
            finally:
                ring.append((buffer, target, left))

        self._cuda = cuda
        self._begin(readers, copy, ring)

    def copying(self, slot: int) -> bool:
        return super().copying(slot) or not self._cuda.copied[slot].query()

    def wait(self, slot: int) -> None:
        if slot in self._copies:
            super().wait(slot)
            self._cuda.pending.add(slot)
        self._cuda.wait(slot)

    def computed(self, slot: int) -> None:
        self._cuda.computed(slot)

    def abandon(self) -> None:
        super().abandon()
        self._cuda.abandon()

    def stalled_seconds(self) -> float:
        return self._stalled + self._cuda.stalled_seconds()

    def close(self) -> None:
        super().close()
        self._cuda.close()
        self._registration = None


def make_transfers(store: ExpertStore, slots: torch.Tensor, readers: int) -> Transfers:
    """The transfers from `store` to the device that `slots` lies on."""
    if not slots.is_cuda:
        return ThreadTransfers(store, slots, readers)
    if isinstance(store, MemoryStore) and store.is_registered:
        return CudaTransfers(slots, store.block)
    return StagedTransfers(store, slots, readers)
