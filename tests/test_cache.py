"""The bookkeeping of slots under any sequence of events."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtime.cache import Key, SlotCache

KEYS = st.tuples(st.integers(0, 2), st.integers(0, 5))
EVENTS = st.lists(st.tuples(st.sampled_from(["admit", "pin", "unpin", "forget", "unpin_all"]), KEYS), max_size=60)


@given(slots=st.integers(1, 8), events=EVENTS)
def test_slots_are_never_shared_lost_or_taken_from_the_pinned(slots: int, events: list[tuple[str, Key]]) -> None:
    cache = SlotCache(slots)
    sits: dict[Key, int] = {}
    pinned: set[Key] = set()
    used: list[Key] = []  # least recently used first
    for event, key in events:
        if event == "admit" and key not in cache:
            slot = cache.admit(key)
            if slot is None:
                assert len(sits) == slots
                assert set(sits) == pinned, "only pins keep an expert out"
            else:
                evicted = [other for other, taken in sits.items() if taken == slot]
                if evicted:
                    assert len(sits) == slots, "nothing is evicted while a slot is free"
                    assert evicted == [next(other for other in used if other not in pinned)]
                    used.remove(evicted[0])
                    del sits[evicted[0]]
                sits[key] = slot
                pinned.add(key)
                used.append(key)
        elif event == "pin" and key in cache:
            cache.pin(key)
            pinned.add(key)
            used.remove(key)
            used.append(key)
        elif event == "unpin":
            cache.unpin(key)
            pinned.discard(key)
        elif event == "forget" and key in cache:
            cache.forget(key)
            del sits[key]
            pinned.discard(key)
            used.remove(key)
        elif event == "unpin_all":
            cache.unpin_all()
            pinned.clear()
        assert len(cache) == len(sits) <= slots
        assert len(set(sits.values())) == len(sits)
        assert all(cache.slot(other) == slot for other, slot in sits.items())
        assert all(sorted(cache.experts_of(n)) == sorted(e for layer, e in sits if layer == n) for n in range(3))
