"""Time per output token on a GPU whose experts are in host memory: the device's engine, the host's, and others beside it.

    python -m benchmarks.gpu

The model has Qwen3-30B-A3B's shape and random weights in bf16, with 12 or 48 layers, whole or with a quarter of an expert's
bytes (a quarter of its width). Routing is drawn, the same for all ways. A step's floor is what it can't be faster than:
`max(all experts resident, bytes copied / link)`. Ways that promise exactness are compared with all-resident, bit for bit.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.provenance import command, hardware, versions
from predict_train.runtime import engines
from predict_train.runtime.measure.bench import Decoding, Setup, Way, running
from predict_train.runtime.measure.link import measure_link
from predict_train.runtime.measure.memory import peaks, reset_peaks
from predict_train.runtime.measure.routing import PRESETS, Statistics, draw_routing
from predict_train.runtime.measure.settings import Measuring
from predict_train.runtime.store import HostStore
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "benchmarks" / "models" / "qwen3-30b-a3b.json"
DEVICE = torch.device("cuda")
WARMUP, TOKENS, COMPARED = 24, 64, 24
ROUTINGS = {"kept": Statistics(kept=0.43, hit_rate=0.89), "curve": PRESETS["qwen3-30b-a3b"]}
EXACT = ("on_demand", "prefetch")


class Bench:
    """A model, its experts in host memory, and what is measured of it."""

    def __init__(self, layers: int, width: int):
        config = AutoConfig.from_pretrained(CONFIG)
        config.num_hidden_layers, config.moe_intermediate_size = layers, width
        torch.manual_seed(0)
        with DEVICE:
            self.model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        self.layers, self.config = find_moe_layers(self.model), config
        begun = time.perf_counter()
        self.store = HostStore(self.layers, DEVICE)
        torch.cuda.synchronize()
        self.seconds_to_host = time.perf_counter() - begun
        torch.cuda.empty_cache()
        self.link = measure_link(self.store, DEVICE, readers=2)
        self.name = f"{layers} layers, width {width}"
        self.rows: list[dict[str, Any]] = []

    def setup(self, slots: int, routing: str, prompt: int = 32) -> Setup:
        drawn = draw_routing(
            ROUTINGS[routing], steps=WARMUP + TOKENS + COMPARED + 2, layers=len(self.layers),
            num_experts=self.config.num_experts, top_k=self.config.num_experts_per_tok,
        )  # fmt: skip
        ids = torch.randint(self.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
        config = Measuring(device="cuda", slots=slots, warmup=WARMUP, tokens=TOKENS + COMPARED)
        return Setup(ids, DEVICE, config, self.store, None, drawn)

    def measure(self, way: str, share: float, routing: str, programs: int | None = None, **more: Any) -> dict[str, Any]:
        """One way; `share` of the experts have slots."""
        total = len(self.layers) * self.config.num_experts
        setup = self.setup(int(share * total), routing)
        policy, _, gating = way.partition("/")
        reset_peaks(DEVICE)
        begun = time.perf_counter()
        with running(Way(policy, gating or None), self.model, self.layers, setup) as offload:
            assert offload is not None
            if programs is not None:
                offload._engine.programs = programs
            torch.cuda.synchronize()
            attached = time.perf_counter() - begun
            decoding = Decoding(self.model, offload, setup)
            logits = [decoding.step() for _ in range(COMPARED)]
            offload.reset()
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                times = [1000 * decoding.run(TOKENS // 4) / (TOKENS // 4) for _ in range(4)]
                torch.cuda.set_sync_debug_mode("default")
            waits = sum("synchronizing" in str(warning.message) for warning in warned) / TOKENS
            counters, reason = offload.counters, offload.why_not_captured
        host, device = peaks(DEVICE)
        row = {
            "model": self.name, "way": way, "share": share, "routing": routing, "programs": programs, **more,
            "ms": statistics.median(times), "ms_all": times, "prompt_ms": 1000 * decoding.seconds_to_first_token,
            "bytes_per_token": counters.bytes_copied / TOKENS,
            "link_ms": 1000 * counters.bytes_copied / TOKENS / self.link,
            "hit_rate": counters.speculation_hit_rate, "cache_hit_rate": counters.hits / max(1, counters.hits + counters.misses),
            "waits_per_token": waits, "attach_s": attached, "peak_host_bytes": host, "peak_device_bytes": device, "not_captured": reason,
        }  # fmt: skip
        self.rows.append(row)
        return row | {"logits": torch.stack(logits)}

    def table(
        self, share: float, routing: str, ways: list[str], programs: list[int | None], resident: dict[str, Any]
    ) -> None:
        """Measures and prints some ways against all-resident."""
        for way in ways:
            for number in programs:
                row = self.measure(way, share, routing, number)
                equal = sum(torch.equal(a, b) for a, b in zip(row["logits"], resident["logits"], strict=True))
                floor = max(resident["ms"], row["link_ms"])
                self.rows[-1] |= {
                    "floor_ms": floor,
                    "efficiency": floor / row["ms"],
                    "equal_steps": f"{equal}/{COMPARED}",
                }
                told(self.rows[-1])


def told(row: dict[str, Any]) -> None:
    floor, share = row.get("floor_ms"), row.get("efficiency")
    print(
        f"{row['model']} {row['share']:5.3f} {row['routing']:5} {row['way']:22} P={row['programs']} {row['ms']:7.2f} ms"
        f"  link {row['link_ms']:6.2f}  floor {floor or 0:6.2f}  of it {share or 0:.2f}  cache {row['cache_hit_rate']:.3f}"
        f"  equal {row.get('equal_steps')}  waits {row['waits_per_token']:.2f}  prompt {row['prompt_ms']:.0f}  {row['not_captured'] or ''}",
        flush=True,
    )


@contextmanager
def by_the_host() -> Iterator[None]:
    """Has the host's engine decide."""
    before, engines.hindrance_of = engines.hindrance_of, lambda *_: "the benchmark measures the host's engine"
    try:
        yield
    finally:
        engines.hindrance_of = before


