"""What slots should keep, on real routing: of the misses that Belady's rule would spare, how many each eviction spares.

    predict-train collect checkpoints/tiny-moe --tokens 300000 --out trace
    predict-train collect checkpoints/tiny-moe --split held_out --tokens 60000 --out held-out
    predict-train fit trace --epochs 1 --out run
    predict-train export run --out predictors
    python -m benchmarks.keeping held-out --predictors predictors --json benchmarks/results/keeping.json

`rules`: all rules see the same sequences, each of which begins with empty slots; the way from the least recently used (0) to
Belady's rule (1), which knows the future, is measured in misses. Frequencies have half-lives from 4 tokens to 256. What `followers`
counts goes on from one sequence to the next, and begins with nothing.
`pools`: hit rates of one long text in the host's engine (simulated), if layers have equal shares of the slots and if all are one
pool in which the least worth goes first, up to Belady's rule over the pool. It knows when each expert is used next, in tokens and
layers. The way to it is measured in misses, from `lru` and from `least_stale` as the engine runs them.
`copies`: what a running model copies a token, and what its simulation says.
`cost`: microseconds that a reuse predictor and `followers` take for a layer and token, other memory being used between tokens, and
that it takes to find an expert that leaves.
`times`: milliseconds a token of the running model under each eviction, by turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from predict_train.data_collection.keeping import (
    MOST_ROWS,
    RULES,
    SHARES,
    Routed,
    Rule,
    Worth,
    frequency,
    keep_rates,
    learned,
    next_uses,
)
from predict_train.data_collection.statistics import long_runs
from predict_train.data_collection.trace import Trace
from predict_train.predictors.checkpoint import Predictors, load_predictors
from predict_train.predictors.generation import CACHE
from predict_train.predictors.provenance import command, hardware, versions
from predict_train.predictors.reuse import HALF_LIFE, ReuseScores
from predict_train.predictors.tables import figure_table
from predict_train.runtime import offloaded
from predict_train.runtime.host import cache
from predict_train.runtime.host.followers import Followers
from predict_train.runtime.measure.replay import _longest_run, replay, scores_after
from predict_train.runtime.measure.reuse import Numbers
from predict_train.runtime.measure.routing import ReplayedRouting
from predict_train.runtime.measure.simulation import Costs, simulate
from predict_train.runtime.settings import OffloadConfig
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

HALF_LIVES = (4, 8, 16, 24, 32, 64, 128, 256)
TOKENS = 4096
"""Of the long text."""
EVICTIONS = ("lru", "least_stale", "frequency", "followers", "learned")
SHARINGS: dict[str, dict[str, list[str]]] = {"lru": {"one pool": []}, "least_stale": {"shares": []}}
"""Of evictions that go by the last use: who shares slots under them."""
PARTS = ("rules", "pools", "copies", "cost", "times")
COSTS = Costs(layer=3e-4, expert=1e-4, copy=5e-5)


def followers() -> Rule:
    """What eviction `followers` keeps. It learns from one sequence after the other, as a running model does."""
    counted: list[Followers] = []

    def rule(routed: Routed) -> Worth:
        experts, layers = routed.used.shape[-1], routed.ids.shape[2]
        counted.extend(Followers(experts) for _ in range(layers - len(counted)))
        found = np.empty(routed.used.shape, dtype=np.float32)
        for sequence, tokens in enumerate(routed.ids.tolist()):
            for token, ids in enumerate(tokens):
                for layer, used in enumerate(ids):
                    counted[layer].add(np.array([used]))
                    found[sequence, token, layer] = counted[layer].worth
        return lambda token: torch.from_numpy(found[:, token])

    return rule


def rules(trace: Trace, predictors: Predictors | None, rows: int) -> dict[str, Any]:
    asked = RULES | {f"half-life {tokens}": partial(frequency, half_life=tokens) for tokens in HALF_LIVES}
    asked["followers"] = followers()
    if predictors is not None and predictors.reuse is not None:
        asked["learned"] = learned(predictors.reuse.predictors, predictors.reuse.layers)
    return keep_rates(trace, asked, rows)


def pools(trace: Trace, predictors: Predictors) -> list[dict[str, Any]]:
    """Hit rates of one long text by who shares slots."""
    assert predictors.reuse is not None
    parts = [trace.gather([run]) for run in long_runs(trace, TOKENS)]
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    ids, model = trace.expert_ids(columns), trace.manifest.model
    scores = scores_after(predictors.reuse.predictors, [trace.router_logits(columns, t) for t in trace.sources])
    found: list[dict[str, Any]] = []
    for share in SHARES:
        slots = max(model.top_k, round(share * model.num_experts))
        rates: dict[tuple[str, str], float] = {}
        for name in (*EVICTIONS, "belady"):
            eviction = "learned" if name == "belady" else name
            said = next_times(ids, model.num_experts) if name == "belady" else scores
            routing = ReplayedRouting(np.asarray(ids), np.asarray(ids), {}, said)
            config = OffloadConfig(policy="on_demand", slots=slots * len(trace.sources), eviction=eviction)
            for sharing, pooled in SHARINGS.get(name, {"shares": [], "one pool": [eviction]}).items():
                with patch.object(cache, "ONE_POOL", pooled):
                    rates[name, sharing] = simulate(COSTS, routing, config, warmup=0).cache_hit_rate
        best = rates["belady", "one pool"]
        for (name, sharing), rate in rates.items():
            row: dict[str, Any] = {
                "slots": slots,
                "eviction": name,
                "who": sharing,
                "tokens": len(ids),
                "hit rate": rate,
            }
            for start, before in (("lru", rates["lru", "one pool"]), ("least_stale", rates["least_stale", "shares"])):
                row[f"way from {start}"] = (rate - before) / (best - before)
            found.append(row)
    return found


def next_times(ids: torch.Tensor, num_experts: int) -> Numbers:
    """Scores of Belady's rule, `[tokens, layers, experts]`: the sooner an expert is used after a token, the higher.

    `ids` are `[tokens, layers, top_k]`. One token later is as many units as there are layers, one layer later is one.
    """
    distances = next_uses(Routed.of(ids[None], num_experts))[0].double()
    tokens, layers = torch.arange(len(ids))[:, None, None], torch.arange(ids.shape[1])[:, None]
    return -((tokens + distances) * ids.shape[1] + layers).numpy()


def longest_text(trace: Trace) -> torch.Tensor:
    """The tokens `[1, tokens]` of the longest text of the trace, which `replay` takes too."""
    shard, start, length = max(
        ((number, *_longest_run(trace, number)) for number in range(len(trace.manifest.shards))), key=lambda run: run[2]
    )
    return trace.column(shard, "token_ids")[start : start + length].long()[None]


@torch.no_grad()
def decode(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """Feeds the tokens one by one."""
    known = None
    for token in tokens.split(1, dim=1):
        known = model(token, **{CACHE: known}, use_cache=True)[CACHE]


def copies(trace: Trace, predictors: Predictors, name: str) -> list[dict[str, Any]]:
    """Copies a token of a running model, and of its simulation, over the longest text of the trace."""
    tokens, found = longest_text(trace), []
    model, length = AutoModelForCausalLM.from_pretrained(name).eval(), tokens.shape[1]
    routing = replay(trace, length, trace.manifest.model.top_k, predictors)
    total = len(trace.sources) * trace.manifest.model.num_experts
    for share in SHARES:
        for eviction in EVICTIONS:
            for policy in ("on_demand", "prefetch"):
                config = OffloadConfig(policy=policy, slots=round(share * total), eviction=eviction, device="cpu")
                with offloaded(model, predictors, config=config) as offload:
                    decode(model, tokens)
                    measured = offload.counters.copies / length
                simulated = simulate(COSTS, routing, config, warmup=0).copies
                row: dict[str, Any] = {"slots": config.slots, "eviction": eviction, "policy": policy, "tokens": length}
                found.append(row | {"measured": measured, "simulated": simulated, "ratio": simulated / measured})
    return found


def times(trace: Trace, predictors: Predictors, name: str, rounds: int = 5) -> list[dict[str, Any]]:
    """Milliseconds a token with a quarter of the experts in slots, on demand, and the change from the default round by round."""
    tokens, found = longest_text(trace), {eviction: list[float]() for eviction in EVICTIONS}
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    slots = len(trace.sources) * trace.manifest.model.num_experts // 4
    for number in range(rounds + 1):
        for eviction in EVICTIONS:
            with offloaded(model, predictors, policy="on_demand", slots=slots, eviction=eviction, device="cpu"):
                begun = time.perf_counter()
                decode(model, tokens)
                if number:  # the first round warms up
                    found[eviction].append(1000 * (time.perf_counter() - begun) / tokens.shape[1])
    return [
        {"slots": slots, "eviction": eviction, "median_ms": statistics.median(own), "min_ms": min(own)}
        | {"change": statistics.median(one / by - 1 for one, by in zip(own, found["least_stale"], strict=True))}
        for eviction, own in found.items()
    ]


def cost(predictors: Predictors, top_k: int) -> list[dict[str, Any]]:
    """Microseconds of a reuse predictor, and of `followers`, for a layer and token, and for an expert that leaves one pool."""
    assert predictors.reuse is not None
    reuse = predictors.reuse.predictors
    layers, experts = reuse.e.shape
    scores, other = ReuseScores(reuse), torch.zeros(4_000_000)
    counted = [Followers(experts) for _ in range(layers)]
    times: dict[str, list[float]] = {"learned": [], "followers": []}
    for _ in range(300):
        ids = [torch.randperm(experts)[None, :top_k] for _ in range(layers)]
        logits, begun = torch.randn(layers, 1, experts).numpy(), {}
        other.add_(1.0)
        begun["learned"] = time.perf_counter()
        for layer, said in enumerate(logits):
            scores.after(layer, said)
        times["learned"].append(time.perf_counter() - begun["learned"])
        used = [chosen.numpy() for chosen in ids]
        other.add_(1.0)
        begun["followers"] = time.perf_counter()
        for follows, now in zip(counted, used, strict=True):
            follows.add(now)
            list(follows.worth)
        times["followers"].append(time.perf_counter() - begun["followers"])
    return [
        {"what": name, "experts": experts, "layers": layers}
        | {"median_us": 1e6 * statistics.median(some) / layers, "min_us": 1e6 * min(some) / layers}
        for name, some in times.items()
    ] + [leaving_cost(*shape) for shape in ((layers, experts, top_k), (48, 128, 8))]


def leaving_cost(layers: int, experts: int, top_k: int, tokens: int = 100) -> dict[str, Any]:
    """Microseconds for an expert that leaves one pool, with all that is kept up for that. A quarter of the experts have slots."""
    generator, times, slots = np.random.default_rng(0), [], layers * experts // 4
    worth = generator.random((tokens, layers, experts))
    used, now = worth.argsort(-1)[..., :top_k].tolist(), worth[0].tolist()
    one = cache.SlotCache(slots, (layers, experts), cache.Eviction.LEARNED, now.__getitem__)
    one.fill([((place % layers, place // layers), place) for place in range(slots)])
    for token, said in enumerate(worth.tolist()):
        now[:], left, begun = said, 0, time.perf_counter()
        for layer in range(layers):
            one.layer = layer
            one.rated(layer)
            for expert in used[token][layer]:
                key = layer, expert
                if key in one:
                    one.pin(key)
                else:
                    one.admit(key)
                    left += 1
            one.unpin_all()
        times.append((time.perf_counter() - begun) / left)
    median, least = 1e6 * statistics.median(times), 1e6 * min(times)
    return {"what": "leaving", "experts": experts, "layers": layers, "median_us": median, "min_us": least}


def show_rules(found: dict[str, Any]) -> None:
    shown = []
    for name, rates in found["hit_rates"].items():
        ways = found["way"].get(name, [None] * len(rates))
        cells = (
            f"{sum(r) / len(r):.3f}" + ("" if w is None else f" ({w:.0%})") for r, w in zip(rates, ways, strict=True)
        )
        shown.append(
            {"rule": name} | {f"{slots} slots": cell for slots, cell in zip(found["slots"], cells, strict=True)}
        )
    show("hit rate, and way from lru to belady", shown)


def show(title: str, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = figure_table(*names, title=title)
    for row in rows:
        cells = (row.get(name, "") for name in names)
        table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--predictors", type=Path)
    parser.add_argument("--model", default="checkpoints/tiny-moe")
    parser.add_argument("--rows", type=int, default=MOST_ROWS)
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    trace, parts = Trace.open(arguments.trace), arguments.parts.split(",")
    predictors = None if arguments.predictors is None else load_predictors(arguments.predictors)
    model = trace.manifest.model
    facts: dict[str, Any] = {"model": model.name, "experts": model.num_experts, "top_k": model.top_k}
    facts["half_life"] = HALF_LIFE
    if "rules" in parts:
        facts["rules"] = rules(trace, predictors, arguments.rows)
        show_rules(facts["rules"])
    if predictors is not None and predictors.reuse is not None:
        work: dict[str, Callable[[], Any]] = {
            "pools": lambda: pools(trace, predictors),
            "copies": lambda: copies(trace, predictors, arguments.model),
            "cost": lambda: cost(predictors, model.top_k),
            "times": lambda: times(trace, predictors, arguments.model),
        }
        for name in (name for name in work if name in parts):
            facts[name] = work[name]()
            show(name, facts[name])
    if arguments.json is not None:
        facts |= {"command": command(), "versions": versions(), "hardware": hardware()}
        arguments.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
