"""Makes a collection durable: a lock on its folder, and beside the shards a file that says how far they reach.

    collect.lock                locked by the operating system while a `collect` runs, however it ends; where the file
                                system has no locks, it names the process that writes
    progress-NNNN.safetensors   of process NNNN: the shards that are whole, how much of the corpus they hold, and what the
                                recorder had added up at their end (the sums of the default vectors, the control)

A shard is complete under its name before a progress file names it. Everything after the last progress is computed
again. A finished trace has neither kind of file.
"""

from __future__ import annotations

import errno
import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from filelock import AcquireReturnProxy, FileLock, SoftFileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..predictors.files import written_whole
from ..predictors.loading import resolve_dtype
from ..predictors.weights import checkpoint_fingerprint, local_folder
from .columns import Columns
from .manifest import MANIFEST, ShardEntry
from .settings import CollectConfig, CollectError
from .trace import Trace

LOCK = "collect.lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)
"""How file systems say that they have no locks."""


class Plan(BaseModel):
    """Decided before the first batch."""

    model_config = ConfigDict(extra="forbid")

    targets: list[int]
    """The target layers."""
    row_bytes: int
    """Bytes of a row in a shard."""
    shard_overhead: int
    """The most bytes of a shard beside its rows."""
    fixed_bytes: int
    """Bytes of a trace beside its shards."""
    state_bytes: int
    """Bytes of a process's progress file."""

    def most_rows(self, max_bytes: int, shard_bytes: int, processes: int) -> int:
        """How many rows each process may write so that all files together have at most `max_bytes`."""
        room = (max_bytes - self.fixed_bytes) / processes - 2 * self.shard_overhead
        return max(0, int(room / (self.row_bytes * (1 + self.shard_overhead / shard_bytes))))

    def trace_bytes(self, rows: int, shard_bytes: int) -> int:
        """About how many bytes a trace of `rows` rows has."""
        row_bytes = rows * self.row_bytes
        return self.fixed_bytes + row_bytes + self.shard_overhead * (1 + row_bytes // shard_bytes)


class Progress(BaseModel):
    """How far one process of a collection has come, at the end of a shard."""

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, Any]
    """`CollectConfig.decides()` of the collection."""
    origin: dict[str, str | None] = {}
    """What `origin_of` returned; older releases wrote nothing."""
    processes: int
    """How many processes share the collection."""
    plan: Plan
    batches: int = 0
    """Batches of the corpus that are done, by this process or another."""
    sequences: int = 0
    tokens: int = 0
    """Tokens of these batches, without padding."""
    digest: str = ""
    """Checksum of the batches' token ids: it shows whether the corpus has changed."""
    shards: list[ShardEntry] = []
    """Written by this process."""


class Snapshot(NamedTuple):
    """A progress, and the recorder's sums at that point (`Recorder.state`)."""

    progress: Progress
    sums: Columns


def progress_file(folder: Path, rank: int) -> Path:
    return folder / f"progress-{rank:04d}.safetensors"


def save_progress(folder: Path, rank: int, snapshot: Snapshot) -> None:
    """Writes the progress of process `rank`, whole or not at all. Raises what the disk raises."""
    with written_whole(progress_file(folder, rank)) as aside:
        text = snapshot.progress.model_dump_json()
        # save_file uses a temporary name of its own, which would stay behind after a kill.
        aside.write_bytes(save(snapshot.sums, metadata={"progress": text, "xxh3": _digest(text, snapshot.sums)}))


