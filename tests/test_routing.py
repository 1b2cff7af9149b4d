"""Routings from elsewhere: drawn as their statistics say, and followed by a real model under every policy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from predict_train.predictors.architecture import MoELayer
from predict_train.predictors.discovery import find_moe_layers
from predict_train.runtime import offloaded
from predict_train.runtime.measure.reuse import ReuseCurve
from predict_train.runtime.measure.routing import (
    MEASURED,
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
def curves(draw: st.DrawFn) -> ReuseCurve:
    num_experts = draw(st.integers(4, 160))
    points = draw(st.integers(1, min(4, num_experts)))
    slots = draw(st.lists(st.integers(1, num_experts), min_size=points, max_size=points, unique=True))
    rates = draw(st.lists(st.floats(0.01, 0.99), min_size=points, max_size=points, unique=True))
    pairs = tuple(zip(sorted(slots), sorted(rates), strict=True))
    return ReuseCurve(pairs, num_experts, draw(st.integers(1, min(8, num_experts))), draw(st.integers(1, 1000)))


@st.composite
def drawn(draw: st.DrawFn) -> tuple[Statistics, ReplayedRouting, int]:
    num_experts = draw(st.integers(2, 40))
    top_k = draw(st.integers(1, min(8, num_experts)))
    least = max(0, 2 * top_k - num_experts) / top_k
    curve = draw(st.none() | curves())
    statistics = Statistics(
        kept=draw(st.floats(least, 1)) if curve is None else None,
        hit_rate=draw(st.floats(least, 1)),
        skew=draw(st.floats(0, 1.5)) if curve is None else 0.0,
        beyond=draw(st.floats(0, 1)),
        curve=curve,
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
    if size and statistics.kept is not None:
        assert abs(routing.kept - statistics.kept) <= 6 * np.sqrt(0.25 / size) + 1e-9
    assert abs(routing.hit_rate - statistics.hit_rate) <= 6 * np.sqrt(0.25 / routing.ids.size) + 1e-9


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset: str) -> None:
    routing = draw_routing(
        PRESETS[preset], steps=400, layers=12, num_experts=64, top_k=4, candidates=8
    )  # 19,200 draws: a standard deviation of .0036
    assert routing.kept == pytest.approx({"qwen3-30b-a3b": 0.44, "moe-1b": 0.38}[preset], abs=0.015)
    assert routing.hit_rate == pytest.approx(PRESETS[preset].hit_rate, abs=0.015)
    wide = (routing.ids[..., None] == routing.candidates[..., None, :]).any(-1).mean()
    assert wide > 0.99


def hits(ids: np.ndarray, slots: tuple[int, ...]) -> list[float]:
    """How often so many slots of each layer hit that keep the experts used last and are empty at first."""
    found = np.zeros(len(slots))
    for layer in range(ids.shape[1]):
        used: list[int] = []
        for expert in ids[:, layer].flatten().tolist():
            if expert in used:  # fewer slots keep the first of what more keep
                place = used.index(expert)
                found += [place < size for size in slots]
                del used[place]
            used.insert(0, expert)
    return (found / ids.size).tolist()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("layers", [12, 48])
def test_slots_of_any_number_hit_as_often_as_with_the_real_routing(seed: int, layers: int) -> None:
    routing = draw_routing(
        PRESETS["qwen3-30b-a3b"], steps=256, layers=layers, num_experts=128, top_k=8, candidates=10, seed=seed
    )
    measured = [0.366, 0.741, 0.894, 0.962]
    assert hits(routing.ids, (8, 24, 48, 81)) == pytest.approx(measured, abs=0.02 if layers == 12 else 0.01)
    assert routing.hit_rate == pytest.approx(0.89, abs=0.01)
    # Measured too, and not asked for: .45 of the experts are the previous token's, .80 of them were used within eight tokens.
    assert routing.kept == pytest.approx(0.45, abs=0.03)
    window = np.lib.stride_tricks.sliding_window_view(routing.ids[:-1], 8, axis=0).reshape(248, layers, -1)
    within = (routing.ids[8:, ..., None] == window[:, :, None]).any(-1).mean()
    assert within == pytest.approx(0.80, abs=0.03)


@given(st.floats(0, 1), st.integers(0, 99))
def test_the_hit_rate_of_the_guess_is_as_asked_with_a_curve(hit_rate: float, seed: int) -> None:
    statistics = replace(PRESETS["qwen3-30b-a3b"], hit_rate=hit_rate)
    routing = draw_routing(statistics, steps=30, layers=8, num_experts=128, top_k=8, seed=seed)
    assert abs(routing.hit_rate - hit_rate) <= 6 * np.sqrt(0.25 / routing.ids.size)


@given(curves(), st.integers(1, 60), st.data())
def test_depths_are_shares_for_every_shape_of_model(curve: ReuseCurve, num_experts: int, data: st.DataObject) -> None:
    depths = curve.depths(num_experts, data.draw(st.integers(1, num_experts)))
    assert len(depths) == num_experts + 1
    assert depths[0] == 0
    assert depths[-1] == 1
    assert (np.diff(depths) >= 0).all()


def test_wrong_guesses_are_more_recent_than_any_experts_and_less_than_right_ones() -> None:
    routing = draw_routing(PRESETS["qwen3-30b-a3b"], steps=120, layers=8, num_experts=128, top_k=8, seed=1)
    right, wrong, others = [], [], []
    for step in range(64, 120):
        for layer in range(8):
            recent = set(routing.ids[step - 2 : step, layer].flatten().tolist())
            ids, guesses = set(routing.ids[step, layer].tolist()), set(routing.candidates[step, layer].tolist())
            right += [expert in recent for expert in ids]
            wrong += [expert in recent for expert in guesses - ids]
            others += [expert in recent for expert in set(range(128)) - ids]
    # On the embedded model, a third of the way without predictors and a half with them.
    assert 0.2 < (np.mean(wrong) - np.mean(others)) / (np.mean(right) - np.mean(others)) < 0.6


# Of an earlier release: figures that it measured can be compared with those of routings drawn by `kept` today.
@pytest.mark.parametrize(
    ("statistics", "shape", "digest"),
    [
        (Statistics(0.43, 0.89), {"steps": 30, "layers": 5, "num_experts": 128, "top_k": 8, "candidates": 10, "seed": 3}, "9750c51ae5253cc1"),
        (Statistics(0.38, 0.93, skew=0.7), {"steps": 30, "layers": 5, "num_experts": 64, "top_k": 4, "candidates": 6}, "c313e2659682f46c"),
        (PRESETS["moe-1b"], {"steps": 60, "layers": 12, "num_experts": 64, "top_k": 4, "candidates": 6}, "9e71af5794c22e18"),
    ],
)  # fmt: skip
def test_what_is_drawn_by_kept_never_changes(statistics: Statistics, shape: dict[str, int], digest: str) -> None:
    routing = draw_routing(statistics, **shape)
    drawn = routing.ids.astype("<i8").tobytes() + routing.candidates.astype("<i8").tobytes()
    assert hashlib.sha256(drawn).hexdigest()[:16] == digest


def test_the_source_says_how_a_routing_was_drawn() -> None:
    shape = {"steps": 2, "layers": 2, "num_experts": 128, "top_k": 8}
    one, other = (json.loads(json.dumps(draw_routing(known, **shape).source)) for known in PRESETS.values())
    assert (one["drawn_by"], other["drawn_by"]) == ("curve", "kept")
    assert one["curve"]["hit_rates"] == [list(pair) for pair in MEASURED.hit_rates]
    assert "kept" not in one
    assert "curve" not in other


@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_seed_draws_the_same_and_another_does_not(preset: str) -> None:
    def draw(seed: int) -> ReplayedRouting:
        return draw_routing(PRESETS[preset], steps=20, layers=3, num_experts=16, top_k=4, candidates=6, seed=seed)

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
        (Statistics(kept=None, hit_rate=0.9), 2, 2, "one of the two"),
        (Statistics(kept=0.3, hit_rate=0.9, curve=MEASURED), 2, 2, "one of the two"),
        (Statistics(kept=None, hit_rate=1.1, curve=MEASURED), 2, 2, "hit_rate"),
        (Statistics(kept=None, hit_rate=0.9, skew=1, curve=MEASURED), 2, 2, "skew"),
        (Statistics(None, 0.9, curve=ReuseCurve((), 8, 2, 9)), 2, 2, "curve rise"),
        (Statistics(None, 0.9, curve=ReuseCurve(((2, 0.5), (4, 0.4)), 8, 2, 9)), 2, 2, "curve rise"),
        (Statistics(None, 0.9, curve=ReuseCurve(((2, 0.5), (4, 1.0)), 8, 2, 9)), 2, 2, "curve rise"),
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
