"""configs/: every file is a valid collection, of a model of its own, and says how large its trace is."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import IS_OLDER_RELEASE
from predict_train.data_collection.columns import column_shapes
from predict_train.data_collection.manifest import LayerEntry, Manifest, ModelEntry, ShardEntry
from predict_train.data_collection.settings import CollectConfig
from predict_train.predictors.settings import load_config

from benchmarks.field import shapes_of

FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))
SHAPES = {
    "deepseek-v2-lite": (range(1, 27), 2048, 64, 6),
    "deepseek-v4-flash": (range(43), 4096, 256, 6),
    "gemma-4-26b-a4b": (range(30), 2816, 128, 8),
    "glm-4.5-air": (range(1, 46), 4096, 128, 8),
    "gpt-oss-120b": (range(36), 2880, 128, 4),
    "gpt-oss-20b": (range(24), 2880, 32, 4),
    "mixtral-8x7b": (range(32), 4096, 8, 2),
    "olmoe-1b-7b": (range(16), 2048, 64, 8),
    "qwen3.5-35b-a3b": (range(40), 2048, 256, 8),
    "qwen3-30b-a3b": (range(48), 2048, 128, 8),
    "qwen3-next-80b-a3b": (range(48), 2048, 512, 10),
    "tiny-moe": (range(12), 128, 32, 4),
}
"""MoE layers, hidden size, experts, experts a token: from each model's own config.json."""


def bytes_per_token(name: str, targets: int) -> int:
    """Of a trace with the last `targets` MoE layers as targets, by the trace's own rule."""
    layers, hidden, experts, top_k = SHAPES[name]
    sources = dict(zip(layers, [None, *list(layers)[:-1]], strict=True))
    manifest = Manifest.model_construct(
        model=ModelEntry.model_construct(hidden_size=hidden, num_experts=experts, top_k=top_k),
        layers=[LayerEntry.model_construct(layer=layer, source=sources[layer]) for layer in list(layers)[-targets:]],
        shards=[ShardEntry.model_construct(rows=1)],
    )
    return sum(dtype.itemsize * (width or 1) for dtype, width in column_shapes(manifest).values())


OF_THE_FIELD = {
    "deepseek-v4-flash": "DeepSeek-V4-Flash",
    "gemma-4-26b-a4b": "Gemma-4-26B-A4B",
    "glm-4.5-air": "GLM-4.5-Air",
    "gpt-oss-120b": "gpt-oss-120b",
    "gpt-oss-20b": "gpt-oss-20b",
    "mixtral-8x7b": "Mixtral-8x7B",
    "qwen3.5-35b-a3b": "Qwen3.5-35B-A3B",
    "qwen3-next-80b-a3b": "Qwen3-Next-80B-A3B",
}
"""By config: the model in docs/models.md."""


@pytest.mark.skipif(IS_OLDER_RELEASE, reason="an older release of transformers has not all of these models")
@pytest.mark.parametrize(("name", "model"), OF_THE_FIELD.items())
def test_a_config_of_the_fields_models_says_what_plan_reads(name, model):
    shape, text = shapes_of(model)[0], (FOLDER / f"{name}.yaml").read_text()
    layers, _, experts, top_k = SHAPES[name]
    assert (shape.layers, shape.num_experts, shape.top_k) == (len(layers), experts, top_k)
    assert (
        f"experts of {shape.expert_bytes / 1e6:.0f} MB" in text
        or f"experts of {shape.expert_bytes / 1e6:.1f} MB" in text
    )
    whole = shape.resident_bytes + shape.expert_bytes * shape.layers * experts
    [said] = re.findall(r"# (\d+) GB in bfloat16", text)
    assert whole / 1e9 == pytest.approx(float(said), rel=0.05)


def load(file: Path) -> CollectConfig:
    return load_config(CollectConfig, file, {"out": Path("trace")})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_is_valid_and_says_what_its_trace_costs(file):
    config = load(file)
    text = file.read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 120
    layers, _, _, _ = SHAPES[file.stem]
    whole = bytes_per_token(file.stem, len(layers))
    assert f"{whole:,} bytes a token" in text
    total = whole * config.tokens
    assert f"{total / 1e9:.0f} GB" in text
    if config.layers == "auto":
        alone = bytes_per_token(file.stem, 1)
        assert f"{alone:,} bytes a token, {alone * config.tokens / 1e9:.1f} GB" in text


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_is_used_as_its_first_line_says(file):
    assert file.read_text().startswith(f"# predict-train collect --config configs/{file.name} ")


def test_each_config_is_of_another_model():
    assert {file.stem for file in FILES} == set(SHAPES)
    models = Counter(load(file).model for file in FILES)
    assert set(models.values()) == {1}


def test_every_value_is_commented_but_the_model():
    for file in FILES:
        for line in file.read_text(encoding="utf-8").splitlines():
            setting = re.match(r"(\w+):", line)
            if setting and setting[1] != "model":
                assert "#" in line, f"{file.name}: {line}"
