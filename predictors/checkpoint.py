"""The files that `export` writes and the runtime loads: a folder shaped like a Hub repository.

    predictors.safetensors   `layers.<target>.{w1,v,b1,w2,b2}`, `default_vectors.<source>`
    config.json              format version, the model they belong to, per layer source, width and hit rates
    README.md                a model card

Nothing is ever unpickled. Every way in which such a folder can be wrong ends in one `PredictorsError`.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from predictors.architecture import MoELayer, describe_shape, moe_shape, sources
from predictors.discovery import find_moe_layers
from predictors.errors import UserError
from predictors.mlp import ResidualMLP
from predictors.speculation import Router, Speculator

FORMAT_VERSION = 3
READABLE = (2, FORMAT_VERSION)
"""Version 2 had no `source`: every source was the nearest."""
WEIGHTS, CONFIG, CARD = "predictors.safetensors", "config.json", "README.md"


class PredictorsError(UserError):
    """A predictors folder that can't be used; the message says what is wrong and what to do."""


@dataclass
class Predictors:
    """Predictors in memory: what `save_predictors` writes and `load_predictors` returns."""

    model: dict[str, Any]
    """`name` and the facts of `architecture.moe_shape` of the model they belong to."""
    mlps: dict[int, ResidualMLP] = field(default_factory=dict)
    """By target layer; of one without, speculation is training-free."""
    sources: dict[int, int | None] = field(default_factory=dict)
    """By target layer: the source layer whose residual it reads, None for its own input. Of a target that is not here, what
    `architecture.sources` says."""
    default_vectors: dict[int, torch.Tensor] = field(default_factory=dict)
    """By source layer: `[experts, hidden]`, fp32."""
    hit_rates: dict[int, dict[str, float]] = field(default_factory=dict)
    """By target layer: `training_free` and `predictor`, on validation sequences."""
    recall: dict[int, list[float]] = field(default_factory=dict)
    """By target layer: the speculation's recall at k, k + 1, ..., 2k candidates, on validation sequences; empty in an
    export of before it was written."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Command, versions and trace."""

    def check(self, model: PreTrainedModel, layers: list[MoELayer]) -> None:
        """Raises `PredictorsError` unless these predictors fit `model`."""
        shape = moe_shape(model.config, layers)
        if shape["fingerprint"] != self.model.get("fingerprint"):
            raise PredictorsError(
                f"these predictors belong to {self.model.get('name')} ({describe_shape(self.model)}), but the model is a "
                f"{describe_shape(shape)}; give the predictors that were made for it"
            )

    def sources_of(self, layers: list[MoELayer]) -> dict[int, int | None]:
        """The source of every one of a model's MoE `layers`, by target layer."""
        return {target: self.sources.get(target, source) for target, source in sources(layers).items()}


def make_speculators(
    model: PreTrainedModel,
    predictors: Predictors | None = None,
    layers: list[MoELayer] | None = None,
    horizon: int = 1,
) -> dict[int, Speculator]:
    """A speculator for every MoE layer of `model`, by target layer index, on the model's devices.

    Where there is no predictor the speculation is training-free; without `predictors` it has no default vectors either,
    and `horizon` says which source each target has (see `architecture.sources`); else `Predictors.sources_of` does.
    Raises `PredictorsError` where the predictors belong to another model.
    """
    layers = find_moe_layers(model) if layers is None else layers
    if predictors is not None:
        predictors.check(model, layers)
    speculators, by_index = {}, {layer.index: layer for layer in layers}
    before = sources(layers, horizon) if predictors is None else predictors.sources_of(layers)
    for layer, source in zip(layers, before.values(), strict=True):
        vectors = predictors.default_vectors.get(source) if predictors is not None and source is not None else None
        mlp = predictors.mlps.get(layer.index) if predictors is not None else None
        weight = next(layer.router.parameters())
        join = None if source is None else by_index[source].join
        speculator = Speculator(
            layer.norm,
            Router.of(layer),
            vectors,
            post_norm=None if join is None else join.post_norm,
            post_scale=1.0 if join is None else join.post_scale,
        ).to(weight.device)
        if mlp is not None:
            copy = ResidualMLP(layer.hidden_size, layer.num_experts, mlp.width)
            copy.load_state_dict(mlp.state_dict(), assign=True)  # not twice in memory where the dtype is the model's
            speculator.mlp = copy.to(weight.device, weight.dtype)
        speculators[layer.index] = speculator.requires_grad_(False).eval()
    return speculators


