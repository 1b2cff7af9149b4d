"""How many experts fit on a device: what is free, less weights, keys and values, and a reserve."""

from __future__ import annotations

import resource
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import exit_code
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.generation import CACHE
from predict_train.runtime import room, trial
from predict_train.runtime.errors import OffloadError
from predict_train.runtime.offload import offload_experts
from predict_train.runtime.pack import pack
from predict_train.runtime.packfile import PackedStore
from predict_train.runtime.room import cache_bytes, free_memory, slots_of
from predict_train.runtime.settings import Room
from predict_train.runtime.store import HostStore

CPU = torch.device("cpu")
BIG = 1 << 40


@pytest.fixture(scope="module")
def packed(tiny_moe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tiny_moe_folder, tmp_path_factory.mktemp("packs") / "experts")


@pytest.fixture
def store(packed: Path) -> Any:
    opened = PackedStore(packed)
    yield opened
    opened.close()


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("tokens", [30, 100])
@torch.inference_mode()
def test_the_cache_takes_what_is_said(build_moe, architecture, tokens):
    model = build_moe(architecture)
    cache = model(input_ids=torch.zeros(1, tokens, dtype=torch.int64), use_cache=True)[CACHE]
    held = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    said = cache_bytes(model.config, tokens, torch.float32)
    assert held <= said <= held + 1000  # of layers with a window a few numbers more are kept
    assert cache_bytes(model.config, tokens, torch.bfloat16) == said // 2


@pytest.mark.parametrize("slots", [2, 9, 32])
def test_slots_are_what_is_left(tiny_moe, store, slots, monkeypatch):
    """With a byte less one fewer fits, and never more than there are."""
    layers, size = find_moe_layers(tiny_moe), store.format.bytes
    config = Room(context=50, reserve=1000)
    needed = slots * size + 1000 + cache_bytes(tiny_moe.config, 50, torch.float32)
    monkeypatch.setattr(room, "free_memory", lambda _: needed)
    found = slots_of(config, tiny_moe, layers, store, CPU)
    assert found.number == slots
    assert ("all experts fit" in found.reason) == (slots == 32)
    monkeypatch.setattr(room, "free_memory", lambda _: needed - 1)
    if slots == 2:
        with pytest.raises(OffloadError, match=r"no room for the 2 experts .* give a smaller context or reserve"):
            slots_of(config, tiny_moe, layers, store, CPU)
    else:
        assert slots_of(config, tiny_moe, layers, store, CPU).number == slots - 1
    monkeypatch.setattr(room, "free_memory", lambda _: BIG)
    assert slots_of(config, tiny_moe, layers, store, CPU).number == 32
    assert slots_of(Room(slots=5), tiny_moe, layers, store, CPU).number == 5


def test_in_memory_a_quarter_is_enough(tiny_moe):
    layers = find_moe_layers(tiny_moe)
    held = HostStore(layers, CPU)
    found = slots_of(Room(), tiny_moe, layers, held, CPU)
    assert (found.number, "a quarter" in found.reason) == (8, True)
    held.close()
    model = offload_experts(tiny_moe, device="cpu")
    assert model.expert_offload.slots == 8
    assert model.expert_offload.why_slots == found.reason


def measured_under_limits(told: Path) -> None:
    """The job of a process of its own."""
    free = []
    for limit in (40 << 30, 12 << 30):
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        free.append(free_memory(CPU))
    taken = torch.ones(1 << 26)
    free.append(free_memory(CPU))
    assert taken.all()
    told.write_text(" ".join(map(str, free)))


def test_a_limit_on_the_process_is_known(tmp_path: Path, forkserver: ForkServerContext):
    """What is free falls with the limit, and with what is taken."""
    assert exit_code(forkserver, measured_under_limits, tmp_path / "told") == 0
    before, under, after = map(int, (tmp_path / "told").read_text().split())
    assert under <= min(before, 12 << 30)
    assert under - after >= 1 << 27
    assert 0 < free_memory(CPU) < BIG


def test_a_room_for_nothing_is_refused_before_anything_is_changed(tiny_moe, packed, monkeypatch):
    monkeypatch.setattr(room, "free_memory", lambda _: 100_000)
    state = {name: tensor.clone() for name, tensor in tiny_moe.state_dict().items()}
    with pytest.raises(OffloadError, match="no room"):
        offload_experts(tiny_moe, store=packed, device="cpu")
    assert not hasattr(tiny_moe, "expert_offload")
    assert all(torch.equal(tensor, state[name]) for name, tensor in tiny_moe.state_dict().items())


@pytest.mark.parametrize(("most", "expected"), [(100, 32), (20, 20), (10, 9), (2, 2)])
def test_where_memory_runs_out_there_are_fewer_slots(tiny_moe, packed, monkeypatch, most, expected):
    """As on a GPU, whose lack of memory can be caught."""
    ids = torch.arange(1, 20).unsqueeze(0)
    plain, run = tiny_moe(ids).logits, trial._run

    def run_out(model: Any, tokens: int) -> None:
        run(model, tokens)
        if model.expert_offload.slots > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trial, "_can_run_out", lambda _: True)
    monkeypatch.setattr(trial, "_run", run_out)
    if most < 32:
        with pytest.warns(UserWarning, match="with 32 slots the device ran out of memory in the first tokens"):
            offload_experts(tiny_moe, store=packed, device="cpu", context=30)
    else:
        offload_experts(tiny_moe, store=packed, device="cpu", context=30)
    offload = tiny_moe.expert_offload
    assert (offload.slots, offload.counters.tokens) == (expected, 0)
    assert torch.equal(tiny_moe(ids).logits, plain)


def test_where_nothing_fits_the_model_is_as_it_was(tiny_moe, packed, monkeypatch):
    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trial, "_can_run_out", lambda _: True)
    monkeypatch.setattr(trial, "_run", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        offload_experts(tiny_moe, store=packed, device="cpu")
    assert not hasattr(tiny_moe, "expert_offload")
    assert tiny_moe(torch.arange(1, 20).unsqueeze(0)).logits.isfinite().all()
