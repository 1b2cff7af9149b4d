"""Who leaves first where the experts of all layers are one pool. It has no slots and makes no copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

MOST = 1e300
"""No expert is worth more, so that any may leave."""


class Pool:
    """The experts that may leave their slots, and the least worth of them.

    It is one array: an expert that has no slot, or that must keep it, is worth more than any other in it. To find the least of a few
    hundred numbers takes NumPy about a microsecond. Experts are given by their layer, counted from 0, and their number in it.
    """

    def __init__(self, layers: int, experts: int, worth: Callable[[int], Sequence[float]]):
        """`experts` are those of a layer, and `worth` says what each of a layer's is worth, when it is asked."""
        self._worth = worth
        self._known = np.zeros((layers, experts))
        self._leaving = np.full((layers, experts), np.inf)
        self._flat = self._leaving.reshape(-1)
        self._stale = set(range(layers))  # worth something else than is known

    def rated(self, layer: int) -> None:
        """Says that the experts of a layer are worth something else from now on."""
        self._stale.add(layer)

    def may_leave(self, key: tuple[int, int]) -> None:
        """Says that an expert has a slot and may lose it."""
        self._leaving[key] = self._known[key]

    def stays(self, key: tuple[int, int]) -> None:
        """Says that an expert has no slot, or must keep it."""
        self._leaving[key] = np.inf

    def least(self, busy: Callable[[tuple[int, int]], bool]) -> tuple[int, int] | None:
        """The expert that is worth least of those that may leave and are not `busy`; None if there is none."""
        for layer in self._stale:
            leaving = self._leaving[layer]
            self._known[layer] = np.minimum(self._worth(layer), MOST)
            np.copyto(leaving, self._known[layer], where=leaving != np.inf)
        self._stale.clear()
        passed: list[int] = []
        while True:
            place = int(self._flat.argmin())
            key = divmod(place, self._leaving.shape[1])
            found = key if self._flat[place] < np.inf else None
            if found is None or not busy(found):
                break
            passed.append(place)
            self._flat[place] = np.inf
        for place in passed:
            self._flat[place] = self._known.reshape(-1)[place]
        return found
