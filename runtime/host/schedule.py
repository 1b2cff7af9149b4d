"""Which copies begin, in which order, and which experts make room for them. It has no tensors, and no clock but that of its prices.

The runtime drives it with real copies (`runtime.host.slots`), the simulation with a clock (`runtime.measure.simulation`). For
each layer of a forward pass, both call

    enter(layer, experts)         drops wrong guesses, and begins the copies of the missing experts
    announce(target, guess) ...   takes the guesses for later layers; their copies begin where there is room
    slot(layer, expert)           for each expert in turn: waits until it is in its slot
    left(layer, experts)          after their computation: their slots may be used for other experts
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..engine import Counters
from ..observer import Observer
from .cache import Eviction, Key, SlotCache
from .counts import DecayedCounts
from .followers import Followers
from .price import Prices


class Copies(Protocol):
    """Makes the copies for a schedule. Slots are given by their numbers."""

    def start(self, slot: int, key: Key, urgent: bool) -> None:
        """Asks for the copy of an expert into a slot. An urgent copy goes before all that have not begun and are not urgent."""

    def hurry(self, slot: int) -> None:
        """Makes the copy into the slot urgent."""

    def cancel(self, slot: int) -> bool:
        """Cancels the copy into the slot. Returns False where it has begun already, or where there is none."""

    def copying(self, slot: int) -> bool:
        """Whether the copy into the slot is not over yet."""

    def wait(self, slot: int) -> None:
        """Waits until what was last copied into the slot can be read. Raises what the copy raised."""

    def abandon(self) -> None:
        """Cancels every copy that has not begun, and waits for the others."""


class Counted(Protocol):
    """Counts how one layer uses its experts, and says from that what each is worth."""

    @property
    def worth(self) -> Sequence[float]:
        """The more it is worth to keep an expert, the larger."""

    def add(self, ids: NDArray[np.int64]) -> None:
        """Says what tokens have used: the rows of `ids` `[tokens, k]`. What is no expert of the layer is left out."""


COUNTED: dict[Eviction, Callable[[int], Counted]] = {
    Eviction.FREQUENCY: DecayedCounts,
    Eviction.FOLLOWERS: Followers,
}
"""What counts for evictions that go by what was used, made for a number of experts."""


class Schedule:
    """The schedule of one model's copies. Layers are counted from 0 among the MoE layers."""

    def __init__(
        self, copies: Copies, slots: int, layers: int, eviction: Eviction, experts: int, prices: Prices | None = None
    ):
        """`experts` are those of a layer. With `prices`, a copy of a candidate begins only if it is worth it."""
        self.counters = Counters()
        """Its hits, misses, copies and cancelled copies are counted here."""
        self.observer: Observer | None = None
        kind = COUNTED.get(eviction)
        self.counted = None if kind is None else [kind(experts) for _ in range(layers)]
        """What counts the uses of each layer, if it decides who leaves a slot."""
        self._scores: list[Sequence[float]] = [[0.0] * experts for _ in range(layers)]
        self._prices, self._copies = prices, copies
        self._under_way: dict[int, int] = {}  # by slot the layer of copies that were begun; some may be over
        self._too_many = math.inf
        """With so many copies under way no guess is worth its own, and ever less as time passes, until another layer is entered."""
        self._empty_cache = partial(SlotCache, slots, (layers, experts), eviction, self._worth)
        self._cache = self._empty_cache()
        self._guesses: dict[int, list[int]] = {}
        self._demands: deque[Key] = deque()  # needed by the current layer, and without a slot yet
        self._prefetches: deque[Key] = deque()  # for later layers, the nearest layer first

    def restart(self, resident: Iterable[tuple[Key, int]] = ()) -> None:
        """Forgets which expert is in which slot, but for those `resident`, the least recently used first.

        It is called after a forward pass that broke off, since what it knows may be wrong then.
        """
        self._copies.abandon()
        self._under_way.clear()
        self._cache = self._empty_cache()
        self._cache.fill(resident)

    def settled(self) -> list[tuple[Key, int]]:
        """Who is in which slot when all copies are over, of each layer the first to leave first."""
        found = self._cache.resident()
        for _, slot in found:
            self._copies.wait(slot)
        worth = [self._worth(layer) for layer in range(len(self._scores))]
        return sorted(found, key=lambda pair: worth[pair[0][0]][pair[0][1]])  # of equals the least recently used first

    def begin_pass(self, tokens: int = 1) -> None:
        """Says that a forward pass over so many tokens begins. What the pass before has asked for is dropped."""
        if self._prices is not None:
            self._prices.begin_pass(tokens)
        self._cache.unpin_all()
        self._guesses.clear()
        self._demands.clear()
        self._prefetches.clear()

    def resident(self, layer: int) -> list[int]:
        """The experts of a layer that are in a slot or on their way to one."""
        return self._cache.experts_of(layer)

    def guess(self, layer: int) -> list[int] | None:
        """The guess that was announced for a layer, until the layer is entered."""
        return self._guesses.get(layer)

    def rate(self, layer: int, scores: Sequence[float]) -> None:
        """Says how soon each expert of a layer is used again: the higher its score, the sooner. It holds until it is said again."""
        self._scores[layer] = scores
        self._cache.rated(layer)

    def announce(self, layer: int, guess: list[int], chances: Mapping[int, float] | None = None) -> None:
        """Queues the candidates of a later layer, the best first. `begin_copies` begins those for which there is room.

        For `chances` see `Prices.announce`.
        """
        self._guesses[layer] = guess
        if self._prices is not None:
            absent = {expert for expert in guess if (layer, expert) not in self._cache}
            self._prices.announce(layer, guess, chances, absent)
        self._too_many = math.inf
        keys = [(layer, expert) for expert in guess]
        # Those of a nearer layer go first, even where those of a farther layer were known before. The sort is stable.
        self._prefetches = deque(sorted([*self._prefetches, *keys], key=itemgetter(0)))

    def enter(self, layer: int, experts: Collection[int], ids: NDArray[np.int64] | None = None) -> list[int]:
        """Says that a layer is to execute `experts`, and returns them in the order in which it should.

        First come those in a slot, then those on their way, and last those that are missing. The copies of these begin now.
        `ids` `[tokens, k]` are what each token uses; by default there is one, which uses `experts`.
        """
        self._cache.layer = layer
        self._too_many = math.inf
        if self.counted is not None:
            self.counted[layer].add(np.array([[*experts]]) if ids is None else ids)
            self._cache.rated(layer)
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
            if self._copies.copying(slot):
                self._copies.hurry(slot)
                in_flight.append(expert)
            else:
                present.append(expert)
        if self._prices is not None:
            self._prices.enter(layer, experts, len(missing))
        self.counters.hits += len(present) + len(in_flight)
        self.counters.misses += len(missing)
        self._demands = deque((layer, expert) for expert in missing)
        self.begin_copies()
        return present + in_flight + missing

    def slot(self, layer: int, expert: int) -> int:
        """Waits until an expert of the current layer is in its slot, and returns the slot. Raises what its copy raised."""
        key = layer, expert
        if key not in self._cache:  # all slots that could be given to it are still being copied into
            self.begin_copies(wait=True)
        slot = self._cache.slot(key)
        try:
            if (self.observer is not None or self._prices is not None) and self._copies.copying(slot):
                self._wait(key, slot)
            else:
                self._copies.wait(slot)
        except BaseException:
            self._cache.forget(key)
            raise
        return slot

    def is_ready(self, layer: int, expert: int) -> bool:
        """Whether an expert of the current layer is in its slot. Not said where others wait for its slot, so that it is left soon."""
        key = layer, expert
        return not self._demands and key in self._cache and not self._copies.copying(self._cache.slot(key))

    def left(self, layer: int, experts: Iterable[int]) -> None:
        """Says that experts have been executed. Their slots may be used for others now."""
        for expert in experts:
            self._cache.unpin((layer, expert))
        if self._prices is not None:
            self._prices.left()
        self.begin_copies()

    def begin_copies(self, wait: bool = False) -> None:
        """Begins as many copies as there are slots for: first those that the current layer needs, then the guesses.

        With `wait`, the first of them may wait for a slot that is still being copied into. A guess that is not worth its copy now is
        asked for again when fewer copies are before it, or another layer is entered.
        """
        while self._demands:
            is_there = self._demands[0] in self._cache
            if not self._begin(self._demands[0], urgent=True, wait=wait):
                return
            self._demands.popleft()
            wait = wait and is_there
        if self._prices is None:
            while self._prefetches and self._begin(self._prefetches[0], urgent=False):
                self._prefetches.popleft()
        elif self._prefetches:
            self._begin_worthy(self._prices)

    def _begin_worthy(self, prices: Prices) -> None:
        """Begins the copies of those guesses that are worth it now. The others stay in the queue."""
        self._under_way = {slot: layer for slot, layer in self._under_way.items() if self._copies.copying(slot)}
        if len(self._under_way) >= self._too_many:
            return
        later: list[Key] = []
        least, known = math.inf, (-1, -1)
        while self._prefetches:
            layer, expert = key = self._prefetches[0]
            if key not in self._cache:
                if known != (layer, len(self._under_way)):  # it is the same for all candidates of a layer
                    known = layer, len(self._under_way)
                    least = self._least_chance(prices, layer)
                if prices.chance(layer, expert) <= least:
                    later.append(self._prefetches.popleft())
                    continue
            if not self._begin(key, urgent=False):
                break
            self._prefetches.popleft()
        else:
            self._too_many = len(self._under_way)
        self._prefetches.extendleft(reversed(later))

    def _begin(self, key: Key, urgent: bool, wait: bool = False) -> bool:
        """Whether an expert has a slot or gets one. Its copy begins unless it is there."""
        if key in self._cache:
            self._cache.pin(key)
            return True
        slot = self._cache.admit(key) if wait else self._cache.admit(key, self._copies.copying)
        if slot is None and wait:  # guesses for later layers hold all slots
            self._cache.unpin_all()
            slot = self._cache.admit(key)
        if slot is None:
            return False
        self._copies.start(slot, key, urgent)
        self._under_way[slot] = key[0]
        if self._prices is not None:
            self._prices.copied(key, self._cache.evicted)
        self.counters.copies += 1
        if self.observer is not None:
            self.observer.copy_begun(key, slot)
        return True

    def _wait(self, key: Key, slot: int) -> None:
        begun = time.perf_counter()
        before = None if self._prices is None else self._prices.clock()
        self._copies.wait(slot)
        if self._prices is not None and before is not None:
            self._prices.stalled(self._prices.clock() - before)
        if self.observer is not None:
            self.observer.waited(key, begun, time.perf_counter())

    def _least_chance(self, prices: Prices, layer: int) -> float:
        """See `Prices.least_chance`."""
        needed = sum(other <= self._cache.layer for other in self._under_way.values()) + len(self._demands)
        return prices.least_chance(layer, len(self._under_way), needed, not self._cache.has_free)

    def _worth(self, layer: int) -> Sequence[float]:
        """What it is worth to keep each expert of a layer."""
        return self._scores[layer] if self.counted is None else self.counted[layer].worth

    def _release(self, layer: int, guess: list[int], needed: Collection[int]) -> None:
        """Unpins what was guessed for a layer. A wrong guess is cancelled if its copy has not begun."""
        for expert in guess:
            key = layer, expert
            if key not in self._cache:
                continue
            self._cache.unpin(key)
            if expert not in needed and self._copies.cancel(self._cache.slot(key)):
                self._cache.forget(key)
                self.counters.copies -= 1
                self.counters.cancelled += 1
