"""How often the slots of a layer hit, by the rule that says which experts keep them.

The rules are what the runtime's evictions do, and Belady's rule: it keeps what is used soonest, which it reads in the trace, so
no rule can hit more often. A token's experts are all in slots while the token is computed, as in the runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ..predictors.reuse import HALF_LIFE, ReusePredictors
from .columns import Column, Columns
from .statistics import long_runs
from .trace import Piece, Trace

SHARES = (0.125, 0.25, 0.5)
"""Of a layer's experts: how many have slots."""
MOST_ROWS = 16_384
AT_ONCE = 1 << 24
"""Tokens of all layers and experts in memory at a time."""

Worth = Callable[[int], torch.Tensor]
"""From a token's number to what each expert is worth after it, `[sequences, layers, experts]`. It is called for each in turn."""
Rule = Callable[["Routed"], Worth]


class Routed(NamedTuple):
    """What sequences of the same length have used. Each of them begins with empty slots."""

    ids: torch.Tensor
    """`[sequences, tokens, layers, top_k]`, int64."""
    used: torch.Tensor
    """The same as bool, `[sequences, tokens, layers, experts]`."""
    columns: Columns
    """What else the trace has, one row a token, sequence by sequence."""

    @classmethod
    def of(cls, ids: torch.Tensor, num_experts: int, columns: Columns | None = None) -> Routed:
        used = torch.zeros(*ids.shape[:-1], num_experts, dtype=torch.bool).scatter_(-1, ids, True)
        return cls(ids, used, columns or {})


def last_use(routed: Routed) -> Worth:
    """The least recently used expert goes first."""
    sequences, _, layers, top_k = routed.ids.shape
    last = torch.full((sequences, layers, routed.used.shape[-1]), -1.0)
    order = (torch.arange(top_k) / top_k).expand(sequences, layers, -1)

    def after(token: int) -> torch.Tensor:
        return last.scatter_(-1, routed.ids[:, token], order + token)

    return after


def frequency(routed: Routed, half_life: float = HALF_LIFE) -> Worth:
    """The expert goes first that was used least often lately."""
    counts, left = torch.zeros_like(routed.used[:, 0], dtype=torch.float32), 2 ** (-1 / half_life)

    def after(token: int) -> torch.Tensor:
        return counts.mul_(left).add_(routed.used[:, token])

    return after


def belady(routed: Routed) -> Worth:
    """The expert goes first that is used last, or never again."""
    distances = next_uses(routed)
    return lambda token: -distances[:, token].float()


def next_uses(routed: Routed) -> torch.Tensor:
    """How many tokens after each one every expert is used next, int32, as `used`; far more than there are if it is not."""
    distance = torch.full_like(routed.used[:, 0], 2**20, dtype=torch.int32)
    found = []
    for token in reversed(range(routed.used.shape[1])):
        found.append(distance)
        distance = torch.where(routed.used[:, token], 0, distance) + 1
    return torch.stack(found[::-1], 1)


def learned(predictors: ReusePredictors, targets: list[int]) -> Rule:
    """The expert goes first whose reuse predictor says so. The routers' logits of the `targets` are among the columns."""

    def rule(routed: Routed) -> Worth:
        logits = logits_of(routed, targets)
        with torch.no_grad():
            states = predictors.states(logits)

        def after(token: int) -> torch.Tensor:
            with torch.no_grad():
                scores: torch.Tensor = predictors(logits[:, token].transpose(0, 1), states[:, token])
            return scores.transpose(0, 1)

        return after

    return rule


def logits_of(routed: Routed, targets: list[int]) -> torch.Tensor:
    """The routers' logits, fp32 `[sequences, tokens, layers, experts]`, which are among the columns."""
    logits = torch.stack([routed.columns[Column.ROUTER_LOGITS.of(target)] for target in targets], 1)
    return logits.unflatten(0, routed.ids.shape[:2]).float()


