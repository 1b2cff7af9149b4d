"""Files that were written yesterday load today: one export of each format version is kept in `tests/data`, never written again.

Each was written by the code of its own version. A change of what `export` writes needs a new one: raise `FORMAT_VERSION`, and
`python tests/test_formats.py` writes its folder.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from predict_train.predictors.checkpoint import (
    Predictors,
    TargetLayer,
    load_predictors,
    make_speculators,
    save_predictors,
)
from predict_train.predictors.confidence import Confidence
from predict_train.predictors.config import FORMAT_VERSION, READABLE
from predict_train.predictors.mlp import ResidualMLP
from predict_train.predictors.reuse import Reuse, ReusePredictors
from predict_train.predictors.routing import Routing
from safetensors.torch import load_file
from transformers import PreTrainedModel

DATA = Path(__file__).parent / "data"
HIDDEN, EXPERTS = 32, 8  # those of the model in the fixture `tiny_moe`
MODEL = {
    "name": "models/tiny-moe",
    "model_type": "qwen3_moe",
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "moe_layers": [0, 1, 2, 3],
    "num_experts": EXPERTS,
    "top_k": 2,
    "fingerprint": "96200ecc7f0aec919426ac4a995f1cceaa152c09b6f11a3faa3aabf75f5dc4ea",
}
PROVENANCE = {
    "commands": {"collect": "predict-train collect models/tiny-moe", "fit": "predict-train fit trace --out run"},
    "versions": {"python": "3.11.7", "torch": "2.13.0+cpu"},
    "trace": {"corpus": "a folder", "split": "train", "tokens": 8000},
    "settings": {"width": 3, "learning_rate": 0.005},
}


def ramp(first: int, *shape: int) -> torch.Tensor:
    """Values that no format rounds: eighths, from `first / 8` up to 16 of them."""
    return ((first + torch.arange(torch.Size(shape).numel()) % 16) / 8.0).reshape(shape)


def mlp(first: int, width: int, memory: int = 0) -> ResidualMLP:
    made = ResidualMLP(HIDDEN, EXPERTS, width, memory)
    shapes = {
        "w1": (width, HIDDEN), "v": (width, EXPERTS), "b1": (width,), "w2": (HIDDEN, width), "b2": (HIDDEN,),
    }  # fmt: skip
    if memory:
        shapes["u"] = (width, memory * 2 * EXPERTS)
    made.load_state_dict({name: ramp(first + number, *shape) for number, (name, shape) in enumerate(shapes.items())})
    return made.requires_grad_(False)


def reuse() -> Reuse:
    made = ReusePredictors(4, EXPERTS, 3).requires_grad_(False)
    for number, parameter in enumerate(made.parameters()):
        parameter.copy_(ramp(number - 6, *parameter.shape))
    return Reuse(made, [0, 1, 2, 3], [2, 4], {"lru": [0.25, 0.5], "learned": [0.25, 0.625]})


def of_version(version: int) -> Predictors:
    """What the folder of each version holds."""
    both = {
        "model": MODEL,
        "default_vectors": {source: ramp(source - 5, EXPERTS, HIDDEN) for source in (0, 1, 2)},
        "provenance": PROVENANCE,
    }
    if version == 2:
        return Predictors(
            layers=[
                TargetLayer(1, "nearest", mlp(-7, 3), {"training_free": 0.5, "predictor": 0.75}, [0.75, 0.875, 1.0]),
                # Of before recall was written.
                TargetLayer(3, "nearest", mlp(-2, 3), {"training_free": 0.875, "predictor": 0.9375}, []),
            ],
            **both,
        )
    if version >= 5:
        rates = {"training_free": 0.5, "without_memory": 0.75, "predictor": 0.875}
        layers = [
            TargetLayer(0, None, mlp(-7, 3, memory=1).bfloat16(), rates, [0.875, 0.875, 1.0]),
            TargetLayer(1, 0, mlp(4, 1), {"training_free": 0.625, "predictor": 0.6875}, [0.6875, 0.75, 0.75]),
            TargetLayer(2, 1, None, {"training_free": 0.875}, [0.875, 0.875, 0.9375]),
            TargetLayer(3, 1, mlp(-2, 2, memory=2), rates, []),
        ]
        if version > 5:
            sure = {0: Confidence(0.5, -0.25, 0.0, 0.875, 0.0625), 2: Confidence(2.0)}
            layers = [replace(entry, confidence=sure.get(entry.layer)) for entry in layers]
        return Predictors(layers=layers, reuse=reuse() if version > 6 else None, **both)
    return Predictors(
        layers=[
            TargetLayer(0, None, mlp(-7, 3).bfloat16(), {"training_free": 0.5, "predictor": 0.75}, [0.75, 0.875, 1.0]),
            TargetLayer(1, 0, mlp(4, 1).half(), {"training_free": 0.625, "predictor": 0.6875}, [0.6875, 0.75, 0.75]),
            TargetLayer(2, 1, None, {"training_free": 0.875}, [0.875, 0.875, 0.9375]),  # no predictor was better
            TargetLayer(3, 1, mlp(-2, 2), {"training_free": 0.5, "predictor": 0.9375}, []),
        ],
        **both,
    )


def assert_same(loaded: Predictors, expected: Predictors) -> None:
    for name in ("model", "provenance"):
        assert getattr(loaded, name) == getattr(expected, name), name
    assert loaded.training_free().layers == expected.training_free().layers
    assert [entry.confidence for entry in loaded.layers] == [entry.confidence for entry in expected.layers]
    assert loaded.mlps.keys() == expected.mlps.keys()
    for target, made in expected.mlps.items():
        found = dict(loaded.mlps[target].named_parameters())
        for name, parameter in made.named_parameters():
            assert found[name].dtype == torch.float32
            assert not found[name].requires_grad
            assert torch.equal(found[name], parameter.float()), (target, name)
    assert loaded.default_vectors.keys() == expected.default_vectors.keys()
    for source, vectors in expected.default_vectors.items():
        assert torch.equal(loaded.default_vectors[source], vectors)
    assert (loaded.reuse is None) == (expected.reuse is None)
    if loaded.reuse is not None and expected.reuse is not None:
        assert loaded.reuse[1:] == expected.reuse[1:]
        made, found = (some.reuse.predictors.state_dict() for some in (expected, loaded) if some.reuse is not None)
        assert all(torch.equal(found[name], tensor) for name, tensor in made.items())


@pytest.mark.parametrize("version", READABLE)
def test_an_export_of_every_version_loads(version: int, tiny_moe: PreTrainedModel) -> None:
    loaded = load_predictors(DATA / f"export-{version}", tiny_moe)
    assert_same(loaded, of_version(version))
    assert loaded.mlps[3].width == (3 if version == 2 else 2)
    source = Routing(torch.zeros(5, EXPERTS), torch.full((5, 2), 0.5), torch.tensor([[0, 3]] * 5))
    for target, speculator in make_speculators(tiny_moe, loaded).items():
        routing = speculator(ramp(0, 5, HIDDEN), source if target else None)
        assert routing.ids.shape == (5, 2)


def test_reuse_predictors_of_version_6_are_left_out() -> None:
    """What they read was another thing. Everything beside them loads."""
    assert_same(load_predictors(DATA / "export-6-reuse"), of_version(6))


def test_what_is_written_today_is_the_kept_export(tmp_path: Path) -> None:
    """No change of the format goes by without a new version."""
    folder = save_predictors(tmp_path / "now", of_version(FORMAT_VERSION), card="A card.\n")
    kept = DATA / f"export-{FORMAT_VERSION}"
    assert sorted(file.name for file in folder.iterdir()) == sorted(file.name for file in kept.iterdir())
    for name in ("config.json", "README.md"):
        assert (folder / name).read_text() == (kept / name).read_text()
    now, then = (load_file(path / "predictors.safetensors") for path in (folder, kept))
    assert {name: tensor.dtype for name, tensor in now.items()} == {name: tensor.dtype for name, tensor in then.items()}
    assert all(torch.equal(tensor, then[name]) for name, tensor in now.items())


if __name__ == "__main__":
    folder = save_predictors(DATA / f"export-{FORMAT_VERSION}", of_version(FORMAT_VERSION), card="A card.\n")
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()):,} bytes", file=sys.stderr)
