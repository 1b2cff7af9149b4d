"""Models whose residual can't be followed, through the whole loop: their predictors are direct."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from predict_train.data_collection.catalog import tiny_model
from predict_train.data_collection.collect import CollectConfig, collect
from predict_train.data_collection.trace import Trace
from predict_train.predictors.checkpoint import Predictors, PredictorsError, load_predictors, make_speculators
from predict_train.predictors.direct import DirectMLP
from predict_train.predictors.forms import Form
from predict_train.runtime import OffloadError, offload_experts, offloaded
from predict_train.runtime.measure.evaluate import evaluate
from predict_train.train.data import FitError
from predict_train.train.export import export
from predict_train.train.fit import FitConfig, fit
from predict_train.train.settings import ExportConfig
from predict_train.train.targets import loss_of
from rich.console import Console
from test_exactness import all_logits
from transformers import AutoModelForCausalLM, PreTrainedModel

QUIET = Console(quiet=True)
SHORT = ((1, 1, 1), (2, 9, 1))
# Several streams and a gated shared expert; routers that read the stream itself, and nothing but experts in all layers; a router
# that looks experts up by the token beside others; one that returns weights of all experts.
# What of the losses is right for it: only the first and the last choose by what they return as logits.
TYPES = {"qwen4_exp_text": "kl", "gemma4_text": "choice", "deepseek_v4": "choice", "llama4_text": "kl"}


@pytest.fixture(scope="module", params=TYPES)
def made(request, tmp_path_factory, tokenizer, text_corpus) -> tuple[PreTrainedModel, Trace, Path]:
    """A model, its trace and its predictors."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    trace = collect(
        CollectConfig(
            model=str(folder / "model"),
            out=folder / "trace",
            corpus=[str(text_corpus)],
            tokens=2000,
            sequence_length=64,
            device="cpu",
        ),
        QUIET,
    )
    run = fit(
        FitConfig(
            trace=trace, out=folder / "run", width=16, epochs=3, batch_size=128, learning_rate=1e-2, device="cpu"
        ),
        QUIET,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    # Weights of a file lie at any address, and products may then be rounded otherwise.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model, Trace.open(trace), export(ExportConfig(run=run, out=folder / "predictors"), QUIET)


def test_what_is_recorded_is_right(made):
    _, trace, _ = made
    trace.verify()
    assert trace.manifest.form is Form.DIRECT
    assert all(entry.control == 1.0 for entry in trace.manifest.layers)
    assert trace.default_vectors() == {}
    assert loss_of(trace, Form.DIRECT, trace.sources) == TYPES[trace.manifest.model.model_type]
    with pytest.raises(FitError, match="can't be followed, so there is nothing to correct"):
        fit(FitConfig(trace=trace.path, out=trace.path.parent / "other", form="correcting", device="cpu"), QUIET)


def test_trained_predictors_find_more_than_the_experts_used_most(made):
    model, _, folder = made
    predictors = load_predictors(folder, model)
    assert all(isinstance(mlp, DirectMLP) for mlp in predictors.mlps.values())
    rates = [entry.hit_rates for entry in predictors.layers]
    after = sum(rate.get("predictor", rate["training_free"]) for rate in rates)
    assert after > sum(rate["training_free"] for rate in rates) + 0.05 * len(rates)
    assert json.loads((folder / "config.json").read_text())["layers"][0]["form"] == "direct"


def test_prefetching_is_exact_and_finds_what_fit_measured(made, text_corpus, tokenizer):
    model, _, folder = made
    plain = all_logits(model, SHORT)
    with offloaded(model, folder, policy="prefetch", slots=6, device="cpu") as offload:
        assert offload.config.policy == "prefetch"
        assert all(map(torch.equal, all_logits(model, SHORT), plain))
        assert offload.counters.speculation_hit_rate is not None
    text = (text_corpus / "rivers.txt").read_text()
    tokens = tokenizer(text[4000:4256], return_tensors="pt").input_ids.view(4, 64)
    result: dict[str, Any] = evaluate(model, [tokens], folder)
    assert all(row["control"] == 1.0 for row in result["layers"])
    assert (
        result["cross_entropy"]["prefetch"] == result["cross_entropy"]["on_demand"] == result["cross_entropy"]["full"]
    )
    rates = {entry.layer: [*entry.hit_rates.values()][-1] for entry in load_predictors(folder).layers}
    for row in result["layers"]:
        assert row["predictor"] == pytest.approx(rates[row["layer"]], abs=0.15)


def test_what_direct_predictors_can_not_do_is_refused(made):
    model, _, folder = made
    with pytest.raises(OffloadError, match="direct predictors guess experts and not their weights"):
        offload_experts(model, folder, policy="speculative", gating="speculated", slots=6, device="cpu")
    with offloaded(model, folder, policy="speculative", gating="true", slots=6, device="cpu"):
        assert len(all_logits(model, SHORT)) == 4
    loaded = load_predictors(folder)
    some = Predictors(model=loaded.model, layers=loaded.layers[1:])
    with pytest.raises(PredictorsError, match="can only be guessed by a direct predictor"):
        make_speculators(model, some)
