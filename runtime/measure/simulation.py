"""A decode step after another as the runtime would run it, with times in the place of work: what `plan` tells.

Computing and copying are two machines beside each other. Computing goes through the layers in order and waits for an
expert that is not there; copying does one expert at a time, first what a layer demands and then what is guessed. A reader
that has taken a copy up goes through with it, though another may be on the link before it. Who sits in which slot is decided
by the runtime's own `SlotCache`.

    computing   attention l | router l | speculate t | experts l (present first) | attention t ...
    copying                            | misses of l | candidates of t that have no slot
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..host.cache import Eviction, Key, SlotCache
from ..settings import Gating, Policy
from .routing import ReplayedRouting


@dataclass(frozen=True)
class Costs:
    """What the work of a decode step takes, in seconds."""

    layer: float
    """All of an MoE layer but its routed experts: attention, norms, router, a shared expert, and dense layers about it."""
    expert: float
    """One routed expert."""
    copy: float
    """One expert on its way to the device, while the link does nothing else."""
    rest: float = 0.0
    """Once a token: embedding, head, sampling, dense layers."""
    speculation: float = 0.0
    """One layer's speculation: norm, predictor and router."""
    beside: float = 0.0
    """What one copy takes from what is computed while it is made, where both go through the same memory."""


@dataclass(frozen=True)
class Simulated:
    """What a token costs in the mean. Seconds, bytes and counts are per token."""

    seconds: float
    computing: float
    """Seconds of computation."""
    stalled: float
    """Seconds in which computing waits for copies."""
    copying: float
    """Seconds in which the link is busy."""
    copies: float
    """Experts copied."""
    cancelled: float
    """Guesses that proved wrong before their copy began."""
    cache_hit_rate: float
    """Share of the executed experts that were on the device, or on their way, when their layer came to execute them."""

    @property
    def limit(self) -> float:
        """Seconds that these copies and this computation take at least."""
        return max(self.computing, self.copying)

    @property
    def bound(self) -> str:
        """What keeps a token from being faster: `link`, `compute`, or `waiting`, where each waits for the other."""
        if self.copying >= 0.95 * self.seconds and self.copying >= self.computing:
            return "link"
        return "compute" if self.computing >= 0.95 * self.seconds else "waiting"


def simulate(
    costs: Costs,
    routing: ReplayedRouting,
    *,
    slots: int,
    policy: Policy | str,
    gating: Gating | str = Gating.TRUE,
    candidates: int | None = None,
    sources: Mapping[int, int | None] | None = None,
    eviction: Eviction | str = Eviction.LEAST_STALE,
    queue: bool = False,
    readers: int = 2,
    warmup: int = 8,
) -> Simulated:
    """Runs the steps of `routing` and returns the mean of those after the first `warmup`, which fill the slots.

    `slots` are shared by all layers and are at least the routing's top k; `candidates` is at most what the routing has, by
    default the top k, and two more under gating `resident`. Layers count from 0; a target is guessed in its layer of
    `sources`, by default the one before it, or where that is None as its own begins. With `queue` copies are made in the
    order in which they are asked for and can't be taken back, as on a CUDA stream; else `readers` threads make them.

    Raises `ValueError` for a routing of too few steps, or too few slots.
    """
    policy, gating = Policy(policy), Gating(gating)
    steps, layers, top_k = routing.ids.shape
    if steps <= warmup or slots < top_k:
        raise ValueError(f"{steps} steps and {slots} slots are too few for {warmup} of warm-up and top {top_k}")
    wide = policy is Policy.SPECULATIVE and gating is Gating.RESIDENT
    m = candidates or min(top_k + 2 * wide, routing.candidates.shape[-1])
    source_of = nearest(range(layers)) if sources is None else sources
    run = _Run(costs, layers, slots, policy, gating, source_of, Eviction(eviction), queue, readers)
    ids, guesses = routing.ids.tolist(), routing.candidates[:, :, :m].tolist()
    for step in range(warmup):
        run.token(ids[step], guesses[step])
    before = run.totals()
    for step in range(warmup, steps):
        run.token(ids[step], guesses[step])
    counted = [after - begun for begun, after in zip(before, run.totals(), strict=True)]
    seconds, computing, stalled, copying, copies, cancelled, hits, misses = (x / (steps - warmup) for x in counted)
    return Simulated(seconds, computing, stalled, copying, copies, cancelled, hits / (hits + misses))


