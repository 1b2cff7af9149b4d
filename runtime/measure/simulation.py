"""Simulates decode steps of the runtime, with times in the place of work. `plan` shows the result.

Computing and copying run beside each other. Computing goes through the layers in order, and waits for experts that are not
there. Copying takes one expert at a time: first those that a layer needs, then the guesses. A reader that has taken a copy
finishes it, even if it has to wait for the link. The runtime's own `Schedule` decides which copies begin, and which experts
make room for them.

    computing   attention l | router l | speculate t | experts l (present first) | attention t ...
    copying                            | misses of l | candidates of t that have no slot
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..automatic import AUTO, Choice, Trial
from ..host.cache import Eviction, Key
from ..host.price import Prices
from ..host.schedule import Schedule
from ..observer import Observer
from ..offload import policy_of
from ..policy import Gating, Policy
from ..settings import OffloadConfig, Slots
from .reuse import Numbers
from .routing import ReplayedRouting, RoutingError


@dataclass(frozen=True)
class Costs:
    """How long the parts of a decode step take, in seconds."""

    layer: float
    """An MoE layer without its routed experts: attention, norms, router and shared expert."""
    expert: float
    """One routed expert."""
    copy: float
    """The copy of one expert to the device, while the link does nothing else."""
    rest: float = 0.0
    """Once for each token: embedding, head, sampling, dense layers."""
    speculation: float = 0.0
    """The speculation for one layer: norm, predictor and router."""
    beside: float = 0.0
    """How much one copy delays the computation beside it, where both use the same memory."""


@dataclass(frozen=True)
class Simulated:
    """The mean costs of a token. Seconds and counts are per token."""

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
    """Share of the executed experts that were on the device or on their way to it when their layer was entered."""

    @property
    def limit(self) -> float:
        """The least seconds for these copies and this computation."""
        return max(self.computing, self.copying)

    @property
    def bound(self) -> str:
        """What limits the speed: `link`, `compute`, or `waiting`, where each waits for the other."""
        if self.copying >= 0.95 * self.seconds and self.copying >= self.computing:
            return "link"
        return "compute" if self.computing >= 0.95 * self.seconds else "waiting"


def simulate(
    costs: Costs,
    routing: ReplayedRouting,
    config: OffloadConfig,
    sources: Mapping[int, int | None] | None = None,
    queue: bool = False,
    warmup: int = 8,
    observer: Observer | None = None,
) -> Simulated:
    """Runs the steps of `routing` and returns the mean of those after the first `warmup`, which fill the slots.

    Of `config`, the slots (given, and at least the routing's top k), policy, gating, candidates (at most what the routing
    has; by default the top k, and two more under gating `resident`), eviction and readers count. Layers count from 0; a target
    is guessed in its layer of `sources`, by default the one before it, or where that is None as its own begins. With `queue`
    copies are made in the order in which they are asked for and can't be taken back, as on a CUDA stream; else the readers
    make them. `observer` is told which copies begin.

    Raises `ValueError` for a routing of too few steps, or too few slots, and `RoutingError` for eviction `learned` with a routing
    that has no scores.
    """
    steps, layers, top_k = routing.ids.shape
    if steps <= warmup or (config.slots or 0) < top_k:
        raise ValueError(f"{steps} steps and {config.slots} slots are too few for {warmup} of warm-up and top {top_k}")
    experts = 1 + int(max(routing.ids.max(), routing.candidates.max(initial=0)))
    run = _Run(costs, config, nearest(range(layers)) if sources is None else sources, queue, experts)
    run.schedule.observer = observer
    wide = run.policy is Policy.SPECULATIVE and run.gating is Gating.RESIDENT
    m = config.candidates if isinstance(config.candidates, int) else top_k + 2 * wide
    ids, guesses = routing.ids.tolist(), routing.candidates[:, :, :m].tolist()
    scores = scores_of(routing, config)
    chances = _by_expert(guesses, None if routing.chances is None else routing.chances[:, :, :m].tolist())
    before = run.totals()
    for step in range(steps):
        if step == warmup:
            before = run.totals()
        run.token(ids[step], guesses[step], None if scores is None else scores[step].tolist(), chances[step])
    counted = [after - begun for begun, after in zip(before, run.totals(), strict=True)]
    seconds, computing, stalled, copying, copies, cancelled, hits, misses = (x / (steps - warmup) for x in counted)
    return Simulated(seconds, computing, stalled, copying, copies, cancelled, hits / (hits + misses))


def scores_of(routing: ReplayedRouting, config: Slots) -> Numbers | None:
    """The scores of a routing, if the eviction goes by them. Raises `RoutingError` where it does and there are none."""
    if config.eviction is not Eviction.LEARNED:
        return None
    if routing.scores is None:
        raise RoutingError(
            "eviction learned needs the routing of a trace, and predictors that were trained with fit --reuse; give both, or "
            "eviction=frequency"
        )
    return routing.scores


def _by_expert(
    guesses: list[list[list[int]]], chances: list[list[list[float]]] | None
) -> list[list[dict[int, float]]] | list[None]:
    """The candidates' probabilities by step, layer and expert; None for each step where they are not known."""
    if chances is None:
        return [None] * len(guesses)
    steps = zip(guesses, chances, strict=True)
    return [[dict(zip(*layer, strict=True)) for layer in zip(*step, strict=True)] for step in steps]


