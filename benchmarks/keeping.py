"""What slots should keep, on real routing: of the misses that Belady's rule would spare, how many each eviction spares.

    predict-train collect checkpoints/tiny-moe --split held_out --tokens 60000 --out held-out
    python -m benchmarks.keeping held-out --json benchmarks/results/keeping.json

All rules see the same sequences, each of which begins with empty slots. The way from the least recently used (0) to Belady's rule
(1), which knows the future, is measured in misses, over all layers. Frequencies have half-lives from 4 tokens to 256; the
runtime's is `predictors.reuse.HALF_LIFE`. Prints tables and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

from predict_train.data_collection.keeping import MOST_ROWS, RULES, frequency, keep_rates
from predict_train.data_collection.trace import Trace
from predict_train.predictors.provenance import command, hardware, versions
from predict_train.predictors.reuse import HALF_LIFE
from rich.console import Console
from rich.table import Table

HALF_LIVES = (4, 8, 16, 24, 32, 64, 128, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--rows", type=int, default=MOST_ROWS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    begun, trace = time.perf_counter(), Trace.open(arguments.trace)
    rules = RULES | {f"half-life {tokens}": partial(frequency, half_life=tokens) for tokens in HALF_LIVES}
    found = keep_rates(trace, rules, arguments.rows)
    model = trace.manifest.model
    table = Table("rule", *(f"{slots} slots" for slots in found["slots"]), title="hit rate, and way from lru to belady")
    for name, rates in found["hit_rates"].items():
        means, ways = [sum(rate) / len(rate) for rate in rates], found["way"].get(name, [None] * len(rates))
        table.add_row(
            name,
            *(f"{mean:.3f}" + ("" if way is None else f" ({way:.0%})") for mean, way in zip(means, ways, strict=True)),
        )
    Console().print(table)
    if arguments.json is not None:
        facts = {"model": model.name, "experts": model.num_experts, "top_k": model.top_k, "half_life": HALF_LIFE}
        facts |= found | {"seconds": time.perf_counter() - begun}
        facts |= {"command": command(), "versions": versions(), "hardware": hardware()}
        arguments.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
