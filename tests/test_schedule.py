"""One schedule for both: a running model and its simulation begin the same copies, in the same order."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
from conftest import UNTRAINED, build_model
from hypothesis import given, settings
from hypothesis import strategies as st
from predict_train.predictors.architecture import farther, sources
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.generation import CACHE
from predict_train.runtime import Eviction, Gating, Observer, OffloadConfig, Policy, offloaded
from predict_train.runtime.host import slots as slots_module
from predict_train.runtime.host.price import Prices
from predict_train.runtime.host.schedule import Schedule
from predict_train.runtime.measure.routing import Statistics, draw_routing, replaying
from predict_train.runtime.measure.simulation import Costs, simulate
from predict_train.runtime.store import ExpertStore
from transformers import PreTrainedModel

LAYERS, EXPERTS, TOP_K = 4, 8, 2
NEVER = 1e9
"""Seconds of a simulated copy: nothing is over that is not waited for."""


class Copies(Observer):
    """The experts whose copies were begun, in their order."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, int]] = []

    def copy_begun(self, key: tuple[int, int], slot: int) -> None:  # noqa: ARG002
        self.begun.append(key)


class Lazy:
    """Transfers that are made when they are waited for, first come, first served, as those of a slow stream would be."""

    def __init__(self, store: ExpertStore, memory: torch.Tensor, readers: int):  # noqa: ARG002
        self.slots, self._store = memory, store
        self._queue: deque[tuple[int, tuple[int, int]]] = deque()

    def observe(self, observer: Observer | None) -> None:
        pass

    def start(self, slot: int, key: tuple[int, int], urgent: bool) -> None:  # noqa: ARG002
        self.wait(slot)
        self._queue.append((slot, key))

    def hurry(self, slot: int) -> None:
        pass

    def cancel(self, slot: int) -> bool:  # noqa: ARG002
        return False

    def copying(self, slot: int) -> bool:
        return any(slot == other for other, _ in self._queue)

    def wait(self, slot: int) -> None:
        while self.copying(slot):
            first, key = self._queue.popleft()
            self._store.read(*key, self.slots[first].numpy())

    def computed(self, slot: int) -> None:
        pass

    def abandon(self) -> None:
        self._queue.clear()

    def stalled_seconds(self) -> float:
        return 0.0

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build_model("qwen3_moe")


@given(
    config=st.builds(
        OffloadConfig,
        policy=st.sampled_from(Policy),
        gating=st.sampled_from(Gating),
        slots=st.integers(TOP_K, 20),
        candidates=st.integers(TOP_K, 5),
        horizon=st.integers(1, 2),
        eviction=st.sampled_from(UNTRAINED),
        device=st.just("cpu"),
    ),
    kept=st.floats(0.0, 1.0),
    hit_rate=st.floats(0.0, 1.0),
    seed=st.integers(0, 50),
)
@settings(max_examples=40, deadline=None)
def test_a_model_and_its_simulation_begin_the_same_copies(
    model: PreTrainedModel, config: OffloadConfig, kept: float, hit_rate: float, seed: int
) -> None:
    layers, steps = find_moe_layers(model), 6
    shape: dict[str, Any] = {"layers": LAYERS, "num_experts": EXPERTS, "top_k": TOP_K, "candidates": 5, "seed": seed}
    routing = draw_routing(Statistics(kept, hit_rate), steps=steps, **shape)
    ran, simulated = Copies(), Copies()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(slots_module, "make_transfers", Lazy)
        cache = model(torch.tensor([[1]]), use_cache=True)[CACHE]  # what follows are decode steps
        with replaying(layers, routing) as replayed, offloaded(model, config=config) as offload:
            offload.guess_by(replayed.guesser)
            with offload.observed(ran):
                for token in range(1, steps + 1):
                    model(torch.tensor([[token]]), **{CACHE: cache})
    source_of = farther(sources(layers), config.horizon or 1)
    costs = Costs(layer=1.0, expert=1.0, copy=NEVER)
    simulate(costs, routing, config, source_of, queue=True, warmup=0, observer=simulated)
    assert ran.begun == simulated.begun
    assert ran.begun, "with empty slots something is copied"


class Unfinished:
    """Copies of which only those in `over` are over."""

    def __init__(self) -> None:
        self.over: set[int] = set()
        self.begun: list[tuple[int, int]] = []

    def start(self, slot: int, key: tuple[int, int], urgent: bool) -> None:  # noqa: ARG002
        self.begun.append(key)

    def copying(self, slot: int) -> bool:
        return slot not in self.over

    def hurry(self, slot: int) -> None:
        pass

    def wait(self, slot: int) -> None:
        self.over.add(slot)

    def cancel(self, slot: int) -> bool:  # noqa: ARG002
        return False

    def abandon(self) -> None:
        pass


def test_a_guess_that_is_not_worth_its_copy_yet_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as fewer copies are before it; until its layer is entered."""
    monkeypatch.setattr(Prices, "least_chance", lambda _self, _layer, ahead, *_: ahead)
    copies: Any = Unfinished()
    prices = Prices(LAYERS, 8, clock=lambda: 0.0, copy_seconds=lambda: 1.0)
    schedule = Schedule(copies, 8, LAYERS, Eviction.LRU, EXPERTS, prices)
    schedule.begin_pass()
    schedule.enter(0, [0, 1])
    schedule.announce(1, [4, 5, 6], dict.fromkeys([4, 5, 6], 0.5))
    schedule.begin_copies()
    assert copies.begun == [(0, 0), (0, 1)]
    for expert in (0, 1):
        schedule.slot(0, expert)
        schedule.left(0, [expert])
    assert copies.begun[2:] == [(1, 4)]
    copies.over.add(schedule._cache.slot((1, 4)))
    schedule.begin_copies()
    assert copies.begun[3:] == [(1, 5)]
    schedule.enter(1, [4, 5])
    copies.over.update(range(8))
    schedule.begin_copies()
    assert (1, 6) not in copies.begun
