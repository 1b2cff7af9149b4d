"""Heads that predict several tokens, which transformers loads from the checkpoint as a second model: what they draft, with offloaded experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model
from predict_train.data_collection.catalog import tiny_model
from predict_train.runtime import load_offloaded, offload_experts
from predict_train.runtime.errors import OffloadError
from safetensors.torch import load_file, save_file
from test_offload import prompt
from test_shipped import FP8, blocks_of
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

TYPE = "mellum"
"""Its head is a mixture of experts of its own, and needs no particular number of layers before it."""
TOKENS = 24
LAYER = "model.layers.3."
"""The layer that the head's weights are those of."""


def write_checkpoint(folder: Path, fp8: bool = False) -> Path:
    """A model whose next token depends on the last one mostly, and a head that guesses many of its tokens and not all."""
    model = tiny_model(TYPE)
    if not hasattr(model.config, "num_mtp_layers"):
        pytest.skip("this release of transformers has no heads for it")
    model.config.num_mtp_layers, model.config.mtp_layer_types, model.config.mtp_mlp_layer_types = (
        1,
        ["full_attention"],
        ["sparse"],
    )
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj")):
            parameter.data *= 0.2
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    head = {f"mtp.layers.0.{name.removeprefix(LAYER)}": w for name, w in weights.items() if name.startswith(LAYER)}
    size = model.config.hidden_size
    head["mtp.fc.weight"] = torch.cat([torch.eye(size), torch.zeros(size, size)], dim=1)  # of the token; of the state
    head |= {f"mtp.pre_fc_norm_{name}.weight": torch.ones(size) for name in ("embedding", "hidden")}
    head["mtp.norm.weight"] = weights["model.norm.weight"]
    weights = {name: weight.clone() for name, weight in (weights | head).items()}
    if fp8:
        for name in [name for name in weights if name.endswith("_proj.weight")]:
            weights[name], weights[f"{name}_scale_inv"] = blocks_of(weights[name])
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": FP8}))
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    return folder


def said(model: PreTrainedModel, **arguments: Any) -> tuple[list[int], list[int]]:
    """What a model goes on with, and the tokens of each of its passes but the prompt's."""
    passes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    ids = prompt(1, 9)
    usual: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": TOKENS, "do_sample": False}
    torch.manual_seed(5)
    tokens = model.generate(ids, eos_token_id=None, pad_token_id=0, **(usual | arguments))
    hook.remove()
    return tokens[0].tolist(), passes[1:]


def test_what_heads_draft_changes_no_token(tmp_path: Path) -> None:
    """And as many of their drafts are right as in plain transformers. With experts in memory, in a file, and quantised."""
    folder = write_checkpoint(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens, passes = said(plain, use_mtp=True)
    drawn = said(plain, use_mtp=True, do_sample=True)
    assert tokens == said(plain)[0]
    assert set(passes) == {2}
    assert TOKENS / 2 < len(passes) < 0.9 * TOKENS, "some drafts are right and some are not"
    for policy in ("on_demand", "prefetch"):
        for store in ({}, {"pack": tmp_path / "experts"}):
            model = load_offloaded(folder, policy=policy, slots=6, device="cpu", dtype="float32", **store)
            assert said(model, use_mtp=True) == (tokens, passes)
        assert said(model, use_mtp=True, do_sample=True) == drawn
        quantised = load_offloaded(folder, policy=policy, slots=6, device="cpu", dtype="float32", quantize="int8")
        assert said(quantised, use_mtp=True)[0] == said(quantised)[0]
    model = offload_experts(plain, slots=6, device="cpu")
    assert said(model, use_mtp=True) == (tokens, passes)
    model.expert_offload.detach()
    assert "generate" not in vars(model)
    assert said(model, use_mtp=True) == (tokens, passes)


def test_heads_that_cannot_be_read_are_refused_as_generate_begins(tmp_path: Path) -> None:
    """Each where plain transformers raises an error of its own, or drafts what is nearly never right. Without heads they all go on."""
    folder = write_checkpoint(tmp_path / "fp8", fp8=True)
    bare = write_checkpoint(tmp_path / "bare")
    weights = load_file(bare / "model.safetensors")
    save_file({name: w for name, w in weights.items() if not name.startswith("mtp.")}, bare / "model.safetensors")
    build_model("qwen3_moe").save_pretrained(tmp_path / "other")
    drawn = AutoConfig.from_pretrained(bare)
    for source, words in (
        (folder, r"without their scales \(mtp\.layers\.0\..* is in F8_E4M3\), so that nearly no draft would be right"),
        (
            bare,
            r"safetensors files, and .*bare has no weights of theirs; load the model from a checkpoint that has them",
        ),
        (drawn, "safetensors files, and this model has none on this machine"),
        (tmp_path / "other", "the config of this qwen3_moe has no heads that predict several tokens"),
    ):
        model = load_offloaded(source, slots=6, device="cpu", dtype="float32")
        with pytest.raises(OffloadError, match=words):
            said(model, use_mtp=True)
        with pytest.raises(OffloadError, match=words):
            said(model, generation_config=GenerationConfig(use_mtp=True))
        assert len(said(model)[0]) == 9 + TOKENS
