"""GGUF files: experts stay in the file's types, and give the logits of the model that transformers widens."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from predict_train.data_collection.catalog import tiny_config
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.errors import UserError
from predict_train.predictors.experts import expert_modules
from predict_train.runtime import load_experts, load_offloaded
from predict_train.runtime.formats.ggml import TYPES, arranged, widen
from predict_train.runtime.formats.scratch import Scratch
from predict_train.runtime.pack import pack
from predict_train.runtime.packfile import read_header
from predict_train.runtime.settings import Loading
from resident import load_resident
from test_quantized import logits
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from predict_train import runtime

Kind = gguf.GGMLQuantizationType
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
}
NAMES = {
    "qwen3_moe": "qwen3moe", "qwen2_moe": "qwen2moe", "minimax_m2": "minimax-m2", "qwen3_5_moe_text": "qwen35moe",
}  # fmt: skip
HALVES = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q2_K: (80, 82), Kind.Q6_K: (208,), Kind.Q3_K: (108,)}
"""Where the scales of 16 bits are in a block, of types that the package gguf can't make."""
MIXED = {
    "blk.0.ffn_gate_exps.weight": Kind.Q4_K, "blk.0.ffn_up_exps.weight": Kind.Q5_K, "blk.0.ffn_down_exps.weight": Kind.Q6_K,
    "blk.1.ffn_gate_exps.weight": Kind.Q8_0, "blk.1.ffn_up_exps.weight": Kind.Q4_0, "blk.1.ffn_down_exps.weight": Kind.Q3_K,
}  # fmt: skip


def made(architecture: str, **sizes: Any) -> PreTrainedModel:
    """A random model of 2 layers, or 4, whose experts have whole blocks of every type."""
    config = tiny_config(architecture)
    if hasattr(config, "layer_types"):  # one of each kind is in four layers
        sizes["num_hidden_layers"] = 4
    for name, value in (SIZES | sizes).items():
        if hasattr(config, name):
            setattr(config, name, value)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.ndim >= 2 or "bias" in name:
                tensor.normal_(0.0, 0.5 if ".gate." in name else 0.2, generator=generator)
    return model


