"""Measuring: every way runs the same routing, figures fit one another, and the model is whole afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.errors import UserError
from predict_train.runtime.measure.accelerated import accelerated
from predict_train.runtime.measure.bench import BenchError, Measured, Round, Way, bench, parse_ways, results
from predict_train.runtime.measure.routing import Statistics, draw_routing
from predict_train.runtime.measure.settings import Measuring
from transformers import PreTrainedModel

from predict_train import cli

ALL = "resident,on_demand,prefetch,speculative"
TINY = {"layers": 4, "num_experts": 8, "top_k": 2, "candidates": 4}
ROW = {
    "policy", "gating", "time_per_output_token_ms", "time_to_first_token_ms", "hit_rate", "bytes_per_token",
    "stall_ms_per_token", "limit_ms_per_token", "overlap_efficiency", "peak_host_bytes", "peak_device_bytes",
}  # fmt: skip
"""What others read from the JSON."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


PROMPT = torch.arange(1, 25).unsqueeze(0)


def settings(policies: str, **others: Any) -> Measuring:
    usual = {"device": "cpu", "tokens": 6, "warmup": 2, "rounds": 2, "slots": 12}
    return Measuring(policies=policies, **(usual | others))


def test_it_may_be_called_in_inference_mode(build_moe: Callable[..., PreTrainedModel]) -> None:
    model = build_moe("qwen3_moe")
    with torch.inference_mode():
        routing = draw_routing(Statistics(0.4, 0.7), steps=8, **TINY)
        assert len(bench(model, PROMPT, settings("on_demand,prefetch", rounds=1), routing=routing).rounds) == 2


@pytest.mark.parametrize("device", DEVICES)
def test_every_way_is_measured_over_the_same_routing(build_moe: Callable[..., PreTrainedModel], device: str) -> None:
    model = build_moe("qwen3_moe")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    routing = draw_routing(Statistics(0.4, 0.7), steps=8, **TINY)
    measured = bench(model, PROMPT, settings(ALL, device=device), routing=routing)
    assert [str(way) for way in measured.rounds] == [
        "resident", "on_demand", "prefetch", "speculative/speculated", "speculative/true", "speculative/resident",
    ]  # fmt: skip
    assert all(len(rounds) == 2 for rounds in measured.rounds.values())
    assert measured.link > 0
    counted = routing.ids[2:], routing.candidates[2:]
    for way, rounds in measured.rounds.items():
        for r in rounds:
            assert r.seconds_per_token > 0
            assert r.seconds_to_first_token > 0
            if way.policy == "resident":
                assert r.bytes_per_token is None
                continue
            if way.policy == "on_demand":
                assert r.hit_rate is None
                misses = (1 - (r.cache_hit_rate or 0.0)) * 4 * 2
                assert r.bytes_per_token == pytest.approx(misses * measured.expert_bytes)
            else:
                m = 4 if way.gating == "resident" else 2
                hits = (counted[0][..., None] == counted[1][..., None, :m]).any(-1).mean()
                assert r.hit_rate == pytest.approx(hits)
    # One routing, one order of copies: only where wrong guesses are cancelled in time does anything else decide.
    first, second = measured.rounds[Way("on_demand")]
    assert first.bytes_per_token == second.bytes_per_token
    assert getattr(model, "expert_offload", None) is None
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.device.type == "cpu"


def test_the_rows_of_what_was_measured() -> None:
    def rounds(seconds: float, stalled: float | None, copied: float | None) -> list[Round]:
        return [Round(1.0, seconds * x, copied, stalled) for x in (1.0, 1.5, 0.5)]

    measured = Measured(
        {Way("resident"): rounds(0.060, None, None), Way("on_demand"): rounds(0.100, 0.020, 200.0)}
        | {Way("speculative", "true"): rounds(0.050, 0.010, 400.0), Way("accelerate"): rounds(0.3, None, None)},
        skipped={},
        links=[9_000.0, 12_000.0, 10_000.0],
        expert_bytes=100,
        slots=12,
    )
    rows = {row["policy"]: row for row in results(measured)}
    # The least that anything took without its stalls is 25 - 10 ms.
    assert rows["resident"]["limit_ms_per_token"] == pytest.approx(15)
    assert rows["on_demand"]["limit_ms_per_token"] == pytest.approx(20)
    assert rows["speculative"]["limit_ms_per_token"] == pytest.approx(40)
    assert rows["speculative"]["overlap_efficiency"] == pytest.approx(0.8)
    assert rows["speculative"]["gating"] == "true"
    assert rows["speculative"]["time_per_output_token_ms"] == pytest.approx({"median": 50, "min": 25, "max": 75})
    assert rows["accelerate"]["limit_ms_per_token"] is None
    json.dumps(list(rows.values()))


def test_accelerate_runs_the_same_routing(build_moe: Callable[..., PreTrainedModel]) -> None:
    model = build_moe("qwen3_moe")
    routing = draw_routing(Statistics(0.4, 0.7), steps=8, **TINY)
    reference = partial(accelerated, model, None, torch.device("cpu"))
    with reference(12 * 8192) as other:
        assert "disk" in other.hf_device_map.values()
    measured = bench(model, PROMPT, settings("on_demand,accelerate", rounds=1), routing=routing, reference=reference)
    assert len(measured.rounds[Way("accelerate")]) == 1


