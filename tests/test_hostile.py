"""Predictors folders from anywhere: whatever is wrong with one, loading it ends in one sentence and takes no memory for it."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from predict_train.predictors.architecture import fingerprint
from predict_train.predictors.checkpoint import load_predictors
from predict_train.predictors.config import MOST_BYTES, PredictorsError
from predict_train.predictors.files import checksum, sealed
from safetensors.torch import load, load_file, save

WEIGHTS, CONFIG = "predictors.safetensors", "config.json"


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export that a test may break."""
    return shutil.copytree(exported, tmp_path / "predictors")


def refusal(folder: Path) -> str:
    """The sentence that loading and inspecting the folder end in."""
    with pytest.raises(PredictorsError) as error:
        load_predictors(folder)
    message = str(error.value)
    assert message.isprintable(), message
    assert len(message) < 1000
    return message


def change(folder: Path, edit: Callable[[Any], Any]) -> None:
    """Writes another config, with checksums that are right: who means harm makes them so."""
    config = json.loads((folder / CONFIG).read_text())
    edited = edit(config)
    write_sealed(folder, config if edited is None else edited)


def write_sealed(folder: Path, config: Any) -> None:
    if isinstance(config, dict):
        config = sealed(config | ({"weights_xxh3": checksum(folder / WEIGHTS)} if "weights_xxh3" in config else {}))
    (folder / CONFIG).write_text(json.dumps(config))


def put(*path: Any) -> Callable[[Any], None]:
    """An edit of a config: the last of `path` is the value to put at the rest of it."""
    *way, last, value = path

    def edit(config: Any) -> None:
        for step in way:
            config = config[step]
        config[last] = value

    return edit


def drop(*path: Any) -> Callable[[Any], None]:
    def edit(config: Any) -> None:
        for step in path[:-1]:
            config = config[step]
        del config[path[-1]]

    return edit


def reshaped(**facts: Any) -> Callable[[Any], None]:
    """A model of another shape, with the fingerprint of that shape."""

    def edit(config: Any) -> None:
        config["model"] |= facts
        config["model"]["fingerprint"] = fingerprint(config["model"])

    return edit


