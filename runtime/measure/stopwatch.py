"""How long the host takes to speculate."""

from __future__ import annotations

from ..observer import Observer


class Stopwatch(Observer):
    """Adds up what a forward pass takes beyond the same pass on demand, but for copies."""

    def __init__(self) -> None:
        self.speculating = 0.0
        """Seconds in which the host guessed, decided and announced, without the routers' own work."""
        self._router = (0.0, 0.0)  # begin and end of the router that was asked last

    def routed(self, layer: int, begin: float, end: float) -> None:  # noqa: ARG002
        self._router = begin, end

    def controlled(self, layer: int, begin: float, end: float) -> None:  # noqa: ARG002
        asked, answered = self._router
        self.speculating += end - begin - (answered - asked if asked >= begin else 0.0)
