"""Reuse predictors: trained by fit, exported, and what eviction `learned` makes of them in a model and in its simulation."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_model
from hypothesis import given
from hypothesis import strategies as st
from predict_train.data_collection.trace import Trace
from predict_train.predictors.architecture import farther, moe_shape, sources
from predict_train.predictors.checkpoint import Predictors, load_predictors, save_predictors
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.errors import UserError
from predict_train.predictors.files import CHECKSUM
from predict_train.predictors.generation import CACHE
from predict_train.predictors.reuse import AGES, LONGEST, Reuse, ReusePredictors, ReuseScores
from predict_train.runtime import OffloadConfig, offloaded
from predict_train.runtime.engines import check_eviction
from predict_train.runtime.errors import OffloadError
from predict_train.runtime.host import slots as slots_module
from predict_train.runtime.host.cache import Eviction
from predict_train.runtime.host.schedule import Schedule
from predict_train.runtime.measure.replay import replay
from predict_train.runtime.measure.routing import RoutingError, Statistics, draw_routing, replaying
from predict_train.runtime.measure.simulation import Costs, simulate
from predict_train.runtime.reusing import reuse_scores
from predict_train.train.export import export
from predict_train.train.inspection import inspect
from predict_train.train.settings import ExportConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_inspect import told
from test_schedule import EXPERTS, LAYERS, NEVER, TOP_K, Copies, Lazy
from transformers import PreTrainedModel


def random_reuse(layers: int, experts: int, seed: int = 0) -> ReusePredictors:
    """Predictors that say something else for each layer and expert, however much they have learned."""
    torch.manual_seed(seed)
    predictors = ReusePredictors(layers, experts, 4).requires_grad_(False)
    for parameter in predictors.parameters():
        parameter.copy_(torch.randn_like(parameter))
    return predictors


def with_reuse(model: PreTrainedModel) -> Predictors:
    layers = find_moe_layers(model)
    reuse = Reuse(random_reuse(len(layers), layers[0].num_experts), [layer.index for layer in layers], [4], {})
    return Predictors(model={"name": "random", **moe_shape(model.config, layers)}, reuse=reuse)


@given(tokens=st.lists(st.integers(1, 3), min_size=1, max_size=8), seed=st.integers(0, 100))
def test_scores_of_a_running_model_are_those_of_the_predictors(tokens: list[int], seed: int) -> None:
    """NumPy's, whose state goes on from token to token, and from prompt to prompt, against torch's from the definition."""
    layers, predictors, generator = 3, random_reuse(3, 6), torch.Generator().manual_seed(seed)
    reuse, said = ReuseScores(predictors), torch.zeros(1, 0, layers, 6)
    for passed, count in enumerate(tokens):
        said = torch.cat([said, torch.randn(1, count, layers, 6, generator=generator) * 3], 1)
        expected = predictors(said[0, -1:].transpose(0, 1), predictors.states(said)[0, -1:])[:, 0]
        for layer in range(layers):
            scores = np.array(reuse.after(layer, said[0, -count:, layer].numpy()))
            scores += AGES * (passed + (layer + 1) / layers)
            # What the later layers said of a prompt's tokens is not known yet.
            if count == 1 or layer == layers - 1:
                assert scores == pytest.approx(expected[layer].numpy(), rel=1e-3, abs=1e-3)


def test_an_expert_said_to_come_soon_is_worth_more_the_nearer_it_is() -> None:
    predictors = ReusePredictors(2, 4, 3)  # untrained: all experts come equally soon
    reuse, logits = ReuseScores(predictors), np.zeros((1, 4), dtype=np.float32)
    said = [reuse.after(passed % 2, logits)[0] for passed in range(4)]
    assert np.diff(said) == pytest.approx([-AGES / 2] * 3)


def test_a_long_prompt_is_read_from_its_end() -> None:
    predictors = random_reuse(1, 6)
    logits = torch.randn(LONGEST + 100, 6).numpy()
    whole, end = (ReuseScores(predictors).after(0, some) for some in (logits, logits[100:]))
    assert whole == end


# --- trained, exported, inspected ------------------------------------------------------------------------------------


def test_fit_trains_them_and_they_keep_more_than_the_order_of_use(fitted: Path, exported: Path) -> None:
    facts = json.loads((fitted / "result.json").read_text())["reuse"]
    rates = facts["hit_rates"]
    assert facts["slots"] == [2, 2, 4]
    assert rates["lru"][2] < rates["learned"][2] < rates["belady"][2]
    events = EventAccumulator(str(fitted)).Reload()
    losses = [event.value for event in events.Scalars("reuse/loss")]
    assert losses[-1] < losses[0]
    assert events.Scalars("reuse/hit_rate_by_slots/learned")[-1].step == 4
    loaded = load_predictors(exported)
    assert loaded.reuse is not None
    assert loaded.reuse.hit_rates == rates
    assert loaded.reuse.layers == [0, 1, 2, 3]
    assert "## What to keep" in (exported / "README.md").read_text()
    assert f"{rates['learned'][2]:.3f}" in told(inspect(exported))


def test_inspect_measures_them_on_a_trace(collected: Path, exported: Path) -> None:
    kept = inspect(collected, keep=True, predictors=str(exported))["keep"]
    rates = {name: np.mean(rate[2]) for name, rate in kept["hit_rates"].items()}
    assert rates["lru"] < rates["learned"] < rates["belady"]
    assert 0 < kept["way"]["learned"][2] < 1


def test_a_run_without_them_is_exported_without(fitted: Path, collected: Path, tmp_path: Path) -> None:
    run = shutil.copytree(fitted, tmp_path / "run")
    result = json.loads((run / "result.json").read_text())
    for name in ("reuse", CHECKSUM):
        del result[name]
    (run / "result.json").write_text(json.dumps(result))
    folder = export(ExportConfig(run=run, out=tmp_path / "without", trace=collected))
    assert load_predictors(folder).reuse is None
    with pytest.raises(UserError, match="no reuse predictors"):
        inspect(collected, keep=True, predictors=str(folder))


@pytest.mark.parametrize("change", ["cut", "lost"])
def test_a_broken_file_of_a_run_is_refused(change: str, fitted: Path, collected: Path, tmp_path: Path) -> None:
    run = shutil.copytree(fitted, tmp_path / "run")
    file = run / "reuse.safetensors"
    if change == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    with pytest.raises(UserError, match="train again"):
        export(ExportConfig(run=run, out=tmp_path / "out", trace=collected))
    assert not (tmp_path / "out").exists()


def test_saved_predictors_are_loaded_as_they_were(exported: Path, tmp_path: Path) -> None:
    before = load_predictors(exported)
    again = load_predictors(save_predictors(tmp_path / "again", before, "card"))
    assert before.reuse is not None
    assert again.reuse is not None
    for ours, theirs in zip(before.reuse.predictors.parameters(), again.reuse.predictors.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    wrong = replace(before, reuse=before.reuse._replace(layers=[0, 0, 1, 2]))
    with pytest.raises(UserError, match="reuse names a layer twice"):
        save_predictors(tmp_path / "wrong", wrong, "card")


# --- in a model and in its simulation --------------------------------------------------------------------------------


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    ids, found, cache = torch.randint(1, 256, (1, 30), generator=torch.Generator().manual_seed(3)), [], None
    with torch.no_grad():
        for part in ids.split([10] + [1] * 20, dim=1):
            output = model(part, **{CACHE: cache}, use_cache=True)
            cache = output[CACHE]
            found.append(output.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("policy", ["on_demand", "prefetch"])
def test_exact_policies_are_exact_and_the_scores_decide(
    architecture: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(architecture)
    expected, predictors, said = logits_of(model), with_reuse(model), []
    ran, by_use = Copies(), Copies()
    own = Schedule.rate
    monkeypatch.setattr(Schedule, "rate", lambda *given: (said.append(given[1:]), own(*given)))
    ways: dict[str, Any] = {"policy": policy, "slots": 12, "device": "cpu"}
    with offloaded(model, predictors, eviction="learned", **ways) as offload, offload.observed(ran):
        assert torch.equal(logits_of(model), expected)
    layers = len(find_moe_layers(model))
    assert [layer for layer, _ in said] == list(range(layers)) * 21, "each pass tells each layer once"
    assert all(np.isfinite(scores).all() for _, scores in said)
    assert len({tuple(scores) for _, scores in said}) == len(said)
    with offloaded(model, **ways) as offload, offload.observed(by_use):
        logits_of(model)
    assert ran.begun != by_use.begun, "the order of use would have kept the same"


def test_a_model_and_its_simulation_begin_the_same_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps, said = build_model("qwen3_moe"), 12, []
    layers = find_moe_layers(model)
    shape: dict[str, Any] = {"layers": LAYERS, "num_experts": EXPERTS, "top_k": TOP_K, "candidates": 3, "seed": 1}
    routing = draw_routing(Statistics(0.4, 0.8), steps=steps, **shape)
    own = Schedule.rate
    monkeypatch.setattr(Schedule, "rate", lambda *given: (said.append(given[2]), own(*given)))
    ran, simulated = Copies(), Copies()
    config = OffloadConfig(policy="prefetch", slots=14, eviction="learned", device="cpu")
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(slots_module, "make_transfers", Lazy)
        cache = model(torch.tensor([[1]]), use_cache=True)[CACHE]
        with replaying(layers, routing) as replayed, offloaded(model, with_reuse(model), config=config) as offload:
            offload.guess_by(replayed.guesser)
            with offload.observed(ran):
                for token in range(1, steps + 1):
                    model(torch.tensor([[token]]), **{CACHE: cache})
    costs = Costs(layer=1.0, expert=1.0, copy=NEVER)
    rated = replace(routing, scores=np.reshape(said, (steps, LAYERS, EXPERTS)))
    simulate(costs, rated, config, farther(sources(layers), 1), queue=True, warmup=0, observer=simulated)
    assert ran.begun == simulated.begun
    with pytest.raises(RoutingError, match="needs the routing of a trace"):
        simulate(costs, routing, config)


def test_a_replayed_trace_has_scores_that_copy_less(collected: Path, exported: Path) -> None:
    predictors = load_predictors(exported)
    routing = replay(Trace.open(collected), 100, 2, predictors)
    copies = {}
    for eviction in ("least_stale", "learned"):
        config = OffloadConfig(policy="on_demand", slots=16, eviction=eviction)
        copies[eviction] = simulate(Costs(1.0, 1.0, 1.0), routing, config, warmup=10).copies
    assert copies["learned"] < copies["least_stale"]
    assert replay(Trace.open(collected), 100, 2, replace(predictors, reuse=None)).scores is None


def test_what_can_not_be_is_refused_in_a_sentence() -> None:
    model = build_model("qwen3_moe")
    predictors = with_reuse(model)
    assert predictors.reuse is not None
    layers = find_moe_layers(model)
    some = replace(predictors, reuse=predictors.reuse._replace(layers=[0, 1]))
    for these, message in (
        (None, "fit --reuse"),
        (replace(predictors, reuse=None), "fit --reuse"),
        (some, "2 of 4"),
    ):
        with pytest.raises(OffloadError, match=message):
            reuse_scores(these, layers, OffloadConfig(eviction="learned", device="cpu"))
    with pytest.raises(OffloadError, match="on a CPU"):
        check_eviction(Eviction.LEARNED, on_cpu=False)
    with pytest.raises(OffloadError, match="fit --reuse"), offloaded(model, eviction="learned", device="cpu"):
        pass
    assert not hasattr(model, "expert_offload")
