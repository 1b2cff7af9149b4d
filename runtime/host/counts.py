"""How often each expert was used lately. It has no slots and makes no copies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from ...predictors.reuse import HALF_LIFE

LARGEST = 512.0
"""Halvings after which counts are scaled anew, so that none gets too large for a float."""


class DecayedCounts:
    """The experts' decayed counts of one layer: the sum over an expert's uses of `2^(-tokens since / HALF_LIFE)`.

    In the place of making all counts smaller with each token, a new use counts more than those before.
    """

    def __init__(self) -> None:
        self._counts: defaultdict[int, float] = defaultdict(float)
        self._halvings = 0.0

    def __getitem__(self, expert: int) -> float:
        """Something that is larger the larger the expert's count is."""
        return self._counts[expert]

    def add(self, uses: Mapping[int, float], tokens: int = 1) -> None:
        """Says that `tokens` tokens have used experts. `uses` says how much that counts right after the last of them."""
        self._halvings += tokens / HALF_LIFE
        if self._halvings > LARGEST:
            scale = 2.0**-self._halvings
            self._counts = defaultdict(float, {expert: scale * count for expert, count in self._counts.items()})
            self._halvings = 0.0
        now = 2.0**self._halvings
        for expert, count in uses.items():
            self._counts[expert] += now * count

    def of(self, experts: Iterable[int]) -> list[float]:
        """The counts of experts, as they are now."""
        scale = 2.0**-self._halvings
        return [scale * self._counts[expert] for expert in experts]

    def set(self, counts: Sequence[float]) -> None:
        """Replaces the counts of all experts, from the first one on."""
        self._halvings = 0.0
        self._counts = defaultdict(float, enumerate(counts))
