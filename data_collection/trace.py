"""The trace on disk: what a run of a model left behind, and all that `fit` needs.

    manifest.json            what was recorded, from which model and text, and the shards with their checksums
    config.json              the model's config
    speculation.safetensors  `default_vectors.<source>`; `layers.<target>.` `norm.<name>`, `router.<name>`,
                             `router_arguments.<n>`, `post_norm.<name>` (its source's)
    shard-NNNNN.safetensors  one row a token (shard-RRRR-NNNNN of process RRRR, where many shared the collection):
        layers.<l>.residual        [rows, hidden]   bf16    of every source layer
        layers.<l>.inner           [rows, hidden]   bf16    of a source that norms its shared expert with its experts
        layers.<l>.input           [rows, hidden]   bf16    of a target that has no source; with `--inputs` of each
        layers.<l>.expert_ids      [rows, top_k]    int16   of every recorded layer
        layers.<l>.expert_weights  [rows, top_k]    bf16    of every recorded layer
        layers.<l>.router_logits   [rows, experts]  bf16    of every target
        token_ids, position, sequence  [rows]       int32

bf16 throughout, because the bytes are what a trace costs, and nothing is chosen by what is rounded: the experts stand
in `expert_ids`, weights only scale the default vectors, and logits only shape the loss. The manifest is written last,
so a folder without one is an unfinished trace.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

from ..predictors.architecture import skeleton
from ..predictors.errors import UserError
from ..predictors.settings import describe
from ..predictors.speculation import Router, Speculator
from ..predictors.stacked import StackedSpeculators

FORMAT_VERSION = 2
MANIFEST, CONFIG, SPECULATION = "manifest.json", "config.json", "speculation.safetensors"
ROW_COLUMNS = ("token_ids", "position", "sequence")

Columns = dict[str, torch.Tensor]
"""Tensors of some rows, by the names that they have in a shard."""

Piece = tuple[int, torch.Tensor]
"""A shard and rows of it, int64."""


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
        """What predictors say of the model that they belong to."""
        return self.model_dump(exclude={"revision", "architecture"})


class LayerEntry(_Entry):
    """One target layer."""

    layer: int
    source: int | None
    norm: str
    """Dotted name of the norm in the model; empty where its routers read the residual stream itself."""
    router: str
    """Dotted name of the router in the model."""
    router_arguments: list[str] = []
    """Dotted names of what the router is called with beside its input."""
    router_ndim: Literal[2, 3] = 2
    """Of the router's input."""
    post_norm: str = ""
    """Dotted name of the norm that the source layer's experts' sum goes through, where it goes through one."""
    post_scale: float = 1.0
    """Factor of what that norm puts out."""
    has_inner: bool = False
    """Whether the source layer's shared expert goes through that norm as well, and is recorded as `inner`."""
    has_input: bool = False
    """Whether the layer's own input is recorded; of a target without a source it always is."""
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
    """Of the model while it was recorded."""
    phase: str
    """`prefill`: the rows are tokens of whole sequences, computed at once; `decode`: tokens that the model generated and
    read one at a time."""
    corpus: str
    split: str
    seed: int
    sequence_length: int
    sequences: int
    """`sequence` of a row is below it; a sample may have left all of a sequence out."""
    tokens: int
    """Rows."""
    speculation_xxh3: str
    shards: list[ShardEntry] = Field(min_length=1)
    settings: dict[str, Any] = {}
    """Those of `collect` that decide what is recorded."""
    processes: int = 1
    """How many shared the collection; the shards of each stand one after another."""
    versions: dict[str, str]
    command: str


def column_shapes(manifest: Manifest) -> dict[str, tuple[torch.dtype, int | None]]:
    """Dtype and width of each column; a width of None is one value a row."""
    model = manifest.model
    shapes: dict[str, tuple[torch.dtype, int | None]] = dict.fromkeys(ROW_COLUMNS, (torch.int32, None))
    for entry in manifest.layers:
        if entry.source is None or entry.has_input:
            shapes[f"layers.{entry.layer}.input"] = (torch.bfloat16, model.hidden_size)
        if entry.source is not None:
            shapes[f"layers.{entry.source}.residual"] = (torch.bfloat16, model.hidden_size)
            if entry.has_inner:
                shapes[f"layers.{entry.source}.inner"] = (torch.bfloat16, model.hidden_size)
        shapes[f"layers.{entry.layer}.router_logits"] = (torch.bfloat16, model.num_experts)
    for layer in {layer for entry in manifest.layers for layer in (entry.layer, entry.source) if layer is not None}:
        shapes[f"layers.{layer}.expert_ids"] = (torch.int16, model.top_k)
        shapes[f"layers.{layer}.expert_weights"] = (torch.bfloat16, model.top_k)
    return shapes


