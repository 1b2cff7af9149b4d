"""A corpus: text of many kinds as documents, one string each.

    embedded                        the Python sources that come with Python and torch
    notes.txt, book.md.gz, ...      a text file in UTF-8: one document
    lines.jsonl, table.parquet      one document a row, of its text column; also .ndjson, .json, .csv and .tsv
    folder/                         every text, .jsonl, .ndjson and .parquet file below it, in name order
    'folder/*.parquet'              a glob (** goes into folders)
    saved/ or saved::split          what `datasets.save_to_disk` wrote
    name:config:split               a dataset of the Hub, or a local folder shaped like one; both parts are optional

Files may be compressed (.gz, .zst, .bz2, .xz). Below a folder, hidden files and folders (`.git`) are left out, and links are
followed, each folder once. A row whose text column holds a chat is rendered with the tokenizer's chat template (`chat.py`).
Without a text column, `messages` or `conversations` is read. Everything is streamed, always in the same order.

Rows and files that can't be used are refused one by one, with the reason. A corpus that has no others is an error.

The embedded corpus is split by file. A file's name alone decides, so the same files are held out everywhere.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import io
import math
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from .chat import CHAT_COLUMNS, chat_in, render
from .refusals import CorpusError, Refuse, RefusedError, advised, refuse_all
from .rows import READERS, Read, Row, dataset_rows, is_saved, kind_of, open_content, saved_rows
from .settings import EMBEDDED, Split

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".java", ".js", ".ts", ".go", ".rs", ".html", ".tex"}
IN_FOLDERS = {*TEXT_SUFFIXES, ".jsonl", ".ndjson", ".parquet"}
"""The kinds of files that are read below a folder: most folders hold .json and .csv files that are no corpus."""
# A longer text file is cut into documents of about this many characters, to bound memory.
LONGEST_TEXT = 1 << 22
HELD_OUT_SHARE = 20  # one file in this many is held out
INSTALLED = {"site-packages", "dist-packages"}
"""Folders below the standard library that hold what is no part of it."""
MOST_IN_VAIN = 1000
"""A corpus that begins with so many rows or files that are refused is an error."""
KINDS = "a text file, a folder, a glob, a .jsonl, .json, .csv or .parquet file, or a Hub dataset as name:config:split"


T = TypeVar("T")


class Source(NamedTuple):
    """One corpus of a mixture."""

    name: str
    weight: float
    """Its share of the text, relative to the others'."""


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def is_held_out(name: str) -> bool:
    """Whether a file of the embedded corpus is held out, from its name (`json/decoder.py`) alone."""
    return _digest(name) % HELD_OUT_SHARE == 0


