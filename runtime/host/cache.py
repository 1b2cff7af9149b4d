"""Which expert is in which device slot. It has no tensors and makes no copies."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum

from .pool import Pool

Key = tuple[int, int]
"""(MoE layer counted from 0, expert)"""


class Eviction(StrEnum):
    """Which expert leaves its slot for another one. All layers share the slots."""

    LRU = "lru"
    """The least recently used one. The layers run in a cycle, so with fewer slots than one token needs it evicts each expert
    just before its next use."""
    LEAST_STALE = "least_stale"
    """The least recently used one of the layer that runs again last, which is the layer that ran last. Layers with more than an
    equal share of the slots come first. Else the slots would stay full of the last layers' experts after a prompt."""
    FREQUENCY = "frequency"
    """The one that was used least often lately, by a decayed count, of the same layer as under `least_stale`."""
    FOLLOWERS = "followers"
    """The one of all layers that is least likely to follow on the experts of its layer's last token, as was counted so far."""
    LEARNED = "learned"
    """The one of all layers that is used again last, as reuse predictors say (`predictors.reuse`)."""


ONE_POOL = (Eviction.FOLLOWERS, Eviction.LEARNED)
"""By what these say experts of different layers can be compared, so the least worth of all leaves (docs/keeping.md)."""


class SlotCache:
    """Which expert is in which slot. A pinned expert keeps its slot. `eviction` says which of the others leaves first."""

    def __init__(
        self,
        slots: int,
        shape: tuple[int, int],
        eviction: Eviction = Eviction.LEAST_STALE,
        worth: Callable[[int], Sequence[float]] = lambda _: (),
    ):
        """`shape` are the layers and the experts of each. `worth` says how much it is worth to keep each expert of a layer, where
        the eviction goes by that. Of equals in one layer the least recently used one leaves, of equals in one pool the first."""
        layers, _ = shape
        self.slots, self.eviction, self._worth = slots, eviction, worth
        self._pool = Pool(*shape, worth) if eviction in ONE_POOL else None
        self.layer = 0
        """The layer that computes now. The owner of the cache sets it."""
        self.evicted: Key | None = None
        """The expert that left its slot for the one that was admitted last."""
        self._free = list(range(slots))[::-1]
        self._share = slots / layers
        self._slot_of: OrderedDict[Key, int] = OrderedDict()  # least recently used first
        self._by_layer: list[OrderedDict[Key, None]] = [OrderedDict() for _ in range(layers)]  # the same by layer
        self._pinned: set[Key] = set()

    def __contains__(self, key: Key) -> bool:
        return key in self._slot_of

    def __len__(self) -> int:
        return len(self._slot_of)

    @property
    def has_free(self) -> bool:
        """Whether there is a slot that holds no expert."""
        return bool(self._free)

    def slot(self, key: Key) -> int:
        """The slot of an expert that has one."""
        return self._slot_of[key]

    def experts_of(self, layer: int) -> list[int]:
        """The experts of one layer that have a slot."""
        return [expert for _, expert in self._by_layer[layer]]

    def resident(self) -> list[tuple[Key, int]]:
        """All experts that have a slot, with their slots, the least recently used first."""
        return list(self._slot_of.items())

    def fill(self, resident: Iterable[tuple[Key, int]]) -> None:
        """Gives experts these slots, the least recently used first. The cache is empty before."""
        for key, slot in resident:
            self._slot_of[key] = slot
            self._by_layer[key[0]][key] = None
            self._may_leave(key)
        taken = set(self._slot_of.values())
        self._free = [slot for slot in self._free if slot not in taken]

    def pin(self, key: Key) -> None:
        """Makes an expert that has a slot the most recently used one. It keeps its slot until `unpin`."""
        self._slot_of.move_to_end(key)
        self._by_layer[key[0]].move_to_end(key)
        self._pinned.add(key)
        self._stays(key)

    def unpin(self, key: Key) -> None:
        if key in self._pinned:
            self._pinned.remove(key)
            self._may_leave(key)

    def unpin_all(self) -> None:
        for key in self._pinned:
            self._may_leave(key)
        self._pinned.clear()

    def rated(self, layer: int) -> None:
        """Says that the experts of a layer are worth something else from now on."""
        if self._pool is not None:
            self._pool.rated(layer)

    def admit(self, key: Key, busy: Callable[[int], bool] = lambda _: False) -> int | None:
        """Gives a slot to an expert that has none, pins it, and returns the slot. It may evict another expert.

        It takes no slot that is `busy`. Returns None where all others are pinned.
        """
        self.evicted = None
        if self._free:
            slot = self._free.pop()
        else:
            victim = self._victim(busy)
            if victim is None:
                return None
            slot, self.evicted = self._slot_of.pop(victim), victim
            del self._by_layer[victim[0]][victim]
            self._stays(victim)
        self._slot_of[key] = slot
        self._by_layer[key[0]][key] = None
        self._pinned.add(key)
        return slot

    def forget(self, key: Key) -> None:
        """Takes an expert's slot away. It is called where the slot does not hold the expert: its copy failed or was cancelled."""
        self._pinned.discard(key)
        self._stays(key)
        self._free.append(self._slot_of.pop(key))
        del self._by_layer[key[0]][key]

    def _may_leave(self, key: Key) -> None:
        if self._pool is not None:
            self._pool.may_leave(key)

    def _stays(self, key: Key) -> None:
        if self._pool is not None:
            self._pool.stays(key)

    def _victim(self, busy: Callable[[int], bool]) -> Key | None:
        """The expert that should leave first of those that may, if there is one."""
        if self._pool is not None:
            return self._pool.least(lambda key: busy(self._slot_of[key]))

        def may_leave(key: Key) -> bool:
            return key not in self._pinned and not busy(self._slot_of[key])

        if self.eviction is Eviction.LRU:
            return next(filter(may_leave, self._slot_of), None)
        for experts in self._layers_in_order():
            leaving = filter(may_leave, experts)
            if self.eviction is Eviction.LEAST_STALE:
                victim = next(leaving, None)
            else:
                # Of equals it is the first one, which is the least recently used.
                victim = min(leaving, key=lambda key: self._worth(key[0])[key[1]], default=None)
            if victim is not None:
                return victim
        return None

    def _layers_in_order(self) -> Iterator[Iterable[Key]]:
        """The experts of the layers in the order in which these should give up slots. Some come twice."""
        count = len(self._by_layer)
        passed_last_first = [self._by_layer[(self.layer - back) % count] for back in range(count)]
        yield from (experts for experts in passed_last_first if len(experts) > self._share)
        yield from passed_last_first