def nearest(places: Sequence[int]) -> dict[int, int | None]:
    """The nearest source of each MoE layer, which are the model's layers `places`: the layer before, if it is one of them.

    See `predictors.architecture.sources`.
    """
    return {place: place - 1 if place - 1 in places else None for place in places}


class _Link:
    """One copy at a time: the urgent before the others, and else in order of their asking.

    Each of `readers` takes up one copy, which then can't be overtaken or taken back, and waits for the link with it. As a
    `queue` it is a CUDA stream: copies go in the order of their asking, and none can be taken back.
    """

    def __init__(self, seconds: float, queue: bool, readers: int):
        self.seconds, self.queue = seconds, queue
        self.busy = 0.0
        self.made = 0
        self._ends = deque([0.0] * readers, readers)  # of the copies that were taken up last
        self._order = itertools.count()
        self._heap: list[tuple[bool, int, int, Key]] = []  # whether it can wait, its order, the number of the asking
        self._asked: dict[Key, tuple[int, float]] = {}  # number and time of those that have not begun
        self._over: dict[Key, float] = {}

    def ask(self, key: Key, now: float, urgent: bool) -> None:
        self._begin_until(now)
        self._over.pop(key, None)
        order = next(self._order)
        self._asked[key] = order, now
        heapq.heappush(self._heap, (not (urgent or self.queue), order, order, key))

    def hurry(self, key: Key, now: float) -> None:
        self._begin_until(now)
        if key in self._asked and not self.queue:
            heapq.heappush(self._heap, (False, next(self._order), self._asked[key][0], key))

    def cancel(self, key: Key, now: float) -> bool:
        """Whether the copy had not begun; then it never will."""
        self._begin_until(now)
        return not self.queue and self._asked.pop(key, None) is not None

    def copying(self, key: Key, now: float) -> bool:
        self._begin_until(now)
        return key in self._asked or self._over[key] > now

    def over(self, key: Key) -> float:
        """When the copy of `key` is over. Nothing is asked for in the meantime, since who asks waits."""
        while key in self._asked:
            self._begin_next()
        return self._over[key]

    def busy_before(self, now: float) -> float:
        """Seconds that the link was busy before `now`, until when nothing more is asked for."""
        self._begin_until(now)
        return self.busy - max(0.0, self._ends[-1] - now)

    def _begin_until(self, now: float) -> None:
        while self._asked and self._next_begin() < now:
            self._begin_next()

    def _next_begin(self) -> float:
        while True:
            _, _, number, key = self._heap[0]
            if key in self._asked and self._asked[key][0] == number:
                return max(self._ends[0], self._asked[key][1])
            heapq.heappop(self._heap)  # cancelled, or hurried and begun

    def _begin_next(self) -> None:
        begin = self._next_begin()
        key = heapq.heappop(self._heap)[-1]
        del self._asked[key]
        self._over[key] = max(begin, self._ends[-1]) + self.seconds
        self._ends.append(self._over[key])
        self.busy += self.seconds
        self.made += 1


