"""Which store holds a model's experts, and how many bytes each of them takes there."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..predictors.architecture import MoELayer
from .errors import OffloadError, StoreError
from .formats.full import FullFormat
from .packfile import PackedStore, read_header
from .store import ExpertStore, HostStore, QuantizedExperts, QuantizedStore


def block_bytes(model: PreTrainedModel, layers: list[MoELayer], store: ExpertStore | str | Path | None) -> int:
    """Bytes of one expert's block in the store that `open_store` would open. Raises `StoreError` for what is no store."""
    store = vars(model).get("expert_pack") if store is None else store
    quantized: QuantizedExperts | None = vars(model).get("expert_blocks")
    if isinstance(store, str | Path):
        return read_header(store).block_bytes
    if isinstance(store, ExpertStore):
        return store.format.bytes
    if store is not None:
        raise StoreError(f"something of type {type(store).__name__} is no store; give a packed file or an open store")
    return (FullFormat.common([layer.experts for layer in layers]) if quantized is None else quantized.format).bytes


def open_store(
    attached: ExitStack,
    model: PreTrainedModel,
    layers: list[MoELayer],
    store: ExpertStore | str | Path | None,
    device: torch.device,
) -> ExpertStore:
    """The store that is given. If it is not open yet, it is opened here, and `attached` closes it."""
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
    if isinstance(store, PackedStore):
        store.check(model, layers)
    elif isinstance(store, HostStore):
        store.check(layers)
    return store
