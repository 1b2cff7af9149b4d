"""The packed file: every weight of every expert, and one sentence for whatever can be wrong with it."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_model
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.errors import UserError
from predict_train.runtime import offload_experts
from predict_train.runtime.errors import StoreError
from predict_train.runtime.formats import PAGE
from predict_train.runtime.pack import pack, pack_random
from predict_train.runtime.packfile import PackedStore, read_header
from predict_train.runtime.store import empty_blocks
from transformers import AutoModelForCausalLM, PreTrainedModel

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, tiny_moe_folder: Path) -> Path:
    """The tiny model's experts in fp32. Don't write to it."""
    return pack(tiny_moe_folder, tmp_path_factory.mktemp("packs") / "tiny.experts")


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pack_holds_every_weight(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Checkpoints as `save_pretrained` writes them: one tensor an expert, or stacked, with biases and transposed."""
    build_model(architecture).save_pretrained(tmp_path / "model")
    file = pack(tmp_path / "model", tmp_path / "experts", dtype)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    layers = find_moe_layers(whole)
    store = PackedStore(file)
    store.check(whole, layers)
    assert {place.dtype for place in store.format.places.values()} == {dtype}
    assert read_header(file).model["fingerprint"]
    (slot,) = empty_blocks(1, store.format.bytes, torch.device("cpu"))
    for number, layer in enumerate(layers):
        for expert in range(layer.num_experts):
            store.read(number, expert, slot.numpy())
            for name, part in store.format.views(slot).items():
                assert torch.equal(part, getattr(layer.experts, name)[expert])
    store.close()
    assert os.listdir(tmp_path) == ["model", "experts"] or sorted(os.listdir(tmp_path)) == ["experts", "model"]