def nearest(places: Sequence[int]) -> dict[int, int | None]:
    """The nearest source of each MoE layer (see `predictors.architecture.sources`): the layer before, if it is an MoE layer.

    `places` are the numbers of the MoE layers among all layers.
    """
    return {place: place - 1 if place - 1 in places else None for place in places}


class _Clock:
    """The time of the simulated run, in seconds, and what it was spent on."""

    def __init__(self) -> None:
        self.now = self.computing = self.stalled = 0.0

    def compute(self, seconds: float) -> None:
        self.now += seconds
        self.computing += seconds

    def stall(self, until: float) -> None:
        self.stalled += max(0.0, until - self.now)
        self.now = max(self.now, until)


class _Link:
    """The `Copies` of a simulated link. It makes one copy at a time: urgent ones first, and else in the order of asking.

    Each of the `readers` takes one copy and waits for the link with it. A copy that is taken can't be cancelled or overtaken.
    With `queue` the link is a CUDA stream: copies are made in the order of asking, and none can be cancelled.
    """

    def __init__(self, clock: _Clock, seconds: float, queue: bool, readers: int):
        self.clock, self.seconds, self.queue = clock, seconds, queue
        self.busy = 0.0
        self.made = 0
        self._ends = deque([0.0] * readers, readers)  # of the copies that were taken last
        self._order = itertools.count()
        self._heap: list[
            tuple[bool, int, int, int]
        ] = []  # whether it is not urgent, its place in the order, number of the asking, slot
        self._asked: dict[int, tuple[int, float]] = {}  # by slot: number and time of those that have not begun
        self._over: dict[int, float] = {}  # by slot: when the copy that was taken last is over

    def start(self, slot: int, key: Key, urgent: bool) -> None:  # noqa: ARG002
        if not self.cancel(slot):
            self.wait(slot)  # the copy before must be over
        self._over.pop(slot, None)
        order = next(self._order)
        self._asked[slot] = order, self.clock.now
        heapq.heappush(self._heap, (not (urgent or self.queue), order, order, slot))

    def hurry(self, slot: int) -> None:
        self._begin_until(self.clock.now)
        if slot in self._asked and not self.queue:
            heapq.heappush(self._heap, (False, next(self._order), self._asked[slot][0], slot))

    def cancel(self, slot: int) -> bool:
        self._begin_until(self.clock.now)
        return not self.queue and self._asked.pop(slot, None) is not None

    def copying(self, slot: int) -> bool:
        self._begin_until(self.clock.now)
        return slot in self._asked or self._over.get(slot, 0.0) > self.clock.now

    def wait(self, slot: int) -> None:
        while slot in self._asked:  # nothing else is asked for meanwhile, since the asking side waits here
            self._begin_next()
        self.clock.stall(self._over.get(slot, 0.0))

    def abandon(self) -> None:
        raise AssertionError("a simulated forward pass never breaks off")

    def busy_before(self, now: float) -> float:
        """Seconds that the link is busy before `now`, if nothing more is asked for until then."""
        self._begin_until(now)
        return self.busy - max(0.0, self._ends[-1] - now)

    def _begin_until(self, now: float) -> None:
        while self._asked and self._next_begin() < now:
            self._begin_next()

    def _next_begin(self) -> float:
        while True:
            _, _, number, slot = self._heap[0]
            if slot in self._asked and self._asked[slot][0] == number:
                return max(self._ends[0], self._asked[slot][1])
            heapq.heappop(self._heap)  # cancelled, or hurried and begun

    def _begin_next(self) -> None:
        begin = self._next_begin()
        slot = heapq.heappop(self._heap)[-1]
        del self._asked[slot]
        self._over[slot] = max(begin, self._ends[-1]) + self.seconds
        self._ends.append(self._over[slot])
        self.busy += self.seconds
        self.made += 1


