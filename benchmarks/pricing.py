"""Priced guesses: `auto` against `on_demand` and `prefetch` in simulated cells, and what the prices themselves cost a running model.

    predict-train collect checkpoints/tiny-moe --split held_out --tokens 60000 --inputs --out held-out
    python -m benchmarks.pricing --trace held-out --predictors checkpoints/tiny-moe-predictors

The cells are three links, three shares of slots and three hit rates, of routing drawn as local as that of Qwen3-30B-A3B; and the same
links and shares with the routing of a trace, guessed training-free and by predictors, whose candidates have calibrated probabilities.
Their costs are those of the 1.2 B-parameter model of benchmarks/models/moe-1b.json on two cores. The link binds in a cell where
`on_demand` copies for as long as it computes. The model itself decodes before that with and without prices, in turns, and makes the
same copies in both. Prints tables and writes JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from predict_train.data_collection.trace import Trace
from predict_train.predictors.architecture import farther
from predict_train.predictors.checkpoint import Predictors, load_predictors
from predict_train.predictors.confidence import Confidence
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.generation import CACHE
from predict_train.predictors.provenance import command, hardware, versions
from predict_train.predictors.tables import figure_table
from predict_train.runtime import offloaded
from predict_train.runtime.guess import FoldedGuesser
from predict_train.runtime.host.price import Prices
from predict_train.runtime.load import load_offloaded
from predict_train.runtime.measure.plan import Hardware, costs_of, read_shape
from predict_train.runtime.measure.replay import replay
from predict_train.runtime.measure.routing import PRESETS, ReplayedRouting, draw_routing, replaying
from predict_train.runtime.measure.simulation import Costs, nearest, simulate
from predict_train.runtime.settings import OffloadConfig
from predict_train.train.calibration import calibrate
from rich.console import Console
from transformers import AutoConfig

from benchmarks.runtime import CONFIG, RESULTS, predictors_of, prompt

LINKS = {"0.75 GB/s": 0.75e9, "1.5 GB/s": 1.5e9, "4 GB/s": 4e9}
SHARES = (0.125, 0.25, 0.5)
HIT_RATES = (0.6, 0.8, 0.93)
COMPUTE, SPECULATION = 22.2e-3, 0.1e-3
"""Seconds of a token's computation without waits, and of one layer's speculation: benchmarks/results/runtime.json."""
WARMUP, TOKENS = 80, 160
LAYERS = 12
TURN = 12
"""Tokens of a turn, by which the own cost is measured."""


def costs(link: float) -> Costs:
    """Of a decode step of the model in `CONFIG`."""
    shape = read_shape(AutoConfig.from_pretrained(CONFIG), torch.bfloat16)
    active = shape.rest_bytes + shape.layers * (shape.layer_bytes + shape.top_k * shape.expert_bytes)
    machine = Hardware(active / COMPUTE, link, latency=0.0, launch=0.0, is_cuda=False)
    return replace(costs_of(shape, machine), speculation=SPECULATION)


def cell(
    link: str, share: float, experts: int, routing: ReplayedRouting, horizon: int, eviction: str
) -> dict[str, Any]:
    """One cell: milliseconds and copies of a token under each policy, and how they compare."""
    ways = {name: (name, eviction) for name in ("on_demand", "prefetch", "auto")} | {
        "prefetch, lru": ("prefetch", "lru")
    }
    sources, slots = farther(nearest(range(LAYERS)), horizon), round(share * LAYERS * experts)
    found = {
        name: simulate(costs(LINKS[link]), routing, OffloadConfig(policy=policy, slots=slots, eviction=kept), sources,
                       warmup=WARMUP)
        for name, (policy, kept) in ways.items()
    }  # fmt: skip
    demand, auto = found["on_demand"], found["auto"]
    return {
        "link": link,
        "share": share,
        "hit_rate": routing.hit_rate,
        "horizon": horizon,
        "eviction": eviction,
        "ms": {name: 1000 * one.seconds for name, one in found.items()},
        "copies": {name: one.copies for name, one in found.items()},
        "binds": demand.copying >= demand.computing,
        "over_the_better": auto.seconds / min(demand.seconds, found["prefetch"].seconds) - 1,
        "more_bytes_than_on_demand": auto.copies / demand.copies - 1,
        "over_prefetch_with_lru": auto.seconds / found["prefetch, lru"].seconds - 1,
    }


def drawn(horizon: int) -> Iterator[dict[str, Any]]:
    """The cells of drawn routing, whose probabilities are learned as it runs."""
    for hit_rate in HIT_RATES:
        statistic = replace(PRESETS["qwen3-30b-a3b"], hit_rate=hit_rate)
        routing = draw_routing(statistic, steps=WARMUP + TOKENS, layers=LAYERS, num_experts=64, top_k=4)
        for link, share in itertools.product(LINKS, SHARES):
            yield {"routing": "drawn"} | cell(link, share, 64, routing, horizon, "least_stale")


def traced(path: Path, predictors: Predictors, eviction: str) -> Iterator[dict[str, Any]]:
    """The cells of a trace's routing, guessed with and without predictors."""
    trace = Trace.open(path)
    for name, known in (("predictors", predictors), ("training-free", predictors.training_free())):
        known = calibrated(known, trace)
        routing = replay(trace, WARMUP + TOKENS, trace.manifest.model.top_k, known)
        for link, share in itertools.product(LINKS, SHARES):
            facts = {"routing": name, "calibrated": routing.chances is not None}
            yield facts | cell(link, share, trace.manifest.model.num_experts, routing, 1, eviction)


