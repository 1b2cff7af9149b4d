"""Documents cut into sequences, batched and padded: nothing is lost, repeated, mixed or seen that should not be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from predict_train.data_collection import batches
from predict_train.data_collection.batches import (
    TokenBatch,
    packed_batches,
    padded_batches,
    pieces,
    prompt_batches,
    prompts,
    sample_mask,
)
from predict_train.data_collection.hooks import Recorder
from predict_train.data_collection.passes import run_batch
from predict_train.data_collection.settings import CollectConfig
from predict_train.predictors.discovery import find_moe_layers

# Distinct characters, so that a token says where in which document it stood.
LETTERS = "".join(chr(i) for i in range(33, 127))


def documents_of(lengths: list[int]) -> list[str]:
    """Documents of these lengths; the first character names the document, the others are in rising order."""
    return [LETTERS[number] + LETTERS[: length - 1] for number, length in enumerate(lengths)]


def sequences_of(found: Iterator[TokenBatch]) -> list[tuple[int, list[int]]]:
    """Number and token ids of every sequence, the padding taken off as the mask says."""
    result = []
    for number, batch in enumerate(found):
        assert batch.number == number
        assert batch.tokens == batch.mask().sum()
        rows = zip(batch.token_ids, batch.mask(), strict=True)
        result += [(batch.first + i, row[mask].tolist()) for i, (row, mask) in enumerate(rows)]
    return result


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    sequence_length=st.integers(1, 25),
    tokens=st.integers(1, 200),
    buffered=st.integers(1, 3),
)
def test_every_token_of_every_document_is_there_once_in_order(tokenizer, lengths, sequence_length, tokens, buffered):
    documents = documents_of(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "BUFFERED_BATCHES", buffered)
        parts = list(pieces(documents, tokenizer, sequence_length))
        found = list(padded_batches(parts, tokens, pad=0))
    # Consecutive pieces of a document make the document.
    rest = list(parts)
    for text in documents:
        ids = tokenizer(text)["input_ids"]
        own: list[int] = []
        while len(own) < len(ids):
            assert 1 <= len(rest[0]) <= sequence_length
            own += rest.pop(0)
        assert own == ids
    assert not rest
    # Each piece is one sequence, so no sequence holds two documents; they are numbered without a gap.
    sequences = sequences_of(found)
    assert [number for number, _ in sequences] == list(range(len(parts)))
    assert sorted(ids for _, ids in sequences) == sorted(parts)
    # A batch is as large as it was allowed to be.
    assert all(b.token_ids.numel() <= tokens or len(b.token_ids) == 1 for b in found)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), new_tokens=st.integers(1, 9))
def test_prompts_are_the_first_parts_of_documents_without_padding(tokenizer, lengths, new_tokens):
    documents = documents_of(lengths)
    found = list(prompt_batches(prompts(documents, tokenizer, 8), 40, new_tokens))
    by_first = {tokenizer(text)["input_ids"][0]: tokenizer(text)["input_ids"] for text in documents}
    sequences = sequences_of(iter(found))
    assert len(sequences) == len(documents)
    assert {ids[0] for _, ids in sequences} == by_first.keys()
    for _, ids in sequences:
        whole = by_first[ids[0]]
        assert ids == whole[: len(ids)]
        assert 1 <= len(ids) <= min(8, (len(whole) + 1) // 2)
    for batch in found:
        assert batch.mask().all()
        assert batch.token_ids.numel() + new_tokens * len(batch.token_ids) <= 40 or len(batch.token_ids) == 1


def test_packed_batches_have_no_padding_and_lose_nothing(tokenizer):
    documents = documents_of([7, 30, 2, 11])
    found = list(packed_batches(documents, tokenizer, 8, 3, 53))
    ids = [i for text in documents for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert [i for _, sequence in sequences_of(iter(found)) for i in sequence] == ids[:53]
    assert all(batch.mask().all() for batch in found)
    assert [len(batch.token_ids) for batch in found] == [3, 3, 1]


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "deepseek_v3"])
@torch.inference_mode()
def test_a_row_of_a_padded_batch_is_that_of_the_document_run_alone(build_moe, tokenizer, architecture):
    model = build_moe(architecture)
    layers = find_moe_layers(model)
    config = CollectConfig(model="", out="", sequence_length=40)
    documents = documents_of([40, 3, 17, 26, 1])

    def record(parts: list[list[int]], tokens: int) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
        rows = {}
        with Recorder(layers, [layer.index for layer in layers]) as recorder:
            for batch in padded_batches(parts, tokens, pad=5):
                columns = run_batch(model, recorder, batch, config)
                for i in range(len(columns["token_ids"])):
                    row = {name: column[i] for name, column in columns.items()}
                    sequence = batch.token_ids[int(row["sequence"]) - batch.first]
                    rows[int(sequence[0]), int(row["position"])] = row
            vectors.append(recorder.default_vectors())
        return rows

    vectors: list[dict[int, torch.Tensor]] = []
    parts = list(pieces(documents, tokenizer, 40))
    together, alone = record(parts, 1000), record(parts, 1)
    assert together.keys() == alone.keys()
    assert len(alone) == 40 + 3 + 17 + 26 + 1
    for key in alone:
        for name in alone[key]:
            if name != "sequence":
                torch.testing.assert_close(together[key][name], alone[key][name], rtol=0.02, atol=0.01)
                if name.endswith("ids"):
                    assert torch.equal(together[key][name], alone[key][name])
    for source in vectors[0]:  # nor is the padding in the means
        torch.testing.assert_close(vectors[0][source], vectors[1][source], rtol=1e-3, atol=1e-4)


@given(rate=st.floats(0.01, 1), seed=st.integers(-5, 1 << 62), first=st.integers(0, 1 << 40))
def test_a_sample_is_the_same_however_it_is_asked_for(rate, seed, first):
    sequence = torch.arange(first, first + 40).unsqueeze(1)
    position = torch.arange(50).unsqueeze(0)
    whole = sample_mask(seed, sequence, position, rate)
    assert whole.shape == (40, 50)
    assert torch.equal(sample_mask(seed, sequence[7:9], position, rate), whole[7:9])
    assert torch.equal(sample_mask(seed, sequence, position[:, 3:4], rate), whole[:, 3:4])
    # Five standard deviations of 2,000 tosses, and a few tosses where hardly any is expected to fall otherwise.
    assert abs(float(whole.float().mean()) - rate) < 5 * (rate * (1 - rate) / 2000) ** 0.5 + 3.5 / 2000


def test_samples_of_two_seeds_are_independent():
    sequence, position = torch.arange(100).unsqueeze(1), torch.arange(100).unsqueeze(0)
    one, two = (sample_mask(seed, sequence, position, 0.5) for seed in (0, 1))
    assert abs(float((one & two).float().mean()) - 0.25) < 0.02
    # Nor do rows or columns know of each other.
    assert 20 < int(one.sum(0).min()) <= int(one.sum(0).max()) < 80
    assert 20 < int(one.sum(1).min()) <= int(one.sum(1).max()) < 80


def test_a_document_begins_with_the_special_tokens_that_the_model_meets(tokenizer):
    class Opening:
        """A tokenizer that opens every text, as many do."""

        bos_token = "<|endoftext|>"

        def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
            ids = tokenizer(text, verbose=verbose)["input_ids"]
            return {"input_ids": [0, *ids] if add_special_tokens else ids}

    plain, rendered = pieces(["abc", "<|endoftext|>abc"], Opening(), 10)
    assert plain == rendered == [0, *tokenizer("abc")["input_ids"]]
