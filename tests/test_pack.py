"""The packed file: every weight of every expert, and one sentence for whatever can be wrong with it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from alone import exit_code
from conftest import build_model, save_model
from predict_train.predictors import weights
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.errors import UserError
from predict_train.predictors.weights import checkpoint_fingerprint
from predict_train.runtime import load_experts, load_offloaded, offload_experts
from predict_train.runtime import pack as packing
from predict_train.runtime.errors import StoreError
from predict_train.runtime.formats import PAGE
from predict_train.runtime.gatherer import Gathered
from predict_train.runtime.pack import pack, pack_random
from predict_train.runtime.packfile import PackedStore, read_header
from predict_train.runtime.packwriter import PackWriter
from predict_train.runtime.store import empty_blocks
from transformers import AutoModelForCausalLM, PreTrainedModel

from predict_train.running import load_to_evaluate
from predict_train.settings import EvaluateConfig

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


def other(model: PreTrainedModel, change: Callable[[torch.nn.Module], None]) -> PreTrainedModel:
    """The model with the experts of its third layer changed, and nothing else."""
    with torch.no_grad():
        change(find_moe_layers(model)[2].experts)
    return model


OTHERS: list[Callable[[Any], Any]] = [
    lambda experts: experts.down_proj[5].add_(1e-3),  # one expert, as expert-specialised fine-tuning changes it
    lambda experts: experts.gate_up_proj[1, 16:].add_(torch.full((16, 1), 1e-3) @ torch.ones(1, 32)),  # LoRA, up only
    lambda experts: experts.down_proj[:2].copy_(experts.down_proj[:2].flip(0)),
    lambda experts: [p.normal_() for p in experts.parameters()],
]


def test_a_pack_of_other_experts_of_the_same_shape_is_refused(
    packed: Path, tiny_moe_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Whether the model's experts are in memory, or are not loaded at all, or are those of another pack."""

    def fresh() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(tiny_moe_folder, dtype=torch.float32).eval()

    for number, change in enumerate(OTHERS):
        model = other(fresh(), change)
        with pytest.raises(
            StoreError, match=r"other experts than those of this model \(model\.layers\.2\.mlp\.experts\)"
        ):
            offload_experts(model, store=packed)
        folder = save_model(model, tokenizer, tmp_path / str(number))
        with pytest.raises(StoreError, match="with other weights files than those of"):
            load_offloaded(folder, device="cpu", pack=packed)
        with pytest.raises(StoreError, match="with other weights files"):
            load_to_evaluate(EvaluateConfig(model=str(folder), pack=packed, device="cpu"))
        for where in ({"pack": tmp_path / f"{number}.experts"}, {"quantize": "int8", "dtype": "float32"}):
            own = load_offloaded(folder, device="cpu", **where)
            own.expert_offload.detach()
            with pytest.raises(StoreError, match="other experts than those of this model"):
                offload_experts(own, store=packed)
            offload_experts(own, store=tmp_path / f"{number}.experts")
    # The same weights in another place, or in memory, are no others.
    load_offloaded(shutil.copytree(tiny_moe_folder, tmp_path / "copy"), device="cpu", pack=packed)
    offload_experts(fresh(), store=packed)
    assert checkpoint_fingerprint(tmp_path / "copy") == checkpoint_fingerprint(tiny_moe_folder) is not None


def test_a_large_checkpoint_is_told_by_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(40 * PAGE + 7)
    monkeypatch.setattr(weights, "MOST_PIECES", 21)

    def fingerprint(data: bytes) -> str | None:
        (tmp_path / "model.safetensors").write_bytes(data)
        return checkpoint_fingerprint(tmp_path)

    def flipped(place: int) -> bytes:
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]

    whole = fingerprint(content)
    seen = [fingerprint(flipped(page * PAGE + 5)) != whole for page in range(40)]
    assert seen == [True, False] * 20
    assert fingerprint(content + b"x") != whole
    assert fingerprint(content) == whole


def as_an_older_release_wrote_it(data: bytes) -> bytes:
    """Without samples, the checkpoint and the header's checksum."""
    return rewritten(data, lambda h: {k: v for k, v in h.items() if k not in ("samples", "checkpoint")}, sealed=False)


