"""What nobody expects of a user: parts called by themselves, classes that are patched, dtypes that are mixed, files written to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.errors import UserError
from predict_train.runtime import load_experts, load_offloaded, offload_experts, offloaded
from predict_train.runtime.pack import pack
from test_exactness import supported_model
from test_guard import experts_of, logits
from test_offload import prompt
from torch import nn
from transformers import PreTrainedModel

POLICIES = ("on_demand", "prefetch")
SETTINGS: dict[str, Any] = {"slots": 5, "device": "cpu"}


def assert_same(model: PreTrainedModel, run: Callable[[PreTrainedModel], list[torch.Tensor]]) -> None:
    """The results of `run` are those of the plain model, under both exact policies, and after detaching."""
    expected = run(model)
    for policy in POLICIES:
        with offloaded(model, policy=policy, **SETTINGS):
            assert all(map(torch.equal, run(model), expected)), policy
        assert all(map(torch.equal, run(model), expected)), f"detached, after {policy}"


@torch.no_grad()
def in_parts(model: Any) -> list[torch.Tensor]:
    """Blocks, routers and layers in any order, and then all of it."""
    layers, found = model.model.layers, []
    states = [
        torch.randn(1, length, 32, generator=torch.Generator().manual_seed(length), device="cpu")
        for length in (4, 1, 4)
    ]
    for number in (0, 2, 1, 3, 3):
        found.append(layers[number].mlp(states[number % 3]))
        found += layers[number].mlp.gate(states[0].view(-1, 32))
    for layer in layers:  # as quantisers go
        states = [
            layer(x, position_embeddings=model.model.rotary_emb(x, torch.arange(x.shape[1])[None])) for x in states
        ]
    return [*found, *states, logits(model)]


def test_parts_may_be_called_by_themselves() -> None:
    assert_same(build_model("qwen3_moe"), in_parts)


def test_layers_may_be_left_out_repeated_and_reordered() -> None:
    model: Any = build_model("qwen3_moe")
    layers = model.model.layers

    @torch.no_grad()
    def reordered(_: PreTrainedModel) -> list[torch.Tensor]:
        found = []
        for numbers in ((0, 1, 1, 2, 3), (3, 2, 1, 0), (1, 2, 3), (0, 0, 1, 0, 1, 3)):
            model.model.layers = nn.ModuleList([layers[number] for number in numbers])
            found += [model(prompt(1, length), use_cache=False).logits for length in (5, 1, 1)]
        model.model.layers = layers
        return found

    assert_same(model, reordered)


def test_a_block_in_another_ones_place() -> None:
    model: Any = build_model("qwen3_moe")
    first, second = model.model.layers[1:3]

    def exchanged(_: PreTrainedModel) -> list[torch.Tensor]:
        own, gate = first.mlp, first.mlp.gate
        first.mlp = second.mlp
        found = [logits(model)]
        first.mlp, own.gate = own, second.mlp.gate
        found.append(logits(model))
        own.gate = gate
        return found

    assert_same(model, exchanged)


def test_guesses_draw_no_random_numbers() -> None:
    """The router of PhiMoE draws noise in training mode."""
    model = supported_model("phimoe").train()

    @torch.no_grad()
    def drawn(_: PreTrainedModel) -> list[torch.Tensor]:
        torch.manual_seed(3)
        return [model(prompt(1, 5)).logits, model(prompt(1, 1)).logits, torch.rand(2)]

    assert_same(model, drawn)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_in_another_dtype_than_the_rest(dtype: torch.dtype) -> None:
    for architecture in ("qwen3_moe", "mixtral"):
        model = build_model(architecture, num_hidden_layers=2)
        for layer in find_moe_layers(model):
            layer.experts.to(dtype)
        assert_same(model, lambda model: [logits(model)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_routers_that_are_not_finite(value: float, moe: PreTrainedModel) -> None:
    with torch.no_grad():
        moe.get_submodule("model.layers.1.mlp.gate").weight[2] = value
    assert_same(moe, lambda model: [logits(model).nan_to_num(7.0)])


def test_weights_lie_as_before_after_detaching(moe: PreTrainedModel) -> None:
    experts = experts_of(moe)
    experts.down_proj = nn.Parameter(experts.down_proj.detach().mT.contiguous().mT)
    strides, expected = experts.down_proj.stride(), logits(moe)
    with offloaded(moe, **SETTINGS):
        torch.testing.assert_close(logits(moe), expected)
    assert experts.down_proj.stride() == strides
    assert torch.equal(logits(moe), expected)


# -- forwards of classes -------------------------------------------------------------------------------------------


def twice(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any) -> Any:
        output = original(self, *args)
        return (output[0], 2 * output[1], output[2]) if isinstance(output, tuple) else 2 * output

    return forward


def test_experts_whose_class_computes_something_else_are_refused(
    moe: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A patched class, as libraries with faster kernels leave it, or a subclass."""
    experts, expected = experts_of(moe), logits(moe)
    plain = type(experts)
    experts.__class__ = type("Scaled", (plain,), {"forward": twice(plain.forward)})
    with pytest.raises(UserError, match="forward of Scaled is not the one that transformers gives it"):
        offload_experts(moe, **SETTINGS)
    experts.__class__ = plain
    monkeypatch.setattr(plain, "forward", twice(plain.forward))
    with pytest.raises(UserError, match="forward of Qwen3MoeExperts is not the one that transformers gives it"):
        offload_experts(moe, **SETTINGS)
    monkeypatch.undo()
    with offloaded(moe, **SETTINGS):
        assert torch.equal(logits(moe), expected)


