"""Probabilities of candidates: what is fitted keeps its promise on other rows, and means what it says."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from predict_train.predictors.architecture import moe_shape
from predict_train.predictors.checkpoint import Predictors, TargetLayer, load_predictors, save_predictors
from predict_train.predictors.confidence import Confidence, margins
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.metrics import Calibration
from predict_train.runtime.measure.evaluate import evaluate
from predict_train.train.calibration import fit_confidence
from transformers import PreTrainedModel

confidences = st.builds(
    Confidence, st.floats(0.05, 20), st.floats(-2, 2), least=st.floats(0, 0.2), most=st.floats(0.8, 1)
)


def error_of(confidence: Confidence, found: torch.Tensor, right: torch.Tensor) -> float:
    measured = Calibration(1)
    measured.update(confidence.probabilities(found)[None], right[None])
    return float(measured.compute().error())


@given(confidences, st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_what_is_fitted_holds_on_rows_drawn_from_the_same(true: Confidence, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = 3 * true.temperature * torch.randn(2, 8000, 6, generator=generator)
    right = torch.rand(found.shape, generator=generator) < true.probabilities(found)
    fitted = fit_confidence(found[0], right[0])
    assert fitted.temperature > 0
    assert 0 <= fitted.least <= fitted.most <= 1
    assert error_of(fitted, found[1], right[1]) < 0.02
    # Scores of another scale are the same guesses.
    other = fit_confidence(100 * found[0], right[0])
    torch.testing.assert_close(other.probabilities(100 * found[1]), fitted.probabilities(found[1]), atol=0.01, rtol=0)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_guesses_that_are_all_right_or_all_wrong_have_a_confidence_too(share: float) -> None:
    found = torch.randn(500, 4)
    fitted = fit_confidence(found, torch.full(found.shape, bool(share)))
    assert (fitted.probabilities(found) - share).abs().max() < 0.02
    same = fit_confidence(torch.zeros(500, 4), torch.arange(2000).view(500, 4) % 2 == 0)
    assert float(same.probabilities(torch.zeros(1))) == pytest.approx(0.5, abs=0.02)


@given(confidences, st.floats(-1e6, 1e6))
def test_one_number_is_turned_into_what_a_tensor_is(confidence: Confidence, margin: float) -> None:
    expected = float(confidence.probabilities(torch.tensor(margin, dtype=torch.float64)))
    assert confidence.probability(margin) == pytest.approx(expected, abs=1e-9)


@given(st.integers(0, 1000), st.floats(-50, 50))
def test_the_border_lies_between_the_chosen_and_the_others(seed: int, shift: float) -> None:
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))
    found = margins(logits, logits.topk(6).indices, 3)
    assert (found[:, :3] > 0).all()
    assert (found[:, 3:] < 0).all()
    torch.testing.assert_close(margins(logits + shift, logits.topk(6).indices, 3), found, atol=1e-4, rtol=1e-4)


def test_a_confidence_is_saved_loaded_and_measured_by_evaluate(tiny_moe: PreTrainedModel, tmp_path) -> None:
    layers = find_moe_layers(tiny_moe)
    made = Predictors(
        model={"name": "tiny"} | moe_shape(tiny_moe.config, layers),
        layers=[TargetLayer(1, 0, confidence=Confidence(0.3, -0.1, 0.01, 0.97, 0.02)), TargetLayer(2, 1)],
        default_vectors={layer.index: torch.zeros(8, 32) for layer in layers[:-1]},
    )
    loaded = load_predictors(save_predictors(tmp_path / "made", made, "A card.\n"), tiny_moe)
    assert [entry.confidence for entry in loaded.layers] == [entry.confidence for entry in made.layers]
    ids = [torch.randint(1, 256, (2, 40), generator=torch.Generator().manual_seed(0))]
    found = [row["calibration_error"] for row in evaluate(tiny_moe, ids, loaded)["layers"]]
    assert [error is None for error in found] == [True, False, True, True]
    sure = dataclasses.replace(made, layers=[TargetLayer(1, 0, confidence=Confidence(1, 0, 1.0, 1.0))])
    [error] = [row for row in evaluate(tiny_moe, ids, sure)["layers"] if row["layer"] == 1]
    # Where every candidate has the probability 1, the error is the share of wrong ones.
    assert error["calibration_error"] == pytest.approx(1 - error["training_free"])
