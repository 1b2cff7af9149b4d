"""Cross-entropy and hit rates under every policy, and generation with its figures."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from predict_train.predictors.architecture import moe_shape
from predict_train.predictors.checkpoint import Predictors, PredictorsError, TargetLayer
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.errors import UserError
from predict_train.predictors.mlp import ResidualMLP
from predict_train.runtime import offload_experts
from predict_train.runtime.generate import generate
from predict_train.runtime.measure.evaluate import evaluate
from predict_train.runtime.measure.settings import Evaluating
from predict_train.runtime.settings import Sampling
from transformers import PreTrainedModel, PreTrainedTokenizerFast


@pytest.fixture
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 256, (3, 16), generator=generator), torch.randint(1, 256, (1, 5), generator=generator)]


@pytest.fixture
def predictors(tiny_moe: PreTrainedModel) -> Predictors:
    """Predictors for layers 1 and 2 that change what is speculated, and default vectors."""
    torch.manual_seed(0)
    layers = find_moe_layers(tiny_moe)
    trained = [TargetLayer(index, mlp=ResidualMLP(32, 8, 8).requires_grad_(False)) for index in (1, 2)]
    for layer in trained:
        layer.mlp.w2.normal_()
    return Predictors(
        model={"name": "tiny"} | moe_shape(tiny_moe.config, layers),
        layers=trained,
        default_vectors={layer.index: torch.randn(8, 32) for layer in layers[:-1]},
    )


def test_exact_policies_lose_nothing_and_the_control_is_one(
    tiny_moe: PreTrainedModel, batches: list[torch.Tensor], predictors: Predictors
) -> None:
    result = evaluate(tiny_moe, batches, predictors)
    assert result["tokens"] == 3 * 15 + 4
    with torch.no_grad():
        losses = [tiny_moe(batch, labels=batch).loss.item() * batch[:, 1:].numel() for batch in batches]
    assert result["cross_entropy"]["full"] == pytest.approx(sum(losses) / result["tokens"], rel=1e-5)
    for table in ("cross_entropy", "training_free_cross_entropy"):
        entropies = result[table]
        assert list(entropies) == [
            "full", "on_demand", "prefetch", "speculative/speculated", "speculative/true", "speculative/resident",
        ]  # fmt: skip
        assert entropies["on_demand"] == pytest.approx(entropies["full"], rel=1e-6)
        assert entropies["prefetch"] == pytest.approx(entropies["full"], rel=1e-6)
        assert entropies["speculative/speculated"] != pytest.approx(entropies["full"], rel=1e-6)
    assert [row["layer"] for row in result["layers"]] == [0, 1, 2, 3]
    assert all(row["control"] == 1.0 for row in result["layers"])
    assert [row["predictor"] is None for row in result["layers"]] == [True, False, False, True]
    assert all(row["predictor"] != row["training_free"] for row in result["layers"][1:3])
    key = "speculative/true"
    assert result["cross_entropy"][key] != result["training_free_cross_entropy"][key]


def test_a_predictor_with_zeroed_output_is_training_free(
    tiny_moe: PreTrainedModel, batches: list[torch.Tensor], predictors: Predictors
) -> None:
    zeroed = dataclasses.replace(
        predictors, layers=[TargetLayer(index, mlp=ResidualMLP(32, 8, 8)) for index in range(4)]
    )
    result = evaluate(tiny_moe, batches, zeroed)
    assert result["cross_entropy"] == result["training_free_cross_entropy"]
    assert all(row["predictor"] == row["training_free"] for row in result["layers"])


def test_gating_resident_with_every_candidate_is_the_full_model(
    tiny_moe: PreTrainedModel, batches: list[torch.Tensor]
) -> None:
    entropies = evaluate(tiny_moe, batches, config=Evaluating(candidates=8))["cross_entropy"]
    assert entropies["speculative/resident"] == pytest.approx(entropies["full"], rel=1e-6)


def test_predictors_of_another_model_are_refused(
    tiny_moe: PreTrainedModel, batches: list[torch.Tensor], predictors: Predictors
) -> None:
    other = dataclasses.replace(predictors, model=predictors.model | {"num_experts": 64, "fingerprint": "0"})
    with pytest.raises(PredictorsError, match=r"64 experts.*8 experts"):
        evaluate(tiny_moe, batches, other)
    with pytest.raises(PredictorsError, match="64 experts"):
        offload_experts(tiny_moe, other)


def test_no_text_is_refused(tiny_moe: PreTrainedModel) -> None:
    with pytest.raises(UserError, match="no text"):
        evaluate(tiny_moe, [torch.ones(1, 1, dtype=torch.long)])


def test_generation_streams_the_models_own_tokens(
    tiny_moe: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_moe.generation_config.eos_token_id = None
    ids = tokenizer("The river", return_tensors="pt")["input_ids"]
    expected = tiny_moe.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    offload_experts(tiny_moe, policy="prefetch", slots=6)
    pieces: list[str] = []
    result = generate(tiny_moe, tokenizer, "The river", Sampling(max_new_tokens=12), on_text=pieces.append)
    assert result.token_ids == expected[0, ids.shape[1] :].tolist()
    assert "".join(pieces).rstrip("\n") == result.text.rstrip("\n")
    assert result.counters.tokens == 11, "the first token is the prompt's"
    assert result.bytes_per_token == result.counters.bytes_copied / 11
    assert result.seconds_to_first_token > 0
    assert result.seconds_per_output_token is not None


def test_an_empty_prompt_is_refused(tiny_moe: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="prompt is empty"):
        generate(tiny_moe, tokenizer, "")
