"""How sure a speculation is of each candidate: the probability that the router will choose it.

A candidate's *margin* is how far its logit is from the border of being chosen. The border lies midway between the lowest logit of
the speculation's top k and the highest of the others. Margins of one layer become probabilities by four numbers, which `export`
fits on rows that no predictor was trained on:

    P(chosen) = least + (most - least) sigmoid(margin / temperature + bias)

Temperature and bias are Platt's scaling. `least` and `most` say that however far from the border a candidate is, the guessed state
may be a wrong one: without them, training-free speculation would be too sure of what is far away.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch


class Confidence(NamedTuple):
    """Turns the margins of one layer into probabilities."""

    temperature: float = 1.0
    """In logits; greater than 0."""
    bias: float = 0.0
    least: float = 0.0
    most: float = 1.0
    error: float | None = None
    """The expected calibration error that was measured on other rows than those it was fitted on; None if it was not measured."""

    def probabilities(self, margins: torch.Tensor) -> torch.Tensor:
        """The probabilities for `margins` of any shape, in their dtype."""
        return self.least + (self.most - self.least) * (margins / self.temperature + self.bias).sigmoid()

    def probability(self, margin: float) -> float:
        """The same for one number: on a CPU this is cheaper than an operation of torch."""
        place = margin / self.temperature + self.bias
        return self.least + (self.most - self.least) / (1 + math.exp(min(-place, 700.0)))


def margins(logits: torch.Tensor, candidates: torch.Tensor, top_k: int) -> torch.Tensor:
    """The margin of each candidate, `[..., m]`, fp32.

    Logits are `[..., experts]`, candidates `[..., m]` with the speculation's `top_k` first, and `m > top_k`: without other
    candidates there is no border. Only differences of logits count, so it does not matter by what kind of scores a router weighs.
    """
    return margins_among(logits.float().gather(-1, candidates.long()), top_k)


def margins_among(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """The same from the candidates' own logits, `[..., m]`, fp32."""
    border = (scores[..., :top_k].amin(-1, keepdim=True) + scores[..., top_k:].amax(-1, keepdim=True)) / 2
    return scores - border


class Confidences(NamedTuple):
    """How sure the speculation of each layer is, and how many experts a router chooses."""

    of: list[Confidence | None]
    """Of each layer, None where it is not known."""
    top_k: int

    def chances(self, layer: int, by_token: Iterable[tuple[list[int], list[float]]]) -> dict[int, float] | None:
        """The probabilities that any token needs a candidate, from each token's candidates with their logits.

        The router's own choice comes first, and there may be one logit more than candidates. The margins are those of `margins_among`
        in plain numbers: for so few that is cheaper than operations of torch.
        """
        confidence = self.of[layer]
        if confidence is None:
            return None
        wrong: dict[int, float] = {}
        for candidates, values in by_token:
            border = (min(values[: self.top_k]) + max(values[self.top_k :])) / 2
            for expert, value in zip(candidates, values, strict=False):
                wrong[expert] = wrong.get(expert, 1.0) * (1 - confidence.probability(value - border))
        return {expert: 1 - chance for expert, chance in wrong.items()}
