"""Running means and shares: what was measured lately counts most."""

from __future__ import annotations

import math

NEWEST = 0.05
"""The least weight of a new value in a running mean."""
RARE = 0.01
"""The same for what few of the values tell."""
MOST_VALUES = round(2 / RARE) - 1
"""So many values of the same weight make such a mean as sure as it is in the end."""
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


class Effect:
    """How much `y` grows with `x` where another quantity stays the same, lately: least squares."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._means = [0.0] * 3  # of the other, x and y
        self._products = [0.0] * 6  # of each with itself and those after it

    def add(self, other: float, x: float, y: float) -> None:
        self._weight += 1.0
        share = max(RARE, 1 / self._weight)
        values, products = (other, x, y), (other * other, other * x, other * y, x * x, x * y, y * y)
        self._means = [mean + (value - mean) * share for mean, value in zip(self._means, values, strict=True)]
        self._products = [mean + (value - mean) * share for mean, value in zip(self._products, products, strict=True)]

    @property
    def least(self) -> float:
        """The effect less its standard error; 0 while the other tells all of `x`, or there are too few values for an error."""
        other, x, y = self._means
        oo, ox, oy, xx, xy, yy = self._products
        oo, ox, oy = oo - other * other, ox - other * x, oy - other * y
        xx, xy, yy = xx - x * x, xy - x * y, yy - y * y
        if oo > 0:  # what the other explains is left out
            xx, xy, yy = xx - ox * ox / oo, xy - ox * oy / oo, yy - oy * oy / oo
        freedom = min(MOST_VALUES, self._weight) - 3
        if freedom <= 0 or xx <= 1e-4 * x * x:
            return 0.0
        return xy / xx - math.sqrt(max(0.0, yy - xy * xy / xx) / xx / freedom)
