"""Time per output token on a GPU whose experts are in host memory: the device's engine, the host's, and others'.

    python -m benchmarks.gpu

The model has Qwen3-30B-A3B's shape and random weights, with 12 or 48 layers. Its experts are in bf16, int8 or int4. Routing is drawn, the same for all ways: `curve` as local as Qwen3-30B-A3B's own, `kept` as
earlier figures were drawn. A step's floor is `max(all experts resident, bytes copied / link)`. Every way decodes the same
tokens, so those that promise exactness are compared with all-resident step by step, bit for bit.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.experts import expert_modules
from predict_train.predictors.provenance import command, hardware, versions
from predict_train.runtime import engines
from predict_train.runtime.formats import ExpertFormat
from predict_train.runtime.formats.quantized import SCALES
from predict_train.runtime.formats.registry import format_of
from predict_train.runtime.measure.bench import Decoding, Setup, Way, running
from predict_train.runtime.measure.memory import peaks, reset_peaks
from predict_train.runtime.measure.plan import Hardware, costs_of, read_shape
from predict_train.runtime.measure.routing import PRESETS, ReplayedRouting, Statistics, draw_routing
from predict_train.runtime.measure.settings import Measuring
from predict_train.runtime.measure.simulation import nearest, simulate
from predict_train.runtime.quantization import Quantization
from predict_train.runtime.settings import OffloadConfig
from predict_train.runtime.store import HostStore, MemoryStore, QuantizedExperts, QuantizedStore, empty_blocks
from torch.profiler import DeviceType
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "benchmarks" / "models" / "qwen3-30b-a3b.json"
DEVICE = torch.device("cuda")
WARMUP, COMPARED, TOKENS, PARTS = 20, 12, 40, 4
STEPS = WARMUP + COMPARED + TOKENS
ROUTINGS = {"kept": Statistics(kept=0.43, hit_rate=0.89), "curve": PRESETS["qwen3-30b-a3b"]}
MEMORY_BANDWIDTH = 2.6e12
GUESSING = ["prefetch", "speculative/true", "speculative/speculated", "speculative/resident"]


@dataclass(frozen=True)
class Case:
    """What is measured: a way, with slots for a share of the experts, and who decides."""

    way: str
    share: float
    routing: str
    engine: str = "captured"
    """`captured` or `eager` (the device decides), `host`, `plain` transformers with all experts on the device, or `accelerate`."""


class Bench:
    """A model with its experts in host memory, and what was measured of it."""

    def __init__(self, layers: int, quantize: Quantization | None):
        self.shape = AutoConfig.from_pretrained(CONFIG)
        self.shape.num_hidden_layers, self.quantize = layers, quantize
        self.model = random_model(self.shape, with_experts=quantize is None)
        self.layers = find_moe_layers(self.model)
        torch.cuda.synchronize()
        before, begun = resident_bytes(), time.perf_counter()
        self.store: MemoryStore
        if quantize is None:
            self.store = HostStore(self.layers, DEVICE)
        else:
            form = format_of([layer.experts for layer in self.layers], quantize)
            held = [random_blocks(form, layer.num_experts) for layer in self.layers]
            self.store = QuantizedStore(QuantizedExperts(form, held), DEVICE)
        torch.cuda.synchronize()
        seconds, size = time.perf_counter() - begun, layers * self.shape.num_experts * self.store.format.bytes
        torch.cuda.empty_cache()
        self.facts = {
            "layers": layers, "weights": quantize or "bf16", "block_bytes": self.store.format.bytes, "expert_bytes": size,
            "host_bytes": resident_bytes() - before, "seconds_to_host": seconds,
            "link": link_to(self.store),
        }  # fmt: skip
        self.rows: list[dict[str, Any]] = []
        self.logits: dict[str, torch.Tensor] = {}
        print("\n" + "  ".join(f"{name} {value}" for name, value in self.facts.items()), flush=True)

    def setup(self, case: Case, prompt: int = 32) -> Setup:
        experts, top_k = self.shape.num_experts, self.shape.num_experts_per_tok
        routing = drawn(case.routing, len(self.layers), experts, top_k)
        ids = torch.randint(self.shape.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
        slots = max(top_k, int(case.share * len(self.layers) * experts))
        config = Measuring(device=str(DEVICE), slots=slots, warmup=WARMUP, tokens=2 * STEPS)
        return Setup(ids, DEVICE, config, self.store, None, routing)

    def measure(self, case: Case) -> None:
        """Measures a case and prints it. All-resident comes first, since the others are compared with it."""
        policy, _, gating = case.way.partition("/")
        plain = case.engine in ("plain", "accelerate")
        setup, way = self.setup(case), Way("resident" if case.engine == "plain" else policy, gating or None)
        reset_peaks(DEVICE)
        begun = time.perf_counter()
        tokens, parts = (4, 2) if case.engine == "accelerate" else (TOKENS, PARTS)
        if plain:
            setup = replace(setup, config=setup.config.model_copy(update={"warmup": tokens // 2}))
        with deciding(case.engine), running(way, self.model, self.layers, setup) as offload:
            if offload is not None and case.engine == "eager":
                offload._graphs = None
            torch.cuda.synchronize()
            attached = time.perf_counter() - begun
            decoding = Decoding(self.model, offload, setup)
            logits = None if plain else torch.stack([decoding.step() for _ in range(COMPARED)])
            if case.share == 1.0 and offload is not None:
                decoding.run(STEPS)  # the whole routing once, so that all its experts are there
            if offload is not None:
                offload.reset()
            times, waits = timed(decoding, tokens, parts)
            counters = None if offload is None else offload.counters
            reason = None if offload is None else offload.why_not_captured
            programs = getattr(getattr(offload, "_engine", None), "programs", None)
        host, device = peaks(DEVICE)
        row = self.facts | vars(case) | {
            "ms": statistics.median(times), "ms_all": times, "waits_per_token": waits, "attach_seconds": attached,
            "peak_host_bytes": host, "peak_device_bytes": device, "programs": programs, "not_captured": reason,
        }  # fmt: skip
        if counters is not None:
            copied = counters.bytes_copied / tokens
            row |= {"bytes_per_token": copied, "link_ms": 1000 * copied / self.facts["link"], "hit_rate": counters.speculation_hit_rate,
                    "cache_hit_rate": counters.hits / max(1, counters.hits + counters.misses)}  # fmt: skip
        if logits is not None:
            self.compare(case, row, logits)
        self.rows.append(row)
        told(row)

    def compare(self, case: Case, row: dict[str, Any], logits: torch.Tensor) -> None:
        resident = next((r for r in self.rows if r["share"] == 1.0 and r["routing"] == case.routing), None)
        if resident is None:
            self.logits[case.routing] = logits
        elif "link_ms" in row:
            if self.quantize is None:
                row["planned_ms"] = planned_ms(self.shape, case, row["link"])
            floor = max(resident["ms"], row["link_ms"])
            equal = sum(torch.equal(a, b) for a, b in zip(logits, self.logits[case.routing], strict=True))
            row |= {
                "floor_ms": floor,
                "efficiency": floor / row["ms"],
                "equal_steps": equal,
                "compared_steps": COMPARED,
            }

    def count_kernels(self, case: Case) -> None:
        """Counts the kernels of a captured step."""
        policy, _, gating = case.way.partition("/")
        setup = self.setup(case)
        with running(Way(policy, gating or None), self.model, self.layers, setup):
            decoding = Decoding(self.model, vars(self.model)["expert_offload"], setup)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                decoding.step()
                torch.cuda.synchronize()
        on_device = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
        count = sum(not event.name.startswith("Mem") for event in on_device)
        self.rows.append(self.facts | vars(case) | {"kernels_per_token": count})
        print(f"  {case.way}: {count} kernels a token", flush=True)

    def prompt(self, case: Case, length: int = 2048) -> None:
        """Measures a prompt, the second time that it is computed."""
        setup = self.setup(case, length)
        with running(Way(case.way), self.model, self.layers, replace(setup, routing=None)), torch.inference_mode():
            ids = setup.token_ids.to(DEVICE)
            for _ in range(2):
                torch.cuda.synchronize()
                begun = time.perf_counter()
                self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
                torch.cuda.synchronize()
                seconds = time.perf_counter() - begun
        self.rows.append(
            self.facts | vars(case) | {"prompt_tokens": length, "prompt_tokens_per_second": length / seconds}
        )
        print(f"  a prompt of {length} tokens: {length / seconds:,.0f} tokens/s", flush=True)


def random_model(config: PretrainedConfig, with_experts: bool) -> PreTrainedModel:
    """A model with random weights in bf16 on the device; its experts are on the meta device, unless `with_experts`."""
    torch.manual_seed(0)
    width = config.moe_intermediate_size
    if not with_experts:
        config.moe_intermediate_size = 1
    with DEVICE:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if not with_experts:
        config.moe_intermediate_size = model.config.moe_intermediate_size = width
        for experts in expert_modules(model).values():
            for name, shape in (
                ("gate_up_proj", (2 * width, config.hidden_size)),
                ("down_proj", (config.hidden_size, width)),
            ):
                values = torch.empty(config.num_experts, *shape, dtype=torch.bfloat16, device="meta")
                setattr(experts, name, torch.nn.Parameter(values))
    return model


def random_blocks(form: ExpertFormat, count: int) -> torch.Tensor:
    """Blocks `[count, bytes]` in host memory: random codes, and scales that give weights as large as a model's."""
    blocks = torch.randint(256, (count, form.bytes), dtype=torch.uint8, device=DEVICE)
    for name, view in form.views(blocks).items():
        if name.endswith(SCALES):
            view.fill_(0.0)
            (view[..., 0] if view.ndim == 4 else view).fill_(0.004 if view.ndim == 4 else 0.0003)
    return empty_blocks(count, form.bytes, torch.device("cpu")).copy_(blocks)


