"""Loads a model with its experts in host memory or in a packed file."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..predictors.checkpoint import Predictors
from ..predictors.discovery import find_layers
from ..predictors.experts import expert_modules
from ..predictors.loading import load_model, resolve_device, resolve_dtype
from ..predictors.settings import combined, make
from .errors import OffloadError, StoreError
from .gatherer import Gathered, Gatherer
from .guard import Away
from .offload import offload_experts
from .pack import (
    draw_experts,
    experts_ignored,
    fingerprint,
    given,
    load_and_pack,
    load_without_experts,
    random_without_experts,
)
from .packfile import Header, read_header
from .quantization import Quantization, Shipped
from .settings import LoadConfig, Loading, OffloadConfig
from .shipped import form_and_options
from .store import QuantizedExperts, empty_blocks
from .stores import open_store

PASSED_ON = ("revision", "token", "trust_remote_code", "attn_implementation")
"""What `load_offloaded` passes on to transformers."""


@torch.inference_mode(False)  # what is made here is used outside of it too
def load_offloaded(
    model: str | Path | PretrainedConfig,
    predictors: Predictors | str | Path | None = None,
    config: LoadConfig | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """Loads a model with its experts offloaded. The whole model is never on the device, and no part is in memory twice.

    Args:
        model: folder or Hub name; or a config, for a model with random weights.
        predictors: what `load_predictors` returned, or a path or name for it; without them speculation is training-free.
        config, settings: the fields of `LoadConfig`, as one object or by name. Those given by name win. The settings
            `revision`, `token`, `trust_remote_code` and `attn_implementation` go to transformers' `from_pretrained`.

    After `model.expert_offload.detach()`, a model with its experts in host memory is an ordinary model. A model with a packed
    file then has no experts. It can be offloaded again, or `load_experts` loads them; when it is run, it says so.

    Raises `SettingsError`, `OffloadError`, `StoreError`, `LoadingError`, `UnsupportedModelError` or `PredictorsError`.
    """
    options = {name: settings.pop(name) for name in PASSED_ON if name in settings}
    if options and isinstance(model, PretrainedConfig):
        raise OffloadError(
            f"{min(options)} is for a checkpoint, and the model is a config; set it there, or leave it out"
        )
    if "device_map" in settings:
        raise OffloadError("device_map can't be given, since the runtime places the weights itself; give device")
    chosen = combined(LoadConfig, config, settings)
    resolve_device(chosen.device)
    loaded = load_to_host(model, chosen, **options)
    return offload_experts(loaded, predictors, make(OffloadConfig, **chosen.values_of(OffloadConfig)))


def load_to_host(model: str | Path | PretrainedConfig, config: Loading, **options: Any) -> PreTrainedModel:
    """Loads a model into host memory, not offloaded yet. Its experts stay in the packed file, if `config` names one.

    A checkpoint is loaded with the `options` of `load_model`.
    """
    if not isinstance(model, str | Path | PretrainedConfig):
        raise OffloadError(
            f"something of type {type(model).__name__} can't be loaded; give a folder, a Hub name or a config"
        )
    dtype = resolve_dtype(config.dtype, torch.device("cuda"))  # for CUDA, auto leaves the dtype to the checkpoint
    options |= given(config.gguf)
    if config.pack is not None and not config.pack.exists():
        loaded, _ = load_and_pack(model, config.pack, dtype, config.seed, config.quantize, **options)
        return _packed(loaded, config.pack)
    form, options = form_and_options(model, config.quantize, options)
    if config.pack is None and form is not None:
        return _load_quantized(model, config.seed, dtype, form, options)
    if config.pack is None:
        if not isinstance(model, PretrainedConfig):
            return load_model(model, torch.device("cpu"), dtype, **options)
        loaded = random_without_experts(model, dtype, config.seed)
        draw_experts(loaded, lambda module, name, values: setattr(module, name, nn.Parameter(values)), config.seed)
        return loaded
    header = read_header(config.pack)
    check_quantized(config.pack, header, config.quantize)
    if dtype == "auto":
        dtype = header.format().full.dtype
    if isinstance(model, PretrainedConfig):
        loaded = random_without_experts(model, dtype, config.seed)
    else:
        with experts_ignored():
            loaded = load_model(model, torch.device("cpu"), dtype, **options)
        _check_checkpoint(config.pack, header, model, options)
    return _packed(loaded, config.pack)


def _packed(model: PreTrainedModel, pack: Path) -> PreTrainedModel:
    """A model whose experts stay in the file `pack`."""
    vars(model).update(expert_pack=pack.absolute(), expert_samples=read_header(pack).sample_of)
    _refuse_to_run(model, f"in {pack.absolute()}")
    return model


def _load_quantized(
    model: str | Path | PretrainedConfig,
    seed: int,
    dtype: torch.dtype | str,
    form: Quantization | Shipped,
    options: dict[str, Any],
) -> PreTrainedModel:
    """A model whose experts stay in host memory in a quantised form, into which they are brought layer by layer."""
    blocks: dict[nn.Module, torch.Tensor] = {}
    samples: dict[nn.Module, str] = {}

    def keep(gathered: Gathered) -> None:
        samples[gathered.experts], blocks[gathered.experts] = gathered.sample, gathered.blocks()

    gatherer = Gatherer(form, keep)
    loaded = load_without_experts(model, gatherer.take, dtype, seed, **options)
    layers = find_layers(loaded).layers
    layout = gatherer.finish(layers, str(getattr(model, "model_type", model)))
    vars(loaded)["expert_blocks"] = QuantizedExperts(layout, [blocks[layer.experts] for layer in layers])
    names = {module: path for path, module in loaded.named_modules()}
    vars(loaded)["expert_samples"] = {names[module]: sample for module, sample in samples.items()}
    _refuse_to_run(loaded, f"quantised to {form}")
    return loaded


def check_quantized(pack: Path, header: Header, quantize: Quantization | None) -> None:
    """Raises `StoreError` where a packed file holds other experts than those that are asked for."""
    if quantize is not None and header.quantized != quantize:
        raise StoreError(
            f"{pack} holds experts {header.kept}, and {quantize} is asked for; leave quantize out or name another file"
        )


def _refuse_to_run(model: PreTrainedModel, where: str) -> None:
    """Has a model and its experts say that the experts are not in memory, where they are needed."""
    for module in {model, model.base_model}:
        vars(module)["save_pretrained"] = Away(where)
    for experts in expert_modules(model).values():
        experts.forward = Away(where)


def _check_checkpoint(pack: Path, header: Header, model: str | Path, options: dict[str, Any]) -> None:
    """Raises `StoreError` unless a file was packed from the checkpoint `model`, whose experts were not loaded."""
    checkpoint = fingerprint(model, options)
    if header.checkpoint is None or checkpoint is None:
        warnings.warn(
            f"{pack} does not say which checkpoint it was packed from, so it is not compared with {model}; pack the model again",
            stacklevel=3,
        )
    elif header.checkpoint != checkpoint:
        raise StoreError(
            f"{pack} was packed from {header.model.get('name')} with other weights files than those of {model}; pack this model"
        )


@torch.inference_mode(False)
def load_experts(model: PreTrainedModel) -> None:
    """Brings the experts of a detached model into memory, from its packed file or widened from their quantised form.

    It is then an ordinary model. Each layer's experts go to the device of its router. Widened ones are rounded to the model's
    dtype, so its logits may change a little. Raises `OffloadError` for a model that is offloaded or has its experts in memory,
    and `StoreError` where the file can't be read. The model is then as it was.
    """
    if getattr(model, "expert_offload", None) is not None:
        raise OffloadError("the model's experts are offloaded; detach it first: model.expert_offload.detach()")
    if not (hasattr(model, "expert_pack") or hasattr(model, "expert_blocks")):
        raise OffloadError("the experts of this model are in memory; it was not loaded with a packed file or quantised")
    layers = find_layers(model).layers
    loaded = []
    with ExitStack() as opened:
        store = open_store(opened, model, layers, None, torch.device("cpu"))
        (block,) = blocks = empty_blocks(1, store.format.bytes, torch.device("cpu"))
        for number, layer in enumerate(layers):
            stacked = {
                name: torch.zeros(
                    layer.experts.get_parameter(name).shape, dtype=layer.experts.get_parameter(name).dtype, device="cpu"
                )
                for name in store.format.full.places
            }
            for expert in range(layer.stored):
                store.read(number, expert, block.numpy())
                for name, values in store.format.read(blocks).items():
                    stacked[name][expert] = values[0]
            device = next(p.device for p in layer.decoder.parameters() if not p.is_meta)
            loaded.append({name: values.to(device) for name, values in stacked.items()})
    for layer, weights in zip(layers, loaded, strict=True):
        for name, values in weights.items():
            setattr(layer.experts, name, nn.Parameter(values, requires_grad=getattr(layer.experts, name).requires_grad))
        vars(layer.experts).pop("forward")
    for module in {model, model.base_model}:
        vars(module).pop("save_pretrained")
    for name in ("expert_pack", "expert_samples", "expert_blocks"):
        vars(model).pop(name, None)
