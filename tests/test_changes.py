"""One random change to a file of ours: flipped bits, a cut, an insertion. Reading it gives what was there, or one sentence.

CHANGES=1000 python -m pytest tests/test_changes.py -s -o timeout=0     tries so many of each kind, and prints what became of them
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from predict_train.data_collection.columns import column_shapes
from predict_train.data_collection.trace import Trace
from predict_train.predictors.checkpoint import load_predictors
from predict_train.predictors.errors import UserError
from predict_train.runtime import load_experts, load_offloaded
from predict_train.runtime.pack import pack
from predict_train.runtime.packfile import read_header
from predict_train.train.export import export
from predict_train.train.fit import read_run
from predict_train.train.inspection import inspect
from predict_train.train.settings import ExportConfig
from rich.console import Console
from test_gguf import MIXED, made
from test_gguf import write as write_gguf
from test_shipped import write_mxfp4
from transformers import PreTrainedModel

CHANGES = int(os.environ.get("CHANGES", "20"))
ENDS = 4096
"""Half of the changes are within so many bytes of a file's ends, where the headers are."""
Read = Callable[[Path], dict[str, Any]]


def changed(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """What was done, and the content with one change."""
    size = len(content)
    near = min(size, ENDS)
    place = chance.choice((chance.randrange(near), size - 1 - chance.randrange(near), *[chance.randrange(size)] * 2))
    how = chance.choice(("flip", "flip", "cut", "end", "insert", "replace"))
    before, after = content[:place], content[place:]
    count = chance.choice((1, 1, chance.randint(1, 64)))
    if how == "flip":
        return f"flip {place}", before + bytes([after[0] ^ 1 << chance.randrange(8)]) + after[1:]
    if how == "end":
        return f"end at {place}", before
    new = chance.choice((chance.randbytes(count), bytes(count), content[:count], b" " * count))
    if how == "insert":
        return f"insert {new!r} at {place}", before + new + after
    return f"{how} {count} at {place}", before + (new if how == "replace" else b"") + after[count:]


def facts(folder: Path) -> dict[str, Any]:
    """What `inspect` tells, but for where it is and how many bytes it has."""
    return {name: value for name, value in inspect(folder).items() if name not in ("path", "bytes")}


def read_export(folder: Path) -> dict[str, Any]:
    loaded = load_predictors(folder)
    tensors = {f"{target}.{n}": p for target, mlp in loaded.mlps.items() for n, p in mlp.named_parameters()}
    return facts(folder) | {
        "layers": loaded.training_free().layers,
        "tensors": tensors | {str(source): vectors for source, vectors in loaded.default_vectors.items()},
    }


def read_trace(folder: Path) -> dict[str, Any]:
    trace = Trace.open(folder)
    parts = {
        f"{t}.{n}": p for t, w in trace.wirings().items() for n, p in torch.nn.ModuleList(w.modules).named_parameters()
    }
    names, shards = column_shapes(trace.manifest), range(len(trace.manifest.shards))
    columns = {f"{name}.{shard}": trace.column(shard, name) for name in names for shard in shards}
    return facts(folder) | {
        "manifest": trace.manifest.model_dump(),
        "tensors": parts | columns | {str(source): vectors for source, vectors in trace.default_vectors().items()},
    }


def read_run_of_fit(folder: Path) -> dict[str, Any]:
    out = folder.with_name("out")
    shutil.rmtree(out, ignore_errors=True)
    exported = read_export(export(ExportConfig(run=folder, out=out), Console(quiet=True)))
    return {**exported, "run": read_run(folder), **{f"run {k}": v for k, v in facts(folder).items() if k != "epochs"}}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, tiny_moe_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "pack"
    folder.mkdir()
    pack(tiny_moe_folder, folder / "experts")
    return folder


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, tiny_moe_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "quantized"
    folder.mkdir()
    pack(tiny_moe_folder, folder / "experts", quantize="int8")
    return folder


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "shipped"
    folder.mkdir()
    pack(write_mxfp4(folder.with_name("gpt_oss")), folder / "experts")
    return folder


@pytest.fixture(scope="module")
def in_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "in_gguf"
    folder.mkdir()
    write_gguf(made("qwen3_moe"), folder.with_name("model"), MIXED)
    pack(folder.with_name("model"), folder / "experts", gguf="model.gguf")
    return folder


def pack_reader(model: Path, **settings: Any) -> Read:
    def read(folder: Path) -> dict[str, Any]:
        loaded: PreTrainedModel = load_offloaded(
            model, device="cpu", policy="on_demand", pack=folder / "experts", **settings
        )
        logits = loaded(torch.arange(1, 40)[None]).logits
        loaded.expert_offload.detach()
        load_experts(loaded)
        return {"header": read_header(folder / "experts"), "tensors": loaded.state_dict() | {"logits": logits}}

    return read


def assert_same(found: dict[str, Any], expected: dict[str, Any], change: str) -> None:
    tensors, others = found.pop("tensors"), {k: v for k, v in expected.items() if k != "tensors"}
    assert found == others, change
    assert tensors.keys() == expected["tensors"].keys(), change
    for name, tensor in expected["tensors"].items():
        assert tensors[name].dtype == tensor.dtype, (change, name)
        assert torch.equal(tensors[name], tensor), (change, name)


@pytest.mark.parametrize("kind", ["exported", "collected", "fitted", "packed", "quantized", "shipped", "in_gguf"])
def test_no_change_goes_by_in_silence(
    kind: str, request: pytest.FixtureRequest, tiny_moe_folder: Path, tmp_path: Path
) -> None:
    original: Path = request.getfixturevalue(kind)
    readers: dict[str, Read] = {"exported": read_export, "collected": read_trace, "fitted": read_run_of_fit}
    others = {"shipped": pack_reader(original.with_name("gpt_oss"))}
    others["in_gguf"] = pack_reader(original.with_name("model"), gguf="model.gguf")
    read = readers.get(kind) or others.get(kind) or pack_reader(tiny_moe_folder)
    folder = shutil.copytree(original, tmp_path / "copy")
    expected = read(folder)
    # A model card is for people, and TensorBoard's logs and the last checkpoint are not exported.
    unread = ("README.md", "last.ckpt")
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name not in unread and "tfevents" not in f.name)
    if kind == "fitted":
        files = [f for f in files if f.suffix == ".json" or f == folder / expected["run checkpoint"]]
    outcomes: Counter[str] = Counter()
    for number in range(CHANGES):
        chance = random.Random(f"{kind} {number}")
        file = chance.choice(files)
        content = file.read_bytes()
        how, new = changed(content, chance)
        change = f"{kind} {number}: {file.name}, {how}"
        if new == content:
            continue
        file.write_bytes(new)
        try:
            found = read(folder)
        except UserError as error:
            message = str(error)
            assert message.isprintable(), (change, message)
            assert len(message) < 1000, (change, message)
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{change}: a traceback") from error
        else:
            assert_same(found, dict(expected), change)
            outcomes["the same values"] += 1
        file.write_bytes(content)
    print(f"\n{kind}: {sum(outcomes.values())} changes, {dict(outcomes)}, 0 silent")
    assert outcomes["refused"] > 0.8 * sum(outcomes.values())