def calibrated(predictors: Predictors, trace: Trace) -> Predictors:
    """The same with a confidence for each layer, fitted on every third run of 64 tokens of `trace` as `export` does it."""
    model, sources = trace.manifest.model, predictors.sources_among(trace.sources)
    names = trace.columns_for(sources, max((mlp.memory for mlp in predictors.mlps.values()), default=0))
    rows = [trace.by_token(shard)[1] for shard in range(len(trace.manifest.shards))]
    rows = [own[torch.arange(len(own)) // 64 % 3 == 1] for own in rows]
    batches = (trace.read(shard, some, names) for shard, own in enumerate(rows) for some in own.split(2048))
    most = min(2 * model.top_k, model.num_experts)
    found = calibrate(batches, sources, trace.stacked(sources), predictors.mlps, most)
    return replace(predictors, layers=[replace(predictors.of(t), confidence=found.get(t)) for t in trace.sources])


class Paying(Prices):
    """Prices that compute all that prices compute, and have every candidate copied nevertheless."""

    prefetches = True

    def least_chance(self, *where: Any, **how: Any) -> float:
        super().least_chance(*where, **how)
        return -math.inf


@contextmanager
def by_turns(offload: Any, replayed: Any) -> Iterator[Any]:
    """Yields a function that turns the prices of an offload, with the values of its guesses, on or off."""
    engine, layers = offload._engine, offload._control.layers
    prices = Paying(LAYERS, offload.slots, time.perf_counter, engine.transfers.copy_seconds)
    kinds = {is_on: {layer.target.number: layer.guesser for layer in layers} for is_on in (True, False)}
    speculators = {layer.target.number: layer.guesser._speculator for layer in layers}
    for layer in layers:
        number, target = layer.target.number, layer.target
        for is_on in (True, False):
            own = FoldedGuesser(speculators[number], target.layer.top_k, target.candidates, weighs=False, sure=is_on)
            kinds[is_on][number] = replayed.guesser(target.layer.index, own)

    def turn(is_on: bool) -> None:
        engine.prices = engine._schedule._prices = prices if is_on else None
        offload._passes.choice = prices if is_on else None
        offload._control.is_on = True
        for layer in layers:
            layer.guesser = kinds[is_on][layer.target.number]

    yield turn


@torch.no_grad()
def own_cost(slots: int, turns: int, pack: Path | None) -> dict[str, Any]:
    """Milliseconds of a token with and without prices, by turns. With `pack` the experts are in this file, else in memory."""
    config = AutoConfig.from_pretrained(CONFIG)
    model: Any = load_offloaded(config, pack=pack, device="cpu", dtype=torch.bfloat16)
    model.expert_offload.detach()
    layers = find_moe_layers(model)
    known = predictors_of(config, layers, LAYERS)
    known = replace(known, layers=[replace(entry, confidence=Confidence(0.5)) for entry in known.layers])
    routing = draw_routing(PRESETS["moe-1b"], steps=512, layers=LAYERS, num_experts=64, top_k=4)
    times: dict[bool, list[float]] = {True: [], False: []}
    with (
        replaying(layers, routing) as replayed,
        offloaded(model, known, policy="auto", slots=slots, device="cpu") as offload,
        by_turns(offload, replayed) as turn,
    ):
        output = model(input_ids=prompt(), use_cache=True)
        for number in range(2 * turns + 2):
            # In the order 1 2 2 1, so that a steady change of speed favours neither.
            is_on = number % 4 in (1, 2)
            turn(is_on)
            begun = time.perf_counter()
            for _ in range(TURN):
                ids = output.logits[:, -1:].argmax(-1)
                output = model(input_ids=ids, **{CACHE: output[CACHE]}, use_cache=True)
            if number > 1:  # the first fill the slots
                times[is_on].append(1000 * (time.perf_counter() - begun) / TURN)
    ratios = [priced / plain - 1 for priced, plain in zip(times[True], times[False], strict=True)]
    return {
        "slots": slots,
        "ms": {"priced": statistics.median(times[True]), "unpriced": statistics.median(times[False])},
        "change": {"median": statistics.median(ratios), "quartiles": statistics.quantiles(ratios)},
        "turns": turns,
        "tokens_of_a_turn": TURN,
    }


def show(console: Console, title: str, cells: list[dict[str, Any]]) -> None:
    table = figure_table(
        "routing", "link", "slots", "hit", "on_demand", "prefetch", "auto", "vs better", "bytes", "vs lru", title=title
    )
    for one in cells:
        ms = one["ms"]
        table.add_row(
            one["routing"], one["link"] + (" *" if one["binds"] else ""), f"{one['share']:.1%}", f"{one['hit_rate']:.2f}",
            *(f"{ms[name]:.1f}" for name in ("on_demand", "prefetch", "auto")), f"{one['over_the_better']:+.1%}",
            f"{one['more_bytes_than_on_demand']:+.1%}", f"{one['over_prefetch_with_lru']:+.1%}",
        )  # fmt: skip
    console.print(table)
    binding = [one for one in cells if one["binds"]]
    line = f"worst against the better policy: {max(one['over_the_better'] for one in cells):+.1%}"
    if binding:
        line += f"; where the link binds (*): {max(one['more_bytes_than_on_demand'] for one in binding):+.1%} bytes at the most, "
        line += f"{statistics.median(one['over_prefetch_with_lru'] for one in binding):+.1%} time against prefetch with lru (median)"
    console.print(line, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--trace", type=Path, help="with all layers and inputs; without it only drawn routing is simulated"
    )
    parser.add_argument("--predictors", type=Path)
    parser.add_argument("--evictions", default="least_stale,frequency", help="of the cells of a trace, with commas")
    parser.add_argument("--horizons", type=int, nargs="*", default=[1, 2], help="of drawn routing")
    parser.add_argument("--slots", type=int, default=192, help="of the running model, of 768")
    parser.add_argument("--pack", type=Path, help="the running model's packed file, as benchmarks.runtime writes it")
    parser.add_argument("--turns", type=int, default=20, help="of the running model, with and without prices each")
    parser.add_argument("--json", type=Path, default=RESULTS / "pricing.json")
    arguments = parser.parse_args()
    console, begun = Console(width=120), time.perf_counter()
    result: dict[str, Any] = {"cells": []}
    if arguments.turns:
        result["own_cost"] = own_cost(arguments.slots, arguments.turns, arguments.pack)
        ms, change = result["own_cost"]["ms"], result["own_cost"]["change"]
        low, _, high = change["quartiles"]
        console.print(
            f"prices: {ms['priced']:.2f} ms a token with, {ms['unpriced']:.2f} without, {change['median']:+.2%} "
            f"(quartiles {low:+.2%} to {high:+.2%})",
            highlight=False,
        )
    for horizon in arguments.horizons:
        cells = list(drawn(horizon))
        show(console, f"drawn routing, ms a token, guessed {horizon} ahead", cells)
        result["cells"] += cells
    if arguments.trace is not None and arguments.predictors is not None:
        predictors = load_predictors(arguments.predictors)
        for eviction in arguments.evictions.split(","):
            cells = list(traced(arguments.trace, predictors, eviction))
            show(console, f"routing of the trace, {eviction}, ms a token", cells)
            result["cells"] += cells
    result |= {
        "seconds": time.perf_counter() - begun,
        "command": command(),
        "versions": versions(),
        "hardware": hardware(),
    }
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"written to {arguments.json}", highlight=False)


if __name__ == "__main__":
    main()
