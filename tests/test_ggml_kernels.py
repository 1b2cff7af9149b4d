"""The kernels over GGUF's types against torch. Without a GPU they run in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from predict_train.predictors.discovery import find_moe_layers
from predict_train.runtime import offloaded
from predict_train.runtime.device import gguf as device
from predict_train.runtime.device.gguf import GgufArithmetic
from predict_train.runtime.device.slots import DeviceSlots
from predict_train.runtime.engines import hindrance_of
from predict_train.runtime.formats.full import FullFormat
from predict_train.runtime.formats.ggml import TYPES, kept_kind
from predict_train.runtime.formats.gguf import HEAD, GgufFormat, Part, head_of
from predict_train.runtime.load import load_to_host
from predict_train.runtime.settings import Loading
from predict_train.runtime.store import QuantizedStore
from test_arithmetic import CASES, DTYPES, Experts, expected_output, rounding_to_bfloat16
from test_device import DEVICE, IDS, deciding, decode
from test_gguf import MIXED, Kind, made, packed, write
from test_shipped import exact_on_a_gpu

mended = rounding_to_bfloat16  # a fixture
PLAINLY = (False, False, False)


class Layer(NamedTuple):
    """The types and sizes of one layer's experts."""

    kinds: tuple[str, str, str]
    """Of the gate, of the other half and of the last weight."""
    hidden: int
    inner: int
    dtype: torch.dtype
    in_dtype: bool
    gate: str


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    small = [name for name, kind in TYPES.items() if kind.weights == 32]
    hidden, inner = draw(st.sampled_from([(96, 32), (256, 32), (512, 32), (256, 96), (32, 256)]))
    first, last = (st.sampled_from(small if size % 256 else list(TYPES)) for size in (hidden, inner))
    kinds, gate = draw(st.tuples(first, first, last)), draw(st.sampled_from(["silu", "relu"]))
    return Layer(kinds, hidden, inner, draw(st.sampled_from(DTYPES)), draw(st.booleans()), gate)


def values_of(kinds: tuple[str, ...], count: int, shape: tuple[int, int], in_dtype: bool, room: int) -> torch.Tensor:
    """A weight of `count` experts as it is loaded: parts of these types, each of this shape, and bytes that nobody reads."""
    found, parts = [], []
    for name in kinds:
        rows = np.random.default_rng(torch.randint(2**16, ()).item()).normal(0, 0.3, (count, *shape))
        raw = torch.from_numpy(packed(rows, Kind[name])).view(torch.uint8).reshape(count, -1)
        # Codes may be drawn with one seed, and a gate shall differ from its other half.
        found.append(torch.stack([raw[expert] for expert in torch.randperm(count)]))
        parts.append(Part(int(Kind[name]), *shape, raw.shape[1], int(in_dtype)))
    told = head_of(parts).view(torch.uint8).expand(count, -1)
    filled = torch.cat([told, *found], dim=1)
    return F.pad(filled, (0, 4 * HEAD + room - filled.shape[1]), value=255)


