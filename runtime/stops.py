"""Ends a text that comes in pieces where the first of some stop texts begins."""

from __future__ import annotations

from collections.abc import Callable


class Stops:
    """Passes on the text before a stop text. What may be the beginning of one is held back until that is known."""

    def __init__(self, stops: list[str], on_text: Callable[[str], None]):
        """`stops` are not empty texts. Without any, every piece is passed on as it comes."""
        self._stops, self._on_text = stops, on_text
        self._held = ""
        self.found = False

    def put(self, piece: str) -> None:
        if self.found:
            return
        text = self._held + piece
        if begins := [at for stop in self._stops if (at := text.find(stop)) >= 0]:
            self.found = True
            self._tell(text[: min(begins)])
            return
        held = max(
            (n for stop in self._stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])),
            default=0,
        )
        self._tell(text[: len(text) - held])
        self._held = text[len(text) - held :]

    def end(self) -> None:
        """Says that no more pieces come."""
        if not self.found:
            self._tell(self._held)
        self._held = ""

    def _tell(self, text: str) -> None:
        if text:
            self._on_text(text)