def load_progress(folder: Path, rank: int) -> Snapshot | None:
    """The progress of process `rank`, or None if it has none. Raises `CollectError` for a broken one."""
    file = progress_file(folder, rank)
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as state:
            metadata = state.metadata() or {}
            progress = Progress.model_validate_json(metadata["progress"])
            sums = {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118
        # Older releases wrote no checksum.
        if metadata.get("xxh3", "") not in ("", _digest(metadata["progress"], sums)):
            raise KeyError("its checksum is another")
        return Snapshot(progress, sums)
    except (OSError, SafetensorError, KeyError, ValidationError) as error:
        raise CollectError(
            f"{file} is broken, so {folder} can't be resumed; remove the folder and collect again"
        ) from error


def _digest(progress: str, sums: Columns) -> str:
    digest = xxhash.xxh3_128(progress.encode())
    for name, tensor in sorted(sums.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def origin_of(config: CollectConfig, device: torch.device) -> dict[str, str | None]:
    """What a trace comes from beside its settings: the model's `weights` and `config` files, as hashes, and how it is `run`.

    A hash is None if the model's files are not on this machine.
    """
    folder, text = local_folder(config.model), None
    if folder is not None:
        files = [folder / name for name in ("config.json", "generation_config.json")]
        text = xxhash.xxh3_128_hexdigest(repr([file.read_bytes() for file in files if file.is_file()]).encode())
    dtype = str(resolve_dtype(config.dtype, device)).removeprefix("torch.").replace("auto", "its own dtype")
    return {"weights": checkpoint_fingerprint(folder), "config": text, "run": f"on {device.type} in {dtype}"}


def check_origin(config: CollectConfig, before: dict[str, str | None], now: dict[str, str | None]) -> None:
    """Raises `CollectError` if the trace in the folder of `config` does not come from where it would `now`."""
    for name, then in before.items():
        if None in (then, now.get(name)) or then == now[name]:
            continue
        if name == "run":
            raise CollectError(
                f"the trace in {config.out} was started {then}, not {now[name]}; resume it so, by --device and --dtype, or "
                "name another folder"
            )
        raise CollectError(
            f"the trace in {config.out} was started with another {name} of {config.model} than it has now; give the model "
            "back as it was, or name another folder"
        )


def common_origin(parts: list[Progress]) -> dict[str, str | None]:
    """The origin of all processes' parts. Raises `CollectError` if they differ: each node may have its own copy of a model."""
    for rank, part in enumerate(parts):
        if part.origin != parts[0].origin:
            raise CollectError(f"process {rank} ran another model than the first; collect again, with one copy of it")
    return parts[0].origin


def check_settings(config: CollectConfig, before: dict[str, Any], processes: int, now: int) -> None:
    """Raises `CollectError` naming the first setting of `config` that differs from those of the trace in its folder."""
    settings = config.decides()
    if "pack" in before:  # so older releases called it
        before = before | {"concatenate": before["pack"]}
    for name in settings:
        if before.get(name) != settings[name]:
            raise CollectError(
                f"the trace in {config.out} was started with {name} {before.get(name)}, not {settings[name]}; "
                "resume it with the same settings, or name another folder"
            )
    if processes != now:
        raise CollectError(
            f"the trace in {config.out} was started by {processes} processes, not {now}; resume it with as many"
        )


def remove_unfinished(folder: Path, prefix: str, progress: Progress | None) -> None:
    """Removes one process's shards that its progress doesn't name, and checks that the others are complete.

    Raises `CollectError` naming a shard that is not.
    """
    shards = {} if progress is None else {shard.file: shard for shard in progress.shards}
    for file in folder.glob(f"{prefix}-*"):
        is_own = file.name.removeprefix(f"{prefix}-").split(".")[0].isdigit()
        if is_own and file.name not in shards:
            file.unlink()
    for name, shard in shards.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != shard.bytes:
            raise CollectError(
                f"{file} is broken or gone, so the trace can't be resumed; remove {folder} and collect again"
            )


def remove_progress(folder: Path) -> None:
    """Removes the progress files of a finished trace."""
    for file in folder.glob("progress-*"):
        file.unlink()


def add_tokens(digest: hashlib.blake2b, token_ids: torch.Tensor) -> None:
    """Adds a batch to the running checksum of all token ids that a collection has read."""
    digest.update(repr(tuple(token_ids.shape)).encode())
    digest.update(token_ids.numpy().tobytes())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes `folder` if it does not exist, and holds its lock. A new folder that stays empty is removed again.

    Raises `CollectError` if another process holds the lock, or the folder can't be made.
    """
    made, file = not folder.exists(), folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = _acquired(file)
    except Timeout as error:
        # Only a soft lock has a content, and can outlive its process.
        lost = (
            f" (or if it was killed on another machine, remove {file})" if file.exists() and file.stat().st_size else ""
        )
        raise CollectError(
            f"another collect is writing to {folder}; wait for it{lost}, or name another folder"
        ) from error
    except OSError as error:
        raise CollectError(f"{folder} can't be written to ({error.strerror}); name another folder") from error
    with held:
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            if made and not any(folder.iterdir()):
                folder.rmdir()


def _acquired(file: Path) -> AcquireReturnProxy:
    """The lock on `file`; where the file system has no locks, a soft one: a file that names its process."""
    with warnings.catch_warnings(action="ignore"):
        try:
            return FileLock(file).acquire(blocking=False)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        if file.stat().st_size == 0:  # left by the attempt
            file.unlink()
        return SoftFileLock(file).acquire(blocking=False)


def is_finished(config: CollectConfig, processes: int, device: torch.device) -> bool:
    """Whether the folder of `config`, which this process has locked, holds exactly this trace, finished.

    Raises `CollectError` if the folder holds something that the collection may neither replace nor resume.
    """
    folder = config.out
    progress = sorted(folder.glob("progress-*.safetensors"))
    # A process that was killed before its first progress leaves a partial progress file.
    others = [f for f in folder.iterdir() if f.name != LOCK and not f.name.startswith("progress-")]
    if not config.resume:
        if progress and not (folder / MANIFEST).exists():
            raise CollectError(f"{folder} holds an unfinished trace; give --resume to go on with it, or remove it")
        if others:
            raise CollectError(f"{folder} exists already; name a new folder or remove it")
        return False
    if (folder / MANIFEST).exists():
        manifest = Trace.open(folder).manifest
        check_settings(config, manifest.settings, manifest.processes, processes)
        # Where it was run is no matter any more.
        check_origin(config, {**manifest.origin, "run": None}, origin_of(config, device))
        remove_progress(folder)
        return True
    if others and not progress:
        raise CollectError(f"{folder} holds no unfinished trace to resume; name another folder")
    return False