def packed(weight: np.ndarray, kind: Kind) -> np.ndarray:
    """A weight in the blocks of a type; those that gguf can't make hold random codes, with scales that fit."""
    weight = np.ascontiguousarray(weight, dtype=np.float32)
    if kind not in HALVES:
        return gguf.quantize(weight, kind)
    size, number = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (*weight.shape[:-1], weight.shape[-1] // size, number), np.uint8)
    for place in HALVES[kind]:
        scales = np.random.default_rng(place).normal(0, 2e-4, blocks.shape[:-1]).astype(np.float16)
        blocks[..., place : place + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(*weight.shape[:-1], -1)


def tensors_of(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The weights of a model by the names and in the forms of llama.cpp's converter."""
    found: dict[str, np.ndarray] = {}
    names = gguf.get_tensor_name_map(
        next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == NAMES[model.config.model_type]), 9
    )
    for name, weight in model.state_dict().items():
        number, values = "".join(re.findall(r"\.\d+", name)[:1]), weight.float().numpy()
        if name.endswith("experts.gate_up_proj"):
            gate, up = np.split(values, 2, axis=1)
            found |= {f"blk{number}.ffn_gate_exps.weight": gate, f"blk{number}.ffn_up_exps.weight": up}
        elif name.endswith("e_score_correction_bias"):
            found[f"blk{number}.exp_probs_b.bias"] = values
        elif name.endswith("dt_bias"):
            found[f"blk{number}.ssm_dt.bias"] = values
        elif name.endswith("A_log"):
            found[f"blk{number}.ssm_a"] = -np.exp(values)
        else:
            base, _, end = name.rpartition(".") if name.endswith(("weight", "bias")) else (name, "", "weight")
            found[f"{names.get_name(base)}.{end}"] = np.squeeze(values)
    return found


def write(
    model: PreTrainedModel,
    folder: Path,
    kinds: dict[str, Kind] | Kind = Kind.Q8_0,
    edit: Callable[[dict[str, np.ndarray]], None] | None = None,
    architecture: str | None = None,
) -> Path:
    """A GGUF file in the model's folder, which has only its config besides."""
    model.config.save_pretrained(folder)
    writer = gguf.GGUFWriter(folder / "model.gguf", architecture or NAMES[model.config.model_type])
    tensors = tensors_of(model)
    if edit is not None:
        edit(tensors)
    for name, values in tensors.items():
        kind = kinds.get(name, Kind.Q8_0) if isinstance(kinds, dict) else kinds
        if values.ndim == 1 or "ffn_gate_inp" in name or values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            writer.add_tensor(name, values.astype(np.float32))
        else:
            writer.add_tensor(name, packed(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


def by_transformers(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a GGUF file, widened by transformers."""
    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", config=AutoConfig.from_pretrained(folder), dtype=dtype
    ).eval()


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    # Each of the two ways in which transformers widens is there in bfloat16; float32 loses nothing by either.
    [("qwen3_moe", "float32"), ("qwen3_5_moe_text", "bfloat16"), ("qwen2_moe", "bfloat16"), ("minimax_m2", "float32")],
)
def test_exact_policies_give_the_logits_of_the_widened_model(architecture: str, dtype: str, tmp_path: Path) -> None:
    """In memory, in a file that is made, and in one that is there, with types that differ from layer to layer."""
    # Transformers' newer code can't put two types together, as its older code does.
    types = MIXED | dict.fromkeys(list(MIXED)[:2], Kind.Q4_K) | dict.fromkeys(list(MIXED)[3:5], Kind.Q4_0)
    write(made(architecture), tmp_path, types if architecture == "qwen3_5_moe_text" else MIXED)
    wide = by_transformers(tmp_path, getattr(torch, dtype))
    settings: dict[str, Any] = {"gguf": "model.gguf", "dtype": dtype}
    expected = logits(load_resident(tmp_path, Loading(**settings), torch.device("cpu")))
    assert torch.equal(expected, logits(wide))
    file = tmp_path / "experts"
    for policy, store in (("prefetch", {}), ("on_demand", {"pack": file}), ("prefetch", {"pack": file})):
        model = load_offloaded(tmp_path, policy=policy, slots=5, device="cpu", **settings, **store)
        assert torch.equal(logits(model), expected), (store, policy)
        model.expert_offload.detach()
        load_experts(model)
        states = model.state_dict(), wide.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert read_header(file).quantized == "gguf"
    if len(find_moe_layers(wide)) == 2:  # the gate in Q8_0 of one layer is larger than that in Q4_K of the other
        assert read_header(file).block_bytes < 1.1 * 256 * 256 * (8.5 + 5.5 + 6.5625) / 8


def widened(
    number: int, found: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, in_dtype: bool = False
) -> torch.Tensor:
    wide = torch.full(shape, torch.nan, dtype=dtype)
    widen(number, found, wide, in_dtype)
    return wide


@pytest.mark.parametrize("name", [*TYPES, "Q2_K", "Q3_K", "F16", "BF16"])
def test_weights_of_every_type_are_widened_as_by_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both as by its older code, in float32, and as by its newer one, in the model's dtype; however many rows a weight has.

    The larger weight is widened in pieces, of which the last one is smaller.
    """
    from transformers.integrations.gguf.dequant import dequantize

    monkeypatch.setattr("predict_train.runtime.formats.ggml.AT_ONCE", 4 * 8 * 512)
    kind, generator = Kind[name], np.random.default_rng(0)
    for shape in ((48, 512), (6, 256)):
        raw = torch.from_numpy(packed(generator.normal(0, 0.1, shape), kind)).view(torch.uint8)
        found = arranged(kind, raw, shape)
        assert found is not None
        assert sorted(found.tolist()) == sorted(raw.flatten().tolist()) or name in TYPES
        assert found.numel() == raw.numel()
        expected = torch.from_numpy(gguf.dequantize(raw.numpy(), kind))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(widened(kind, found, shape, dtype), expected.to(dtype)), (shape, dtype)
            if name not in ("F16", "BF16"):
                newer = dequantize(raw, int(kind), dtype).view(shape)
                assert torch.equal(widened(kind, found, shape, dtype, in_dtype=True), newer), (shape, dtype)


def test_weights_may_be_widened_in_inference_mode_first_and_without_it_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """And by several threads at once."""
    monkeypatch.setattr("predict_train.runtime.formats.ggml.SCRATCH", Scratch())
    raw = [torch.from_numpy(packed(np.random.default_rng(n).normal(0, 1, (64, 256)), Kind.Q4_0)) for n in range(8)]
    found = [arranged(Kind.Q4_0, one, (64, 256)) for one in raw]

    def widened_by(number: int) -> torch.Tensor:
        with torch.inference_mode(number % 3 == 0):
            return widened(Kind.Q4_0, found[number], (64, 256), torch.bfloat16)

    expected = [torch.from_numpy(gguf.dequantize(one.numpy(), Kind.Q4_0)).bfloat16() for one in raw]
    with ThreadPoolExecutor(4) as pool:
        for numbers in ([0, 1], range(8), range(8)):
            for number, wide in zip(numbers, pool.map(widened_by, numbers), strict=True):
                assert torch.equal(wide, expected[number])


def test_scales_that_are_not_finite_are_seen() -> None:
    for name in [*TYPES, "Q2_K"]:
        raw = torch.from_numpy(packed(np.ones((8, 256)), Kind[name]).copy())
        place = HALVES.get(Kind[name], (0,))[0]
        raw[3, place : place + 2] = torch.tensor([float("inf")], dtype=torch.float16).view(torch.uint8)
        assert arranged(Kind[name], raw, (8, 256)) is None, name


def test_what_cannot_be_read_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves no file behind."""
    model = made("qwen3_moe")
    file = write(model, tmp_path / "model")
    whole = file.read_bytes()

    def refused(words: str, **settings: Any) -> None:
        for store in ({}, {"pack": tmp_path / "never"}):
            with pytest.raises(UserError, match=words):
                load_offloaded(tmp_path / "model", device="cpu", **{"gguf": "model.gguf", **settings, **store})

    refused("there is no file other.gguf; give a GGUF file, or its name in the folder", gguf="other.gguf")
    refused("config.json is no GGUF file", gguf="config.json")
    refused("are shipped in gguf, so they can't be quantised to int8; leave quantize out", quantize="int8")
    for length in (10, 100, 1000, len(whole) // 2, len(whole) - 1000):
        file.write_bytes(whole[:length])
        refused("cut short")
    file.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_gguf_pytorch_utils.is_gguf_available", lambda: False)
        refused(r"need the package gguf, which is not installed; pip install 'predict-train\[gguf\]'")
    with monkeypatch.context() as patch:  # as in an older release
        patch.setitem(sys.modules, "transformers.quantizers.quantizer_gguf", None)
        patch.delitem(sys.modules, "predict_train.runtime.gguf")
        patch.delattr(runtime, "gguf")
        refused(r"transformers .* can't keep the experts of a GGUF file as they are; install 5\.23 or later")
    write(model, tmp_path / "model", edit=lambda t: t.update({"blk.0.ffn_up_exps.weight": np.ones((256, 256))}))
    refused(r"has blk\.0\.ffn_up_exps\.weight in another shape than \[experts, outputs, inputs\]")
    write(model, tmp_path / "model", architecture="llama")
    refused("is a model of architecture llama, and only qwen2moe, qwen3moe, .* are read")
    write(model, tmp_path / "model", architecture="qwen2moe")
    refused("is a model of architecture qwen2moe, and the config is that of a qwen3_moe; give the folder")
    write(model, tmp_path / "model", edit=lambda tensors: tensors.pop("blk.1.ffn_up_exps.weight"))
    refused("lacks the experts blk.1.ffn_up_exps")
    write(model, tmp_path / "model", edit=lambda tensors: tensors.pop("blk.1.attn_q.weight"))
    refused(r"lacks model\.layers\.1\.self_attn\.q_proj\.weight")
    write(made("qwen3_moe", num_experts=4), tmp_path / "model")
    model.config.save_pretrained(tmp_path / "model")
    refused("other shapes or fewer experts than its config says")
    write(made("qwen3_moe", moe_intermediate_size=512), tmp_path / "model")
    model.config.save_pretrained(tmp_path / "model")
    refused("the GGUF file has .* in another shape than the model")
    assert not list(tmp_path.glob("never*"))


def test_only_one_layer_of_experts_is_in_memory_twice(tmp_path: Path) -> None:
    """What is made of experts while a file is packed is of one layer."""
    write(made("qwen3_moe"), tmp_path, Kind.Q4_0)
    wide: list[int] = []
    model = load_offloaded(tmp_path, gguf="model.gguf", pack=tmp_path / "experts", slots=5, device="cpu")
    for experts in expert_modules(model).values():
        wide += [p.numel() for p in experts.parameters() if not p.is_meta]
    assert not wide
    assert len(find_moe_layers(model)) == 2
    with pytest.raises(UserError, match=r"packed from .* with other weights files"):
        load_offloaded(tmp_path, pack=tmp_path / "experts", slots=5, device="cpu", gguf=changed(tmp_path))
    assert (
        pack(tmp_path, tmp_path / "again", torch.float32, gguf="model.gguf").read_bytes()
        == (tmp_path / "experts").read_bytes()
    )


def changed(folder: Path) -> Path:
    """Another GGUF file with one other byte."""
    content = bytearray((folder / "model.gguf").read_bytes())
    content[-1] ^= 1
    other = folder / "other.gguf"
    other.write_bytes(content)
    return other