def test_a_pack_of_an_older_release_is_used_with_a_warning(packed: Path, tiny_moe_folder: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    older.write_bytes(as_an_older_release_wrote_it(packed.read_bytes()))
    ids = torch.randint(1, 256, (2, 12))
    whole = AutoModelForCausalLM.from_pretrained(tiny_moe_folder, dtype=torch.float32).eval()
    offload_experts(whole, policy="on_demand", store=packed)
    expected = whole(ids).logits
    whole.expert_offload.detach()
    with pytest.warns(UserWarning, match="does not say whose experts it holds") as told:
        offload_experts(whole, policy="on_demand", store=older)
    assert torch.equal(whole(ids).logits, expected)
    assert len(told) == 1
    with pytest.warns(UserWarning, match="does not say which checkpoint it was packed from") as told:
        model = load_offloaded(tiny_moe_folder, policy="on_demand", device="cpu", pack=older)
    assert torch.equal(model(ids).logits, expected)
    assert len(told) == 1


def rewritten(data: bytes, change: Any, sealed: bool = True) -> bytes:
    """A packed file with another header, and the checksum of that header."""
    magic, version, offset, length, _ = struct.unpack_from("<8sQQQQ", data)
    text = json.dumps(change(json.loads(data[offset : offset + length]))).encode()
    checksum = xxhash.xxh3_64_intdigest(text) if sealed else 0
    return struct.pack("<8sQQQQ", magic, version, offset, len(text), checksum) + data[40:offset] + text


BROKEN: list[tuple[str, Any, str]] = [
    ("empty", lambda _: b"", "no packed file"),
    ("another file", lambda _: b"PK" * 4000, "no packed file"),
    ("cut in the blocks", lambda data: data[: len(data) // 2], "cut short"),
    ("cut in the header", lambda data: data[:-1], "cut short"),
    ("longer", lambda data: data + b"\0", "was added to"),
    ("of the future", lambda data: data[:8] + b"\x63" + data[9:], "format version 99, and this release reads up to 3"),
    ("not JSON", lambda data: data[:-2] + b"\xff\xff", "header of .* is broken"),
    ("a list", lambda data: rewritten(data, lambda h: [h]), "header of .* is broken"),
    ("without layers", lambda data: rewritten(data, lambda h: h | {"layers": None}), "layers"),
    ("a number as text", lambda data: rewritten(data, lambda h: h | {"num_experts": "8"}), "num_experts"),
    ("fewer experts", lambda data: rewritten(data, lambda h: h | {"num_experts": 7}), "one checksum a block"),
    ("an odd size", lambda data: rewritten(data, lambda h: h | {"block_bytes": 100}), "block_bytes"),
    ("too large a size", lambda data: rewritten(data, lambda h: h | {"block_bytes": 1 << 40}), "blocks are not as many"),
    ("no such dtype", lambda data: rewritten(data, lambda h: h | {"dtype": "nn"}), "nn is no dtype"),
    ("fewer samples", lambda data: rewritten(data, lambda h: h | {"samples": h["samples"][1:]}), "one sample a layer"),
    ("another name", lambda data: data.replace(b'"name":"/', b'"name":"?'), "not what was written"),
    ("no checksum", lambda data: rewritten(data, dict, sealed=False), "not what was written"),
    ("a mark in the first page", lambda data: data[:100] + b"x" + data[101:], "not what was written"),
    (
        "a tensor beyond",
        lambda data: rewritten(data, lambda h: h | {"tensors": {"down_proj": {"shape": [1 << 40], "offset": 0}}}),
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


def test_on_a_full_disk_the_layers_that_are_packed_stay(
    tiny_moe_folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same call goes on after them, without writing them again."""
    out, original, synced = tmp_path / "experts", os.fdatasync, []

    def full(file: int, room: int) -> None:
        synced.append(file)
        if len(synced) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(file)

    monkeypatch.setattr(os, "fdatasync", lambda file: full(file, 2))
    with pytest.raises(
        StoreError, match=r"No space left .*; make room .* goes on after the 2 layers that are in .*\.partial"
    ):
        pack(tiny_moe_folder, out)
    assert not out.exists()
    synced.clear()
    monkeypatch.setattr(os, "fdatasync", lambda file: full(file, 100))
    pack(tiny_moe_folder, out)
    assert len(synced) == 2, "of four layers"
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes() == packed.read_bytes()


def test_what_a_killed_attempt_left_is_removed(tiny_moe_folder: Path, tmp_path: Path) -> None:
    """Not what another process still writes, and no other file."""
    out = tmp_path / "[x].experts"
    left, busy, other = (tmp_path / f"{name}.partial" for name in ("[x].experts.1", "[x].experts.2", "x.experts.3"))
    for file in (left, busy, other):
        file.write_bytes(b"half")
    with busy.open("rb") as writing:
        fcntl.flock(writing, fcntl.LOCK_EX)
        pack(tiny_moe_folder, out)
    assert {file.name for file in tmp_path.iterdir()} == {out.name, busy.name, other.name}


def test_a_relative_path_is_one_of_the_folder_where_it_was_given(
    tiny_moe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    ids = torch.randint(1, 256, (1, 9))
    for again in (False, True):
        model = load_offloaded(tiny_moe_folder, device="cpu", pack="experts")
        monkeypatch.chdir("elsewhere")
        expected = model(ids).logits
        model.expert_offload.detach()
        with pytest.raises(UserError, match=f"are in {tmp_path}/experts"):
            model(ids)
        offload_experts(model, device="cpu")
        assert torch.equal(model(ids).logits, expected)
        model.expert_offload.detach()
        load_experts(model)
        assert torch.equal(model(ids).logits, expected), again
        monkeypatch.chdir(tmp_path)


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


def pack_until_killed(folder: Path, out: Path, quantize: str | None, layers: int) -> None:
    """The job of a process, which is killed when it has written so many layers."""
    write = PackWriter._write

    def killed(self: PackWriter, gathered: Gathered) -> None:
        write(self, gathered)
        if len(self._modules) == layers:
            os.kill(os.getpid(), signal.SIGKILL)

    PackWriter._write = killed  # type: ignore[method-assign]
    pack(folder, out, quantize=quantize)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_killed_pack_is_gone_on_with(
    quantize: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forkserver: ForkServerContext
) -> None:
    """The file is the same byte for byte, and no layer is made twice. Other attempts don't go on with it."""
    folder = tmp_path / "model"
    build_model("qwen3_moe", num_hidden_layers=5).save_pretrained(folder)
    made: list[int] = []
    blocks = Gathered.blocks

    def counted(self: Gathered) -> torch.Tensor:
        made[-1] += 1
        return blocks(self)

    monkeypatch.setattr(Gathered, "blocks", counted)
    out = tmp_path / "experts.1"
    assert exit_code(forkserver, pack_until_killed, folder, out, quantize, 3) == -signal.SIGKILL
    made.append(0)
    expected = pack(folder, tmp_path / "experts", quantize=quantize).read_bytes()
    left = {file.name: file.read_bytes() for file in tmp_path.glob("experts.*")}
    assert {name.rpartition(".")[2] for name in left} == {"partial", "journal"}
    partial = next(tmp_path / name for name in left if name.endswith("partial"))
    for change in (
        lambda: None,
        lambda: os.truncate(partial, partial.stat().st_size - 1),  # the last layer is not whole
        lambda: partial.with_suffix(".journal").write_text("{"),
        lambda: os.truncate(partial.with_suffix(".journal"), 10),
    ):
        for name, content in left.items():
            (tmp_path / name).write_bytes(content)
        change()
        made.append(0)
        assert pack(folder, out, quantize=quantize).read_bytes() == expected
        out.unlink()
        assert not list(tmp_path.glob("experts.*"))
    assert made == [5, 2, 3, 5, 5]
    for name, content in left.items():
        (tmp_path / name).write_bytes(content)
    made.append(0)
    pack(folder, out, torch.bfloat16, quantize)
    assert made[-1] == 5
    assert not list(tmp_path.glob("experts.1.*"))


def test_two_packs_of_the_same_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a file of its own. The second is interrupted, and then tried again while the first is still at work."""
    folder, out = tmp_path / "model", tmp_path / "experts"
    build_model("qwen3_moe", num_hidden_layers=3).save_pretrained(folder)
    expected = pack(folder, tmp_path / "expected").read_bytes()
    blocks = Gathered.blocks

    def stops(_: Gathered) -> torch.Tensor:
        monkeypatch.setattr(Gathered, "blocks", blocks)
        raise KeyboardInterrupt

    def starts_another(self: Gathered) -> torch.Tensor:
        monkeypatch.setattr(Gathered, "blocks", stops)
        before = sorted(tmp_path.iterdir())
        assert len(before) == 3
        with ThreadPoolExecutor() as pool:
            assert isinstance(pool.submit(pack, folder, out).exception(), KeyboardInterrupt)
            assert sorted(tmp_path.iterdir()) == before
            assert pool.submit(pack, folder, out).result().read_bytes() == expected
        return blocks(self)

    monkeypatch.setattr(Gathered, "blocks", starts_another)
    assert pack(folder, out).read_bytes() == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == ["expected", "experts", "model"]


def test_a_file_says_which_checkpoint_it_was_packed_from_though_this_was_downloaded_while_it_was_packed(
    tiny_moe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([None])
    monkeypatch.setattr(packing, "local_folder", lambda name, _: next(answers, name))
    pack(tiny_moe_folder, tmp_path / "experts")
    assert read_header(tmp_path / "experts").checkpoint == checkpoint_fingerprint(tiny_moe_folder)
