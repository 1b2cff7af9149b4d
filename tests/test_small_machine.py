"""Commands on a machine whose memory is smaller than the model: experts pass through slots, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from predict_train.data_collection.collect import collect as collect_whole
from predict_train.data_collection.settings import CollectConfig, CollectError
from predict_train.data_collection.trace import Trace
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.loading import load_tokenizer
from predict_train.predictors.settings import SettingsError, load_config
from predict_train.runtime.measure.evaluate import cross_entropy, evaluate, is_away
from predict_train.runtime.settings import Loading
from resident import load_resident
from rich.console import Console

from predict_train.collecting import collect
from predict_train.running import batches_of, load_to_evaluate
from predict_train.settings import CollectingConfig, EvaluateConfig


def collected_in_slots(out: Path, **settings: Any) -> Path:
    return collect(CollectingConfig(out=out, device="cpu", **settings), Console(quiet=True))


def contents(trace: Path) -> dict[str, bytes]:
    """The tensors of a trace, file by file."""
    return {file.name: file.read_bytes() for file in trace.glob("*.safetensors")}


@pytest.fixture(scope="module")
def as_collected(tiny_moe_folder, text_corpus) -> dict[str, Any]:
    """The settings of the trace `collected`, which was made with the whole model in memory."""
    return {"model": str(tiny_moe_folder), "corpus": str(text_corpus), "tokens": 8000, "sequence_length": 100,
            "shard_bytes": 1 << 20, "dtype": "float32"}  # fmt: skip


@pytest.mark.parametrize("slots", [2, 11])
def test_a_trace_from_a_packed_file_is_that_of_the_whole_model(collected, as_collected, slots, tmp_path):
    out = collected_in_slots(tmp_path / "t", **as_collected, pack=tmp_path / "experts", slots=slots)
    assert contents(out) == contents(collected)
    mine, other = (Trace.open(folder).manifest for folder in (out, collected))
    assert (mine.origin, mine.layers, mine.dtype) == (other.origin, other.layers, other.dtype)
    assert mine.settings == other.settings | {"dtype": "float32"}


@pytest.mark.parametrize("architecture", ["deepseek_v3", "gpt_oss", "qwen2_moe"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_traces_of_all_kinds_of_experts_are_the_same(build_moe, tokenizer, text_corpus, architecture, phase, tmp_path):
    """With shared experts, biases and interleaved gates; in decoding too."""
    model = build_moe(architecture)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "model")
    settings = {"model": str(tmp_path / "model"), "corpus": str(text_corpus), "tokens": 300, "sequence_length": 40,
                "batch_size": 3, "phase": phase, "max_new_tokens": 5, "sample": 0.7}  # fmt: skip
    whole = collect_whole(CollectConfig(out=tmp_path / "whole", device="cpu", **settings), Console(quiet=True))
    out = collected_in_slots(tmp_path / "t", **settings, store="host", slots=5)
    assert contents(out) == contents(whole)


@torch.inference_mode()
def test_a_quantised_model_is_recorded_as_it_runs(tiny_moe_folder, as_collected, tmp_path):
    settings = as_collected | {"tokens": 200}
    trace = Trace.open(collected_in_slots(tmp_path / "t", **settings, quantize="int8", slots=3))
    model = load_resident(str(tiny_moe_folder), Loading(dtype="float32", quantize="int8"), torch.device("cpu"))
    seen: dict[int, torch.Tensor] = {}
    for layer in find_moe_layers(model):
        layer.router.register_forward_hook(lambda _, __, out, index=layer.index: seen.__setitem__(index, out[2]))
    ids = trace.column(0, "token_ids").long()
    model(input_ids=ids[:100].unsqueeze(0))
    for index, experts in seen.items():
        assert torch.equal(trace.column(0, f"layers.{index}.expert_ids")[:100].long(), experts)
    with pytest.raises(CollectError, match="quantize int8, not None"):
        collected_in_slots(tmp_path / "t", **settings, slots=3, resume=True)


def test_a_trace_is_resumed_with_other_slots(collected, as_collected, tmp_path, monkeypatch):
    """Where the experts were does not matter, and what they were does."""
    pack, out = tmp_path / "experts", tmp_path / "t"
    run, passes = torch.nn.Module.__call__, []

    def stop_in_time(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        passes.append(type(module).__name__)
        if passes.count("Qwen3MoeModel") == 5:
            raise KeyboardInterrupt
        return run(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", stop_in_time)
    with pytest.raises(KeyboardInterrupt):
        collected_in_slots(out, **as_collected, pack=pack, slots=4)
    monkeypatch.undo()
    assert not (out / "manifest.json").exists()
    assert contents(collected_in_slots(out, **as_collected, resume=True, expert_memory="300KiB")) == contents(collected)


def test_what_makes_no_sense_is_refused(as_collected, tmp_path):
    with pytest.raises(CollectError, match="device_map spreads a whole model"):
        collected_in_slots(tmp_path / "t", **as_collected, slots=3, device_map="auto")
    (tmp_path / "old.yaml").write_text("pack: true\n")  # it was a flag of its own once
    flags = {"model": "x", "out": str(tmp_path / "t")}
    with pytest.raises(SettingsError, match="pack"):
        load_config(CollectingConfig, tmp_path / "old.yaml", flags)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("how", [{"pack": "experts", "slots": 3}, {"quantize": "int8", "slots": 2}])
def test_a_model_is_evaluated_through_slots(tiny_moe_folder, exported, text_corpus, how, tmp_path, monkeypatch):
    """All figures are those of the model in memory, which is never there whole."""
    monkeypatch.chdir(tmp_path)
    common = {"model": str(tiny_moe_folder), "corpus": str(text_corpus), "tokens": 300, "sequence_length": 60,
              "predictors": str(exported), "dtype": "float32", "device": "cpu"}  # fmt: skip
    config = EvaluateConfig(**common, **how)
    batches = batches_of(load_tokenizer(config.model), config, lambda *_: None)
    model = load_to_evaluate(config)
    assert is_away(model)
    found = evaluate(model, batches, config.predictors, config)
    if "pack" in how:
        assert found == evaluate(load_to_evaluate(EvaluateConfig(**common)), batches, config.predictors)
    else:
        whole = load_resident(config.model, Loading(dtype="float32", quantize="int8"), torch.device("cpu"))
        assert {found["cross_entropy"][name] for name in ("full", "on_demand", "prefetch")} == {
            cross_entropy(whole, batches)
        }
    assert all(p.is_meta for layer in find_moe_layers(model) for p in layer.experts.parameters(recurse=False))