class _Run:
    """The steps of the runtime (`runtime.control`, `runtime.host.slots`), with a clock in the place of tensors."""

    def __init__(
        self, costs: Costs, config: OffloadConfig, sources: Mapping[int, int | None], queue: bool, experts: int
    ):
        assert config.slots is not None
        layers = len(sources)
        self.targets = [[target for target, source in sources.items() if source == layer] for layer in range(layers)]
        self.without_source = {target for target, source in sources.items() if source is None}
        self.costs, self.policy, self.gating = costs, policy_of(config), Gating(config.gating)
        self.clock = _Clock()
        self.link = _Link(self.clock, costs.copy, queue, config.readers)
        # A stream's copies are not priced in the runtime either.
        is_auto, self.prices = config.policy == AUTO, None
        if is_auto and not queue:
            self.prices = Prices(layers, config.slots, lambda: self.clock.now, lambda: costs.copy)
        self.choice: Choice | None = self.prices or (Trial() if is_auto else None)
        self.schedule = Schedule(self.link, config.slots, layers, config.eviction, experts, self.prices)

    def totals(self) -> tuple[float, ...]:
        clock, counters = self.clock, self.schedule.counters
        counts = self.link.made, counters.cancelled, counters.hits, counters.misses
        return clock.now, clock.computing, clock.stalled, self.link.busy, *counts

    def compute(self, seconds: float) -> None:
        if self.costs.beside:
            now = self.clock.now
            copying = self.link.busy_before(now + seconds) - self.link.busy_before(now)
            seconds += self.costs.beside * copying / self.costs.copy
        self.clock.compute(seconds)

    def token(
        self,
        ids: list[list[int]],
        guesses: list[list[int]],
        scores: list[list[float]] | None,
        chances: list[dict[int, float]] | None,
    ) -> None:
        """One decode step. `ids`, `guesses` and `scores` are lists by layer, and so are the candidates' probabilities, by expert."""
        speculates = self.policy is not Policy.ON_DEMAND and (self.choice is None or self.choice.prefetches)
        begun = self.clock.now
        self.schedule.begin_pass()
        for layer, targets in enumerate(self.targets):
            if speculates and layer in self.without_source:  # its copies overlap its own attention only
                self.guess(1)
                self.announce([layer], guesses, chances)
            self.compute(self.costs.layer)
            executed = self.choose(layer, ids[layer], guesses[layer])
            if speculates:
                self.guess(len(targets))
            if scores is not None:
                self.schedule.rate(layer, scores[layer])
            order = self.schedule.enter(layer, executed)
            if speculates:
                self.announce(targets, guesses, chances)
            for expert in order:
                self.schedule.slot(layer, expert)
                self.compute(self.costs.expert)
                self.schedule.left(layer, [expert])
        self.compute(self.costs.rest)
        if self.choice is not None:
            self.choice.took(self.clock.now - begun)

    def guess(self, targets: int) -> None:
        seconds = self.costs.speculation * targets
        self.compute(seconds)
        if self.prices is not None:
            self.prices.guessed(seconds)

    def announce(self, targets: list[int], guesses: list[list[int]], chances: list[dict[int, float]] | None) -> None:
        for target in targets:
            self.schedule.announce(target, guesses[target], None if chances is None else chances[target])
        self.schedule.begin_copies()

    def choose(self, layer: int, ids: list[int], guess: list[int]) -> list[int]:
        """The experts that the policy executes."""
        if self.policy is not Policy.SPECULATIVE:
            return ids
        if self.gating is not Gating.RESIDENT:
            return guess[: len(ids)]
        there = {*guess, *self.schedule.resident(layer)}
        found = [expert for expert in ids if expert in there]
        return (found + [expert for expert in guess if expert not in found])[: len(ids)]
