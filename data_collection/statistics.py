"""Statistics of a trace: how well each layer's experts can be guessed, how soon they come again, and how evenly they are used.

At most a few thousand rows are in memory, however large the trace is. Guesses are expensive and are measured on a
sample of rows, and so is how soon experts come again. Loads and previous tokens need the expert ids only, and are exact over
all rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ..predictors.forms import PredictorForm
from ..predictors.metrics import HitRate
from ..predictors.routing import Routing
from ..predictors.speculation import candidates
from ..predictors.stacked import StackedSpeculators
from .columns import Column, Columns
from .examples import make_batch
from .trace import Piece, Trace

SAMPLE_ROWS = 32_768
SLOT_SHARES = (0.0625, 0.1875, 0.375, 0.6328)
"""Of a layer's experts: with 128 experts 8, 24, 48 and 81 slots."""


def trace_statistics(trace: Trace, sample_rows: int = SAMPLE_ROWS) -> dict[str, Any]:
    """Hit rates and expert loads of every target layer, as plain JSON values.

    `rows` says how many rows each figure uses: `training_free` about `sample_rows` evenly spaced ones, `load` all,
    `reuse` whole sequences (see `reuse`), `previous_token` all whose previous token is in the same shard. For each target, `hit_rate` holds `k`, `k+2`, `2k`
    (training-free, with so many candidates) and `previous_token` (None if no row has one), `load` the tokens of each
    expert, and `balance` their summary (see `balance`). Raises `TraceError` if the trace can't be read.
    """
    guessed, sampled = _training_free(trace, sample_rows)
    repeated, pairs = _previous_token(trace)
    loads = _loads(trace)
    layers = []
    for number, entry in enumerate(trace.manifest.layers):
        rates: dict[str, float | None] = {name: values[number] for name, values in guessed.items()}
        layers.append(
            {
                "layer": entry.layer,
                "source": entry.source,
                "hit_rate": rates | {"previous_token": repeated[number] if pairs else None},
                "control": entry.control,
                "balance": balance(loads[number]),
                "load": loads[number].tolist(),
            }
        )
    curve = reuse(trace, sample_rows)
    rows = {"training_free": sampled, "previous_token": pairs, "load": trace.rows, "reuse": curve.pop("rows")}
    return {"top_k": trace.manifest.model.top_k, "rows": rows, "reuse": curve, "layers": layers}


def balance(load: torch.Tensor) -> dict[str, float]:
    """How even the `load` `[experts]` (tokens of each expert) is.

    `max_over_mean` is 1 if all loads are equal. `entropy` is divided by the logarithm of the number of experts: 1 is
    uniform, 0 is one expert with all tokens. `idle` counts the experts without tokens.
    """
    share = load.double() / load.sum()
    entropy = -(share * share.clamp(min=1e-300).log()).sum().item()
    return {
        "max_over_mean": share.max().item() * len(load),
        "entropy": entropy / math.log(len(load)) if len(load) > 1 else 1.0,
        "idle": int((load == 0).sum()),
    }


def _training_free(trace: Trace, sample_rows: int) -> tuple[dict[str, list[float]], int]:
    """By number of candidates: each target's hit rate; and how many rows were measured."""
    model = trace.manifest.model
    sizes = {"k": model.top_k, "k+2": model.top_k + 2, "2k": 2 * model.top_k}
    sizes = {name: min(size, model.num_experts) for name, size in sizes.items()}
    chosen = trace.spaced(sample_rows)
    batches = (trace.read(shard, rows) for shard, rows in trace.pieces(chosen))
    rates = hit_rates(batches, trace.sources, trace.stacked(), list(sizes.values()))
    by_size = {name: list(found.values()) for name, found in zip(sizes, rates, strict=True)}
    return by_size, sum(map(len, chosen))


def hit_rates(
    batches: Iterable[Columns],
    sources: dict[int, int | None],
    speculators: StackedSpeculators,
    sizes: list[int],
    mlps: Mapping[int, PredictorForm] | None = None,
) -> list[dict[int, float]]:
    """For each number of candidates in `sizes`, by target: the recall of the speculation, over the rows of `batches`.

    A target without an MLP is speculated on training-free. MLPs are fp32, like the `speculators`, which are in the
    order of `sources`. An MLP with a memory remembers tokens in the rows before, if `batches` have them.
    """
    metrics = [HitRate(len(sources)) for _ in sizes]
    for routings, ids in speculated(batches, sources, speculators, mlps or {}):
        found = torch.stack([candidates(routing, max(sizes)) for routing in routings])
        for metric, size in zip(metrics, sizes, strict=True):
            metric.update(found[..., :size], ids)
    return [dict(zip(sources, metric.rates(), strict=True)) for metric in metrics]


@torch.no_grad()
def speculated(
    batches: Iterable[Columns],
    sources: dict[int, int | None],
    speculators: StackedSpeculators,
    mlps: Mapping[int, PredictorForm],
) -> Iterator[tuple[list[Routing], torch.Tensor]]:
    """For the rows of each batch: every target's speculated routing, and the experts `[targets, rows, top_k]` that its router chose.

    The arguments are those of `hit_rates`.
    """
    memory = max((mlp.memory for mlp in mlps.values()), default=0)
    for columns in batches:
        batch, routings = make_batch(columns, sources, speculators, memory), []
        for number, target in enumerate(sources):
            router = speculators.wirings[number].router
            own = target in mlps
            routings.append(batch.speculated(number, mlps[target], router) if own else router(batch.quasi[number]))
        yield routings, batch.ids


