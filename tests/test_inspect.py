"""`predict-train inspect`: its figures against what the tensors on disk say, and one sentence for whatever is wrong."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from predict_train.data_collection import statistics
from predict_train.data_collection import trace as traces
from predict_train.data_collection.statistics import balance, reuse, stack_distances, trace_statistics
from predict_train.data_collection.trace import Trace
from predict_train.predictors.errors import UserError
from predict_train.train.inspection import InspectError, inspect, plot, report
from rich.console import Console
from safetensors.torch import load_file

from predict_train import cli


@pytest.fixture
def copy(collected: Path, tmp_path: Path) -> Path:
    """A copy of the collected trace that a test may break."""
    return shutil.copytree(collected, tmp_path / "copy")


def told(found: dict[str, Any]) -> str:
    console = Console(width=100, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    report(found, console)
    return console.export_text()


def column(trace: Trace, name: str) -> torch.Tensor:
    return torch.cat([trace.column(shard, name) for shard in range(len(trace.manifest.shards))])


def test_loads_and_previous_tokens_are_those_of_the_rows(collected):
    trace = Trace.open(collected)
    found = trace_statistics(trace, sample_rows=500)
    assert found["rows"]["load"] == 8000
    assert 450 < found["rows"]["training_free"] < 550
    # Every row has a previous token but the first of each of the 80 sequences, and the first of each shard.
    assert 8000 - 80 - len(trace.manifest.shards) <= found["rows"]["previous_token"] <= 8000 - 80
    position = column(trace, "position")
    for entry in found["layers"]:
        ids = column(trace, f"layers.{entry['layer']}.expert_ids")
        assert entry["load"] == torch.bincount(ids.flatten().long(), minlength=8).tolist()
        assert sum(entry["load"]) == 8000 * 2
        later = (position > 0).nonzero().flatten()
        same = (ids[later].unsqueeze(-1) == ids[later - 1].unsqueeze(-2)).any(-1).float().mean().item()
        assert entry["hit_rate"]["previous_token"] == pytest.approx(same, abs=2e-3)


def test_hit_rates_are_those_of_collect(collected):
    trace = Trace.open(collected)
    found = trace_statistics(trace)
    assert found["rows"]["training_free"] == 8000
    for entry, recorded in zip(found["layers"], trace.manifest.layers, strict=True):
        rates = entry["hit_rate"]
        assert rates["k"] == pytest.approx(recorded.training_free, abs=1e-9)
        assert rates["k"] <= rates["k+2"] <= rates["2k"] <= 1
        # Of 8 experts, 4 candidates, which is k + 2 as well as 2k.
        assert rates["k+2"] == rates["2k"]
        assert entry["control"] == 1.0


def test_what_is_read_at_a_time_changes_no_figure(collected, monkeypatch):
    trace = Trace.open(collected)
    whole = trace_statistics(trace)
    monkeypatch.setattr(traces, "BYTES_AT_ONCE", 1)
    most = 0
    read = Trace.read

    def watched(self: Trace, shard: int, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        nonlocal most
        most = max(most, len(rows))
        return read(self, shard, rows)

    monkeypatch.setattr(Trace, "read", watched)
    in_pieces = trace_statistics(trace)
    assert most == traces.RUN
    for a, b in zip(whole["layers"], in_pieces["layers"], strict=True):
        assert a["load"] == b["load"]
        assert a["hit_rate"] == pytest.approx(b["hit_rate"], abs=1e-3)  # a matmul of other rows rounds otherwise


def test_rows_in_any_order_and_thinned_out_have_the_right_previous_token(collected, monkeypatch):
    trace = Trace.open(collected)
    entry = trace.manifest.shards[0]
    original = Trace.column
    # Two sequences side by side, as a batch that is generated is recorded; one token of the first is missing.
    rows = {"sequence": torch.tensor([7, 9, 7, 9, 9]), "position": torch.tensor([0, 0, 1, 1, 3])}
    ids = torch.tensor([[1, 2], [3, 4], [2, 5], [3, 4], [3, 4]])

    def column(self: Trace, shard: int, name: str) -> torch.Tensor:
        if name in rows:
            return rows[name].int()
        return ids.short() if name.endswith("expert_ids") else original(self, shard, name)

    monkeypatch.setattr(Trace, "column", column)
    trace.manifest.shards = [entry.model_copy(update={"rows": 5})]
    rates, pairs = statistics._previous_token(trace)
    assert pairs == 2  # 7:1 after 7:0 shares one expert of two, 9:1 after 9:0 both; 9:3 has lost its previous token
    assert rates == [0.75] * 4
    # The runs are 1, 2, 2, 5 and 3, 4, 3, 4 and 3, 4: one slot hits once, two and more hit three times.
    found = statistics.reuse(trace, 100)
    assert (found["rows"], found["sequences"]) == (5, 3)
    assert found["hit_rates"] == pytest.approx([0.1, 0.3, 0.3, 0.3])


def hits(tokens: list[list[int]], slots: int) -> int:
    """How often one layer's slots hit that keep the experts used last and are empty at first."""
    found, kept = 0, []
    for expert in (expert for ids in tokens for expert in ids):
        found += expert in kept
        kept = [expert, *(other for other in kept if other != expert)][:slots]
    return found


