"""How much of the limit `max(compute, bytes / link)` is reached over links from slow to fast, what was expected, and `auto`.

    python -m benchmarks.overlap

The model is that of `benchmarks.runtime`, its experts in a packed file that is read no faster than is told: what a disk
reads it writes to memory by itself, as a GPU's link does, while a copy within memory would take from the processor. Beside
each measured time stand two that nobody ran: what `runtime.simulation` expects of the link, the computation and the
speculation measured in the same run, and what `predict-train plan` says of the config and three figures of this machine.
For `auto` its trial is measured by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.provenance import command, hardware, versions
from predict_train.runtime.automatic import BLOCK, BLOCKS
from predict_train.runtime.load import load_offloaded
from predict_train.runtime.measure.bench import Measured, bench, results
from predict_train.runtime.measure.plan import KERNELS, Hardware, costs_of, plan, read_shape
from predict_train.runtime.packfile import PackedStore
from predict_train.runtime.settings import Slots
from predict_train.runtime.store import Bytes
from transformers import AutoConfig

from benchmarks.runtime import CONFIG, RESULTS, WARMUP, expected, packed, predictors_of, prompt, routing_of, settings_of

FIXED = "on_demand,prefetch"
WAYS = f"{FIXED},speculative/true,auto"


class ThrottledStore(PackedStore):
    """A packed file behind one link of so many bytes per second that takes up one read after another."""

    def __init__(self, path: Path, link: float):
        super().__init__(path)
        self._link, self._lock, self._free = link, threading.Lock(), 0.0

    def read(self, layer: int, expert: int, into: Bytes) -> None:
        with self._lock:
            over = self._free = max(self._free, time.perf_counter()) + self.format.bytes / self._link
        super().read(layer, expert, into)
        time.sleep(max(0.0, over - time.perf_counter()))


def reading_speed() -> float:
    """Bytes of weights per second that a computation at batch size 1 reads: what it takes longer than with next to none."""

    def seconds(size: int) -> float:
        weights = torch.randn(128, size, size).bfloat16()  # at 1024 more than any cache holds
        times = []
        for _ in range(10):
            x = torch.randn(1, size).bfloat16()
            begun = time.perf_counter()
            for weight in weights:
                x = F.silu(F.linear(x, weight))  # as in a model, threads have something else to do between two weights
            times.append(time.perf_counter() - begun)
        return statistics.median(times)

    return 128 * 2 * 1024**2 / (seconds(1024) - seconds(32))


def starting_time() -> float:
    """Seconds that starting one operation takes: a token of a model of as many layers, but with next to no weights."""
    config = AutoConfig.from_pretrained(CONFIG, hidden_size=64, moe_intermediate_size=32, head_dim=16)
    model: Any = load_offloaded(config, device="cpu", dtype=torch.bfloat16)
    model.expert_offload.detach()
    found = bench(model, prompt(), settings_of("on_demand", 24, 3, 768), routing=routing_of(24))
    row, shape = results(found)[0], read_shape(config, torch.bfloat16)
    started = KERNELS["rest"] + shape.layers * (KERNELS["layer"] + shape.top_k * KERNELS["expert"])
    return (row["time_per_output_token_ms"]["median"] - row["stall_ms_per_token"]) / 1000 / started


def planned(rows: list[dict[str, Any]], here: Hardware, slots: int, routing: Any, config: Any, predictor: int) -> None:
    """Adds to each row what `predict-train plan` says; `predictor` is the bytes of one layer's."""
    shape = read_shape(config, torch.bfloat16)
    told = plan(costs_of(shape, here, predictor), routing, shape, Slots(slots=slots), is_cuda=False)
    times = {(row["policy"], row["gating"]): row["time_per_output_token_ms"] for row in told}
    times["auto", None] = min(times["on_demand", None], times["prefetch", None])
    for row in rows:
        row["planned_ms_per_token"] = times[row["policy"], row["gating"]]