def experts_of(layer: Layer, count: int) -> tuple[Experts, GgufFormat, torch.Tensor]:
    """Experts with the widened weights, and their blocks `[count, bytes]`."""
    experts = Experts(count, layer.hidden, layer.inner, layer.dtype, layer.gate, PLAINLY)
    shapes = {"gate_up_proj": (layer.inner, layer.hidden), "down_proj": (layer.hidden, layer.inner)}
    split = {"gate_up_proj": layer.kinds[:2], "down_proj": layer.kinds[2:]}
    rooms = {
        name: sum(TYPES[kind].bytes * shapes[name][0] * shapes[name][1] // TYPES[kind].weights for kind in kinds) + 64
        for name, kinds in split.items()
    }
    form = GgufFormat.of(FullFormat.of(experts), False, rooms)
    blocks = torch.full((count, form.bytes), 255, dtype=torch.uint8)
    for name, kinds in split.items():
        form.write(name, values_of(kinds, count, shapes[name], layer.in_dtype, rooms[name]), blocks)
    for name, values in form.read(blocks).items():
        experts.get_parameter(name).data = values
    return experts, form, blocks


def placed(blocks: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A memory with the blocks at random places, and all bits set elsewhere; and the table for `ids`, wider by one column."""
    places = torch.randperm(len(blocks) + 1)
    memory = torch.full((len(places), blocks.shape[1]), 255, dtype=torch.uint8)
    memory[places[:-1]] = blocks
    table = torch.cat([places[ids], places[-1:].expand(len(ids), 1)], dim=1)
    return memory.to(DEVICE), table.to(DEVICE, torch.int32)


@contextmanager
def tiles(rows: int, columns: int) -> Iterator[None]:
    """The fewer programs, the quicker is the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "ROWS", rows)
        patch.setattr(device, "COLUMNS", columns)
        yield


@settings(max_examples=CASES // 6)
@given(layer=layers(), k=st.integers(1, 2), tile=st.sampled_from([(64, 256), (128, 64)]), seed=st.integers(0, 2**16))
def test_products_are_those_of_the_weights_that_the_host_widens(
    layer: Layer, k: int, tile: tuple[int, int], seed: int
) -> None:
    """With an input of one 1 a product is a weight, bit for bit. With any input it is near to that of torch."""
    torch.manual_seed(seed)
    ids = torch.randint(2, (2, k))
    experts, form, blocks = experts_of(layer, 2)
    memory, table = placed(blocks, ids)
    with tiles(*tile), torch.no_grad():
        arithmetic = GgufArithmetic(experts.to(DEVICE), form, memory, blocks[0])
        for name, rows, gated in (("gate_up_proj", 2, layer.gate == "silu"), ("down_proj", 2 * k, False)):
            weight = experts.get_parameter(name).data.cpu()[ids.flatten()]
            x = F.one_hot(torch.randint(weight.shape[2], (rows,)), weight.shape[2]).to(layer.dtype)
            x[-1] = torch.randn(weight.shape[2])
            each = x.repeat_interleave(len(weight) // rows, 0)
            expected = torch.stack([F.linear(own, one) for own, one in zip(each, weight, strict=True)])
            found = arithmetic._multiply(name, x.to(DEVICE), table, k, False).cpu()
            exact = len(weight) - len(weight) // rows
            assert torch.equal(found[:exact], expected[:exact])
            near = (
                8 * torch.finfo(layer.dtype).eps * float((each[-1].float().abs() * weight.abs().float()).sum(-1).max())
            )
            torch.testing.assert_close(found[exact:], expected[exact:], rtol=0, atol=near)
            if gated:
                found = arithmetic._multiply(name, x.to(DEVICE), table, k, True).cpu()
                torch.testing.assert_close(
                    found[:exact], experts._apply_gate(expected)[:exact], rtol=4 * torch.finfo(layer.dtype).eps, atol=0
                )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", ["silu", "clamped"])
def test_experts_compute_what_torch_computes(gate: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    experts, form, blocks = experts_of(Layer(("Q5_K", "Q4_K", "Q6_K"), 256, 256, dtype, True, gate), 3)
    ids, x, weights = torch.tensor([[2, 0]]), torch.randn(1, 256).to(dtype), torch.rand(1, 2).to(dtype)
    expected, largest = expected_output(experts, x, ids, weights)
    memory, table = placed(blocks, ids)
    arithmetic = GgufArithmetic(experts.to(DEVICE), form, memory, blocks[0])
    assert arithmetic._is_silu == (gate == "silu")
    with tiles(256, 256), torch.no_grad():
        found = arithmetic.output(x.to(DEVICE), weights.to(DEVICE), table).cpu()
    near = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=near, atol=near * largest)


TYPES_OF_LAYERS = MIXED | {"blk.1.ffn_down_exps.weight": Kind.Q4_1}
"""A type of its own for each weight of two layers, and each type has a kernel."""


def test_the_device_computes_what_the_host_computes(tmp_path: Path) -> None:
    write(made("qwen3_moe"), tmp_path, TYPES_OF_LAYERS)
    model = load_to_host(tmp_path, Loading(gguf="model.gguf", dtype="float32"))
    found = []
    for by_device in (True, False):
        with (
            deciding(by_device),
            tiles(256, 256),
            offloaded(model, policy="prefetch", slots=8, device=DEVICE) as offload,
        ):
            assert isinstance(offload._engine, DeviceSlots) == by_device
            found.append(decode(model, IDS[:, :4], 3))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4 * float(found[1].abs().max()))


def test_types_without_a_kernel_are_named(tmp_path: Path) -> None:
    """`MIXED` has such a type in its second layer. Rows that can't share bytes have none either."""
    for types, words in ((MIXED, "since the device has no kernels for GGUF's Q3_K"), (TYPES_OF_LAYERS, None)):
        write(made("qwen3_moe"), tmp_path, types)
        model = load_to_host(tmp_path, Loading(gguf="model.gguf", dtype="float32"))
        store = QuantizedStore(vars(model)["expert_blocks"], torch.device("cpu"))
        store.is_registered = True
        found = hindrance_of(store, find_moe_layers(model), 8, torch.device("cuda"))
        assert found == (words and f"the host decides what is copied, {words}")
    assert [kept_kind(Kind.Q5_K, 12), kept_kind(Kind.Q5_K, 16)] == ["Q5_K with 12 rows", None]
    assert [kept_kind(Kind[name], 8) for name in ("F16", "IQ4_XS", "Q8_0")] == ["F16", "IQ4_XS", None]


@pytest.mark.gpu
def test_on_a_gpu_exact_policies_give_the_logits_of_all_experts_resident(tmp_path: Path) -> None:
    write(made("qwen3_moe"), tmp_path, TYPES_OF_LAYERS)
    exact_on_a_gpu(tmp_path, gguf="model.gguf")
