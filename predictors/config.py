"""config.json of a predictors folder: its content and the checks on it.

The file may come from anywhere, so nothing in it is trusted: sizes are bounded, strings are never used as paths, and
the layers must agree with the model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from .architecture import fingerprint
from .errors import UserError
from .files import CHECKSUM, is_changed
from .memory import MOST
from .settings import describe, shown

FORMAT_VERSION = 7
READABLE = range(2, FORMAT_VERSION + 1)
"""Version 2 had no `source`: every source was the nearest. Version 3 had no checksums, version 4 no memory,
and version 5 neither confidence nor direct predictors nor reuse predictors. Those of version 6 were others, and are left out."""
REUSE_VERSION = 7
"""The version of today's reuse predictors."""
CONFIG = "config.json"
MOST_BYTES = 4 << 20
"""The limit for config.json and for the weights' header: a hundred times what an export of a large model needs."""

Count = Annotated[int, Field(gt=0, le=1 << 20)]
Index = Annotated[int, Field(ge=0, lt=1 << 20)]
Rate = Annotated[float, Field(ge=0, le=1)]
# Printed text must not control the terminal: no control characters, except the line ends of a command.
Line = Annotated[str, Field(max_length=4096, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
Text = Annotated[str, Field(pattern=r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f]*$")]


class PredictorsError(UserError):
    """A predictors folder that can't be used; the message says what is wrong and what to do."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ModelEntry(_Entry):
    """The model that the predictors belong to: its name and the facts of `architecture.moe_shape`."""

    name: Line
    model_type: Line
    hidden_size: Count
    num_hidden_layers: Count
    moe_layers: list[Index] = Field(min_length=1, max_length=4096)
    num_experts: Count
    top_k: Count
    fingerprint: str

    @model_validator(mode="after")
    def _agrees(self) -> ModelEntry:
        if self.moe_layers != sorted(set(self.moe_layers)):
            raise ValueError("its MoE layers do not rise")
        if self.top_k > self.num_experts:
            raise ValueError(f"its top k is {self.top_k}, and it has {self.num_experts} experts")
        if self.fingerprint != fingerprint(self.model_dump()):
            raise ValueError("its fingerprint is not that of its shape")
        return self

    @property
    def recall_length(self) -> int:
        """How many values a recall curve has: one for each of k, k + 1, ..., 2k candidates, at most the number of experts."""
        return min(2 * self.top_k, self.num_experts) - self.top_k + 1


class ConfidenceEntry(_Entry):
    """The fields of `confidence.Confidence`."""

    temperature: float = Field(gt=0, le=1e30)
    bias: float = Field(ge=-1e3, le=1e3)
    least: Rate
    most: Rate
    error: Rate | None = None

    @model_validator(mode="after")
    def _rises(self) -> ConfidenceEntry:
        if self.least > self.most:
            raise ValueError(f"least is {self.least}, and most only {self.most}")
        return self


class LayerEntry(_Entry):
    """One target layer."""

    layer: Index
    source: Index | None = None
    """The source layer, None for the target's own input. If left out, as in version 2, it is the nearest."""
    form: Literal["correcting", "direct"] = "correcting"
    """Of the predictor; see `forms`."""
    width: int = Field(ge=0, le=1 << 20)
    """Of the predictor; 0 means that none was better than training-free speculation; then there are no tensors."""
    memory: int = Field(0, ge=0, le=MOST)
    """How many tokens the predictor remembers."""
    hit_rate: dict[Literal["training_free", "without_memory", "predictor"], Rate] = {}
    """On validation sequences; `predictor` only if there is one, and `without_memory` only if it has a memory: its rate where
    nothing is remembered."""
    recall: list[Rate] = []
    """Of the exported speculation, at k, k + 1, ..., 2k candidates, on validation sequences."""
    confidence: ConfidenceEntry | None = None
    """How sure the exported speculation is; None where it was not fitted."""


class ReuseEntry(_Entry):
    """The reuse predictors; the fields of `reuse.Reuse`."""

    layers: list[Index] = Field(min_length=1, max_length=4096)
    width: Count
    slots: list[Count] = Field(max_length=64)
    hit_rates: dict[Literal["lru", "frequency", "learned", "belady"], list[Rate]] = {}
    """By number of slots."""

    @model_validator(mode="after")
    def _agrees(self) -> ReuseEntry:
        if any(len(rates) != len(self.slots) for rates in self.hit_rates.values()):
            raise ValueError("reuse has not a hit rate for each number of slots")
        return self


class Provenance(_Entry):
    """How the predictors were made."""

    commands: dict[str, Text] = {}
    versions: dict[str, Line] = {}
    trace: dict[str, JsonValue] = {}
    settings: dict[str, JsonValue] = {}


class PredictorsConfig(_Entry):
    """Everything in config.json."""

    format_version: int
    model: ModelEntry
    layers: list[LayerEntry]
    default_vectors: list[Index]
    """The source layers that have default vectors."""
    reuse: ReuseEntry | None = None
    """None where nothing says which experts are used again soon."""
    provenance: Provenance = Provenance()
    weights_xxh3: str | None = None
    """Checksum (xxh3_128) of the file of the weights."""

    @model_validator(mode="after")
    def _agrees(self) -> PredictorsConfig:
        targets = [entry.layer for entry in self.layers]
        for name, indices in (
            ("layers", targets),
            ("default_vectors", self.default_vectors),
            ("reuse", [] if self.reuse is None else self.reuse.layers),
        ):
            if len(set(indices)) < len(indices):
                raise ValueError(f"{name} names a layer twice")
            if unknown := set(indices) - set(self.model.moe_layers):
                raise ValueError(f"{name} names layer {min(unknown)}, which is no MoE layer of its model")
        known, length = set(self.model.moe_layers), self.model.recall_length
        for entry in self.layers:
            if entry.source is not None and (entry.source not in known or entry.source >= entry.layer):
                raise ValueError(f"layer {entry.source} can't be the source of layer {entry.layer}")
            if entry.recall and (len(entry.recall) != length or entry.recall != sorted(entry.recall)):
                raise ValueError(f"the recall of layer {entry.layer} is not {length} rising values")
        return self


def make_config(**content: Any) -> PredictorsConfig:
    """The config that `save_predictors` writes. Raises `PredictorsError` if it could not be loaded again."""
    try:
        return PredictorsConfig(format_version=FORMAT_VERSION, **content)
    except ValidationError as error:
        raise PredictorsError(f"these predictors can't be saved: {describe(error)}; make them again") from error


def read_config(folder: Path) -> PredictorsConfig:
    """The config in `folder`. Raises `PredictorsError` if it is missing, broken or of another version."""
    file = folder / CONFIG
    data = _read(file)
    if len(data) > MOST_BYTES:
        raise PredictorsError(
            f"{file} has more than {MOST_BYTES:,} bytes, as no export has; export the predictors again"
        )
    try:
        content = json.loads(data)
        version = content["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PredictorsError(
            f"{folder} holds no predictors ({CONFIG} is missing or not ours); give a folder that export wrote"
        ) from error
    if version not in READABLE:
        raise PredictorsError(
            f"{file} has format version {shown(version)}, and this release reads {READABLE[0]} to {READABLE[-1]}; "
            "update predict-train"
        )
    try:
        config = PredictorsConfig.model_validate({key: value for key, value in content.items() if key != CHECKSUM})
    except ValidationError as error:
        raise PredictorsError(f"{file} is broken: {describe(error)}; export the predictors again") from error
    if is_changed(content) or (version > 3 and not (CHECKSUM in content and config.weights_xxh3)):
        raise PredictorsError(f"{file} is not what was exported: its checksum is another; export the predictors again")
    return config


def _read(file: Path) -> bytes:
    """The first bytes of a regular file, up to the limit. Other files read as empty: a pipe would block."""
    try:
        if not file.is_file():
            return b""
        with file.open("rb") as data:
            return data.read(MOST_BYTES + 1)
    except OSError:
        return b""
