from __future__ import annotations

import errno
import json
import pickle
import shutil
from copy import copy as shallow_copy
from pathlib import Path

import pytest
import torch
from predict_train.data_collection import writer as writer_module
from predict_train.data_collection.examples import make_batch
from predict_train.data_collection.manifest import MANIFEST, TraceError
from predict_train.data_collection.trace import Trace
from predict_train.data_collection.writer import TraceWriter
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.files import sealed
from predict_train.predictors.routing import Routing
from predict_train.predictors.speculation import Speculator, wire
from safetensors.torch import load_file


@pytest.fixture
def copy(collected: Path, tmp_path: Path) -> Path:
    """A copy of the collected trace that a test may break."""
    return shutil.copytree(collected, tmp_path / "copy")


def edit_manifest(trace: Path, **changes: object) -> None:
    file = trace / MANIFEST
    file.write_text(json.dumps(sealed(json.loads(file.read_text()) | changes)))


def test_what_is_written_is_what_the_manifest_says(collected):
    trace = Trace.open(collected)
    trace.verify()
    assert len(trace.manifest.shards) > 2
    assert trace.rows == trace.manifest.tokens == 8000
    assert trace.sources == {0: None, 1: 0, 2: 1, 3: 2}
    files = {"manifest.json", "config.json", "speculation.safetensors", *(s.file for s in trace.manifest.shards)}
    assert {file.name for file in collected.iterdir()} == files
    sequence = torch.cat([trace.column(i, "sequence") for i in range(len(trace.manifest.shards))])
    position = torch.cat([trace.column(i, "position") for i in range(len(trace.manifest.shards))])
    assert torch.equal(sequence, torch.arange(80).repeat_interleave(100).int())
    assert torch.equal(position, torch.arange(100).repeat(80).int())


def test_a_shard_costs_its_payload(collected):
    # The first layer's input, three sources' residuals, four layers' logits, ids and weights, three numbers a row.
    payload = 4 * 32 * 2 + 4 * (8 * 2 + 2 * 2 + 2 * 2) + 3 * 4
    for shard in Trace.open(collected).manifest.shards:
        assert shard.rows * payload < shard.bytes < 1.05 * shard.rows * payload


def test_speculators_need_no_model_and_are_the_models_own(collected, tiny_moe):
    trace = Trace.open(collected)
    layers, rebuilt = find_moe_layers(tiny_moe), trace.wirings()
    own = wire(layers, trace.sources, trace.default_vectors())
    x = torch.randn(50, 32)
    with torch.no_grad():
        for layer in layers:
            routing = None if trace.sources[layer.index] is None else Routing(*layer.router(x))
            expected, actual = (Speculator(wirings[layer.index])(x, routing) for wirings in (own, rebuilt))
            assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_batches_are_what_the_runtime_would_compute(collected, tiny_moe):
    trace = Trace.open(collected)
    rows = torch.tensor([0, 3, 150])
    batch = make_batch(trace.read(0, rows), trace.sources, trace.stacked())
    shard = load_file(collected / trace.manifest.shards[0].file)
    vectors = trace.default_vectors()
    layers = {layer.index: layer for layer in find_moe_layers(tiny_moe)}
    with torch.no_grad():
        for number, (target, source) in enumerate(trace.sources.items()):
            if source is None:
                quasi = normed = shard[f"layers.{target}.input"][rows].float()
            else:
                normed = shard[f"layers.{source}.residual"][rows].float()
                weights = shard[f"layers.{source}.expert_weights"][rows].float()
                ids = shard[f"layers.{source}.expert_ids"][rows].long()
                quasi = normed + (weights.unsqueeze(-1) * vectors[source][ids]).sum(1)
            torch.testing.assert_close(batch.quasi[number], layers[target].norm(quasi))
            torch.testing.assert_close(batch.normed[number], layers[target].norm(normed))
            assert torch.equal(batch.ids[number], shard[f"layers.{target}.expert_ids"][rows].long())
            assert torch.equal(batch.logits[number], shard[f"layers.{target}.router_logits"][rows].float())


def test_the_sample_is_spread_over_all_shards(collected):
    trace = Trace.open(collected)
    parts = list(trace.sample(400))
    assert len(parts) == len(trace.manifest.shards)
    assert 350 < sum(len(part["layers.0.expert_ids"]) for part in parts) < 450


