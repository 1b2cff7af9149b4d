"""How every result is written: first under another name, then renamed when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    """Waits until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
