from __future__ import annotations

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import exit_code
from huggingface_hub import CommitOperationAdd, ModelCard
from predict_train.data_collection.examples import make_batch
from predict_train.data_collection.trace import Trace
from predict_train.predictors.checkpoint import load_predictors, make_speculators
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.errors import UserError
from predict_train.predictors.files import sealed
from predict_train.predictors.forms import Form
from predict_train.predictors.metrics import HitRate
from predict_train.predictors.routing import Routing
from predict_train.runtime import offloaded
from predict_train.train.data import held_out_sequences
from predict_train.train.export import export, predictors_in
from predict_train.train.fit import FitConfig, fit
from predict_train.train.inspection import inspect, report
from predict_train.train.module import PredictorTraining
from predict_train.train.settings import ExportConfig
from predict_train.train.targets import Target
from rich.console import Console
from safetensors.torch import load_file
from test_offload import greedy, prompt
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures("undrawn")

QUIET = Console(quiet=True)


def speculate(model, predictors) -> dict[int, Routing]:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(5))
    speculators = make_speculators(model, load_predictors(predictors, model))
    with torch.no_grad():
        source = Routing(*find_moe_layers(model)[0].router(x))
        return {target: s(x, source if target else None) for target, s in speculators.items()}


def speculate_elsewhere(folder: Path, predictors: Path, out: Path) -> None:
    """The job of a new process."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.save({target: tuple(routing) for target, routing in speculate(model, predictors).items()}, out)


def test_an_export_speculates_the_same_in_a_new_process(exported, tiny_moe, tiny_moe_folder, tmp_path, forkserver):
    out = tmp_path / "elsewhere.pt"
    assert exit_code(forkserver, speculate_elsewhere, tiny_moe_folder, exported, out) == 0
    there = torch.load(out, weights_only=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = speculate(tiny_moe, exported)
    finally:
        torch.set_num_threads(threads)
    assert there.keys() == here.keys() == {0, 1, 2, 3}
    for target, routing in here.items():
        assert all(torch.equal(a, b) for a, b in zip(routing, there[target], strict=True))


def test_an_export_is_what_was_trained(exported, fitted, collected):
    result = json.loads((fitted / "result.json").read_text())
    trace = Trace.open(collected)
    targets = [Target(layer, source, 32) for layer, source in trace.sources.items()]
    module = PredictorTraining(trace, targets, "kl", learning_rate=1e-3, weight_decay=0.0, memory=1)
    module.load_state_dict(torch.load(fitted / result["checkpoint"], weights_only=True)["state_dict"])
    predictors = load_predictors(exported)
    state, layer = torch.randn(2, 4, 10, 32), None
    with torch.no_grad():
        mixture, memory = torch.randn(4, 10, 8), torch.randn(4, 10, 16)
        expected = module.mlps(*state, mixture, memory)
        for number, layer in enumerate(trace.sources):
            actual = predictors.mlps[layer](state[0, number], state[1, number], mixture[number], memory[number])
            torch.testing.assert_close(actual, expected[number], rtol=1e-5, atol=1e-5)
    assert predictors.default_vectors.keys() == {0, 1, 2}
    for source, vectors in trace.default_vectors().items():
        assert torch.equal(vectors, predictors.default_vectors[source])
    assert predictors.of(2).hit_rates["predictor"] == result["layers"][2]["predictor"]["recall@k"]
    top_k = predictors.model["top_k"]
    for entry in result["layers"]:
        curve = predictors.of(entry["layer"]).recall
        assert len(curve) == top_k + 1
        assert curve == sorted(curve)
        assert (curve[0], curve[-1]) == (entry["predictor"]["recall@k"], entry["predictor"]["recall@2k"])
    assert predictors.of(2).hit_rates["training_free"] == result["layers"][2]["training_free"]["recall@k"]


def test_the_model_card_has_front_matter_and_the_figures(exported, fitted):
    card = ModelCard.load(exported / "README.md")
    assert card.data.library_name == "predict-train"
    assert card.data.base_model is None  # the model is a folder here, and the Hub takes names only
    config = json.loads((exported / "config.json").read_text())
    tensors = load_file(exported / "predictors.safetensors")
    lines = card.text.split("## What to keep")[0].splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    assert table[0] == [
        "layer", "source", "width", "bytes", "training-free", "without memory", "predictor", "gap closed", "top 4",
        "ECE",
    ]  # fmt: skip
    for entry, row in zip(json.loads((fitted / "result.json").read_text())["layers"], table[2:-1], strict=True):
        before, after = entry["training_free"]["recall@k"], entry["predictor"]["recall@k"]
        size = sum(w.nbytes for name, w in tensors.items() if name.startswith(f"layers.{entry['layer']}."))
        source = "its input" if entry["source"] is None else str(entry["source"])
        closed = f"{(after - before) / (1 - before):.0%}"
        alone = entry["without_memory"]["recall@k"]
        expected = [source, "32", f"{size:,}", f"{before:.3f}", f"{alone:.3f}", f"{after:.3f}", closed]
        error = config["layers"][entry["layer"]]["confidence"]["error"]
        assert row == [str(entry["layer"]), *expected, f"{entry['predictor']['recall'][-1]:.3f}", f"{error:.4f}"]
    total = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("layers."))
    assert table[-1][:4] == ["all", "", "", f"{total:,}"]
    vectors, reuse = (
        sum(w.nbytes for name, w in tensors.items() if name.startswith(part)) for part in ("default_vectors.", "reuse.")
    )
    assert total + vectors + reuse == sum(w.nbytes for w in tensors.values())
    assert f"another {vectors:,} bytes" in card.text
    assert f"{reuse:,} bytes" in card.text
    provenance = config["provenance"]
    assert provenance["commands"].keys() == {"collect", "fit", "export"}
    assert all(command in card.text for command in provenance["commands"].values())
    assert all(f"{name} {version}" in card.text for name, version in provenance["versions"].items())


def test_a_model_of_the_hub_is_named_as_the_base(fitted, collected, tmp_path):
    trace = shutil.copytree(collected, tmp_path / "trace")
    manifest = json.loads((trace / "manifest.json").read_text())
    manifest["model"]["name"] = "Qwen/Qwen3-30B-A3B"
    (trace / "manifest.json").write_text(json.dumps(sealed(manifest)))
    folder = export(ExportConfig(run=fitted, out=tmp_path / "out", trace=trace))
    assert ModelCard.load(folder / "README.md").data.base_model == "Qwen/Qwen3-30B-A3B"


def test_the_code_in_the_model_card_runs(exported, capsys):
    code = (exported / "README.md").read_text().split("```python")[1].split("```")[0]
    assert "FOLDER_OR_HUB_NAME" in code
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER_OR_HUB_NAME", str(exported)), names)
    names["model"].expert_offload.detach()
    assert "The three laws are" in capsys.readouterr().out


def test_the_folder_can_be_uploaded_as_it_is(exported):
    files = sorted(exported.iterdir())
    assert [file.name for file in files] == ["README.md", "config.json", "predictors.safetensors"]
    for file in files:
        addition = CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file)
        assert addition.upload_info.size == file.stat().st_size > 0
        assert file.stat().st_mode & 0o044 == (exported / "README.md").stat().st_mode & 0o044


def test_a_predictor_that_is_no_better_than_none_is_dropped(fitted, tiny_moe, tmp_path):
    """Of layer 1 it is worse than training-free speculation, of layer 3 as good."""
    run = shutil.copytree(fitted, tmp_path / "run")
    result = json.loads((run / "result.json").read_text())
    worse, same = (result["layers"][target] for target in (1, 3))
    worse["predictor"]["recall"] = [rate / 2 for rate in worse["training_free"]["recall"]]
    worse["predictor"]["recall@k"] = worse["predictor"]["recall"][0]
    same["predictor"] = same["training_free"]
    (run / "result.json").write_text(json.dumps(sealed(result)))
    console = Console(record=True, quiet=False, file=StringIO(), width=120)
    folder = export(ExportConfig(run=run, out=tmp_path / "out"), console)
    told, card = console.export_text(), (folder / "README.md").read_text()
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "predictors.safetensors")
    assert [entry["width"] for entry in config["layers"]] == [32, 0, 32, 0]
    assert {name.split(".")[1] for name in tensors if name.startswith("layers.")} == {"0", "2"}
    for entry, kept in zip(result["layers"], (True, False, True, False), strict=True):
        written = config["layers"][entry["layer"]]
        assert written["source"] == entry["source"]
        assert written["recall"] == entry["predictor" if kept else "training_free"]["recall"]
        assert written["hit_rate"].keys() == (
            {"training_free", "without_memory", "predictor"} if kept else {"training_free"}
        )
        figure = f"{entry['predictor']['recall@k']:.3f}{'' if kept else ', dropped'}"
        assert f"| {figure} |" in card
        assert figure in told
    for text in (card, told):
        assert "the predictors of layers 1, 3" in text
    loaded = load_predictors(folder, tiny_moe)
    assert {target: s.mlp is not None for target, s in make_speculators(tiny_moe, loaded).items()} == {
        0: True, 1: False, 2: True, 3: False,
    }  # fmt: skip
    assert "none" in told_of(folder)


def told_of(folder: Path) -> str:
    console = Console(record=True, quiet=False, file=StringIO(), width=120)
    report(inspect(folder), console)
    return console.export_text()


def test_a_run_that_learned_nothing_is_exported_without_predictors(collected, tiny_moe, tmp_path):
    idle = FitConfig(trace=collected, out=tmp_path / "run", width=8, epochs=1, learning_rate=1e-20, device="cpu")
    run = fit(idle, Console(quiet=True))
    for dtype in ("float32", "bfloat16"):
        loaded = load_predictors(export(ExportConfig(run=run, out=tmp_path / dtype, dtype=dtype)), tiny_moe)
        assert loaded.mlps == {}
        assert loaded.default_vectors.keys() == {0, 1, 2}
        assert [list(layer.hit_rates) for layer in loaded.layers] == [["training_free"]] * 4


def test_the_cost_of_rounding_is_measured_on_validation_rows(fitted, collected, tmp_path):
    console = Console(record=True, quiet=False, file=StringIO(), width=200)
    folder = export(ExportConfig(run=fitted, out=tmp_path / "small", dtype="bfloat16"), console)
    trace, mlps = Trace.open(collected), load_predictors(folder).mlps
    chosen = json.loads((fitted / "config.json").read_text())["settings"]
    held_out = held_out_sequences(trace.manifest.sequences, chosen["validation"], chosen["seed"])
    metric, wirings, rows = HitRate(4), trace.wirings(), 0
    for shard in range(len(trace.manifest.shards)):
        own = held_out[trace.column(shard, "sequence").long()].nonzero().flatten()
        names = trace.columns_for(trace.sources, memory=1)
        batch = make_batch(trace.read(shard, own, names), trace.sources, trace.stacked(), memory=1)
        with torch.no_grad():
            ids = [
                batch.speculated(n, mlps[target], wirings[target].router).ids for n, target in enumerate(trace.sources)
            ]
        metric.update(torch.stack(ids), batch.ids)
        rows += len(own)
    result = [entry["predictor"]["recall@k"] for entry in json.loads((fitted / "result.json").read_text())["layers"]]
    before, after = sum(result) / 4, sum(metric.rates()) / 4
    sentence = f"hit rate from {before:.5f} to {after:.5f} ({after - before:+.5f})"
    differences = [f"{now - then:+.4f}" for now, then in zip(metric.rates(), result, strict=True)]
    for text in (console.export_text(), (folder / "README.md").read_text()):
        assert sentence in text
        assert f"on {rows:,} validation rows" in text
        assert all(difference in text for difference in differences)
    assert "Rounding" not in (export(ExportConfig(run=fitted, out=tmp_path / "whole")) / "README.md").read_text()


def test_a_run_of_before_there_was_a_memory_is_resumed_and_exported(collected, tmp_path):
    settings = FitConfig(trace=collected, out=tmp_path / "run", width=8, epochs=1, memory=0, device="cpu")
    run = fit(settings, Console(quiet=True))
    config = json.loads((run / "config.json").read_text())
    del config["settings"]["memory"]
    (run / "config.json").write_text(json.dumps(sealed(config)))
    with pytest.raises(UserError, match="was started with memory 0, not 1"):
        fit(settings.model_copy(update={"memory": 1, "resume": True}), Console(quiet=True))
    fit(settings.model_copy(update={"resume": True}), Console(quiet=True))
    folder = export(ExportConfig(run=run, out=tmp_path / "out", dtype="bfloat16"))
    assert {mlp.memory for mlp in load_predictors(folder).mlps.values()} == {0}
    assert "without memory" not in told_of(folder).replace("\n", " ")


def test_bfloat16_halves_the_file_and_loads(fitted, exported, tmp_path, tiny_moe):
    small = export(ExportConfig(run=fitted, out=tmp_path / "small", dtype="bfloat16"))
    tensors = load_file(small / "predictors.safetensors")
    assert tensors["layers.0.w1"].dtype == torch.bfloat16
    assert tensors["default_vectors.0"].dtype == torch.float32
    assert load_file(exported / "predictors.safetensors")["layers.0.w1"].dtype == torch.float32
    same = [
        (a.ids == b.ids).float().mean().item()
        for a, b in zip(speculate(tiny_moe, small).values(), speculate(tiny_moe, exported).values(), strict=True)
    ]
    assert min(same) > 0.9


def test_what_can_not_be_exported_is_refused_with_nothing_written(fitted, exported, collected, tmp_path):
    out = tmp_path / "out"

    def copy(name: str) -> Path:
        return shutil.copytree(fitted, tmp_path / name)

    with pytest.raises(UserError, match="holds no run"):
        export(ExportConfig(run=tmp_path / "nowhere", out=out))
    unfinished = copy("unfinished")
    (unfinished / "result.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        export(ExportConfig(run=unfinished, out=out))
    broken = copy("broken")
    checkpoint = broken / json.loads((broken / "result.json").read_text())["checkpoint"]
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(UserError, match="is missing or broken"):
        export(ExportConfig(run=broken, out=out))
    with pytest.raises(UserError, match="there is no trace"):
        export(ExportConfig(run=fitted, out=out, trace=tmp_path / "nowhere"))
    other = shutil.copytree(collected, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["shards"][0]["xxh3"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(sealed(manifest)))
    with pytest.raises(UserError, match="is not the trace that"):
        export(ExportConfig(run=fitted, out=out, trace=other))
    with pytest.raises(UserError, match="exists already"):
        export(ExportConfig(run=fitted, out=exported))
    assert not out.exists()


def test_of_two_runs_each_layer_is_that_which_validates_better(fitted, collected, tiny_moe, tmp_path):
    config = FitConfig(
        trace=collected,
        out=tmp_path / "direct",
        form="direct",
        layers=[1, 2],
        width=32,
        epochs=3,
        reuse=False,
        device="cpu",
    )
    runs = {Form.CORRECTING: fitted, Form.DIRECT: fit(config, QUIET)}
    results = {form: json.loads((run / "result.json").read_text()) for form, run in runs.items()}
    rates = {
        form: {entry["layer"]: entry["predictor"]["recall@k"] for entry in result["layers"]}
        for form, result in results.items()
    }
    for form, other in (tuple(Form), tuple(Form)[::-1]):  # one of them takes over a layer of the other
        found = load_predictors(
            export(ExportConfig(run=runs[form], also=runs[other], out=tmp_path / f"from-{form}"), QUIET), tiny_moe
        )
        assert [entry.layer for entry in found.layers] == list(rates[form])
        for entry in found.layers:
            own = {kind: rates[kind][entry.layer] for kind in Form if entry.layer in rates[kind]}
            assert entry.mlp is None or entry.mlp.form is max(own, key=own.__getitem__)
            assert entry.mlp is None or entry.hit_rates["predictor"] == max(own.values())
    otherwise = fit(config.model_copy(update={"out": tmp_path / "seed", "seed": 1, "epochs": 1}), QUIET)
    with pytest.raises(UserError, match=r"was trained with seed 0 and .* with 1, so their layers can't be compared"):
        export(ExportConfig(run=fitted, also=otherwise, out=tmp_path / "out"))
    # A model runs with both forms.
    mlps = predictors_in(
        runs[Form.DIRECT] / results[Form.DIRECT]["checkpoint"], {1: 32, 2: 32}, 1, Trace.open(collected), Form.DIRECT
    )
    every = load_predictors(tmp_path / "from-correcting", tiny_moe)
    mixed = replace(every, layers=[replace(own, mlp=mlps.get(own.layer, own.mlp)) for own in every.layers])
    assert all(entry.mlp is None for entry in mixed.training_free().layers)
    expected = greedy(tiny_moe, prompt(1, 9), 6)
    with offloaded(tiny_moe, mixed, policy="prefetch", slots=6, device="cpu") as offload:
        assert torch.equal(greedy(tiny_moe, prompt(1, 9), 6), expected)
        assert offload.counters.speculation_hit_rate is not None


def test_a_checkpoint_runs_no_code(fitted, tmp_path):
    run = shutil.copytree(fitted, tmp_path / "run")
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (ran,))

    torch.save({"state_dict": Evil()}, run / json.loads((run / "result.json").read_text())["checkpoint"])
    with pytest.raises(UserError, match="is missing or broken"):
        export(ExportConfig(run=run, out=tmp_path / "out"))
    assert not ran.exists()
