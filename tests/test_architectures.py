"""What is special about an architecture survives the way from the model through the trace to the runtime."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import skip_if_lacking
from predict_train.data_collection.catalog import tiny_model
from predict_train.data_collection.collect import CollectConfig, collect
from predict_train.data_collection.trace import Trace
from predict_train.predictors.architecture import moe_shape
from predict_train.predictors.checkpoint import Predictors, load_predictors, make_speculators
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.routing import Routing
from predict_train.predictors.speculation import Speculator
from predict_train.runtime import offloaded
from predict_train.train.export import export
from predict_train.train.fit import FitConfig, fit
from predict_train.train.settings import ExportConfig
from rich.console import Console
from transformers import AutoModelForCausalLM

from benchmarks import default_vectors

pytestmark = pytest.mark.usefixtures("undrawn")

# A post-norm with a shared expert, a router with arguments and 3-D input; no norm; attention beside the block; experts in
# a space of their own, and dense layers between; a scaled stream; a router whose argument is a buffer.
PECULIAR = ["afmoe", "flex_olmo", "cohere2_moe", "nemotron_h", "beam", "minimax_m2"]


@pytest.fixture(scope="module", params=PECULIAR)
def recorded(request, tmp_path_factory, tokenizer, text_corpus) -> tuple[Path, Path]:
    """The folders of a tiny random model and of a trace of it."""
    skip_if_lacking(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    config = CollectConfig(
        model=str(folder / "model"), out=folder / "trace", corpus=[str(text_corpus)], tokens=1500, sequence_length=64,
        device="cpu",
    )  # fmt: skip
    return folder / "model", collect(config, Console(quiet=True))


@torch.no_grad()
def test_a_traces_speculators_are_the_models(recorded):
    folder, trace = recorded[0], Trace.open(recorded[1])
    trace.verify()
    assert all(entry.control == 1.0 for entry in trace.manifest.layers)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = find_moe_layers(model)
    predictors = Predictors(model=moe_shape(model.config, layers), default_vectors=trace.default_vectors())
    own, rebuilt = make_speculators(model, predictors, layers), trace.wirings()
    generator = torch.Generator().manual_seed(0)
    residual, inner = torch.randn(2, 20, layers[0].hidden_size, generator=generator)
    logits = torch.randn(20, layers[0].num_experts, generator=generator)
    values, ids = logits.topk(layers[0].top_k)
    for target, source in trace.sources.items():
        routing = None if source is None else Routing(logits, values, ids)
        expected, actual = own[target](residual, routing, inner), Speculator(rebuilt[target])(residual, routing, inner)
        assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True)), target


def test_the_benchmark_of_default_vectors_speculates_as_the_trace_does(recorded, tmp_path, monkeypatch):
    """With the trace's own vectors it finds what `collect` found: a post-norm behind them is not forgotten."""
    trace = recorded[1]
    entries = Trace.open(trace).manifest.layers
    if not any(entry.post_norm for entry in entries):
        pytest.skip("no post-norm")
    monkeypatch.setattr(sys, "argv", ["default_vectors", str(trace), str(trace), "--out", str(tmp_path / "out.json")])
    default_vectors.main()
    found = json.loads((tmp_path / "out.json").read_text())["training_free"]
    expected = {str(entry.layer): entry.training_free for entry in entries}
    assert found["trace"] == pytest.approx(expected, abs=1e-6)
    assert found["none"] != pytest.approx(expected, abs=1e-6)


def test_the_loop_runs_and_exact_policies_are_exact(recorded, tmp_path):
    folder, trace = recorded
    run = fit(FitConfig(trace=trace, out=tmp_path / "run", width=8, epochs=1, device="cpu"), Console(quiet=True))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    predictors = load_predictors(export(ExportConfig(run=run, out=tmp_path / "predictors")), model)
    prompt = torch.randint(3, 250, (1, 7), generator=torch.Generator().manual_seed(2))

    def tokens() -> list[int]:
        return model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist()

    layers = find_moe_layers(model)
    expected = tokens()
    for policy in ("on_demand", "prefetch"):
        with offloaded(model, predictors, policy=policy, slots=layers[0].top_k + 1, device="cpu"):
            assert tokens() == expected
    with offloaded(model, predictors, policy="speculative", slots=layers[0].top_k + 1, device="cpu") as offload:
        assert len(tokens()) == len(expected)
        assert 0 < (offload.counters.speculation_hit_rate or 0) <= 1