def over_best(measured: Measured) -> float:
    """How much slower `auto` is than the better of the fixed exact policies: median over rounds, which meet both alike."""
    times = {str(way): [r.seconds_per_token for r in rounds] for way, rounds in measured.rounds.items()}
    best = min(FIXED.split(","), key=lambda way: statistics.median(times[way]))
    return statistics.median(mine / its for mine, its in zip(times["auto"], times[best], strict=True)) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", default="0.5,1,2", help="GB/s, with commas; none is as fast as the disk is")
    parser.add_argument("--slots", default="150,300,600", help="with commas")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--predictors", type=int, default=3, help="of so many of the first layers, where guesses are weak"
    )
    parser.add_argument("--scratch", type=Path, help="where the packed file is kept [a temporary folder, removed]")
    parser.add_argument("--json", type=Path, default=RESULTS / "overlap.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measured(arguments, packed(arguments.scratch or Path(folder)))
    result |= {"command": command(), "versions": versions(), "hardware": hardware()}
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def measured(arguments: argparse.Namespace, pack: Path) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(CONFIG)
    model: Any = load_offloaded(config, pack=pack, device="cpu", dtype=torch.bfloat16)
    model.expert_offload.detach()
    layers = find_moe_layers(model)
    known, routing = predictors_of(config, layers, arguments.predictors), routing_of(arguments.tokens)
    predictor = sum(entry.nbytes for entry in known.layers) // len(layers)  # in the mean
    cells: list[dict[str, Any]] = []
    machine: list[tuple[float, float]] = []
    for part in arguments.links.split(","):
        for slots in map(int, arguments.slots.split(",")):
            link = float("inf") if part == "none" else 1e9 * float(part)

            def measure(ways: str, tokens: int, warmup: int, link: float = link, slots: int = slots) -> Measured:
                settings = settings_of(ways, tokens, arguments.rounds, slots, warmup)
                with closing(ThrottledStore(pack, link)) as store:
                    return bench(model, prompt(), settings, known, routing, store=store)

            found = measure(WAYS, arguments.tokens, WARMUP)
            trial = measure(f"{FIXED},auto", BLOCK * BLOCKS, 0)
            rows = results(found)
            # By the cell, since what others do on this machine changes from minute to minute.
            machine.append((reading_speed(), starting_time()))
            expected(rows, found.link, slots, routing, config)
            cell: dict[str, Any] = {
                "link_bytes_per_second": None if part == "none" else link,
                "measured_link_bytes_per_second": found.link,
                "slots": slots,
                "results": rows,
                "auto_over_best": over_best(found),
                "auto_over_best_while_it_tries": over_best(trial),
            }
            cells.append(cell)
            print(f"measured: {part} GB/s, {slots} slots", flush=True)
    reading, starting = (statistics.median(figures) for figures in zip(*machine, strict=True))
    print(f"weights are read at {reading / 1e9:.1f} GB/s, an operation starts in {1e6 * starting:.1f} us")
    for cell in cells:
        link = cell["measured_link_bytes_per_second"]
        here = Hardware(reading, link, latency=0.0, launch=starting, is_cuda=False)
        planned(cell["results"], here, cell["slots"], routing, config, predictor)
        report(cell)
    return {
        "routing": routing.source,
        "warmup": WARMUP,
        "rounds": arguments.rounds,
        "tokens": arguments.tokens,
        "machine": {"memory_bandwidth": reading, "launch": starting},
        "cells": cells,
    }


def report(cell: dict[str, Any]) -> None:
    print(
        f"link {cell['measured_link_bytes_per_second'] / 1e9:.2f} GB/s, {cell['slots']} slots; auto over the best fixed exact "
        f"policy {cell['auto_over_best']:+.1%}, while it tries {cell['auto_over_best_while_it_tries']:+.1%}"
    )
    for row in cell["results"]:
        time_ms = row["time_per_output_token_ms"]["median"]
        print(
            f"  {'/'.join(filter(None, (row['policy'], row['gating']))):<17}{time_ms:7.1f} ms, limit "
            f"{row['limit_ms_per_token']:.1f}, reached {row['overlap_efficiency']:.2f}; expected "
            f"{row['expected_ms_per_token']:.1f} ({row['expected_ms_per_token'] / time_ms - 1:+.0%}), planned "
            f"{row['planned_ms_per_token']:.1f} ({row['planned_ms_per_token'] / time_ms - 1:+.0%}); stalled "
            f"{row['stall_ms_per_token']:.1f}, speculating {row['speculating_ms_per_token']:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
