"""The kernels of the experts' arithmetic against torch. Without a GPU they run in Triton's interpreter."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.experts import expert_outputs, expert_parameters
from predict_train.runtime.device import arithmetic, quantized
from predict_train.runtime.device.arithmetic import ExpertArithmetic
from predict_train.runtime.device.quantized import QuantizedArithmetic
from predict_train.runtime.formats.full import FullFormat
from predict_train.runtime.formats.quantized import QuantizedFormat
from predict_train.runtime.formats.registry import QUANTIZED
from predict_train.runtime.quantization import Quantization, Shipped
from test_device import DEVICE
from test_exactness import supported_model
from torch import nn
from triton.runtime import interpreter

CASES = int(os.environ.get("KERNEL_CASES", 20))
"""Examples; 200 take half a minute in the interpreter. A GPU needs fewer, since its kernels are compiled for nearly every case."""
KERNELS = [*Quantization, Shipped.FP8, Shipped.MXFP4]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, scope="module")
def rounding_to_bfloat16() -> Iterator[None]:
    """A GPU rounds to the nearest bfloat16. Triton's interpreter cuts off the last bits, so it is mended here."""
    original: Any = interpreter._convert_float

    def convert(values: Any, source: tl.dtype, target: tl.dtype, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.as_tensor(values).bfloat16().view(torch.uint16).numpy()
        return original(values, source, target, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        yield


def silu(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def clamped(both: torch.Tensor, limit: float) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def interleaved_relu(both: torch.Tensor) -> torch.Tensor:
    """The gate of every other output. All is exact."""
    return F.relu(both[..., ::2]) * (both[..., 1::2] + 1)


GATES = {"silu": silu, "relu": interleaved_relu, "clamped": functools.partial(clamped, limit=1.0)}


class Halving(nn.Module):
    """A norm whose result is exact."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.5


class Experts(nn.Module):
    """Experts with small integers as weights: sums in float32 are exact in any order, and only roundings are left."""

    def __init__(
        self, count: int, hidden: int, inner: int, dtype: torch.dtype, gate: str | None, marks: tuple[bool, ...]
    ):
        super().__init__()
        self.has_gate, (self.has_bias, self.is_transposed, self.has_post_expert_norm) = gate is not None, marks
        self._apply_gate = GATES[gate or "silu"]
        self.act_fn, self.post_expert_norm = nn.ReLU(), Halving()
        first = 2 * inner if self.has_gate else inner
        for name, outputs, inputs in (
            ("gate_up_proj" if self.has_gate else "up_proj", first, hidden),
            ("down_proj", hidden, inner),
        ):
            shape = (count, inputs, outputs) if self.is_transposed else (count, outputs, inputs)
            self.register_parameter(name, nn.Parameter(integers(*shape).to(dtype)))
            if self.has_bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(integers(count, outputs).to(dtype)))


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-2, 3, shape).float()


def in_places(experts: nn.Module, ids: torch.Tensor, extra: int) -> tuple[FullFormat, torch.Tensor, torch.Tensor]:
    """The experts' format, a memory that holds them at random places, and the table for `ids`, wider by `extra`.

    All else in the memory is NaN. The columns too many point there.
    """
    form = FullFormat.of(experts)
    count = len(experts.get_parameter("down_proj"))
    places = torch.randperm(count + 2)
    memory = torch.full((count + 2, form.bytes), 255, dtype=torch.uint8)
    for expert in range(count):
        for name, view in form.views(memory[places[expert]]).items():
            view.copy_(getattr(experts, name)[expert].detach())
    table = torch.cat([places[ids], places[count:][torch.randint(2, (len(ids), extra))]], dim=1)
    return form, memory.to(DEVICE), table.to(DEVICE, torch.int32)


@torch.no_grad()
def expected_output(
    experts: nn.Module, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """The weighted sum row by row, on the CPU, and the largest term in it."""
    stacked = {name: getattr(experts, name) for name in expert_parameters(experts)}
    rows = [
        expert_outputs(experts, [{name: p[expert] for name, p in stacked.items()}], [x[token : token + 1]])
        for token, chosen in enumerate(ids.tolist())
        for expert in chosen
    ]
    products = torch.cat(rows).view(*ids.shape, -1) * weights.unsqueeze(-1)  # in the wider dtype, rounded
    return products.float().sum(1).to(x.dtype), float(products.abs().max())


class Layer(NamedTuple):
    count: int
    hidden: int
    inner: int
    dtype: torch.dtype
    gate: str | None
    marks: tuple[bool, bool, bool]
    """Whether it has biases, is transposed, and has a norm after the experts."""


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    flags = st.one_of(st.just((False, False, False)), st.tuples(st.booleans(), st.booleans(), st.booleans()))
    gate = draw(st.sampled_from(["silu", "silu", "relu", "clamped", None]))
    sizes = st.sampled_from([1, 5, 8, 13, 19])  # few, since each is compiled for a GPU
    return Layer(draw(st.integers(1, 5)), draw(sizes), draw(sizes), draw(st.sampled_from(DTYPES)), gate, draw(flags))


@contextmanager
def tiles(rows: int, columns: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "ROWS", rows)
        patch.setattr(arithmetic, "COLUMNS", columns)
        yield


@settings(max_examples=CASES)
@given(
    layer=layers(),
    tokens=st.integers(1, 3),
    k=st.integers(1, 3),
    extra=st.integers(0, 2),
    weights_dtype=st.sampled_from(DTYPES),
    tile=st.sampled_from([(16, 512), (4, 16)]),
    seed=st.integers(0, 2**16),
)
def test_experts_compute_what_torch_computes(
    layer: Layer, tokens: int, k: int, extra: int, weights_dtype: torch.dtype, tile: tuple[int, int], seed: int
) -> None:
    torch.manual_seed(seed)
    experts = Experts(*layer)
    ids = torch.randint(layer.count, (tokens, k))
    x = integers(tokens, layer.hidden + 1).to(layer.dtype)[:, 1:]  # a part of something wider is not contiguous
    weights = (torch.randint(1, 9, (tokens, k + 1)) / 8).to(weights_dtype)[:, :k]
    expected, largest = expected_output(experts, x, ids, weights)
    form, memory, table = in_places(experts, ids, extra)
    with tiles(*tile), torch.no_grad():
        found = ExpertArithmetic(experts.to(DEVICE), form, memory).output(x.to(DEVICE), weights.to(DEVICE), table).cpu()
    assert found.dtype == layer.dtype
    if layer.gate in ("silu", "clamped"):  # the exponential may differ in its last bit
        step = 4 * torch.finfo(layer.dtype).eps
        torch.testing.assert_close(found, expected, rtol=step, atol=step * largest)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", ["silu", "clamped"])
def test_roundings_are_those_of_torch(gate: str, dtype: torch.dtype, weights_dtype: torch.dtype) -> None:
    """Nearly all outputs are equal bit for bit. Rounded once less, or once more, a quarter of them is not."""
    torch.manual_seed(0)
    experts = Experts(4, 40, 24, dtype, gate, (False, False, False))
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0, 0.3)
    ids, x, weights = torch.randint(4, (4, 2)), torch.randn(4, 40).to(dtype), torch.rand(4, 2).to(weights_dtype)
    expected, _ = expected_output(experts, x, ids, weights)
    form, memory, table = in_places(experts, ids, 1)
    with torch.no_grad():
        found = ExpertArithmetic(experts.to(DEVICE), form, memory).output(x.to(DEVICE), weights.to(DEVICE), table).cpu()
    assert (found == expected).float().mean() > 0.97


@pytest.mark.parametrize("marks", [(False, False, False), (False, True, False)])
def test_experts_wider_than_a_tile(marks: tuple[bool, bool, bool]) -> None:
    torch.manual_seed(0)
    experts = Experts(2, 700, 530, torch.float32, "silu" if not any(marks) else "relu", marks)
    ids, x, weights = torch.tensor([[1]]), torch.randn(1, 700) / 10, torch.rand(1, 1)
    expected, largest = expected_output(experts, x, ids, weights)
    form, memory, table = in_places(experts, ids, 0)
    with torch.no_grad():
        found = ExpertArithmetic(experts.to(DEVICE), form, memory).output(x.to(DEVICE), weights.to(DEVICE), table).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("limit", [1.0, 10.0, 16.0, 100.0])
@pytest.mark.parametrize("inner", [8, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_clamped_gate_is_not_taken_for_a_plain_one(dtype: torch.dtype, inner: int, limit: float) -> None:
    experts = Experts(1, 8, inner, dtype, "silu", (False, False, False))
    form, memory, _ = in_places(experts, torch.zeros(1, 1, dtype=torch.int64), 0)
    assert ExpertArithmetic(experts.to(DEVICE), form, memory)._is_silu
    experts._apply_gate = functools.partial(clamped, limit=limit)
    assert not ExpertArithmetic(experts, form, memory)._is_silu


@pytest.mark.parametrize("type", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_experts_of_transformers(type: str) -> None:
    """Plain ones; transposed with biases and a gate of their own; without a gate."""
    model = supported_model(type).float()
    layer = find_moe_layers(model)[0]
    experts, generator = layer.experts, torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    ids = torch.rand(3, layer.num_experts, generator=generator).topk(layer.top_k).indices
    form, memory, table = in_places(experts, ids, 1)
    inputs = form.places["down_proj"].shape[-1 if experts.is_transposed else 0]  # the experts are as wide on both sides
    x, weights = torch.randn(3, inputs, generator=generator), torch.rand(3, layer.top_k, generator=generator)
    expected, largest = expected_output(experts, x, ids, weights)
    with torch.no_grad():
        found = ExpertArithmetic(experts.to(DEVICE), form, memory).output(x.to(DEVICE), weights.to(DEVICE), table).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * largest)


@st.composite
def quantized_layers(draw: st.DrawFn) -> Layer:
    layer = draw(layers())
    sizes = st.sampled_from([64, 128, 192])
    return layer._replace(hidden=draw(sizes), inner=draw(sizes))


def in_quantized_places(
    experts: nn.Module, quantize: Quantization | Shipped, ids: torch.Tensor, extra: int
) -> tuple[QuantizedFormat, torch.Tensor, torch.Tensor]:
    """As `in_places`, with other weights: such that quantised ones are numbers whose sums are exact. `experts` gets them."""
    form = QUANTIZED[quantize].of(FullFormat.of(experts), bool(experts.is_transposed))
    count = len(experts.get_parameter("down_proj"))
    places = torch.randperm(count + 2)
    memory = torch.full((count + 2, form.bytes), 255, dtype=torch.uint8)
    blocks = torch.zeros(count, form.bytes, dtype=torch.uint8)
    is_int4 = quantize is Quantization.INT4
    for name, view in form.views(blocks).items():
        if name.endswith("_bias"):
            view.copy_(experts.get_parameter(name).detach())
        elif quantize is Shipped.MXFP4:  # all numbers, and scales of 1 and 2
            view.copy_(
                torch.randint(127, 129, view.shape) if name.endswith("_scales") else torch.randint(256, view.shape)
            )
        elif view.dtype == torch.float8_e4m3fn:
            view.copy_(torch.randint(-6, 7, view.shape) / 2)
        elif name.endswith("_scales"):
            view.copy_((torch.randint(-1, 2, view.shape) if is_int4 else torch.ones(view.shape)) / 16)
        else:
            view.copy_(torch.randint(256, view.shape) if is_int4 else torch.randint(-3, 4, view.shape))
    for name, values in form.read(blocks).items():
        experts.get_parameter(name).data = values
    memory[places[:count]] = blocks
    table = torch.cat([places[ids], places[count:][torch.randint(2, (len(ids), extra))]], dim=1)
    return form, memory.to(DEVICE), table.to(DEVICE, torch.int32)


@pytest.mark.parametrize("quantize", KERNELS)
@settings(max_examples=CASES // 10)  # they are larger, and so slower
@given(
    layer=quantized_layers(),
    tokens=st.integers(1, 2),
    k=st.integers(1, 2),
    extra=st.integers(0, 2),
    weights_dtype=st.sampled_from(DTYPES),
    groups=st.sampled_from([1, 4]),
    seed=st.integers(0, 2**16),
)
def test_quantized_experts_compute_what_torch_computes_of_widened_ones(
    layer: Layer,
    quantize: Quantization | Shipped,
    tokens: int,
    k: int,
    extra: int,
    weights_dtype: torch.dtype,
    groups: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    if quantize is Shipped.FP8:  # in blocks of 128 by 128
        hidden, inner = (256 if size == 192 else size for size in (layer.hidden, layer.inner))
        layer = layer._replace(hidden=hidden, inner=inner)
    experts = Experts(*layer)
    ids = torch.randint(layer.count, (tokens, k))
    x = integers(tokens, layer.hidden + 1).to(layer.dtype)[:, 1:]
    weights = (torch.randint(1, 9, (tokens, k + 1)) / 8).to(weights_dtype)[:, :k]
    form, memory, table = in_quantized_places(experts, quantize, ids, extra)
    expected, largest = expected_output(experts, x, ids, weights)
    assume(
        expected.isfinite().all()
    )  # float16 may overflow, and then it depends on the order of a sum what is not a number
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(quantized, "GROUPS", groups)
        found = (
            QuantizedArithmetic(experts.to(DEVICE), form, memory).output(x.to(DEVICE), weights.to(DEVICE), table).cpu()
        )
    assert found.dtype == layer.dtype
    if layer.gate in ("silu", "clamped"):  # the exponential may differ in its last bit, and then sums are not exact
        step = max(4 * torch.finfo(layer.dtype).eps, 256 * torch.finfo(torch.float32).eps)
        torch.testing.assert_close(found, expected, rtol=step, atol=step * largest)
    else:
        assert torch.equal(found, expected)