def planned_ms(config: PretrainedConfig, case: Case, link: float) -> float:
    """What `plan` says of a captured step, with the memory's bandwidth of an H100 as such kernels reach it."""
    shape = read_shape(config)
    routing = drawn(case.routing, shape.layers, shape.num_experts, shape.top_k)
    policy, _, gating = case.way.partition("/")
    slots = max(shape.top_k, int(case.share * shape.layers * shape.num_experts))
    settings = OffloadConfig(slots=slots, policy=policy, **({"gating": gating} if gating else {}))
    hardware = Hardware(MEMORY_BANDWIDTH, link, decides=True)
    skipped = WARMUP + COMPARED
    result = simulate(costs_of(shape, hardware), routing, settings, nearest(shape.places), True, warmup=skipped)
    return 1000 * result.seconds


def drawn(routing: str, layers: int, experts: int, top_k: int) -> ReplayedRouting:
    return draw_routing(ROUTINGS[routing], steps=STEPS, layers=layers, num_experts=experts, top_k=top_k)


def link_to(store: MemoryStore) -> float:
    """Bytes per second of a layer's blocks from registered memory to the device, in one copy."""
    target = torch.empty_like(store.blocks[0], device=DEVICE)
    seconds = []
    for blocks in [store.blocks[0], *store.blocks[:: max(1, len(store.blocks) // 6)]]:
        for _ in range(2):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            target.copy_(blocks, non_blocking=True)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
    return target.nbytes / min(seconds)


def timed(decoding: Decoding, tokens: int, parts: int) -> tuple[list[float], float]:
    """Milliseconds a token in each part of the tokens, and how often the host waited in a step."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        times = [1000 * decoding.run(tokens // parts) / (tokens // parts) for _ in range(parts)]
        torch.cuda.set_sync_debug_mode("default")
    return times, sum("synchronizing" in str(warning.message) for warning in warned) / tokens


def resident_bytes() -> int:
    """Resident memory of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


@contextmanager
def deciding(engine: str) -> Iterator[None]:
    """Has the host decide for `engine` `host`."""
    before = engines.hindrance_of
    if engine == "host":
        engines.hindrance_of = lambda *_: "the benchmark measures the host's engine"
    try:
        yield
    finally:
        engines.hindrance_of = before


def told(row: dict[str, Any]) -> None:
    parts = [f"{row['share']:5.3f} {row['routing']:5} {row['engine']:8} {row['way']:22} {row['ms']:7.2f} ms"]
    if "link_ms" in row:
        parts.append(
            f"link {row['link_ms']:6.2f}  cache {row['cache_hit_rate']:.3f}  waits {row['waits_per_token']:.2f}"
        )
    if "floor_ms" in row:
        parts.append(
            f"floor {row['floor_ms']:6.2f}, of it {row['efficiency']:.2f}  equal {row['equal_steps']}/{COMPARED}"
        )
    print("  " + "  ".join(parts) + f"  {row['not_captured'] or ''}", flush=True)


def cases(layers: int, quantize: Quantization | None) -> list[Case]:
    """What is measured of a model. The other engines only where that takes little time, each twice, since the host is noisy."""
    found = []
    for routing in ROUTINGS:
        found.append(Case("on_demand", 1.0, routing))
        shares = [0.25]
        if routing == "kept" and quantize is None:
            shares = [0.125, 0.25, 0.5] if layers <= 12 else [0.25, 0.5]
        found += [
            Case(way, share, routing) for share in shares for way in ("on_demand", "prefetch", "speculative/true")
        ]
        found += [Case(way, 0.25, routing) for way in GUESSING[2:] if routing == "kept"]
    if layers <= 12 and quantize is None:
        for _ in range(2):
            found += [Case(way, 0.25, "kept", "eager") for way in ("on_demand", "speculative/true")]
            found += [Case(way, 0.25, "kept", "host") for way in ("on_demand", "prefetch", "speculative/true")]
            found.append(Case("resident", 0.0, "kept", "plain"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="48-bf16,48-int4,48-int8,12-int4,12-bf16", help="layers and weights")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    args = parser.parse_args()
    result: dict[str, Any] = {"command": command(), "versions": versions(), "hardware": hardware()}
    done: list[dict[str, Any]] = []

    def save(bench: Bench) -> None:
        args.out.write_text(json.dumps(result | {"rows": done + bench.rows}, indent=1) + "\n")

    for name in args.models.split(","):
        layers, _, weights = name.partition("-")
        bench = Bench(int(layers), None if weights == "bf16" else Quantization(weights))
        for case in cases(int(layers), bench.quantize):
            bench.measure(case)
            save(bench)
        bench.prompt(Case("prefetch", 0.5 if int(layers) <= 12 else 0.25, "kept"))
        if (
            int(layers) <= 12 and bench.quantize is None
        ):  # last of all, since a profiler and accelerate leave their traces
            for way in ("on_demand", "speculative/true"):
                bench.count_kernels(Case(way, 0.25, "kept"))
            with_accelerate(bench)
        save(bench)
        done += bench.rows
        for layer in bench.layers:  # so that `close` does not bring the experts back to the device
            for parameter in layer.experts.parameters():
                parameter.data = parameter.data.new_empty(0)
        bench.store = None  # type: ignore[assignment]
        del bench
        gc.collect()
        torch.cuda.empty_cache()


def with_accelerate(bench: Bench) -> None:
    """Measures accelerate's `cpu_offload` of the decoder layers. The model is of no use afterwards."""
    from accelerate import cpu_offload

    for layer in bench.model.model.layers:
        cpu_offload(layer, DEVICE)
    bench.measure(Case("accelerate", 0.0, "kept", "accelerate"))


if __name__ == "__main__":
    main()
