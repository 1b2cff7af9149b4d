"""Guesses two layers ahead, or from a layer's own input: whose they are, and that no token depends on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from predict_train.predictors.architecture import sources
from predict_train.predictors.checkpoint import Predictors, TargetLayer, make_speculators
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.settings import SettingsError
from predict_train.runtime import Gating, Policy, offloaded
from predict_train.runtime.control import RoutingControl
from predict_train.runtime.engine import Ahead
from predict_train.runtime.errors import OffloadError
from predict_train.runtime.targets import targets_of
from test_offload import greedy, prompt
from test_policy import with_default_vectors
from transformers import PreTrainedModel

ARCHITECTURES = ["qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss"]
OWN_INPUT = {0: None, 1: 0, 2: None, 3: 1}
"""Layer 2 reads its own input, layer 3 the layer before that."""


def reading(predictors: Predictors, sources: dict[int, int | None]) -> Predictors:
    """`predictors` whose target layers read `sources`."""
    return replace(predictors, layers=[TargetLayer(target, source) for target, source in sources.items()])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_horizon_of_two_is_exact(build_moe: Callable[..., PreTrainedModel], architecture: str) -> None:
    model = build_moe(architecture)
    for ids, sizes in ((prompt(1, 7), (2, 8)), (prompt(3, 2), (3, 24))):
        expected = greedy(model, ids)
        for slots, policy in itertools.product(sizes, ("prefetch", "auto")):
            with offloaded(model, policy=policy, slots=slots, horizon=2, device="cpu") as offload:
                assert torch.equal(greedy(model, ids), expected)
                assert offload.counters.speculation_hit_rate is not None


@pytest.fixture(scope="module")
def followed(build_moe: Callable[..., PreTrainedModel]) -> tuple[PreTrainedModel, Predictors, torch.Tensor]:
    """A model, predictors of it, and what it says after a prompt."""
    model = build_moe("qwen2_moe")
    return model, with_default_vectors(model), greedy(model, prompt(1, 5), 4)


@given(
    places=st.lists(st.integers(-1, 2), min_size=4, max_size=4), slots=st.integers(2, 32), candidates=st.integers(2, 8)
)
def test_no_source_changes_a_token(
    followed: tuple[PreTrainedModel, Predictors, torch.Tensor], places: list[int], slots: int, candidates: int
) -> None:
    model, usual, expected = followed
    source_of = {target: None if place < 0 or place >= target else place for target, place in enumerate(places)}
    predictors = reading(usual, source_of)
    with offloaded(model, predictors, policy="prefetch", slots=slots, candidates=candidates, device="cpu"):
        assert torch.equal(greedy(model, prompt(1, 5), 4), expected)


@pytest.mark.parametrize("gating", list(Gating))
def test_speculative_tokens_do_not_depend_on_slots(build_moe: Callable[..., PreTrainedModel], gating: Gating) -> None:
    """Not those of `resident` either, where every expert is a candidate."""
    model = build_moe("qwen3_moe")
    predictors = reading(with_default_vectors(model), OWN_INPUT)
    candidates = 8 if gating is Gating.RESIDENT else None
    for arguments in ({"predictors": predictors}, {"horizon": 2}):
        tokens = []
        for slots in (2, 5, 32):
            with offloaded(
                model,
                policy="speculative",
                gating=gating,
                slots=slots,
                candidates=candidates,
                device="cpu",
                **arguments,
            ):
                tokens.append(greedy(model, prompt(1, 5)))
        assert all(torch.equal(tokens[0], other) for other in tokens[1:])


@pytest.mark.parametrize("horizon", [1, 2])
def test_every_layer_is_announced_once_and_the_nearer_first(
    build_moe: Callable[..., PreTrainedModel], horizon: int
) -> None:
    model = build_moe("qwen3_moe")
    layers = find_moe_layers(model)
    announced: list[int] = []
    passed: list[tuple[int, list[int]]] = []
    handles = [
        layer.experts.register_forward_pre_hook(lambda *_, n=layer.index: passed.append((n, list(announced))))
        for layer in layers
    ]

    class Seeing(Ahead):
        def announce(self, layer: int, candidates: torch.Tensor, *_: Any) -> None:  # noqa: ARG002
            announced.append(layers[layer].index)

    speculators = make_speculators(model, None, layers, sources(layers, horizon))
    control = RoutingControl(
        targets_of(layers, horizon=horizon), speculators, Policy.PREFETCH, Gating.TRUE, engine=Seeing()
    )
    with torch.no_grad():
        model(prompt(1, 3))
    control.detach()
    for handle in handles:
        handle.remove()
    assert announced == [0, 1, 2, 3]
    for index, before in passed:  # when a layer's experts run, the guesses as far as the horizon are known
        assert before == list(range(min(index + horizon, 3) + 1))


def test_a_horizon_that_the_predictors_were_not_trained_for(tiny_moe: PreTrainedModel) -> None:
    layers = find_moe_layers(tiny_moe)
    nearest = with_default_vectors(tiny_moe)
    farther = reading(nearest, sources(layers, 2))
    for predictors, horizon in ((nearest, 2), (farther, 1), (reading(nearest, OWN_INPUT), 1)):
        with (
            pytest.raises(OffloadError, match="trained to read other layers"),
            offloaded(tiny_moe, predictors, horizon=horizon),
        ):
            pass
    with pytest.raises(SettingsError, match="guess 1 or 2 layers ahead"), offloaded(tiny_moe, horizon=3):
        pass
    for source in (3, 7):
        wrong = reading(nearest, {2: source})
        with pytest.raises(OffloadError, match="no mixture-of-experts layer before"), offloaded(tiny_moe, wrong):
            pass
    for predictors, horizon in itertools.product((farther,), (None, 2)):
        with offloaded(tiny_moe, predictors, horizon=horizon, slots=4) as offload:
            assert offload.policy is Policy.PREFETCH
