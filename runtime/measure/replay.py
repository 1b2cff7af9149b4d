"""The routing of a recorded trace: what its routers decided, and what is speculated from its residuals."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...predictors.checkpoint import Predictors
from ...predictors.speculation import Routing, candidates
from ..targets import sources_read
from .routing import ReplayedRouting, RoutingError


def replay(
    trace: Any, steps: int, m: int, predictors: Predictors | None, horizon: int | None = None
) -> ReplayedRouting:
    """The longest run of consecutive tokens in a trace, `steps` at the most, with the `m` candidates for each of them.

    `trace` is a `data_collection.trace.Trace`. Speculation reads what `predictors` were trained to read; without them it
    is training-free, `horizon` layers ahead, by default 1. Raises `RoutingError` for a trace that lacks layers, or what is
    to be read, and what `sources_read` does.
    """
    if sorted(trace.sources) != trace.manifest.model.moe_layers:
        raise RoutingError(f"{trace.path} does not have all layers as targets; collect it with --layers all")
    sources = sources_read(trace.sources, predictors, horizon)
    shard, start, length = max(
        ((number, *_longest_run(trace, number)) for number in range(len(trace.manifest.shards))), key=lambda run: run[2]
    )
    rows = torch.arange(start, start + min(steps, length))
    columns = trace.read(shard, rows)
    speculators = trace.speculators(sources=sources)
    guesses = []
    for target, source in sorted(sources.items()):
        speculator = speculators[target]
        if predictors is not None:
            speculator.mlp = predictors.mlps.get(target)
        routing = None
        if source is not None:
            weights = columns[f"layers.{source}.expert_weights"].float()
            routing = Routing(weights, weights, columns[f"layers.{source}.expert_ids"].long())
        name = f"layers.{target}.input" if source is None else f"layers.{source}.residual"
        if name not in columns:
            raise RoutingError(f"{trace.path} lacks the input of layer {target}; collect it again with --inputs")
        inner = columns.get(f"layers.{source}.inner")
        with torch.no_grad():
            speculation = speculator(columns[name].float(), routing, None if inner is None else inner.float())
        guesses.append(candidates(speculation, m))
    ids = [columns[f"layers.{target}.expert_ids"].long() for target in sorted(trace.sources)]
    source_of = {"routing": "trace", "path": str(trace.path), "steps": len(rows), "model": trace.manifest.model.name}
    return ReplayedRouting(
        np.asarray(torch.stack(ids, 1)), np.asarray(torch.stack(guesses, 1), dtype=np.int64), source_of
    )


def _longest_run(trace: Any, shard: int) -> tuple[int, int]:
    """First row and length of the longest run of consecutive tokens of one sequence in a shard."""
    sequence, position = (trace.column(shard, name).numpy() for name in ("sequence", "position"))
    breaks = np.flatnonzero((np.diff(sequence) != 0) | (np.diff(position) != 1)) + 1
    borders = np.array([0, *breaks, len(sequence)])
    longest = int(np.diff(borders).argmax())
    return int(borders[longest]), int(np.diff(borders)[longest])
