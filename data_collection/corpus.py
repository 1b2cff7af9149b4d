"""A corpus: text of many kinds as documents, one string each.

    embedded                        the Python sources that come with Python and torch
    notes.txt, book.md, ...         a text file: one document
    lines.jsonl, table.parquet      one document a row, of its text column; also .json, .jsonl.gz, .jsonl.zst
    folder/                         every text, .jsonl and .parquet file below it, in name order
    'folder/*.parquet'              a glob (** goes into folders)
    saved/ or saved::split          what `datasets.save_to_disk` wrote
    name:config:split               a dataset of the Hub, or a local folder shaped like one; both parts are optional

A row whose text column holds a chat (a list of `role` and `content`) is rendered with the tokenizer's chat template.
Without a text column, `messages` or `conversations` is read. Everything is streamed, always in the same order.

The embedded corpus is split by file. A file's name alone decides, so the same files are held out everywhere.
"""

from __future__ import annotations

import glob
import hashlib
import math
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from ..predictors.errors import UserError
from .settings import EMBEDDED, Split

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".java", ".js", ".ts", ".go", ".rs", ".html", ".tex"}
ROW_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSED = {".gz", ".zst", ".bz2", ".xz"}
CHAT_COLUMNS = ("messages", "conversations")
# A longer text file is cut into documents of about this many characters, to bound memory.
LONGEST_TEXT = 1 << 22
HELD_OUT_SHARE = 20  # one file in this many is held out
KINDS = "a text file, a folder, a glob, a .jsonl, .json or .parquet file, or a Hub dataset as name:config:split"

Row = dict[str, Any]


class CorpusError(UserError):
    """The corpus is missing, unreadable or empty; the message says which and what to do."""


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
        for path in root.rglob("*.py"):
            name = path.relative_to(base)
            if not {"site-packages", "dist-packages"} & set(name.parts):
                files[name.as_posix()] = path
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
) -> Iterator[str]:
    """The documents of a corpus, one string each, empty ones left out.

    `corpus` is one of the kinds above, or several, each `path` or `path@weight`. The next document always comes from
    the corpus that is furthest behind its share of the characters, so every part of the text is mixed as asked. All end
    when the first one ends. `split` is for the embedded corpus only; chats need the `tokenizer`.

    Raises `CorpusError` if there is nothing to read.
    """
    sources = [parse_source(str(part)) for part in ([corpus] if isinstance(corpus, str | Path) else corpus)]
    if not sources:
        raise CorpusError(f"no corpus is named; give {KINDS}")
    yield from mixed(sources, lambda name: _nonempty(name, split, text_column, tokenizer))


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


