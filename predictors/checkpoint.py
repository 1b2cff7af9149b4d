"""The files that `export` writes and the runtime loads: a folder shaped like a Hub repository.

    predictors.safetensors   `layers.<target>.{w1,v,b1,w2,b2}`, with a memory `u` too, of the direct form `skip`, `mix` and
                             `prior` too; `default_vectors.<source>`
    config.json              format version, the model they belong to, per layer source, width, memory, hit rates and how sure
                             it is, and checksums
    README.md                a model card

Nothing is ever unpickled. Memory is allocated only after the header of the weights agrees with config.json. Whatever is
wrong with such a folder, the result is one `PredictorsError`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel

from .architecture import ExpertLayer, MoELayer, describe_shape, moe_shape, sources
from .confidence import Confidence
from .config import CONFIG, MOST_BYTES, REUSE_VERSION, PredictorsError, ReuseEntry, make_config, read_config
from .direct import KINDS, DirectMLP
from .discovery import find_moe_layers
from .files import checksum, sealed, written_whole
from .forms import Form, PredictorForm
from .reuse import Reuse, ReusePredictors
from .settings import shown
from .speculation import Speculator, wire
from .weights import why_missing

WEIGHTS, CARD = "predictors.safetensors", "README.md"
FLOATS = ("F32", "BF16", "F16")
"""The dtypes that weights may have, as safetensors names them."""


@dataclass(frozen=True)
class TargetLayer:
    """The speculation on one target layer: its source, its predictor and its hit rates."""

    layer: int
    source: int | Literal["nearest"] | None = "nearest"
    """The layer whose residual it reads; None for the target's own input. `nearest` is what `architecture.sources`
    says; exports of older releases have only that."""
    mlp: PredictorForm | None = None
    """fp32 when loaded; None means training-free speculation."""
    hit_rates: dict[str, float] = field(default_factory=dict)
    """`training_free`, `predictor` if there is an MLP, and `without_memory` if that has a memory, for where it remembers nothing;
    on validation sequences."""
    recall: list[float] = field(default_factory=list)
    """At k, k + 1, ..., 2k candidates, on validation sequences; empty in exports of older releases."""
    confidence: Confidence | None = None
    """How margins of this speculation become probabilities; None in exports of older releases."""

    @property
    def nbytes(self) -> int:
        """Bytes of the MLP's weights in memory."""
        return 0 if self.mlp is None else sum(p.nbytes for p in self.mlp.parameters())


@dataclass(frozen=True)
class Predictors:
    """Predictors in memory: what `save_predictors` writes and `load_predictors` returns."""

    model: dict[str, Any]
    """`name` and the facts of `architecture.moe_shape` of the model they belong to."""
    layers: list[TargetLayer] = field(default_factory=list)
    """A target layer that is missing here is speculated on training-free, from its nearest source."""
    default_vectors: dict[int, torch.Tensor] = field(default_factory=dict)
    """By source layer: `[experts, hidden]`, fp32."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Command, versions and trace."""
    reuse: Reuse | None = None
    """Which experts are used again soon; None in exports of older releases, and where it was not trained."""

    @property
    def mlps(self) -> dict[int, PredictorForm]:
        """The MLPs by target layer; layers without one are left out."""
        return {entry.layer: entry.mlp for entry in self.layers if entry.mlp is not None}

    def of(self, target: int) -> TargetLayer:
        """The entry of a target layer, or a default one."""
        return next((entry for entry in self.layers if entry.layer == target), TargetLayer(target))

    def training_free(self) -> Predictors:
        """The same without what was trained, and without the confidence in it.

        Of direct predictors the prior is left, unless there are default vectors: then the residual can be followed.
        """
        layers = []
        for entry in self.layers:
            left = entry.mlp.untrained() if isinstance(entry.mlp, DirectMLP) and not self.default_vectors else None
            layers.append(entry if entry.mlp is None else replace(entry, mlp=left, confidence=None))
        return replace(self, layers=layers)

    def check(self, model: PreTrainedModel, layers: Sequence[ExpertLayer]) -> None:
        """Raises `PredictorsError` unless these predictors fit `model`."""
        shape = moe_shape(model.config, layers)
        if shape["fingerprint"] != self.model.get("fingerprint"):
            raise PredictorsError(
                f"these predictors belong to {self.model.get('name')} ({describe_shape(self.model)}), but the model is a "
                f"{describe_shape(shape)}; give the predictors that were made for it"
            )

    def sources_among(self, nearest: dict[int, int | None]) -> dict[int, int | None]:
        """The source of each target layer; `nearest` gives every target's nearest source."""
        own = {target: self.of(target).source for target in nearest}
        return {target: nearest[target] if isinstance(source, str) else source for target, source in own.items()}


