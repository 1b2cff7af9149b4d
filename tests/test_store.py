"""Experts in host memory: every weight kept, aligned, and given back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import build_model
from predict_train.predictors.discovery import find_moe_layers
from predict_train.runtime.errors import StoreError
from predict_train.runtime.formats import PAGE
from predict_train.runtime.host.cache import Eviction
from predict_train.runtime.host.slots import ExpertSlots
from predict_train.runtime.store import HostStore, empty_blocks


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_store_keeps_every_weight_and_gives_it_back(architecture: str, dtype: torch.dtype) -> None:
    layers = find_moe_layers(build_model(architecture).to(dtype))
    before = [{n: p.detach().clone() for n, p in layer.experts.named_parameters(recurse=False)} for layer in layers]
    store = HostStore(layers, torch.device("cpu"))
    (slot,) = empty_blocks(1, store.format.bytes, torch.device("cpu"))
    assert slot.data_ptr() % PAGE == 0
    assert store.format.bytes % PAGE == 0
    for number, weights in enumerate(before):
        for expert in range(8):
            store.read(number, expert, slot.numpy())
            assert torch.equal(slot, store.block(number, expert))
            views = store.format.views(slot)
            assert views.keys() == weights.keys()
            assert all(torch.equal(views[name], weights[name][expert]) for name in weights)
            assert all(view.data_ptr() % 64 == 0 for view in views.values())
    store.close()
    for layer, weights in zip(layers, before, strict=True):
        for name, parameter in layer.experts.named_parameters(recurse=False):
            assert torch.equal(parameter, weights[name])
            assert parameter.is_contiguous()


def test_a_store_without_memory_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("qwen3_moe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers, calls = find_moe_layers(model), []

    def scarce(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 3:
            raise StoreError("there is no memory left")
        return empty_blocks(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("predict_train.runtime.store.empty_blocks", scarce)
    with pytest.raises(StoreError, match="no memory left"):
        HostStore(layers, torch.device("cpu"))
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) and after[name].is_contiguous() for name in before)


def test_more_memory_than_there_is_is_refused_in_a_sentence() -> None:
    size = HostStore(find_moe_layers(build_model("qwen3_moe")), torch.device("cpu")).format.bytes
    with pytest.raises(StoreError, match="GiB, which cpu has not left; ask for fewer"):
        empty_blocks(1 << 48, size, torch.device("cpu"))


needs_smaps = pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="only Linux says of what pages memory is"
)


def mapping_of(blocks: torch.Tensor) -> str:
    """What Linux says of the memory that the blocks lie in."""
    mappings = re.split(r"^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)[1:]
    bounds = [[int(bound, 16) for bound in mapping.split(maxsplit=1)[0].split("-")] for mapping in mappings]
    (found,) = (m for m, (begin, end) in zip(mappings, bounds, strict=True) if begin <= blocks.data_ptr() < end)
    return found


@needs_smaps
def test_slots_are_huge_pages_where_the_system_has_them() -> None:
    size = HostStore(find_moe_layers(build_model("qwen3_moe")), torch.device("cpu")).format.bytes
    mapping = mapping_of(empty_blocks(1 + (1 << 22) // size, size, torch.device("cpu")))
    if "THPeligible" not in mapping:
        pytest.skip("this kernel knows no transparent huge pages")
    assert " hg" in mapping.split("VmFlags:")[1]


@needs_smaps
def test_slots_have_their_memory_before_the_first_token() -> None:
    store = HostStore(find_moe_layers(build_model("qwen3_moe")), torch.device("cpu"))
    slots = ExpertSlots(store, 200, torch.device("cpu"), readers=1, eviction=Eviction.LRU)
    present = re.search(r"^Rss: +(\d+) kB", mapping_of(slots.transfers.slots), flags=re.MULTILINE)
    slots.close()
    assert present is not None
    assert 1024 * int(present[1]) >= 200 * store.format.bytes
