"""How often each expert was used lately. It has no slots and makes no copies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...predictors.reuse import HALF_LIFE, decayed_uses

LARGEST = 512.0
"""Halvings after which counts are scaled anew, so that none gets too large for a float."""


class DecayedCounts:
    """The experts' decayed counts of one layer: the sum over an expert's uses of `2^(-tokens since / HALF_LIFE)`.

    In the place of making all counts smaller with each token, a new use counts more than those before.
    """

    def __init__(self, num_experts: int):
        self._counts = [0.0] * num_experts
        self._halvings = 0.0

    @property
    def worth(self) -> Sequence[float]:
        """Numbers that are larger the larger an expert's count is."""
        return self._counts

    def add(self, ids: NDArray[np.int64]) -> None:
        """Says what tokens have used: the rows of `ids` `[tokens, k]`. What is no expert of the layer is left out."""
        tokens, experts = len(ids), len(self._counts)
        self._halvings += tokens / HALF_LIFE
        if self._halvings > LARGEST:
            scale = 2.0**-self._halvings
            self._counts, self._halvings = [scale * count for count in self._counts], 0.0
        now = 2.0**self._halvings
        if tokens == 1:
            for expert in ids[0].tolist():
                if expert < experts:
                    self._counts[expert] += now
            return
        self._counts = (self._counts + now * decayed_uses(ids, experts)).tolist()

    def of(self, experts: Sequence[int]) -> list[float]:
        """The counts of experts, as they are now."""
        scale = 2.0**-self._halvings
        return [scale * self._counts[expert] for expert in experts]

    def set(self, counts: Sequence[float]) -> None:
        """Replaces the counts of all experts, from the first one on."""
        self._counts, self._halvings = list(counts), 0.0