class _Run:
    """The runtime's steps (`runtime.slots.ExpertSlots`), with a clock in the place of tensors."""

    def __init__(
        self,
        costs: Costs,
        layers: int,
        slots: int,
        policy: Policy,
        gating: Gating,
        source_of: Mapping[int, int | None],
        eviction: Eviction,
        queue: bool,
        readers: int,
    ):
        self.targets = [[target for target, source in source_of.items() if source == layer] for layer in range(layers)]
        self.without_source = {target for target, source in source_of.items() if source is None}
        self.costs, self.layers, self.policy, self.gating = costs, layers, policy, gating
        self.now = self.computing = self.stalled = 0.0
        self.hits = self.misses = self.cancelled = 0
        self.link = _Link(costs.copy, queue, readers)
        self.cache = SlotCache(slots, layers, eviction)
        self.held: dict[int, Key] = {}  # by slot
        self.demands: deque[Key] = deque()
        self.prefetches: deque[Key] = deque()

    def totals(self) -> tuple[float, ...]:
        counts = self.link.made, self.cancelled, self.hits, self.misses
        return self.now, self.computing, self.stalled, self.link.busy, *counts

    def compute(self, seconds: float) -> None:
        if self.costs.beside:
            copying = self.link.busy_before(self.now + seconds) - self.link.busy_before(self.now)
            seconds += self.costs.beside * copying / self.costs.copy
        self.now += seconds
        self.computing += seconds

    def stall(self, until: float) -> None:
        self.stalled += max(0.0, until - self.now)
        self.now = max(self.now, until)

    def busy(self, slot: int) -> bool:
        return self.link.copying(self.held[slot], self.now)

    def token(self, ids: list[list[int]], guesses: list[list[int]]) -> None:
        """One decode step: `ids` and `guesses` by layer."""
        speculates = self.policy is not Policy.ON_DEMAND
        self.cache.unpin_all()
        self.prefetches.clear()
        for layer in range(self.layers):
            if speculates and layer in self.without_source:  # it overlaps its attention only
                self.compute(self.costs.speculation)
                self.prefetch(layer, guesses[layer])
            self.compute(self.costs.layer)
            executed = self.choose(layer, ids[layer], guesses[layer])
            if speculates:
                self.compute(self.costs.speculation * len(self.targets[layer]))
            self.execute(layer, executed, guesses if speculates else None)
        self.compute(self.costs.rest)

    def choose(self, layer: int, ids: list[int], guess: list[int]) -> list[int]:
        """The experts that the policy executes."""
        if self.policy is not Policy.SPECULATIVE:
            return ids
        if self.gating is not Gating.RESIDENT:
            return guess[: len(ids)]
        there = {*guess, *self.cache.experts_of(layer)}
        found = [expert for expert in ids if expert in there]
        return (found + [expert for expert in guess if expert not in found])[: len(ids)]

    def execute(self, layer: int, experts: list[int], guesses: list[list[int]] | None) -> None:
        self.cache.layer = layer
        self.prefetches = deque(key for key in self.prefetches if key[0] != layer)
        if guesses is not None:
            self.release(layer, guesses[layer], experts)
        there: list[int] = []
        coming: list[int] = []
        missing: list[int] = []
        for expert in experts:
            key = layer, expert
            if key not in self.cache:
                missing.append(expert)
                continue
            self.cache.pin(key)
            self.link.hurry(key, self.now)
            (coming if self.link.copying(key, self.now) else there).append(expert)
        self.hits += len(there) + len(coming)
        self.misses += len(missing)
        self.demands = deque((layer, expert) for expert in missing)
        self.begin_copies()
        if guesses is not None:
            for target in self.targets[layer]:
                self.prefetch(target, guesses[target])
        for expert in there + coming + missing:
            key = layer, expert
            if key not in self.cache:
                self.begin_copies(wait=True)
            self.stall(self.link.over(key))
            self.compute(self.costs.expert)
            self.cache.unpin(key)
            self.begin_copies()

    def release(self, layer: int, guess: list[int], needed: list[int]) -> None:
        for expert in guess:
            key = layer, expert
            if key in self.cache:
                self.cache.unpin(key)
                if expert not in needed and self.link.cancel(key, self.now):
                    self.cache.forget(key)
                    self.cancelled += 1

    def prefetch(self, layer: int, guess: list[int]) -> None:
        self.prefetches.extend((layer, expert) for expert in guess)
        self.begin_copies()

    def begin_copies(self, wait: bool = False) -> None:
        for queue, urgent in ((self.demands, True), (self.prefetches, False)):
            while queue:
                key = queue[0]
                if key in self.cache:
                    self.cache.pin(key)
                else:
                    slot = self.cache.admit(key) if wait else self.cache.admit(key, self.busy)
                    if slot is None and wait:  # the guesses for later layers hold every slot
                        self.cache.unpin_all()
                        slot = self.cache.admit(key)
                    if slot is None:
                        return
                    if wait and slot in self.held and not self.link.cancel(self.held[slot], self.now):
                        self.stall(self.link.over(self.held[slot]))
                    wait = False
                    self.held[slot] = key
                    self.link.ask(key, self.now, urgent)
                queue.popleft()
