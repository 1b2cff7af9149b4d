"""How every result is written: first under another name, then renamed when it is complete. And with checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

CHECKSUM = "checksum"
"""The key of `sealed`."""


def checksum(file: Path) -> str:
    """The xxh3_128 of a file's bytes."""
    with file.open("rb") as data:
        return hashlib.file_digest(data, xxhash.xxh3_128).hexdigest()


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a JSON file with a checksum of all of it, as a last entry."""
    values = {key: value for key, value in content.items() if key != CHECKSUM}
    # Of the values, not of the text: white space and the order of keys may change on the way.
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return values | {CHECKSUM: xxhash.xxh3_128_hexdigest(text.encode())}


def is_changed(content: dict[str, Any]) -> bool:
    """Whether the content of a JSON file is not what its checksum says. Files of older releases have none."""
    try:
        return CHECKSUM in content and content[CHECKSUM] != sealed(content)[CHECKSUM]
    except RecursionError:  # it is deeper than anything of ours
        return True


NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR)
"""How file systems say that a folder can't be opened or synchronised."""


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields the path to write to; then `path`, a file or folder, exists whole or not at all, even if the machine stops.

    A folder replaces only an empty one. Raises what the disk raises, after removing what was written.
    """
    aside = path.absolute().with_name(path.absolute().name + ".partial")
    _remove(aside)
    try:
        yield aside
        for part in (*aside.rglob("*"), aside):
            _sync(part)
        os.replace(aside, path)
        _sync(aside.parent)
    finally:
        _remove(aside)  # a full disk needs the room


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk. Not all file systems can say so of a folder."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in NO_SYNC or not path.is_dir():
            raise