def test_a_way_that_can_not_be_run_is_skipped_and_said(build_moe: Callable[..., PreTrainedModel]) -> None:
    measured = bench(build_moe("mixtral"), PROMPT, settings("on_demand,accelerate", rounds=1))
    assert {str(way) for way in measured.skipped} == {"accelerate"}
    with pytest.raises(BenchError, match="nothing is left"):
        bench(build_moe("mixtral"), PROMPT, settings("accelerate", rounds=1))
    with pytest.raises(BenchError, match="no policy fastest"):
        parse_ways("fastest")


def test_a_broken_setting_leaves_the_model_whole(build_moe: Callable[..., PreTrainedModel]) -> None:
    model = build_moe("qwen3_moe")
    with pytest.raises(UserError, match="slots"):
        bench(model, PROMPT, settings("on_demand", slots=1))
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=2)
    assert all(p.is_contiguous() for layer in find_moe_layers(model) for p in layer.experts.parameters())


def test_the_timeline_shows_copies_beside_computing(build_moe: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    file = tmp_path / "timeline.json"
    routing = draw_routing(Statistics(0.1, 0.7), steps=8, **TINY)
    config = settings("on_demand,prefetch", slots=4, timeline=file)
    bench(build_moe("qwen3_moe"), PROMPT, config, routing=routing)
    events = json.loads(file.read_text())["traceEvents"]
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"on_demand", "prefetch"}
    spans = [e for e in events if e["ph"] == "X"]
    assert all(e["ts"] >= 0 and e["dur"] >= 0 for e in spans)
    for run in (0, 1):
        of_run = [e for e in spans if e["pid"] == run]
        copies = [e for e in of_run if e["cat"] == "copying"]
        computing = [e for e in of_run if e["cat"] == "computing"]
        assert copies
        assert {e["tid"] for e in copies}.isdisjoint(e["tid"] for e in computing)
        for name in ("layer", "router", "experts"):  # four tokens through four layers
            assert sum(e["name"].startswith(name) for e in computing) == 16
        assert sum(e["name"].startswith("speculate") for e in computing) == (0 if run == 0 else 16)


def run(*arguments: object) -> None:
    cli.app([str(a) for a in arguments], standalone_mode=False)


def test_the_command_on_random_weights_in_a_packed_file(tiny_moe_folder: Path, tmp_path: Path) -> None:
    pack, out, plot = tmp_path / "experts.pack", tmp_path / "bench.json", tmp_path / "bench.png"
    config = tiny_moe_folder / "config.json"
    run("pack", "--random-weights", config, "--out", pack)
    run("bench", "--random-weights", config, "--pack", pack, "--tokens", 4, "--rounds", 1, "--slots", 10,
        "--preset", "moe-1b", "--json", out, "--plot", plot)  # fmt: skip
    result = json.loads(out.read_text())
    assert {"results", "hardware", "versions", "command", "routing", "settings"} <= result.keys()
    assert result["routing"]["routing"] == "synthetic"
    assert result["routing"]["kept"] == 0.38
    assert list(result["skipped"]) == ["resident"]
    assert all(row.keys() >= ROW for row in result["results"])
    assert all(row["time_per_output_token_ms"].keys() == {"median", "min", "max"} for row in result["results"])
    assert [row["policy"] for row in result["results"]] == ["on_demand", "prefetch"] + 3 * ["speculative"]
    assert plot.stat().st_size > 1000


def test_the_command_on_random_weights_that_are_quantised(tiny_moe_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    run("bench", "--random-weights", tiny_moe_folder / "config.json", "--quantize", "int8", "--tokens", 2, "--rounds", 1,
        "--policies", "on_demand,resident,accelerate", "--json", out)  # fmt: skip
    result = json.loads(out.read_text())
    assert result["skipped"].keys() == {"resident", "accelerate"}
    assert [row["policy"] for row in result["results"]] == ["on_demand"]
    assert result["settings"]["quantized"] == "int8"


def test_the_command_replays_a_trace(
    tiny_moe_folder: Path, collected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    run("bench", tiny_moe_folder, "--routing", collected, "--policies", "prefetch,speculative/resident",
        "--tokens", 4, "--rounds", 1, "--json", out)  # fmt: skip
    result = json.loads(out.read_text())
    assert result["routing"]["path"] == str(collected)
    assert all(0 < row["hit_rate"] <= 1 for row in result["results"])
    assert str(collected.name) in "".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a MODEL"),
        (["--random-weights", "nowhere.json"], "no config"),
        (["{model}", "--preset", "mine", "--routing", "synthetic"], "no preset mine"),
        (["{model}", "--routing", "nowhere"], "no trace at nowhere"),
        (["{model}", "--routing", "synthetic", "--kept", "1.5"], "kept can't be 1.5"),
        (["{model}", "--plot", "chart.doc"], "--plot"),
        (["{model}", "--json", "/nowhere/out.json"], "no folder"),
        (["{model}", "--policies", "best"], "no policy best"),
    ],
)
def test_what_the_command_refuses(tiny_moe_folder: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run("bench", *(a.replace("{model}", str(tiny_moe_folder)) for a in arguments))