def make_speculators(
    model: PreTrainedModel,
    predictors: Predictors | None = None,
    layers: list[MoELayer] | None = None,
    source_of: dict[int, int | None] | None = None,
) -> dict[int, Speculator]:
    """A speculator for every MoE layer of `model`, by target layer index, on the model's devices.

    Without a predictor, the speculation is training-free; without `predictors`, it has no default vectors either.
    `source_of` is the source of each target: by default the one that the predictors were trained for, else the nearest.
    Raises `PredictorsError` if the predictors belong to another model.
    """
    layers = find_moe_layers(model) if layers is None else layers
    if predictors is None:
        predictors = Predictors(model={})
    else:
        predictors.check(model, layers)
    if source_of is None:
        source_of = predictors.sources_among(sources(layers))
    wirings = wire(layers, source_of, predictors.default_vectors)
    speculators = {}
    for layer in layers:
        mlp, speculator = predictors.of(layer.index).mlp, Speculator(wirings[layer.index])
        if layer.unfollowed is not None and not isinstance(mlp, DirectMLP):
            raise PredictorsError(
                f"layer {layer.index} can only be guessed by a direct predictor, and there is none for it; train one for every layer "
                f"({layer.unfollowed})"
            )
        if mlp is not None:
            weight = next(layer.router.parameters())
            copy = type(mlp)(layer.hidden_size, layer.num_experts, mlp.width, mlp.memory, layer.top_k)
            copy.load_state_dict(mlp.state_dict(), assign=True)  # no second copy if the dtype is the model's
            speculator.mlp = copy.to(weight.device, weight.dtype)
            if not_finite(speculator.mlp.state_dict()):
                raise PredictorsError(
                    f"the predictor of layer {layer.index} overflows in {str(weight.dtype).removeprefix('torch.')}; load the "
                    "model in bfloat16 or float32"
                )
        speculators[layer.index] = speculator.requires_grad_(False).eval()
    return speculators


