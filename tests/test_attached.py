"""Other hands in an offloaded model: adapters, hooks, libraries, contexts and threads. What they do is done, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from conftest import build_model
from predict_train.predictors.errors import UserError
from predict_train.runtime import (
    OffloadError,
    load_experts,
    load_offloaded,
    offload_experts,
    offloaded,
)
from test_guard import CPU, IDS, REFUSED, experts_of, logits
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel


class Delta(nn.Module):
    """A low-rank change of a stacked weight, as peft's proxy for the parameters of experts."""

    def __init__(self, weight: torch.Tensor, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(*weight.shape[:-2], n, 2, generator=generator) for n in weight.shape[-2:])
        self.delta = 0.1 * a @ b.mT

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.delta


class ParamWrapper(nn.Module):
    """What peft puts in the place of an experts module: it changes the parameter while the module computes."""

    def __init__(self, base_layer: nn.Module, name: str = "gate_up_proj"):
        super().__init__()
        self.base_layer, self.name, self.is_on = base_layer, name, True
        self.delta = Delta(getattr(base_layer, name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_on:
            return self.base_layer(*args, **kwargs)
        parametrize.register_parametrization(self.base_layer, self.name, self.delta)
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            parametrize.remove_parametrizations(self.base_layer, self.name, leave_parametrized=False)

    def merge(self) -> None:
        self.base_layer.get_parameter(self.name).data += self.delta.delta


class LowRank(nn.Module):
    """What peft puts in the place of a linear layer."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer, self.is_on = base_layer, True
        self.a, self.b = nn.Linear(base_layer.in_features, 2, False), nn.Linear(2, base_layer.out_features, False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.base_layer(x) + self.b(self.a(x)) if self.is_on else self.base_layer(x)


def test_an_adapter_on_experts_is_refused_while_they_are_offloaded(moe: PreTrainedModel) -> None:
    block: Any = moe.model.layers[1].mlp
    without = logits(moe)
    offload_experts(moe, slots=5, device="cpu")
    block.experts = adapter = ParamWrapper(block.experts)
    adapter.is_on = False
    assert torch.equal(logits(moe), without), "it is switched off"
    adapter.is_on = True
    with pytest.raises(OffloadError, match=f"the experts.* of MoE layer 1 have changed.*{REFUSED}"):
        logits(moe)
    moe.expert_offload.detach()
    with_it = logits(moe)
    assert not torch.allclose(with_it, without, atol=1e-3)
    with pytest.raises(UserError, match="ParamWrapper is put around the experts"):
        offload_experts(moe, device="cpu")
    block.experts = adapter.base_layer
    offload_experts(moe, slots=5, device="cpu")
    assert torch.equal(logits(moe), without)
    adapter.merge()
    with pytest.raises(OffloadError, match="have changed"):
        logits(moe)
    moe.expert_offload.detach()
    with offloaded(moe, slots=5, device="cpu"):
        torch.testing.assert_close(logits(moe), with_it)


def test_experts_that_are_parametrized_are_refused(moe: PreTrainedModel) -> None:
    experts, before = experts_of(moe), logits(moe)
    offload_experts(moe, slots=5, device="cpu")
    parametrize.register_parametrization(experts, "down_proj", Delta(experts.down_proj))
    with pytest.raises(OffloadError, match="have changed"):
        logits(moe)
    moe.expert_offload.detach()
    expected = logits(moe)
    with pytest.raises(UserError, match="down_proj"):
        offload_experts(moe, device="cpu")
    assert torch.equal(logits(moe), expected)
    parametrize.remove_parametrizations(experts, "down_proj", leave_parametrized=False)
    with offloaded(moe, slots=5, device="cpu"):
        assert torch.equal(logits(moe), before)


def test_an_adapter_beside_the_experts_works(moe: PreTrainedModel) -> None:
    """Put on before or meanwhile, switched on and off."""
    attention: Any = moe.model.layers[1].self_attn
    without = logits(moe)
    offload_experts(moe, slots=5, device="cpu")
    attention.q_proj = adapter = LowRank(attention.q_proj)
    found = logits(moe)
    adapter.is_on = False
    assert torch.equal(logits(moe), without)
    adapter.is_on = True
    moe.expert_offload.detach()
    assert torch.equal(logits(moe), found)
    assert not torch.equal(found, without)
    with offloaded(moe, slots=5, device="cpu"):
        assert torch.equal(logits(moe), found)


def test_hooks_on_experts_are_called(moe: PreTrainedModel) -> None:
    def halved(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args[0] / 2, *args[1:]

    for attached_first in (True, False):
        twin = copy.deepcopy(moe)
        if attached_first:
            offload_experts(moe, slots=5, device="cpu")
        handles = []
        for model in (moe, twin):
            handles += [experts_of(model).register_forward_hook(lambda _, __, output: 3 * output)]
            handles += [experts_of(model).register_forward_pre_hook(halved)]
        if not attached_first:
            offload_experts(moe, slots=5, device="cpu")
        assert torch.equal(logits(moe), logits(twin))
        for handle in handles:
            handle.remove()
        moe.expert_offload.detach()


class Tripled(ModelHook):
    def post_forward(self, _: nn.Module, output: torch.Tensor) -> torch.Tensor:
        return 3 * output


def wrapped_by_hand(experts: nn.Module) -> None:
    original = experts.forward
    experts.forward = lambda *args, **kwargs: 3 * original(*args, **kwargs)


@pytest.mark.parametrize("wrap", [lambda experts: add_hook_to_module(experts, Tripled()), wrapped_by_hand])
def test_a_wrapped_forward_is_called_or_refused(wrap: Callable[[nn.Module], Any], moe: PreTrainedModel) -> None:
    twin = copy.deepcopy(moe)
    wrap(experts_of(twin))
    expected = logits(twin)
    with pytest.raises(OffloadError, match=r"forward of model\.layers\.1\.mlp\.experts is replaced.*; remove what"):
        offload_experts(twin, device="cpu")
    assert torch.equal(logits(twin), expected)
    offload_experts(moe, slots=5, device="cpu")
    wrap(experts_of(moe))
    assert torch.equal(logits(moe), expected), "it wraps what the runtime put there"
    moe.expert_offload.detach()
    assert torch.equal(logits(moe), expected), "the wrapper is not the runtime's to remove"


def test_accelerate_removes_its_hooks_after_detaching(moe: PreTrainedModel) -> None:
    expected = logits(moe)
    offload_experts(moe, slots=5, device="cpu")
    add_hook_to_module(experts_of(moe), Tripled())
    moe.expert_offload.detach()
    remove_hook_from_module(moe, recurse=True)
    assert torch.equal(logits(moe), expected)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_prepares_the_model(precision: str, moe: PreTrainedModel) -> None:
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    context = torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
    plain = logits(moe)
    with offloaded(moe, slots=5, device="cpu"):
        with context:
            expected = logits(moe).float()
        prepared = accelerator.prepare(moe)
        assert torch.equal(logits(prepared), expected)
        unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert unwrapped is moe
        assert torch.equal(logits(moe), plain)
    assert torch.equal(logits(moe), plain)
    AcceleratorState._reset_state(True)


def test_accelerates_own_offload_and_ours_do_not_mix(moe: PreTrainedModel) -> None:
    twin, expected = copy.deepcopy(moe), logits(moe)
    cpu_offload(twin, execution_device=CPU)
    with pytest.raises(OffloadError, match="is not in memory, as with accelerate's hooks; load the model without"):
        offload_experts(twin, device="cpu")
    offload_experts(moe, slots=5, device="cpu")
    cpu_offload(moe, execution_device=CPU)
    with pytest.raises(OffloadError, match="have changed"):
        logits(moe)
    moe.expert_offload.detach()
    assert torch.equal(logits(moe), expected)


def test_a_shared_expert_that_is_wrapped_computes_what_it_is_given() -> None:
    """Its output is kept for the second who asks only where both ask for the same. Here the first is the guess."""
    model = build_model("deepseek_v3", num_hidden_layers=3)

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> Any:
            return self.inner(2 * x)

    block: Any = model.model.layers[1].mlp
    with offloaded(model, slots=5, device="cpu"):
        block.shared_experts = Doubled(block.shared_experts)
        found = logits(model)
        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(model.forward, fullgraph=True, backend="eager")(IDS).logits
    assert torch.equal(found, logits(model))
    assert torch.equal(compiled, found[:, : IDS.shape[1]])


# -- what can't be set or moved ----------------------------------------------------------------------------------


def test_attributes_can_not_be_set(moe: PreTrainedModel) -> None:
    offload: Any = offload_experts(moe, slots=5, device="cpu").expert_offload
    for name in ("policy", "gating", "slots", "device", "config", "store", "counters", "captures", "polcy"):
        with pytest.raises(OffloadError, match=f"{name} can't be set on offloaded experts; detach the model"):
            setattr(offload, name, "on_demand")
    assert (offload.policy, offload.slots, offload.gating, str(offload.device)) == ("prefetch", 5, "true", "cpu")


MOVES: dict[str, Callable[[Any], Any]] = {
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "bfloat16": lambda module: module.bfloat16(),
    "to a dtype": lambda module: module.to(torch.float16),
    "to a device": lambda module: module.to("meta"),
    "type": lambda module: module.type(torch.float64),
    "to_empty": lambda module: module.to_empty(device="cpu"),
    "share_memory": lambda module: module.share_memory(),
}


@pytest.mark.parametrize("move", MOVES)
def test_nothing_is_moved_or_converted(move: str, moe: PreTrainedModel) -> None:
    expected = logits(moe)
    offload_experts(moe, slots=5, device="cpu")
    for part in (moe, moe.model, moe.model.layers[1], experts_of(moe)):
        for _ in range(2):
            with pytest.raises(OffloadError, match=f"can't be moved or converted while.*{REFUSED}"):
                MOVES[move](part)
    assert torch.equal(logits(moe), expected), "no part of it has been"
    moe.to("cpu").float().cpu().type(torch.float32)
    assert torch.equal(logits(moe), expected)
    moe.expert_offload.detach()
    if move not in ("share_memory", "to a device", "to_empty"):
        MOVES[move](moe)
        assert next(moe.parameters()).dtype != torch.float32


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"predictors": 5}, "predictors are 5; give"),
    ({"config": {"policy": "prefetch"}}, "config is .*; give the settings by name, or as one OffloadConfig"),
    ({"config": 5}, "config is 5"),
    ({"store": 5}, "type int is no store; give a packed file"),
    ({"slots": 2.5}, "slots: "),
    ({"policy": None}, "policy: "),
    ({"device": 5}, "no kind of device called 5"),
    ({"polcy": "auto"}, "did you mean policy"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG)
def test_arguments_of_a_wrong_type_are_refused(arguments: dict[str, Any], words: str, moe: PreTrainedModel) -> None:
    with pytest.raises(UserError, match=words):
        offload_experts(moe, **({"device": "cpu"} | arguments))
    assert not hasattr(moe, "expert_offload")


@pytest.mark.parametrize("wrong", [None, 5, nn.Linear(2, 2), ["model"]])
def test_what_is_no_model_is_refused(wrong: Any) -> None:
    with pytest.raises(OffloadError, match="can't be offloaded; give a transformers model"):
        offload_experts(wrong)
    with pytest.raises(OffloadError, match="can't be loaded; give a folder"):
        load_offloaded(wrong, device="cpu")
    with pytest.raises(OffloadError, match="not loaded with a packed file"):
        load_experts(wrong)
    with pytest.raises(UserError, match="config is"):
        load_offloaded("somewhere", config=wrong or 5)


def test_only_observers_observe(moe: PreTrainedModel) -> None:
    offload_experts(moe, slots=5, device="cpu")
    with pytest.raises(OffloadError, match="type str can't observe"), moe.expert_offload.observed("all"):
        pass
    with pytest.raises(OffloadError, match="already; detach it first"):
        offload_experts(moe.model, device="cpu")
