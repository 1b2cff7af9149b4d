"""Rows of a corpus, from files, from folders of `save_to_disk` and from the Hub.

Local files are read here and not by `datasets`: that takes text that looks like a date for a date, fills rows with nulls,
does not read every path, and takes seconds to import.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from .refusals import CorpusError, RefusedError

Row = dict[str, Any]
Read = Row | RefusedError
"""A row, or why it can't be read."""

LONGEST_FIELD = (1 << 31) - 1


def kind_of(file: Path) -> str:
    """The suffix that says what a file holds: `.jsonl` of `A.JSONL.gz`."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in COMPRESSED else suffix


def open_content(file: Path) -> IO[bytes]:
    """A file's content, decompressed if its name says that it is compressed."""
    return io.BufferedReader(COMPRESSED.get(file.suffix.lower(), open)(file, "rb"))


def _open_zstd(file: Any, mode: str = "rb") -> Any:  # noqa: ARG001
    import pyarrow  # like `datasets`, which brings it

    return pyarrow.input_stream(file, compression="zstd")  # of all frames, unlike the reader of `zstandard`


COMPRESSED: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def json_lines(file: Path) -> Iterator[Read]:
    """A row from each line."""
    with open_content(file) as lines:
        for number, line in enumerate(lines):
            if line.strip():
                yield _json_row(line, "utf-8" if number else "utf-8-sig")


def _json_row(line: bytes, encoding: str) -> Read:
    try:
        return _as_row(json.loads(line.decode(encoding)))
    except UnicodeDecodeError:
        return RefusedError("is not UTF-8; convert the file to UTF-8")
    except (ValueError, RecursionError):
        return RefusedError("is not JSON")


def _as_row(value: Any) -> Read:
    return value if isinstance(value, dict) else RefusedError("is no JSON object")


def json_file(file: Path) -> Iterator[Read]:
    """The rows of an array, or else of each line."""
    with open_content(file) as content:
        begin = content.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()  # type: ignore[attr-defined]
        if begin.startswith(b"["):
            yield from map(_as_row, json.loads(content.read().decode("utf-8-sig")))
            return
    yield from json_lines(file)


def csv_file(file: Path) -> Iterator[Read]:
    """A row from each record; the first one has the names of the columns."""
    csv.field_size_limit(LONGEST_FIELD)
    with open_content(file) as content, io.TextIOWrapper(content, "utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t" if kind_of(file) == ".tsv" else ",", strict=True)
        names = rows.fieldnames or []
        if twice := {name for name in names if names.count(name) > 1}:
            raise CorpusError(f"{file} has two columns called {min(twice)}; rename one of them")
        for row in rows:
            yield RefusedError("has more values than there are columns") if None in row else row


def parquet_file(file: Path) -> Iterator[Read]:
    """All rows, some at a time."""
    from pyarrow import OSFile
    from pyarrow.parquet import ParquetFile

    with OSFile(str(file)) as source:
        for batch in ParquetFile(source).iter_batches(batch_size=256):
            yield from batch.to_pylist()


READERS: dict[str, Callable[[Path], Iterator[Read]]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_file,
    ".csv": csv_file,
    ".tsv": csv_file,
    ".parquet": parquet_file,
}
"""By kind of file (`kind_of`)."""


def _datasets() -> Any:
    # Imported here: it takes seconds, and only these corpora need it.
    import datasets
    from fsspec.compression import register_compression

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what it logs it also raises
    register_compression("zstd", _open_zstd, "zst", force=True)
    return datasets


def is_saved(path: Path) -> bool:
    """Whether the folder is one of `save_to_disk`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def saved_rows(path: Path, split: str) -> Iterable[Read]:
    """The rows of a folder of `save_to_disk`."""
    if "::" in str(path):
        raise CorpusError(f"{path} has :: in its name, which the library datasets can't read; rename it")
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if split not in (*splits, ""):
            raise CorpusError(
                f"{path} has no split {split} (its splits: {', '.join(splits)}); name another as {path}::split"
            )
        path /= split or _first_split(str(path), splits)
    elif split:
        raise CorpusError(f"{path} has no split {split}, since it is a single dataset; name it as {path}")
    if not json.loads((path / "state.json").read_text(encoding="utf-8"))["_data_files"]:
        return []  # without rows, which `datasets` can't load
    return _datasets().load_from_disk(str(path))


def dataset_rows(name: str, config: str, split: str) -> Iterable[Read]:
    """The rows of a dataset of the Hub or of a folder like one, streamed: nothing is downloaded whole or cached."""
    found = _datasets().load_dataset(name, config or None, split=split or None, streaming=True)
    return found[_first_split(name, list(found))] if isinstance(found, dict) else found


def _first_split(name: str, splits: list[str]) -> str:
    """The split that is read where none is named: `train`, or the only one."""
    if len(splits) > 1 and "train" not in splits:
        raise CorpusError(f"{name} has the splits {', '.join(splits)}; name one of them as name:config:split")
    return "train" if "train" in splits else splits[0]
