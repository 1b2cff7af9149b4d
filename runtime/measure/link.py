"""Measures how fast the link from the store to the device is."""

from __future__ import annotations

import time

import torch

from ..host.transfer import make_transfers
from ..store import ExpertStore, empty_blocks


def measure_link(store: ExpertStore, device: torch.device, readers: int, seconds: float = 0.5) -> float:
    """Bytes per second from `store` to `device` with the runtime's own transfers, while nothing computes.

    They copy for about `seconds`, through a few slots. The experts come from all parts of the store.
    """
    count = 4 * readers
    transfers = make_transfers(store, empty_blocks(count, store.format.bytes, device), readers)
    layers, experts = store.extent
    keys = [((7 * n) % layers, (13 * n) % experts) for n in range(1 << 16)]
    try:
        made, begun = 0, 0.0
        for n, key in enumerate(keys):
            slot = n % count
            if n >= count:
                transfers.wait(slot)
                transfers.computed(slot)
                made += 1
            if n == 2 * count:  # the first ones warm up
                begun, made = time.perf_counter(), 0
            if begun and time.perf_counter() - begun > seconds:
                break
            transfers.start(slot, key, urgent=False)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return made * store.format.bytes / (time.perf_counter() - begun)
    finally:
        transfers.abandon()
        transfers.close()
