"""Copies into slots: whole, in order, and with their errors told."""

from __future__ import annotations

import pytest
import torch
from conftest import build_model
from hypothesis import given, settings
from hypothesis import strategies as st

from predictors.discovery import find_moe_layers
from runtime.store import ExpertStore
from runtime.transfer import make_transfers

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@given(
    starts=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.booleans()), max_size=30),
    readers=st.integers(1, 3),
)
@settings(deadline=None, max_examples=40)
def test_a_slot_holds_what_was_last_started(device: str, starts: list[tuple[int, int, bool]], readers: int) -> None:
    blocks = torch.arange(10.0).repeat_interleave(5000).view(10, 5000)
    transfers = make_transfers(torch.full((3, 5000), -1.0, device=device), readers)
    last: dict[int, int] = {}
    for slot, block, wait in starts:
        transfers.start(slot, blocks[block])
        last[slot] = block
        if wait:
            transfers.wait(slot)
            assert (transfers.slots[slot] == block).all()
            transfers.computed(slot)
    for slot, block in last.items():
        transfers.wait(slot)
        assert (transfers.slots[slot] == block).all()
    assert transfers.stalled_seconds() >= 0
    transfers.close()


def test_a_copy_that_fails_says_so_when_it_is_waited_for() -> None:
    transfers = make_transfers(torch.zeros(2, 4), readers=1)
    transfers.start(0, torch.zeros(3))  # does not fit the slot
    transfers.start(1, torch.ones(4))
    transfers.wait(1)
    with pytest.raises(RuntimeError, match="size"):
        transfers.wait(0)
    transfers.start(0, torch.ones(4))
    transfers.wait(0)
    assert (transfers.slots == 1).all()
    transfers.close()


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_store_keeps_every_weight_and_gives_it_back(architecture: str, dtype: torch.dtype) -> None:
    layers = find_moe_layers(build_model(architecture).to(dtype))
    before = [{n: p.detach().clone() for n, p in layer.experts.named_parameters(recurse=False)} for layer in layers]
    store = ExpertStore(layers, pinned=False)
    for number, weights in enumerate(before):
        for expert in range(8):
            block = store.block(number, expert)
            assert block.is_contiguous()
            assert block.data_ptr() % 64 == 0
            views = store.layout.views(block)
            assert views.keys() == weights.keys()
            assert all(torch.equal(views[name], weights[name][expert]) for name in weights)
    store.restore()
    for layer, weights in zip(layers, before, strict=True):
        for name, parameter in layer.experts.named_parameters(recurse=False):
            assert torch.equal(parameter, weights[name])
            assert parameter.is_contiguous()
