"""Restricting a router's choice, and speculating one layer ahead on the running model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from predict_train.data_collection.hooks import Recorder
from predict_train.predictors.architecture import moe_shape, sources
from predict_train.predictors.checkpoint import Predictors, TargetLayer, make_speculators
from predict_train.predictors.direct import DirectMLP
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.generation import CACHE
from predict_train.predictors.speculation import candidates
from predict_train.runtime import Gating, Policy, offload_experts
from predict_train.runtime.control import RoutingControl
from predict_train.runtime.engine import Ahead
from predict_train.runtime.restricted import RestrictedChoice
from predict_train.runtime.restricted import allowed as among
from predict_train.runtime.targets import targets_of
from transformers import PreTrainedModel

SUPPORTED = ["qwen3_moe", "mixtral", "olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss"]


@pytest.fixture(scope="module", params=SUPPORTED)
def model(request: pytest.FixtureRequest, build_moe: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return build_moe(request.param)


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_restricted_router_chooses_among_the_allowed(model: PreTrainedModel, data: st.DataObject) -> None:
    layer = find_moe_layers(model)[-1]
    tokens = data.draw(st.integers(1, 5))
    x = torch.randn(tokens, layer.hidden_size, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    allowed = torch.zeros(tokens, layer.num_experts, dtype=torch.bool)
    for row in allowed:
        row[sorted(data.draw(st.sets(st.integers(0, 7), min_size=2)))] = True
    free_logits, free_weights, free_ids = layer.router(x)
    choose = among(~allowed, layer.top_k)
    with RestrictedChoice((tokens, layer.num_experts), layer.top_k, choose) as choice:
        logits, weights, ids = layer.router(x)
    assert allowed.gather(1, ids).all()
    assert torch.equal(logits, free_logits)
    assert choice.free_ids is not None
    assert torch.equal(choice.free_ids, free_ids)
    for row in range(tokens):  # where the free choice was allowed, nothing changes
        if allowed[row, free_ids[row]].all():
            assert set(ids[row].tolist()) == set(free_ids[row].tolist())
            torch.testing.assert_close(weights[row].sort().values, free_weights[row].sort().values)


def test_restricted_weights_are_normalised_as_the_router_does(build_moe: Callable[..., PreTrainedModel]) -> None:
    layer = find_moe_layers(build_moe("qwen3_moe", norm_topk_prob=True))[0]
    x = torch.randn(6, layer.hidden_size)
    allowed = torch.zeros(6, layer.num_experts, dtype=torch.bool)
    allowed[:, [1, 4]] = True
    choose = among(~allowed, layer.top_k)
    with RestrictedChoice((6, layer.num_experts), layer.top_k, choose):
        logits, weights, ids = layer.router(x)
    torch.testing.assert_close(weights, logits.gather(1, ids).softmax(-1))


def with_default_vectors(model: PreTrainedModel) -> Predictors:
    """Training-free predictors whose default vectors are random, so that they matter."""
    layers = find_moe_layers(model)
    generator = torch.Generator().manual_seed(1)
    vectors = {
        layer.index: torch.randn(layer.num_experts, layer.hidden_size, generator=generator) for layer in layers[:-1]
    }
    return Predictors(model={"name": "tiny"} | moe_shape(model.config, layers), default_vectors=vectors)


def direct(model: PreTrainedModel) -> Predictors:
    """Direct predictors of random weights, which remember a token."""
    layers, found = find_moe_layers(model), []
    torch.manual_seed(7)
    for layer in layers:
        mlp = DirectMLP(layer.hidden_size, layer.num_experts, 8, memory=1)
        for parameter in mlp.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        found.append(TargetLayer(layer.index, mlp=mlp))
    return Predictors({"name": "tiny"} | moe_shape(model.config, layers), found)


def test_speculation_on_the_running_model_is_that_of_the_recording(model: PreTrainedModel) -> None:
    """The runtime's hooks and the recorder's see the same residuals (shared experts included) and routing."""
    ids = torch.randint(1, 256, (2, 11), generator=torch.Generator().manual_seed(3))
    layers = find_moe_layers(model)
    speculators = make_speculators(model, with_default_vectors(model), layers)
    with torch.no_grad(), Recorder(layers, [layer.index for layer in layers]) as recorder:
        expected_logits = model(ids).logits
        records = recorder.take()
    seen: dict[int, torch.Tensor] = {}

    class Seeing(Ahead):
        def announce(self, layer: int, candidates: torch.Tensor, *_: Any) -> None:
            seen[layers[layer].index] = candidates

    control = RoutingControl(targets_of(layers), speculators, Policy.PREFETCH, Gating.TRUE, engine=Seeing())
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected_logits, rtol=1e-4, atol=1e-4)
    rates = control.hit_rates()
    control.detach()
    assert seen.keys() == rates.keys() == {layer.index for layer in layers}
    for target, source in sources(layers).items():
        record = records[target if source is None else source]
        residual = record.input if source is None else record.residual
        speculation = speculators[target](residual, None if source is None else record.routing)
        chosen = candidates(speculation, 2)
        assert torch.equal(seen[target], chosen)
        true = records[target].routing.ids
        hits = (true.unsqueeze(-1) == chosen.unsqueeze(-2)).any(-1)
        assert rates[target] == pytest.approx(hits.float().mean().item())


@pytest.mark.parametrize("gating", ["speculated", "true"])
def test_decoding_through_the_runtime_is_speculation_token_by_token(model: PreTrainedModel, gating: str) -> None:
    """One forward pass with every token but a prompt of one speculated, and the same tokens decoded over few slots."""
    ids = torch.randint(1, 256, (1, 12), generator=torch.Generator().manual_seed(4))
    predictors = with_default_vectors(model)
    layers = find_moe_layers(model)
    speculators = make_speculators(model, predictors, layers)
    with torch.no_grad():
        exact = model(ids).logits[:, 1:]
        cache = model(ids[:, :1], use_cache=True)[CACHE]
        control = RoutingControl(targets_of(layers), speculators, Policy.SPECULATIVE, Gating(gating))
        expected = model(ids[:, 1:], **{CACHE: cache}).logits
        control.detach()
    offload_experts(model, predictors, policy="speculative", gating=gating, slots=3)
    try:
        with torch.no_grad():
            cache = model(ids[:, :1], use_cache=True)[CACHE]
            steps = [model(token, **{CACHE: cache}).logits for token in ids[:, 1:].split(1, dim=1)]
    finally:
        model.expert_offload.detach()
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(exact, expected, rtol=1e-3, atol=1e-3), "the speculation was wrong somewhere"


def test_hooks_of_others_see_the_model_only(tiny_moe: PreTrainedModel) -> None:
    ids = torch.randint(1, 256, (1, 6))
    expected = tiny_moe(ids, output_router_logits=True).router_logits
    offload_experts(tiny_moe, policy="prefetch", slots=8)
    seen = tiny_moe(ids, output_router_logits=True).router_logits
    assert len(seen) == len(expected)
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
