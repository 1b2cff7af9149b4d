"""Recorded rows as a predictor sees them: what it reads, and what it should say."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..predictors.speculation import Routing, mixture_of
from ..predictors.stacked import StackedSpeculators
from .trace import Columns


class Batch(NamedTuple):
    """Rows as a predictor sees them, all target layers stacked. Floats are fp32."""

    quasi: torch.Tensor
    """Quasi-hidden states, `[layers, rows, hidden]`."""
    normed: torch.Tensor
    """Normed residuals, `[layers, rows, hidden]`."""
    mixture: torch.Tensor
    """The source routers' mixtures, `[layers, rows, experts]`; zero for a target without a source."""
    ids: torch.Tensor
    """The experts that the router chose, `[layers, rows, top_k]`, int64."""
    logits: torch.Tensor
    """The router's logits, `[layers, rows, experts]`."""


def make_batch(columns: Columns, sources: dict[int, int | None], speculators: StackedSpeculators) -> Batch:
    """What the predictors of the target layers in `sources` read and should say, for the rows of `columns`.

    States are those of `Speculator.states`, which is what the runtime calls. No gradient flows through them.
    """
    targets = list(sources)

    def stack(names: list[str]) -> torch.Tensor:
        return torch.stack([columns[name] for name in names])

    read = [f"layers.{t}.input" if s is None else f"layers.{s}.residual" for t, s in sources.items()]
    inner = [columns.get(f"layers.{source}.inner") for source in sources.values()]
    ids = stack([f"layers.{target}.expert_ids" for target in targets]).long()
    logits = stack([f"layers.{target}.router_logits" for target in targets]).float()
    # A target without a source has a mixture of nothing: weights of zero, whatever the experts.
    chosen = stack([f"layers.{t if s is None else s}.expert_ids" for t, s in sources.items()]).long()
    weights = torch.zeros(chosen.shape, device=chosen.device)
    sourced = [number for number, source in enumerate(sources.values()) if source is not None]
    if sourced:
        names = [f"layers.{source}.expert_weights" for source in sources.values() if source is not None]
        weights[sourced] = stack(names).float()
    # A source's logits play no part in a speculation, and where it is no target they are not in the trace.
    routing = Routing(weights, weights, chosen)
    quasi, normed = speculators.states(stack(read).float(), routing, [None if i is None else i.float() for i in inner])
    return Batch(quasi, normed, mixture_of(routing, logits.shape[-1], logits.dtype), ids, logits)
