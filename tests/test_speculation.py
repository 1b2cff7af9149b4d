from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.metrics import HitRate
from predict_train.predictors.mlp import ResidualMLP
from predict_train.predictors.routing import Routing
from predict_train.predictors.speculation import Router, Speculator, Wiring, candidates, mixture_of
from torch import nn


def routing_of(logits: torch.Tensor, top_k: int) -> Routing:
    values, ids = logits.topk(top_k, dim=-1)
    return Routing(logits, values.softmax(-1), ids)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_predictor_with_a_zero_output_layer_is_training_free_speculation(build_moe, architecture):
    source, target = find_moe_layers(build_moe(architecture))[:2]
    residual, vectors = torch.randn(40, 32), torch.randn(8, 32)
    mlp = ResidualMLP(32, 8, 16)
    torch.nn.init.normal_(mlp.b1)
    with torch.no_grad():
        routing = Routing(*source.router(torch.randn(40, 32)))
        wiring = Wiring.of(target, source, vectors)
        free = Speculator(wiring)(residual, routing)
        predicted = Speculator(wiring, mlp)(residual, routing)
        other = Speculator(Wiring.of(target, source, None))(residual, routing)
    assert all(torch.equal(a, b) for a, b in zip(free, predicted, strict=True))
    assert not torch.equal(free.logits, other.logits)  # so the default vectors did count


def test_a_predictor_changes_the_speculation(tiny_moe):
    layer = find_moe_layers(tiny_moe)[1]
    mlp = ResidualMLP(32, 8, 16)
    torch.nn.init.normal_(mlp.w2)
    residual = torch.randn(40, 32)
    with torch.no_grad():
        wiring = Wiring.of(layer, None, None)
        free, predicted = Speculator(wiring)(residual, None), Speculator(wiring, mlp)(residual, None)
    assert not torch.equal(free.ids, predicted.ids)


@given(st.integers(1, 20), st.integers(2, 8), st.integers(1, 2), st.sampled_from([torch.float32, torch.bfloat16]))
def test_quasi_residual_adds_the_weighted_rows(tokens, experts, top_k, dtype):
    residual, vectors = torch.randn(tokens, 6).to(dtype), torch.randn(experts, 6)
    source = routing_of(torch.randn(tokens, experts), top_k)
    expected = residual.float() + (vectors[source.ids] * source.weights.unsqueeze(-1)).sum(1)
    got = Wiring(nn.Identity(), Router(nn.Identity()), vectors).quasi_residual(residual, source)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


@given(tokens=st.integers(1, 10), experts=st.integers(1, 9), data=st.data())
def test_candidates_are_the_routers_choice_and_then_the_best_of_the_rest(tokens, experts, data):
    top_k = data.draw(st.integers(1, experts))
    m = data.draw(st.integers(1, experts))
    logits = torch.rand(tokens, experts)
    # A choice that is not that of the logits, as with score-correction biases.
    ids = torch.rand(tokens, experts).topk(top_k).indices
    found = candidates(Routing(logits, torch.ones(tokens, top_k), ids), m)
    assert found.shape == (tokens, m)
    assert torch.equal(found[:, :top_k], ids[:, :m])
    for row, chosen in zip(found.tolist(), ids.tolist(), strict=True):
        assert len(set(row)) == m
        rest = [logits[found.tolist().index(row), e].item() for e in row[top_k:]]
        assert rest == sorted(rest, reverse=True)
        assert set(row) <= set(range(experts))
        assert set(chosen[:m]) <= set(row)


@given(tokens=st.integers(1, 12), seed=st.integers(0, 1000))
def test_hit_rate_is_that_of_counting_sets(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    found, true = (torch.rand(2, tokens, 7, generator=generator).topk(m).indices for m in (4, 3))
    rate, exact = HitRate(2), HitRate(2, exact=True)
    for half in (slice(0, tokens // 2), slice(tokens // 2, None)):
        rate.update(found[:, half], true[:, half])
        exact.update(found[:, half], true[:, half])
    for layer in range(2):
        hits = [len(set(f) & set(t)) for f, t in zip(found[layer].tolist(), true[layer].tolist(), strict=True)]
        assert rate.compute()[layer].item() == pytest.approx(sum(hits) / (3 * tokens))
        assert exact.compute()[layer].item() == pytest.approx(hits.count(3) / tokens)


@given(st.integers(1, 6), st.integers(2, 8))
def test_the_mixture_holds_each_weight_at_its_experts_place(tokens, experts):
    source = routing_of(torch.randn(tokens, experts), 2)
    mixture = mixture_of(source, experts, torch.float32)
    torch.testing.assert_close(mixture.gather(1, source.ids), 2 * source.weights)
    torch.testing.assert_close(mixture.sum(-1), torch.full((tokens,), 2.0))
    assert ((mixture != 0).sum(-1) <= 2).all()
