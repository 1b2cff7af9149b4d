"""How soon a layer uses its experts again: the LRU stack model.

Each layer has a stack of all its experts, the one that was used last on top. The next expert is drawn by its depth in the
stack. Slots that keep the experts used last hit exactly where the depth is less than their number. So a curve of such hit
rates says how depths are distributed, and what is drawn from it is right at every number of slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Numbers = NDArray[np.float64]

STAYS = 0.5
"""The least share of the measured misses that is left when every slot is full. From a cold start of a few hundred tokens, first
uses and returns of experts that were used long ago can't be told apart where the slots are many."""
AS_RECENT = 0.6
"""Share of the wrong guesses that are drawn as the router's experts are; the others are any experts. Measured on the embedded
model: among the 8 of 32 experts that a layer used last are .23 of those that its router does not choose and .39 of those that
it chooses. Of wrong guesses it is .28 training-free and .31 with predictors."""


@dataclass(frozen=True)
class ReuseCurve:
    """Hit rates of one layer's slots that hold the experts used last, measured from empty slots, as `inspect` does."""

    hit_rates: tuple[tuple[int, float], ...]
    """Pairs of a number of slots and its hit rate. Both rise. Rates are between 0 and 1, and count each expert of a token."""
    num_experts: int
    """Of the model that was measured, and so is the top k."""
    top_k: int
    tokens: int
    """How many were measured from empty slots."""

    def depths(self, num_experts: int, top_k: int) -> Numbers:
        """How deep the next expert lies in the stack of a model, once all slots are full: cumulative shares `[experts + 1]`.

        A slot of a model of another shape counts for as many slots as its share of a token's experts says, or its share of all
        experts, whichever is less.
        """
        scale = min(self.top_k / top_k, self.num_experts / num_experts)
        misses = np.interp(scale * np.arange(num_experts + 1), np.arange(self.num_experts + 1), self._warm_misses())
        return (1 - misses) / (1 - misses[-1])

    def _cold_misses(self) -> Numbers:
        """The measured miss rates by number of slots, `[experts + 1]`. Between and beyond the points they fall by a fixed share
        a slot."""
        slots, rates = np.array([(0, 0.0), *self.hit_rates]).T
        logs, asked = np.log(1 - rates), np.arange(self.num_experts + 1)
        beyond = np.maximum(asked - slots[-1], 0) * (logs[-1] - logs[-2]) / (slots[-1] - slots[-2])
        return np.exp(np.interp(asked, slots, logs) + beyond)

    def _warm_misses(self) -> Numbers:
        """The miss rates once all slots are full.

        Until `n` experts were used, `n` slots miss just `n` times, at every first use. So the misses after that are known, and
        the time until the next first use is one over their rate.
        """
        uses, until = self.tokens * self.top_k, 0.0
        misses = np.ones(self.num_experts + 1)
        for slots, cold in enumerate(self._cold_misses()[1:], start=1):
            until += 1 / misses[slots - 1]
            later = (uses * cold - slots) / (uses - until) if until < uses else 0.0
            misses[slots] = min(misses[slots - 1], max(later, STAYS * cold))
        return misses


class ReuseStack:
    """The experts of each layer, those used last first. It begins in a random order."""

    def __init__(self, curve: ReuseCurve, layers: int, num_experts: int, top_k: int, generator: np.random.Generator):
        self._generator, self._top_k = generator, top_k
        self._depths = curve.depths(num_experts, top_k)
        self._experts = generator.permuted(np.tile(np.arange(num_experts), (layers, 1)), axis=1)
        recent = np.diff(self._depths)
        recent[:top_k] = recent[:top_k].mean()
        self._weights = np.log(AS_RECENT * recent + (1 - AS_RECENT) / num_experts)

    def use(self) -> Ids:
        """Draws the next token's experts `[layers, top_k]` in the order in which they are used, and puts them on top."""
        drawn = self._generator.random((len(self._experts), self._top_k))
        taken, near = np.arange(self._top_k), self._depths[self._top_k]
        # The token's own experts lie on top already, so the next one is below them. That changes the curve within the first
        # `top_k` places only.
        within = taken + (drawn / near * (self._top_k - taken)).astype(np.int64)
        beyond = np.searchsorted(self._depths, drawn, side="right") - 1
        places = np.where(drawn < near, within, beyond)
        ids, positions = np.empty_like(places), np.arange(self._experts.shape[1])
        for number, place in enumerate(places.T):
            ids[:, number] = self._experts[np.arange(len(place)), place]
            above = positions <= place[:, None]
            self._experts = np.where(above, np.roll(self._experts, 1, axis=1), self._experts)
            self._experts[:, 0] = ids[:, number]
        return ids

    def likelihoods(self) -> Numbers:
        """How likely each expert `[layers, experts]` is a wrong guess, as logarithms."""
        weights = np.empty(self._experts.shape)
        np.put_along_axis(weights, self._experts, np.broadcast_to(self._weights, weights.shape), axis=1)
        return weights