def plain(bench: Bench, tokens: int = 24) -> None:
    """Plain transformers with everything on the device, eager."""
    setup = bench.setup(bench.config.num_experts_per_tok, "kept")
    with running(Way("resident"), bench.model, bench.layers, setup):
        decoding = Decoding(bench.model, None, setup)
        times = [1000 * decoding.run(tokens // 4) / (tokens // 4) for _ in range(4)]
    print(f"{bench.name} plain transformers, everything on the device: {statistics.median(times):.2f} ms", flush=True)
    bench.rows.append(
        {"model": bench.name, "way": "plain transformers", "ms": statistics.median(times), "ms_all": times}
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", default="12,48")
    parser.add_argument("--widths", default="768,192")
    parser.add_argument("--shares", default="0.125,0.25,0.5")
    parser.add_argument("--routings", default="kept,curve")
    parser.add_argument(
        "--ways", default="on_demand,prefetch,speculative/true,speculative/speculated,speculative/resident"
    )
    parser.add_argument("--programs", default="")
    parser.add_argument("--host", action="store_true", help="measure the host's engine as well")
    parser.add_argument("--plain", action="store_true", help="measure plain transformers as well")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    args = parser.parse_args()
    programs = [int(number) for number in args.programs.split(",") if number] or [None]
    rows: list[dict[str, Any]] = []
    result = {"command": command(), "versions": versions(), "hardware": hardware(), "rows": rows, "links": {}}
    for layers in map(int, args.layers.split(",")):
        for width in map(int, args.widths.split(",")):
            begun = time.perf_counter()
            bench = Bench(layers, width)
            print(f"{bench.name}: link {bench.link / 1e9:.1f} GB/s, to host {bench.seconds_to_host:.1f} s, made in "
                  f"{time.perf_counter() - begun:.1f} s, block {bench.store.format.bytes:,}", flush=True)  # fmt: skip
            result["links"][bench.name] = bench.link
            with suppress(torch.cuda.OutOfMemoryError):
                for routing in args.routings.split(","):
                    resident = bench.measure("on_demand", 1.0, routing, resident=True)
                    told(bench.rows[-1])
                    for share in map(float, args.shares.split(",")):
                        bench.table(share, routing, args.ways.split(","), programs, resident)
                        if args.host:
                            with by_the_host():
                                bench.table(share, routing, ["on_demand", "speculative/true"], [None], resident)
                if args.plain:
                    plain(bench)
            rows += bench.rows
            bench.store.close() if layers == 12 else None
            del bench
            gc.collect()
            torch.cuda.empty_cache()
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
