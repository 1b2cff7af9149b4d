"""The way from the store to the device, measured: a store that many offloads share, and how fast it is."""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedModel

from ...predictors.architecture import MoELayer
from ..host.transfer import make_transfers
from ..packfile import PackedStore
from ..store import ExpertStore, HostStore, empty_blocks


class KeptHostStore(HostStore):
    """A store that outlives the offloads that use it, each of which believes it its own. `release` ends it."""

    def restore(self) -> None:
        pass

    def close(self) -> None:
        pass

    def release(self) -> None:
        super().restore()
        super().close()


class KeptPackedStore(PackedStore):
    """The same of a packed file."""

    def close(self) -> None:
        pass

    def release(self) -> None:
        super().close()


def kept_store(model: PreTrainedModel, layers: list[MoELayer], device: torch.device) -> KeptHostStore | KeptPackedStore:
    """The store of a model's experts: the packed file that it was loaded with, or its own weights, taken into blocks.

    Raises what `PackedStore` and `HostStore` raise.
    """
    pack = vars(model).get("expert_pack")
    if pack is None:
        return KeptHostStore(layers, pinned=device.type == "cuda")
    store = KeptPackedStore(pack)
    store.check(model, layers)
    return store


def measure_link(store: ExpertStore, device: torch.device, readers: int, seconds: float = 0.5) -> float:
    """Bytes per second that the runtime's own transfers reach from `store` to `device`, while nothing computes.

    They copy for about `seconds`, through a few slots, experts from all over the store.
    """
    count = 4 * readers
    transfers = make_transfers(store, empty_blocks(count, store.layout, device), readers)
    layers, experts = _extent(store)
    keys = [((7 * n) % layers, (13 * n) % experts) for n in range(1 << 16)]
    try:
        made, begun = 0, 0.0
        for n, key in enumerate(keys):
            slot = n % count
            if n >= count:
                transfers.wait(slot)
                transfers.computed(slot)
                made += 1
            if n == 2 * count:  # the first ones verify checksums and warm up
                begun, made = time.perf_counter(), 0
            if begun and time.perf_counter() - begun > seconds:
                break
            transfers.start(slot, key, urgent=False)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return made * store.layout.bytes / (time.perf_counter() - begun)
    finally:
        transfers.abandon()
        transfers.close()


def _extent(store: ExpertStore) -> tuple[int, int]:
    """Layers, and experts of each."""
    if isinstance(store, PackedStore):
        return len(store.header.layers), store.header.num_experts
    assert isinstance(store, HostStore)
    return len(store.blocks), len(store.blocks[0])
