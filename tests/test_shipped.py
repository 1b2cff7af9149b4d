"""Checkpoints that are shipped with quantised experts: these stay as they are, and give the logits of transformers' widened model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.errors import UserError
from predict_train.runtime import load_experts, load_offloaded, offloaded
from predict_train.runtime.formats.fp8 import Fp8Format
from predict_train.runtime.load import load_to_host
from predict_train.runtime.measure.settings import PlanConfig
from predict_train.runtime.pack import pack
from predict_train.runtime.packfile import read_header
from predict_train.runtime.settings import Loading
from resident import load_resident
from safetensors.torch import load_file, save_file
from test_device import logits_of
from test_quantized import logits
from transformers import AutoModelForCausalLM

from predict_train.planning import plan

BLOCK = 128
FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic", "fmt": "e4m3"}
SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2},
    "deepseek_v3": {"hidden_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 3},
}


def blocks_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in fp8, and its scales by blocks. Some of its numbers are subnormal, and zeros of both signs."""
    rows, columns = (min(BLOCK, size) for size in weight.shape)
    blocks = weight.float().unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    scales = blocks.abs().amax((1, 3)) / 448
    packed = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return packed.flatten(2).flatten(0, 1), scales


def write_fp8(architecture: str, folder: Path, edit: Callable[[dict[str, torch.Tensor]], None] | None = None) -> Path:
    """A checkpoint in fp8, as DeepSeek-V3's and Qwen3's are."""
    build_model(architecture, **SIZES[architecture]).bfloat16().save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        is_linear = name.endswith("_proj.weight") and not name.endswith("eh_proj.weight")
        if is_linear and all(size % BLOCK == 0 or size < BLOCK for size in weight.shape):
            tensors[name], tensors[f"{name}_scale_inv"] = blocks_of(weight)
        else:
            tensors[name] = weight
    if edit is not None:
        edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    configure(folder, FP8)
    return folder


def write_mxfp4(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None] | None = None) -> Path:
    """A checkpoint in MXFP4, as gpt-oss is shipped. All numbers and many scales are in it."""
    build_model("gpt_oss", hidden_size=64, intermediate_size=96).bfloat16().save_pretrained(folder)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        count, inputs, outputs = tensors.pop(name).shape
        groups = (count, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*groups, 16), generator=generator).byte()
        tensors[f"{name}_scales"] = torch.randint(118, 126, groups, generator=generator).byte()
    if edit is not None:
        edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    configure(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    return folder


def configure(folder: Path, quantization: dict[str, Any]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}))


SHIPPED: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "fp8, qwen3_moe": ("fp8", lambda folder: write_fp8("qwen3_moe", folder)),
    "fp8, deepseek_v3": ("fp8", lambda folder: write_fp8("deepseek_v3", folder)),
    "mxfp4, gpt_oss": ("mxfp4", write_mxfp4),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", SHIPPED)
def test_exact_policies_give_the_logits_of_the_widened_model(kind: str, dtype: str, tmp_path: Path) -> None:
    """And of the model with all experts resident as they are. In memory, in a file that is made, and in one that is there. The blocks have no more bytes than the checkpoint's weights."""
    form, write = SHIPPED[kind]
    folder, pack = write(tmp_path / "model"), tmp_path / "experts"
    widened = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    for parameter in widened.parameters():  # transformers leaves those without scales in the checkpoint's dtype
        parameter.data = parameter.data.to(getattr(torch, dtype))
    expected = logits(load_resident(folder, Loading(dtype=dtype), torch.device("cpu")))
    assert torch.equal(expected, logits(widened))
    for store in ({}, {"pack": pack}):
        for policy in ("on_demand", "prefetch"):
            model = load_offloaded(folder, policy=policy, dtype=dtype, slots=5, device="cpu", **store)
            assert torch.equal(logits(model), expected), (store, policy)
            model.expert_offload.detach()
        load_experts(model)
        states = model.state_dict(), widened.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert read_header(pack).quantized == form
    weights = [p for p in find_moe_layers(widened)[0].experts.parameters() if p.ndim == 3]
    number = sum(p[0].numel() for p in weights)
    assert read_header(pack).block_bytes < 1.2 * number + 4096


