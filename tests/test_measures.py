from __future__ import annotations

import math
from collections import Counter
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from predict_train.predictors.metrics import Calibration, ExpertRecall, among, probability_of_choice
from predict_train.predictors.routing import Routing
from predict_train.predictors.speculation import candidates
from predict_train.train.measures import Measures

KINDS = ("training_free", "predictor")
LAYERS, EXPERTS, TOP_K = 2, 8, 3


def rows(tokens: int, seed: int) -> tuple[list[Routing], torch.Tensor]:
    """Speculated routings of two layers, and the true experts, which are near to them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(LAYERS, tokens, EXPERTS, generator=generator)
    ids = (logits + 0.5 * torch.randn(logits.shape, generator=generator)).topk(TOP_K).indices
    weights, chosen = logits.softmax(-1).topk(TOP_K)
    return [Routing(*parts) for parts in zip(logits, weights, chosen, strict=True)], ids


@given(tokens=st.integers(1, 20), seed=st.integers(0, 1000))
def test_recall_by_expert_is_that_of_counting(tokens, seed):
    routings, ids = rows(tokens, seed)
    metric = ExpertRecall(LAYERS, EXPERTS)
    found = torch.stack([routing.ids for routing in routings])
    for half in (slice(0, tokens // 2), slice(tokens // 2, None)):
        metric.update(found[:, half], ids[:, half])
    for layer, recall in enumerate(metric.compute().tolist()):
        chosen, hits = Counter(), Counter()
        for guess, true in zip(found[layer].tolist(), ids[layer].tolist(), strict=True):
            chosen.update(true)
            hits.update(set(true) & set(guess))
        for expert in range(EXPERTS):
            if chosen[expert]:
                assert recall[expert] == pytest.approx(hits[expert] / chosen[expert])
            else:
                assert math.isnan(recall[expert])


def test_a_probability_is_the_share_of_right_candidates_where_truth_is_drawn_from_it():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 20_000, EXPERTS, generator=generator)
    found = logits.topk(6).indices
    probability = probability_of_choice(logits, found, TOP_K)
    assert ((probability > 0.5).sum(-1) == TOP_K).all()
    # Experts in the order of their chance, but never more than three: draw until just three of the six are right.
    drawn = torch.rand(probability.shape, generator=generator) < probability
    fits = drawn.sum(-1) == TOP_K
    true = found[fits].gather(-1, drawn[fits].long().topk(TOP_K).indices)
    metric = Calibration(1)
    right = among(found[fits], true, EXPERTS)[None]
    metric.update(probability[fits][None], right)
    curve = metric.compute()
    assert curve.candidates.sum() == 6 * fits.sum()
    assert float(metric.compute().error()) < 0.06
    full = curve.candidates[0] > 100
    assert (curve.right[0, full].diff() > -0.05).all()
    # Scores twice as far apart promise more than they hold.
    bold = Calibration(1)
    bold.update(probability_of_choice(3 * logits[fits], found[fits], TOP_K)[None], right)
    assert float(bold.compute().error()) > float(curve.error()) + 0.05


@given(st.floats(-50, 50), st.integers(0, 100))
def test_the_probability_of_a_candidate_depends_on_differences_of_logits_only(shift, seed):
    routings, _ = rows(5, seed)
    found = candidates(routings[0], 6)
    before, after = (probability_of_choice(routings[0].logits + by, found, TOP_K) for by in (0.0, shift))
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)
    assert (probability_of_choice(routings[0].logits, found[:, :TOP_K], TOP_K) == 1).all()


def test_diverged_logits_are_counted_and_do_not_stop_a_validation():
    routings, ids = rows(7, 0)
    broken = [routing._replace(logits=torch.full_like(routing.logits, torch.nan)) for routing in routings]
    measures = Measures(LAYERS, TOP_K, EXPERTS)
    for kind in KINDS:
        measures.update(kind, broken, ids)
    assert measures.compute()["predictor"].calibration.candidates.sum() == LAYERS * 7 * 6


def test_what_is_measured_agrees_with_itself_and_is_forgotten():
    measures = Measures(LAYERS, TOP_K, EXPERTS)
    for seed in range(3):
        routings, ids = rows(50, seed)
        measures.update("training_free", routings, ids)
        measures.update(
            "predictor", [routing._replace(ids=true) for routing, true in zip(routings, ids, strict=True)], ids
        )
    measured = measures.compute()["training_free"]
    assert measured.recall.shape == (LAYERS, TOP_K + 1)
    assert (measured.recall.diff() >= 0).all()
    assert measured.summary(1)["recall@k"] == measured.recall[1, 0]
    assert (measured.exact < measured.recall[:, 0]).all()
    # The mean over the experts, each by how often it was chosen, is the hit rate.
    chosen = measures.of("training_free").expert_recall.chosen
    weighed = (measured.expert_recall.nan_to_num() * chosen).sum(-1) / chosen.sum(-1)
    torch.testing.assert_close(weighed, measured.recall[:, 0])
    # So is the share of right candidates over all bins, for 2k candidates.
    curve = measured.calibration
    right = (curve.right.nan_to_num() * curve.candidates).sum(-1) / (150 * TOP_K)
    torch.testing.assert_close(right, measured.recall[:, -1])
    assert (measures.compute()["predictor"].recall == 1).all()
    assert not measures.state_dict()
    assert measures.kinds == list(KINDS)
    assert Measures(LAYERS, TOP_K, EXPERTS, memory=1).kinds == ["training_free", "without_memory", "predictor"]
    measures.reset()
    assert measures.of("training_free").expert_recall.chosen.sum() == 0


def as_process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    measures = Measures(LAYERS, TOP_K, EXPERTS)
    for kind in KINDS:
        measures.update(kind, *rows(30 + 20 * rank, rank))
    torch.save(
        {kind: list(measured[:3]) + list(measured[3]) for kind, measured in measures.compute().items()},
        f"{folder}/{rank}.pt",
    )
    torch.distributed.destroy_process_group()


def test_two_processes_measure_what_one_does(forkserver: ForkServerContext, tmp_path: Path):
    processes = [forkserver.Process(target=as_process, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    alone = Measures(LAYERS, TOP_K, EXPERTS)
    for rank in range(2):
        for kind in KINDS:
            alone.update(kind, *rows(30 + 20 * rank, rank))
    for kind, measured in alone.compute().items():
        for rank in range(2):
            found = torch.load(tmp_path / f"{rank}.pt")[kind]
            for mine, theirs in zip([*measured[:3], *measured[3]], found, strict=True):
                torch.testing.assert_close(mine, theirs, equal_nan=True)
