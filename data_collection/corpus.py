"""Text in, sequences of token ids out.

A corpus is a text file, a folder of text files, a JSON-lines file, or the embedded corpus: the Python sources
that every machine with this project has (the standard library and torch). The embedded corpus is split by file,
and the split depends on a file's name only, so a file is held out on every machine and in every version.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from predictors.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDED = "embedded"
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".java", ".js", ".ts", ".go", ".rs", ".html", ".tex"}
HELD_OUT_SHARE = 20  # one file in so many is held out

Split = Literal["train", "held_out"]


class CorpusError(UserError):
    """The corpus is missing, unreadable or empty; the message says which and what to do."""


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def is_held_out(name: str) -> bool:
    """Whether a file of the embedded corpus is held out, from its name (`json/decoder.py`) alone."""
    return _digest(name) % HELD_OUT_SHARE == 0


def embedded_files(split: Split) -> list[tuple[str, Path]]:
    """`(name, path)` of each source file of one split, in an order that depends on the names only.

    The order is that of a hash, so that a few thousand tokens from its start are a fair sample.
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


def read_documents(corpus: str | Path = EMBEDDED, split: Split = "train", text_column: str = "text") -> Iterator[str]:
    """The documents of a corpus, one string each, empty ones left out.

    `corpus` is `"embedded"`, a `.jsonl` file (one object a line, its `text_column` read), any other file (one
    document), or a folder (every text file below it, in name order). `split` matters to the embedded corpus only.

    Raises `CorpusError` where there is nothing to read.
    """
    found = False
    for text in _documents(str(corpus), split, text_column):
        if text.strip():
            found = True
            yield text
    if not found:
        raise CorpusError(
            f"the corpus {corpus} holds no text; give a text file, a folder of text files or a .jsonl file"
        )


def _documents(corpus: str, split: Split, text_column: str) -> Iterator[str]:
    path = Path(corpus)
    if corpus == EMBEDDED:
        for _, file in embedded_files(split):
            yield _read_text(file)
    elif path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file() and file.suffix in TEXT_SUFFIXES:
                yield _read_text(file)
            elif file.is_file() and file.suffix == ".jsonl":
                yield from _read_jsonl(file, text_column)
    elif path.is_file() and path.suffix == ".jsonl":
        yield from _read_jsonl(path, text_column)
    elif path.is_file():
        yield _read_text(path)
    else:
        raise CorpusError(f"there is no corpus at {corpus}; give a text file, a folder of text files or a .jsonl file")


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    if b"\0" in data:
        raise CorpusError(f"{file} is not text (it holds NUL bytes); give text files or a .jsonl file")
    return data.decode("utf-8", errors="replace").replace("\r\n", "\n")


def _read_jsonl(file: Path, text_column: str) -> Iterator[str]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[text_column]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise CorpusError(
                    f"line {number} of {file} is not a JSON object with the key {text_column!r}; "
                    "fix the line or name the right key with --text-column"
                ) from error
            if not isinstance(text, str):
                raise CorpusError(
                    f"line {number} of {file}: {text_column!r} is not a string; name another --text-column"
                )
            yield text


def sequences(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int, tokens: int | None = None
) -> Iterator[torch.Tensor]:
    """Packs documents into sequences `[sequence_length]` of token ids (int64).

    Documents follow one another with the end-of-text token between them; what does not fill a last sequence is
    yielded as a shorter one. Stops after `tokens` tokens in all (the last sequence is cut to fit).
    """
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    buffer: list[int] = []
    left = float("inf") if tokens is None else tokens
    for text in documents:
        if left <= 0:
            return
        buffer += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + separator
        while len(buffer) >= sequence_length and left > 0:
            size = int(min(sequence_length, left))
            yield torch.tensor(buffer[:size])
            left -= size
            del buffer[:sequence_length]
    if buffer and left > 0:
        yield torch.tensor(buffer[: int(min(len(buffer), left))])
