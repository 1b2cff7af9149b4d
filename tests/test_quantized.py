"""Quantised experts: what is stored is what was packed, and every exact policy gives the logits of the resident quantised model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model
from hypothesis import given, settings
from hypothesis import strategies as st
from predict_train.data_collection.catalog import tiny_config
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.errors import UserError
from predict_train.predictors.experts import expert_modules, expert_outputs
from predict_train.predictors.generation import CACHE
from predict_train.runtime import load_experts, load_offloaded, offloaded
from predict_train.runtime.formats import int4
from predict_train.runtime.formats.quantized import COMPUTED
from predict_train.runtime.formats.registry import QUANTIZED, format_of
from predict_train.runtime.gatherer import Gathered
from predict_train.runtime.load import load_to_host
from predict_train.runtime.measure.evaluate import cross_entropy
from predict_train.runtime.pack import pack
from predict_train.runtime.packfile import read_header
from predict_train.runtime.quantization import Quantization
from predict_train.runtime.settings import Loading
from resident import load_resident
from test_device import logits_of
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

from predict_train import running
from predict_train.settings import EvaluateConfig

WIDE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"hidden_size": 64, "moe_intermediate_size": 64},
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 64},
    "deepseek_v3": {"hidden_size": 64, "moe_intermediate_size": 64},
}
"""Models whose experts can be quantised to four bits."""


def checkpoint(architecture: str, folder: Path) -> Path:
    build_model(architecture, **WIDE[architecture]).save_pretrained(folder)
    return folder


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of a prompt and decoded tokens."""
    ids = torch.randint(1, 256, (1, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model(ids[:, :20], use_cache=True)
        found = [output.logits]
        for n in range(20, 30):
            output = model(ids[:, n : n + 1], **{CACHE: output[CACHE]}, use_cache=True)
            found.append(output.logits)
    return torch.cat(found, 1).float()


@pytest.mark.parametrize(
    ("architecture", "quantize", "dtype"),  # each with each of the others
    [
        ("qwen3_moe", Quantization.INT8, "float32"),
        ("qwen3_moe", Quantization.INT4, "bfloat16"),
        ("gpt_oss", Quantization.INT8, "bfloat16"),
        ("gpt_oss", Quantization.INT4, "float32"),
        ("deepseek_v3", Quantization.INT8, "float32"),
        ("deepseek_v3", Quantization.INT4, "bfloat16"),
    ],
)
def test_exact_policies_give_the_resident_quantised_models_logits(
    architecture: str, quantize: Quantization, dtype: str, tmp_path: Path
) -> None:
    """In memory, in a file that is made, and in one that is there; and offloaded from a resident model."""
    folder = checkpoint(architecture, tmp_path / "model")
    whole = load_resident(folder, Loading(quantize=quantize, dtype=dtype), torch.device("cpu"))
    expected = logits(whole)
    file = {"pack": tmp_path / "experts"}
    for policy, store in (("on_demand", {}), ("prefetch", {}), ("on_demand", file), ("prefetch", file)):
        config = {"policy": policy, "quantize": quantize, "dtype": dtype, "slots": 5, "device": "cpu"}
        model = load_offloaded(folder, **config, **store)
        assert torch.equal(logits(model), expected), (store, policy)
        model.expert_offload.detach()
    with offloaded(whole, policy="prefetch", slots=5, device="cpu"):
        assert torch.equal(logits(whole), expected)
    assert torch.equal(logits(whole), expected)
    again = load_resident(folder, Loading(pack=tmp_path / "experts", dtype=dtype), torch.device("cpu"))
    assert torch.equal(logits(again), expected)


SHAPES = {
    Quantization.INT8: st.tuples(st.sampled_from([3, 40, 192]), st.sampled_from([1, 24, 40, 48, 100, 256])),
    Quantization.INT4: st.tuples(st.sampled_from([64, 128, 192]), st.sampled_from([64, 256])),
}


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(Quantization).flatmap(lambda quantize: st.tuples(st.just(quantize), SHAPES[quantize])),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([1e-6, 0.02, 30.0]),
)
def test_weights_come_back_within_half_a_step(
    case: tuple[Quantization, tuple[int, int]], seed: int, scale: float
) -> None:
    """And torch's kernel multiplies with just these. Not every width is given to it."""
    quantize, shape = case
    generator = torch.Generator().manual_seed(seed)
    weight = scale * torch.randn(shape, generator=generator)
    weight[0] = 0.0  # a row of zeros, and one that is constant
    weight[1] = scale
    weight[2, ::64] *= 8  # outliers
    kind = QUANTIZED[quantize]
    packed, scales = (part.contiguous() for part in kind.quantize(weight))
    assert tuple((part.dtype, part.shape) for part in (packed, scales)) == kind.shapes("weight", *shape)
    wide = kind.widen(packed, scales)
    if quantize is Quantization.INT8:
        steps = weight.abs().amax(1, keepdim=True) / 127
        assert ((wide - weight).abs() <= 0.51 * steps + 1e-3 * weight.abs() * 4).all()
    else:
        groups = weight.unflatten(1, (-1, 64))
        nearest = (groups.amax(-1) - groups.amin(-1)) / 15  # rounded to the nearest of 16 evenly spaced values
        errors = (wide - weight).unflatten(1, (-1, 64))
        floor = (nearest / 3.46 + 0.01 * groups.abs().amax(-1)).square()
        assert (errors.square().mean(-1) <= 1.1 * floor).all()
    x = torch.randn(3, shape[1], generator=generator)
    product = kind.multiply(x.to(COMPUTED), packed, scales)
    if product is not None:
        right = x.to(COMPUTED).float() @ wide.T
        torch.testing.assert_close(product.float(), right, rtol=2e-2, atol=2e-2 * float(right.abs().max()))


@pytest.mark.parametrize("quantize", Quantization)
@pytest.mark.parametrize("model_type", ["nemotron_h", "gpt_oss", "qwen3_moe"])
def test_an_expert_computes_with_its_widened_weights(model_type: str, quantize: Quantization) -> None:
    """Whatever its layout and width, and however its inputs lie in memory. One of these has no gate, one has biases."""
    generator = torch.Generator().manual_seed(0)
    for width in (64, 24) if quantize is Quantization.INT8 else (64,):
        sizes = {"hidden_size": width, "intermediate_size": width, "moe_intermediate_size": width}
        sizes |= {"moe_latent_size": width, "num_attention_heads": 4} if model_type == "nemotron_h" else {}
        config = tiny_config(model_type)
        for name, value in sizes.items():
            if hasattr(config, name):
                setattr(config, name, value)
        experts = next(iter(expert_modules(AutoModelForCausalLM.from_config(config).float()).values()))
        form = format_of([experts], quantize)
        tensors = {name: p.data.normal_(0, 0.2, generator=generator) for name, p in experts.named_parameters()}
        blocks = Gathered(experts, form, tensors).blocks()
        wide = {name: values[5] for name, values in form.read(blocks).items()}
        x = torch.randn(7, width + 1, generator=generator).bfloat16().float()[:, 1:]
        expected = expert_outputs(experts, [wide], [x])
        for rows in (x, x.bfloat16(), x.half()):
            found = form.outputs(experts, [form.views(blocks[5])], [rows])
            assert found.dtype == rows.dtype
            torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.03 * float(expected.abs().max()))


