"""Hit rate and related measures, as torchmetrics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torchmetrics import Metric

from .confidence import margins

BINS = 40


class HitRate(Metric):
    """Recall@m per layer: the share of the router's true experts that are among the candidates.

    `update` takes candidates `[layers, tokens, m]` and true experts `[layers, tokens, top_k]`; `compute` gives
    `[layers]`, fp64, or a scalar for a single layer. With `exact=True` it is the share of tokens with all their
    experts.
    """

    full_state_update = False
    hits: torch.Tensor
    total: torch.Tensor

    def __init__(self, num_layers: int, exact: bool = False):
        super().__init__()
        self.exact = exact
        self.add_state("hits", torch.zeros(num_layers, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, candidates: torch.Tensor, experts: torch.Tensor) -> None:
        found = (experts.unsqueeze(-1) == candidates.unsqueeze(-2)).any(-1)
        if self.exact:
            found = found.all(-1, keepdim=True)
        self.hits += found.sum((-2, -1))
        self.total += found.shape[-2] * found.shape[-1]

    def compute(self) -> torch.Tensor:
        return self.hits / self.total

    def rates(self) -> list[float]:
        """One hit rate a layer, of this process alone: `compute` would wait for all processes."""
        return (self.hits / self.total).tolist()


class RecallCurve(Metric):
    """Recall@m per layer for every number of candidates m from `top_k` up.

    `update` takes candidates `[layers, tokens, most]`, the best first, and true experts `[layers, tokens, top_k]`;
    `compute` gives `[layers, most - top_k + 1]`, fp64.
    """

    full_state_update = False
    hits: torch.Tensor
    total: torch.Tensor

    def __init__(self, num_layers: int, top_k: int, most: int):
        super().__init__()
        self.top_k = top_k
        self.add_state("hits", torch.zeros(num_layers, most, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, candidates: torch.Tensor, experts: torch.Tensor) -> None:
        self.hits += (experts.unsqueeze(-1) == candidates.unsqueeze(-2)).any(-2).sum(-2)
        self.total += experts.shape[-2] * experts.shape[-1]

    def compute(self) -> torch.Tensor:
        return self.hits.cumsum(-1)[:, self.top_k - 1 :] / self.total


def among(ids: torch.Tensor, others: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Which of the experts `ids` `[..., m]` are among `others` `[..., n]`, bool `[..., m]`.

    A mask over all experts is cheaper than comparing each with each.
    """
    mask = torch.zeros(*others.shape[:-1], num_experts, dtype=torch.bool, device=others.device)
    return mask.scatter_(-1, others.long(), True).gather(-1, ids.long())


class ExpertRecall(Metric):
    """Recall per layer and expert: how often an expert was among the candidates when the router chose it.

    `update` takes candidates `[layers, tokens, m]` and true experts `[layers, tokens, top_k]`, ids below `num_experts`;
    `compute` gives `[layers, num_experts]`, fp64, NaN for an expert that was never chosen.
    """

    full_state_update = False
    hits: torch.Tensor
    chosen: torch.Tensor

    def __init__(self, num_layers: int, num_experts: int):
        super().__init__()
        for name in ("hits", "chosen"):
            self.add_state(name, torch.zeros(num_layers, num_experts, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, candidates: torch.Tensor, experts: torch.Tensor) -> None:
        found = among(experts, candidates, self.hits.shape[1]).flatten(1).long()
        places = experts.flatten(1).long()
        self.hits.scatter_add_(1, places, found)
        self.chosen.scatter_add_(1, places, torch.ones_like(found))

    def compute(self) -> torch.Tensor:
        return self.hits.double() / self.chosen


def probability_of_choice(logits: torch.Tensor, candidates: torch.Tensor, top_k: int) -> torch.Tensor:
    """The probability that the speculation's own scores give each candidate, `[..., m]`, fp32.

    Logits are `[..., experts]`, candidates `[..., m]` with the speculation's `top_k` first. The probability is the sigmoid of a
    candidate's margin (`confidence.margins`): the softmax of its logit against one at the border, above 1/2 for the top k.
    The router's own scores are no such probability: a softmax shares 1 among k experts that may all be right, and
    sigmoid gates share nothing. Without other candidates there is no border, and every probability is 1.
    """
    if candidates.shape[-1] <= top_k:
        return torch.ones(candidates.shape, device=logits.device)
    return margins(logits, candidates, top_k).sigmoid()


class CalibrationCurve(NamedTuple):
    """Candidates in bins of equal width by their speculated probability, from 0 to 1; each `[layers, bins]`, fp64."""

    probability: torch.Tensor
    """Mean speculated probability, NaN in an empty bin."""
    right: torch.Tensor
    """Share of the candidates that the router chose, NaN in an empty bin."""
    candidates: torch.Tensor
    """How many candidates are in each bin."""

    def error(self) -> torch.Tensor:
        """Expected calibration error, `[layers]`: the mean distance of probability and share over all candidates."""
        distance = (self.probability - self.right).abs().nan_to_num()
        return (distance * self.candidates).sum(-1) / self.candidates.sum(-1)


class Calibration(Metric):
    """Speculated probability of the candidates against the share of the time that they are right.

    `update` takes the probabilities of candidates, `[layers, tokens, m]`, and which of them are right, bool of the same shape
    (`are_right`). `compute` gives a `CalibrationCurve`.
    """

    full_state_update = False
    probability: torch.Tensor
    right: torch.Tensor
    count: torch.Tensor

    def __init__(self, num_layers: int, bins: int = BINS):
        super().__init__()
        self.bins = bins
        for name, dtype in (("probability", torch.float64), ("right", torch.int64), ("count", torch.int64)):
            self.add_state(name, torch.zeros(num_layers, bins, dtype=dtype), dist_reduce_fx="sum")

    def update(self, probability: torch.Tensor, right: torch.Tensor) -> None:
        probability, right = probability.flatten(1), right.flatten(1).long()
        places = (probability * self.bins).long().clamp_(0, self.bins - 1)
        self.probability.scatter_add_(1, places, probability.double())
        self.right.scatter_add_(1, places, right)
        self.count.scatter_add_(1, places, torch.ones_like(right))

    def compute(self) -> CalibrationCurve:
        count = self.count.double()
        return CalibrationCurve(self.probability / count, self.right / count, count)


def gap_closed(before: float, after: float) -> float:
    """The share of the gap between a hit rate and 1 that is closed; 0 without a gap."""
    return (after - before) / (1 - before) if before < 1 else 0.0
