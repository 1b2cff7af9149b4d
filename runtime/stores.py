"""Which store holds a model's experts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..predictors.architecture import ExpertLayer
from .errors import OffloadError, StoreError
from .packfile import PackedStore
from .store import ExpertStore, HostStore, MemoryStore, QuantizedExperts, QuantizedStore
from .tiers import tiered


def open_store(
    attached: ExitStack,
    model: PreTrainedModel,
    layers: Sequence[ExpertLayer],
    store: ExpertStore | str | Path | None,
    device: torch.device,
    host_memory: int | None = None,
) -> ExpertStore:
    """The store that is given. If it is not open yet, it is opened here, and `attached` closes it.

    Of a packed file, up to `host_memory` bytes of experts stand in host memory. Raises `OffloadError` or `StoreError`.
    """
    store = vars(model).get("expert_pack") if store is None else store
    quantized: QuantizedExperts | None = vars(model).get("expert_blocks")
    if store is None and quantized is not None:
        if any(not p.is_meta for layer in layers for p in layer.experts.parameters(recurse=False)):
            raise OffloadError(
                "experts of this model were given weights after it was quantised, and would not be used; load the model again"
            )
        store = QuantizedStore(quantized, device)
        attached.callback(store.close)
    elif store is None:
        if any(p.is_meta for layer in layers for p in layer.experts.parameters(recurse=False)):
            raise OffloadError("the experts of this model are not in memory; name their packed file: store=PATH")
        store = HostStore(layers, device)
        attached.callback(store.close)
    elif isinstance(store, str | Path):
        store = PackedStore(store)
        attached.callback(store.close)
    elif not isinstance(store, ExpertStore):
        raise StoreError(f"something of type {type(store).__name__} is no store; give a packed file or an open store")
    if isinstance(store, PackedStore):
        store.check(model, layers)
    elif isinstance(store, HostStore):
        store.check(layers)
    if host_memory is None:
        return store
    if isinstance(store, MemoryStore):
        raise OffloadError("all experts are in host memory; host_memory is for those of a packed file, so leave it out")
    kept = tiered(store, host_memory, device)
    attached.callback(kept.close)
    return kept
