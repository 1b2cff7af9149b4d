from __future__ import annotations

import inspect

import pytest
import torch
from predict_train.predictors.architecture import UnsupportedModelError
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.experts import expert_outputs, expert_parameters, group_by_expert, run_experts
from torch import nn
from transformers.integrations.moe import batched_mm_experts_forward, use_experts_implementation

TOKENS = 33


def routed_batch(layer, dtype=torch.float32):
    x = torch.randn(TOKENS, layer.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        _, weights, ids = layer.router(x)
    return x, ids, weights


@pytest.mark.parametrize("implementation", ["batched_mm", "eager"])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_agrees_with_transformers(build_moe, architecture, implementation):
    model = build_moe(architecture)
    model.set_experts_implementation(implementation)
    layer = find_moe_layers(model)[-1]
    x, ids, weights = routed_batch(layer)
    with torch.no_grad():
        expected = layer.experts(x, ids, weights)
        actual = run_experts(layer.experts, x, ids, weights)
    assert expected.std() > 0.05
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_stays_bfloat16_and_close(build_moe):
    # Mixtral's router gives fp32 weights whatever the model's dtype; the product is then taken in fp32.
    model = build_moe("mixtral").to(torch.bfloat16)
    layer = find_moe_layers(model)[0]
    x, ids, weights = routed_batch(layer, torch.bfloat16)
    assert weights.dtype == torch.float32
    with torch.no_grad():
        actual = run_experts(layer.experts, x, ids, weights)
        expected = batched_mm_experts_forward(layer.experts, x, ids, weights)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("has_bias", "is_transposed"), [(False, False), (True, False), (False, True), (True, True)])
def test_ungated_experts_with_a_norm(build_moe, has_bias, is_transposed):
    # A release of transformers that doesn't have the mark doesn't apply such a norm either.
    is_known = "has_post_expert_norm" in inspect.signature(use_experts_implementation).parameters
    marks = {"has_post_expert_norm": True} if is_known else {}

    @use_experts_implementation(has_gate=False, has_bias=has_bias, is_transposed=is_transposed, **marks)
    class Ungated(nn.Module):
        def __init__(self, _config):
            super().__init__()
            up, down = (5, 8, 12), (5, 12, 8)
            if not is_transposed:
                up, down = down, up
            self.num_experts = 5
            self.up_proj = nn.Parameter(torch.randn(up))
            self.down_proj = nn.Parameter(torch.randn(down))
            if has_bias:
                self.up_proj_bias = nn.Parameter(torch.randn(5, 12))
                self.down_proj_bias = nn.Parameter(torch.randn(5, 8))
            self.act_fn = nn.SiLU()
            self.post_expert_norm = nn.RMSNorm(8)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise NotImplementedError

    torch.manual_seed(0)
    experts = Ungated(build_moe("qwen3_moe").config)
    x, weights = torch.randn(TOKENS, 8), torch.rand(TOKENS, 2)
    ids = torch.rand(TOKENS, 5).topk(2).indices
    with torch.no_grad():
        expected = batched_mm_experts_forward(experts, x, ids, weights)
        torch.testing.assert_close(run_experts(experts, x, ids, weights), expected, rtol=1e-5, atol=1e-5)


def test_on_outputs_sees_each_experts_own_output(tiny_moe):
    layer = find_moe_layers(tiny_moe)[0]
    x, ids, weights = routed_batch(layer)
    seen = {}

    def keep(groups, outputs):
        pairs, rows = groups.order.split(groups.sizes), outputs.split(groups.sizes)
        seen.update(zip(groups.experts, zip(pairs, rows, strict=True), strict=True))

    with torch.no_grad():
        run_experts(layer.experts, x, ids, weights, on_outputs=keep)
        assert sorted(seen) == sorted(set(ids.flatten().tolist()))
        for expert, (pairs, output) in seen.items():
            slices = {name: getattr(layer.experts, name)[expert] for name in expert_parameters(layer.experts)}
            assert (ids.flatten()[pairs] == expert).all()
            assert torch.equal(output, expert_outputs(layer.experts, [slices], [x[pairs // ids.shape[-1]]]))


def test_groups_are_a_partition_of_the_pairs():
    ids = torch.tensor([[3, 0], [0, 5], [5, 3]])
    groups = group_by_expert(ids, num_experts=7)
    assert (groups.experts, groups.sizes) == ([0, 3, 5], [2, 2, 2])
    assert [set(pairs.tolist()) for pairs in groups.order.split(groups.sizes)] == [{1, 2}, {0, 5}, {3, 4}]


def test_one_token_and_no_token(tiny_moe):
    layer = find_moe_layers(tiny_moe)[0]
    x, ids, weights = routed_batch(layer)
    with torch.no_grad():
        torch.testing.assert_close(
            run_experts(layer.experts, x[:1], ids[:1], weights[:1]), layer.experts(x[:1], ids[:1], weights[:1])
        )
        assert run_experts(layer.experts, x[:0], ids[:0], weights[:0]).shape == (0, layer.hidden_size)


def test_experts_that_do_not_say_their_layout_are_refused(tiny_moe):
    with pytest.raises(UnsupportedModelError, match="does not say how its weights lie"):
        expert_parameters(nn.Linear(2, 2))
    experts = find_moe_layers(tiny_moe)[0].experts
    experts.gate_up_proj_scale = nn.Parameter(torch.ones(8, 1, 1))
    with pytest.raises(UnsupportedModelError, match="gate_up_proj_scale"):
        expert_parameters(experts)
