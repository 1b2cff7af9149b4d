"""Trains the reuse predictors of a trace: which experts of a layer are used again soon (`predictors.reuse`).

Runs of consecutive tokens are read once, and their counts and distances kept in memory; steps draw rows from all of them. A row
whose next uses the run does not show, since it ends too soon, is not drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..data_collection.columns import Column
from ..data_collection.keeping import RULES, Routed, keep_rates, learned, next_uses, routed_runs
from ..data_collection.trace import Trace
from ..predictors.checkpoint import load_predictors
from ..predictors.config import PredictorsError
from ..predictors.reuse import FEATURES, RATES, ReusePredictors, target_of

WIDTH = 64
STEPS, ROWS, TIMES = 1000, 256, 4
"""The most steps, the rows of each, and how often a row is drawn at most, on average."""
LEARNING_RATE, WEIGHT_DECAY = 6e-3, 0.01
MOST_ROWS, MEASURED = 262_144, 8_192
MOST_BYTES = 2 << 30
"""Of what is kept in memory."""
AHEAD = 32
"""The last tokens of a run are not drawn, since their next uses are beyond it; where it is short, of its last half."""


def reuse_of(trace: Trace, name: str) -> tuple[ReusePredictors, list[int]]:
    """The reuse predictors of a folder, and the layers of the trace, which they are for. Raises `PredictorsError` if they are not."""
    found = load_predictors(name)
    if found.reuse is None or found.reuse.layers != list(trace.sources):
        raise PredictorsError(
            f"{name} has no reuse predictors of the layers of {trace.path}; give what fit --reuse has trained on it"
        )
    if found.model["fingerprint"] != trace.manifest.model.fingerprint:
        raise PredictorsError(f"{name} belongs to another model than {trace.path}; give the predictors of its model")
    return found.reuse.predictors, found.reuse.layers


class Rows(NamedTuple):
    """What the predictors learn from, in bf16 but for the distances, int16."""

    logits: torch.Tensor
    """`[rows, layers, experts]`."""
    counts: torch.Tensor
    """`[rows, layers, experts, rates]`."""
    distances: torch.Tensor
    """How many tokens ahead the next use is, `[rows, layers, experts]`."""

    @classmethod
    def of(cls, routed: Routed, targets: list[int]) -> Rows:
        sequences, tokens = routed.used.shape[:2]
        drawn = max(tokens - AHEAD, tokens // 2)
        logits = torch.stack([routed.columns[Column.ROUTER_LOGITS.of(target)] for target in targets], 1)
        counts, rates = torch.zeros(sequences, *routed.used.shape[2:], len(RATES)), []
        for token in range(drawn):
            counts = counts * torch.tensor(RATES) + routed.used[:, token].unsqueeze(-1)
            rates.append(counts.bfloat16())
        distances = next_uses(routed)[:, :drawn].clamp(max=2**15 - 1).to(torch.int16)
        parts = logits.unflatten(0, (sequences, tokens))[:, :drawn], torch.stack(rates, 1), distances
        return cls(*(part.flatten(0, 1) for part in parts))


def train_reuse(
    trace: Trace, is_held_out: torch.Tensor, seed: int, log: Callable[[float, int], None]
) -> tuple[ReusePredictors, dict[str, Any]] | None:
    """The predictors of all targets of the trace, and hit rates of slots by rule as `keep_rates` has them.

    `is_held_out` says of each sequence, bool, whether it is kept for the hit rates. `log` is told the loss of some steps. None
    where the trace has too few consecutive tokens.
    """
    targets, model = list(trace.sources), trace.manifest.model
    row_bytes = len(targets) * model.num_experts * 2 * (2 + len(RATES))
    most = min(MOST_ROWS, MOST_BYTES // row_bytes)
    names = tuple(Column.ROUTER_LOGITS.of(target) for target in targets)
    runs = [Rows.of(routed, targets) for routed in routed_runs(trace, most, names, ~is_held_out)]
    rows = Rows(*map(torch.cat, zip(*runs, strict=True)))
    if len(rows.logits) < ROWS:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        predictors = ReusePredictors(len(targets), model.num_experts, WIDTH)
        for step, loss in enumerate(_steps(predictors, rows)):
            if step % 50 == 0:
                log(loss, step)
    predictors.requires_grad_(False)
    rules = RULES | {"learned": learned(predictors, targets)}
    rates = keep_rates(trace, rules, MEASURED, is_held_out)
    return predictors, rates


def _steps(predictors: ReusePredictors, rows: Rows) -> Iterator[float]:
    """Trains on logits with a spread of 1 in each layer. What that takes is in the weights afterwards."""
    spread = rows.logits.float().std((0, 2)).clamp(min=1e-3)[:, None, None]
    steps = min(STEPS, TIMES * len(rows.logits) // ROWS)
    optimizer = torch.optim.AdamW(predictors.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(steps):
        drawn = torch.randint(len(rows.logits), (ROWS,))
        logits, counts, distances = (part[drawn].transpose(0, 1).float() for part in rows)
        loss = F.binary_cross_entropy_with_logits(predictors(logits / spread, counts), target_of(distances))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield float(loss.detach())
    with torch.no_grad():
        predictors.own[:, 0] /= spread[:, 0, 0]
        predictors.w1[:, ::FEATURES] /= spread