class Trace:
    """A finished trace, its rows mapped from disk. Use `Trace.open`."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path, self.manifest = path, manifest
        self.sources = {entry.layer: entry.source for entry in manifest.layers}
        """The source layer of each target."""
        self._mapped: dict[int, Any] = {}
        self._columns: dict[int, Columns] = {}

    @classmethod
    def open(cls, path: str | Path) -> Trace:
        """Opens the trace in the folder `path`: its manifest is checked, and its files must be there whole.

        Raises `TraceError` otherwise, naming the field or the file. Contents are checked by `verify`.
        """
        path = Path(path)
        trace = cls(path, _read_manifest(path))
        for shard in trace.manifest.shards:
            file = path / shard.file
            if not file.is_file():
                raise TraceError(f"{file} is missing from the trace; collect it again")
            if file.stat().st_size != shard.bytes:
                raise TraceError(
                    f"{file} is broken: it has {file.stat().st_size} bytes, and should have {shard.bytes}; collect it again"
                )
        for name in (CONFIG, SPECULATION):
            if not (path / name).is_file():
                raise TraceError(f"{path / name} is missing from the trace; collect it again")
        return trace

    def __getstate__(self) -> dict[str, Any]:
        # Mappings don't travel to the processes of a data loader; each of them maps the files itself.
        return self.__dict__ | {"_mapped": {}, "_columns": {}}

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.manifest.shards)

    def verify(self) -> None:
        """Reads every file once and compares it with its checksum. Raises `TraceError` naming the file that differs."""
        files = {shard.file: shard.xxh3 for shard in self.manifest.shards}
        for name, expected in {SPECULATION: self.manifest.speculation_xxh3, **files}.items():
            if checksum(self.path / name) != expected:
                raise TraceError(f"{self.path / name} is broken: its checksum is not the manifest's; collect it again")
        for number in range(len(self.manifest.shards)):
            self._check_columns(number)

    def _check_columns(self, number: int) -> None:
        shard = self.manifest.shards[number]
        mapped, found = self._map(number), set(self._map(number).keys())
        for name, (dtype, width) in column_shapes(self.manifest).items():
            shape = [shard.rows] if width is None else [shard.rows, width]
            if (
                name not in found
                or mapped.get_slice(name).get_shape() != shape
                or mapped.get_tensor(name).dtype != dtype
            ):
                raise TraceError(
                    f"{self.path / shard.file} lacks {name} as {dtype} {shape}, which its manifest promises; collect it again"
                )

    def _map(self, number: int) -> Any:
        if number not in self._mapped:
            file = self.path / self.manifest.shards[number].file
            try:
                self._mapped[number] = safe_open(file, "pt")
            except (OSError, SafetensorError) as error:
                raise TraceError(f"{file} is broken ({error}); collect the trace again") from error
        return self._mapped[number]

    def unmap(self, but: Collection[int] = ()) -> None:
        """Gives the mapped shards back, `but` those: what is mapped counts as this process's memory."""
        for shard in self._mapped.keys() - set(but):
            self._mapped.pop(shard)
            self._columns.pop(shard, None)

    def column(self, shard: int, name: str) -> torch.Tensor:
        """One whole column of a shard, mapped from disk: pages are read when they are touched."""
        columns = self._columns.setdefault(shard, {})
        if name not in columns:  # finding it in the file takes longer than reading some hundred rows
            columns[name] = self._map(shard).get_tensor(name)
        return columns[name]

    def read(self, shard: int, rows: torch.Tensor, names: Iterable[str] | None = None) -> Columns:
        """The given rows `[n]` (int64, counted from the shard's start) of the columns `names`, by default of all but the
        token's own."""
        return self.gather([(shard, rows)], names)

    def gather(self, pieces: Sequence[Piece], names: Iterable[str] | None = None) -> Columns:
        """The rows of several shards, one piece after the other; columns as in `read`."""
        if names is None:
            names = [name for name in column_shapes(self.manifest) if name not in ROW_COLUMNS]
        count, columns = sum(len(rows) for _, rows in pieces), {}
        for name in names:
            first = self.column(pieces[0][0], name)
            columns[name] = torch.empty((count, *first.shape[1:]), dtype=first.dtype)
            places = columns[name].split([len(rows) for _, rows in pieces])
            for (shard, rows), place in zip(pieces, places, strict=True):
                torch.index_select(self.column(shard, name), 0, rows, out=place)
        return columns

    def row_bytes(self, names: Iterable[str]) -> int:
        """What a row of these columns takes."""
        shapes = column_shapes(self.manifest)
        return sum((shapes[name][1] or 1) * shapes[name][0].itemsize for name in names)

    def columns_for(self, sources: dict[int, int | None]) -> list[str]:
        """The columns that `examples.make_batch` reads where each target reads what `sources` says."""
        recorded = column_shapes(self.manifest)
        names: dict[str, None] = {}
        for target, source in sources.items():
            names |= dict.fromkeys(f"layers.{target}.{column}" for column in ("expert_ids", "router_logits"))
            read = ["input"] if source is None else ["residual", "inner", "expert_ids", "expert_weights"]
            names |= dict.fromkeys(f"layers.{target if source is None else source}.{column}" for column in read)
        return [name for name in names if name in recorded]

    def sample(self, rows: int, names: Iterable[str] | None = None) -> Iterator[Columns]:
        """About `rows` rows in all, evenly spaced over the whole trace, shard by shard; columns as in `read`."""
        step = max(1, self.rows // rows)
        for number, shard in enumerate(self.manifest.shards):
            yield self.read(number, torch.arange(0, shard.rows, step), names)
            self.unmap()

    def default_vectors(self) -> dict[int, torch.Tensor]:
        """By source layer: `[experts, hidden]`, fp32."""
        state = self._speculation()
        return {s: state[f"default_vectors.{s}"] for s in sorted({s for s in self.sources.values() if s is not None})}

    def speculators(
        self, device: torch.device | str = "cpu", sources: dict[int, int | None] | None = None
    ) -> dict[int, Speculator]:
        """A training-free speculator for each target layer, in fp32, frozen, made without the model's weights.

        With `sources`, those of their targets, each reading what it says; by default the nearest source.
        """
        try:
            bones = skeleton(AutoConfig.from_pretrained(self.path))
            state = self._speculation()
            by_layer = {entry.layer: entry for entry in self.manifest.layers}
            # How a source's experts join its output stands with the target that it is the nearest source of.
            by_source = {entry.source: entry for entry in self.manifest.layers if entry.source is not None}

            def rebuilt(name: str, stored: str) -> nn.Module:
                module = bones.get_submodule(name) if name else nn.Identity()
                module.to_empty(device=device)
                for part, tensor in [*module.named_parameters(), *module.named_buffers()]:
                    tensor.data = state[f"{stored}.{part}"].to(device)
                return module.float().requires_grad_(False).eval()

            speculators = {}
            for target, source in (self.sources if sources is None else sources).items():
                entry, joined = by_layer[target], None if source is None else by_source.get(source)
                post_norm = None
                if joined is not None and joined.post_norm:
                    post_norm = rebuilt(joined.post_norm, f"layers.{joined.layer}.post_norm")
                arguments = [
                    state[f"layers.{target}.router_arguments.{number}"].to(device).float()
                    for number in range(len(entry.router_arguments))
                ]
                speculators[target] = Speculator(
                    rebuilt(entry.norm, f"layers.{target}.norm"),
                    Router(rebuilt(entry.router, f"layers.{target}.router"), tuple(arguments), entry.router_ndim),
                    None if source is None else state[f"default_vectors.{source}"],
                    post_norm=post_norm,
                    post_scale=1.0 if joined is None else joined.post_scale,
                ).to(device)
        except (KeyError, AttributeError, ValueError, RuntimeError, OSError) as error:
            raise TraceError(
                f"the routers of {self.path} can't be rebuilt ({type(error).__name__}: {error}); collect the trace again"
            ) from error
        return speculators

    def stacked(self, sources: dict[int, int | None] | None = None) -> StackedSpeculators:
        """The speculators of `speculators`, on the CPU, as one computation; their order is that of `sources`."""
        return StackedSpeculators(self.speculators(sources=sources).values(), self.manifest.model.hidden_size)

    def _speculation(self) -> Columns:
        try:
            return load_file(self.path / SPECULATION)
        except (OSError, SafetensorError) as error:
            raise TraceError(f"{self.path / SPECULATION} is broken ({error}); collect the trace again") from error


def checksum(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, xxhash.xxh3_128).hexdigest()


def write_durably(file: Path, text: str) -> None:
    """Writes a text file that is there whole or not at all, even if the machine stops."""
    aside = file.with_name(file.name + ".partial")
    with aside.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(aside, file)


def _read_manifest(path: Path) -> Manifest:
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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TraceError(f"{file} is not a trace's manifest; collect the trace again") from error
    if version != FORMAT_VERSION:
        raise TraceError(
            f"{file} has format version {version}, and this release reads {FORMAT_VERSION}; collect the trace again"
        )
    try:
        manifest = Manifest(**content)
    except ValidationError as error:
        raise TraceError(f"{file} is broken: {describe(error)}; collect the trace again") from error
    known = set(manifest.model.moe_layers)
    if not {i for entry in manifest.layers for i in (entry.layer, entry.source) if i is not None} <= known:
        raise TraceError(f"{file} is broken: layers names layers that are not MoE layers; collect the trace again")
    return manifest
