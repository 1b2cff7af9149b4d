"""Recorded rows as a predictor sees them: its inputs and the true routing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..predictors.forms import PredictorForm, Route
from ..predictors.memory import follows, memory_of, remembered
from ..predictors.routing import Routing
from ..predictors.speculation import mixture_of
from ..predictors.stacked import StackedSpeculators
from .columns import POSITION, SEQUENCE, Column, Columns


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
    memory: torch.Tensor | None = None
    """What each row remembers of the tokens before it, `[layers, rows, tokens * 2 experts]`; None if nothing was asked for."""

    def speculated(self, number: int, mlp: PredictorForm, route: Route) -> Routing:
        """The routing of layer `number` of the stack as `mlp` guesses it, whose target's router is `route`; it may remember less."""
        known = None if self.memory is None or mlp.u is None else self.memory[number, :, : mlp.u.shape[1]]
        return mlp.speculate(route, self.quasi[number], self.normed[number], self.mixture[number], known)[0]


def make_batch(
    columns: Columns, sources: dict[int, int | None], speculators: StackedSpeculators, memory: int = 0
) -> Batch:
    """The inputs and true routings for the predictors of the target layers in `sources`, for the rows of `columns`.

    States are those of `Speculator.states`, which the runtime calls. No gradient flows through them. A row remembers up to
    `memory` tokens, if the rows before it are these tokens.
    """

    def stack(names: Iterable[str]) -> torch.Tensor:
        return torch.stack([columns[name] for name in names])

    read = stack(Column.INPUT.of(t) if s is None else Column.RESIDUAL.of(s) for t, s in sources.items()).float()
    inner = [None if s is None else columns.get(Column.INNER.of(s)) for s in sources.values()]
    ids = stack(Column.EXPERT_IDS.of(target) for target in sources).long()
    logits = stack(Column.ROUTER_LOGITS.of(target) for target in sources).float()
    # A target without a source has a mixture of zeros: all weights are zero.
    chosen = stack(Column.EXPERT_IDS.of(t if s is None else s) for t, s in sources.items()).long()
    weights = torch.zeros(chosen.shape, device=chosen.device)
    sourced = {number: source for number, source in enumerate(sources.values()) if source is not None}
    if sourced:
        weights[list(sourced)] = stack(map(Column.EXPERT_WEIGHTS.of, sourced.values())).float()
    # A speculation does not read a source's logits; the trace lacks them if the source is no target.
    routing = Routing(weights, weights, chosen)
    quasi, normed = speculators.states(read, routing, [None if i is None else i.float() for i in inner])
    kept = None
    if memory:
        left = memory_of(logits, speculators.logits(quasi))
        kept = remembered(left, follows(columns[SEQUENCE], columns[POSITION]), memory)
    return Batch(quasi, normed, mixture_of(routing, logits.shape[-1], logits.dtype), ids, logits, kept)
