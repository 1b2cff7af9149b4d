"""Counts how many of the routers' own choices were guessed."""

from __future__ import annotations

import torch

COUNTED_AT_ONCE = 256


class HitCount:
    """Counts how many of a router's own choices were among the candidates."""

    def __init__(self, top_k: int):
        self._top_k = top_k
        self.clear()

    def clear(self) -> None:
        self._seen = 0
        self._hits: torch.Tensor | int = 0
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, chosen: torch.Tensor, own: torch.Tensor) -> None:
        """Counts candidates `[tokens, m]` against the choice: ids `[tokens, top_k]`, or logits `[tokens, experts]`."""
        if self._waiting and self._waiting[-1][1].is_floating_point() != own.is_floating_point():
            self._settle()
        # Many tokens are compared at once: one by one this would cost as much as a router.
        self._waiting.append((chosen, own))
        if len(self._waiting) >= COUNTED_AT_ONCE:
            self._settle()

    def totals(self) -> tuple[int, int]:
        """How many of the router's own choices were among the candidates, and how many there were. It waits for the device."""
        self._settle()
        return int(self._hits), self._seen

    def _settle(self) -> None:
        if self._waiting:
            chosen, own = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
            self._waiting.clear()
            if own.is_floating_point():
                own = own.topk(self._top_k, dim=-1).indices
            self._hits = self._hits + (own.unsqueeze(-1) == chosen.unsqueeze(-2)).any(-1).sum()
            self._seen += own.numel()
