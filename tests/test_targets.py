"""What fit trains when it is told which layers, what they read and how much they may take."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from predict_train.data_collection.collect import CollectConfig, collect
from predict_train.data_collection.statistics import SAMPLE_ROWS, hit_rates
from predict_train.data_collection.trace import Trace
from predict_train.predictors.architecture import farther
from predict_train.predictors.checkpoint import load_predictors
from predict_train.predictors.mlp import ResidualMLP
from predict_train.runtime import offloaded
from predict_train.runtime.measure.replay import replay
from predict_train.runtime.measure.routing import RoutingError
from predict_train.train.data import FitError
from predict_train.train.export import export
from predict_train.train.fit import FitConfig, fit
from predict_train.train.losses import LOSSES
from predict_train.train.settings import ExportConfig
from predict_train.train.targets import Target, choose_targets, hit_rates_of, parameters_in, share_out, sources_in
from rich.console import Console
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def with_inputs(tmp_path_factory, tiny_moe_folder, text_corpus) -> Path:
    """A trace of the tiny model that holds each target's own input."""
    config = CollectConfig(
        model=str(tiny_moe_folder), out=tmp_path_factory.mktemp("inputs") / "trace", corpus=str(text_corpus), tokens=4000,
        sequence_length=100, inputs=True, device="cpu",
    )  # fmt: skip
    return collect(config, Console(quiet=True))


def choose(trace: Path, **changes: object) -> list[Target]:
    config = FitConfig(trace=trace, out=trace, **({"width": 32} | changes))  # type: ignore[arg-type]
    return choose_targets(Trace.open(trace), config)


def train(trace: Path, out: Path, **changes: object) -> Path:
    # Reuse predictors do not depend on what these tests choose.
    usual = {"width": 32, "epochs": 2, "batch_size": 128, "learning_rate": 1e-2, "reuse": False, "device": "cpu"}
    return fit(FitConfig(trace=trace, out=out, **(usual | changes)), Console(quiet=True))  # type: ignore[arg-type]


def test_auto_takes_the_layers_below_the_threshold(collected):
    trace = Trace.open(collected)
    sample = trace.sample(SAMPLE_ROWS, trace.columns_for(trace.sources))
    [rates] = hit_rates(sample, trace.sources, trace.stacked(), [trace.manifest.model.top_k])
    assert rates == pytest.approx(hit_rates_of(trace, trace.sources), abs=1e-6)
    assert rates == pytest.approx({e.layer: e.training_free for e in trace.manifest.layers}, abs=1e-6)
    middle = sorted(rates.values())[1]
    chosen = choose(collected, layers="auto", threshold=middle + 1e-6)
    assert {target.layer for target in chosen} == {layer for layer, rate in rates.items() if rate <= middle}
    with pytest.raises(FitError, match="raise --threshold"):
        choose(collected, layers="auto", threshold=1e-6)
    assert [target.layer for target in choose(collected, layers=[3, 1])] == [1, 3]
    with pytest.raises(FitError, match="layer 9 is no target"):
        choose(collected, layers=[9])


def test_horizon_two_reads_the_source_before_the_source(collected):
    assert {target.layer: target.source for target in choose(collected, horizon=2)} == {0: None, 1: 0, 2: 0, 3: 1}


def test_a_trace_without_what_is_to_be_read_is_refused(collected, tmp_path, tiny_moe_folder, text_corpus):
    with pytest.raises(FitError, match="lacks the input of layer 1; collect it again with --inputs"):
        choose(collected, source="layer_input")
    with pytest.raises(FitError, match="leave --horizon out"):
        choose(collected, source="layer_input", horizon=2)
    some = CollectConfig(
        model=str(tiny_moe_folder), out=tmp_path / "t", corpus=str(text_corpus), tokens=600, layers=[3], device="cpu"
    )
    with pytest.raises(FitError, match="collect it with --layers all"):
        choose(collect(some, Console(quiet=True)), horizon=2)


def test_a_horizon_is_right_or_refused_whatever_layers_a_trace_has(collected):
    whole = Trace.open(collected)
    right, refused = farther(whole.sources, 2), []
    for count in range(1, 5):
        for layers in itertools.combinations(whole.manifest.layers, count):
            trace = Trace(whole.path, whole.manifest.model_copy(update={"layers": list(layers)}))
            held = set(trace.sources.values())
            try:
                found = sources_in(trace, "quasi_hidden", 2)
            except FitError:
                refused.append(sorted(trace.sources))
                assert not {right[target] for target in trace.sources} <= held
            else:
                assert found == {target: right[target] for target in trace.sources}
                assert set(found.values()) <= held
    assert [3] in refused
    assert [0, 1, 2, 3] not in refused


