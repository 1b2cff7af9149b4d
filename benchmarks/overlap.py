"""How much of the limit `max(compute, bytes / link)` is reached, over links from slow to fast, and what `auto` picks.

    python -m benchmarks.overlap --pack experts.pack

The model is that of `benchmarks.runtime`, with its experts in a packed file (made where there is none) and a store that
reads no faster than it is told: it is one link, so one read at a time. Predictors have random weights and the default
width.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.runtime import CONFIG, RESULTS, WARMUP, predictors_of, routing_of, settings_of
from runtime.link import KeptPackedStore
from runtime.store import Bytes

WAYS = "on_demand,prefetch,speculative/true,auto"


class ThrottledStore(KeptPackedStore):
    """A packed file behind a link of so many bytes per second."""

    def __init__(self, path: Path, link: float):
        super().__init__(path)
        self._link, self._one_at_a_time = link, threading.Lock()
        self._free = 0.0

    def read(self, layer: int, expert: int, into: Bytes) -> None:
        with self._one_at_a_time:
            begin = max(self._free, time.perf_counter() - 0.0005)  # a sleep ends late; the next read makes up for it
            super().read(layer, expert, into)
            self._free = begin + self.layout.bytes / self._link
            time.sleep(max(0.0, self._free - time.perf_counter()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, required=True)
    parser.add_argument("--links", default="0.3,0.6,0.9", help="GB/s, with commas")
    parser.add_argument("--slots", type=int, default=150)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS / "overlap.json")
    arguments = parser.parse_args()

    import torch
    from transformers import AutoConfig

    from predictors.discovery import find_moe_layers
    from predictors.provenance import command, hardware, versions
    from runtime.bench import bench, parse_ways, results
    from runtime.load import load_offloaded

    config = AutoConfig.from_pretrained(CONFIG)
    model: Any = load_offloaded(config, pack=arguments.pack, device="cpu", dtype=torch.bfloat16)
    model.expert_offload.detach()
    layers = find_moe_layers(model)
    measured: list[dict[str, Any]] = []
    for link in (1e9 * float(part) for part in arguments.links.split(",")):
        store = ThrottledStore(arguments.pack, link)
        store.check(model, layers)
        found = bench(
            model,
            parse_ways(WAYS),
            settings_of(arguments.tokens, arguments.rounds, arguments.slots),
            predictors_of(config, layers),
            routing_of(arguments.tokens),
            store=store,
        )
        rows = results(found)
        measured.append({"link_bytes_per_second": link, "measured_link_bytes_per_second": found.link, "results": rows})
        for row in rows:
            print(
                f"{link / 1e9:.1f} GB/s ({found.link / 1e9:.2f}) {row['policy']:<12}"
                f"{row['time_per_output_token_ms']['median']:7.1f} ms, limit {row['limit_ms_per_token']:.1f}, "
                f"reached {row['overlap_efficiency']:.2f}",
                flush=True,
            )
    result = {"slots": arguments.slots, "warmup": WARMUP, "links": measured}
    result |= {"command": command(), "versions": versions(), "hardware": hardware()}
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
