"""Documents in, batches of token ids out: what one forward pass reads.

By default a sequence holds tokens of one document only and begins at position 0: neither attention nor a state space
reaches across a document's border. Sequences of similar length are batched and padded on the right, where a causal
model cannot see the padding; padding is not recorded.

Everything here depends on the corpus and the settings alone, so counting batches is enough to resume or share a
collection.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from .corpus import read_documents, sequences
from .refusals import Refuse, refuse_all
from .settings import CollectConfig

# Sequences are sorted by length within so many batches: little is padded, and the buffer is bounded.
BUFFERED_BATCHES = 16


class TokenBatch(NamedTuple):
    """The sequences of one forward pass."""

    number: int
    """Counted from the beginning of the corpus."""
    first: int
    """The number of its first sequence; sequences are numbered in the order in which they are run."""
    token_ids: torch.Tensor
    """`[sequences, length]`, int64, on the CPU, padded on the right."""
    lengths: torch.Tensor
    """`[sequences]`, int64: tokens of each sequence, without padding."""

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def mask(self) -> torch.Tensor:
        """Which entries of `token_ids` are no padding, bool, in its shape."""
        return torch.arange(self.token_ids.shape[1]) < self.lengths.unsqueeze(1)


def read_batches(
    config: CollectConfig, tokenizer: PreTrainedTokenizerBase, tokens: int, refuse: Refuse = refuse_all
) -> Iterator[TokenBatch]:
    """The batches of a collection of `tokens` tokens from the corpus of `config`.

    `refuse` is called for each row and file that can't be used. Raises `CorpusError` if the corpus can't be read.
    """
    documents = read_documents(config.corpora, config.split, config.text_column, tokenizer, refuse)
    if config.phase == "decode":
        starts = prompts(documents, tokenizer, config.sequence_length - config.max_new_tokens)
        some = itertools.islice(starts, -(-tokens // config.max_new_tokens))
        return prompt_batches(some, config.batch_tokens, config.max_new_tokens)
    if config.concatenate:
        return packed_batches(documents, tokenizer, config.sequence_length, config.batch_size, tokens)
    pad = next((id for id in (tokenizer.pad_token_id, tokenizer.eos_token_id) if id is not None), 0)
    return padded_batches(
        first_tokens(pieces(documents, tokenizer, config.sequence_length), tokens), config.batch_tokens, pad
    )


def pieces(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Iterator[list[int]]:
    """The token ids of each document, cut into consecutive pieces of at most `sequence_length`.

    A document gets the tokenizer's special tokens, unless the text (a rendered chat) begins with its own.
    """
    for text in documents:
        begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        ids = tokenizer(text, add_special_tokens=not begun, verbose=False)["input_ids"]
        for start in range(0, len(ids), sequence_length):
            yield ids[start : start + sequence_length]


def first_tokens(parts: Iterable[list[int]], tokens: int) -> Iterator[list[int]]:
    """The first `tokens` tokens of `parts`; the last part is cut to fit."""
    left = tokens
    for part in parts:
        yield part[:left]
        left -= len(part)
        if left <= 0:
            return


def prompts(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, prompt_length: int) -> Iterator[list[int]]:
    """The first part of each document: its first half, and at most `prompt_length` tokens of it."""
    for text in documents:
        # Only the beginning of a long document is read: no token is so long that this gives too few tokens.
        for ids in pieces([text[: 64 * prompt_length]], tokenizer, 2 * prompt_length):
            yield ids[: (len(ids) + 1) // 2]
            break


def padded_batches(parts: Iterable[list[int]], tokens: int, pad: int) -> Iterator[TokenBatch]:
    """Batches of at most `tokens` tokens, padding included, each of parts of similar length.

    A part that is longer is a batch of its own.
    """
    number = first = 0
    for group in _groups(parts, tokens, extra=0):
        lengths = torch.tensor([len(part) for part in group])
        rows = [part + [pad] * (int(lengths.max()) - len(part)) for part in group]
        yield TokenBatch(number, first, torch.tensor(rows), lengths)
        number, first = number + 1, first + len(group)


def prompt_batches(parts: Iterable[list[int]], tokens: int, new_tokens: int) -> Iterator[TokenBatch]:
    """Batches of prompts with at most `tokens` tokens, counting the `new_tokens` that each prompt will get.

    The prompts of a batch are cut to the shortest, so that no padding stands between a prompt and the generated tokens.
    """
    number = first = 0
    for group in _groups(parts, tokens, extra=new_tokens):
        shortest = min(len(part) for part in group)
        rows = torch.tensor([part[:shortest] for part in group])
        yield TokenBatch(number, first, rows, torch.full((len(group),), shortest))
        number, first = number + 1, first + len(group)


def packed_batches(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int, batch_size: int, tokens: int
) -> Iterator[TokenBatch]:
    """Batches of packed sequences (`corpus.sequences`); a shorter last sequence is a batch of its own: no padding."""
    number = first = 0
    rows = sequences(documents, tokenizer, sequence_length, tokens)
    for length, alike in itertools.groupby(rows, key=len):
        while group := list(itertools.islice(alike, batch_size)):
            yield TokenBatch(number, first, torch.stack(group), torch.full((len(group),), length))
            number, first = number + 1, first + len(group)


def _groups(parts: Iterable[list[int]], tokens: int, extra: int) -> Iterator[list[list[int]]]:
    buffer: list[list[int]] = []
    buffered = 0
    for part in parts:
        buffer.append(part)
        buffered += len(part) + extra
        if buffered >= BUFFERED_BATCHES * tokens:
            yield from _cut(buffer, tokens, extra)
            buffer, buffered = [], 0
    yield from _cut(buffer, tokens, extra)


def _cut(buffer: list[list[int]], tokens: int, extra: int) -> Iterator[list[list[int]]]:
    group: list[list[int]] = []
    # In rising order, so each part is the longest of its group so far; the sort is stable, so the order is always the same.
    for part in sorted(buffer, key=len):
        if group and (len(group) + 1) * (len(part) + extra) > tokens:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def sample_mask(seed: int, sequence: torch.Tensor, position: torch.Tensor, rate: float) -> torch.Tensor:
    """Which tokens a sample of `rate` (0 to 1) keeps, bool, in the shape of `sequence` and `position` (integers).

    A hash of seed, sequence and position decides, so the result is the same in every batch, order and process.
    """
    with np.errstate(over="ignore"):
        key = np.array(seed & 0xFFFF_FFFF_FFFF_FFFF, dtype=np.uint64)
        for part in (sequence, position):
            key = _mix(key ^ _mix(part.numpy().astype(np.uint64)))
    return torch.from_numpy((key >> np.uint64(11)).astype(np.float64) * 2.0**-53 < rate)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of splitmix64: neighbouring numbers give unrelated results."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
