"""Models with which less can be done than with most: their experts are offloaded, and what is missing is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from predict_train.data_collection.catalog import tiny_model
from predict_train.predictors.architecture import UnsupportedModelError
from predict_train.predictors.discovery import find_layers
from predict_train.predictors.experts import count_of, expert_modules
from predict_train.runtime import load_experts, load_offloaded, offload_experts, offloaded
from predict_train.runtime.pack import pack
from test_exactness import all_logits
from test_offload import prompt
from transformers import AutoModelForCausalLM, PreTrainedModel

SHORT = ((1, 1, 1), (2, 9, 1))


def test_what_can_only_be_offloaded_is_fetched_on_demand_and_says_why() -> None:
    model = tiny_model("qwen4_exp_text")
    plain = all_logits(model, SHORT)
    with pytest.warns(UserWarning, match="can't be guessed without predictors, which collect and fit make: layer 0"):
        offload_experts(model, policy="prefetch", slots=3, device="cpu")
    assert model.expert_offload.config.policy == "on_demand"
    assert all(map(torch.equal, all_logits(model, SHORT), plain))
    assert model.expert_offload.counters.misses > 0


def test_a_layer_that_runs_twice_a_pass_is_fetched_on_demand_only() -> None:
    model = tiny_model("qwen3_moe")
    model.model.layers[2] = model.model.layers[1]
    found, plain = find_layers(model), all_logits(model, SHORT)
    with pytest.raises(UnsupportedModelError, match="layer 1 of qwen3_moe runs 2 times in a forward pass"):
        _ = found.moe_layers
    assert [layer.index for layer in found.layers] == [0, 1, 3]
    with pytest.warns(UserWarning, match="runs 2 times"):
        offload_experts(model, policy="prefetch", slots=3, device="cpu")
    assert model.expert_offload.config.policy == "on_demand"
    assert all(map(torch.equal, all_logits(model, SHORT), plain))


def test_experts_that_return_their_input_are_neither_copied_nor_lost() -> None:
    model = tiny_model("longcat_flash")
    layers = find_layers(model).layers
    assert (layers[0].num_experts, layers[0].identities, layers[0].stored) == (10, 2, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chosen: list[torch.Tensor] = []
    with offloaded(model, policy="on_demand", slots=16, device="cpu") as offload:
        for layer in layers:
            layer.experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
        all_logits(model, SHORT)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
        executed = sum(len(ids.unique()[ids.unique() < 8]) for ids in chosen)
        assert any((ids >= 8).any() for ids in chosen)
        assert offload.counters.hits + offload.counters.misses == executed
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_tokens_are_counted_where_every_expert_is_called() -> None:
    model = tiny_model("llama4_text")
    with offloaded(model, policy="on_demand", slots=4, device="cpu") as offload:
        with torch.no_grad():
            model(prompt(2, 9))
        assert offload.counters.tokens == 18
        used = offload.counters.hits + offload.counters.misses
        assert 0 < used <= sum(count_of(experts) for experts in expert_modules(model).values())


@pytest.mark.parametrize("model_type", ["longcat_flash", "llama4_text"])
def test_unmarked_experts_are_packed_and_loaded_again(model_type: str, tmp_path: Path) -> None:
    tiny_model(model_type).save_pretrained(tmp_path / "model")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    plain = all_logits(model, SHORT)
    file = pack(tmp_path / "model", tmp_path / "experts.pack", "float32")
    loaded = load_offloaded(tmp_path / "model", pack=file, policy="on_demand", slots=3, dtype="float32", device="cpu")
    assert all(map(torch.equal, all_logits(loaded, SHORT), plain))
    loaded.expert_offload.detach()
    load_experts(loaded)
    assert all(map(torch.equal, all_logits(loaded, SHORT), plain))
