"""The files that `export` writes and the runtime loads: a folder shaped like a Hub repository.

    predictors.safetensors   `layers.<target>.{w1,v,b1,w2,b2}`, `default_vectors.<source>`
    config.json              format version, the model they belong to, per layer source, width and hit rates
    README.md                a model card

Nothing is ever unpickled, and nothing is allocated by what config.json says before the weights' header agrees. Every way in which
such a folder can be wrong ends in one `PredictorsError`.
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
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import PreTrainedModel

from .architecture import MoELayer, describe_shape, moe_shape, sources
from .config import CONFIG, MOST_BYTES, PredictorsError, make_config, read_config
from .discovery import find_moe_layers
from .mlp import ResidualMLP
from .settings import shown
from .speculation import Speculator, wire

WEIGHTS, CARD = "predictors.safetensors", "README.md"
FLOATS = ("F32", "BF16", "F16")
"""The dtypes that weights may have, by safetensors' names."""


@dataclass
class Predictors:
    """Predictors in memory: what `save_predictors` writes and `load_predictors` returns."""

    model: dict[str, Any]
    """`name` and the facts of `architecture.moe_shape` of the model they belong to."""
    mlps: dict[int, ResidualMLP] = field(default_factory=dict)
    """By target layer, fp32 when loaded; of one without, speculation is training-free."""
    sources: dict[int, int | None] = field(default_factory=dict)
    """By target layer: the source layer whose residual it reads, None for its own input. Of a target that is not here, what
    `architecture.sources` says."""
    default_vectors: dict[int, torch.Tensor] = field(default_factory=dict)
    """By source layer: `[experts, hidden]`, fp32."""
    hit_rates: dict[int, dict[str, float]] = field(default_factory=dict)
    """By target layer: `training_free` and, where there is one, `predictor`; on validation sequences."""
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
    source_of: dict[int, int | None] | None = None,
) -> dict[int, Speculator]:
    """A speculator for every MoE layer of `model`, by target layer index, on the model's devices.

    Where there is no predictor the speculation is training-free; without `predictors` it has no default vectors either.
    `source_of` is the source of each target; by default what the predictors were trained for, or else the nearest.
    Raises `PredictorsError` where the predictors belong to another model.
    """
    layers = find_moe_layers(model) if layers is None else layers
    if predictors is not None:
        predictors.check(model, layers)
    if source_of is None:
        source_of = sources(layers) if predictors is None else predictors.sources_of(layers)
    wirings = wire(layers, source_of, {} if predictors is None else predictors.default_vectors)
    speculators = {}
    for layer in layers:
        mlp = predictors.mlps.get(layer.index) if predictors is not None else None
        speculator = Speculator(wirings[layer.index])
        if mlp is not None:
            weight = next(layer.router.parameters())
            copy = ResidualMLP(layer.hidden_size, layer.num_experts, mlp.width)
            copy.load_state_dict(mlp.state_dict(), assign=True)  # not twice in memory where the dtype is the model's
            speculator.mlp = copy.to(weight.device, weight.dtype)
        speculators[layer.index] = speculator.requires_grad_(False).eval()
    return speculators