def test_the_own_input_says_more_than_the_source_does(with_inputs):
    trace = Trace.open(with_inputs)
    own, nearest = (hit_rates_of(trace, sources) for sources in (dict.fromkeys(trace.sources), trace.sources))
    assert sum(own.values()) > sum(nearest.values())
    assert own[0] == nearest[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "layer_input", "loss": "bce"},
        {"memory": 0, "loss": "ranking"},
        {"memory": 2, "horizon": 2},
    ],
)
@torch.no_grad()
def test_every_kind_is_trained_exported_and_run(with_inputs, collected, tmp_path, tiny_moe_folder, tokenizer, changes):
    run = train(with_inputs, tmp_path / "run", **changes)
    result = json.loads((run / "result.json").read_text())
    assert result["mean"]["predictor"] > result["mean"]["training_free"]
    predictors = load_predictors(export(ExportConfig(run=run, out=tmp_path / "predictors")))
    what_is_read = {name: value for name, value in changes.items() if name not in ("loss", "memory")}
    expected = {target.layer: target.source for target in choose(with_inputs, **what_is_read)}
    assert {layer.layer: layer.source for layer in predictors.layers} == expected
    assert {mlp.memory for mlp in predictors.mlps.values()} == {changes.get("memory", 1)}
    # Replayed from the trace they guess as well as on validation.
    replayed = replay(Trace.open(with_inputs), 1000, 4, predictors)
    assert replayed.hit_rate == pytest.approx(result["mean"]["predictor"], abs=0.1)
    if "source" in changes:
        with pytest.raises(RoutingError, match="lacks the input of layer 1"):
            replay(Trace.open(collected), 1000, 4, predictors)
    model = AutoModelForCausalLM.from_pretrained(tiny_moe_folder, dtype=torch.float32).eval()
    prompt = tokenizer("The stone number 3", return_tensors="pt")
    outputs = []
    for policy in ("on_demand", "prefetch"):
        with offloaded(model, predictors, policy=policy, device="cpu", slots=6) as offload:
            outputs.append(model.generate(**prompt, max_new_tokens=12, do_sample=False))
            rate = offload.counters.speculation_hit_rate
    assert torch.equal(*outputs)
    assert rate is not None
    assert rate > 0.4


@given(
    st.dictionaries(st.integers(0, 50), st.floats(0, 1), min_size=1, max_size=12),
    st.integers(42_000, 1_000_000),  # the least for twelve layers is 28,800, and 41,088 with a memory of two tokens
    st.integers(0, 2),
)
def test_a_budget_is_kept_and_goes_where_the_gap_is(collected_trace, gaps, budget, memory):
    model = collected_trace.manifest.model
    widths = share_out(collected_trace, gaps, str(budget), memory)
    counts = [ResidualMLP.count(model.hidden_size, model.num_experts, width, memory) for width in widths.values()]
    assert 2 * sum(counts) <= budget
    step = 2 * 16 * (ResidualMLP.count(model.hidden_size, model.num_experts, 1, memory) - model.hidden_size)
    assert 2 * sum(counts) + step > budget
    assert all(widths[a] >= widths[b] for a in gaps for b in gaps if gaps[a] > gaps[b])


@pytest.fixture(scope="module")
def collected_trace(collected) -> Trace:
    return Trace.open(collected)


def test_a_budget_in_the_place_of_a_width(collected, tmp_path, tiny_moe):
    run = train(collected, tmp_path / "run", budget="60kB", epochs=1, batch_size=512)
    entries = json.loads((run / "result.json").read_text())["layers"]
    gaps = {entry["layer"]: 1 - entry["training_free"]["recall@k"] for entry in entries}
    widths = {entry["layer"]: entry["width"] for entry in entries}
    assert widths[max(gaps, key=gaps.__getitem__)] == max(widths.values()) > min(widths.values())
    predictors = load_predictors(export(ExportConfig(run=run, out=tmp_path / "predictors", dtype="bfloat16")))
    assert all(mlp.width == widths[layer] for layer, mlp in predictors.mlps.items())
    trace = Trace.open(collected)
    experts = sum(p.numel() for name, p in tiny_moe.named_parameters() if ".experts." in name)
    every = sum(p.numel() for p in tiny_moe.parameters())
    assert parameters_in(trace, "10%") == int(0.1 * (every - experts))
    with pytest.raises(FitError, match="60000 is too small for 50 predictors, which take 120,000 bytes"):
        share_out(trace, dict.fromkeys(range(50), 0.5), "60000", memory=0)
    for wrong in ("much", "0%", "-5%", "200%", "5 apples"):
        with pytest.raises(FitError, match="a budget can't be"):
            parameters_in(trace, wrong)


def test_training_ends_when_nothing_gets_better(collected, tmp_path):
    run = train(collected, tmp_path / "run", epochs=40, patience=1, learning_rate=0.3, batch_size=512, width=8)
    assert json.loads((run / "result.json").read_text())["epochs"] < 40


@given(st.integers(0, 1000))
def test_each_loss_is_least_where_the_routing_is_right(seed):
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(2, 5, 8, generator=generator)
    ids = true.topk(3).indices
    other = torch.randn(2, 5, 8, generator=generator)
    for name, loss in LOSSES.items():
        rows = loss(true, true, ids)
        assert rows.shape == (2, 5)
        assert (rows <= loss(-true, true, ids)).all(), name
        moved = other.clone().requires_grad_()
        for _ in range(50):
            (gradient,) = torch.autograd.grad(loss(moved, true, ids).sum(), moved)
            moved = (moved - 0.2 * gradient).detach().requires_grad_()
        assert loss(moved, true, ids).sum() < loss(other, true, ids).sum(), name
