"""Writes a trace's shards from a thread of its own, so that the disk works while the model computes."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from data_collection.progress import Snapshot, save_progress, sync
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


class TraceWriter:
    """A context that makes the folder `path`, takes rows by `append`, and ends with `flush`.

    A shard ends with the first batch that fills it. It is there whole or not at all, and once it is, the progress that
    came with its last batch. Nothing is removed by an error, which surfaces as a `TraceError` in the next call.

    Process `rank` of several goes on after `shards`, its own that are written already; `prefix` begins their names.
    """

    def __init__(
        self,
        path: Path,
        shard_bytes: int,
        rank: int = 0,
        prefix: str = "shard",
        shards: list[ShardEntry] | None = None,
    ):
        self.path, self.shard_bytes, self.rank, self.prefix = path, shard_bytes, rank, prefix
        self.shards: list[ShardEntry] = list(shards or [])
        """Of those written so far; complete after `flush`."""
        self._waiting: list[Columns] = []
        self._waiting_bytes = 0
        # One shard waits while one is written: enough to overlap, and memory stays bounded.
        self._queue: queue.Queue[tuple[list[Columns], Snapshot | None] | None] = queue.Queue(maxsize=1)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="trace-writer", daemon=True)

    def __enter__(self) -> TraceWriter:
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

    def append(self, columns: Columns, snapshot: Callable[[], Snapshot] | None = None) -> None:
        """Takes rows: CPU tensors of one length, by column name, that the caller does not change any more.

        Where they fill a shard, `snapshot` is asked for the progress at its end.
        """
        self._raise()
        self._waiting.append(columns)
        self._waiting_bytes += sum(tensor.nbytes for tensor in columns.values())
        if self._waiting_bytes >= self.shard_bytes:
            self._hand_over(snapshot)

    def flush(self) -> list[ShardEntry]:
        """Waits until all rows are on disk; returns the shards. No rows can be appended after it."""
        if self._waiting_bytes:
            self._hand_over(None)
        self._stop()
        self._raise()
        return self.shards

    def _hand_over(self, snapshot: Callable[[], Snapshot] | None) -> None:
        self._queue.put((self._waiting, None if snapshot is None else snapshot()))
        self._waiting, self._waiting_bytes = [], 0

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is not None:
                continue  # the queue is emptied all the same, or the main thread would wait for ever
            try:
                self._write_shard(*item)
            except Exception as error:  # raised again in the main thread
                self._error = error

    def _write_shard(self, parts: list[Columns], snapshot: Snapshot | None) -> None:
        columns = {name: _joined([part[name] for part in parts]) for name in parts[0]}
        file = self.path / f"{self.prefix}-{len(self.shards):05d}.safetensors"
        aside = file.with_name(file.name + ".partial")
        with disk(file):
            try:
                save_file(columns, aside)
                sync(aside)
                digest = checksum(aside)
                os.replace(aside, file)
                sync(self.path)
            finally:
                aside.unlink(missing_ok=True)  # on a full disk its room is wanted
        rows = len(next(iter(columns.values())))
        self.shards.append(ShardEntry(file=file.name, rows=rows, bytes=file.stat().st_size, xxh3=digest))
        if snapshot is not None:
            with disk(self.path):
                progress = snapshot.progress.model_copy(update={"shards": list(self.shards)})
                save_progress(self.path, self.rank, Snapshot(progress, snapshot.sums))


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """`torch.cat`, by numpy: in a second thread, torch would start a second team of threads and the model would wait for
    cores that this one holds."""
    as_bytes = [part.contiguous().view(torch.uint8).numpy() for part in parts]
    return torch.from_numpy(np.concatenate(as_bytes)).view(parts[0].dtype)


def write_speculation(folder: Path, tensors: Columns, config_json: str) -> str:
    """Writes what speculation needs beside the rows; returns the checksum of its tensors."""
    file = folder / SPECULATION
    with disk(file):
        save_file(tensors, file)
        sync(file)
        write_durably(folder / CONFIG, config_json)
    return checksum(file)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest, which makes the trace a finished one."""
    with disk(folder / MANIFEST):
        write_durably(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        sync(folder)


@contextlib.contextmanager
def disk(file: Path) -> Iterator[None]:
    """Turns what the disk raises into a `TraceError` that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TraceError(
            f"{file} can't be written ({reason}); make room and go on with --resume, or name another folder"
        ) from error
