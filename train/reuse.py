"""Trains the reuse predictors of a trace: which experts of a layer are used again soon (`predictors.reuse`).

Runs of consecutive tokens are read once, and kept in memory in spans. Each step draws spans, computes their states from their first
token on, and learns from some of their tokens. A token whose next uses the span does not show, since it ends too soon, is not drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..data_collection.columns import Column
from ..data_collection.keeping import RULES, Routed, keep_rates, learned, logits_of, next_uses, routed_runs
from ..data_collection.trace import Trace
from ..predictors.checkpoint import load_predictors
from ..predictors.config import PredictorsError
from ..predictors.reuse import ReusePredictors, target_of

WIDTH = 128
STEPS, SPANS, DRAWN, TIMES = 800, 16, 32, 8
"""The most steps, the spans of each, the tokens of a span that are drawn, and how often a span is drawn at most, on average."""
SPAN = 256
"""Tokens of the longest span."""
LEARNING_RATE, WEIGHT_DECAY = 6e-3, 0.01
MOST_ROWS, MEASURED = 1 << 20, 8_192
MOST_BYTES = 2 << 30
"""Of what is kept in memory."""
AHEAD = 32
"""The last tokens of a span are not drawn, since their next uses are beyond it; where it is short, of its last half."""


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


class Spans(NamedTuple):
    """What the predictors learn from: spans of consecutive tokens."""

    logits: torch.Tensor
    """`[spans, tokens, layers, experts]`, bf16."""
    distances: torch.Tensor
    """How many tokens ahead the next use is, uint8, shaped alike."""

    @classmethod
    def of(cls, routed: Routed, targets: list[int]) -> Spans:
        length = min(SPAN, routed.ids.shape[1])
        parts = logits_of(routed, targets).bfloat16(), next_uses(routed).clamp(max=255).to(torch.uint8)
        return cls(*(torch.cat([p for p in part.split(length, 1) if p.shape[1] == length]) for part in parts))

    def drawn(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits of some spans, places of tokens in each, `[spans, tokens]`, and the distances of these."""
        which = torch.randint(len(self.logits), (SPANS,))
        length = self.logits.shape[1]
        places = torch.rand(SPANS, max(length - AHEAD, length // 2)).argsort(1)[:, :DRAWN]
        return self.logits[which].float(), places, self.distances[which[:, None], places].float()


def train_reuse(
    trace: Trace, is_held_out: torch.Tensor, seed: int, log: Callable[[float, int], None]
) -> tuple[ReusePredictors, dict[str, Any]] | None:
    """The predictors of all targets of the trace, and hit rates of slots by rule as `keep_rates` has them.

    `is_held_out` says of each sequence, bool, whether it is kept for the hit rates. `log` is told the loss of some steps. None
    where the trace has too few consecutive tokens.
    """
    targets, model = list(trace.sources), trace.manifest.model
    most = min(MOST_ROWS, MOST_BYTES // (len(targets) * model.num_experts * 3))
    names = tuple(Column.ROUTER_LOGITS.of(target) for target in targets)
    runs = [Spans.of(routed, targets) for routed in routed_runs(trace, most, names, ~is_held_out)]
    if sum(spans.logits[..., 0, 0].numel() for spans in runs) < SPAN:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        predictors = ReusePredictors(len(targets), model.num_experts, WIDTH)
        for step, loss in enumerate(_steps(predictors, runs)):
            if step % 10 == 0:
                log(loss, step)
    predictors.requires_grad_(False)
    rules = RULES | {"learned": learned(predictors, targets)}
    rates = keep_rates(trace, rules, MEASURED, is_held_out)
    return predictors, rates


def _steps(predictors: ReusePredictors, runs: list[Spans]) -> Iterator[float]:
    """Trains on logits with a spread of 1 in each layer. What that takes is in the weights afterwards."""
    counts = torch.tensor([float(len(spans.logits)) for spans in runs])
    by_layer = runs[0].logits.unbind(2)  # all of them at once in fp32 would be twice what is kept
    spread = torch.stack([logits.float().std() for logits in by_layer]).clamp(min=1e-3)[:, None]
    steps = max(2, min(STEPS, TIMES * int(counts.sum()) // SPANS))
    optimizer = torch.optim.AdamW(predictors.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(steps):
        logits, places, distances = runs[int(counts.multinomial(1))].drawn()
        logits, spans = logits / spread, torch.arange(SPANS)[:, None]
        states = predictors.states(logits)[spans, places].flatten(0, 1)
        drawn, distances = (part.flatten(0, 1).transpose(0, 1) for part in (logits[spans, places], distances))
        loss = F.binary_cross_entropy_with_logits(predictors(drawn, states), target_of(distances))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield float(loss.detach())
    with torch.no_grad():
        predictors.a.div_(spread[..., None])
        predictors.d.div_(spread[..., None])
