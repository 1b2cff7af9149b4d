"""The trace on disk: the record of a model's run, and everything that `fit` needs.

    manifest.json            what was recorded, from which model and text, and the checksums of all files, itself included
    config.json              the model's config
    speculation.safetensors  default vectors, norms and routers: the wiring of its speculators (see `wiring.py`)
    shard-NNNNN.safetensors  one row a token (shard-RRRR-NNNNN of process RRRR, where many shared the collection):
        layers.<l>.residual        [rows, hidden]   bf16    of every source layer
        layers.<l>.inner           [rows, hidden]   bf16    of a source that norms its shared expert with its experts
        layers.<l>.input           [rows, hidden]   bf16    of a target that has no source; with `--inputs` of each
        layers.<l>.expert_ids      [rows, top_k]    int16   of every recorded layer
        layers.<l>.expert_weights  [rows, top_k]    bf16    of every recorded layer
        layers.<l>.router_logits   [rows, experts]  bf16    of every target
        token_ids, position, sequence  [rows]       int32

Floats are bf16, to save bytes. Rounding changes no choice: the experts are in `expert_ids`, weights only scale the
default vectors, and logits only shape the loss. The manifest is written last: a folder without one is an unfinished
trace.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoConfig

from ..predictors.architecture import skeleton
from ..predictors.files import checksum
from ..predictors.routing import Routing
from ..predictors.speculation import Wiring
from ..predictors.stacked import StackedSpeculators
from .columns import POSITION, ROW_COLUMNS, SEQUENCE, Column, Columns, column_shapes, first_not_finite
from .manifest import Manifest, TraceError, read_manifest
from .wiring import rebuilt_wirings, vectors_in

CONFIG, SPECULATION = "config.json", "speculation.safetensors"
RUN, MOST_AT_ONCE, BYTES_AT_ONCE = 64, 2048, 32 << 20
"""Rows are read in pieces of a multiple of `RUN`, whose states of all layers take about so many bytes in fp32. What is computed from
them takes several times as many."""

Piece = tuple[int, torch.Tensor]
"""A shard and rows of it, int64."""


class Trace:
    """A finished trace; its rows are mapped from disk. Use `Trace.open`.

    Each file is compared with its checksum before anything is read from it. A copy (`copy.copy`) has mappings of its own,
    and does not compare again what this one has compared.
    """

    def __init__(self, path: Path, manifest: Manifest, is_checked: bool = False):
        """`is_checked` says that the files are right, since this process has written them."""
        self.path, self.manifest = path, manifest
        self.sources = {entry.layer: entry.source for entry in manifest.layers}
        """The source layer of each target."""
        self._checked = {CONFIG, SPECULATION, *(shard.file for shard in manifest.shards)} if is_checked else set()
        self._mapped: dict[int, Any] = {}
        self._columns: dict[int, Columns] = {}

    @classmethod
    def open(cls, path: str | Path) -> Trace:
        """Opens the trace in the folder `path`; checks its manifest and that its files are complete.

        Raises `TraceError` otherwise, naming the field or the file. `verify` checks the contents of all files at once.
        """
        path = Path(path)
        trace = cls(path, read_manifest(path))
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
        # Mappings can't be sent to the processes of a data loader: each process maps the files itself.
        return self.__dict__ | {"_mapped": {}, "_columns": {}}

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.manifest.shards)

    def verify(self) -> None:
        """Reads every file once and compares it with its checksum. Raises `TraceError` naming the file that differs."""
        self._check(CONFIG, self.manifest.config_xxh3)
        self._check(SPECULATION, self.manifest.speculation_xxh3)
        for number in range(len(self.manifest.shards)):
            self._check_columns(number)

    def _check(self, name: str, expected: str | None) -> None:
        """Compares a file with its checksum, unless that was done. Older releases wrote none for the config."""
        if name in self._checked or expected is None:
            return
        try:
            found = checksum(self.path / name)
        except OSError as error:
            raise TraceError(f"{self.path / name} can't be read ({error.strerror}); collect the trace again") from error
        if found != expected:
            raise TraceError(f"{self.path / name} is broken: its checksum is not the manifest's; collect it again")
        self._checked.add(name)

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
            shard = self.manifest.shards[number]
            file = self.path / shard.file
            self._check(shard.file, shard.xxh3)
            try:
                self._mapped[number] = safe_open(file, "pt")
            except (OSError, SafetensorError) as error:
                raise TraceError(f"{file} is broken ({error}); collect the trace again") from error
        return self._mapped[number]

    def unmap(self, but: Collection[int] = ()) -> None:
        """Unmaps all shards except `but`: mapped files count as this process's memory."""
        for shard in self._mapped.keys() - set(but):
            self._mapped.pop(shard)
            self._columns.pop(shard, None)

    def column(self, shard: int, name: str) -> torch.Tensor:
        """One whole column of a shard, mapped from disk: pages are read on first use."""
        columns = self._columns.setdefault(shard, {})
        if name not in columns:  # finding it in the file takes longer than reading a few hundred rows
            columns[name] = self._map(shard).get_tensor(name)
        return columns[name]

    def read(self, shard: int, rows: torch.Tensor, names: Iterable[str] | None = None) -> Columns:
        """The given rows `[n]` (int64, counted from the shard's start) of the columns `names`, by default of all layers'."""
        return self.gather([(shard, rows)], names)

    def gather(self, pieces: Sequence[Piece], names: Iterable[str] | None = None) -> Columns:
        """The rows of several shards, one piece after another; columns as in `read`.

        Raises `TraceError` naming layer and token if a value is not finite.
        """
        if names is None:
            names = [name for name in column_shapes(self.manifest) if name not in ROW_COLUMNS]
        count, columns = sum(len(rows) for _, rows in pieces), {}
        for name in names:
            first = self.column(pieces[0][0], name)
            columns[name] = torch.empty((count, *first.shape[1:]), dtype=first.dtype)
            places = columns[name].split([len(rows) for _, rows in pieces])
            for (shard, rows), place in zip(pieces, places, strict=True):
                torch.index_select(self.column(shard, name), 0, rows, out=place)
        if found := first_not_finite(columns):
            layer, kind, row = found
            shard, row = [(shard, int(row)) for shard, rows in pieces for row in rows][row]
            sequence, position = (int(numbers[row]) for numbers in self.places(shard))
            raise TraceError(
                f"{self.path}: a value of the {kind} of layer {layer} is not finite at token {position} of sequence {sequence}; "
                "collect the trace again with --dtype bfloat16 or float32"
            )
        return columns

    def row_bytes(self, names: Iterable[str]) -> int:
        """The bytes of a row of these columns."""
        shapes = column_shapes(self.manifest)
        return sum((shapes[name][1] or 1) * shapes[name][0].itemsize for name in names)

    def columns_for(self, sources: dict[int, int | None], memory: int = 0) -> list[str]:
        """The columns that `examples.make_batch` reads for `sources` and `memory`."""
        recorded = column_shapes(self.manifest)
        names: dict[str, None] = dict.fromkeys((SEQUENCE, POSITION) if memory else ())
        for target, source in sources.items():
            names |= dict.fromkeys((Column.EXPERT_IDS.of(target), Column.ROUTER_LOGITS.of(target)))
            if source is None:
                names |= {Column.INPUT.of(target): None}
            else:
                read = (Column.RESIDUAL, Column.INNER, Column.EXPERT_IDS, Column.EXPERT_WEIGHTS)
                names |= dict.fromkeys(column.of(source) for column in read)
        return [name for name in names if name in recorded]

    def places(self, shard: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Each token's sequence number and its position in the sequence, int32 `[rows]` each, of a shard."""
        return self.column(shard, SEQUENCE), self.column(shard, POSITION)

    def by_token(self, shard: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of a shard as rising numbers, int64 `[rows]`, and their rows.

        The numbers differ by 1 from one token of a sequence to the next. Neighbouring rows say nothing: rows may be sampled, and
        sequences may be interleaved.
        """
        sequence, position = self.places(shard)
        token, order = ((sequence.long() << 32) + position.long()).sort()
        return token, order

    def expert_ids(self, columns: Columns) -> torch.Tensor:
        """The experts that each target's router chose, for the rows of `columns`, int64 `[rows, targets, top_k]`."""
        return torch.stack([columns[Column.EXPERT_IDS.of(target)] for target in self.sources], 1).long()

    def router_logits(self, columns: Columns, target: int) -> torch.Tensor:
        """The logits of the target's router for the rows of `columns`, fp32 `[rows, experts]`."""
        return columns[Column.ROUTER_LOGITS.of(target)].float()

    def speculator_input(
        self, columns: Columns, target: int, source: int | None
    ) -> tuple[torch.Tensor, Routing | None, torch.Tensor | None]:
        """The arguments of the speculator of `target` that reads `source`, for the rows of `columns`; floats are fp32."""
        if source is None:
            return columns[Column.INPUT.of(target)].float(), None, None
        weights, inner = columns[Column.EXPERT_WEIGHTS.of(source)].float(), columns.get(Column.INNER.of(source))
        # A speculation does not read a source's logits; the trace lacks them if the source is no target.
        routing = Routing(weights, weights, columns[Column.EXPERT_IDS.of(source)].long())
        return columns[Column.RESIDUAL.of(source)].float(), routing, None if inner is None else inner.float()

    def lacks_input(self, sources: dict[int, int | None]) -> int | None:
        """The first target that reads its own input by `sources` although the trace lacks that input; or None."""
        recorded = column_shapes(self.manifest)
        own = (target for target, source in sources.items() if source is None)
        return next((target for target in own if Column.INPUT.of(target) not in recorded), None)

    @property
    def rows_at_once(self) -> int:
        """How many rows `pieces` has at a time."""
        fitting = BYTES_AT_ONCE // (4 * self.manifest.model.hidden_size * len(self.sources))
        return min(MOST_AT_ONCE, max(RUN, fitting // RUN * RUN))

    def pieces(self, chosen: Iterable[torch.Tensor]) -> Iterator[Piece]:
        """The `chosen` rows of each shard in pieces that are small enough to compute with."""
        return ((n, some) for n, rows in enumerate(chosen) for some in rows.split(self.rows_at_once) if len(some))

    def spaced(self, rows: int) -> list[torch.Tensor]:
        """Of each shard its part of about `rows` rows, int64, which are evenly spaced over the whole trace."""
        step = max(1, self.rows // rows)
        return [torch.arange(0, shard.rows, step) for shard in self.manifest.shards]

    def sample(self, rows: int, names: Iterable[str] | None = None) -> Iterator[Columns]:
        """The rows of `spaced`, in pieces; columns as in `read`."""
        for number, some in self.pieces(self.spaced(rows)):
            self.unmap(but=[number])
            yield self.read(number, some, names)
        self.unmap()

    def default_vectors(self) -> dict[int, torch.Tensor]:
        """By source layer: `[experts, hidden]`, fp32; of every source layer of the model, not only of the targets'.

        Raises `TraceError` if one is not finite.
        """
        return dict(sorted(vectors_in(self._speculation()).items()))

    def wirings(self, sources: dict[int, int | None] | None = None) -> dict[int, Wiring]:
        """The wiring of each target layer in fp32 on the CPU, frozen, rebuilt without the model's weights.

        `sources` gives the targets and their sources, by default the nearest. Raises `TraceError` if a part is missing.
        """
        self._check(CONFIG, self.manifest.config_xxh3)
        try:
            chosen = self.sources if sources is None else sources
            bones, state = skeleton(AutoConfig.from_pretrained(self.path)), self._speculation()
            return rebuilt_wirings(bones, self.manifest.layers, state, chosen, self.manifest.model.top_k)
        except TraceError:
            raise
        except Exception as error:  # a config may hold anything, and transformers raises whatever that leads to
            raise TraceError(
                f"the routers of {self.path} can't be rebuilt ({type(error).__name__}: {error}); collect the trace again"
            ) from error

    def stacked(self, sources: dict[int, int | None] | None = None) -> StackedSpeculators:
        """The training-free speculators of `wirings` as one computation, in the order of `sources`."""
        return StackedSpeculators(self.wirings(sources).values(), self.manifest.model.hidden_size)

    def _speculation(self) -> Columns:
        self._check(SPECULATION, self.manifest.speculation_xxh3)
        try:
            state = load_file(self.path / SPECULATION)
        except (OSError, SafetensorError) as error:
            raise TraceError(f"{self.path / SPECULATION} is broken ({error}); collect the trace again") from error
        for source, vectors in vectors_in(state).items():
            if not vectors.isfinite().all():
                raise TraceError(
                    f"{self.path}: the default vectors of layer {source} are not finite; collect the trace again with "
                    "--dtype bfloat16 or float32"
                )
        return state
