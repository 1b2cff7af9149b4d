"""The engine of the device. Where there is none, its kernels run in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import build_model
from predict_train.data_collection.catalog import moe_types
from predict_train.predictors.checkpoint import TargetLayer
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.generation import CACHE
from predict_train.predictors.mlp import ResidualMLP
from predict_train.runtime import engines
from predict_train.runtime.device import slots
from predict_train.runtime.device.slots import DeviceSlots
from predict_train.runtime.offload import offloaded
from test_exactness import supported_model
from test_policy import with_default_vectors
from transformers import Cache, PreTrainedModel, StaticCache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def deciding(by_device: bool) -> Iterator[None]:
    """Has the device decide, on a CPU too, or the host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "hindrance_of", lambda *_: None if by_device else "the test wants the host")
        if DEVICE == "cpu":  # each program takes the interpreter some time, also one that has nothing to copy
            patch.setattr(slots, "PROGRAMS", (2,))
        yield


def decode(model: PreTrainedModel, ids: torch.Tensor, prompt: int, step: int = 1) -> torch.Tensor:
    """The logits of a prompt and of the tokens after it, `step` at a time."""
    cache, found = None, []
    ends = [prompt, *range(prompt + step, ids.shape[1] + 1, step)]
    with torch.no_grad():
        for begin, end in zip([0, *ends], ends, strict=False):
            output = model(ids[:, begin:end].to(model.device), **{CACHE: cache}, use_cache=True)
            cache = output[CACHE]
            found.append(output.logits.cpu())
    return torch.cat(found, 1)


IDS = torch.randint(1, 256, (1, 25), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("type", "policy"),
    [("qwen3_moe", "on_demand"), ("gpt_oss", "prefetch"), ("qwen3_moe", "speculative"), ("gpt_oss", "speculative")],
)
def test_it_computes_what_the_host_computes(build_moe: Callable[..., PreTrainedModel], type: str, policy: str) -> None:
    model = build_moe(type, num_hidden_layers=3)
    found = []
    ways = {"policy": policy, "eviction": "least_stale" if policy == "on_demand" else "frequency"}
    for by_device in (True, False):
        with deciding(by_device), offloaded(model, **ways, slots=12, device=DEVICE) as offload:
            assert isinstance(offload._engine, DeviceSlots) == by_device
            found.append(decode(model, IDS[:, :5], 3))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def logits_of(model: PreTrainedModel, cache: Cache | None, batch: int = 1, tokens: int = 12) -> torch.Tensor:
    """The logits of a prompt, and of some tokens after it."""
    ids = torch.randint(1, 256, (batch, 20 + tokens), generator=torch.Generator().manual_seed(batch)).to(model.device)
    found = []
    with torch.no_grad():
        for begin, end in pairwise([0, *range(20, 20 + tokens)]):
            output = model(ids[:, begin:end], **{CACHE: cache}, use_cache=True)
            cache = output[CACHE]
            found.append(output.logits[:, -1].clone())
    return torch.stack(found)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("model_type", moe_types())
def test_captured_steps_equal_all_resident(model_type: str, batch: int) -> None:
    """Captured and eager, on demand and prefetched: bit for bit the logits of all experts resident, in bf16."""
    model = supported_model(model_type)
    layers = find_moe_layers(model)
    most, few = len(layers) * layers[0].num_experts, len(layers) * layers[0].top_k * 2
    captured, reasons = 0, []

    def static() -> Cache:
        return StaticCache(config=model.config, max_cache_len=64)

    plain = logits_of(model.to("cuda"), None, batch)  # in float32: in bf16 rounding changes what random routers choose
    model.to("cpu")
    with offloaded(model, policy="on_demand", slots=most, device="cuda"):
        torch.testing.assert_close(
            logits_of(model, None, batch), plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max())
        )
    model.bfloat16()
    with offloaded(model, policy="on_demand", slots=most, device="cuda") as offload:
        assert offload.why_host is None
        dynamic = logits_of(model, None, batch)
        offload._graphs, graphs = None, offload._graphs
        expected = logits_of(model, static(), batch) if model._can_compile_fullgraph else None
        offload._graphs = graphs
    for policy, eviction in (("on_demand", "least_stale"), ("on_demand", "frequency"), ("prefetch", "frequency")):
        with offloaded(model, policy=policy, eviction=eviction, slots=few, device="cuda") as offload:
            assert torch.equal(logits_of(model, None, batch), dynamic), policy
            if expected is not None:
                found = logits_of(model, static(), batch)
                reasons.append(offload.why_not_captured)
                captured += offload.why_not_captured is None
                assert torch.equal(found, expected), (policy, reasons)
    print("captured", model_type, captured, reasons)