def test_a_truncated_shard_is_refused_by_name(copy):
    shard = copy / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(TraceError, match=r"shard-00001\.safetensors is broken"):
        Trace.open(copy)


def test_a_missing_shard_is_refused_by_name(copy):
    (copy / "shard-00001.safetensors").unlink()
    with pytest.raises(TraceError, match=r"shard-00001\.safetensors is missing"):
        Trace.open(copy)


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "speculation.safetensors"])
@pytest.mark.parametrize("position", [10, -10])
def test_a_flipped_byte_is_refused_by_name(copy, name, position):
    content = bytearray((copy / name).read_bytes())
    content[position] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(TraceError, match=name):
        Trace.open(copy).verify()


def test_a_trace_without_a_manifest_is_unfinished(copy):
    (copy / MANIFEST).unlink()
    with pytest.raises(TraceError, match="unfinished trace"):
        Trace.open(copy)


def test_folders_that_are_no_traces_are_refused(tmp_path):
    with pytest.raises(TraceError, match="there is no trace at"):
        Trace.open(tmp_path / "nowhere")
    with pytest.raises(TraceError, match="holds no trace"):
        Trace.open(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, "format version 1, and this release reads 2 to 4"),
        ({"tokens": "many"}, "tokens: input should be a valid integer"),
        ({"shards": []}, "shards: list should have at least 1 item"),
        ({"extra": 1}, "extra: extra inputs are not permitted"),
    ],
)
def test_a_wrong_manifest_is_refused_by_field(copy, changes, message):
    edit_manifest(copy, **changes)
    with pytest.raises(TraceError, match=message):
        Trace.open(copy)


def test_a_trace_of_an_older_release_is_read(copy, collected):
    file = copy / MANIFEST
    content = json.loads(file.read_text())
    for name in ("checksum", "config_xxh3", "origin"):
        del content[name]
    file.write_text(json.dumps(content))
    with pytest.raises(TraceError, match="not what collect wrote: its checksum is another"):
        Trace.open(copy)  # the file of a release that writes checksums has one
    file.write_text(json.dumps(content | {"format_version": 2}))
    older, now = Trace.open(copy), Trace.open(collected)
    older.verify()
    assert older.wirings().keys() == now.wirings().keys()
    assert torch.equal(older.column(0, "layers.1.residual"), now.column(0, "layers.1.residual"))


def test_what_a_reader_has_compared_it_does_not_compare_again(copy):
    """Data loaders map shards again and again, each in its own process."""
    trace = Trace.open(copy)
    trace.column(1, "token_ids")
    shard = copy / trace.manifest.shards[1].file
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    trace.unmap()
    for same in (trace, shallow_copy(trace), pickle.loads(pickle.dumps(trace))):
        assert same.column(1, "token_ids").dtype == torch.int32
    with pytest.raises(TraceError, match=shard.name):
        Trace.open(copy).column(1, "token_ids")


def test_a_manifest_that_names_a_file_elsewhere_is_refused(copy):
    shards = json.loads((copy / MANIFEST).read_text())["shards"]
    shards[0]["file"] = "../shard-00000.safetensors"
    edit_manifest(copy, shards=shards)
    with pytest.raises(TraceError, match=r"shards\.0\.file"):
        Trace.open(copy)


def test_a_manifest_that_promises_another_shape_is_refused(copy):
    model = json.loads((copy / MANIFEST).read_text())["model"]
    edit_manifest(copy, model=model | {"hidden_size": 64})
    with pytest.raises(TraceError, match=r"shard-00000\.safetensors lacks layers\.0\.input"):
        Trace.open(copy).verify()


def write(path: Path, batches: int) -> None:
    with TraceWriter(path, shard_bytes=400) as out:
        for _ in range(batches):
            out.append({"token_ids": torch.zeros(100, dtype=torch.int32)})
        out.flush()


@pytest.mark.parametrize("batches", [1, 10])
def test_a_full_disk_is_one_sentence_with_a_way_on(tmp_path, monkeypatch, batches):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer_module, "write_columns", full)
    with pytest.raises(TraceError, match=r"can't be written .*No space left.*--resume"):
        write(tmp_path / "trace", batches)
    assert not list((tmp_path / "trace").iterdir())