def _previous_token(trace: Trace) -> tuple[list[float], int]:
    """Each target's hit rate with the previous token's experts as the guess; and how many rows have a previous token."""
    metric, pairs = HitRate(len(trace.sources)), 0
    for shard in range(len(trace.manifest.shards)):
        token, order = trace.by_token(shard)
        follows = (token.diff() == 1).nonzero().flatten()
        present, before = order[follows + 1], order[follows]
        for now, then in zip(present.split(trace.rows_at_once), before.split(trace.rows_at_once), strict=True):
            ids = [trace.column(shard, Column.EXPERT_IDS.of(target)) for target in trace.sources]
            guess = torch.stack([column[then] for column in ids])
            metric.update(guess, torch.stack([column[now] for column in ids]))
            pairs += len(now)
    return metric.rates() if pairs else [], pairs


def reuse(trace: Trace, most_rows: int) -> dict[str, Any]:
    """How often slots of one layer hit that hold the experts used last: the mean over all targets and tokens.

    `slots` are numbers of slots, `SLOT_SHARES` of the experts, and `hit_rates` theirs. Each sequence begins with empty slots, and
    each expert of a token counts. `rows` and `sequences` say of what: runs of consecutive tokens that are at least half as long
    as the longest, evenly spaced, in all about `most_rows` rows.
    """
    experts, names = trace.manifest.model.num_experts, [Column.EXPERT_IDS.of(target) for target in trace.sources]
    slots = [max(1, round(share * experts)) for share in SLOT_SHARES]
    hits, accesses, rows, sequences = torch.zeros(len(slots), dtype=torch.int64), 0, 0, 0
    for run in long_runs(trace, most_rows):
        distances = stack_distances(trace.expert_ids(trace.gather([run], names)), experts)
        hits += torch.stack([(distances <= size).sum() for size in slots])
        accesses, rows, sequences = accesses + distances.numel(), rows + len(distances), sequences + 1
    rates = (hits.double() / accesses).tolist()
    return {"slots": slots, "hit_rates": rates, "rows": rows, "sequences": sequences}


def long_runs(trace: Trace, most_rows: int, among: torch.Tensor | None = None) -> Iterator[Piece]:
    """Runs of consecutive tokens, at least half as long as the longest, evenly spaced, in all about `most_rows` rows.

    `among`, bool, says of each sequence by its number whether its runs are meant; by default all are.
    """
    lengths = []
    for shard in range(len(trace.manifest.shards)):
        order, found = _runs(trace, shard)
        sequences = trace.places(shard)[0][order[found.cumsum(0) - found]].long()
        lengths.append(found if among is None else torch.where(among[sequences], found, 0))
    half = max(1, *(int(found.max()) for found in lengths)) / 2
    step = max(1, round(sum(int(found[found >= half].sum()) for found in lengths) / most_rows))
    passed = 0
    for shard, found in enumerate(lengths):
        chosen = (found >= half).nonzero().flatten()
        first, passed = -passed % step, passed + len(chosen)
        if first < len(chosen):
            order, every = _runs(trace, shard)
            runs = order.split(every.tolist())
            yield from ((shard, runs[number]) for number in chosen[first::step].tolist())


def _runs(trace: Trace, shard: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of a shard by sequence and position, and the lengths of the runs of consecutive tokens among them."""
    token, order = trace.by_token(shard)
    starts = torch.cat([torch.tensor([0]), (token.diff() != 1).nonzero().flatten() + 1, torch.tensor([len(token)])])
    return order, starts.diff()


def stack_distances(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many slots each access needs to hit, if slots hold the experts used last: as `ids` `[tokens, layers, top_k]`, int64.

    That is how many different experts its layer used since it used this one, and one more; at a first use it is more than
    `num_experts`. A layer uses a token's experts in their order.
    """
    tokens, layers, top_k = ids.shape
    last = torch.full((layers, num_experts), -1)
    earlier = torch.ones(top_k, top_k, dtype=torch.bool).tril(-1)
    found = torch.empty_like(ids)
    for token in range(tokens):
        before = last.gather(1, ids[token])
        after_it = (last.unsqueeze(1) > before.unsqueeze(2)).sum(-1)
        # Of the same token: those that were last used before it, and so are not counted yet.
        after_it += ((before.unsqueeze(1) < before.unsqueeze(2)) & earlier).sum(-1)
        found[token] = torch.where(before < 0, num_experts, after_it) + 1
        last.scatter_(1, ids[token], (token * top_k + torch.arange(top_k)).expand(layers, -1))
    return found


def _loads(trace: Trace) -> torch.Tensor:
    """How many tokens each expert of each target took, `[targets, experts]`, int64, over all rows."""
    experts = trace.manifest.model.num_experts
    loads = torch.zeros(len(trace.sources), experts, dtype=torch.int64)
    for shard in range(len(trace.manifest.shards)):
        for number, target in enumerate(trace.sources):
            ids = trace.column(shard, Column.EXPERT_IDS.of(target))
            loads[number] += torch.bincount(ids.flatten().long(), minlength=experts)
    return loads