def test_without_a_kernel_weights_are_widened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In float32 nothing is rounded then, so the logits are those of the widened model but for the order of sums."""
    folder = checkpoint("qwen3_moe", tmp_path / "model")
    monkeypatch.setattr(int4, "kernel_reads_tiles", lambda: False)
    model = load_offloaded(folder, policy="prefetch", quantize="int4", dtype="float32", slots=5, device="cpu")
    found = logits(model)
    model.expert_offload.detach()
    with pytest.raises(UserError, match=r"are quantised to int4; load them .* or offload it again"):
        logits(model)
    load_experts(model)
    torch.testing.assert_close(logits(model), found, rtol=1e-4, atol=1e-4)
    cast = load_offloaded(folder, quantize="int4", dtype="bfloat16", device="cpu")
    cast.expert_offload.detach()
    load_experts(cast.float())
    assert {parameter.dtype for parameter in cast.parameters()} == {torch.float32}


def test_what_cannot_be_quantised_is_refused_in_a_sentence(tmp_path: Path) -> None:
    narrow = tmp_path / "narrow"
    build_model("qwen3_moe").save_pretrained(narrow)
    folder = checkpoint("qwen3_moe", tmp_path / "model")
    pack(folder, tmp_path / "int8", quantize="int8")
    pack(folder, tmp_path / "full")
    for words, arguments in (
        (r"int4 needs multiples of 64; use int8", {"quantize": "int4"}),
        (r"quantisations are int8, int4", {"quantize": "int3"}),
    ):
        with pytest.raises(UserError, match=words):
            load_offloaded(narrow, device="cpu", **arguments)
    with pytest.raises(
        UserError, match=r"int8 holds experts in torch.float32 quantised to int8, and int4 is asked for"
    ):
        load_offloaded(folder, device="cpu", quantize="int4", pack=tmp_path / "int8")
    with pytest.raises(UserError, match=r"full holds experts in torch.float32, and int4 is asked for"):
        load_offloaded(folder, device="cpu", quantize="int4", pack=tmp_path / "full")
    with pytest.raises(UserError, match=r"in torch.float32 quantised to int8, and the model's are in torch.bfloat16"):
        load_offloaded(folder, device="cpu", dtype="bfloat16", pack=tmp_path / "int8")
    with pytest.raises(UserError, match="can't be quantised to int3; give one of int8, int4"):
        pack(folder, tmp_path / "int3", quantize="int3")
    broken = build_model("qwen3_moe", **WIDE["qwen3_moe"])
    weight = find_moe_layers(broken)[1].experts.down_proj.data[3]
    for quantize, value in (
        (Quantization.INT8, float("inf")),
        (Quantization.INT4, 3e38),
        *((q, float("nan")) for q in Quantization),
    ):
        weight[5, 7] = value
        weight[5, 8] = -value
        broken.save_pretrained(tmp_path / "broken")
        with pytest.raises(UserError, match="down_proj of expert 3 has values that are not finite or too large"):
            pack(tmp_path / "broken", tmp_path / "never", quantize=quantize)
    with pytest.raises(UserError, match="pack this model"):
        load_offloaded(tmp_path / "broken", device="cpu", pack=tmp_path / "int8")
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == ["full", "int8"]


def test_what_quantising_loses_is_told_before_the_packed_file_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("qwen3_moe", tmp_path / "model")
    monkeypatch.setattr(running, "dtype_of", lambda *_: "auto")  # as on a GPU
    config = {"model": str(folder), "pack": tmp_path / "experts", "device": "cpu"}
    assert running.load_unquantized(EvaluateConfig(quantize="int8", **config)).dtype == torch.float32
    pack(folder, tmp_path / "experts", torch.bfloat16, "int8")
    assert running.load_unquantized(EvaluateConfig(**config)).dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"quantised to int8, and int4 is asked for"):
        running.quantization_asked(EvaluateConfig(quantize="int4", **config))


def test_what_a_model_loses_is_told_though_it_would_not_fit_unquantised(tmp_path: Path) -> None:
    """The unquantised experts pass through slots, and the figure is that of the whole model, bit for bit."""
    folder = checkpoint("qwen3_moe", tmp_path / "model")
    config = EvaluateConfig(model=str(folder), quantize="int8", device="cpu")
    before = running.load_unquantized(config)
    assert before.expert_offload.slots < 32, "of 32 experts"
    before.expert_offload.detach()
    batches = [torch.randint(1, 256, (2, 40), generator=torch.Generator().manual_seed(n)) for n in range(2)]
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert running.unquantized_cross_entropy(config, batches) == cross_entropy(whole, batches)


def test_a_quantised_pack_is_smaller_and_the_same_each_time(tmp_path: Path) -> None:
    folder = checkpoint("gpt_oss", tmp_path / "model")
    sizes = []
    for quantize in (None, *Quantization):
        pack(folder, tmp_path / f"{quantize}-first", torch.bfloat16, quantize)
        with torch.inference_mode():
            pack(folder, tmp_path / f"{quantize}-second", torch.bfloat16, quantize)
        assert (tmp_path / f"{quantize}-first").read_bytes() == (tmp_path / f"{quantize}-second").read_bytes()
        sizes.append(read_header(tmp_path / f"{quantize}-first").block_bytes)
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", Quantization)
@pytest.mark.parametrize("architecture", WIDE)
def test_on_a_gpu_exact_policies_give_the_logits_of_all_quantised_experts_resident(
    architecture: str, quantize: Quantization, tmp_path: Path
) -> None:
    """By the device's engine, captured and eager, and from a file by the host's. In float32 they are close to a CPU's."""
    folder = checkpoint(architecture, tmp_path / "model")
    for dtype in ("bfloat16", "float32"):
        found: dict[tuple[str, bool], torch.Tensor] = {}
        for store, where in (("memory", {}), ("file", {"pack": tmp_path / f"experts-{dtype}"})):
            for policy, share in (("on_demand", 1.0), ("on_demand", 0.5), ("prefetch", 0.5)):
                model = load_to_host(folder, Loading(quantize=quantize, dtype=dtype, **where))
                slots = int(share * sum(layer.num_experts for layer in find_moe_layers(model)))
                with offloaded(model, policy=policy, slots=slots, device="cuda") as offload:
                    assert (offload.why_host is None) == (store == "memory")
                    for is_static in (False, model._can_compile_fullgraph):
                        cache = StaticCache(config=model.config, max_cache_len=64) if is_static else None
                        logits = logits_of(model, cache)
                        assert torch.equal(found.setdefault((store, is_static), logits), logits), (store, policy, share)
        if dtype == "float32":
            first = found["memory", False].cpu()
            torch.testing.assert_close(
                first, found["file", False].cpu(), rtol=0.02, atol=0.02 * float(first.abs().max())
            )
