from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from data_collection.trace import Trace
from predictors.checkpoint import load_predictors, make_speculators
from predictors.discovery import find_moe_layers
from predictors.errors import UserError
from predictors.speculation import Routing
from train.export import export
from train.module import PredictorTraining
from train.targets import Target


@pytest.fixture
def exported(fitted: Path, tmp_path: Path) -> Path:
    return export(fitted, tmp_path / "predictors")


def speculate(model, predictors) -> dict[int, Routing]:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(5))
    speculators = make_speculators(model, load_predictors(predictors, model))
    with torch.no_grad():
        source = Routing(*find_moe_layers(model)[0].router(x))
        return {target: s(x, source if target else None) for target, s in speculators.items()}


SPECULATE_ELSEWHERE = """
import sys, torch
sys.path.insert(0, sys.argv[4])
from test_export import speculate
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
torch.save({target: tuple(routing) for target, routing in speculate(model, sys.argv[2]).items()}, sys.argv[3])
"""


def test_an_export_speculates_the_same_in_a_new_process(exported, tiny_moe, tiny_moe_folder, tmp_path):
    out = tmp_path / "elsewhere.pt"
    arguments = [str(tiny_moe_folder), str(exported), str(out), str(Path(__file__).parent)]
    subprocess.run([sys.executable, "-c", SPECULATE_ELSEWHERE, *arguments], check=True, cwd=Path(__file__).parents[1])
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
    targets = [Target(layer, source, 32, 0.0) for layer, source in trace.sources.items()]
    module = PredictorTraining(trace, targets, "kl", learning_rate=1e-3, weight_decay=0.0)
    module.load_state_dict(torch.load(fitted / result["checkpoint"], weights_only=True)["state_dict"])
    predictors = load_predictors(exported)
    state, layer = torch.randn(2, 4, 10, 32), None
    with torch.no_grad():
        mixture = torch.randn(4, 10, 8)
        expected = module.mlps(*state, mixture)
        for number, layer in enumerate(trace.sources):
            actual = predictors.mlps[layer](state[0, number], state[1, number], mixture[number])
            torch.testing.assert_close(actual, expected[number], rtol=1e-5, atol=1e-5)
    assert predictors.default_vectors.keys() == {0, 1, 2}
    for source, vectors in trace.default_vectors().items():
        assert torch.equal(vectors, predictors.default_vectors[source])
    assert predictors.hit_rates[2]["predictor"] == result["layers"][2]["predictor"]["recall@k"]
    top_k = predictors.model["top_k"]
    for entry in result["layers"]:
        curve = predictors.recall[entry["layer"]]
        assert len(curve) == top_k + 1
        assert curve == sorted(curve)
        assert (curve[0], curve[-1]) == (entry["predictor"]["recall@k"], entry["predictor"]["recall@2k"])
    assert predictors.hit_rates[2]["training_free"] == result["layers"][2]["training_free"]["recall@k"]


def test_the_model_card_has_front_matter_and_the_figures(exported, fitted):
    card = (exported / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "predict-train"
    for entry in json.loads((fitted / "result.json").read_text())["layers"]:
        assert f"| {entry['training_free']['recall@k']:.3f} | {entry['predictor']['recall@k']:.3f} |" in body
    provenance = json.loads((exported / "config.json").read_text())["provenance"]
    assert provenance["commands"].keys() == {"collect", "fit", "export"}
    assert "torch" in provenance["versions"]


def test_bfloat16_halves_the_file_and_loads(fitted, exported, tmp_path, tiny_moe):
    small = export(fitted, tmp_path / "small", dtype="bfloat16")
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
        export(tmp_path / "nowhere", out)
    unfinished = copy("unfinished")
    (unfinished / "result.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        export(unfinished, out)
    broken = copy("broken")
    checkpoint = broken / json.loads((broken / "result.json").read_text())["checkpoint"]
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(UserError, match="is missing or broken"):
        export(broken, out)
    with pytest.raises(UserError, match="there is no trace"):
        export(fitted, out, trace=tmp_path / "nowhere")
    other = shutil.copytree(collected, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["shards"][0]["xxh3"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is not the trace that"):
        export(fitted, out, trace=other)
    with pytest.raises(UserError, match="exists already"):
        export(fitted, exported)
    assert not out.exists()


def test_a_checkpoint_runs_no_code(fitted, tmp_path):
    run = shutil.copytree(fitted, tmp_path / "run")
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (ran,))

    torch.save({"state_dict": Evil()}, run / json.loads((run / "result.json").read_text())["checkpoint"])
    with pytest.raises(UserError, match="is missing or broken"):
        export(run, tmp_path / "out")
    assert not ran.exists()
