"""The observer: through it, and only through it, `runtime.measure` sees what a running engine does."""

from __future__ import annotations


class Observer:
    """Is told what happens while it is attached (`ExpertOffload.observed`). A subclass overrides the methods that it needs.

    Times are readings of `time.perf_counter`. Layers are counted from 0 among the MoE layers. A key is (layer, expert).
    """

    def copy_begun(self, key: tuple[int, int], slot: int) -> None:
        """The copy of an expert into a slot was asked for. It may still be cancelled."""

    def copy_over(self, key: tuple[int, int], begin: float, end: float) -> None:
        """A reader thread has made a copy. That thread calls this. Nobody calls it for copies on a CUDA stream."""

    def waited(self, key: tuple[int, int], begin: float, end: float) -> None:
        """The computation waited for the copy of an expert."""

    def executed(self, layer: int, begin: float, end: float) -> None:
        """The experts of a layer were executed, waits included."""

    def routed(self, layer: int, begin: float, end: float) -> None:
        """A layer's own router has decided, as it would have done without speculation."""

    def guessed(self, target: int, begin: float, end: float) -> None:
        """The experts of a target layer were guessed, and their copies asked for."""

    def controlled(self, layer: int, begin: float, end: float) -> None:
        """All work of the policy at a layer's router or entry: the router itself, the decision, and the guesses."""
