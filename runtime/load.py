"""Loading a model with its experts where they are to be: in host memory, or in a packed file."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..predictors.checkpoint import Predictors
from ..predictors.discovery import find_moe_layers
from ..predictors.experts import expert_modules
from ..predictors.loading import load_model, resolve_device, resolve_dtype
from ..predictors.settings import make
from .errors import OffloadError
from .offload import offload_experts
from .pack import draw_experts, experts_ignored, load_and_pack, random_without_experts
from .packfile import PackedStore, read_header
from .settings import LoadConfig, Loading, OffloadConfig
from .store import empty_blocks


def load_offloaded(
    model: str | Path | PretrainedConfig,
    predictors: Predictors | str | Path | None = None,
    config: LoadConfig | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """Loads a model with its experts offloaded, so that the whole of it is never on the device, nor twice in memory.

    Args:
        model: folder or Hub name; or a config, for a model with random weights.
        predictors: what `load_predictors` returned or loads; without them speculation is training-free.
        config, settings: the fields of `LoadConfig`, as one value or by name, the named ones before those of `config`.

    After `model.expert_offload.detach()` a model with its experts in host memory is an ordinary model. One with a packed
    file has no experts then: it can be offloaded again or be given them by `load_experts`, and says so when it is run.

    Raises `SettingsError`, `OffloadError`, `StoreError`, `LoadingError`, `UnsupportedModelError` or `PredictorsError`.
    """
    chosen = make(LoadConfig, **((config.model_dump() if config is not None else {}) | settings))
    resolve_device(chosen.device)
    loaded = load_to_host(model, chosen)
    return offload_experts(loaded, predictors, make(OffloadConfig, **chosen.values_of(OffloadConfig)))


def load_to_host(model: str | Path | PretrainedConfig, config: Loading) -> PreTrainedModel:
    """A model in host memory that is not offloaded yet, its experts left in the packed file where there is one."""
    dtype = resolve_dtype(config.dtype, torch.device("cuda"))  # which leaves auto to the checkpoint
    if config.pack is None:
        return _load_host(model, dtype, config.seed)
    return _load_file(model, config.pack, dtype, config.seed)


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
            dtype = read_header(pack).format().dtype
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
    loaded = []
    with closing(PackedStore(pack)) as store:
        store.check(model, layers)
        (block,) = empty_blocks(1, store.format.bytes, torch.device("cpu"))
        views = store.format.views(block)
        for number, layer in enumerate(layers):
            stacked = {
                name: torch.empty(layer.num_experts, *view.shape, dtype=view.dtype) for name, view in views.items()
            }
            for expert in range(layer.num_experts):
                store.read(number, expert, block.numpy())
                for name, view in views.items():
                    stacked[name][expert] = view
            device = next(layer.router.parameters()).device
            loaded.append({name: values.to(device) for name, values in stacked.items()})
    for layer, weights in zip(layers, loaded, strict=True):
        for name, values in weights.items():
            setattr(layer.experts, name, nn.Parameter(values, requires_grad=getattr(layer.experts, name).requires_grad))
        vars(layer.experts).pop("forward")
    vars(model).pop("expert_pack")
