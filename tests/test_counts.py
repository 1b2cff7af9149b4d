"""Decayed counts: as their definition says, however they are kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from predict_train.predictors.reuse import HALF_LIFE
from predict_train.runtime.host.counts import LARGEST, DecayedCounts
from predict_train.runtime.measure.routing import Statistics, draw_routing
from predict_train.runtime.measure.simulation import Costs, simulate
from predict_train.runtime.settings import OffloadConfig

EXPERTS = 5
passes = st.lists(
    st.lists(st.lists(st.integers(0, EXPERTS - 1), min_size=2, max_size=2, unique=True), min_size=1, max_size=4),
    max_size=12,
)


def defined(tokens: list[list[int]]) -> list[float]:
    """The counts after tokens that have used these experts."""
    return [
        sum(2 ** (-(len(tokens) - 1 - at) / HALF_LIFE) for at, used in enumerate(tokens) if expert in used)
        for expert in range(EXPERTS)
    ]


@given(passes)
def test_counts_are_the_sum_of_uses_that_halve(asked: list[list[list[int]]]) -> None:
    """Tokens one by one, and in prompts."""
    counts = DecayedCounts(EXPERTS)
    for ids in asked:
        counts.add(np.array(ids))
    expected = defined([used for ids in asked for used in ids])
    assert counts.of(range(EXPERTS)) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    order = sorted(range(EXPERTS), key=lambda expert: round(expected[expert], 5))
    assert [expected[e] for e in sorted(order, key=counts.worth.__getitem__)] == pytest.approx(
        [expected[e] for e in order]
    )
    other = DecayedCounts(EXPERTS)
    other.set(counts.of(range(EXPERTS)))
    for one in (counts, other):
        one.add(np.array([[1, EXPERTS]]))  # an expert that computes nothing is not counted
    assert other.of(range(EXPERTS)) == pytest.approx(counts.of(range(EXPERTS)), rel=1e-6, abs=1e-9)


def test_counts_stay_finite() -> None:
    counts, most = DecayedCounts(EXPERTS), 1 / (1 - 2 ** (-1 / HALF_LIFE))
    for _ in range(int(3 * LARGEST * HALF_LIFE)):
        counts.add(np.array([[0]]))
    assert counts.of([0]) == pytest.approx([most])
    counts.add(np.full((100_000, 2), (1, EXPERTS + 2)))
    assert counts.of([0, 1]) == pytest.approx([0.0, most])


def test_what_is_used_often_is_kept_where_the_last_use_says_little() -> None:
    """Two favourites and many others that come once: favourites are copied once, and the last use would lose them."""
    routing = draw_routing(Statistics(0.0, 1.0, skew=2.0), steps=400, layers=3, num_experts=32, top_k=2, seed=1)
    copies = {}
    for eviction in ("least_stale", "frequency"):
        config = OffloadConfig(policy="on_demand", slots=18, eviction=eviction)
        copies[eviction] = simulate(Costs(1.0, 1.0, 1.0), routing, config, warmup=100).copies
    assert copies["frequency"] < 0.95 * copies["least_stale"]
