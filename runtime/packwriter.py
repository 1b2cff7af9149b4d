"""Writes packed files, and goes on with those that were interrupted."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import xxhash
from pydantic import BaseModel, ValidationError
from torch import nn
from transformers import PreTrainedModel

from ..predictors.architecture import ExpertLayer, moe_shape
from ..predictors.files import written_whole
from .errors import StoreError
from .formats import PAGE
from .gatherer import Gathered, Gatherer
from .packfile import MAGIC, START, Header, described, told, weights_fingerprint
from .quantization import Quantization, Shipped


class Written(BaseModel):
    """A layer whose blocks are on the disk."""

    sample: str
    """What `sample_experts` returns for its experts."""
    bytes: int
    checksums: list[int]


class FullDiskError(StoreError):
    """The disk is full, and what was written before can be gone on with."""


class PackWriter:
    """Writes a packed file layer by layer. The file appears at `finish`; `abort` removes what was written.

    With a `key`, which says what is packed and how, an attempt that was interrupted can be gone on with, and so can one that had
    no room on the disk. Until the file is whole,
    its blocks are in `NAME.KEY.partial`. The journal beside it has a line for each layer that is on the disk. Of two attempts at
    the same at once, the second one begins from the start, in a file of its own.
    """

    def __init__(self, out: str | Path, quantize: Quantization | Shipped | None = None, key: str | None = None):
        self.out = Path(out).absolute()
        if self.out.exists():
            raise StoreError(f"{self.out} exists already; name a new file or remove it")
        with told(self.out, "written", "name a file in a folder"):
            self._aside, self._file = _lock(self.out, key)
            self._is_resumable = key is not None and self._aside == _aside_of(self.out, key)
            self._journal = _journal_of(self._aside)
            self._known = _read_journal(self._journal, os.fstat(self._file.fileno()).st_size)
            self._sweep()
            self._file.seek(PAGE)
        self._gatherer = Gatherer(quantize, self._write)
        self.take = self._gatherer.take
        self._modules: list[nn.Module] = []
        self._layers: list[Written] = []

    def _sweep(self) -> None:
        """Removes what is left of other attempts that were killed. Whoever still writes holds a lock on its file."""
        # A key has no dot. What has one more belongs to another packed file, whose name begins like this one's.
        attempt = re.compile(rf"{re.escape(self.out.name)}\.[^.]+\.partial")
        for left in [file for file in self.out.parent.iterdir() if attempt.fullmatch(file.name)]:
            with suppress(OSError), left.open("rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
                _forget(_journal_of(left))

    def _write(self, gathered: Gathered) -> None:
        """Writes a layer, unless an earlier attempt has written the same one at this place."""
        number, sample = len(self._modules), gathered.sample
        self._modules.append(gathered.experts)
        size = min(map(len, gathered.tensors.values())) * gathered.format.bytes
        if number < len(self._known) and (self._known[number].sample, self._known[number].bytes) == (sample, size):
            self._layers.append(self._known[number])
            self._file.seek(size, os.SEEK_CUR)
            return
        self._known = []
        blocks = gathered.blocks().numpy()
        self._layers.append(
            Written(sample=sample, bytes=size, checksums=[xxhash.xxh3_64_intdigest(block.data) for block in blocks])
        )
        with self._told():
            self._file.write(blocks.data)
            # What is on the disk is dropped from the page cache, since packed experts are not needed in memory.
            self._file.flush()
            os.fdatasync(self._file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with written_whole(self._journal) as journal:
                journal.write_text("".join(f"{layer.model_dump_json()}\n" for layer in self._layers))

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turns an error of the disk into a `StoreError`."""
        with told(self.out, "written", "make room for it"):
            try:
                yield
            except OSError as error:
                whole = len(_read_journal(self._journal, os.fstat(self._file.fileno()).st_size))
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not whole or not self._is_resumable:
                    raise
                raise FullDiskError(
                    f"{self.out} can't be written ({error.strerror}); make room and give the same command again, which goes on "
                    f"after the {whole} layers that are in {self._aside}"
                ) from error

    def finish(
        self, model: PreTrainedModel, layers: Sequence[ExpertLayer], name: str, checkpoint: str | None = None
    ) -> Path:
        """Writes the header and gives the file its name. Raises `StoreError` where experts of `layers` are missing.

        `checkpoint` is the fingerprint of the model's checkpoint.
        """
        form = self._gatherer.finish(layers, name)
        names = {module: path for path, module in model.named_modules()}
        header = Header(
            model={"name": name} | moe_shape(model.config, layers) | {"weights": weights_fingerprint(model)},
            block_bytes=form.bytes,
            layers=[names[module] for module in self._modules],
            num_experts=layers[0].stored,
            checksums=[layer.checksums for layer in self._layers],
            samples=[layer.sample for layer in self._layers],
            checkpoint=checkpoint,
            **described(form),
        )
        text = header.model_dump_json().encode()
        with self._told():
            offset = self._file.tell()
            self._file.truncate(offset)
            self._file.write(text)
            self._file.seek(0)
            start = START.pack(MAGIC, header.version, offset, len(text), xxhash.xxh3_64_intdigest(text))
            self._file.write(start.ljust(PAGE, b"\0"))
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self._aside, self.out)  # still locked, so that nobody removes it as left over
            self._file.close()
            _forget(self._journal)
        return self.out

    def abort(self) -> None:
        """Removes what was written, unless the file is finished."""
        self._close()
        self._aside.unlink(missing_ok=True)
        _forget(self._journal)

    def interrupt(self) -> None:
        """Leaves what was written to a later attempt, if one can go on with it."""
        if self._is_resumable:
            self._close()
        else:
            self.abort()

    def _close(self) -> None:
        with suppress(OSError):
            self._file.close()


def _aside_of(out: Path, key: str) -> Path:
    return out.with_name(f"{out.name}.{key}.partial")


def _journal_of(partial: Path) -> Path:
    return partial.with_suffix(".journal")


def _forget(journal: Path) -> None:
    """Removes a journal. A kill while it was written has left a second file."""
    for file in (journal, journal.with_name(journal.name + ".partial")):
        file.unlink(missing_ok=True)


def _lock(out: Path, key: str | None) -> tuple[Path, BinaryIO]:
    """Opens and locks the file to write to. It has a name of its own without a `key`, and where another attempt has this one."""
    path = _aside_of(out, key or uuid4().hex)
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            return _lock(out, None)
        # Some file systems have no locks.
    with suppress(FileNotFoundError):
        if os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return path, file
    file.close()  # before it was locked, another attempt has finished or removed it
    return _lock(out, key)


def _read_journal(journal: Path, size: int) -> list[Written]:
    """The layers that an earlier attempt has left in a file of `size` bytes."""
    layers: list[Written] = []
    with suppress(OSError, ValidationError):
        for line in journal.read_text().splitlines():
            layers.append(Written.model_validate_json(line))
    end = PAGE
    for number, layer in enumerate(layers):
        end += layer.bytes
        if end > size:
            return layers[:number]
    return layers
