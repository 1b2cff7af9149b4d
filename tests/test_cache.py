"""The bookkeeping of slots under any sequence of events."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from predict_train.runtime.host.cache import ONE_POOL, Eviction, Key, SlotCache

LAYERS, EXPERTS = 3, 6
KINDS = ["admit", "admit", "admit", "pin", "unpin", "forget", "unpin_all", "unpin_all", "pass", "keep_busy", "rate"]
"""Those that come before evictions come several times. With each as often as the others, a wrong victim was rarely seen."""


def events(chance: random.Random) -> Iterator[tuple[str, Key]]:
    """Drawn plainly: Hypothesis takes many times as long for so many."""
    for _ in range(chance.randint(30, 60)):
        yield chance.choice(KINDS), (chance.randrange(LAYERS), chance.randrange(EXPERTS))


def worths(layer: int, rated: int) -> list[float]:
    """Some experts are worth more than others, and some the same. It is others after each time that the layer is `rated`."""
    return [(layer + 3 * expert + rated * (1 + expert)) % 4 - 1.0 for expert in range(EXPERTS)]


def who_goes(
    eviction: Eviction, used: list[Key], kept: set[Key], layer: int, slots: int, worth: list[list[float]]
) -> Key:
    """The victim, as the policies are defined: `used` is every expert that has a slot, least recently used first."""
    free = [key for key in used if key not in kept]
    if eviction is Eviction.LRU:
        return free[0]
    if eviction in ONE_POOL:
        return min(sorted(free), key=lambda key: worth[key[0]][key[1]])
    by_worth = eviction is Eviction.FREQUENCY
    assert by_worth or eviction is Eviction.LEAST_STALE, f"say here which expert leaves under {eviction}"
    count = [sum(of == number for of, _ in used) for number in range(LAYERS)]
    too_many = [key for key in free if count[key[0]] * LAYERS > slots]
    # How many layers come before an expert's own comes again; the first of the largest is the least recently used.
    return max(
        too_many or free, key=lambda key: ((key[0] - layer - 1) % LAYERS, -worth[key[0]][key[1]] if by_worth else 0)
    )


@pytest.mark.parametrize("eviction", list(Eviction))
def test_slots_are_never_shared_lost_or_taken_from_the_pinned(eviction: Eviction) -> None:
    for seed in range(500):
        follow(eviction, seed)


def follow(eviction: Eviction, seed: int) -> None:
    chance = random.Random(seed)
    slots = chance.randint(1, 8)
    worth = [worths(layer, 0) for layer in range(LAYERS)]
    cache = SlotCache(slots, (LAYERS, EXPERTS), eviction, worth.__getitem__)
    sits: dict[Key, int] = {}
    pinned: set[Key] = set()
    busy: set[int] = set()
    used: list[Key] = []  # least recently used first
    for event, key in events(chance):
        if event == "admit" and key not in cache:
            kept = pinned | {other for other, slot in sits.items() if slot in busy}
            slot = cache.admit(key, busy.__contains__)
            if slot is None:
                assert len(sits) == slots
                assert set(sits) == kept, "only pins and copies keep an expert out"
            else:
                evicted = [other for other, taken in sits.items() if taken == slot]
                if evicted:
                    assert len(sits) == slots, "nothing is evicted while a slot is free"
                    assert evicted == [who_goes(eviction, used, kept, cache.layer, slots, worth)]
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
        elif event == "pass":
            cache.layer = key[0]
        elif event == "rate":
            worth[key[0]] = worths(*key)
            cache.rated(key[0])
        elif event == "keep_busy":
            busy ^= {key[1]}
        assert len(cache) == len(sits) <= slots
        assert len(set(sits.values())) == len(sits)
        assert all(cache.slot(other) == slot for other, slot in sits.items())
        assert all(sorted(cache.experts_of(n)) == sorted(e for layer, e in sits if layer == n) for n in range(LAYERS))


def hits(eviction: Eviction, slots: int, passes: list[list[list[int]]]) -> int:
    """How often an expert is found, of passes that name the experts of each layer."""
    cache, found = SlotCache(slots, (len(passes[0]), 7), eviction), 0
    for layers in passes:
        for layer, experts in enumerate(layers):
            cache.layer = layer
            found += sum((layer, expert) in cache for expert in experts)
            for expert in experts:
                if (layer, expert) in cache:
                    cache.pin((layer, expert))
                else:
                    cache.admit((layer, expert))
            cache.unpin_all()
    return found


def test_least_stale_does_not_thrash_where_lru_does() -> None:
    """The same experts in every pass, and fewer slots than a pass takes: the least recently used is the next one."""
    passes = [[[1, 2], [3, 4], [5, 6]]] * 10
    assert hits(Eviction.LRU, 4, passes) == 0
    assert hits(Eviction.LEAST_STALE, 4, passes) >= 9 * 2


def test_the_last_layers_of_a_prompt_do_not_keep_the_slots() -> None:
    prompt = [[list(range(6))] * 3]
    passes = [[[i % 6, (i + 1) % 6]] * 3 for i in range(30)]
    assert hits(Eviction.LEAST_STALE, 9, prompt + passes) >= hits(Eviction.LEAST_STALE, 9, passes) - 3 * 6
