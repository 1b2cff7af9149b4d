"""How many tokens default vectors need: training-free hit rates on held-out rows with the vectors of several traces.

predict-train collect checkpoints/tiny-moe --split held_out --tokens 60000 --out held_out
predict-train collect checkpoints/tiny-moe --tokens 8192 --out few
predict-train collect checkpoints/tiny-moe --tokens 1000000 --out many
python -m benchmarks.default_vectors held_out few many --out benchmarks/results/default-vectors.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from predict_train.data_collection.statistics import hit_rates
from predict_train.data_collection.trace import Trace
from predict_train.predictors.provenance import command, versions
from predict_train.predictors.stacked import StackedSpeculators
from predict_train.predictors.tables import figure_table
from rich.console import Console

ROWS = 60_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("held_out", type=Path, help="trace that is measured on")
    parser.add_argument("traces", type=Path, nargs="+", help="traces whose default vectors are measured")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    held_out = Trace.open(args.held_out)
    results = {"none": rates(held_out, {})}
    for path in args.traces:
        results[path.name] = rates(held_out, Trace.open(path).default_vectors())
    table = figure_table("layer", *results, title="training-free hit rate by default vectors")
    for target, *row in zip(held_out.sources, *(row.values() for row in results.values()), strict=True):
        table.add_row(str(target), *(f"{rate:.3f}" for rate in row))
    table.add_row("mean", *(f"{statistics.fmean(row.values()):.4f}" for row in results.values()))
    Console().print(table)
    if args.out is not None:
        facts = {"training_free": results, "command": command(), "versions": versions()}
        args.out.write_text(json.dumps(facts, indent=2) + "\n")


def rates(trace: Trace, vectors: dict[int, torch.Tensor]) -> dict[int, float]:
    """Of each target, with default vectors of other tokens than the trace's, by source layer."""
    sizes, sources = [trace.manifest.model.top_k], trace.sources
    read = {target: source for target, source in sources.items() if source is not None}
    own = trace.wirings().items()
    wirings = [replace(wiring, default_vectors=vectors.get(read.get(target, -1))) for target, wiring in own]
    stacked = StackedSpeculators(wirings, trace.manifest.model.hidden_size)
    return hit_rates(trace.sample(ROWS), sources, stacked, sizes)[0]


if __name__ == "__main__":
    main()
