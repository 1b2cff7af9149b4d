"""Values that are not finite: refused at every stage, with the layer and the token, and never learned from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model, save_model
from predict_train.data_collection.collect import CollectConfig, collect
from predict_train.data_collection.hooks import Recorder
from predict_train.data_collection.manifest import TraceError
from predict_train.data_collection.pilot import speculation_state
from predict_train.data_collection.settings import CollectError
from predict_train.data_collection.trace import Trace
from predict_train.data_collection.writer import write_columns, write_manifest
from predict_train.predictors.checkpoint import (
    Predictors,
    PredictorsError,
    TargetLayer,
    load_predictors,
    make_speculators,
    save_predictors,
)
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.errors import UserError
from predict_train.predictors.files import checksum
from predict_train.runtime.measure.evaluate import evaluate
from predict_train.train.data import FitError
from predict_train.train.fit import FitConfig, fit
from predict_train.train.inspection import inspect
from predict_train.train.losses import LOSSES
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model of which one expert of layer 1 overflows in float16."""
    model = build_model("qwen3_moe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3] *= 2e5
    return save_model(model, tokenizer, tmp_path_factory.mktemp("models") / "overflowing")


@torch.no_grad()
def test_an_overflow_is_refused_with_its_layer_and_token(overflowing, tokenizer, text_corpus, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(overflowing, dtype=torch.float16).eval()
    text = (text_corpus / "rivers.txt").read_text()
    token_ids = tokenizer(text[:64], return_tensors="pt")["input_ids"]
    read = model(token_ids, output_hidden_states=True).hidden_states[2][0]
    first = int((~read.isfinite()).any(-1).nonzero()[0])
    assert first > 0
    (tmp_path / "text.txt").write_text(text)
    settings: dict[str, Any] = {"model": str(overflowing), "corpus": str(tmp_path / "text.txt"), "tokens": 500,
                                "sequence_length": 64, "max_new_tokens": 8, "device": "cpu"}  # fmt: skip
    what = {
        "prefill": "output of expert 3 of layer 1",
        "decode": "residual of layer 2",
    }  # nothing of a prompt is recorded
    for phase, where in what.items():
        token = first if phase == "prefill" else 0  # which reads all others, at weight 0
        where = rf"{where} is not finite at token {token} of sequence 0, .* overflows in float16; give --dtype bfloat16"
        with pytest.raises(CollectError, match=where):
            collect(CollectConfig(**settings, phase=phase, out=tmp_path / phase, dtype="float16"), QUIET)
        assert not (tmp_path / phase).exists()
    (tmp_path / "short.jsonl").write_text('{"text": "Tx"}\n' * 30)  # half of each is the prompt
    short = CollectConfig(**settings | {"corpus": str(tmp_path / "short.jsonl"), "phase": "decode"}, out=tmp_path / "short",
                          dtype="float16")  # fmt: skip
    with pytest.raises(
        CollectError, match=r"output of expert 3 of layer 1 is not finite at token [1-9] of sequence \d+,"
    ):
        collect(short, QUIET)
    with pytest.raises(UserError, match="logits are not finite in float16"):
        evaluate(model, [token_ids])
    collect(CollectConfig(**settings, out=tmp_path / "trace", dtype="bfloat16"), QUIET)


def test_default_vectors_are_finite(tiny_moe):
    layers = find_moe_layers(tiny_moe)
    with Recorder(layers, [1]) as recorder, torch.no_grad():
        tiny_moe(input_ids=torch.arange(20).unsqueeze(0))
    recorder._sums[2].sums[5, 3] = float("nan")
    with pytest.raises(CollectError, match="mean output of expert 5 of layer 2 is not finite"):
        speculation_state(layers, recorder)


@pytest.fixture
def broken(collected: Path, tmp_path: Path) -> Path:
    """A trace of an older release: one residual of layer 1 is infinite, and all checksums are right."""
    folder = shutil.copytree(collected, tmp_path / "broken")
    trace = Trace.open(folder)
    shard = trace.manifest.shards[1]
    columns = {name: column.clone() for name, column in load_file(folder / shard.file).items()}
    columns["layers.1.residual"][7, 5] = float("-inf")
    columns["layers.3.router_logits"][2, 0] = float("nan")
    shard.xxh3 = write_columns(folder / shard.file, columns)
    write_manifest(folder, trace.manifest)
    return folder


def test_a_trace_with_values_that_are_not_finite_is_refused(broken, tmp_path):
    trace = Trace.open(broken)
    sequence, position = (int(numbers[7]) for numbers in trace.places(1))
    where = (
        rf"the residual of layer 1 is not finite at token {position} of sequence {sequence}; collect the trace again"
    )
    trace.verify()
    with pytest.raises(TraceError, match=where):
        fit(FitConfig(trace=broken, out=tmp_path / "run", width=16, epochs=1, device="cpu"), QUIET)
    with pytest.raises(TraceError, match=where):
        inspect(broken)
    assert trace.read(1, torch.tensor([6, 8]), ["layers.1.residual"])


def test_default_vectors_that_are_not_finite_are_refused(collected, tmp_path):
    folder = shutil.copytree(collected, tmp_path / "trace")
    state = {name: part.clone() for name, part in load_file(folder / "speculation.safetensors").items()}
    state["default_vectors.2"][0, 0] = float("inf")
    save_file(state, folder / "speculation.safetensors")
    manifest = Trace.open(folder).manifest
    manifest.speculation_xxh3 = checksum(folder / "speculation.safetensors")
    write_manifest(folder, manifest)
    for use in (lambda: inspect(folder), Trace.open(folder).default_vectors):
        with pytest.raises(TraceError, match="trace: the default vectors of layer 2 are not finite; collect"):
            use()


def test_a_training_that_diverges_is_refused(collected, tmp_path):
    settings = {
        "trace": collected,
        "width": 16,
        "epochs": 2,
        "device": "cpu",
        "out": tmp_path / "run",
        "layers": [2, 3],
    }
    with pytest.raises(
        FitError, match=r"loss of layer 2 is not finite any more in epoch 0; give a smaller --learning-rate"
    ):
        fit(FitConfig(**settings, learning_rate=1e30), QUIET)  # type: ignore[arg-type]
    assert not (tmp_path / "run" / "result.json").exists()


def test_logits_that_say_nothing_make_no_loss_infinite():
    speculated = torch.randn(1, 2, 8).requires_grad_()
    for loss in LOSSES.values():
        total = loss(speculated, torch.ones(1, 2, 8), torch.tensor([[[0, 1], [2, 3]]])).sum()
        (gradient,) = torch.autograd.grad(total, speculated)
        assert total.isfinite()
        assert gradient.isfinite().all()


def test_predictors_that_are_not_finite_are_neither_exported_nor_run(exported, tiny_moe, tmp_path):
    predictors = load_predictors(exported)
    assert predictors.mlps
    target, mlp = next(iter(predictors.mlps.items()))
    mlp.w1[0, 0] = 1e6
    with pytest.raises(
        PredictorsError, match=f"predictor of layer {target} overflows in float16; load the model in bfloat16"
    ):
        make_speculators(tiny_moe.half(), predictors)
    mlp.w1[0, 0] = float("inf")
    with pytest.raises(
        PredictorsError, match=f"layers.{target}.w1 holds values that are not finite, so nothing is exported"
    ):
        save_predictors(tmp_path / "predictors", predictors, "")
    vectors = {0: torch.full((8, 32), float("nan"))}
    with pytest.raises(PredictorsError, match=r"default_vectors\.0 holds values that are not finite"):
        save_predictors(tmp_path / "predictors", Predictors(predictors.model, [TargetLayer(0)], vectors), "")
    assert not list(tmp_path.iterdir())
