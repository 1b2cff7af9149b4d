"""Reads a routing from a trace: what the routers decided, and what is speculated from the recorded residuals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...predictors.checkpoint import Predictors, as_predictors
from ...predictors.confidence import margins
from ...predictors.memory import memory_of, remembered
from ...predictors.reuse import ReusePredictors, ReuseScores
from ...predictors.speculation import Speculator, candidates
from ..targets import sources_read
from .reuse import Numbers
from .routing import ReplayedRouting, RoutingError


def replay(
    trace: Any, steps: int, m: int, predictors: Predictors | str | Path | None, horizon: int | None = None
) -> ReplayedRouting:
    """The routing of the longest run of consecutive tokens in a trace, at most `steps`, with `m` candidates for each layer.

    `trace` is a `data_collection.trace.Trace`. Speculation reads the layers that `predictors` were trained on. Without
    predictors it is training-free, `horizon` (by default 1) layers ahead. The first token remembers nothing. Raises `RoutingError` for a trace that lacks layers
    or inputs that are needed, and what `sources_read` raises.
    """
    if sorted(trace.sources) != trace.manifest.model.moe_layers:
        raise RoutingError(f"{trace.path} does not have all layers as targets; collect it with --layers all")
    predictors = as_predictors(predictors)
    sources = sources_read(trace.sources, predictors, horizon)
    lacking = trace.lacks_input(sources)
    if lacking is not None:
        raise RoutingError(f"{trace.path} lacks the input of layer {lacking}; collect it again with --inputs")
    shard, start, length = max(
        ((number, *_longest_run(trace, number)) for number in range(len(trace.manifest.shards))), key=lambda run: run[2]
    )
    rows = torch.arange(start, start + min(steps, length))
    columns = trace.read(shard, rows)
    guesses, chances, follows = [], [], torch.arange(len(rows)) > 0
    top_k, is_sure = trace.manifest.model.top_k, True
    for target, wiring in trace.wirings(sources).items():
        mlp = None if predictors is None else predictors.of(target).mlp
        speculator, read = Speculator(wiring, mlp), trace.speculator_input(columns, target, sources[target])
        with torch.no_grad():
            speculation, free = speculator.with_free(*read)
            if mlp is not None and free is not None:
                left = memory_of(trace.router_logits(columns, target), free)
                speculation = speculator(*read, remembered(left, follows, mlp.memory))
        found = candidates(speculation, max(m, min(top_k + 1, speculation.logits.shape[-1])))
        guesses.append(found[:, :m])
        confidence = None if predictors is None else predictors.of(target).confidence
        if confidence is None or found.shape[-1] <= top_k:
            is_sure = False
        else:
            chances.append(confidence.probabilities(margins(speculation.logits, found, top_k))[:, :m])
    reuse = None if predictors is None else predictors.reuse
    scores = None
    if reuse is not None and reuse.layers == list(trace.sources):
        logits = [trace.router_logits(columns, target) for target in trace.sources]
        scores = scores_after(reuse.predictors, logits)
    source_of = {"routing": "trace", "path": str(trace.path), "steps": len(rows), "model": trace.manifest.model.name}
    return ReplayedRouting(
        np.asarray(trace.expert_ids(columns)),
        np.asarray(torch.stack(guesses, 1), dtype=np.int64),
        source_of,
        scores,
        np.asarray(torch.stack(chances, 1), dtype=np.float64) if is_sure else None,
    )


def scores_after(predictors: ReusePredictors, logits: list[torch.Tensor]) -> Numbers:
    """What reuse predictors say after each token, `[tokens, layers, experts]`, from the `logits` `[tokens, experts]` of each layer."""
    reuse, by_token = ReuseScores(predictors), torch.stack(logits, 1).numpy()[:, :, None]
    return np.array([[reuse.after(layer, said) for layer, said in enumerate(token)] for token in by_token])


def _longest_run(trace: Any, shard: int) -> tuple[int, int]:
    """The first row and the length of the longest run of consecutive tokens of one sequence in a shard."""
    sequence, position = (numbers.numpy() for numbers in trace.places(shard))
    breaks = np.flatnonzero((np.diff(sequence) != 0) | (np.diff(position) != 1)) + 1
    borders = np.array([0, *breaks, len(sequence)])
    longest = int(np.diff(borders).argmax())
    return int(borders[longest]), int(np.diff(borders)[longest])
