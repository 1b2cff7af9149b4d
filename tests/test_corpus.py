from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_collection.corpus import CorpusError, embedded_files, is_held_out, read_documents, sequences


def test_the_embedded_split_is_disjoint_and_whole():
    train, held_out = (dict(embedded_files(split)) for split in ("train", "held_out"))
    assert {is_held_out(name) for name in train} == {False}
    assert {is_held_out(name) for name in held_out} == {True}
    assert not train.keys() & held_out.keys()
    assert not set(train.values()) & set(held_out.values())
    assert "json/decoder.py" in train | held_out
    assert 0.02 < len(held_out) / (len(train) + len(held_out)) < 0.1


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_the_split_depends_on_the_name_only(name):
    # By the rule as documented: the first eight bytes of the name's sha256, one in twenty.
    digest = hashlib.sha256(name.encode()).digest()
    assert is_held_out(name) == (int.from_bytes(digest[:8], "big") % 20 == 0)


def test_a_folder_gives_its_text_files_in_name_order(text_corpus):
    documents = list(read_documents(text_corpus))
    assert [text.split()[1] for text in documents] == ["river", "stone"]


def test_jsonl_reads_the_named_column(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in ("one", "", "two")))
    assert list(read_documents(file, text_column="body")) == ["one", "two"]
    with pytest.raises(CorpusError, match=r"line 1 .*'text'"):
        list(read_documents(file))


@pytest.mark.parametrize("content", [None, b"", b"  \n ", b"a\0b"])
def test_a_corpus_without_text_is_refused(tmp_path, content):
    file = tmp_path / "corpus.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CorpusError, match=r"corpus\.txt"):
        list(read_documents(file))


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    sequence_length=st.integers(1, 17),
    tokens=st.none() | st.integers(1, 120),
)
def test_sequences_are_the_documents_cut_up(tokenizer, lengths, sequence_length, tokens):
    documents = ["abcdefghijklmnopqrstuvwxyz0123"[:n] for n in lengths]
    expected = [i for text in documents for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]][:tokens]
    got = [s.tolist() for s in sequences(documents, tokenizer, sequence_length, tokens)]
    assert [i for s in got for i in s] == expected
    assert all(len(s) == sequence_length for s in got[:-1])
