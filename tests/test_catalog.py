from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers
from conftest import IS_OLDER_RELEASE, skip_if_lacking
from predict_train.data_collection import catalog
from predict_train.data_collection.catalog import Support
from predict_train.predictors.discovery import find_moe_layers

LOOKED_AT = {
    # Its experts are rows of two embeddings, of a few thousand bytes each: there is nothing to gain from copying them one by one.
    "doge": "offload",
    # Its experts lie in two modules, which are called one after the other with rows that are sorted already.
    "jetmoe": "offload",
    # It runs its middle layers three times for a token, each time with what the run before has left. A trace has one row a layer
    # and token, and which layer comes next depends on the run.
    "inkling2_loop_text": "record",
}
"""The types that are refused, and the first ability that they lack. Look at a new one before it is entered here."""


@pytest.fixture(scope="module")
def supports() -> dict[str, Support]:
    """What `predict-train models` prints: every MoE type that the installed transformers lists for causal LM."""
    return {name: catalog.examine(name) for name in catalog.moe_types()}


@pytest.mark.timeout(600)
def test_every_type_that_is_refused_was_looked_at(supports):
    assert set(supports) == set(catalog.moe_types())
    refused = {}
    for name, support in supports.items():
        lacks = [ability for ability in ("offload", "record", "predict") if getattr(support, ability) is not None]
        if lacks:
            refused[name] = lacks[0]
            assert "\n" not in support.reason, name
            # A type of which not even a small model can be made is a gap of the catalog, not of the type.
            assert "small config" not in support.reason, (name, support.reason)
    if IS_OLDER_RELEASE:
        assert 3 * len(refused) <= len(supports), refused
    else:
        assert refused == {name: ability for name, ability in LOOKED_AT.items() if name in supports}


DIRECT = {
    # Their layers mix several residual streams, or convolve what the experts return, or add it later.
    *("deepseek_v4", "hy_v4", "inkling2_text", "longcat_flash", "qwen4_exp", "qwen4_exp_text"),
    # Their routers read the stream itself, and its sum with the experts' is normed once more.
    *("gemma4", "gemma4_text"),
    # Their routers return something else than logits, weights and ids, or read what the last layer's router has left.
    *("inkling_text", "llama4", "llama4_text", "zaya"),
}
"""The types whose experts can only be guessed by direct predictors."""


def test_a_type_that_could_be_followed_still_is(supports):
    found = {name for name, support in supports.items() if support.direct is not None}
    assert found - DIRECT - set(LOOKED_AT) == set()


def test_the_readme_says_what_the_walk_found(supports):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    tables = readme.split("<!-- models -->")[1].split("<!-- /models -->")[0].strip()
    if f"transformers {transformers.__version__}," not in tables:
        pytest.skip("the README was written with another version of transformers")
    assert tables == catalog.markdown(list(supports.values()))


@pytest.mark.parametrize(
    ("model_type", "remark"),
    [
        ("deepseek_v3", "bias-corrected selection"),
        ("qwen3_next", "gated shared expert"),
        ("qwen2_moe", "gated shared expert"),
        ("gpt_oss", "transposed experts"),
        ("flex_olmo", "no norm before the router"),
        ("afmoe", "norm after the experts"),
        ("cohere2_moe", "attention beside the experts"),
        ("nemotron_h", "experts in a space of their own"),
        ("jamba", "dense layers between"),
        ("minimax", "scaled residual"),
    ],
)
def test_what_is_special_about_a_type_is_seen(supports, model_type, remark):
    skip_if_lacking(model_type)
    assert supports[model_type].reason is None
    assert remark in supports[model_type].remarks


@pytest.mark.parametrize(
    "changes",
    [{"expert_scale": 1.1}, {"base_scale": 0.9}, {"shared_scale": 0.5}, {"post_norm": None}],
    ids=lambda changes: next(iter(changes)),
)
def test_the_check_sees_a_wrong_join(changes):
    model = catalog.tiny_model("afmoe")
    layers = find_moe_layers(model)
    wrong = [dataclasses.replace(layer, join=dataclasses.replace(layer.join, **changes)) for layer in layers]
    assert catalog.check(model, layers) is None
    assert "is not all of its output" in (catalog.check(model, wrong) or "")


def test_the_check_sees_a_router_without_its_arguments():
    model = catalog.tiny_model("minimax_m2")
    layers = find_moe_layers(model)
    other = tuple(torch.randn_like(tensor) for tensor in layers[0].router_arguments)
    wrong = [dataclasses.replace(layer, router_arguments=other) for layer in layers]
    assert catalog.check(model, layers) is None
    assert "choose other experts" in (catalog.check(model, wrong) or "")


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        # The layer before is an MoE layer; the first has none before it.
        ("mixtral", {0: None, 1: 0, 2: 1, 3: 2}),
        ("deepseek_v3", {1: None, 2: 1, 3: 2}),
        # The layer before is dense: all of its output is known, and the target reads its own input.
        ("jamba", {1: None, 3: None}),
        # Nothing runs between a layer's input and its router: only the MoE layer before is early enough.
        ("nemotron_h", {1: None, 3: 1}),
    ],
)
def test_the_source_is_the_last_layer_known_in_time(model_type, expected):
    from predict_train.predictors.architecture import sources

    skip_if_lacking(model_type)
    assert sources(find_moe_layers(catalog.tiny_model(model_type))) == expected