def refuse_existing(folder: Path) -> None:
    """Raises `PredictorsError` where something is that predictors would be written over."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PredictorsError(f"{folder} exists already; name a new folder or remove it")


def save_predictors(folder: str | Path, predictors: Predictors, card: str) -> Path:
    """Writes the folder whole or not at all; floats keep their dtype.

    Raises `PredictorsError` where it exists already, where it can't be written, and for predictors that could not be loaded.
    """
    folder = Path(folder)
    refuse_existing(folder)
    targets = sorted(predictors.mlps.keys() | predictors.sources.keys())
    config = make_config(
        model=predictors.model,
        layers=[
            {
                "layer": target,
                **({"source": predictors.sources[target]} if target in predictors.sources else {}),
                "width": predictors.mlps[target].width if target in predictors.mlps else 0,
                "hit_rate": predictors.hit_rates.get(target, {}),
                "recall": predictors.recall.get(target, []),
            }
            for target in targets
        ],
        default_vectors=sorted(predictors.default_vectors),
        provenance=predictors.provenance,
    )
    tensors = {f"default_vectors.{source}": d.contiguous() for source, d in predictors.default_vectors.items()}
    for target, mlp in predictors.mlps.items():
        tensors |= {f"layers.{target}.{name}": p.detach().contiguous() for name, p in mlp.named_parameters()}
    aside = folder.absolute().with_name(folder.absolute().name + ".partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        # save_file would make a file that its owner alone can read.
        (aside / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        (aside / CONFIG).write_text(json.dumps(config.model_dump(exclude_unset=True), indent=2) + "\n")
        (aside / CARD).write_text(card, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        os.replace(aside, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise PredictorsError(f"{folder} can't be written ({error}); name a folder that can") from error
    return folder


def load_predictors(path_or_id: str | Path, model: PreTrainedModel | None = None) -> Predictors:
    """Loads a predictors folder or Hub repository; with `model`, checks that they belong to it.

    Raises `PredictorsError` with one sentence for whatever is missing, broken or of another model.
    """
    folder = _local_folder(str(path_or_id))
    config = read_config(folder)
    hidden, experts = config.model.hidden_size, config.model.num_experts
    with torch.device("meta"):  # shapes only: no memory is taken until the file has them too
        mlps = {entry.layer: ResidualMLP(hidden, experts, entry.width) for entry in config.layers if entry.width}
    shapes: dict[str, tuple[int, ...]] = {
        f"default_vectors.{source}": (experts, hidden) for source in config.default_vectors
    }
    for target, mlp in mlps.items():
        shapes |= {f"layers.{target}.{name}": tuple(p.shape) for name, p in mlp.named_parameters()}
    tensors = _read_tensors(folder / WEIGHTS, shapes)
    for target, mlp in mlps.items():
        state = {name: tensors[f"layers.{target}.{name}"] for name, _ in mlp.named_parameters()}
        mlp.load_state_dict(state, assign=True)
        mlp.requires_grad_(False)
    predictors = Predictors(
        model=config.model.model_dump(),
        mlps=mlps,
        sources={entry.layer: entry.source for entry in config.layers if "source" in entry.model_fields_set},
        default_vectors={source: tensors[f"default_vectors.{source}"] for source in config.default_vectors},
        hit_rates={entry.layer: {str(kind): rate for kind, rate in entry.hit_rate.items()} for entry in config.layers},
        recall={entry.layer: entry.recall for entry in config.layers},
        provenance=config.provenance.model_dump(exclude_unset=True),
    )
    if model is not None:
        predictors.check(model, find_moe_layers(model))
    return predictors


def as_predictors(given: Predictors | str | Path | None) -> Predictors | None:
    """What an entrance was given: predictors, or the folder or Hub name that they are loaded from."""
    return load_predictors(given) if isinstance(given, str | Path) else given


def _local_folder(path_or_id: str) -> Path:
    folder = Path(path_or_id)
    try:
        if folder.is_dir():
            return folder
        if folder.exists():
            raise PredictorsError(f"{folder} is a file; give the folder that export wrote")
        return Path(snapshot_download(path_or_id, allow_patterns=[WEIGHTS, CONFIG, CARD]))
    except PredictorsError:
        raise
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:  # ValueError: no name can be so
        raise PredictorsError(
            f"there are no predictors at {path_or_id}: no such folder, and no such repository in reach"
        ) from error


def _read_tensors(file: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The tensors of `file`, fp32 in memory of their own; it must hold those of `shapes`, finite floats, and no others."""
    try:
        _check_header_length(file)
        with safe_open(file, "pt") as opened:
            names = set(opened.keys())
            if missing := shapes.keys() - names:
                raise PredictorsError(f"{file} lacks the tensor {min(missing)}; export the predictors again")
            if extra := names - shapes.keys():
                raise PredictorsError(
                    f"{file} holds the tensor {shown(min(extra))}, which {CONFIG} does not name; export it again"
                )
            for name, shape in shapes.items():
                entry = opened.get_slice(name)
                dtype, found = entry.get_dtype(), entry.get_shape()
                if dtype not in FLOATS or tuple(found) != shape:
                    raise PredictorsError(
                        f"{file}: {name} is {dtype} of shape {shown(found)}, and should be {', '.join(FLOATS[:-1])} or {FLOATS[-1]} of shape "
                        f"{list(shape)}; export the predictors again"
                    )
            tensors = {name: opened.get_tensor(name).to(torch.float32, copy=True) for name in shapes}
    except (OSError, SafetensorError) as error:
        raise PredictorsError(
            f"{file} is missing or broken ({shown(str(error))}); export the predictors again"
        ) from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise PredictorsError(f"{file}: {name} holds values that are not finite; train and export again")
    return tensors


def _check_header_length(file: Path) -> None:
    """Refuses a header that would be long to read; safetensors checks all else of it."""
    if not file.is_file():
        raise FileNotFoundError("no such file")
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
    if length > MOST_BYTES:
        raise PredictorsError(f"{file} says that its header has {length:,} bytes, as no export has; export it again")