def embedded_files(split: Split) -> list[tuple[str, Path]]:
    """`(name, path)` of each source file of one split, in an order that depends on the names only.

    A hash gives the order, so the first few thousand tokens are a fair sample.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    roots = [(stdlib, stdlib), (Path(torch.__file__).parent, Path(torch.__file__).parent.parent)]
    files: dict[str, Path] = {}
    for root, base in roots:
        for folder, folders, names in os.walk(root):
            folders[:] = set(folders) - INSTALLED  # of thousands of files, most are in them
            inside = Path(folder).relative_to(base)
            files |= {(inside / name).as_posix(): Path(folder, name) for name in names if name.endswith(".py")}
    return sorted(
        ((name, path) for name, path in files.items() if is_held_out(name) == (split == "held_out")),
        key=lambda item: _digest("order:" + item[0]),
    )


def parse_source(text: str) -> Source:
    """`path` or `path@weight`. Raises `CorpusError` for a weight that is not above 0.

    The part after the last `@` is a weight if it is a number and the whole is not the name of a file.
    """
    name, at, weight = text.rpartition("@")
    if not at or Path(text).exists():
        return Source(text, 1.0)
    try:
        value = float(weight)
    except ValueError:
        return Source(text, 1.0)
    if not (value > 0 and math.isfinite(value)):
        raise CorpusError(f"the weight of the corpus {name} can't be {weight}; give a number above 0")
    return Source(name, value)


def read_documents(
    corpus: str | Path | Sequence[str] = EMBEDDED,
    split: Split = "train",
    text_column: str = "text",
    tokenizer: PreTrainedTokenizerBase | None = None,
    refuse: Refuse = refuse_all,
) -> Iterator[str]:
    """The documents of a corpus, one string each.

    `corpus` is one of the kinds above, or several, each `path` or `path@weight`. The next document always comes from
    the corpus that is furthest behind its share of the characters, so every part of the text is mixed as asked. All end
    when the first one ends. `split` is for the embedded corpus only; chats need the `tokenizer`. `refuse` is called for
    each row and file that can't be used; by default it raises `CorpusError`.

    Raises `CorpusError` if there is nothing to read.
    """
    sources = [parse_source(str(part)) for part in ([corpus] if isinstance(corpus, str | Path) else corpus)]
    if not sources:
        raise CorpusError(f"no corpus is named; give {KINDS}")
    yield from mixed(sources, lambda name: _some(name, Reader(split, text_column, tokenizer, refuse)))


def mixed(sources: list[Source], read_one: Callable[[str], Iterator[str]]) -> Iterator[str]:
    """The documents of all `sources`, mixed as `read_documents` says; `read_one` reads a corpus by its name."""
    streams = [read_one(source.name) for source in sources]
    read = [0] * len(sources)
    while True:
        number = min(range(len(sources)), key=lambda i: read[i] / sources[i].weight)
        text = next(streams[number], None)
        if text is None:
            return
        read[number] += len(text)
        yield text


def _some(name: str, reader: Reader) -> Iterator[str]:
    """The documents of the corpus `name`. Raises `CorpusError` if there are none, naming the first refusal."""
    found, refused = False, 0
    nothing = CorpusError(f"the corpus {name} holds no text; give {KINDS}")

    def tell(where: str, reason: str) -> None:
        nonlocal refused, nothing
        reader.refuse(where, reason)
        if refused == 0:
            nothing = CorpusError(advised(f"the corpus {name} holds no text that can be used: {where} {reason}"))
        refused += 1
        if not found and refused == MOST_IN_VAIN:
            raise nothing

    for text in reader._replace(refuse=tell).documents(name):
        found = True
        yield text
    if not found:
        raise nothing


class Reader(NamedTuple):
    """Reads one corpus."""

    split: Split
    text_column: str
    tokenizer: PreTrainedTokenizerBase | None
    refuse: Refuse

    def documents(self, corpus: str) -> Iterator[str]:
        """The documents of a corpus of any kind."""
        path = Path(corpus)
        name, config, dataset_split = (*corpus.split(":", 2), "", "")[:3]
        if corpus == EMBEDDED:
            for _, file in embedded_files(self.split):
                yield from self.of_file(file)
        elif path.is_file():
            yield from self.of_file(path)
        elif is_saved(path) or is_saved(Path(name)):
            saved = path if is_saved(path) else Path(name)
            yield from self.of_rows(corpus, lambda: saved_rows(saved, "" if saved == path else dataset_split))
        elif path.is_dir():
            for file in files_below(path, self.refuse):
                if kind_of(file) in IN_FOLDERS:
                    yield from self.of_file(file)
        elif glob.has_magic(corpus):
            found = files_like(path, self.refuse)
            if not found:
                raise CorpusError(f"no file is called like {corpus}; give a glob that fits some, or {KINDS}")
            for file in found:
                yield from self.of_file(file)
        elif Path(name).is_dir() or _may_be_on_the_hub(name):
            yield from self.of_rows(corpus, lambda: dataset_rows(name, config, dataset_split))
        else:
            raise CorpusError(f"there is no corpus at {corpus}; give {KINDS}")

    def of_file(self, file: Path) -> Iterator[str]:
        """The documents of a text file or a file of rows."""
        try:
            check_readable(file)
            if read := READERS.get(kind_of(file)):
                yield from self.of_rows(str(file), lambda: read(file))
            else:
                yield from guarded(str(file), lambda: read_text(file))
        except RefusedError as reason:
            self.refuse(str(file), str(reason))

    def of_rows(self, name: str, load: Callable[[], Iterable[Read]]) -> Iterator[str]:
        """The documents of the rows that `load` gives."""
        for number, row in enumerate(guarded(name, load), 1):
            try:
                if isinstance(row, RefusedError):
                    raise row
                yield self.text_of(row)
            except RefusedError as reason:
                self.refuse(f"row {number} of {name}", str(reason))

    def text_of(self, row: Row) -> str:
        """The text of a row. Raises `RefusedError` if it has none."""
        known = ("text", *CHAT_COLUMNS) if self.text_column == "text" else (self.text_column,)
        present = [column for column in known if column in row]
        if not present:
            raise RefusedError(
                f"has no column {self.text_column!r}; name one of {', '.join(map(str, row))} with --text-column"
            )
        column = next((column for column in present if row[column] is not None), present[0])
        value, chat = row[column], chat_in(row[column], column)
        text = value if chat is None else render(chat, row, self.tokenizer)
        if text is None or (isinstance(text, str) and not text.strip()):
            raise RefusedError(f"is empty in its column {column!r}")
        if not isinstance(text, str):
            kind = type(value).__name__
            raise RefusedError(
                f"has neither text nor a chat but {kind} in its column {column!r}; name another --text-column"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RefusedError("holds half of a surrogate pair, which is no character") from error
        return text


def check_readable(file: Path) -> None:
    """Raises `RefusedError` for what can't be opened, and for pipes and devices, which might never end."""
    try:
        if not file.is_file():
            raise RefusedError("is no regular file, or a link to none")
        file.open("rb").close()
    except OSError as error:
        raise RefusedError(f"can't be read ({error.strerror})") from error