def save_predictors(folder: str | Path, predictors: Predictors, card: str) -> Path:
    """Writes the folder whole or not at all. Raises `PredictorsError` where it exists already."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PredictorsError(f"{folder} exists already; name a new folder or remove it")
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors = {f"default_vectors.{source}": d.contiguous() for source, d in predictors.default_vectors.items()}
    for target, mlp in predictors.mlps.items():
        tensors |= {f"layers.{target}.{name}": p.detach().contiguous() for name, p in mlp.named_parameters()}
    save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
    config = {
        "format_version": FORMAT_VERSION,
        "model": predictors.model,
        "layers": [
            {
                "layer": target,
                **({"source": predictors.sources[target]} if target in predictors.sources else {}),
                "width": predictors.mlps[target].width if target in predictors.mlps else 0,
                "hit_rate": predictors.hit_rates.get(target, {}),
                "recall": predictors.recall.get(target, []),
            }
            for target in sorted(predictors.mlps.keys() | predictors.sources.keys())
        ],
        "default_vectors": sorted(predictors.default_vectors),
        "provenance": predictors.provenance,
    }
    (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    (aside / CARD).write_text(card)
    if folder.exists():
        folder.rmdir()
    os.replace(aside, folder)
    return folder


def load_predictors(path_or_id: str | Path, model: PreTrainedModel | None = None) -> Predictors:
    """Loads a predictors folder or Hub repository; with `model`, checks that they belong to it.

    Raises `PredictorsError` with one sentence for whatever is missing, broken or of another model.
    """
    folder = _local_folder(str(path_or_id))
    config = _read_config(folder)
    weights = folder / WEIGHTS
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise PredictorsError(f"{weights} is missing or broken ({error}); export the predictors again") from error
    predictors = Predictors(model=config["model"], provenance=config.get("provenance", {}))
    hidden, experts = config["model"]["hidden_size"], config["model"]["num_experts"]
    for entry in config["layers"]:
        target, width = entry["layer"], entry["width"]
        if "source" in entry:
            predictors.sources[target] = entry["source"]
        predictors.hit_rates[target] = entry.get("hit_rate", {})
        predictors.recall[target] = entry.get("recall", [])
        if not width:  # no predictor was better than none
            continue
        mlp = ResidualMLP(hidden, experts, width)
        state = {}
        for name, parameter in mlp.named_parameters():
            state[name] = _take(tensors, f"layers.{target}.{name}", tuple(parameter.shape), weights)
        mlp.load_state_dict(state)
        predictors.mlps[target] = mlp.requires_grad_(False)
    for source in config["default_vectors"]:
        predictors.default_vectors[source] = _take(
            tensors, f"default_vectors.{source}", (experts, hidden), weights
        ).float()
    if tensors:
        raise PredictorsError(
            f"{weights} holds the tensor {min(tensors)}, which {CONFIG} does not name; export it again"
        )
    if model is not None:
        predictors.check(model, find_moe_layers(model))
    return predictors


def _local_folder(path_or_id: str) -> Path:
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise PredictorsError(f"{folder} is a file; give the folder that export wrote")
    try:
        return Path(snapshot_download(path_or_id, allow_patterns=[WEIGHTS, CONFIG, CARD]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise PredictorsError(
            f"there are no predictors at {path_or_id}: no such folder, and no such repository in reach"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        version = config["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PredictorsError(
            f"{folder} holds no predictors ({CONFIG} is missing or not ours); give a folder that export wrote"
        ) from error
    if version not in READABLE:
        raise PredictorsError(
            f"{file} has format version {version}, and this release reads {' and '.join(map(str, READABLE))}; update predict-train"
        )
    counts = ("hidden_size", "num_experts", "top_k", "num_hidden_layers")
    try:
        well_formed = (
            all(_is_count(config["model"][key]) for key in counts)
            and isinstance(config["model"]["model_type"], str)
            and all(isinstance(e["layer"], int) and _is_width(e["width"]) for e in config["layers"])
            and all(isinstance(e.get("source"), int | None) for e in config["layers"])
            and all(isinstance(source, int) for source in config["default_vectors"])
            and all(_is_curve(e.get("recall", [])) for e in config["layers"])
        )
    except (KeyError, TypeError):
        well_formed = False
    if not well_formed:
        raise PredictorsError(f"{file} lacks a field or has one of a wrong type; export the predictors again")
    assert isinstance(config, dict)
    return config


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1 << 20


def _is_width(value: Any) -> bool:
    return _is_count(value) or (value == 0 and isinstance(value, int) and not isinstance(value, bool))


def _is_curve(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, float) and 0 <= value <= 1 for value in values)


def _take(tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, ...], file: Path) -> torch.Tensor:
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise PredictorsError(f"{file} lacks the tensor {name}; export the predictors again")
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise PredictorsError(
            f"{file}: {name} is {tensor.dtype} {list(tensor.shape)}, and should be floats of shape {list(shape)}"
        )
    if not torch.isfinite(tensor).all():
        raise PredictorsError(f"{file}: {name} holds values that are not finite; train and export again")
    return tensor
