"""A fixed number of device slots, and who sits in them. Pure bookkeeping: no tensors, no copies."""

from __future__ import annotations

from collections import OrderedDict

Key = tuple[int, int]
"""(MoE layer counted from 0, expert)"""


class SlotCache:
    """Which expert sits in which slot. A pinned expert keeps its slot; of the others the least recently used goes first."""

    def __init__(self, slots: int):
        self.slots = slots
        self._free = list(range(slots))[::-1]
        self._slot_of: OrderedDict[Key, int] = OrderedDict()  # least recently used first
        self._pinned: set[Key] = set()

    def __contains__(self, key: Key) -> bool:
        return key in self._slot_of

    def __len__(self) -> int:
        return len(self._slot_of)

    def slot(self, key: Key) -> int:
        """The slot of an expert that has one."""
        return self._slot_of[key]

    def experts_of(self, layer: int) -> list[int]:
        """The experts of one layer that have a slot."""
        return [expert for of, expert in self._slot_of if of == layer]

    def pin(self, key: Key) -> None:
        """Makes an expert that has a slot the most recently used, and keeps it there until `unpin`."""
        self._slot_of.move_to_end(key)
        self._pinned.add(key)

    def unpin(self, key: Key) -> None:
        self._pinned.discard(key)

    def unpin_all(self) -> None:
        self._pinned.clear()

    def admit(self, key: Key) -> int | None:
        """Gives an expert that has no slot one, pinned, evicting where it must; None where every slot is pinned."""
        if self._free:
            slot = self._free.pop()
        else:
            victim = next((other for other in self._slot_of if other not in self._pinned), None)
            if victim is None:
                return None
            slot = self._slot_of.pop(victim)
        self._slot_of[key] = slot
        self._pinned.add(key)
        return slot

    def forget(self, key: Key) -> None:
        """Takes an expert's slot away, because what it holds can't be trusted (a copy that failed)."""
        self._pinned.discard(key)
        self._free.append(self._slot_of.pop(key))