@pytest.mark.parametrize("part", ["mlp.experts", "mlp.gate"])
def test_classes_that_are_patched_while_experts_are_offloaded_are_refused(
    part: str, moe: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, before = type(moe.get_submodule(f"model.layers.0.{part}")), logits(moe)
    for policy in POLICIES:
        offload_experts(moe, policy=policy, **SETTINGS)
        monkeypatch.setattr(kind, "forward", twice(kind.forward))
        if part == "mlp.experts" or policy == "prefetch":  # what is not replaced may change
            with pytest.raises(UserError, match=f"forward of {kind.__name__} was replaced .* detach the model first"):
                logits(moe)
        moe.expert_offload.detach()
        assert not torch.equal(logits(moe), before)
        monkeypatch.undo()
        assert torch.equal(logits(moe), before)


# -- weights beside those in a store -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and its packed file beside it."""
    folder = tmp_path_factory.mktemp("wide")
    build_model("qwen3_moe", num_hidden_layers=2).save_pretrained(folder / "model")
    pack(folder / "model", folder / "experts")
    return folder


def test_new_weights_beside_those_in_a_store_are_refused(wide: Path) -> None:
    """They would not be used, neither by `offload_experts` nor by `load_experts`."""
    for stored in ({"quantize": "int8"}, {"pack": wide / "experts"}):
        model = load_offloaded(wide / "model", dtype="float32", **SETTINGS, **stored)
        expected = logits(model)
        model.expert_offload.detach()
        absent = experts_of(model).down_proj
        experts_of(model).down_proj = nn.Parameter(torch.zeros(absent.shape))
        with pytest.raises(UserError, match="would not be used"):
            offload_experts(model, **SETTINGS)
        with pytest.raises(UserError, match="would not be used"):
            load_experts(model)
        experts_of(model).down_proj = absent
        offload_experts(model, **SETTINGS)
        assert torch.equal(logits(model), expected)


def test_a_packed_file_that_is_written_to_while_it_is_used_is_compared_again(wide: Path, tmp_path: Path) -> None:
    file = tmp_path / "experts"
    file.write_bytes((wide / "experts").read_bytes())
    model = load_offloaded(wide / "model", pack=file, dtype="float32", **SETTINGS)
    expected = logits(model)
    file.touch()
    assert torch.equal(logits(model), expected)
    with file.open("r+b") as data:
        data.seek(4096 * 3)
        data.write(b"\x55" * 4096 * 12)
    with pytest.raises(UserError, match="is not what was packed; pack the model again"):
        logits(model)