def _nonempty(name: str, split: Split, text_column: str, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    found = False
    for text in _documents(name, split, text_column, tokenizer):
        if text.strip():
            found = True
            yield text
    if not found:
        raise CorpusError(f"the corpus {name} holds no text; give {KINDS}")


def _documents(corpus: str, split: Split, text_column: str, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    def texts(name: str, load: Callable[[], Iterable[Row]]) -> Iterator[str]:
        return _texts(name, _rows(name, load), text_column, tokenizer)

    def file_texts(file: Path) -> Iterator[str]:
        kind = _row_format(file)
        return _read_text(file) if kind is None else texts(str(file), lambda: _load_file(kind, file))

    path = Path(corpus)
    name, config, dataset_split = (*corpus.split(":", 2), "", "")[:3]
    if corpus == EMBEDDED:
        for _, file in embedded_files(split):
            yield from _read_text(file)
    elif path.is_file():
        yield from file_texts(path)
    elif _is_saved(path) or _is_saved(Path(name)):
        saved = path if _is_saved(path) else Path(name)
        yield from texts(corpus, lambda: _load_saved(saved, "" if saved == path else dataset_split))
    elif path.is_dir():
        for file in sorted(path.rglob("*")):
            # Most folders hold .json files that are no corpus.
            is_rows = _row_format(file) is not None and ".json" not in file.suffixes
            if file.is_file() and (is_rows or file.suffix in TEXT_SUFFIXES):
                yield from file_texts(file)
    elif glob.has_magic(corpus):
        found = [Path(match) for match in sorted(glob.glob(corpus, recursive=True)) if Path(match).is_file()]
        if not found:
            raise CorpusError(f"no file is called like {corpus}; give a glob that fits some, or {KINDS}")
        for file in found:
            yield from file_texts(file)
    elif Path(name).is_dir() or _may_be_on_the_hub(name):
        yield from texts(corpus, lambda: _load_dataset(name, config, dataset_split))
    else:
        raise CorpusError(f"there is no corpus at {corpus}; give {KINDS}")


def _read_text(file: Path) -> Iterator[str]:
    """The text of a file, in one piece unless it is very long; pieces end at a line's end if possible."""
    with file.open(encoding="utf-8", errors="replace", newline="") as lines:
        while piece := lines.read(LONGEST_TEXT):
            if len(piece) == LONGEST_TEXT:
                piece += lines.readline(LONGEST_TEXT)
            if "\0" in piece:
                raise CorpusError(f"{file} is not text (it holds NUL bytes); give {KINDS}")
            yield piece.replace("\r\n", "\n")


def _row_format(file: Path) -> str | None:
    suffix = Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix
    return ROW_FORMATS.get(suffix)


def _is_saved(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _may_be_on_the_hub(name: str) -> bool:
    is_file = Path(name).suffix in TEXT_SUFFIXES or _row_format(Path(name)) is not None
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None and not is_file


def _datasets() -> Any:
    # Imported here: it takes seconds, and only these corpora need it.
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    return datasets


def _load_file(kind: str, file: Path) -> Iterable[Row]:
    files = glob.escape(str(file.absolute()))
    return _datasets().load_dataset(kind, data_files=files, split="train", streaming=True)


def _load_dataset(name: str, config: str, split: str) -> Iterable[Row]:
    """Streams a dataset of the Hub or a local folder, so nothing is downloaded whole or cached."""
    return _one_split(name, _datasets().load_dataset(name, config or None, split=split or None, streaming=True))


def _load_saved(path: Path, split: str) -> Iterable[Row]:
    found = _datasets().load_from_disk(str(path))
    if split:
        if not isinstance(found, dict) or split not in found:
            splits = ", ".join(found) if isinstance(found, dict) else "none, it is a single dataset"
            raise CorpusError(f"{path} has no split {split} (its splits: {splits}); name another as {path}::split")
        found = found[split]
    return _one_split(str(path), found)


def _one_split(name: str, found: Any) -> Iterable[Row]:
    if not isinstance(found, dict):
        return found
    if len(found) > 1 and "train" not in found:
        raise CorpusError(f"{name} has the splits {', '.join(found)}; name one of them as name:config:split")
    return _one_split(name, found["train"] if "train" in found else next(iter(found.values())))


def _rows(name: str, load: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """The rows that `load` gives. Any error becomes a `CorpusError`."""
    try:
        yield from load()
    except CorpusError:
        raise
    # Readers of many formats and a network are behind this: they raise errors of any kind.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error.__cause__ or error}".split())
        raise CorpusError(f"the corpus {name} can't be read ({reason[:300]}); mend it, or give {KINDS}") from error


def _texts(
    name: str, rows: Iterator[Row], text_column: str, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[str]:
    for number, row in enumerate(rows, 1):
        where = f"row {number} of {name}"
        column = next((c for c in (text_column, *CHAT_COLUMNS) if c in row), None)
        if column is None or (text_column != "text" and column != text_column):
            raise CorpusError(
                f"{where} has no column {text_column!r}; name one of {', '.join(map(str, row))} with --text-column"
            )
        value = row[column]
        if isinstance(value, str):
            yield value
        elif isinstance(value, list) and all(isinstance(message, dict) for message in value):
            yield _render(where, value, tokenizer)
        elif value is not None:
            raise CorpusError(
                f"{where}: {column!r} is neither text nor a chat but {type(value).__name__}; name another --text-column"
            )


def _render(where: str, messages: list[Row], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A chat as the model reads it. In the ShareGPT form, `from` and `value` are role and content."""
    if tokenizer is None or not tokenizer.chat_template:
        raise CorpusError(
            f"{where} is a chat, and the model's tokenizer has no chat template; give a corpus of plain text"
        )
    roles = {"human": "user", "gpt": "assistant"}
    # Arrow fills the fields that a row lacks with None; a template would take it for a value.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    renamed = [
        {"role": roles.get(m["from"], m["from"]), "content": m.get("value", "")} if "from" in m else m for m in messages
    ]
    try:
        text = tokenizer.apply_chat_template(renamed, tokenize=False)
    # A template is a program of the model's authors: it raises errors of any kind.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CorpusError(
            f"{where} can't be rendered with the tokenizer's chat template ({reason[:300]}); leave that row out"
        ) from error
    assert isinstance(text, str)
    return text


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