@pytest.mark.gpu
@pytest.mark.parametrize("gating", ["speculated", "true", "resident"])
@pytest.mark.parametrize("horizon", [1, 2])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_captured_speculation_is_eager_speculation(architecture: str, gating: str, horizon: int) -> None:
    """With predictors of random weights for one layer ahead, and training-free for two."""
    model = build_model(architecture).bfloat16()
    layers, predictors, found = find_moe_layers(model), None, []
    if horizon == 1:
        mlps = [ResidualMLP(layer.hidden_size, layer.num_experts, 8).bfloat16() for layer in layers]
        predictors = with_default_vectors(model)
        predictors = replace(
            predictors, layers=[TargetLayer(layer.index, mlp=mlp) for layer, mlp in zip(layers, mlps, strict=True)]
        )
    for is_captured in (True, False):
        config = {"policy": "speculative", "gating": gating, "slots": 16, "device": "cuda", "horizon": horizon}
        with offloaded(model, predictors, **config) as offload:
            if not is_captured:
                offload._graphs = None
            found.append((logits_of(model, StaticCache(config=model.config, max_cache_len=64)), offload.counters))
            slides = architecture == "gpt_oss"  # its cache counts in Python
            assert (offload.why_not_captured is not None) == (is_captured and slides), offload.why_not_captured
    (ours, mine), (theirs, others) = found
    assert torch.equal(ours, theirs)
    assert mine == others


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["on_demand", "prefetch", "auto"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}])
def test_generate_replays_steps_and_gives_the_resident_models_tokens(policy: str, how: dict[str, Any]) -> None:
    model = build_model("qwen3_moe")
    ids = torch.randint(1, 256, (2, 24), generator=torch.Generator().manual_seed(3)).to("cuda")
    asked = {
        "max_new_tokens": 50,
        "do_sample": False,
        "eos_token_id": None,
        "attention_mask": torch.ones_like(ids),
    } | how
    torch.manual_seed(0)
    expected = model.to("cuda").generate(ids, **asked).cpu()
    model.to("cpu")
    with offloaded(model, policy=policy, slots=16, device="cuda") as offload:
        torch.manual_seed(0)
        found = model.generate(ids, **asked).cpu()
        assert offload.why_not_captured is None or "num_beams" in how, offload.why_not_captured
    assert torch.equal(found, expected)
    assert "generate" not in vars(model)


@pytest.mark.gpu
def test_other_weights_are_used_after_a_replay() -> None:
    model = build_model("qwen3_moe")
    ids = torch.randint(1, 256, (1, 24), generator=torch.Generator().manual_seed(3)).to("cuda")
    asked = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    other = build_model("qwen3_moe", vocab_size=257).lm_head.weight.data.flip(0).to("cuda")
    with offloaded(model, policy="prefetch", slots=16, device="cuda") as offload:
        first = model.generate(ids, **asked)
        assert offload.why_not_captured is None
        own, model.lm_head.weight.data = model.lm_head.weight.data, other
        found = model.generate(ids, **asked).cpu()
        model.lm_head.weight.data = own
        assert torch.equal(model.generate(ids, **asked), first)
    model.to("cuda").lm_head.weight.data = other
    assert torch.equal(found, model.generate(ids, **asked).cpu())
    assert not torch.equal(found, first.cpu())
