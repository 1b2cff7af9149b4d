"""Experts of a packed file that stand in host memory: all of them, or those that are asked for most."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from tqdm import tqdm

from .errors import OffloadError
from .store import Bytes, ExpertStore, MemoryStore, empty_blocks

LOADING_THREADS = 4
HALVED_AFTER = 8
"""Counts of how often an expert was asked for are halved when on average each expert was asked for so often."""


def tiered(store: ExpertStore, host_memory: int, device: torch.device) -> ExpertStore:
    """The experts of `store` with up to `host_memory` bytes of them in host memory. Who closes `store` closes it afterwards.

    Raises `OffloadError` where not even one expert fits.
    """
    (layers, experts), size = store.extent, store.format.bytes
    places = host_memory // size
    if places < 1:
        raise OffloadError(
            f"{host_memory:,} bytes of host memory hold no expert of {size:,} bytes; give more host_memory, or leave it out"
        )
    return LoadedStore(store, device) if places >= layers * experts else TieredStore(store, places)


class LoadedStore(MemoryStore):
    """All experts of another store, in host memory."""

    def __init__(self, store: ExpertStore, device: torch.device):
        super().__init__(store.format, store.extent, device)
        layers, experts = store.extent
        bar = tqdm(total=layers * experts, unit=" experts", desc="host memory", leave=False, disable=None)
        try:
            with bar, ThreadPoolExecutor(LOADING_THREADS) as pool:
                for layer in range(layers):
                    blocks = empty_blocks(experts, self.format.bytes, torch.device("cpu"))
                    rows = blocks.numpy()

                    def read(expert: int, layer: int = layer, rows: Bytes = rows) -> None:
                        store.read(layer, expert, rows[expert])
                        bar.update()

                    list(pool.map(read, range(experts)))
                    self._add(blocks)
        except BaseException:
            self.close()
            raise


class TieredStore:
    """An `ExpertStore` that keeps some blocks of another store in host memory: those that were read most, lately.

    A block that is read takes the place of one that was read less. So a prompt, which reads each block once, drives nobody out.
    """

    def __init__(self, store: ExpertStore, places: int):
        self.format, self.extent = store.format, store.extent
        layers, self._experts = store.extent
        self._store = store
        self._blocks = empty_blocks(places, store.format.bytes, torch.device("cpu"))
        self._rows: list[Bytes] = list(self._blocks.numpy())
        self._lock = threading.Lock()
        self._counts = np.zeros(layers * self._experts)
        self._reads = 0
        self._owners = np.full(places, -1)
        self._place_of: dict[int, int] = {}
        self._used = np.zeros(places, dtype=np.int64)
        """How many threads read or write each block now."""

    def read(self, layer: int, expert: int, into: Bytes) -> None:
        """See `ExpertStore.read`."""
        key = layer * self._experts + expert
        with self._found(key) as place:
            if place is not None:
                np.copyto(into, self._rows[place])
                return
        self._store.read(layer, expert, into)
        with self._made(key) as place:
            if place is not None:
                np.copyto(self._rows[place], into)

    @contextmanager
    def _found(self, key: int) -> Iterator[int | None]:
        """Counts a read. The place of the block, which stays meanwhile, or None."""
        with self._lock:
            self._counts[key] += 1
            self._reads += 1
            if self._reads >= HALVED_AFTER * len(self._counts):
                self._reads = 0
                self._counts *= 0.5
            place = self._place_of.get(key)
            if place is not None:
                self._used[place] += 1
        yield place
        if place is not None:
            with self._lock:
                self._used[place] -= 1

    @contextmanager
    def _made(self, key: int) -> Iterator[int | None]:
        """A place that the block may be written to, which has its key afterwards; None if those that have one were read as often."""
        with self._lock:
            # Empty places first.
            worth = np.where(self._owners < 0, -1.0, self._counts[self._owners])
            worth[self._used > 0] = np.inf
            place = int(worth.argmin())
            if key in self._place_of or worth[place] >= self._counts[key]:
                place = -1
            else:
                self._place_of.pop(int(self._owners[place]), None)
                self._owners[place] = -1
                self._used[place] += 1
        yield None if place < 0 else place
        if place >= 0:
            with self._lock:
                self._used[place] -= 1
                if key not in self._place_of:  # another thread may have been faster
                    self._owners[place], self._place_of[key] = key, place

    def close(self) -> None:
        self._rows.clear()
        self._blocks = torch.empty(0)
        self._place_of.clear()
