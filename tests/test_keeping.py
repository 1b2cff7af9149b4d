"""Which rule keeps what in slots: the counted hits are those of the runtime's own schedule, and nothing beats Belady's rule."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from predict_train.data_collection.keeping import RULES, Routed, belady, count_hits, frequency, keep_rates, last_use
from predict_train.data_collection.trace import Trace
from predict_train.predictors.errors import UserError
from predict_train.runtime.measure.routing import ReplayedRouting, Statistics, draw_routing
from predict_train.runtime.measure.simulation import Costs, simulate
from predict_train.runtime.settings import OffloadConfig
from predict_train.train.inspection import inspect
from test_inspect import told


def drawn(steps: int, experts: int, top_k: int, seed: int, layers: int = 1) -> ReplayedRouting:
    statistics = Statistics(0.4, 1.0, skew=1.0)
    return draw_routing(statistics, steps=steps, layers=layers, num_experts=experts, top_k=top_k, seed=seed)


def routed(routing: ReplayedRouting, experts: int) -> Routed:
    return Routed.of(torch.from_numpy(routing.ids)[None], experts)


@pytest.mark.parametrize("slots", [3, 4, 7, 12])
def test_hits_by_frequency_are_those_of_the_runtime(slots: int) -> None:
    """Its schedule, with a clock in the place of copies, evicts the same experts."""
    steps, layers = 200, 3
    routing = drawn(steps, 16, 3, slots, layers)
    found = count_hits(routed(routing, 16), frequency(routed(routing, 16)), [slots]).sum()
    config = OffloadConfig(policy="on_demand", slots=layers * slots, eviction="frequency")
    rate = simulate(Costs(1.0, 1.0, 1.0), routing, config, warmup=0).cache_hit_rate
    # Layers share their slots there, so in the first tokens one layer has more of them than another.
    assert float(found) / routing.ids.size == pytest.approx(rate, abs=0.002)


def fewest_misses(tokens: list[frozenset[int]], slots: int) -> int:
    """By trying every choice."""

    @cache
    def after(number: int, present: frozenset[int]) -> int:
        if number == len(tokens):
            return 0
        needed = tokens[number]
        missed, free = len(needed - present), sorted(present - needed)
        room = slots - len(needed)
        if len(free) <= room:
            return missed + after(number + 1, present | needed)
        return missed + min(after(number + 1, kept | needed) for kept in subsets(free, room))

    return after(0, frozenset())


def subsets(items: list[int], size: int) -> list[frozenset[int]]:
    if size == 0:
        return [frozenset()]
    return [other | {item} for number, item in enumerate(items) for other in subsets(items[number + 1 :], size - 1)]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), experts=st.integers(6, 7), top_k=st.integers(1, 3), slots=st.integers(3, 7))
def test_no_choice_misses_less_than_belady(seed: int, experts: int, top_k: int, slots: int) -> None:
    slots = min(slots, experts)
    routing = drawn(9, experts, top_k, seed)
    own = routed(routing, experts)
    tokens = [frozenset(chosen) for chosen in routing.ids[:, 0].tolist()]
    misses = {rule.__name__: routing.ids.size - int(count_hits(own, rule(own), [slots])) for rule in RULES.values()}
    assert misses["belady"] == fewest_misses(tokens, slots)
    assert min(misses.values()) == misses["belady"]


def test_sequences_and_layers_are_counted_apart() -> None:
    """Together they hit as often as one by one."""
    many = [drawn(30, 8, 2, seed, layers=2) for seed in range(3)]
    together = Routed.of(torch.stack([torch.from_numpy(one.ids) for one in many]), 8)
    for rule in (last_use, frequency, belady):
        apart = sum(count_hits(routed(one, 8), rule(routed(one, 8)), [2, 4]) for one in many)
        assert torch.equal(count_hits(together, rule(together), [2, 4]), torch.as_tensor(apart))
    assert not torch.equal(count_hits(together, last_use(together), [4]), count_hits(together, belady(together), [4]))


def test_a_trace_tells_what_to_keep(collected, exported) -> None:
    found = inspect(collected, keep=True)
    kept = found["keep"]
    assert kept == keep_rates(Trace.open(collected), RULES)
    assert kept["slots"] == [2, 2, 4]  # of 8 experts, 2 for a token
    assert kept["rows"] > 7000
    rates = {name: torch.tensor(rate) for name, rate in kept["hit_rates"].items()}
    # With as many slots as a token needs, no rule has a choice. In the curve of `reuse` a token's experts come one by one, so
    # that one of them can take the slot of another one.
    assert found["reuse"]["slots"][1] == 2
    assert rates["lru"][0].mean().item() > found["reuse"]["hit_rates"][1]
    assert torch.equal(rates["lru"][0], rates["belady"][0])
    assert (rates["belady"][2] > rates["lru"][2]).all()
    assert kept["way"]["frequency"][:2] == [None, None]
    assert kept["way"]["frequency"][2] < 1
    text = told(found)
    for name, rate in rates.items():
        assert name in text
        assert all(f"{value:.3f}" in text for value in rate.flatten().tolist())
    with pytest.raises(UserError, match="is no trace"):
        inspect(exported, keep=True)