def refuse_existing(folder: Path) -> None:
    """Raises `PredictorsError` if writing predictors to `folder` would overwrite something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PredictorsError(f"{folder} exists already; name a new folder or remove it")


def save_predictors(folder: str | Path, predictors: Predictors, card: str) -> Path:
    """Writes the folder whole or not at all; floats keep their dtype.

    Raises `PredictorsError` if it exists, if it can't be written, or if the predictors could not be loaded again.
    """
    folder = Path(folder)
    refuse_existing(folder)
    tensors = {f"default_vectors.{source}": d.contiguous() for source, d in predictors.default_vectors.items()}
    parts = _modules(predictors.mlps, predictors.reuse)
    tensors |= {name: p.detach().contiguous() for name, p in parts.named_parameters()}
    if wrong := not_finite(tensors):
        raise PredictorsError(f"{wrong} holds values that are not finite, so nothing is exported; train again")
    weights = save(tensors, metadata={"format": "pt"})
    config = make_config(
        model=predictors.model,
        layers=[
            {
                "layer": entry.layer,
                **({} if entry.source == "nearest" else {"source": entry.source}),
                **({} if entry.mlp is None or entry.mlp.form is Form.CORRECTING else {"form": entry.mlp.form.value}),
                "width": 0 if entry.mlp is None else entry.mlp.width,
                "memory": 0 if entry.mlp is None else entry.mlp.memory,
                "hit_rate": entry.hit_rates,
                "recall": entry.recall,
                **({} if entry.confidence is None else {"confidence": entry.confidence._asdict()}),
            }
            for entry in sorted(predictors.layers, key=lambda entry: entry.layer)
        ],
        default_vectors=sorted(predictors.default_vectors),
        provenance=predictors.provenance,
        **({} if predictors.reuse is None else {"reuse": _entry_of(predictors.reuse)}),
        weights_xxh3=xxhash.xxh3_128_hexdigest(weights),
    )
    try:
        with written_whole(folder) as aside:
            aside.mkdir(parents=True)
            # A file of save_file could be read by its owner only.
            (aside / WEIGHTS).write_bytes(weights)
            (aside / CONFIG).write_text(json.dumps(sealed(config.model_dump(exclude_unset=True)), indent=2) + "\n")
            (aside / CARD).write_text(card, encoding="utf-8")
    except OSError as error:
        raise PredictorsError(f"{folder} can't be written ({error}); name a folder that can") from error
    return folder


def load_predictors(path_or_id: str | Path, model: PreTrainedModel | None = None) -> Predictors:
    """Loads a predictors folder or Hub repository; with `model`, checks that they belong to it.

    Raises `PredictorsError` with one sentence if anything is missing, broken or of another model.
    """
    folder = _local_folder(str(path_or_id))
    config = read_config(folder)
    hidden, experts = config.model.hidden_size, config.model.num_experts
    with torch.device("meta"):  # shapes only: memory is taken once the file has them too
        mlps = {
            entry.layer: KINDS[Form(entry.form)](hidden, experts, entry.width, entry.memory, config.model.top_k)
            for entry in config.layers
            if entry.width
        }
        is_old = config.format_version < REUSE_VERSION
        reuse = None if config.reuse is None or is_old else _reuse_of(config.reuse, experts)
    shapes: dict[str, tuple[int, ...]] = {
        f"default_vectors.{source}": (experts, hidden) for source in config.default_vectors
    }
    if config.reuse is not None and is_old:
        shapes |= _old_reuse(config.reuse, experts)
    modules = _modules(mlps, reuse)
    shapes |= {name: tuple(p.shape) for name, p in modules.named_parameters()}
    tensors = _read_tensors(folder / WEIGHTS, shapes, config.weights_xxh3)
    modules.load_state_dict({name: tensors[name] for name in modules.state_dict()}, assign=True)
    modules.requires_grad_(False)
    predictors = Predictors(
        model=config.model.model_dump(),
        layers=[
            TargetLayer(
                entry.layer,
                entry.source if "source" in entry.model_fields_set else "nearest",
                mlps.get(entry.layer),
                {str(kind): rate for kind, rate in entry.hit_rate.items()},
                entry.recall,
                None if entry.confidence is None else Confidence(**entry.confidence.model_dump()),
            )
            for entry in config.layers
        ],
        default_vectors={source: tensors[f"default_vectors.{source}"] for source in config.default_vectors},
        provenance=config.provenance.model_dump(exclude_unset=True),
        reuse=reuse,
    )
    if model is not None:
        predictors.check(model, find_moe_layers(model))
    return predictors


def _modules(mlps: dict[int, PredictorForm], reuse: Reuse | None) -> nn.Module:
    """The MLPs and the reuse predictors as one module, whose parameters have the names of the file."""
    by_layer = nn.ModuleDict({str(target): mlp for target, mlp in mlps.items()})
    return nn.ModuleDict({"layers": by_layer} | ({} if reuse is None else {"reuse": reuse.predictors}))


def _entry_of(reuse: Reuse) -> dict[str, Any]:
    _, layers, slots, rates = reuse
    return {"layers": layers, "width": reuse.predictors.width, "slots": slots, "hit_rates": rates}


def _reuse_of(entry: ReuseEntry, experts: int) -> Reuse:
    """With predictors of the right shapes, whatever their values are."""
    rates = {str(rule): rates for rule, rates in entry.hit_rates.items()}
    return Reuse(ReusePredictors(len(entry.layers), experts, entry.width), entry.layers, entry.slots, rates)


def _old_reuse(entry: ReuseEntry, experts: int) -> dict[str, tuple[int, ...]]:
    """The tensors of reuse predictors of format version 6, which are checked and not used."""
    layers, width, features = len(entry.layers), entry.width, 7
    shapes = {"own": (layers, features), "w1": (layers, features * experts, width), "b1": (layers, width)}
    shapes |= {"w2": (layers, width, experts), "b2": (layers, experts)}
    return {f"reuse.{name}": shape for name, shape in shapes.items()}


def as_predictors(given: Predictors | str | Path | None) -> Predictors | None:
    """`given` itself, or the predictors loaded from that folder or Hub name. Raises `PredictorsError`."""
    if not isinstance(given, Predictors | str | Path | None):
        raise PredictorsError(
            f"predictors are {shown(given)}; give what load_predictors returned, a folder or a Hub name"
        )
    return load_predictors(given) if isinstance(given, str | Path) else given


def _local_folder(path_or_id: str) -> Path:
    folder = Path(path_or_id)
    try:
        if folder.is_dir():
            return folder
        if folder.exists():
            raise PredictorsError(f"{folder} is a file; give the folder that export wrote")
        if missing := why_missing(path_or_id):
            raise PredictorsError(
                f"there are no predictors at {path_or_id} ({missing}); give the folder that export wrote or a Hub name"
            )
        return Path(snapshot_download(path_or_id, allow_patterns=[WEIGHTS, CONFIG, CARD]))
    except PredictorsError:
        raise
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:  # ValueError: an impossible name
        raise PredictorsError(
            f"there are no predictors at {path_or_id}: no such folder, and no such repository in reach; "
            "give the folder that export wrote or a Hub name"
        ) from error


def _read_tensors(file: Path, shapes: dict[str, tuple[int, ...]], xxh3: str | None) -> dict[str, torch.Tensor]:
    """The tensors of `file`, as fp32 copies. It must hold exactly those of `shapes`, with finite floats.

    Exports of older releases have no checksum `xxh3`.
    """
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
            # Only now, since the header bounds how much there is to read.
            if xxh3 is not None and checksum(file) != xxh3:
                raise PredictorsError(
                    f"{file} is not what was exported: its checksum is another; export the predictors again"
                )
            tensors = {name: opened.get_tensor(name).to(torch.float32, copy=True) for name in shapes}
    except (OSError, SafetensorError) as error:
        raise PredictorsError(
            f"{file} is missing or broken ({shown(str(error))}); export the predictors again"
        ) from error
    if wrong := not_finite(tensors):
        raise PredictorsError(f"{file}: {wrong} holds values that are not finite; train and export again")
    return tensors


def not_finite(tensors: dict[str, torch.Tensor]) -> str | None:
    """The name of the first tensor with a value that is not finite, or None."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


def _check_header_length(file: Path) -> None:
    """Refuses a header that is too long; safetensors checks the rest of it."""
    if not file.is_file():
        raise FileNotFoundError("no such file")
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
    if length > MOST_BYTES:
        raise PredictorsError(f"{file} says that its header has {length:,} bytes, as no export has; export it again")
