from __future__ import annotations

import copy
import gzip
import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from predict_train.data_collection import corpus
from predict_train.data_collection.corpus import CorpusError, embedded_files, is_held_out, read_documents, sequences
from transformers import PreTrainedTokenizerFast


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


ROWS = [{"text": "one", "body": "eins"}, {"text": " ", "body": "zwei"}, {"text": "three", "body": "drei"}]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows in every form that rows come in."""
    folder = tmp_path_factory.mktemp("tables")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "lines.jsonl").write_text(lines)
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "array.json").write_text(json.dumps(ROWS))
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "[odd] name.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    splits = {"test": datasets.Dataset.from_list(ROWS), "more": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(folder / "splits")
    # Shaped like a repository of the Hub: a card that names the configs, and files by split.
    hub = folder / "hub"
    hub.mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(hub / "a.parquet")
    datasets.Dataset.from_list(ROWS[:1]).to_parquet(hub / "b.parquet")
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: big\n  data_files:\n  - split: train\n    path: a.parquet\n"
        "  - split: test\n    path: b.parquet\n- config_name: small\n  data_files:\n  - split: only\n    path: b.parquet\n---\n"
    )
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lines.jsonl", ["one", "three"]),
        ("lines.jsonl.gz", ["one", "three"]),
        ("array.json", ["one", "three"]),
        ("[odd] name.parquet", ["one", "three"]),
        ("saved", ["one", "three"]),
        ("splits::test", ["one", "three"]),
        ("hub:big:train", ["one", "three"]),
        ("hub:big", ["one", "three"]),
        ("hub:big:test", ["one"]),
        ("hub:small", ["one"]),
        ("lines*", ["one", "three"] * 2),
        ("**/?.parquet", ["one", "three", "one"]),
    ],
)
def test_rows_are_read_in_every_form(tables, name, expected):
    assert list(read_documents(tables / name)) == expected


def test_a_folder_gives_its_rows_too(tables, tmp_path):
    shutil.copy(tables / "lines.jsonl", tmp_path / "b.jsonl")
    shutil.copy(tables / "hub" / "b.parquet", tmp_path / "c.parquet")
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "settings.json").write_text("{}")
    assert list(read_documents(tmp_path)) == ["plain", "one", "three", "one"]


def test_the_named_column_is_read(tables):
    assert list(read_documents(tables / "lines.jsonl", text_column="body")) == ["eins", "zwei", "drei"]
    with pytest.raises(CorpusError, match=r"no column 'title'; name one of text, body with --text-column"):
        list(read_documents(tables / "saved", text_column="title"))


CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
TEMPLATE = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def chatty(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with a chat template, which takes no tools."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = TEMPLATE
    return other


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_chats_are_rendered_with_the_models_template(tmp_path, chatty, tokenizer, column):
    from_value = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"id": i, column: chat}) + "\n" for i, chat in enumerate([CHAT, from_value])))
    assert list(read_documents(file, tokenizer=chatty)) == ["<user>Why?<assistant>Because."] * 2
    with pytest.raises(CorpusError, match=r"row 1 of .*has no chat template"):
        list(read_documents(file, tokenizer=tokenizer))


def test_a_chat_that_the_template_refuses_is_named(tmp_path, chatty):
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": [{"role": r, "content": "x"}]}) + "\n" for r in ("user", "tool")))
    with pytest.raises(CorpusError, match=r"row 2 of .*no tools here"):
        list(read_documents(file, tokenizer=chatty))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/corpus", "there is no corpus at /no/such/corpus; give a text file"),
        ("nothing.jsonl", "there is no corpus at nothing.jsonl"),
        ("nobody/has-this-data", r"the corpus nobody/has-this-data can't be read \("),
        ("TABLES/*.nothing", "no file is called like"),
        ("TABLES/broken.jsonl", r"broken\.jsonl can't be read \("),
        ("TABLES/numbers.jsonl", "'text' is neither text nor a chat but int"),
        ("TABLES/splits", "has the splits test, more; name one of them"),
        ("TABLES/splits::none", "has no split none .*test, more"),
        ("TABLES/hub", "holds no text"),
        ("TABLES/hub::nothing", r"can't be read \("),
        ("TABLES/saved@0", "the weight of the corpus .* can't be 0"),
    ],
)
def test_a_corpus_that_can_not_be_read_is_one_sentence(tables, monkeypatch, name, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tables / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tables / "numbers.jsonl").write_text('{"text": 3}\n')
    if name == "TABLES/hub":  # without a colon it is a folder: only its README is text
        name = "TABLES/splits/more/nowhere@2"
        message = "there is no corpus at"
    with pytest.raises(CorpusError, match=message) as raised:
        list(read_documents(name.replace("TABLES", str(tables))))
    assert "\n" not in str(raised.value)


def test_a_long_text_file_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LONGEST_TEXT", 50)
    text = "".join(f"line {number} is here\r\n" for number in range(40))
    (tmp_path / "long.txt").write_bytes(text.encode())
    pieces = list(read_documents(tmp_path / "long.txt"))
    assert "".join(pieces) == text.replace("\r\n", "\n")
    assert len(pieces) > 5
    assert all(piece.endswith("\n") and len(piece) <= 50 + 20 for piece in pieces)


@given(st.lists(st.integers(1, 40), min_size=2, max_size=4), st.integers(0, 9))
def test_a_mixture_keeps_its_weights_all_along(weights, seed):
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for number, weight in enumerate(weights):
            file = Path(folder, f"{number}.jsonl")
            texts = ["abcdefgh"[number] * chance.randint(1, 20) for _ in range(60)]
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            names.append(f"{file}@{weight}")
        read, first = [0] * len(weights), list(mix(names))
        for text in first:
            read["abcdefgh".index(text[0])] += len(text)
            # None is further ahead of its share than by the one document that put it there.
            shares = [characters / weight for characters, weight in zip(read, weights, strict=True)]
            assert max(shares) - min(shares) <= 20 / min(weights) + 1e-9
        assert list(mix(names)) == first


def mix(names: list[str]) -> Iterator[str]:
    return corpus.mixed([corpus.parse_source(name) for name in names], plain_lines)


def plain_lines(name: str) -> Iterator[str]:
    # Past `datasets`, which is slow to open hundreds of small files.
    yield from (json.loads(line)["text"] for line in Path(name).read_text().splitlines())


def test_several_corpora_are_mixed(tables, text_corpus):
    documents = list(read_documents([f"{tables / 'lines.jsonl'}@0.0001", f"{text_corpus}@2"]))
    assert [text[:9] for text in documents] == ["one", "The river", "The stone"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a/b", ("a/b", 1.0)), ("a@2", ("a", 2.0)), ("me@home/x", ("me@home/x", 1.0)), ("a@b@0.5", ("a@b", 0.5))],
)
def test_a_weight_stands_behind_the_last_at(text, expected):
    assert corpus.parse_source(text) == expected


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
