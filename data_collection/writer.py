"""Writes a trace's shards from a thread of its own, so that the disk works while the model computes."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from data_collection.trace import (
    CONFIG,
    MANIFEST,
    SPECULATION,
    Columns,
    Manifest,
    ShardEntry,
    TraceError,
    checksum,
    write_durably,
)

SHARD_BYTES = 256 << 20


class TraceWriter:
    """A context that makes the folder `path`, takes rows by `append`, and ends with `finish`.

    Left by an error, or without `finish`, it removes everything that it wrote. An error of the disk surfaces as a
    `TraceError` in the next call.
    """

    def __init__(self, path: Path, shard_bytes: int = SHARD_BYTES):
        self.path, self.shard_bytes = path, shard_bytes
        self.shards: list[ShardEntry] = []
        """Of those written so far; complete after `flush`."""
        self._waiting: list[Columns] = []
        self._waiting_bytes = 0
        # One shard waits while one is written: enough to overlap, and memory stays bounded.
        self._queue: queue.Queue[list[Columns] | None] = queue.Queue(maxsize=1)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="trace-writer", daemon=True)
        self._finished = False

    def __enter__(self) -> TraceWriter:
        self._existed = self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TraceError(
                f"{self.path} can't be made ({error.strerror}); name a folder that can be written"
            ) from error
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        if not self._finished:
            shutil.rmtree(self.path, ignore_errors=True)
            if self._existed:
                self.path.mkdir(exist_ok=True)

    def append(self, columns: Columns) -> None:
        """Takes rows: CPU tensors of one length, by column name, that the caller does not change any more."""
        self._raise()
        self._waiting.append(columns)
        self._waiting_bytes += sum(tensor.nbytes for tensor in columns.values())
        if self._waiting_bytes >= self.shard_bytes:
            self._hand_over()

    def flush(self) -> list[ShardEntry]:
        """Waits until all rows are on disk; returns the shards. No rows can be appended after it."""
        if self._waiting:
            self._hand_over()
        self._stop()
        self._raise()
        return self.shards

    def write_speculation(self, tensors: Columns, config_json: str) -> str:
        """Writes what speculation needs beside the rows; returns the checksum of its tensors."""
        file = self.path / SPECULATION
        with _disk(file):
            save_file(tensors, file)
            _sync(file)
            write_durably(self.path / CONFIG, config_json)
        return checksum(file)

    def finish(self, manifest: Manifest) -> int:
        """Writes the manifest, which makes the trace a whole one; returns the bytes of all its files."""
        with _disk(self.path / MANIFEST):
            write_durably(self.path / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
            _sync(self.path)
        self._finished = True
        return sum(file.stat().st_size for file in self.path.iterdir())

    def _hand_over(self) -> None:
        self._queue.put(self._waiting)
        self._waiting, self._waiting_bytes = [], 0

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (parts := self._queue.get()) is not None:
            if self._error is not None:
                continue  # the queue is emptied all the same, or the main thread would wait for ever
            try:
                self._write_shard(parts)
            except Exception as error:  # raised again in the main thread
                self._error = error

    def _write_shard(self, parts: list[Columns]) -> None:
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        file = self.path / f"shard-{len(self.shards):05d}.safetensors"
        aside = file.with_name(file.name + ".partial")
        with _disk(file):
            save_file(columns, aside)
            _sync(aside)
            digest = checksum(aside)
            os.replace(aside, file)
        rows = len(next(iter(columns.values())))
        self.shards.append(ShardEntry(file=file.name, rows=rows, bytes=file.stat().st_size, sha256=digest))


@contextlib.contextmanager
def _disk(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TraceError(f"{file} can't be written ({error}); make room or name another folder") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
