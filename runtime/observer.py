"""What can be seen of a running offload from outside: the one place where measuring meets the engine."""

from __future__ import annotations


class Observer:
    """Is told what happens while it is attached (`ExpertOffload.observed`). A subclass overrides what it wants to see.

    Times are readings of `time.perf_counter`, layers are numbered from 0 among the MoE layers, and a key is (layer, expert).
    Where none is attached, nothing is timed.
    """

    def copy_begun(self, key: tuple[int, int], slot: int) -> None:
        """The copy of an expert into a slot was asked for. It may be cancelled before it is made."""

    def copy_over(self, key: tuple[int, int], begin: float, end: float) -> None:
        """A reader thread has made a copy; it calls this itself. Copies on a CUDA stream are not told."""

    def waited(self, key: tuple[int, int], begin: float, end: float) -> None:
        """The computation waited for the copy of an expert."""

    def executed(self, layer: int, begin: float, end: float) -> None:
        """The experts of a layer were executed, waits included."""

    def routed(self, layer: int, begin: float, end: float) -> None:
        """A layer's own router was asked, as it would have been without any speculation."""

    def guessed(self, target: int, begin: float, end: float) -> None:
        """The experts of a target layer were speculated, and their copies asked for."""

    def controlled(self, layer: int, begin: float, end: float) -> None:
        """All that the policy did at a layer's router or entry: the router itself, its decision, and the speculations."""