@given(st.integers(0, 999), st.integers(1, 40), st.integers(1, 3), st.integers(1, 12), st.data())
def test_stack_distances_are_the_slots_that_it_takes_to_hit(seed, tokens, layers, experts, data):
    top_k = data.draw(st.integers(1, experts))
    scores = torch.rand(tokens, layers, experts, generator=torch.Generator().manual_seed(seed))
    ids = scores.argsort(-1)[..., :top_k]
    distances = stack_distances(ids, experts)
    for layer in range(layers):
        for slots in range(1, experts + 1):
            assert (distances[:, layer] <= slots).sum() == hits(ids[:, layer].tolist(), slots)


def test_the_curve_of_a_trace_is_that_of_its_sequences(collected):
    trace = Trace.open(collected)
    found = trace_statistics(trace)
    assert found["reuse"]["slots"] == [1, 2, 3, 5]  # of 8 experts
    assert found["reuse"]["hit_rates"] == sorted(found["reuse"]["hit_rates"])
    expected, rows, sequences = [0, 0, 0, 0], 0, 0
    for shard in range(len(trace.manifest.shards)):
        sequence, _ = trace.places(shard)
        for number in sequence.unique():
            own = (sequence == number).nonzero().flatten()
            if len(own) < 50:  # of 100
                continue
            rows, sequences = rows + len(own), sequences + 1
            for layer in range(4):
                tokens = trace.column(shard, f"layers.{layer}.expert_ids")[own].tolist()
                expected = [before + hits(tokens, n) for before, n in zip(expected, (1, 2, 3, 5), strict=True)]
    assert (found["rows"]["reuse"], found["reuse"]["sequences"]) == (rows, sequences)
    assert found["reuse"]["hit_rates"] == pytest.approx([count / (rows * 4 * 2) for count in expected])
    some = reuse(trace, 1000)
    assert 700 <= some["rows"] <= 1300
    assert some["hit_rates"] == pytest.approx(found["reuse"]["hit_rates"], abs=0.05)


def test_balance_of_known_loads():
    assert balance(torch.tensor([5, 5, 5, 5])) == pytest.approx({"max_over_mean": 1, "entropy": 1, "idle": 0})
    assert balance(torch.tensor([20, 0, 0, 0])) == pytest.approx({"max_over_mean": 4, "entropy": 0, "idle": 3})
    half = balance(torch.tensor([10, 10, 0, 0]))
    assert half == pytest.approx({"max_over_mean": 2, "entropy": math.log(2) / math.log(4), "idle": 2})


def test_a_trace_is_told(collected):
    found = inspect(collected)
    text = " ".join(told(found).split())  # a long path breaks lines
    for rate in found["reuse"]["hit_rates"]:
        assert f"{rate:.3f}" in text
    for part in ("prefill", "0 input", "8,000", "right, all of them", "previous", "qwen3_moe with 4 layers", "idle"):
        assert part in text
    for entry in found["layers"]:
        assert f"{entry['hit_rate']['k']:.3f}" in text
        assert f"{entry['balance']['entropy']:.3f}" in text


