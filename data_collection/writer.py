"""Writes a trace's shards in a separate thread, so that the disk works while the model computes.

Memory for the rows of two shards is allocated once: one is filled while the other is written. New memory for each batch
would cost more than copying the rows, because its first use is slow.
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save

from ..predictors.files import checksum, sealed, written_whole
from .columns import Columns
from .manifest import MANIFEST, Manifest, ShardEntry, TraceError
from .progress import Snapshot, save_progress
from .trace import CONFIG, SPECULATION

DTYPES = {torch.bfloat16: "BF16", torch.int16: "I16", torch.int32: "I32"}
"""The dtypes of a shard's columns, as safetensors names them."""


class Rows:
    """Columns that grow row by row in their own memory, which `clear` keeps."""

    def __init__(self) -> None:
        self.count = 0
        self.bytes = 0
        self._memory: Columns = {}
        self._capacity = 0

    def append(self, columns: Columns, expected: int) -> None:
        """Copies rows; `expected` is how many bytes all rows together may have. There may be fewer, so memory grows up to that."""
        count = len(next(iter(columns.values())))
        if not count:
            return
        end = self.count + count
        if end > self._capacity:
            row_bytes = sum(tensor.nbytes for tensor in columns.values()) // count
            self._grow(columns, max(end + count, min(expected // row_bytes + 2 * count, 8 * end)))
        for name, tensor in columns.items():
            self._memory[name][self.count : end] = tensor
            self.bytes += tensor.nbytes
        self.count = end

    def _grow(self, columns: Columns, capacity: int) -> None:
        before, self._memory, self._capacity = self._memory, {}, capacity
        for name, tensor in columns.items():
            self._memory[name] = tensor.new_empty(capacity, *tensor.shape[1:])
            if self.count:
                self._memory[name][: self.count] = before[name][: self.count]

    def columns(self) -> Columns:
        """The rows, as views of the memory."""
        return {name: memory[: self.count] for name, memory in self._memory.items()}

    def clear(self) -> None:
        self.count = self.bytes = 0


class TraceWriter:
    """A context that makes the folder `path`, takes rows by `append`, and ends with `flush`.

    A shard ends with the first batch that fills it. It appears whole or not at all, and after it the progress that came
    with its last batch. After an error nothing is removed, no other shard is written, and the next call raises it as a
    `TraceError`.

    With several processes, process `rank` continues after its own `shards`, whose names begin with `prefix`.
    """

    def __init__(
        self, path: Path, shard_bytes: int, rank: int = 0, prefix: str = "shard", shards: list[ShardEntry] | None = None
    ):
        self.path, self.shard_bytes, self.rank, self.prefix = path, shard_bytes, rank, prefix
        self.shards: list[ShardEntry] = list(shards or [])
        """The shards written so far; complete after `flush`."""
        self._filling: Rows | None = None
        self._writes: deque[Future[Rows]] = deque()
        """The writes of the last shards, in order, at most two; each returns its memory."""
        self._pool = ThreadPoolExecutor(1, "trace-writer")

    def __enter__(self) -> TraceWriter:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TraceError(
                f"{self.path} can't be made ({error.strerror}); name a folder that can be written"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def append(self, columns: Columns, snapshot: Callable[[], Snapshot] | None = None) -> None:
        """Copies rows: CPU tensors of one length, by column name.

        If they fill a shard, `snapshot` gives the progress at its end.
        """
        for write in self._writes:
            if write.done():
                write.result()  # raises the error of the write
        if self._filling is None:  # waits if both shards are still being written
            self._filling = Rows() if len(self._writes) < 2 else self._writes.popleft().result()
        self._filling.append(columns, self.shard_bytes)
        if self._filling.bytes >= self.shard_bytes:
            self._hand_over(self._filling, snapshot)

    def flush(self) -> list[ShardEntry]:
        """Waits until all rows are on disk; returns the shards. No rows can be appended after it."""
        if self._filling is not None and self._filling.count:
            self._hand_over(self._filling, None)
        for write in self._writes:
            write.result()
        return self.shards

    def _hand_over(self, rows: Rows, snapshot: Callable[[], Snapshot] | None) -> None:
        progress, before = None if snapshot is None else snapshot(), self._writes[-1] if self._writes else None
        self._writes.append(self._pool.submit(self._write_shard, rows, progress, before))
        self._filling = None

    def _write_shard(self, rows: Rows, snapshot: Snapshot | None, before: Future[Rows] | None) -> Rows:
        """Writes a shard, unless the one before it failed, and returns its memory."""
        if before is not None:
            before.result()
        file = self.path / f"{self.prefix}-{len(self.shards):05d}.safetensors"
        with disk(file), written_whole(file) as aside:
            digest = write_columns(aside, rows.columns())
        entry = ShardEntry(file=file.name, rows=rows.count, bytes=file.stat().st_size, xxh3=digest)
        self.shards.append(entry)
        if snapshot is not None:
            with disk(self.path):
                progress = snapshot.progress.model_copy(update={"shards": list(self.shards)})
                save_progress(self.path, self.rank, Snapshot(progress, snapshot.sums))
        rows.clear()
        return rows


def write_columns(file: Path, columns: Columns) -> str:
    """Writes a safetensors file and returns its checksum, computed while it writes.

    The widest dtypes come first, so that all are aligned. safetensors' own `save` would need the memory of two more
    shards, take twice as long, and order the columns differently, so that equal traces would have different files.
    """
    ordered = sorted(columns.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header, end = {}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_128()
    with file.open("wb") as out:
        tensors = (tensor.flatten().view(torch.uint8).numpy().data for _, tensor in ordered)
        for part in (memoryview(len(text).to_bytes(8, "little") + text), *tensors):
            out.write(part)
            digest.update(part)
    return digest.hexdigest()


def write_speculation(folder: Path, tensors: Columns, config_json: str) -> dict[str, str]:
    """Writes the tensors for speculation and the model's config; returns the manifest's fields of their checksums."""
    file = folder / SPECULATION
    with disk(file):
        with written_whole(file) as aside:
            aside.write_bytes(save(tensors))  # a file of save_file could be read by its owner only
        with written_whole(folder / CONFIG) as aside:
            aside.write_text(config_json, encoding="utf-8")
    return {"speculation_xxh3": checksum(file), "config_xxh3": checksum(folder / CONFIG)}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest, which makes the trace a finished one."""
    file = folder / MANIFEST
    with disk(file), written_whole(file) as aside:
        aside.write_text(json.dumps(sealed(manifest.model_dump(mode="json")), indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def disk(file: Path) -> Iterator[None]:
    """Turns the disk's errors into a `TraceError` that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TraceError(
            f"{file} can't be written ({reason}); make room and go on with --resume, or name another folder"
        ) from error