def read_text(file: Path) -> Iterator[str]:
    """The text of a file, in one piece unless it is very long; pieces end at a line's end if possible.

    Raises `RefusedError` if it is not UTF-8.
    """
    try:
        with open_content(file) as content, io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as lines:
            while piece := lines.read(LONGEST_TEXT):
                if len(piece) == LONGEST_TEXT:
                    piece += lines.readline(LONGEST_TEXT)
                if "\0" in piece:
                    raise RefusedError("is not text but holds NUL bytes")
                if piece.strip():
                    yield piece.replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise RefusedError("is not UTF-8; convert it to UTF-8, for example with iconv") from error


def files_below(folder: Path, refuse: Refuse, depth: float = math.inf) -> list[Path]:
    """All files below a folder, at most `depth` folders down, in name order. Hidden ones are left out.

    Links to folders are followed, but no folder is entered twice.
    """
    found, entered = [], set()

    def unreadable(error: OSError) -> None:
        refuse(f"the folder {error.filename}", f"can't be read ({error.strerror})")

    for root, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        real, below = os.path.realpath(root), len(Path(root).relative_to(folder).parts)
        is_new = real not in entered
        entered.add(real)
        folders[:] = sorted(n for n in folders if not n.startswith(".")) if is_new and below < depth else []
        found += [Path(root, name) for name in files if is_new and not name.startswith(".")]
    return sorted(found)


def files_like(pattern: Path, refuse: Refuse) -> list[Path]:
    """The files that a glob fits, in name order. What there is by its whole name, like `a[1]`, is no pattern."""
    folder, parts = Path(pattern.anchor), list(pattern.relative_to(pattern.anchor).parts)
    while parts and (folder / parts[0]).exists():
        folder /= parts.pop(0)
    depth = math.inf if "**" in parts else len(parts) - 1
    return [file for file in files_below(folder, refuse, depth) if _fits(file.relative_to(folder).parts, parts)]


def _fits(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path fits a glob, part by part; `**` stands for any number of folders, and at the end for all below."""
    if not pattern or not names:
        return not pattern and not names
    if pattern[0] == "**":
        return len(pattern) == 1 or _fits(names, pattern[1:]) or _fits(names[1:], pattern)
    return fnmatch.fnmatchcase(names[0], pattern[0]) and _fits(names[1:], pattern[1:])


def _may_be_on_the_hub(name: str) -> bool:
    is_file = kind_of(Path(name)) in TEXT_SUFFIXES or kind_of(Path(name)) in READERS
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None and not is_file


def guarded(name: str, load: Callable[[], Iterable[T]]) -> Iterator[T]:
    """What `load` gives. Any error but a refusal becomes a `CorpusError`."""
    try:
        yield from load()
    except (CorpusError, RefusedError):
        raise
    # Readers of many formats and a network are behind this: they raise errors of any kind.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error.__cause__ or error}".split())
        raise CorpusError(f"the corpus {name} can't be read ({reason[:300]}); mend it, or give {KINDS}") from error


def sequences(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int, tokens: int | None = None
) -> Iterator[torch.Tensor]:
    """Packs documents into sequences `[sequence_length]` of token ids (int64).

    Documents follow one another with the end-of-text token between them; the last sequence may be shorter. Stops after
    `tokens` tokens in all (the last sequence is cut to fit).
    """
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    buffer: list[int] = []
    left = float("inf") if tokens is None else tokens
    for text in documents:
        if left <= 0:
            return
        buffer += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + separator
        # Cut once, by position: removing the front of a long list again and again is slow.
        start = 0
        while len(buffer) - start >= sequence_length and left > 0:
            size = int(min(sequence_length, left))
            yield torch.tensor(buffer[start : start + size])
            left -= size
            start += sequence_length
        del buffer[:start]
    if buffer and left > 0:
        yield torch.tensor(buffer[: int(min(len(buffer), left))])
