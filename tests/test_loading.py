"""Checkpoints that are broken, not whole, quantised or without a tokenizer: one sentence, and nothing random in a model."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_model
from predict_train.predictors import checkpoint, weights
from predict_train.predictors.checkpoint import load_predictors
from predict_train.predictors.errors import UserError
from predict_train.predictors.loading import check_tokens, load_model, load_tokenizer, read_model_config
from predict_train.predictors.weights import why_missing
from predict_train.runtime import load_offloaded
from predict_train.runtime.pack import pack
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from predict_train import cli

CPU = torch.device("cpu")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
Edit = Callable[[Path], Any]


def load(folder: Path | str) -> PreTrainedModel:
    return load_model(folder, CPU, torch.float32)


def refusal(folder: Path | str, job: Callable[[Any], Any] = load) -> str:
    with pytest.raises(UserError) as error:
        job(folder)
    message = str(error.value)
    assert "\n" not in message
    return message


def put(content: bytes, name: str = WEIGHTS) -> Edit:
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000])


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    def edited(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        edit(state)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    return edited


def without(*parts: str) -> Edit:
    """Removes the tensors with one of the `parts` in their names."""
    return tensors(lambda state: [state.pop(n) for n in list(state) if any(part in n for part in parts)])


def config(**fields: Any) -> Edit:
    def edited(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return edited


def as_bin(content: bytes | None = None) -> Edit:
    def edited(folder: Path) -> None:
        torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
        (folder / WEIGHTS).unlink()
        if content is not None:
            (folder / "pytorch_model.bin").write_bytes(content)

    return edited


def quantised(**fields: Any) -> Edit:
    return config(quantization_config=fields)


def fp8_without_scales(folder: Path) -> None:
    tensors(lambda s: s.update({n: w.to(torch.float8_e4m3fn) for n, w in s.items() if "q_proj" in n}))(folder)
    quantised(quant_method="fp8", weight_block_size=[128, 128], activation_scheme="dynamic")(folder)


BROKEN: dict[str, tuple[Edit, str]] = {
    "no file": (lambda folder: (folder / WEIGHTS).unlink(), "no file named"),
    "empty": (put(b""), r"model\.safetensors is empty; download it again"),
    "a pointer": (put(POINTER), r"model\.safetensors is a pointer of Git LFS; .*git lfs pull"),
    "cut": (cut, r"model\.safetensors is broken: .*download it again"),
    "junk": (put(b"\x93" * 1000), r"model\.safetensors is broken"),
    "bin, empty": (as_bin(b""), r"pytorch_model\.bin is empty"),
    "bin, a pointer": (as_bin(POINTER), r"pytorch_model\.bin is a pointer of Git LFS"),
    "bin, junk": (as_bin(b"junk" * 300), "no causal language model can be loaded"),
    "a config of text": (config(hidden_size="x"), "hidden_size.*expected int"),
    "code of its own": (config(model_type="own", auto_map={"AutoConfig": "own.Own"}), "contains custom code"),
    "no attention": (without("layers.1.self_attn.q_proj"), r"lacks model\.layers\.1\.self_attn\.q_proj\.weight;"),
    "no router": (without("layers.1.mlp.gate."), r"lacks model\.layers\.1\.mlp\.gate\.weight;"),
    "no head": (without("lm_head"), r"lacks lm_head\.weight; give a whole one"),
    "no experts": (without("layers.2.mlp.experts."), r"lacks model\.layers\.2\.mlp\.experts\.down_proj and 1 more"),
    "an expert less": (without("layers.2.mlp.experts.3."), r"fewer experts than .*layers\.2\.mlp\.experts"),
    "half an expert": (without("2.mlp.experts.3.up_proj"), r"lacks model\.layers\.2\.mlp\.experts\.gate_up_proj;"),
    "a scale less": (fp8_without_scales, r"lacks the scales of model\.layers\.0\.self_attn\.q_proj\.weight and 3 more"),
    "no library": (quantised(quant_method="awq", bits=4), "requires gptqmodel"),
    "no library, gptq": (quantised(quant_method="gptq", bits=4), "requires optimum"),
    "no library, bnb": (
        quantised(quant_method="bitsandbytes", load_in_4bit=True),
        "requires bitsandbytes: `pip install",
    ),
    "no library, compressed": (quantised(quant_method="pip install compressed-tensors"), "compressed.tensors"),
    "a method unknown": (quantised(quant_method="nonesuch"), "quantised by nonesuch, which transformers does not know"),
}


def test_a_checkpoint_that_is_not_whole_is_refused(tiny_moe_folder: Path, tmp_path: Path) -> None:
    for number, (name, (edit, expected)) in enumerate(BROKEN.items()):
        folder = shutil.copytree(tiny_moe_folder, tmp_path / str(number))
        edit(folder)
        with pytest.raises(UserError, match=expected) as error:
            load(folder)
        assert "\n" not in str(error.value), name
    assert "hidden_size" in refusal(tmp_path / str(list(BROKEN).index("a config of text")), read_model_config)


def test_a_checkpoint_in_several_files_that_is_not_whole_is_refused(tiny_moe: PreTrainedModel, tmp_path: Path) -> None:
    tiny_moe.save_pretrained(tmp_path / "whole", max_shard_size="60KB")
    _, second, *_ = sorted(file.name for file in (tmp_path / "whole").glob("*.safetensors"))
    index = json.loads((tmp_path / "whole" / INDEX).read_text())
    fewer = index | {"weight_map": {name: file for name, file in index["weight_map"].items() if file != second}}
    cases: dict[str, tuple[Edit, str]] = {
        "a file less": (lambda folder: (folder / second).unlink(), f"{second} is missing"),
        "a file empty": (put(b"", second), f"{second} is empty"),
        "a file that the index leaves out": (put(json.dumps(fewer).encode(), INDEX), "lacks model"),
        "the index a list": (put(b"[]", INDEX), "no causal language model can be loaded"),
        "the index a pointer": (put(POINTER, INDEX), r"index\.json is a pointer of Git LFS"),
    }
    for name, (edit, expected) in cases.items():
        folder = shutil.copytree(tmp_path / "whole", tmp_path / name)
        edit(folder)
        with pytest.raises(UserError, match=expected):
            load(folder)


def test_tied_weights_are_not_missed_and_unused_ones_are_told(
    build_moe: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    build_moe("qwen3_moe", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / WEIGHTS)
    load(tmp_path / "tied")
    pack(tmp_path / "tied", tmp_path / "experts")
    load_offloaded(tmp_path / "tied", device="cpu", pack=tmp_path / "experts")  # where the experts are not even read
    tensors(lambda state: state.update({"model.layers.9.mlp.gate.weight": torch.ones(8, 32)}))(tmp_path / "tied")
    with pytest.warns(UserWarning, match=r"has weights that the model leaves out: model\.layers\.9\.mlp\.gate\.weight"):
        load(tmp_path / "tied")
    without("embed_tokens")(tmp_path / "tied")
    assert "lacks lm_head.weight and 1 more" in refusal(tmp_path / "tied")


COMMANDS = {
    "collect": ["--out", "trace", "--corpus", "corpus.txt", "--tokens", "1k", "--device", "cpu"],
    "pack": ["--out", "experts"],
    "generate": ["--prompt", "a", "--device", "cpu"],
    "evaluate": ["--corpus", "corpus.txt", "--tokens", "1k", "--device", "cpu"],
    "bench": ["--device", "cpu"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_a_model_with_random_weights(
    command: str,
    tiny_moe_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(tiny_moe_folder, tmp_path / "model")
    without("layers.1.mlp.gate.")(folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("A text of some words. " * 200)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["predict-train", command, "model", *COMMANDS[command]])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "the checkpoint model lacks model.layers.1.mlp.gate.weight" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (load, "there is no model at"),
        (load_tokenizer, "there is no model at"),
        (read_model_config, "no config can be read from"),
        (load_predictors, "there are no predictors at"),
        (lambda name: load_offloaded(name, device="cpu"), "there is no model at"),
    ],
)
def test_a_path_with_nothing_there_is_not_looked_for_on_the_hub(
    job: Callable[[Any], Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def ask(name: Any, *_: Any, **__: Any) -> Any:
        asked.append(str(name))
        raise OSError("no Hub in reach")

    for kind in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", ask)
    monkeypatch.setattr(checkpoint, "snapshot_download", ask)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for name in ("./none", "../none", "~/none", "/none", "here/none/", "a/b/c", "none/", r"a\b"):
        said = refusal(name, job)
        assert f"{words} {name} (no such file or folder)" in said
    assert f"{words} here/none (no such folder, and while a folder here is here" in refusal("here/none", job)
    assert not asked
    for name in ("org/none", "none"):
        assert "no such folder, and while" not in refusal(name, job)
        assert asked.pop() == name


def test_a_snapshot_of_the_hub_is_found_beside_a_folder_of_its_owners_name(
    tiny_moe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert why_missing("here/none") is not None
    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda *_, **__: str(tiny_moe_folder / "config.json"))
    assert why_missing("here/none") is None


def test_a_folder_without_a_tokenizer_is_refused(tiny_moe_folder: Path, tmp_path: Path) -> None:
    """For a Qwen transformers would make an empty tokenizer, which gives no token for any text."""
    folder = shutil.copytree(tiny_moe_folder, tmp_path / "model")
    put(POINTER, "tokenizer.json")(folder)
    assert "tokenizer.json is a pointer of Git LFS" in refusal(folder, load_tokenizer)
    put(b"[]", "tokenizer_config.json")(folder)
    assert "no tokenizer can be loaded" in refusal(folder, load_tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "holds no tokenizer; put its tokenizer.json" in refusal(folder, load_tokenizer)


def test_a_tokenizer_with_tokens_that_the_model_lacks_is_refused_where_they_come(
    tiny_moe: PreTrainedModel, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = save_model(tiny_moe, tokenizer, tmp_path / "model")
    check_tokens(torch.arange(257), tiny_moe)
    larger = load_tokenizer(folder)
    larger.add_tokens(["§§"])
    larger.save_pretrained(folder)
    (tmp_path / "corpus.txt").write_text("A text with a §§ in it. " * 200)
    monkeypatch.chdir(tmp_path)
    arguments = {
        "collect": COMMANDS["collect"],
        "generate": ["--prompt", "a §§", "--device", "cpu"],
        "evaluate": COMMANDS["evaluate"],
        "bench": ["--prompt", "a §§", "--device", "cpu"],
    }
    for command, flags in arguments.items():
        monkeypatch.setattr(sys, "argv", ["predict-train", command, "model", *flags])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2, command
        assert "gives the token 257, and the model's embedding has only 257 rows" in capsys.readouterr().err
    assert not (tmp_path / "trace").exists()


def test_what_load_offloaded_passes_on(tiny_moe_folder: Path, tmp_path: Path) -> None:
    model = load_offloaded(
        tiny_moe_folder,
        device="cpu",
        revision="main",
        token="hf_none",
        trust_remote_code=True,
        attn_implementation="eager",
    )
    assert model.config._attn_implementation == "eager"
    for options in ({}, {"pack": tmp_path / "experts"}, {"pack": tmp_path / "experts"}):  # the second time it exists
        loaded = load_offloaded(tiny_moe_folder, device="cpu", attn_implementation="eager", **options)
        assert loaded.config._attn_implementation == "eager"
    cases: dict[str, dict[str, Any]] = {
        "device_map can't be given": {"device_map": "auto"},
        "no causal language model can be loaded": {"attn_implementation": "nonesuch"},
        "there is no setting torch_dtype": {"torch_dtype": torch.float32},
    }
    for words, options in cases.items():
        with pytest.raises(UserError, match=words):
            load_offloaded(tiny_moe_folder, device="cpu", **options)
    with pytest.raises(UserError, match="revision is for a checkpoint, and the model is a config"):
        load_offloaded(model.config, device="cpu", revision="main")
