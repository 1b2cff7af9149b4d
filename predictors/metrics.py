"""Hit rate and its kin, as torchmetrics."""

from __future__ import annotations

import torch
from torchmetrics import Metric


class HitRate(Metric):
    """Recall@m per layer: the share of the router's true experts that are among the candidates.

    `update` takes candidates `[layers, tokens, m]` and true experts `[layers, tokens, top_k]`; `compute` gives
    `[layers]`, fp64 (of a single layer a scalar; `rates` always gives a list). With `exact=True` it is the share of tokens all of whose experts are among them.
    """

    full_state_update = False
    higher_is_better = True
    hits: torch.Tensor
    total: torch.Tensor

    def __init__(self, num_layers: int, exact: bool = False):
        super().__init__()
        self.exact = exact
        self.add_state("hits", torch.zeros(num_layers, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, candidates: torch.Tensor, experts: torch.Tensor) -> None:
        found = (experts.unsqueeze(-1) == candidates.unsqueeze(-2)).any(-1)
        if self.exact:
            found = found.all(-1, keepdim=True)
        self.hits += found.sum((-2, -1))
        self.total += found.shape[-2] * found.shape[-1]

    def compute(self) -> torch.Tensor:
        return self.hits / self.total

    def own_rates(self) -> list[float]:
        """One hit rate a layer, of this process alone: `compute` waits for all others where there are some."""
        return (self.hits / self.total).tolist()

    def rates(self) -> list[float]:
        """One hit rate a layer."""
        # torchmetrics makes a scalar of what `compute` returns for one layer.
        return self.compute().reshape(-1).tolist()


class RecallCurve(Metric):
    """Recall@m per layer for every number of candidates m from `top_k` up.

    `update` takes candidates `[layers, tokens, most]`, the best first, and true experts `[layers, tokens, top_k]`;
    `compute` gives `[layers, most - top_k + 1]`, fp64.
    """

    full_state_update = False
    higher_is_better = True
    hits: torch.Tensor
    total: torch.Tensor

    def __init__(self, num_layers: int, top_k: int, most: int):
        super().__init__()
        self.top_k = top_k
        self.add_state("hits", torch.zeros(num_layers, most, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, candidates: torch.Tensor, experts: torch.Tensor) -> None:
        self.hits += (experts.unsqueeze(-1) == candidates.unsqueeze(-2)).any(-2).sum(-2)
        self.total += experts.shape[-2] * experts.shape[-1]

    def compute(self) -> torch.Tensor:
        return self.hits.cumsum(-1)[:, self.top_k - 1 :] / self.total


def gap_closed(before: float, after: float) -> float:
    """The share of the gap between a hit rate and 1 that is closed; 0 where there was none."""
    return (after - before) / (1 - before) if before < 1 else 0.0