LONG = "x" * 1_000_000
CONFIGS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a list": (lambda c: [c], "holds no predictors"),
    "a string": (lambda _: "format_version", "holds no predictors"),
    "no version": (drop("format_version"), "holds no predictors"),
    "a version of the future": (put("format_version", 99), "format version 99, and this release reads 2 to 7"),
    "a version that is a list": (put("format_version", [3] * 1000), r"format version \[3, 3.*update predict-train"),
    "a version that is a fraction": (put("format_version", 3.0), "format_version: input should be a valid integer"),
    "an unknown field": (put("extra", 1), "extra: extra inputs are not permitted"),
    "an unknown field with a name to fear": (put(f"\x1b[2J\n{LONG}", 1), "extra inputs are not permitted"),
    "reuse predictors of nothing": (put("reuse", "layers", []), r"reuse\.layers"),
    "reuse predictors of another layer": (put("reuse", "layers", [0, 1, 2, 9]), "reuse names layer 9"),
    "reuse predictors of a layer twice": (put("reuse", "layers", [0, 1, 2, 2]), "reuse names a layer twice"),
    "reuse predictors of another width": (put("reuse", "width", 63), r"reuse\.fading is F32 of shape"),
    "reuse predictors as wide as memory": (put("reuse", "width", 1 << 20), r"reuse\.fading is F32 of shape"),
    "reuse without a rate": (put("reuse", "hit_rates", "lru", [0.5]), "not a hit rate for each number of slots"),
    "a rule that there is not": (put("reuse", "hit_rates", "fifo", [0.5] * 3), r"reuse\.hit_rates"),
    "no reuse predictors, and their tensors": (drop("reuse"), r"holds the tensor .*reuse\.a'"),
    "no model": (drop("model"), "model is missing"),
    "a model that is a list": (put("model", []), "model: input should be a valid dictionary"),
    "a model without a name": (drop("model", "name"), r"model\.name is missing"),
    "a model's name that steers the terminal": (put("model", "name", "a\x1b[2J"), r"model\.name"),
    "a model's name of a megabyte": (put("model", "name", LONG), r"model\.name"),
    "hidden size as text": (put("model", "hidden_size", "32"), r"model\.hidden_size: input should be a valid integer"),
    "hidden size true": (put("model", "hidden_size", True), r"model\.hidden_size"),
    "hidden size zero": (put("model", "hidden_size", 0), r"model\.hidden_size"),
    "hidden size huge": (reshaped(hidden_size=1 << 62), r"model\.hidden_size"),
    "experts negative": (put("model", "num_experts", -8), r"model\.num_experts"),
    "more chosen than there are": (reshaped(top_k=9), "top k is 9, and it has 8 experts"),
    "MoE layers that do not rise": (reshaped(moe_layers=[0, 2, 1, 3]), "MoE layers do not rise"),
    "MoE layers twice": (reshaped(moe_layers=[0, 1, 1, 2, 3]), "MoE layers do not rise"),
    "no MoE layers": (reshaped(moe_layers=[]), r"model\.moe_layers"),
    "fingerprint of another type": (put("model", "fingerprint", 7), r"model\.fingerprint: input should be a valid string"),
    "fingerprint of another shape": (put("model", "top_k", 3), "fingerprint is not that of its shape"),
    "layers a dict": (put("layers", {"0": {}}), "layers: input should be a valid list"),
    "a layer that is a number": (put("layers", 0, 5), r"layers\.0: input should be a valid dictionary"),
    "a layer true": (put("layers", 1, "layer", True), r"layers\.1\.layer"),
    "a layer with a path": (put("layers", 1, "layer", "../../x"), r"layers\.1\.layer.*\.\./\.\./x"),
    "a layer that is negative": (put("layers", 1, "layer", -1), r"layers\.1\.layer"),
    "a layer that is none of the model's": (put("layers", 1, "layer", 17), "layers names layer 17, which is no MoE layer"),
    "a layer twice": (lambda c: c["layers"].append(copy.deepcopy(c["layers"][0])), "layers names a layer twice"),
    "a source that is text": (put("layers", 1, "source", "0"), r"layers\.1\.source"),
    "a source that is none of the model's": (reshaped(moe_layers=[0, 2, 3]), "layers names layer 1"),
    "a source behind its target": (put("layers", 1, "source", 2), "layer 2 can't be the source of layer 1"),
    "a source that is its target": (put("layers", 1, "source", 1), "layer 1 can't be the source of layer 1"),
    "no width": (drop("layers", 2, "width"), r"layers\.2\.width is missing"),
    "a width that is a fraction": (put("layers", 2, "width", 32.0), r"layers\.2\.width"),
    "a width false": (put("layers", 2, "width", False), r"layers\.2\.width"),
    "a width of text": (put("layers", 2, "width", "../32"), r"layers\.2\.width"),
    "a width that is negative": (put("layers", 2, "width", -32), r"layers\.2\.width"),
    "a memory of too many tokens": (put("layers", 2, "memory", 3), r"layers\.2\.memory"),
    "a width that no memory has": (put("layers", 2, "width", 1 << 60), r"layers\.2\.width"),
    "a width of terabytes": (put("layers", 2, "width", 1 << 20), r"layers\.2\.w1 is F32 of shape \[32, 32\]"),
    "sizes of terabytes": (reshaped(hidden_size=1 << 20, num_experts=1 << 20), "and should be F32, BF16 or F16 of shape"),
    "another width": (put("layers", 2, "width", 31), r"layers\.2\.\w+ is F32 of shape"),
    "a width of none, and tensors": (put("layers", 2, "width", 0), r"holds the tensor 'layers\.2\.b1', which"),
    "hit rates a list": (put("layers", 0, "hit_rate", [0.5, 0.6]), r"layers\.0\.hit_rate"),
    "a hit rate of text": (put("layers", 0, "hit_rate", "predictor", "0.9"), r"layers\.0\.hit_rate\.predictor"),
    "confidence of text": (put("layers", 0, "confidence", "sure"), r"layers\.0\.confidence"),
    "a temperature of zero": (put("layers", 0, "confidence", "temperature", 0.0), r"layers\.0\.confidence\.temperature"),
    "a bias without end": (put("layers", 0, "confidence", "bias", 1e300), r"layers\.0\.confidence\.bias"),
    "a probability above one": (put("layers", 0, "confidence", "most", 1.5), r"layers\.0\.confidence\.most"),
    "a probability that falls": (put("layers", 0, "confidence", "least", 1.0), r"layers\.0\.confidence.*least is 1"),
    "a hit rate above one": (put("layers", 0, "hit_rate", "predictor", 1.5), r"layers\.0\.hit_rate\.predictor"),
    "a hit rate not a number": (put("layers", 0, "hit_rate", "predictor", float("nan")), r"hit_rate\.predictor"),
    "a hit rate of another kind": (put("layers", 0, "hit_rate", "control", 1.0), r"layers\.0\.hit_rate\.control"),
    "recall a number": (put("layers", 0, "recall", 0.9), r"layers\.0\.recall: input should be a valid list"),
    "recall of text": (put("layers", 0, "recall", ["0.9", "0.95", "1"]), r"layers\.0\.recall\.0"),
    "recall above one": (put("layers", 0, "recall", [0.5, 0.9, 1.1]), r"layers\.0\.recall\.2"),
    "recall that falls": (put("layers", 0, "recall", [0.9, 0.8, 1.0]), "the recall of layer 0 is not 3 rising values"),
    "recall too short": (put("layers", 0, "recall", [0.9, 1.0]), "the recall of layer 0 is not 3 rising values"),
    "default vectors a dict": (put("default_vectors", {}), "default_vectors: input should be a valid list"),
    "default vectors twice": (put("default_vectors", [0, 1, 2, 2]), "default_vectors names a layer twice"),
    "default vectors with a path": (put("default_vectors", 0, "../0"), r"default_vectors\.0"),
    "default vectors of no layer": (put("default_vectors", 0, 9), "default_vectors names layer 9"),
    "default vectors that are not there": (put("default_vectors", [0, 1, 2, 3]), r"lacks the tensor default_vectors\.3"),
    "default vectors left out": (put("default_vectors", [0, 1]), r"holds the tensor 'default_vectors\.2', which"),
    "provenance a list": (put("provenance", []), "provenance: input should be a valid dictionary"),
    "a command that is a number": (put("provenance", "commands", "fit", 1), r"provenance\.commands\.fit"),
    "a command that steers the terminal": (put("provenance", "commands", "fit", "\x1b[2J"), r"commands\.fit"),
    "no checksum of the weights": (drop("weights_xxh3"), "config.json is not what was exported: its checksum is another"),
    "a lone surrogate": (put("model", "name", "\ud800"), r"model\.name"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_can_not_be_so_is_refused_by_field(folder: Path, name: str) -> None:
    edit, expected = CONFIGS[name]
    change(folder, edit)
    message = refusal(folder)
    assert re.search(expected, message), message


def test_values_that_were_changed_by_no_one_are_refused(folder: Path) -> None:
    """They are possible, so only the checksums tell."""
    config, weights = (folder / CONFIG).read_text(), (folder / WEIGHTS).read_bytes()
    (folder / CONFIG).write_text(config.replace('"tokens": 8000', '"tokens": 8001'))
    assert "config.json is not what was exported" in refusal(folder)
    (folder / CONFIG).write_text(json.dumps(json.loads(config), indent=7).replace("\n", "\r\n"))  # the same values
    load_predictors(folder)
    (folder / WEIGHTS).write_bytes(weights[:-2] + bytes([weights[-2] ^ 1]) + weights[-1:])
    assert "predictors.safetensors is not what was exported" in refusal(folder)


def header(raw: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(head: dict[str, Any] | bytes, body: bytes) -> bytes:
    written = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(written)) + written + body


def in_header(edit: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    def edited(raw: bytes) -> bytes:
        head, body = header(raw)
        edit(head)
        return with_header(head, body)

    return edited


def in_tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[bytes], bytes]:
    def edited(raw: bytes) -> bytes:
        tensors = load(raw)
        edit(tensors)
        return save(tensors)

    return edited


def renamed(old: str, new: str) -> Callable[[Any], None]:
    return lambda head: head.update({new: head.pop(old)})


NAME = "layers.2.w1"
FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "is missing or broken"),
    "cut in the header's length": (lambda raw: raw[:5], "is missing or broken"),
    "cut in the header": (lambda raw: raw[:200], "is missing or broken"),
    "cut in the weights": (lambda raw: raw[:-1], "is missing or broken"),
    "longer than its header says": (lambda raw: raw + b"x", "is missing or broken"),
    "a header beyond the file": (lambda raw: struct.pack("<Q", len(raw)) + raw[8:], "is missing or broken"),
    "a header of exabytes": (lambda raw: b"\xff" * 8 + raw[8:], "header has 18,446,744,073,709,551,615 bytes"),
    "a header of megabytes": (
        lambda raw: with_header(json.dumps(header(raw)[0]).encode() + b" " * MOST_BYTES, header(raw)[1]),
        r"its header has 4,\d\d\d,\d\d\d bytes",
    ),
    "a header that is a list": (lambda raw: with_header(b"[]", header(raw)[1]), "is missing or broken"),
    "a header a hundred thousand lists deep": (lambda _: with_header(b"[" * 100_000, b""), "is missing or broken"),
    "a header that is no text": (lambda raw: with_header(b"\xff{}", header(raw)[1]), "is missing or broken"),
    "a pickle": (lambda _: b"\x80\x04\x95" + b"\x00" * 100, "header has"),
    "float64": (in_tensors(lambda t: t.update({NAME: t[NAME].double()})), r"layers\.2\.w1 is F64 of shape \[32, 32\]"),
    "integers": (in_tensors(lambda t: t.update({NAME: t[NAME].int()})), r"layers\.2\.w1 is I32 of shape"),
    "float8": (in_tensors(lambda t: t.update({NAME: t[NAME].to(torch.float8_e4m3fn)})), r"layers\.2\.w1 is F8_E4M3 of"),
    "another shape": (in_tensors(lambda t: t.update({NAME: t[NAME][:, 1:].clone()})), r"of shape \[32, 31\], and should"),
    "another rank": (in_tensors(lambda t: t.update({NAME: t[NAME][None]})), r"of shape \[1, 32, 32\], and should"),
    "a thousand dimensions": (in_header(lambda h: h[NAME].update(shape=[1] * 1000 + [32, 32])), "layers.2.w1 is F32 of"),
    "a shape that overflows": (in_header(lambda h: h[NAME].update(shape=[1 << 62, 8])), "is missing or broken"),
    "a dtype that is none": (in_header(lambda h: h[NAME].update(dtype="PICKLE")), "is missing or broken"),
    "offsets elsewhere": (in_header(lambda h: h[NAME].update(data_offsets=[0, 4096])), "is missing or broken"),
    "offsets that are negative": (in_header(lambda h: h[NAME].update(data_offsets=[-1, 4095])), "is missing or broken"),
    "NaN": (in_tensors(lambda t: t[NAME][3, 4].fill_(float("nan"))), r"layers\.2\.w1 holds values that are not finite"),
    "infinity": (in_tensors(lambda t: t["layers.0.b2"][0].fill_(float("-inf"))), r"layers\.0\.b2 holds values that are"),
    "NaN in bf16": (
        in_tensors(lambda t: t.update({NAME: torch.full_like(t[NAME], float("nan")).bfloat16()})), "not finite",
    ),
    "NaN default vectors": (
        in_tensors(lambda t: t["default_vectors.1"][0, 0].fill_(float("nan"))), r"default_vectors\.1 holds",
    ),
    "a tensor missing": (in_tensors(lambda t: t.pop(NAME)), r"lacks the tensor layers\.2\.w1"),
    "a layer missing": (in_tensors(lambda t: [t.pop(n) for n in list(t) if n[:9] == "layers.2."]), r"layers\.2\.b1"),
    "a tensor more": (in_tensors(lambda t: t.update(extra=torch.ones(1))), "holds the tensor 'extra', which"),
    "an empty tensor more": (in_tensors(lambda t: t.update({"layers.9.w1": torch.ones(0)})), r"holds the tensor 'layers\.9"),
    "a path for a name": (in_header(renamed(NAME, "../../../x")), r"lacks the tensor layers\.2\.w1"),
    "a path beside the names": (in_tensors(lambda t: t.update({"../x": torch.ones(1)})), "holds the tensor '../x', which"),
    "a name to fear": (in_tensors(lambda t: t.update({f"\x1b[2J\n{LONG}": torch.ones(1)})), "which config.json does not"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_weights_that_are_not_as_promised_are_refused(folder: Path, name: str) -> None:
    edit, expected = FILES[name]
    (folder / WEIGHTS).write_bytes(edit((folder / WEIGHTS).read_bytes()))
    change(folder, lambda config: config)
    message = refusal(folder)
    assert re.search(expected, message), message


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("kind", ["missing", "a folder", "a pipe", "endless", "a link to nothing", "not to be read"])
def test_what_is_no_plain_file_is_refused_and_not_waited_for(folder: Path, name: str, kind: str) -> None:
    file = folder / name
    content = file.read_bytes()
    file.unlink()
    if kind == "a folder":
        file.mkdir()
    elif kind == "a pipe":
        os.mkfifo(file)
    elif kind == "endless":
        file.symlink_to("/dev/zero")
    elif kind == "a link to nothing":
        file.symlink_to(folder / "nothing")
    elif kind == "not to be read":
        file.write_bytes(content)
        file.chmod(0)
        if os.access(file, os.R_OK):
            pytest.skip("root reads everything")
    assert re.search("holds no predictors" if name == CONFIG else "is missing or broken", refusal(folder))


def test_a_config_of_many_megabytes_is_not_read(folder: Path) -> None:
    with (folder / CONFIG).open("ab") as file:
        file.truncate(1 << 40)  # takes no disk, and would take all memory
    assert "config.json has more than 4,194,304 bytes" in refusal(folder)


def test_a_snapshot_of_the_hub_is_links_and_loads(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    for file in exported.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert_holds(tmp_path / "snapshot", json.loads((exported / CONFIG).read_text()), load_file(exported / WEIGHTS))


@pytest.mark.parametrize("name", ["", "nowhere/at/all", "../../nowhere", "a\0b", "x" * 5000, "/proc/nothing", "a b"])
def test_a_name_that_is_no_folder_is_one_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PredictorsError, match=r"there are no predictors at|holds no predictors"):
        load_predictors(name)


def assert_holds(folder: Path, config: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Loading `folder` gives exactly what the parsed config and the tensors say."""
    loaded = load_predictors(folder)
    assert loaded.model == config["model"]
    for layer, entry in zip(loaded.layers, config["layers"], strict=True):
        assert (layer.layer, layer.source) == (entry["layer"], entry.get("source", "nearest"))
        assert (layer.hit_rates, layer.recall) == (entry.get("hit_rate", {}), entry.get("recall", []))
        assert (0 if layer.mlp is None else layer.mlp.width) == entry["width"]
    assert loaded.provenance == config.get("provenance", {})
    assert (loaded.reuse is None) == (config.get("reuse") is None)
    if loaded.reuse is not None:
        _, *facts = loaded.reuse
        assert facts == [
            config["reuse"].get("layers"),
            config["reuse"].get("slots"),
            config["reuse"].get("hit_rates", {}),
        ]
    found = {f"default_vectors.{source}": vectors for source, vectors in loaded.default_vectors.items()}
    for layer, mlp in loaded.mlps.items():
        found |= {f"layers.{layer}.{name}": parameter for name, parameter in mlp.named_parameters()}
    if loaded.reuse is not None:
        found |= {f"reuse.{name}": parameter for name, parameter in loaded.reuse.predictors.named_parameters()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in tensors.items())


def loads_or_refuses(exported: Path, config: bytes | None = None, weights: bytes | None = None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = shutil.copytree(exported, Path(temporary) / "predictors")
        if config is not None:
            (folder / CONFIG).write_bytes(config)
        if weights is not None:
            (folder / WEIGHTS).write_bytes(weights)
        with contextlib.suppress(ValueError, RecursionError):
            change(folder, lambda config: config)
        try:
            load_predictors(folder)
        except PredictorsError:
            refusal(folder)
        else:
            assert_holds(folder, json.loads((folder / CONFIG).read_bytes()), load((folder / WEIGHTS).read_bytes()))


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.integers()
    | st.floats(0, 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(), max_size=20)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


def places(config: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to everything in a parsed JSON, itself left out."""
    inner = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    return [found for step, value in inner for found in ((*way, step), *places(value, (*way, step)))]


@given(data=st.data())
def test_any_change_of_the_config_loads_or_is_refused(exported: Path, data: st.DataObject) -> None:
    config = json.loads((exported / CONFIG).read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(places(config)))
        inside = config
        for step in way:
            inside = inside[step]
        how = data.draw(st.sampled_from(["replace", "replace", "remove", "double", "add"]))
        if how == "replace":
            inside[last] = data.draw(values)
        elif how == "remove":
            del inside[last]
        elif how == "double" and isinstance(inside, list):
            inside.append(copy.deepcopy(inside[last]))
        elif isinstance(inside, dict):
            inside[data.draw(st.text(max_size=8))] = data.draw(values)
    # A fingerprint that is right, so that the checks behind it are reached.
    with contextlib.suppress(KeyError, TypeError):
        config["model"]["fingerprint"] = fingerprint(config["model"])
    loads_or_refuses(exported, config=json.dumps(config).encode())


@given(data=st.data())
def test_any_damage_of_the_weights_loads_what_is_there_or_is_refused(exported: Path, data: st.DataObject) -> None:
    raw = bytearray((exported / WEIGHTS).read_bytes())
    in_head = st.integers(0, 8 + struct.unpack("<Q", raw[:8])[0])
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(in_head | st.integers(0, len(raw) - 1))
        raw[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        raw = raw[: data.draw(in_head | st.integers(0, len(raw)))]
    loads_or_refuses(exported, weights=bytes(raw))


@given(junk=st.binary(max_size=300) | st.text(st.sampled_from('{}[]",:0truefalsnl'), max_size=60).map(str.encode))
def test_junk_is_refused(exported: Path, junk: bytes) -> None:
    for damage in ({"config": junk}, {"weights": junk}):
        loads_or_refuses(exported, **damage)
