"""Experts of a packed file that stand in host memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from predict_train.runtime.errors import OffloadError, StoreError
from predict_train.runtime.load import load_offloaded
from predict_train.runtime.pack import pack
from predict_train.runtime.packfile import PackedStore
from predict_train.runtime.store import MemoryStore, empty_blocks
from predict_train.runtime.tiers import TieredStore, tiered

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def packed(tiny_moe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tiny_moe_folder, tmp_path_factory.mktemp("packs") / "experts")


class Numbered:
    """A store whose blocks hold their own numbers; it counts what is read."""

    def __init__(self, layers: int, experts: int, size: int = 4096):
        self.format: Any = type("Format", (), {"bytes": size})()
        self.extent = layers, experts
        self.reads: list[tuple[int, int]] = []

    def read(self, layer: int, expert: int, into: np.ndarray) -> None:
        self.reads.append((layer, expert))
        into[:] = self.number(layer, expert)

    def number(self, layer: int, expert: int) -> int:
        return (layer * self.extent[1] + expert) % 251

    def close(self) -> None:
        pass


@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), max_size=80))
def test_every_block_is_its_own_however_few_places(places: int, asked: list[tuple[int, int]]) -> None:
    under = Numbered(3, 5)
    tier, into = TieredStore(under, places), empty_blocks(1, 4096, CPU).numpy()[0]
    for key in asked:
        into[:] = 255
        tier.read(*key, into)
        assert (into == under.number(*key)).all()
    distinct = set(asked)
    if len(distinct) <= places:  # each was read once
        assert sorted(under.reads) == sorted(distinct)
    tier.close()


def test_those_that_are_asked_for_most_stay():
    """A pass through all blocks drives nobody out."""
    under = Numbered(1, 40)
    tier, into = TieredStore(under, 4), empty_blocks(1, 4096, CPU).numpy()[0]
    often = [0, 7, 14, 21]
    for _ in range(5):
        for expert in often:
            tier.read(0, expert, into)
    for expert in range(40):
        tier.read(0, expert, into)
    under.reads.clear()
    for expert in often:
        tier.read(0, expert, into)
    assert under.reads == []
    for _ in range(400):  # others are asked for from now on
        for expert in (1, 2, 3, 4):
            tier.read(0, expert, into)
    under.reads.clear()
    for expert in (1, 2, 3, 4):
        tier.read(0, expert, into)
    assert under.reads == []


def test_threads_do_not_see_each_others_blocks():
    under = Numbered(4, 16)
    tier = TieredStore(under, 9)

    def work(seed: int) -> bool:
        draw, into = np.random.default_rng(seed), empty_blocks(1, 4096, CPU).numpy()[0]
        for _ in range(1500):
            key = int(draw.integers(4)), int(min(draw.geometric(0.2), 15))
            tier.read(*key, into)
            if not (into == under.number(*key)).all():
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@torch.inference_mode()
def test_tokens_are_the_same_and_fewer_bytes_are_read(tiny_moe_folder, tiny_moe, packed, share, monkeypatch):
    whole = 32 * PackedStore(packed).format.bytes
    reads: list[int] = []
    read = PackedStore.read
    monkeypatch.setattr(PackedStore, "read", lambda self, *a: (reads.append(1), read(self, *a))[1])
    ids = torch.arange(1, 30).unsqueeze(0)
    expected = tiny_moe.generate(ids, max_new_tokens=40, do_sample=False)
    model = load_offloaded(tiny_moe_folder, pack=packed, host_memory=int(share * whole), slots=8, device="cpu",
                           dtype="float32")  # fmt: skip
    is_loaded = isinstance(model.expert_offload.store, MemoryStore)
    assert is_loaded == (share == 1)
    loading = len(reads)
    assert loading == (32 if is_loaded else 0)
    assert torch.equal(model.generate(ids, max_new_tokens=40, do_sample=False), expected)
    copies = model.expert_offload.counters.copies
    assert len(reads) - loading < copies
    if is_loaded:
        assert len(reads) == 32
    model.expert_offload.detach()


def test_what_can_not_be_is_refused(tiny_moe_folder, packed):
    with pytest.raises(OffloadError, match="hold no expert of 8,192 bytes; give more host_memory"):
        load_offloaded(tiny_moe_folder, pack=packed, host_memory=5000, device="cpu")
    with pytest.raises(OffloadError, match="host_memory is for those of a packed file"):
        load_offloaded(tiny_moe_folder, host_memory=1 << 20, device="cpu")


@pytest.mark.parametrize("places", [10, 32])
def test_a_broken_file_is_told(packed, places, tmp_path):
    data = bytearray(packed.read_bytes())
    data[3 * 8192 + 100] ^= 1
    (tmp_path / "broken").write_bytes(data)
    store, into = PackedStore(tmp_path / "broken"), empty_blocks(1, 8192, CPU).numpy()[0]

    def read_all() -> None:
        tier = tiered(store, places * 8192, CPU)
        for expert in range(8):
            tier.read(0, expert, into)

    with pytest.raises(StoreError, match="is not what was packed"):
        read_all()
    store.close()
