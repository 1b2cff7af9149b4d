"""Eviction `followers`: what is counted is as the definition says, and keeps what follows."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from conftest import build_model
from hypothesis import given
from hypothesis import strategies as st
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.reuse import HALF_LIFE
from predict_train.runtime import OffloadConfig
from predict_train.runtime.engines import make_engine
from predict_train.runtime.errors import OffloadError
from predict_train.runtime.host import followers
from predict_train.runtime.host.followers import RATE, SHARE, SURE, Followers
from predict_train.runtime.measure.routing import ReplayedRouting
from predict_train.runtime.measure.simulation import Costs, simulate

EXPERTS = 5
tokens = st.lists(st.integers(0, EXPERTS - 1), min_size=2, max_size=2, unique=True)
passes = st.lists(st.lists(tokens, min_size=1, max_size=7), min_size=1, max_size=8)


def defined(tokens: list[list[int]], expert: int) -> float:
    """What an expert is worth after tokens that have used these experts, from the definition."""
    last, uses = tokens[-1], [sum(e in used for used in tokens) for e in range(EXPERTS)]
    alone = uses[expert] * len(last) / (1 - RATE) / sum(uses)
    product = alone
    for other in last:
        soon = sum(
            RATE ** (later - at - 1)
            for at, used in enumerate(tokens)
            for later in range(at + 1, len(tokens))
            if other in used and expert in tokens[later]
        )
        product *= (soon + SURE * alone) / (uses[other] + SURE) / alone if alone else 1.0
    ages = [len(tokens) - 1 - at for at, used in enumerate(tokens) if expert in used]
    count = sum(2 ** (-age / HALF_LIFE) for age in ages) * (1 - 2 ** (-1 / HALF_LIFE)) / (1 - RATE)
    return product + SHARE * count


@given(passes)
def test_an_expert_is_worth_what_the_definition_says(asked: list[list[list[int]]]) -> None:
    """Tokens one by one, and in prompts that are longer than a block."""
    counted = Followers(EXPERTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(followers, "BLOCK", 3)
        for ids in asked:
            counted.add(np.array(ids))
    every = [used for ids in asked for used in ids]
    assert counted.worth == pytest.approx([defined(every, expert) for expert in range(EXPERTS)], rel=1e-6, abs=1e-6)


def test_it_stays_finite_and_learns_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followers, "MOST", 200.0)
    counted = Followers(4)
    for _ in range(5000):  # 1 follows on 0
        counted.add(np.array([[0]]))
        counted.add(np.array([[1]]))
    counted.add(np.array([[0]]))
    assert counted.worth[1] > counted.worth[2]
    for _ in range(600):  # and then 2 does
        counted.add(np.array([[0]]))
        counted.add(np.array([[2]]))
    counted.add(np.array([[0]]))
    assert counted.worth[2] > counted.worth[1]
    for ids in ([[0, 7]], [[0, 7], [1, 4]]):  # an expert that computes nothing has no slot
        counted.add(np.array(ids))
        assert np.isfinite(counted.worth).all()


def test_what_follows_is_kept() -> None:
    """Pairs of experts that come in a cycle, now and then with a jump in it: how often or when each was used says nothing."""
    generator, state, ids = np.random.default_rng(0), 0, []
    for _ in range(800):
        state = (state + 1) % 8 if generator.random() < 0.9 else int(generator.integers(8))
        ids.append([[2 * state, 2 * state + 1]])
    routing = ReplayedRouting(np.array(ids), np.array(ids), {})
    copies = {}
    for eviction in ("least_stale", "frequency", "followers"):
        config = OffloadConfig(policy="on_demand", slots=8, eviction=eviction)
        copies[eviction] = simulate(Costs(1.0, 1.0, 1.0), routing, config, warmup=200).copies
    assert copies["followers"] < 0.9 * min(copies["least_stale"], copies["frequency"])


def test_it_is_refused_on_another_device_than_a_cpu() -> None:
    layers, store = find_moe_layers(build_model("qwen3_moe")), cast(Any, None)
    config = OffloadConfig(eviction="followers", slots=8).model_copy(update={"device": "cuda"})
    with pytest.raises(OffloadError, match="followers is for models that compute on a CPU"):
        make_engine(store, layers, config, None)