def test_a_run_is_told(fitted):
    found = inspect(fitted)
    result = json.loads((fitted / "result.json").read_text())
    assert found["kind"] == "run"
    assert found["finished"]
    assert found["settings"]["width"] == 32
    assert [epoch["epoch"] for epoch in found["epochs"]] == [0, 1, 2]
    assert max(epoch["hit_rate"] for epoch in found["epochs"]) == pytest.approx(result["mean"]["predictor"], abs=1e-4)
    text = told(found)
    for entry in result["layers"]:
        assert f"{entry['predictor']['recall@k']:.3f}" in text


def test_a_run_that_was_stopped_is_told(fitted, tmp_path):
    run = shutil.copytree(fitted, tmp_path / "run")
    (run / "result.json").unlink()
    found = inspect(run)
    assert not found["finished"]
    assert len(found["epochs"]) == 3
    assert "not finished" in told(found)
    with pytest.raises(InspectError, match="no hit rates to draw yet"):
        plot(found, tmp_path / "figure.png")


def test_predictors_are_told(exported):
    found = inspect(exported)
    assert found["kind"] == "predictors"
    tensors = load_file(exported / "predictors.safetensors")
    for entry in found["layers"]:
        assert entry["width"] == 32
        own = [tensor for name, tensor in tensors.items() if name.startswith(f"layers.{entry['layer']}.")]
        assert own
        assert entry["bytes"] == sum(tensor.nbytes for tensor in own)
        assert entry["hit_rate"].keys() == {"training_free", "without_memory", "predictor"}
        assert entry["memory"] == 1
    assert found["bytes"] == sum(file.stat().st_size for file in exported.iterdir())
    text = told(found)
    assert "of layers 0, 1, 2" in text
    assert f"{found['bytes']:,}" in text


@pytest.mark.parametrize("kind", ["collected", "fitted", "exported"])
def test_the_command_writes_figures_and_json(kind, request, tmp_path, monkeypatch):
    folder = request.getfixturevalue(kind)
    picture, file = tmp_path / "figure.png", tmp_path / "found.json"
    arguments = ["inspect", str(folder), "--plot", str(picture), "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["predict-train", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert not exit_info.value.code
    assert json.loads(file.read_text())["layers"]
    with Image.open(picture) as image:
        assert image.width > 900
        assert len(set(image.convert("RGB").resize((200, 150)).get_flattened_data())) > 20


def test_expert_loads_are_drawn_in_the_order_of_layers_and_experts(collected, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn: list[Any] = []
    show = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda self, x, **kwargs: drawn.append(x) or show(self, x, **kwargs))
    found = inspect(collected)
    plot(found, tmp_path / "figure.png")
    shares = torch.tensor(drawn[0])
    torch.testing.assert_close(shares, torch.tensor([e["load"] for e in found["layers"]]) / 2000.0)


@pytest.mark.parametrize("break_it", ["truncate", "flip"])
def test_a_broken_shard_is_named_with_exit_code_2(copy, break_it, monkeypatch, capsys):
    shard = copy / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    if break_it == "truncate":
        del content[-100:]
    else:
        content[-10] ^= 1
    shard.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["predict-train", "inspect", str(copy)])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert "shard-00001.safetensors is broken" in error
    assert error.count("\n") == 1


def test_what_is_none_of_the_three_is_refused(tmp_path, tiny_moe_folder):
    (tmp_path / "file").write_text("text")
    for path, message in [
        (tmp_path / "nowhere", "nowhere does not exist"),
        (tmp_path / "file", "file is a file"),
        (tmp_path, "holds neither a trace, nor a run, nor predictors"),
        (tiny_moe_folder, "holds neither a trace, nor a run, nor predictors"),
    ]:
        with pytest.raises(InspectError, match=message):
            inspect(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", "{", r"manifest\.json"),
        ("shard-00000.safetensors", "", "unfinished trace"),
        ("predictors.safetensors", "", "holds no predictors"),
        ("config.json", '{"settings": {}, "trace": {}}', "holds no run of fit"),
        ("config.json", "[]", "holds neither"),
    ],
)
def test_a_broken_folder_is_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        inspect(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", [["--plot", "nowhere/x.png"], ["--json", "nowhere/x.json"], ["--plot", "x.doc"]])
def test_a_figure_that_can_not_be_written_is_refused_first(collected, option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["predict-train", "inspect", str(collected), *option])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 2
    output = capsys.readouterr()
    assert not output.out
    assert option[1] in output.err or "no folder nowhere" in output.err
