"""Which copies to begin, in which order, and who makes room for them. Pure bookkeeping: no tensors and no clock.

The runtime drives it with real copies (`runtime.host.slots`), the simulation with a clock (`runtime.measure.simulation`). For
each layer of a forward pass, both call

    enter(layer, experts)         wrong guesses are let go, and the copies of what is missing begin
    announce(target, guess) ...   the guesses for later layers are known, and their copies begin where there is room
    slot(layer, expert)           for one expert after another: wait until it is there,
    left(layer, expert)           and after its computation give its slot to whoever waits for one
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection
from typing import Protocol

from ..observer import Observer
from .cache import Eviction, Key, SlotCache


class Copies(Protocol):
    """What the schedule asks of whoever makes the copies. A slot is named by its number."""

    def start(self, slot: int, key: Key, urgent: bool) -> None:
        """Begins to copy an expert into a slot. An urgent copy is made before all others that have not begun."""

    def hurry(self, slot: int) -> None:
        """Makes the copy into the slot urgent."""

    def cancel(self, slot: int) -> bool:
        """Takes back a copy that has not begun; False where it has begun, or where there is none."""

    def copying(self, slot: int) -> bool:
        """Whether the copy into the slot is not over yet."""

    def wait(self, slot: int) -> None:
        """Returns when what was last copied into the slot can be read. Raises what the copy raised."""

    def abandon(self) -> None:
        """Takes back every copy that can be, and returns when the others are over."""


class Schedule:
    """The copies of one model. Layers are numbered from 0 among the MoE layers."""

    def __init__(self, copies: Copies, slots: int, layers: int, eviction: Eviction):
        self.hits = self.misses = self.copied = self.cancelled = 0
        self.observer: Observer | None = None
        self._copies, self._shape = copies, (slots, layers, eviction)
        self._cache = SlotCache(*self._shape)
        self._guesses: dict[int, list[int]] = {}
        self._demands: deque[Key] = deque()  # copies that the layer at hand needs and that have no slot yet
        self._prefetches: deque[Key] = deque()  # copies for later layers, the nearest layer's first

    def restart(self) -> None:
        """Forgets who sits where, after a forward pass that broke off while that was being written down."""
        self._copies.abandon()
        self._cache = SlotCache(*self._shape)

    def begin_pass(self) -> None:
        """Says that a forward pass begins: what the one before had asked for is no longer wanted."""
        self._cache.unpin_all()
        self._guesses.clear()
        self._demands.clear()
        self._prefetches.clear()

    def resident(self, layer: int) -> list[int]:
        """The experts of a layer that are in a slot or on their way into one."""
        return self._cache.experts_of(layer)

    def guess(self, layer: int) -> list[int] | None:
        """What was announced for a layer that has not been entered yet."""
        return self._guesses.get(layer)

    def announce(self, layer: int, guess: list[int]) -> None:
        """Takes note of the candidates of a later layer, the best first. `begin_copies` begins what there is room for."""
        self._guesses[layer] = guess
        keys = [(layer, expert) for expert in guess]
        # A nearer layer's go before a farther one's, however early those were known.
        nearer = [key for key in self._prefetches if key[0] <= layer]
        self._prefetches = deque([*nearer, *keys, *(key for key in self._prefetches if key[0] > layer)])

    def enter(self, layer: int, experts: Collection[int]) -> list[int]:
        """Says that a layer comes to execute `experts`; returns them in the order in which they should be.

        Those that are in a slot come first, and last those that are missing, whose copies begin now.
        """
        self._cache.layer = layer
        # What was guessed for this layer and has not begun is no longer a guess.
        self._prefetches = deque(key for key in self._prefetches if key[0] != layer)
        self._release(layer, self._guesses.pop(layer, []), experts)
        present: list[int] = []
        in_flight: list[int] = []
        missing: list[int] = []
        for expert in experts:
            key = layer, expert
            if key not in self._cache:
                missing.append(expert)
                continue
            self._cache.pin(key)
            slot = self._cache.slot(key)
            self._copies.hurry(slot)
            (in_flight if self._copies.copying(slot) else present).append(expert)
        self.hits += len(present) + len(in_flight)
        self.misses += len(missing)
        self._demands = deque((layer, expert) for expert in missing)
        self.begin_copies()
        return present + in_flight + missing

    def slot(self, layer: int, expert: int) -> int:
        """The slot of an expert of the layer that was entered, when it is there. Raises what its copy raised."""
        key = layer, expert
        if key not in self._cache:  # every slot without a pin is still being copied into
            self.begin_copies(wait=True)
        slot = self._cache.slot(key)
        try:
            if self.observer is not None and self._copies.copying(slot):
                begun = time.perf_counter()
                self._copies.wait(slot)
                self.observer.waited(key, begun, time.perf_counter())
            else:
                self._copies.wait(slot)
        except BaseException:
            self._cache.forget(key)
            raise
        return slot

    def left(self, layer: int, expert: int) -> None:
        """Says that the expert has been executed: its slot may be given away."""
        self._cache.unpin((layer, expert))
        self.begin_copies()

    def begin_copies(self, wait: bool = False) -> None:
        """Begins as many copies as there are slots for; what the layer at hand demands goes before what is guessed.

        With `wait` the first of them may take a slot that is still being copied into, after that copy is over.
        """
        for queue, urgent in ((self._demands, True), (self._prefetches, False)):
            while queue:
                key = queue[0]
                if key in self._cache:
                    self._cache.pin(key)
                else:
                    slot = self._cache.admit(key) if wait else self._cache.admit(key, self._copies.copying)
                    if slot is None and wait:  # the guesses for later layers hold every slot
                        self._cache.unpin_all()
                        slot = self._cache.admit(key)
                    if slot is None:
                        return
                    self._copies.start(slot, key, urgent)
                    wait = False
                    self.copied += 1
                    if self.observer is not None:
                        self.observer.copy_begun(key, slot)
                queue.popleft()

    def _release(self, layer: int, guess: list[int], needed: Collection[int]) -> None:
        """Lets go of what was guessed for a layer. A wrong guess whose copy has not begun is never copied."""
        for expert in guess:
            key = layer, expert
            if key not in self._cache:
                continue
            self._cache.unpin(key)
            if expert not in needed and self._copies.cancel(self._cache.slot(key)):
                self._cache.forget(key)
                self.copied -= 1
                self.cancelled += 1
