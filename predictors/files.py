"""The one way in which a result is written: aside, and under its own name once it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields where to write the file or folder `path`, which then is there whole or not at all, even if the machine stops.

    A folder takes the place of an empty one only. Raises what the disk raises; what was written so far is then removed.
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
        _remove(aside)  # on a full disk its room is wanted


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
