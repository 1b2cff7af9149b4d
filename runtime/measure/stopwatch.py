"""Measures how long the host speculates."""

from __future__ import annotations

from ..observer import Observer


class Stopwatch(Observer):
    """Adds up the time that the host needs more than in the same forward pass on demand, without the copies."""

    def __init__(self) -> None:
        self.speculating = 0.0
        """Seconds in which the host guessed, decided and announced. The routers' own time does not count."""
        self._router = (0.0, 0.0)  # begin and end of the last router's own work

    def routed(self, layer: int, begin: float, end: float) -> None:  # noqa: ARG002
        self._router = begin, end

    def controlled(self, layer: int, begin: float, end: float) -> None:  # noqa: ARG002
        asked, answered = self._router
        self.speculating += end - begin - (answered - asked if asked >= begin else 0.0)