def count_hits(routed: Routed, worth: Worth, slots: list[int]) -> torch.Tensor:
    """How many of the used experts had a slot already, int64 `[numbers of slots, layers]`.

    `slots` are numbers of slots of one layer, each at least the top k. An expert that is needed takes an empty slot, or the slot
    of the expert that is worth least once the router has decided.
    """
    used = routed.used
    present = torch.zeros(len(slots), *used[:, 0].shape, dtype=torch.bool)
    hits = torch.zeros(len(slots), used.shape[2], dtype=torch.int64)
    for token in range(used.shape[1]):
        now, value = used[:, token], worth(token)
        for number, size in enumerate(slots):
            hits[number] += (now & present[number]).sum((0, 2))
            rank = value.masked_fill(~present[number], -torch.inf).masked_fill(now, torch.inf)
            kept = rank.topk(size)
            present[number].zero_().scatter_(-1, kept.indices, kept.values > -torch.inf)
    return hits


def keep_rates(
    trace: Trace, rules: dict[str, Rule], most_rows: int = MOST_ROWS, among: torch.Tensor | None = None
) -> dict[str, Any]:
    """The hit rates of slots by rule, number of slots and layer, as plain JSON values.

    `slots` are `SHARES` of the experts, at least the top k. `hit_rates` has for each of `rules`, by number of slots, a rate for
    each layer of `layers`. `way` has, likewise without layers, how many of the misses that Belady's rule would spare each rule
    spares, against the least recently used; None where there are none to spare. `rows` and `sequences` say what was measured:
    runs of consecutive tokens, at least half as long as the longest, evenly spaced, of the sequences `among` which
    they are to be (see `long_runs`).
    """
    model, layers = trace.manifest.model, list(trace.sources)
    slots = [max(model.top_k, round(share * model.num_experts)) for share in SHARES]
    hits = {name: torch.zeros(len(slots), len(layers), dtype=torch.int64) for name in rules}
    rows = sequences = 0
    names = tuple(Column.ROUTER_LOGITS.of(target) for target in layers) if "learned" in rules else ()
    for routed in routed_runs(trace, most_rows, names, among):
        rows, sequences = rows + routed.ids[..., 0, 0].numel(), sequences + len(routed.ids)
        for name, rule in rules.items():
            hits[name] += count_hits(routed, rule(routed), slots)
    rates = {name: count.double() / (rows * model.top_k) for name, count in hits.items()}
    return {
        "layers": layers,
        "slots": slots,
        "hit_rates": {name: rate.tolist() for name, rate in rates.items()},
        "way": {name: ways(rates, rate) for name, rate in rates.items() if name not in ("lru", "belady")},
        "rows": rows,
        "sequences": sequences,
    }


def ways(rates: dict[str, torch.Tensor], rate: torch.Tensor) -> list[float | None]:
    """How far `rate` is on the way from `lru` to `belady`, all `[numbers of slots, layers]`, by number of slots."""
    least, most = rates["lru"].mean(1), rates["belady"].mean(1)
    shares = ((rate.mean(1) - least) / (most - least)).tolist()
    return [share if more else None for share, more in zip(shares, (most > least).tolist(), strict=True)]


RULES: dict[str, Rule] = {"lru": last_use, "frequency": frequency, "belady": belady}
"""Those that need nothing but the trace."""


def routed_runs(
    trace: Trace, most_rows: int, names: tuple[str, ...] = (), among: torch.Tensor | None = None
) -> Iterator[Routed]:
    """The runs of `keep_rates`, with those of their columns that are named. Those that come together are cut to the shortest."""
    experts = trace.manifest.model.num_experts
    runs = sorted(long_runs(trace, most_rows, among), key=lambda run: len(run[1]))
    while runs:
        length = len(runs[0][1])
        count = max(1, AT_ONCE // (length * len(trace.sources) * experts))
        some, runs = runs[:count], runs[count:]
        pieces: list[Piece] = [(shard, rows[:length]) for shard, rows in some]
        chosen = [Column.EXPERT_IDS.of(target) for target in trace.sources]
        columns = trace.gather(pieces, [*chosen, *names])
        yield Routed.of(trace.expert_ids(columns).unflatten(0, (len(some), length)), experts, columns)
