"""Loading a model with its experts where they are to be: in host memory, or in a packed file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..predictors.checkpoint import Predictors, load_predictors
from ..predictors.discovery import find_moe_layers
from ..predictors.experts import expert_modules
from ..predictors.loading import load_model, resolve_device
from .offload import OffloadError, offload_experts
from .pack import draw_experts, experts_ignored, load_and_pack, random_without_experts
from .packfile import PackedStore, read_header
from .store import as_bytes, common_layout, empty_blocks

STORES = ("auto", "host", "file")


def load_offloaded(
    model: str | Path | PretrainedConfig,
    predictors: Predictors | str | Path | None = None,
    *,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "auto",
    store: str = "auto",
    pack: str | Path | None = None,
    expert_memory: int | str | None = None,
    slots: int | None = None,
    seed: int = 0,
    **arguments: Any,
) -> PreTrainedModel:
    """Loads a model with its experts offloaded, so that the whole of it is never on the device, nor twice in memory.

    Args:
        model: folder or Hub name; or a config, for a model with random weights.
        predictors: what `load_predictors` returned or loads.
        device: where the model computes; `auto` is CUDA where there is one.
        dtype: of the model; `auto` is that of the packed file, if there is one, and else the checkpoint's own.
        store: `host` keeps the experts in host memory, `file` leaves them in the packed file; `auto` is `file` where
            `pack` is given.
        pack: the packed file; it is made where there is none.
        expert_memory: bytes of the device for experts, like `8GiB`; or the number of them, in `slots`.
        seed: of random weights.
        arguments: whatever else `offload_experts` takes.

    After `model.expert_offload.detach()` a model with its experts in host memory is an ordinary model. One with a packed
    file has no experts then: it can be offloaded again or be given them by `load_experts`, and says so when it is run.

    Raises `OffloadError`, `StoreError`, `LoadingError`, `UnsupportedModelError` or `PredictorsError`.
    """
    where = resolve_device(str(device))
    if store not in STORES:
        raise OffloadError(f"there is no store {store}; give {', '.join(STORES)}")
    if store == "file" and pack is None:
        raise OffloadError("the store is a file, and none is named; give pack=PATH, which is made if it does not exist")
    if store == "host" and pack is not None:
        raise OffloadError("a packed file is named, and the store is host memory; give one of pack=PATH and store=host")
    if expert_memory is not None and slots is not None:
        raise OffloadError("expert_memory and slots say the same; give one of them")
    loaded = _load_host(model, dtype, seed) if pack is None else _load_file(model, Path(pack), dtype, seed)
    if expert_memory is not None:
        slots = _slots(loaded, expert_memory)
    if predictors is not None and not isinstance(predictors, Predictors):
        predictors = load_predictors(predictors)
    return offload_experts(loaded, predictors, device=where, slots=slots, **arguments)


def _load_host(model: str | Path | PretrainedConfig, dtype: torch.dtype | str, seed: int) -> PreTrainedModel:
    if not isinstance(model, PretrainedConfig):
        return load_model(model, torch.device("cpu"), dtype)
    loaded = random_without_experts(model, dtype, seed)
    draw_experts(loaded, lambda module, name, values: setattr(module, name, nn.Parameter(values)), seed)
    return loaded


def _load_file(
    model: str | Path | PretrainedConfig, pack: Path, dtype: torch.dtype | str, seed: int
) -> PreTrainedModel:
    if not pack.exists():
        loaded, _ = load_and_pack(model, pack, dtype, seed)
    else:
        if dtype == "auto":
            dtype = read_header(pack).layout().dtype
        if isinstance(model, PretrainedConfig):
            loaded = random_without_experts(model, dtype, seed)
        else:
            with experts_ignored():
                loaded = load_model(model, torch.device("cpu"), dtype)
    vars(loaded)["expert_pack"] = pack
    for experts in expert_modules(loaded).values():
        experts.forward = _refuse(pack)
    return loaded


def _refuse(pack: Path) -> Any:
    def forward(*_: Any, **__: Any) -> torch.Tensor:
        raise OffloadError(
            f"the experts of this model are in {pack}; offload it again (offload_experts) or load them (load_experts)"
        )

    return forward


def _slots(model: PreTrainedModel, memory: int | str) -> int:
    try:
        available = int(TypeAdapter(ByteSize).validate_python(memory))
    except ValidationError as error:
        raise OffloadError(f"{memory} is no amount of memory; give one like 8GiB") from error
    layers = find_moe_layers(model)
    size = common_layout([layer.experts for layer in layers]).bytes
    if available < layers[0].top_k * size:
        raise OffloadError(
            f"{memory} hold {available // size} experts of {size:,} bytes, and one layer needs {layers[0].top_k} at a "
            "time; give more expert_memory"
        )
    return min(available // size, sum(layer.num_experts for layer in layers))


def load_experts(model: PreTrainedModel) -> None:
    """Reads the experts of a detached model from its packed file into memory, after which it is an ordinary model.

    They go where their router is. Raises `OffloadError` for a model that is offloaded or has no packed file, and
    `StoreError` where the file can't be read; the model is then as it was.
    """
    if getattr(model, "expert_offload", None) is not None:
        raise OffloadError("the model's experts are offloaded; detach it first: model.expert_offload.detach()")
    pack: Path | None = getattr(model, "expert_pack", None)
    if pack is None:
        raise OffloadError("this model was not loaded with a packed file; its experts are in memory")
    layers = find_moe_layers(model)
    store = PackedStore(pack)
    try:
        store.check(model, layers)
        loaded = []
        for number, layer in enumerate(layers):
            block = empty_blocks(1, store.layout, torch.device("cpu"))
            (views,) = [store.layout.views(block[0])]
            stacked = {
                name: torch.empty(layer.num_experts, *view.shape, dtype=view.dtype) for name, view in views.items()
            }
            for expert in range(layer.num_experts):
                store.read(number, expert, as_bytes(block)[0])
                for name, view in views.items():
                    stacked[name][expert] = view
            device = next(layer.router.parameters()).device
            loaded.append({name: values.to(device) for name, values in stacked.items()})
    finally:
        store.close()
    for layer, weights in zip(layers, loaded, strict=True):
        for name, values in weights.items():
            setattr(layer.experts, name, nn.Parameter(values, requires_grad=getattr(layer.experts, name).requires_grad))
        vars(layer.experts).pop("forward")
    vars(model).pop("expert_pack")
