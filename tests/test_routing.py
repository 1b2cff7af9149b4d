"""Routings from elsewhere: drawn as their statistics say, and followed by a real model under every policy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from predict_train.predictors.architecture import MoELayer
from predict_train.predictors.discovery import find_moe_layers
from predict_train.runtime import offloaded
from predict_train.runtime.measure.routing import (
    PRESETS,
    ReplayedRouting,
    RoutingError,
    Statistics,
    draw_routing,
    replaying,
)
from transformers import PreTrainedModel

WAYS = [
    ("on_demand", "true"),
    ("prefetch", "true"),
    ("speculative", "speculated"),
    ("speculative", "true"),
    ("speculative", "resident"),
]


@st.composite
def drawn(draw: st.DrawFn) -> tuple[Statistics, ReplayedRouting, int]:
    num_experts = draw(st.integers(2, 40))
    top_k = draw(st.integers(1, min(8, num_experts)))
    least = max(0, 2 * top_k - num_experts) / top_k
    statistics = Statistics(
        kept=draw(st.floats(least, 1)),
        hit_rate=draw(st.floats(least, 1)),
        skew=draw(st.floats(0, 1.5)),
        beyond=draw(st.floats(0, 1)),
    )
    routing = draw_routing(
        statistics,
        steps=draw(st.integers(1, 60)),
        layers=draw(st.integers(1, 6)),
        num_experts=num_experts,
        top_k=top_k,
        candidates=draw(st.integers(top_k, num_experts)),
        seed=draw(st.integers(0, 99)),
    )
    return statistics, routing, num_experts


@given(drawn())
def test_experts_and_candidates_are_distinct_and_there(case: tuple[Statistics, ReplayedRouting, int]) -> None:
    _, routing, num_experts = case
    for chosen in (routing.ids, routing.candidates):
        assert chosen.min() >= 0
        assert chosen.max() < num_experts
        assert (np.diff(np.sort(chosen, axis=-1), axis=-1) > 0).all()


@given(drawn())
def test_the_stated_shares_are_reached_within_noise(case: tuple[Statistics, ReplayedRouting, int]) -> None:
    statistics, routing, _ = case
    # Of so many draws; six standard deviations, and a little for the few.
    size = routing.ids[1:].size
    if size:
        assert abs(routing.kept - statistics.kept) <= 6 * np.sqrt(0.25 / size) + 1e-9
    assert abs(routing.hit_rate - statistics.hit_rate) <= 6 * np.sqrt(0.25 / routing.ids.size) + 1e-9


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset: str) -> None:
    routing = draw_routing(
        PRESETS[preset], steps=400, layers=12, num_experts=64, top_k=4, candidates=8
    )  # 19,200 draws: a standard deviation of .0036
    assert routing.kept == pytest.approx(PRESETS[preset].kept, abs=0.015)
    assert routing.hit_rate == pytest.approx(PRESETS[preset].hit_rate, abs=0.015)
    wide = (routing.ids[..., None] == routing.candidates[..., None, :]).any(-1).mean()
    assert wide > 0.99


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    def draw(seed: int) -> ReplayedRouting:
        return draw_routing(PRESETS["moe-1b"], steps=20, layers=3, num_experts=16, top_k=4, candidates=6, seed=seed)

    one, again, other = draw(0), draw(0), draw(1)
    assert np.array_equal(one.ids, again.ids)
    assert np.array_equal(one.candidates, again.candidates)
    assert not np.array_equal(one.ids, other.ids)


def test_skew_makes_some_experts_popular() -> None:
    def busiest(skew: float) -> float:
        routing = draw_routing(Statistics(0.2, 0.9, skew), steps=300, layers=1, num_experts=32, top_k=2)
        return float(np.bincount(routing.ids.flatten(), minlength=32).max() / routing.ids.size)

    assert busiest(0.0) < 0.08
    assert busiest(1.2) > 2 * busiest(0.0)


@pytest.mark.parametrize(
    ("statistics", "top_k", "candidates", "said"),
    [
        (Statistics(kept=1.2, hit_rate=0.9), 2, 2, "kept"),
        (Statistics(kept=0.3, hit_rate=-0.1), 2, 2, "hit_rate"),
        (Statistics(kept=0.1, hit_rate=0.9), 6, 6, "6 of 8"),
        (Statistics(kept=0.3, hit_rate=0.9), 2, 1, "candidates"),
        (Statistics(kept=0.3, hit_rate=0.9), 2, 9, "candidates"),
        (Statistics(kept=0.3, hit_rate=0.9, skew=-1), 2, 2, "skew"),
    ],
)
def test_what_can_not_be_drawn(statistics: Statistics, top_k: int, candidates: int, said: str) -> None:
    with pytest.raises(RoutingError, match=said):
        draw_routing(statistics, steps=2, layers=2, num_experts=8, top_k=top_k, candidates=candidates)


def decode(model: PreTrainedModel, steps: int) -> None:
    prompt = torch.arange(1, 21).unsqueeze(0)  # too long to be speculated
    model.generate(prompt, max_new_tokens=steps + 1, do_sample=False, eos_token_id=None)


def executed(model: PreTrainedModel, layers: list[MoELayer], steps: int) -> np.ndarray:
    """The experts that each layer was asked for at each decode step of a generation, `[steps, layers, top_k]`."""
    seen: list[list[int]] = []
    handles = [
        layer.experts.register_forward_pre_hook(
            lambda _, args: seen.append(args[1][0].tolist()) if len(args[1]) == 1 else None
        )
        for layer in layers
    ]
    decode(model, steps)
    for handle in handles:
        handle.remove()
    return np.array(seen).reshape(steps, len(layers), -1)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral"])
@pytest.mark.parametrize(("policy", "gating"), WAYS)
def test_a_model_follows_the_routing(
    build_moe: Callable[..., PreTrainedModel], architecture: str, policy: str, gating: str
) -> None:
    model = build_moe(architecture)
    layers = find_moe_layers(model)
    steps, m = 5, 4
    routing = draw_routing(
        Statistics(0.4, 0.6), steps=steps, layers=len(layers), num_experts=8, top_k=2, candidates=m, seed=3
    )
    with (
        replaying(layers, routing) as replayed,
        offloaded(model, policy=policy, gating=gating, slots=6, candidates=m) as offload,
    ):
        offload.guess_by(replayed.guesser)
        for _ in range(2):  # each generation begins at the first step again
            offload.reset()
            did = np.sort(executed(model, layers, steps), axis=-1)
            if policy != "speculative":
                assert np.array_equal(did, np.sort(routing.ids, axis=-1))
            elif gating != "resident":
                assert np.array_equal(did, np.sort(routing.candidates[:, :, :2], axis=-1))
            else:
                available = (routing.ids[..., None] == routing.candidates[..., None, :]).any(-1)
                for at in np.argwhere(available):
                    assert routing.ids[tuple(at)] in did[tuple(at[:2])]  # a true expert that is there is executed
            if policy != "on_demand":
                wide = (routing.ids[..., None] == routing.candidates[..., None, :]).any(-1).mean()
                assert offload.counters.speculation_hit_rate == pytest.approx(wide)


def test_afterwards_the_model_routes_itself(build_moe: Callable[..., PreTrainedModel]) -> None:
    model = build_moe("qwen3_moe")
    layers = find_moe_layers(model)
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    with replaying(layers, draw_routing(Statistics(0.4, 0.6), steps=2, layers=4, num_experts=8, top_k=2)):
        torch.testing.assert_close(model(ids).logits, before)  # a prompt is the model's own
        decode(model, 3)
    assert torch.equal(model(ids).logits, before)
    assert all("forward" not in vars(layer.router) and not layer.router._forward_pre_hooks for layer in layers)


def test_a_routing_of_another_shape_is_refused(build_moe: Callable[..., PreTrainedModel]) -> None:
    layers = find_moe_layers(build_moe("qwen3_moe"))
    for other in ({"layers": 3}, {"top_k": 3}, {"num_experts": 64}):
        shape = {"layers": 4, "top_k": 2, "num_experts": 8} | other
        routing = draw_routing(Statistics(0.4, 0.6), steps=9, **shape)
        with pytest.raises(RoutingError, match="give a routing of this model"), replaying(layers, routing):
            pass