def test_reads_are_direct_or_at_least_right(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file system has no direct reads, the same bytes come through its cache."""
    store = PackedStore(packed)
    first, second = empty_blocks(2, store.format.bytes, torch.device("cpu"))
    store.read(3, 5, first.numpy())
    store.close()
    plain, opened = os.open, []

    def no_direct(path: Any, flags: int, *rest: Any) -> int:
        opened.append(flags)
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return plain(path, flags, *rest)

    monkeypatch.setattr(os, "open", no_direct)
    buffered = PackedStore(packed)
    assert not buffered.direct
    assert len(opened) == 2
    buffered.read(3, 5, second.numpy())
    buffered.close()
    assert torch.equal(first, second)


def test_a_read_that_is_cut_short_goes_on(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PackedStore(packed)
    first, second = empty_blocks(2, store.format.bytes, torch.device("cpu"))
    store.read(1, 2, first.numpy())
    plain = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, into, offset: plain(file, [into[0][:PAGE]], offset))
    store.read(1, 2, second.numpy())
    store.close()
    assert torch.equal(first, second)


def test_a_model_that_is_packed_gives_the_same_tokens(packed: Path, tiny_moe: PreTrainedModel) -> None:
    ids = torch.randint(1, 256, (2, 40))
    offload_experts(tiny_moe, policy="on_demand", slots=5)
    expected = tiny_moe(ids).logits
    tiny_moe.expert_offload.detach()
    offload_experts(tiny_moe, policy="prefetch", slots=5, store=packed)
    assert torch.equal(tiny_moe(ids).logits, expected)
    tiny_moe.expert_offload.detach()
    offload_experts(tiny_moe, policy="prefetch", slots=5, store=PackedStore(packed))
    assert torch.equal(tiny_moe(ids).logits, expected)


def test_the_pack_of_another_model_is_refused(packed: Path, tiny_moe: PreTrainedModel) -> None:
    cases: list[tuple[PreTrainedModel, str]] = [
        (build_model("mixtral"), "the model is a mixtral with 4 layers"),
        (build_model("qwen3_moe").to(torch.bfloat16), "in torch.float32, and the model's are in torch.bfloat16"),
        (tiny_moe, "other weights are not those of this model"),
    ]
    with torch.no_grad():
        tiny_moe.model.layers[1].self_attn.q_proj.weight[0, 0] += 1  # as a fine-tuned model's differ
    for model, words in cases:
        with pytest.raises(StoreError, match=words):
            offload_experts(model, store=packed)
        assert not hasattr(model, "expert_offload")


def break_header(data: bytes, change: Any) -> bytes:
    magic, version, offset, length = struct.unpack_from("<8sQQQ", data)
    header = json.loads(data[offset : offset + length])
    text = json.dumps(change(header)).encode()
    return struct.pack("<8sQQQ", magic, version, offset, len(text)) + data[32:offset] + text


BROKEN: list[tuple[str, Any, str]] = [
    ("empty", lambda _: b"", "no packed file"),
    ("another file", lambda _: b"PK" * 4000, "no packed file"),
    ("cut in the blocks", lambda data: data[: len(data) // 2], "cut short"),
    ("cut in the header", lambda data: data[:-1], "cut short"),
    ("longer", lambda data: data + b"\0", "was added to"),
    ("of the future", lambda data: data[:8] + b"\x63" + data[9:], "format version 99, and this release reads 1"),
    ("not JSON", lambda data: data[:-2] + b"\xff\xff", "header of .* is broken"),
    ("a list", lambda data: break_header(data, lambda h: [h]), "header of .* is broken"),
    ("without layers", lambda data: break_header(data, lambda h: h | {"layers": None}), "layers"),
    ("a number as text", lambda data: break_header(data, lambda h: h | {"num_experts": "8"}), "num_experts"),
    ("fewer experts", lambda data: break_header(data, lambda h: h | {"num_experts": 7}), "one checksum a block"),
    ("an odd size", lambda data: break_header(data, lambda h: h | {"block_bytes": 100}), "block_bytes"),
    ("too large a size", lambda data: break_header(data, lambda h: h | {"block_bytes": 1 << 40}), "blocks are not as many"),
    ("no such dtype", lambda data: break_header(data, lambda h: h | {"dtype": "nn"}), "nn is no dtype"),
    (
        "a tensor beyond",
        lambda data: break_header(data, lambda h: h | {"tensors": {"down_proj": {"shape": [1 << 40], "offset": 0}}}),
        "beyond its block",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_broken_pack_is_refused_in_a_sentence(packed: Path, change: Any, words: str, tmp_path: Path) -> None:
    file = tmp_path / "broken"
    file.write_bytes(change(packed.read_bytes()))
    with pytest.raises(StoreError, match=words) as caught:
        PackedStore(file)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value), "it says what to do"


def test_a_block_that_rotted_is_noticed(packed: Path, tmp_path: Path) -> None:
    data = bytearray(packed.read_bytes())
    size = read_header(packed).block_bytes
    data[PAGE + 11 * size + 100] ^= 1  # the fourth expert of the second layer
    (tmp_path / "rotten").write_bytes(data)
    store = PackedStore(tmp_path / "rotten")
    (slot,) = empty_blocks(1, store.format.bytes, torch.device("cpu"))
    store.read(1, 2, slot.numpy())
    for _ in range(2):
        with pytest.raises(StoreError, match=r"expert 3 of model\.layers\.1\.mlp\.experts .* not what was packed"):
            store.read(1, 3, slot.numpy())
    store.close()


def test_packing_leaves_nothing_behind_when_it_fails(
    tiny_moe_folder: Path, dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "experts"
    with pytest.raises(UserError, match="mixture-of-experts"):
        pack(dense_folder, out)
    with pytest.raises(UserError, match="no model at"):
        pack(tmp_path / "nowhere" / "at" / "all", out)
    monkeypatch.setattr(os, "fdatasync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StoreError, match="No space left on device"):
        pack(tiny_moe_folder, out)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    out.write_text("something else")
    with pytest.raises(StoreError, match="exists already"):
        pack(tiny_moe_folder, out)
    assert out.read_text() == "something else"


def test_a_checkpoint_without_some_experts_is_refused(tiny_moe: PreTrainedModel, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in tiny_moe.state_dict().items() if "layers.2.mlp.experts" not in name}
    tiny_moe.save_pretrained(tmp_path / "model", state_dict=state)
    with pytest.raises(UserError, match=r"lacks model\.layers\.2\.mlp\.experts\.down_proj and 1 more"):
        pack(tmp_path / "model", tmp_path / "experts")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_random_packs_are_drawn_from_their_seed(tiny_moe: PreTrainedModel, tmp_path: Path) -> None:
    files = [pack_random(tiny_moe.config, tmp_path / str(i), torch.bfloat16, seed) for i, seed in enumerate((1, 1, 2))]
    first, second, third = (read_header(file) for file in files)
    assert first.dtype == "bfloat16"
    assert first.checksums == second.checksums
    assert first.model == second.model
    checksums = np.array(first.checksums + third.checksums, dtype=np.uint64)
    assert len(np.unique(checksums)) == checksums.size, "no two experts are alike"
    assert first.model["weights"] != third.model["weights"]
