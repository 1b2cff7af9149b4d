from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from predict_train.data_collection import corpus
from predict_train.data_collection.corpus import embedded_files, is_held_out, read_documents, sequences
from predict_train.data_collection.refusals import CorpusError, Refusals, refuse_all
from rich.console import Console

SKIPPED = b"\x50\x2a\x4d\x18\x03\x00\x00\x00any"
"""A frame of zstandard that readers skip."""


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


def read(corpus: object, **settings: object) -> list[str]:
    """The documents of a corpus; nothing but empty rows may be left out."""
    refusals = Refusals()
    documents = list(read_documents(corpus, refuse=refusals.add, **settings))  # type: ignore[arg-type]
    assert set(refusals.counts) <= {"is empty in its column 'text'"}
    return documents


ROWS = [{"text": "one", "body": "eins"}, {"text": " ", "body": "zwei"}, {"text": "three", "body": "drei"}]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows in every form that rows come in."""
    folder = tmp_path_factory.mktemp("tables")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "lines.jsonl").write_text(lines)
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    frames = [pyarrow.compress(part + b"\n", codec="zstd", asbytes=True) for part in lines.encode().splitlines()]
    (folder / "frames.jsonl.zst").write_bytes(b"".join([*frames[:2], SKIPPED, *frames[2:]]))
    (folder / "DATA.JSONL").write_text(lines)
    (folder / "bom.ndjson").write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode())
    (folder / "bom.csv").write_bytes(b'\xef\xbb\xbftext,body\n"one",eins\n" ",zwei\nthree,"dr,ei"\n')
    (folder / "tabs.tsv.gz").write_bytes(gzip.compress(b"text\tbody\none\teins\nthree\tdrei\n"))
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "[odd] name.parquet")
    odd = folder / "odd::name[1]"
    odd.mkdir()
    (odd / "a.jsonl").write_text(lines)
    shutil.copy(folder / "[odd] name.parquet", odd / "b.parquet")
    (folder / "array.json").write_text(json.dumps(ROWS))
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    splits = {"test": datasets.Dataset.from_list(ROWS), "more": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(folder / "splits")
    without = {"train": datasets.Dataset.from_list(ROWS), "validation": datasets.Dataset.from_dict({"text": []})}
    datasets.DatasetDict(without).save_to_disk(folder / "without")
    # Shaped like a repository of the Hub: a card that names the configs, and files by split.
    hub = folder / "hub"
    hub.mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(hub / "a.parquet")
    datasets.Dataset.from_list(ROWS[:1]).to_parquet(hub / "b.parquet")
    packed = folder / "packed"
    packed.mkdir()
    (packed / "c.jsonl.zst").write_bytes(b"".join(frames))
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
        ("frames.jsonl.zst", ["one", "three"]),
        ("DATA.JSONL", ["one", "three"]),
        ("bom.ndjson", ["one", "three"]),
        ("bom.csv", ["one", "three"]),
        ("tabs.tsv.gz", ["one", "three"]),
        ("odd::name[1]", ["one", "three"] * 2),
        ("odd::name[1]/b.parquet", ["one", "three"]),
        ("odd::name[1]/*", ["one", "three"] * 2),
        ("packed:default", ["one", "three"]),
        ("[odd] name.parquet", ["one", "three"]),
        ("saved", ["one", "three"]),
        ("splits::test", ["one", "three"]),
        ("without", ["one", "three"]),
        ("hub:big:train", ["one", "three"]),
        ("hub:big", ["one", "three"]),
        ("hub:big:test", ["one"]),
        ("hub:small", ["one"]),
        ("lines*", ["one", "three"] * 2),
        ("**/?.parquet", ["one", "three", "one", "one", "three"]),
        ("hub/?.parquet", ["one", "three", "one"]),
    ],
)
def test_rows_are_read_in_every_form(tables, name, expected):
    assert read(tables / name) == expected


def test_a_folder_gives_its_rows_too(tables, tmp_path):
    shutil.copy(tables / "lines.jsonl", tmp_path / "b.jsonl")
    shutil.copy(tables / "hub" / "b.parquet", tmp_path / "c.parquet")
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "settings.json").write_text("{}")
    assert read(tmp_path) == ["plain", "one", "three", "one"]


def test_the_named_column_is_read(tables):
    assert list(read_documents(tables / "lines.jsonl", text_column="body")) == ["eins", "zwei", "drei"]
    with pytest.raises(CorpusError, match=r"no column 'title'; name one of text, body with --text-column"):
        list(read_documents(tables / "saved", text_column="title"))


def test_text_is_utf_8_and_no_file_is_read_twice_or_half(tmp_path, capsys):
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    (tmp_path / "sub" / ".git" / "config.md").write_text("hidden")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    (tmp_path / "b.TXT.xz").write_bytes(lzma.compress(b"packed"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "wide.txt").write_bytes("caf\u00e9".encode("utf-16"))
    (tmp_path / "zeros.txt").write_bytes(b"a\0b")
    (tmp_path / "sub" / "c.txt").write_text("below")
    for name in ("loop", "again"):  # two of them make 2^40 paths
        (tmp_path / "sub" / name).symlink_to(tmp_path)
    (tmp_path / "itself.txt").symlink_to("itself.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    elsewhere.mkdir()
    (elsewhere / "d.txt").write_text("linked")
    (tmp_path / "z").symlink_to(elsewhere)
    for name in (tmp_path, tmp_path / "**" / "*.[tT][xX][tT]*", tmp_path / "**"):
        refusals = Refusals()
        found = list(read_documents(name, refuse=refusals.add))
        assert found == ["with a mark", "packed", "below", "linked"]
        assert list(refusals.counts.values()) == [2, 2, 1]
        refusals.report(Console())
        told = capsys.readouterr().out
        assert "left out of the corpus: 5" in told
        for what in ("latin.txt, which is not UTF-8", "zeros.txt, which is not text", "2 like"):
            assert what in told
    with pytest.raises(CorpusError, match=r"holds no text that can be used: .*latin\.txt is not UTF-8; convert it"):
        read(tmp_path / "latin.txt")


def test_what_can_not_be_opened_is_told(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.jsonl").write_text('{"text": "closed"}')
    opened = Path.open

    def refuse(self: Path, *arguments: object) -> object:
        if self.name == "b.jsonl":
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    refusals = Refusals()
    assert list(read_documents(tmp_path, refuse=refusals.add)) == ["fine"]
    assert refusals.counts == {"can't be read (Permission denied)": 1}
    with pytest.raises(CorpusError, match=r"Permission denied"):
        read(tmp_path / "b.jsonl")


def test_rows_that_are_none_are_counted(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [b'{"text": "one"}', b"{", b"3", b'{"text": null}', b'{"text": ""}', b'{"texts": "x"}', b'{"text": "\xe9"}',
             rb'{"text": "\ud83d"}', b'{"text": ["a"]}', b'{"text": "2024-05-01"}']  # fmt: skip
    file.write_bytes(b"\n".join(lines))
    refusals = Refusals()
    assert list(read_documents(file, refuse=refusals.add)) == ["one", "2024-05-01"]
    assert sum(refusals.counts.values()) == 8
    assert refusals.counts["is empty in its column 'text'"] == 2
    assert refusals.first["is not JSON"] == f"row 2 of {file}"
    with pytest.raises(CorpusError, match=r"row 2 of .* is not JSON; mend it"):
        list(read_documents(file))
    table = tmp_path / "rows.csv"
    table.write_text("text,n\none,1\ntwo,2,3\n")
    refusals = Refusals()
    assert list(read_documents(table, refuse=refusals.add)) == ["one"]
    assert refusals.counts == {"has more values than there are columns": 1}


def test_a_corpus_of_refusals_ends_early(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"body": "x"}\n' * 1000 + '{"text": "x"}\n')
    refusals = Refusals()
    with pytest.raises(CorpusError, match=r"row 1 of .* has no column 'text'; name one of body with --text-column"):
        list(read_documents(file, refuse=refusals.add))
    assert sum(refusals.counts.values()) == 1000


def refuse_full(where: str, reason: str) -> None:
    if not reason.startswith("is empty"):
        refuse_all(where, reason)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/corpus", "there is no corpus at /no/such/corpus; give a text file"),
        ("nothing.jsonl", "there is no corpus at nothing.jsonl"),
        ("nobody/has-this-data", r"the corpus nobody/has-this-data can't be read \("),
        ("TABLES/*.nothing", "no file is called like"),
        ("TABLES/broken.jsonl", r"row 2 of .*broken\.jsonl is not JSON; mend it"),
        ("TABLES/broken.json", r"broken\.json can't be read \("),
        ("TABLES/cut.jsonl.gz", r"cut\.jsonl\.gz can't be read \(EOFError"),
        ("TABLES/cut.jsonl.zst", r"cut\.jsonl\.zst can't be read \(OSError: Truncated"),
        ("TABLES/cut.parquet", r"cut\.parquet can't be read \("),
        ("TABLES/open.csv", r"open\.csv can't be read \("),
        ("TABLES/odd::saved", "has :: in its name, which the library datasets can't read; rename it"),
        ("TABLES/numbers.jsonl", "neither text nor a chat but int in its column 'text'; name another"),
        ("TABLES/splits", "has the splits test, more; name one of them"),
        ("TABLES/splits::none", "has no split none .*test, more"),
        ("TABLES/saved::none", "has no split none, since it is a single dataset"),
        ("TABLES/without::validation", "holds no text"),
        ("TABLES/twice.csv", "has two columns called text; rename one"),
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
    (tables / "broken.json").write_text('[{"text": "fine"}, {"text":')
    (tables / "twice.csv").write_text("text,text\na,b\n")
    (tables / "open.csv").write_text('text\nfine\n"open')
    for name_of_whole in ("lines.jsonl.gz", "frames.jsonl.zst", "hub/a.parquet"):
        whole = tables / name_of_whole
        (tables / f"cut.{whole.name.partition('.')[2]}").write_bytes(whole.read_bytes()[:-4])
    shutil.copytree(tables / "saved", tables / "odd::saved", dirs_exist_ok=True)
    if name == "TABLES/hub":  # without a colon it is a folder: only its README is text
        name = "TABLES/splits/more/nowhere@2"
        message = "there is no corpus at"
    with pytest.raises(CorpusError, match=message) as raised:
        list(read_documents(name.replace("TABLES", str(tables)), refuse=refuse_full))
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
    documents = read([f"{tables / 'lines.jsonl'}@0.0001", f"{text_corpus}@2"])
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