def exact_on_a_gpu(folder: Path, **settings: Any) -> None:
    """By the device's engine, exact policies give the logits of all experts resident. In float32 they are close to a CPU's."""
    expected = logits_of(load_resident(folder, Loading(dtype="float32", **settings), torch.device("cpu")), None)
    for dtype in ("bfloat16", "float32"):
        found: list[torch.Tensor] = []
        for policy, share in (("on_demand", 1.0), ("on_demand", 0.5), ("prefetch", 0.5)):
            model = load_to_host(folder, Loading(dtype=dtype, **settings))
            slots = int(share * sum(layer.num_experts for layer in find_moe_layers(model)))
            with offloaded(model, policy=policy, slots=slots, device="cuda") as offload:
                assert offload.why_host is None
                found.append(logits_of(model, None))
            assert torch.equal(found[0], found[-1]), (dtype, policy, share)
        if dtype == "float32":
            torch.testing.assert_close(found[0].cpu(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SHIPPED)
def test_on_a_gpu_exact_policies_give_the_logits_of_all_experts_resident(kind: str, tmp_path: Path) -> None:
    _, write = SHIPPED[kind]
    exact_on_a_gpu(write(tmp_path / "model"))


def test_what_cannot_be_kept_is_refused_in_a_sentence(tmp_path: Path) -> None:
    """And leaves no file behind."""
    expert = "model.layers.1.mlp.experts.3.up_proj.weight"

    def scale(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
        return lambda tensors: tensors[f"{expert}_scale_inv"].fill_(value)

    def no_number(tensors: dict[str, torch.Tensor]) -> None:
        tensors[expert].view(torch.uint8)[5, 7] = 0xFF

    unsound = "of expert 3 has values that are not finite or too large, so it can't be kept"
    for edit, words in (
        (scale(float("nan")), f"gate_up_proj_scales {unsound}"),
        (scale(float("-inf")), f"gate_up_proj_scales {unsound}"),
        (scale(1e4), f"gate_up_proj_scales {unsound}"),
        (no_number, f"gate_up_proj {unsound}"),
        (lambda tensors: tensors.pop(f"{expert}_scale_inv"), r"lacks .*experts\.gate_up_proj_scales"),
    ):
        folder = write_fp8("qwen3_moe", tmp_path / "broken", edit)
        for store in ({}, {"pack": tmp_path / "never"}):
            with pytest.raises(UserError, match=words):
                load_offloaded(folder, device="cpu", **store)
    folder = write_fp8("qwen3_moe", tmp_path / "model")
    planned = {"model": str(folder), "device_memory": "2GiB", "link": "25GB/s", "memory_bandwidth": "768GB/s"}
    with pytest.raises(UserError, match="are shipped in fp8, so they can't be quantised to int8; leave quantize out"):
        load_offloaded(folder, device="cpu", quantize="int8")
    with pytest.raises(UserError, match="are shipped in fp8, so they can't be quantised to int4; leave quantize out"):
        plan(PlanConfig(**planned, quantize="int4"))
    figures = plan(PlanConfig(**planned))
    assert figures["formats"] == {"fp8": {"expert_bytes": figures["expert_bytes"], "slots": figures["slots"]}}
    for edit, words in (
        (
            lambda tensors: tensors["model.layers.2.mlp.experts.down_proj_scales"][3].fill_(255),
            f"down_proj_scales {unsound}",
        ),
        (
            lambda tensors: tensors.pop("model.layers.1.mlp.experts.down_proj_scales"),
            r"lacks .*experts\.down_proj_scales;",
        ),
    ):
        write_mxfp4(tmp_path / "gpt", edit)
        with pytest.raises(UserError, match=words):
            load_offloaded(tmp_path / "gpt", device="cpu")
    with pytest.raises(UserError, match="are shipped in mxfp4, so they can't be quantised to int4; leave quantize out"):
        pack(tmp_path / "gpt", tmp_path / "never", quantize="int4")
    config = json.loads((tmp_path / "gpt" / "config.json").read_text())
    (tmp_path / "gpt" / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(UserError, match="down_proj has 40 inputs, and groups of 32 don't divide them"):
        load_offloaded(tmp_path / "gpt", device="cpu")
    configure(folder, FP8 | {"weight_block_size": [64, 64]})
    with pytest.raises(UserError, match=r"in fp8 with the blocks \[64, 64\], and only blocks of 128 by 128 are read"):
        load_offloaded(folder, device="cpu")
    odd = build_model("qwen3_moe", moe_intermediate_size=192)
    odd.save_pretrained(tmp_path / "odd")
    configure(tmp_path / "odd", FP8)
    with pytest.raises(UserError, match=r"gate_up_proj has 192 outputs .* blocks of 128 by 128 don't divide"):
        pack(tmp_path / "odd", tmp_path / "never")
    assert not [file for file in tmp_path.iterdir() if file.is_file()]


def test_all_numbers_of_fp8_are_widened_exactly() -> None:
    """In blocks of any size, and in as many parts as a large weight has."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = numbers[~numbers.float().isnan()]
    generator = torch.Generator().manual_seed(0)
    for shape in ((128, 127 * 2), (640, 1024), (3, 508)):
        outputs, inputs = shape
        packed = numbers.repeat(-(-outputs * inputs // len(numbers)))[: outputs * inputs].view(shape)
        rows, columns = min(128, outputs), 128 if inputs % 128 == 0 else inputs
        scales = torch.rand(outputs // rows, inputs // columns, generator=generator) * 1e-3
        blocks = packed.float().unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        wide = (blocks * scales[:, None, :, None]).flatten(2).flatten(0, 1)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(Fp8Format.widen(packed, scales, dtype), wide.to(dtype)), (shape, dtype)
