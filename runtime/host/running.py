"""Running means and shares: what was measured lately counts most."""

from __future__ import annotations

import math

NEWEST = 0.05
"""The least weight of a new value in a running mean."""
MOST_PAIRS = round(2 / NEWEST) - 1
"""So many values of the same weight make a mean as sure as a running one is in the end."""
KNOWN = 4.0
"""So many cases is worth what is known of a share beforehand."""


class Mean:
    """A running mean of what is added, `value`; None while there is nothing."""

    def __init__(self, value: float | None = None, weight: float = 0.0):
        """It may begin with a value that is worth `weight` others."""
        self.value, self.weight = value, weight

    def add(self, value: float) -> None:
        self.weight += 1.0
        self.value = value if self.value is None else self.value + (value - self.value) * max(NEWEST, 1 / self.weight)

    def __float__(self) -> float:
        return self.value or 0.0


class Share:
    """How often something was the case, lately."""

    def __init__(self) -> None:
        self._cases = self._seen = 0.0

    def add(self, case: bool) -> None:
        self._cases = (1 - NEWEST / 2) * self._cases + case
        self._seen = (1 - NEWEST / 2) * self._seen + 1.0

    def given(self, before: float) -> float:
        """The share, if it was `before` in `KNOWN` cases that were not added."""
        return (self._cases + KNOWN * before) / (self._seen + KNOWN)


class Slope:
    """How much `y` grows with `x`, lately: least squares."""

    def __init__(self) -> None:
        self._x, self._y, self._xx, self._xy, self._yy = Mean(), Mean(), Mean(), Mean(), Mean()

    def add(self, x: float, y: float) -> None:
        means = self._x, self._y, self._xx, self._xy, self._yy
        for mean, value in zip(means, (x, y, x * x, x * y, y * y), strict=True):
            mean.add(value)

    @property
    def least(self) -> float:
        """The slope less its standard error; 0 while `x` is always the same, or there are too few pairs for an error."""
        x, y, pairs = float(self._x), float(self._y), min(MOST_PAIRS, self._x.weight)
        spread = float(self._xx) - x * x
        if pairs < 3 or spread <= 1e-6 * x * x:
            return 0.0
        slope = (float(self._xy) - x * y) / spread
        rest = max(0.0, float(self._yy) - y * y - slope * slope * spread)
        return slope - math.sqrt(rest / spread / (pairs - 2))
