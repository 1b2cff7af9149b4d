"""What slots should keep, on real routing: of the misses that Belady's rule would spare, how many each eviction spares.

    predict-train collect checkpoints/tiny-moe --tokens 300000 --out trace
    predict-train collect checkpoints/tiny-moe --split held_out --tokens 60000 --out held-out
    predict-train fit trace --epochs 1 --out run
    predict-train export run --out predictors
    python -m benchmarks.keeping held-out --predictors predictors --json benchmarks/results/keeping.json

`rules`: all rules see the same sequences, each of which begins with empty slots; the way from the least recently used (0) to
Belady's rule (1), which knows the future, is measured in misses. Frequencies have half-lives from 4 tokens to 256.
`pools`: hit rates of one long text, if each layer has its own slots, if layers share them but none keeps more than its part for
long, as in the host's engine, and if all are one pool in which the least worth goes first.
`copies`: what a running model copies a token, and what its simulation says.
`cost`: microseconds that a reuse predictor takes for a layer and token, other memory being used between tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Iterator
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
    count_hits,
    frequency,
    keep_rates,
    last_use,
    learned,
)
from predict_train.data_collection.statistics import long_runs
from predict_train.data_collection.trace import Trace
from predict_train.predictors.checkpoint import Predictors, load_predictors
from predict_train.predictors.provenance import command, hardware, versions
from predict_train.predictors.reuse import HALF_LIFE, ReuseScores
from predict_train.runtime import offloaded
from predict_train.runtime.host import schedule
from predict_train.runtime.host.cache import Key, SlotCache
from predict_train.runtime.measure.replay import _longest_run, replay, scores_after
from predict_train.runtime.measure.routing import ReplayedRouting
from predict_train.runtime.measure.simulation import Costs, simulate
from predict_train.runtime.settings import OffloadConfig
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

HALF_LIVES = (4, 8, 16, 24, 32, 64, 128, 256)
TOKENS = 4096
"""Of the long text."""
COSTS = Costs(layer=3e-4, expert=1e-4, copy=5e-5)


class OnePool(SlotCache):
    """All layers' experts in one pool: whoever is worth least goes first."""

    def _layers_in_order(self) -> Iterator[Iterable[Key]]:
        yield list(self._slot_of)


def rules(trace: Trace, predictors: Predictors | None, rows: int) -> dict[str, Any]:
    asked = RULES | {f"half-life {tokens}": partial(frequency, half_life=tokens) for tokens in HALF_LIVES}
    if predictors is not None and predictors.reuse is not None:
        asked["learned"] = learned(predictors.reuse.predictors, predictors.reuse.layers)
    return keep_rates(trace, asked, rows)


def pools(trace: Trace, predictors: Predictors) -> list[dict[str, Any]]:
    """Hit rates of one long text by who shares slots."""
    assert predictors.reuse is not None
    parts = [trace.gather([run]) for run in long_runs(trace, TOKENS)]
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    ids, model = trace.expert_ids(columns), trace.manifest.model
    scores = scores_after(predictors.reuse.predictors, ids, [trace.router_logits(columns, t) for t in trace.sources])
    routing = ReplayedRouting(np.asarray(ids), np.asarray(ids), {}, scores)
    routed, found = Routed.of(ids[None], model.num_experts, columns), []
    own = {"frequency": frequency, "learned": learned(predictors.reuse.predictors, predictors.reuse.layers)}
    for share in SHARES:
        slots = max(model.top_k, round(share * model.num_experts))
        for eviction in ("least_stale", "frequency", "learned"):
            config = OffloadConfig(policy="on_demand", slots=slots * len(trace.sources), eviction=eviction)
            rule = own.get(eviction, last_use)
            row = {"slots": slots, "eviction": eviction, "tokens": len(ids)}
            row["own"] = float(count_hits(routed, rule(routed), [slots]).sum()) / ids.numel()
            row["shared"] = simulate(COSTS, routing, config, warmup=0).cache_hit_rate
            if eviction != "least_stale":
                with patch.object(schedule, "SlotCache", OnePool):
                    row["one pool"] = simulate(COSTS, routing, config, warmup=0).cache_hit_rate
            found.append(row)
    return found


def copies(trace: Trace, predictors: Predictors, name: str) -> list[dict[str, Any]]:
    """Copies a token of a running model, and of its simulation, over the longest text of the trace."""
    shard, start, length = max(
        ((number, *_longest_run(trace, number)) for number in range(len(trace.manifest.shards))), key=lambda run: run[2]
    )
    tokens = trace.column(shard, "token_ids")[start : start + length].long()[None]
    model, found = AutoModelForCausalLM.from_pretrained(name).eval(), []
    routing = replay(trace, length, trace.manifest.model.top_k, predictors)
    total = len(trace.sources) * trace.manifest.model.num_experts
    for share in SHARES:
        for eviction in ("lru", "least_stale", "frequency", "learned"):
            for policy in ("on_demand", "prefetch"):
                config = OffloadConfig(policy=policy, slots=round(share * total), eviction=eviction, device="cpu")
                with offloaded(model, predictors, config=config) as offload, torch.no_grad():
                    cache = None
                    for token in range(length):
                        cache = model(
                            tokens[:, token : token + 1], past_key_values=cache, use_cache=True
                        ).past_key_values
                    measured = offload.counters.copies / length
                simulated = simulate(COSTS, routing, config, warmup=0).copies
                row = {"slots": config.slots, "eviction": eviction, "policy": policy, "tokens": length}
                found.append(row | {"measured": measured, "simulated": simulated, "ratio": simulated / measured})
    return found


def cost(predictors: Predictors, top_k: int) -> dict[str, float]:
    """Microseconds of a reuse predictor for a layer and token."""
    assert predictors.reuse is not None
    reuse = predictors.reuse.predictors
    layers, experts = reuse.b2.shape
    scores, other, times = [ReuseScores(reuse, layer) for layer in range(layers)], torch.zeros(4_000_000), []
    for _ in range(300):
        ids = [torch.randperm(experts)[None, :top_k] for _ in range(layers)]
        logits = torch.randn(layers, experts).numpy()
        other.add_(1.0)
        begun = time.perf_counter()
        for one, chosen, said in zip(scores, ids, logits, strict=True):
            one.use(chosen)
            one.after(said)
        times.append(1e6 * (time.perf_counter() - begun) / layers)
    return {"median_us": statistics.median(times), "min_us": min(times), "experts": experts, "width": reuse.width}


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(
            *(
                f"{row[name]:.3f}" if isinstance(row.get(name), float) else str(row.get(name, ""))
                for name in rows[0] | row
            )
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--predictors", type=Path)
    parser.add_argument("--model", default="checkpoints/tiny-moe")
    parser.add_argument("--rows", type=int, default=MOST_ROWS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    trace = Trace.open(arguments.trace)
    predictors = None if arguments.predictors is None else load_predictors(arguments.predictors)
    model, found = trace.manifest.model, rules(trace, predictors, arguments.rows)
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
    facts: dict[str, Any] = {"model": model.name, "experts": model.num_experts, "top_k": model.top_k}
    facts |= {"half_life": HALF_LIFE, "rules": found}
    if predictors is not None and predictors.reuse is not None:
        facts["pools"] = pools(trace, predictors)
        facts["copies"] = copies(trace, predictors, arguments.model)
        facts["cost"] = cost(predictors, model.top_k)
        for name in ("pools", "copies"):
            show(name, facts[name])
        print(facts["cost"])
    if arguments.json is not None:
        facts |= {"command": command(), "versions": versions(), "hardware": hardware()}
        arguments.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
