"""manifest.json of a trace: the recorded model, layers and text, and the shards with their checksums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..predictors.errors import UserError
from ..predictors.files import CHECKSUM, is_changed
from ..predictors.forms import Form
from ..predictors.settings import describe, shown

FORMAT_VERSION = 4
READABLE = (2, 3, FORMAT_VERSION)
"""Version 2 had neither `origin`, nor `config_xxh3` and a checksum of its own. Version 3 had no `form`."""
MANIFEST = "manifest.json"


class TraceError(UserError):
    """A trace that can't be written or read; the message says what is wrong and what to do."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelEntry(_Entry):
    """The model that was recorded: its name and the facts of `architecture.moe_shape`."""

    name: str
    revision: str | None
    architecture: str
    model_type: str
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    moe_layers: list[int]
    num_experts: int = Field(gt=0, lt=1 << 15)
    top_k: int = Field(gt=0)
    fingerprint: str

    def identity(self) -> dict[str, Any]:
        """The facts about the model that its predictors carry."""
        return self.model_dump(exclude={"revision", "architecture"})


class LayerEntry(_Entry):
    """One target layer."""

    layer: int
    source: int | None
    norm: str
    """Dotted name of the norm in the model; empty if its routers read the residual stream itself."""
    router: str
    """Dotted name of the router in the model."""
    form: Form = Form.CORRECTING
    """Of the predictors that it is recorded for. For `direct` ones, what is recorded as a source's residual is its router's input."""
    router_arguments: list[str] = []
    """Dotted names of the router's arguments beside its input."""
    router_ndim: Literal[2, 3] = 2
    """Dimensions of the router's input."""
    post_norm: str = ""
    """Dotted name of the norm on the source layer's experts' sum; empty if there is none."""
    post_scale: float = 1.0
    """Factor of that norm's output."""
    has_inner: bool = False
    """Whether the source layer's shared expert goes through that norm too, and is recorded as `inner`."""
    has_input: bool = False
    """Whether the layer's own input is recorded; it always is for a target without a source."""
    training_free: float = Field(ge=0, le=1)
    """Hit rate without a predictor, over a sample of the rows."""
    control: float = Field(ge=0, le=1)
    """Hit rate of norm and router on their recorded true input, over every eighth row."""


class ShardEntry(_Entry):
    file: str = Field(pattern=r"^shard-(\d{4,}-)?\d{5,}\.safetensors$")
    rows: int = Field(gt=0)
    bytes: int = Field(gt=0)
    xxh3: str


class Manifest(_Entry):
    """Everything in manifest.json."""

    format_version: int
    model: ModelEntry
    layers: list[LayerEntry] = Field(min_length=1)
    dtype: str
    """The model's dtype while it was recorded."""
    phase: str
    """`prefill`: the rows are tokens of whole sequences; `decode`: tokens that the model generated one at a time."""
    corpus: str
    split: str
    seed: int
    sequence_length: int
    sequences: int
    """Every row's `sequence` is below it; a sample may leave out all rows of a sequence."""
    tokens: int
    """Rows."""
    speculation_xxh3: str
    config_xxh3: str | None = None
    shards: list[ShardEntry] = Field(min_length=1)
    settings: dict[str, Any] = {}
    """The settings of `collect` that decide what is recorded."""
    origin: dict[str, str | None] = {}
    """The files of the model, as hashes, and how it was run: `progress.origin_of`. Older releases wrote nothing."""
    processes: int = 1
    """How many processes shared the collection; the shards of each follow one another."""
    versions: dict[str, str]
    command: str

    @property
    def form(self) -> Form:
        """Of the predictors that it was recorded for; the same in all layers."""
        return self.layers[0].form


def read_manifest(path: Path) -> Manifest:
    """The manifest of the trace in the folder `path`. Raises `TraceError` if it is missing or broken."""
    if not path.is_dir():
        raise TraceError(f"there is no trace at {path}; give the folder that collect wrote")
    file = path / MANIFEST
    if not file.is_file():
        unfinished = any(path.glob("shard-*")) or any(path.glob("progress-*"))
        raise TraceError(
            f"{path} holds an unfinished trace (no {MANIFEST}); go on with collect --resume"
            if unfinished
            else f"{path} holds no trace (no {MANIFEST}); give the folder that collect wrote"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TraceError(f"{file} is not a trace's manifest; collect the trace again") from error
    if version not in READABLE:
        raise TraceError(
            f"{file} has format version {shown(version)}, and this release reads {READABLE[0]} to {READABLE[-1]}; collect "
            "the trace again, or update predict-train"
        )
    try:
        manifest = Manifest.model_validate({key: value for key, value in content.items() if key != CHECKSUM})
    except ValidationError as error:
        raise TraceError(f"{file} is broken: {describe(error)}; collect the trace again") from error
    if is_changed(content) or (version > 2 and not (CHECKSUM in content and manifest.config_xxh3)):
        raise TraceError(f"{file} is not what collect wrote: its checksum is another; collect the trace again")
    known = set(manifest.model.moe_layers)
    if not {i for entry in manifest.layers for i in (entry.layer, entry.source) if i is not None} <= known:
        raise TraceError(f"{file} is broken: layers names layers that are not MoE layers; collect the trace again")
    return manifest
