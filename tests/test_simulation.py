"""The simulated decode steps: never faster than what they have to do, and better with better hardware."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from conftest import UNTRAINED
from hypothesis import assume, given
from hypothesis import strategies as st
from predict_train.predictors.architecture import farther
from predict_train.runtime import Eviction
from predict_train.runtime.measure import simulation
from predict_train.runtime.measure.routing import ReplayedRouting, Statistics, draw_routing
from predict_train.runtime.measure.simulation import Costs, Simulated, nearest
from predict_train.runtime.settings import OffloadConfig

POLICIES = ["on_demand", "prefetch", "speculative"]
WARMUP = 4


def routing_of(
    seed: int, kept: float = 0.4, hit_rate: float = 0.9, steps: int = 40, layers: int = 6
) -> ReplayedRouting:
    return draw_routing(
        Statistics(kept, hit_rate), steps=steps, layers=layers, num_experts=16, top_k=3, candidates=5, seed=seed
    )


def simulate(costs: Costs, routing: ReplayedRouting, warmup: int = 8, **way: Any) -> Simulated:
    how = {name: way.pop(name) for name in ("sources", "queue") if name in way}
    return simulation.simulate(costs, routing, OffloadConfig(**way), warmup=warmup, **how)


def costs_of(copy: float) -> Costs:
    return Costs(layer=1.0, expert=0.3, copy=copy, rest=0.5, speculation=0.02)


routings = st.builds(routing_of, st.integers(0, 20), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
ways: Any = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(POLICIES),
        "gating": st.sampled_from(["true", "speculated", "resident"]),
        "slots": st.integers(3, 96),
        "sources": st.sampled_from([None, farther(nearest(range(6)), 2), {**nearest(range(6)), 3: None}]),
        "eviction": st.sampled_from(UNTRAINED),
        "queue": st.booleans(),
        "readers": st.integers(1, 3),
    }
)
copies = st.floats(0.01, 5.0)


@given(routings, copies, ways)
def test_a_token_is_never_faster_than_its_work(routing: ReplayedRouting, copy: float, way: dict[str, Any]) -> None:
    costs = costs_of(copy)
    result = simulate(costs, routing, warmup=0, **way)
    assert result.seconds >= result.computing - 1e-9
    # A copy of the last layers may be under way still when the last token is done.
    assert result.seconds * routing.steps + way["slots"] * copy >= result.copying * routing.steps - 1e-6
    assert result.seconds == pytest.approx(result.computing + result.stalled)
    layers, top_k = routing.ids.shape[1:]
    work = costs.rest + layers * (costs.layer + top_k * costs.expert)
    if way["policy"] != "on_demand":
        work += layers * costs.speculation
    assert result.computing == pytest.approx(work)


@given(routings, copies, st.floats(0.01, 2.0), ways)
def test_copies_take_from_the_computation_beside_them_and_no_more(
    routing: ReplayedRouting, copy: float, beside: float, way: dict[str, Any]
) -> None:
    undisturbed = simulate(costs_of(copy), routing, warmup=0, **way)
    result = simulate(dataclasses.replace(costs_of(copy), beside=beside), routing, warmup=0, **way)
    taken = result.computing - undisturbed.computing
    assert -1e-9 <= taken <= beside * result.copies + 1e-9
    assert result.seconds == pytest.approx(result.computing + result.stalled)


def test_copies_that_are_waited_for_take_next_to_nothing() -> None:
    """Of each long copy only the short part counts in which something is computed."""
    routing = routing_of(0, kept=0.0)
    for copy, most in ((1000.0, 0.01), (1.0, 1.0)):
        costs = dataclasses.replace(costs_of(copy), beside=1.0)
        result = simulate(costs, routing, slots=6, policy="on_demand")
        taken = result.computing - (costs.rest + 6 * (costs.layer + 3 * costs.expert))
        assert 0 < taken < most * result.copies


@given(routings, copies, ways)
def test_bytes_are_those_of_the_misses(routing: ReplayedRouting, copy: float, way: dict[str, Any]) -> None:
    result = simulate(costs_of(copy), routing, warmup=0, **way)
    layers, top_k = routing.ids.shape[1:]
    assert result.copying == pytest.approx(copy * result.copies)
    assert 0 <= result.cache_hit_rate <= 1
    misses = (1 - result.cache_hit_rate) * layers * top_k
    if way["policy"] == "on_demand":
        assert result.copies == pytest.approx(misses)
        assert result.cancelled == 0
    else:
        assert result.copies >= misses - 1e-9


@given(routings, copies, st.sampled_from(POLICIES))
def test_with_a_slot_for_every_expert_each_is_copied_once(routing: ReplayedRouting, copy: float, policy: str) -> None:
    result = simulate(costs_of(copy), routing, slots=96, policy=policy, warmup=0)
    assert result.copies * routing.steps <= 96 + 1e-6


@given(routings, copies, st.floats(1.0, 10.0), st.integers(0, 50), ways)
def test_demand_is_never_slower_with_a_faster_link_or_more_slots(
    routing: ReplayedRouting, copy: float, factor: float, more: int, way: dict[str, Any]
) -> None:
    way |= {"policy": "on_demand"}
    before = simulate(costs_of(copy), routing, **way)
    assert simulate(costs_of(copy / factor), routing, **way).seconds <= before.seconds + 1e-9
    # Only for evictions that go by the last use. Others may have no choice where a layer has as many slots as it needs. With one
    # slot more they have a choice, and it is a bad one where a routing is not of their kind.
    assume(way["eviction"] in (Eviction.LRU, Eviction.LEAST_STALE))
    slots = min(96, way["slots"] + more)
    assert simulate(costs_of(copy), routing, **(way | {"slots": slots})).seconds <= before.seconds + 1e-9


@given(st.integers(0, 20), st.floats(0.8, 1.0), copies, st.floats(1.0, 10.0), st.integers(0, 50), ways)
def test_nor_is_speculating_where_most_guesses_are_right(
    seed: int, hit_rate: float, copy: float, factor: float, more: int, way: dict[str, Any]
) -> None:
    # Not to the last per cent: a wrong guess that there was no time or no slot to copy drives no other expert out. Where
    # most guesses are wrong, or the slots don't hold two layers, that can be a fifth.
    way |= {"slots": max(way["slots"], 16)}
    routing = routing_of(seed, hit_rate=hit_rate)
    before = simulate(costs_of(copy), routing, **way)
    slots = min(96, way["slots"] + more)
    assert simulate(costs_of(copy / factor), routing, **way).seconds <= 1.05 * before.seconds
    assert simulate(costs_of(copy), routing, **(way | {"slots": slots})).seconds <= 1.05 * before.seconds


@given(st.integers(0, 20), st.floats(0.2, 0.6), st.floats(0.85, 1.0), st.integers(18, 80), st.floats(0.05, 0.5))
def test_speculating_gains_where_the_link_has_time(
    seed: int, kept: float, hit_rate: float, slots: int, copy: float
) -> None:
    routing, costs = routing_of(seed, kept, hit_rate), costs_of(copy)
    demand, prefetch, speculative = (simulate(costs, routing, slots=slots, policy=policy) for policy in POLICIES)
    assume(max(demand.copying, speculative.copying) < 0.7 * demand.computing)
    assert prefetch.seconds <= demand.seconds + 6 * costs.speculation
    assert speculative.seconds <= prefetch.seconds * 1.01


def test_nothing_to_copy_costs_what_computing_costs() -> None:
    routing = routing_of(0, kept=1.0, hit_rate=1.0)
    result = simulate(costs_of(1.0), routing, slots=96, policy="on_demand", warmup=WARMUP)
    assert result.seconds == pytest.approx(result.computing)
    assert (result.copies, result.bound) == (0, "compute")


def test_without_a_cache_on_demand_is_the_sum_and_speculating_the_maximum() -> None:
    routing = routing_of(0, kept=0.0, hit_rate=1.0, layers=12)
    costs = dataclasses.replace(costs_of(0.6), speculation=0.0)
    demand = simulate(costs, routing, slots=3, policy="on_demand")
    # Each expert's copy waits for its slot at the most; computing overlaps no copy but those of its own layer.
    assert demand.seconds > demand.copying + 12 * costs.layer
    speculative = simulate(costs, routing, slots=12, policy="speculative")
    assert speculative.seconds < 1.05 * speculative.limit


def test_what_can_not_be_simulated() -> None:
    with pytest.raises(ValueError, match="too few"):
        simulate(costs_of(1.0), routing_of(0), slots=2, policy="prefetch")
    with pytest.raises(ValueError, match="too few"):
        simulate(costs_of(1.0), routing_of(0), slots=20, policy="prefetch", warmup=40)
