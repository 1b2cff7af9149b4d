"""Loading with the experts apart: the same model, and never more in memory than was agreed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from predict_train.predictors.errors import UserError
from predict_train.runtime import load_experts, load_offloaded, offload_experts
from predict_train.runtime.pack import pack_random
from test_offload import greedy, prompt
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_every_store_gives_the_models_tokens(
    build_moe: Callable[..., PreTrainedModel], architecture: str, device: str, tmp_path: Path
) -> None:
    build_moe(architecture).save_pretrained(tmp_path / "model")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model").to(device).eval()
    expected = greedy(whole, prompt(1, 7, device))
    # The second time the pack is there already.
    for arguments in ({"store": "host"}, {"pack": tmp_path / "experts"}, {"pack": tmp_path / "experts"}):
        model = load_offloaded(tmp_path / "model", device=device, slots=9, **arguments)
        assert torch.equal(greedy(model, prompt(1, 7, device)), expected), arguments
        held = {name for name, p in model.named_parameters() if not p.is_meta}
        assert any("experts" in name and "shared" not in name for name in held) == (arguments.get("store") == "host")
        model.expert_offload.detach()


def test_the_model_has_the_checkpoints_dtype_or_the_packs(tiny_moe: PreTrainedModel, tmp_path: Path) -> None:
    tiny_moe.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    assert load_offloaded(tmp_path / "model", device="cpu").dtype == torch.bfloat16
    first = load_offloaded(tmp_path / "model", device="cpu", dtype=torch.float32, pack=tmp_path / "experts")
    again = load_offloaded(tmp_path / "model", device="cpu", pack=tmp_path / "experts")
    assert first.dtype == again.dtype == torch.float32
    assert torch.equal(greedy(first, prompt(1, 5)), greedy(again, prompt(1, 5)))


def test_a_detached_model_without_experts_says_so_until_it_has_them(tiny_moe_folder: Path, tmp_path: Path) -> None:
    ids = prompt(1, 6)
    whole = AutoModelForCausalLM.from_pretrained(tiny_moe_folder).eval()
    model = load_offloaded(tiny_moe_folder, device="cpu", pack=tmp_path / "experts")
    with pytest.raises(UserError, match="detach it first"):
        load_experts(model)
    model.expert_offload.detach()
    with pytest.raises(UserError, match=r"are in .*experts; load them .* or offload it again"):
        model(ids)
    offload_experts(model, slots=4)  # it knows its packed file
    assert torch.equal(greedy(model, ids), greedy(whole, ids))
    model.expert_offload.detach()
    load_experts(model)
    state, theirs = model.state_dict(), whole.state_dict()
    assert state.keys() == theirs.keys()
    assert all(torch.equal(state[name], theirs[name]) for name in theirs)
    assert torch.equal(model(ids).logits, whole(ids).logits)
    with pytest.raises(UserError, match="are in memory"):
        load_experts(model)


def test_a_file_that_is_gone_leaves_the_model_as_it_was(tiny_moe_folder: Path, tmp_path: Path) -> None:
    model = load_offloaded(tiny_moe_folder, device="cpu", pack=tmp_path / "experts")
    model.expert_offload.detach()
    (tmp_path / "experts").unlink()
    for attempt in (load_experts, offload_experts):
        with pytest.raises(UserError, match="No such file"):
            attempt(model)
    with pytest.raises(UserError, match="offload it again"):
        model(prompt(1, 3))


@pytest.mark.parametrize("store", ["host", "file"])
def test_random_weights_need_a_config_only(tiny_moe: PreTrainedModel, store: str, tmp_path: Path) -> None:
    config = tiny_moe.config
    pack = {"pack": pack_random(config, tmp_path / "experts", torch.float32, seed=3)} if store == "file" else {}
    model = load_offloaded(config, device="cpu", dtype=torch.float32, store=store, seed=3, slots=6, **pack)
    again = load_offloaded(config, device="cpu", dtype=torch.float32, seed=3, slots=32)
    assert torch.equal(model(prompt(2, 9)).logits, again(prompt(2, 9)).logits), "the same in both stores"
    other = load_offloaded(config, device="cpu", dtype=torch.float32, seed=4)
    assert not torch.equal(model(prompt(2, 9)).logits, other(prompt(2, 9)).logits)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"store": "cloud"}, "auto, host, file"),
        ({"store": "file"}, "give pack=PATH"),
        ({"store": "host", "pack": "x"}, "give one of"),
        ({"expert_memory": "8GiB", "slots": 3}, "give one of them"),
        ({"expert_memory": "much"}, "like 8GiB"),
        ({"expert_memory": "4KiB"}, "give more expert_memory"),
        ({"policy": "magic"}, "on_demand"),
        ({"predictors": "nowhere/at/all/x"}, "no predictors"),
    ],
)
def test_wrong_arguments_are_refused(tiny_moe_folder: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_offloaded(tiny_moe_folder, device="cpu", **arguments)


def test_memory_is_told_in_bytes_or_slots(tiny_moe_folder: Path) -> None:
    model = load_offloaded(tiny_moe_folder, device="cpu", expert_memory="60KiB")
    assert model.expert_offload.slots == 60 * 1024 // model.expert_offload.expert_bytes
    assert load_offloaded(tiny_moe_folder, device="cpu", expert_memory="8GiB").expert_offload.slots == 32


PEAKS = """
import json, re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import transformers
from predict_train.runtime import load_offloaded
from predict_train.runtime.pack import pack
from predict_train.predictors.discovery import find_moe_layers
folder, out = sys.argv[1:]
ids = torch.arange(20)[None]
ways = {
    "file": lambda: load_offloaded(folder, device="cpu", slots=8, pack=out)(ids),
    "host": lambda: load_offloaded(folder, device="cpu", slots=8, store="host")(ids),
}

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def added(way):
    # What is allocated beyond what there was. From here on, the system counts the peak anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    way()
    return peak() - before

print(json.dumps({"pack": added(lambda: pack(folder, out))} | {name: added(way) for name, way in ways.items()}))
"""


def test_a_model_is_never_whole_in_memory(tmp_path: Path) -> None:
    """A checkpoint of 200 MB, of which 190 are experts of 12 layers."""
    shape = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 40, "num_experts_per_tok": 2}
    rest = {
        "num_hidden_layers": 12,
        "head_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 512,
    }
    config = AutoConfig.for_model("qwen3_moe", dtype="bfloat16", **shape, **rest)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    experts = 12 * 40 * 3 * 256 * 256 * 2
    layer = experts / 12

    command = [sys.executable, "-c", PEAKS, str(tmp_path / "model"), str(tmp_path / "experts")]
    frees = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what one way frees, the next one does not have already
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent, env=frees
    )
    peak = json.loads(run.stdout.splitlines()[-1])

    # What the process maps of the checkpoint counts as its memory, though the system may drop it: one experts' size.
    assert peak["pack"] < experts + 6 * layer
    assert peak["file"] < 6 * layer
    assert peak["host"] < 2 * experts + 4 * layer
