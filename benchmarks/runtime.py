"""Time per output token of a model that is larger than the memory it may use: every policy, and accelerate's disk offload.

    python -m benchmarks.runtime

A Qwen3-MoE with random weights of 1.2 B parameters (12 layers, 64 experts, top 4, hidden 1024, bf16: 2.5 GB) decodes with
its experts in a packed file, in a process that may use 1.4 GB: a memory cgroup within this process's own, or where none
can be made a limit on the process's data (RLIMIT_DATA, which leaves mapped files out). Routing is drawn (0.38 of the
experts kept from the previous token, hit rate 0.93), the same for all. Beside each measured time stands the one that
`runtime.simulation` expects of the link, the computation and the speculation measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "benchmarks" / "models" / "moe-1b.json"
RESULTS = ROOT / "benchmarks" / "results"
WAYS = "on_demand,prefetch,speculative,auto"
WIDTH = 320
WARMUP = 36
"""Tokens before those that are counted; `auto` has chosen by then."""
ACCELERATE_MEMORY = 800_000_000
"""Bytes of weights that accelerate may keep; with more, what it loads for a layer does not fit beside them."""

FREES = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": str(2**20), "MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""Has glibc give back what is freed. With the first threshold alone the second stays at 128 kB, and what a token allocates
above it is mapped and unmapped, which beside readers takes milliseconds."""


def settings_of(policies: str, tokens: int, rounds: int, slots: int | None, warmup: int = WARMUP) -> Any:
    from predict_train.runtime.measure.settings import Measuring

    return Measuring(policies=policies, device="cpu", tokens=tokens, warmup=warmup, rounds=rounds, slots=slots)


def prompt() -> Any:
    import torch

    return torch.randint(8192, (1, 32), generator=torch.Generator().manual_seed(0))


def routing_of(tokens: int) -> Any:
    from predict_train.runtime.measure.routing import PRESETS, draw_routing

    return draw_routing(PRESETS["moe-1b"], steps=WARMUP + tokens, layers=12, num_experts=64, top_k=4, candidates=6)


def predictors_of(config: Any, layers: list[Any], count: int) -> Any:
    """Predictors of the default width for the first `count` layers, with random weights, which cost what trained ones do."""
    import torch
    from predict_train.predictors.architecture import moe_shape
    from predict_train.predictors.checkpoint import Predictors, TargetLayer
    from predict_train.predictors.mlp import ResidualMLP

    size, experts = config.hidden_size, config.num_experts
    return Predictors(
        model={"name": "random"} | moe_shape(config, layers),
        layers=[TargetLayer(layer.index, mlp=ResidualMLP(size, experts, WIDTH).bfloat16()) for layer in layers[:count]],
        default_vectors={layer.index: torch.zeros(experts, size) for layer in layers[:-1]},
    )


def packed(scratch: Path) -> Path:
    """The packed file, written unless it is there."""
    import torch
    from predict_train.runtime.pack import pack_random
    from transformers import AutoConfig

    pack = scratch / "experts.pack"
    if not pack.exists():
        pack_random(AutoConfig.from_pretrained(CONFIG), pack, torch.bfloat16)
    return pack


def make(scratch: Path) -> None:
    """The packed file, and for accelerate the same model as a checkpoint."""
    import torch
    from predict_train.runtime.load import load_offloaded
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(CONFIG)
    packed(scratch)
    if not (scratch / "model").exists():
        model: Any = load_offloaded(config, device="cpu", dtype=torch.bfloat16)
        model.expert_offload.detach()
        model.save_pretrained(scratch / "model")


def ours(scratch: Path, tokens: int, rounds: int, slots: int, predictors: int) -> dict[str, Any]:
    import torch
    from predict_train.predictors.discovery import find_moe_layers
    from predict_train.runtime.load import load_offloaded
    from predict_train.runtime.measure.bench import bench, results
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(CONFIG)
    model: Any = load_offloaded(config, pack=scratch / "experts.pack", device="cpu", dtype=torch.bfloat16)
    model.expert_offload.detach()
    routing = routing_of(tokens)
    known = predictors_of(config, find_moe_layers(model), predictors)
    measured = bench(model, prompt(), settings_of(WAYS, tokens, rounds, slots), known, routing)
    rows = results(measured)
    expected(rows, measured.link, slots, routing, config)
    weights = sum(p.nbytes for p in model.parameters() if not p.is_meta)
    return {
        "slots": slots,
        "routing": routing.source,
        "results": rows,
        "link_bytes_per_second": measured.link,
        "link_by_round": measured.links,
        "times_by_round_ms": {
            str(way): [1000 * r.seconds_per_token for r in rounds] for way, rounds in measured.rounds.items()
        },
        "bytes_of_slots_and_weights": weights + slots * measured.expert_bytes,
    }


def expected(rows: list[dict[str, Any]], link: float, slots: int, routing: Any, config: Any) -> None:
    """Adds to each row what the simulation expects of the measured link, computation (on demand) and speculation."""
    from dataclasses import replace

    import torch
    from predict_train.runtime.measure.plan import Hardware, costs_of, read_shape
    from predict_train.runtime.measure.simulation import simulate
    from predict_train.runtime.settings import OffloadConfig

    shape = read_shape(config, torch.bfloat16)
    compute = rows[0]["time_per_output_token_ms"]["median"] - rows[0]["stall_ms_per_token"]
    active = shape.rest_bytes + shape.layers * (shape.layer_bytes + shape.top_k * shape.expert_bytes)
    # The whole of the computation, spread over its parts as their bytes are.
    costs = costs_of(shape, Hardware(active / (compute / 1000), link, latency=0.0, launch=0.0))
    for row in rows:
        known = replace(costs, speculation=row["speculating_ms_per_token"] / 1000 / shape.layers)
        times = [
            simulate(
                known, routing, OffloadConfig(slots=slots, policy=policy, gating=row["gating"] or "true"), warmup=WARMUP
            )
            for policy in (["on_demand", "prefetch"] if row["policy"] == "auto" else [row["policy"]])
        ]
        row["expected_ms_per_token"] = 1000 * min(found.seconds for found in times)


def accelerate(scratch: Path, tokens: int, rounds: int) -> dict[str, Any]:
    import torch
    from predict_train.predictors.discovery import find_moe_layers
    from predict_train.runtime.measure.bench import Setup, measure_round
    from predict_train.runtime.measure.routing import replaying
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        scratch / "model",
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": ACCELERATE_MEMORY},
        offload_folder=scratch / "offload",
    ).eval()
    setup = Setup(prompt(), torch.device("cpu"), settings_of("accelerate", tokens, rounds, None))
    with replaying(find_moe_layers(model), routing_of(tokens)):
        times = [1000 * measure_round(model, None, setup).seconds_per_token for _ in range(rounds)]
    places = list(model.hf_device_map.values())
    return {
        "policy": "accelerate",
        "time_per_output_token_ms": {"median": statistics.median(times), "min": min(times), "max": max(times)},
        "layers_on_disk": places.count("disk"),
    }


def drop_from_memory(scratch: Path) -> None:
    """Has the system forget the files' contents: what it keeps of them for another process would count to none's limit."""
    for path in scratch.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


@contextmanager
def memory_group(limit: int) -> Iterator[tuple[Path, Path] | None]:
    """A memory cgroup with a limit, within that of this process: its list of processes and its peak. None if none can be made."""
    groups = [line.split(":") for line in Path("/proc/self/cgroup").read_text().splitlines()]
    first = next((path for _, kinds, path in groups if kinds == "memory"), None)
    root, names = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.max_usage_in_bytes")
    if first is None:
        first = next((path for _, kinds, path in groups if kinds == ""), "/")
        root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.peak")
    group = root / first.strip("/") / f"predict-train-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        yield None
        return
    try:
        (group / names[0]).write_text(str(limit))
        yield group / "cgroup.procs", group / names[1]
    except OSError as error:
        print(f"no limit by a memory cgroup: {error}", file=sys.stderr)
        yield None
    finally:
        group.rmdir()


def limited(limit: int, *arguments: object) -> dict[str, Any]:
    """What this file prints as JSON in a process that may use `limit` bytes, with its peak."""
    with memory_group(limit) as group:

        def enter() -> None:
            if group is None:
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            else:
                group[0].write_text(str(os.getpid()))

        command = [sys.executable, "-m", "benchmarks.runtime", *map(str, arguments)]
        environment = os.environ | FREES
        child = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False, preexec_fn=enter
        )
        if child.returncode:
            return {"failed": f"exit code {child.returncode} under a limit of {limit:,} bytes"}
        result: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
        result["limit"] = {"bytes": limit, "kind": "RLIMIT_DATA" if group is None else "memory cgroup"}
        if group is not None:
            result["peak_bytes_of_the_group"] = int(group[1].read_text())
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", default="60,150,300", help="with commas")
    parser.add_argument("--tokens", type=int, default=24, help="counted in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--predictors", type=int, default=3, help="of so many of the first layers, where guesses are weak"
    )
    parser.add_argument("--memory", type=int, default=1_400_000_000, help="bytes that the process may use")
    parser.add_argument("--without-accelerate", action="store_true")
    parser.add_argument(
        "--scratch", type=Path, help="where the model is written and kept [a temporary folder, removed]"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "runtime.json")
    parser.add_argument("--child", choices=["make", "ours", "accelerate"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    if arguments.child:
        work: dict[str, Callable[[], Any]] = {
            "make": lambda: make(arguments.scratch),
            "ours": lambda: ours(
                arguments.scratch, arguments.tokens, arguments.rounds, int(arguments.slots), arguments.predictors
            ),
            "accelerate": lambda: accelerate(arguments.scratch, arguments.tokens, 1),
        }
        made = work[arguments.child]()
        if made is not None:
            print(json.dumps(made))
        return
    with tempfile.TemporaryDirectory() as folder:
        scratch = arguments.scratch or Path(folder)
        scratch.mkdir(parents=True, exist_ok=True)
        common: tuple[Any, ...] = (
            "--scratch",
            scratch.absolute(),
            "--tokens",
            arguments.tokens,
            "--rounds",
            arguments.rounds,
        )
        common += ("--predictors", arguments.predictors)
        subprocess.run(
            [sys.executable, "-m", "benchmarks.runtime", "--child", "make", *map(str, common)], cwd=ROOT, check=True
        )
        result: dict[str, Any] = {"predictors": arguments.predictors, "ours": []}
        drop_from_memory(scratch)
        for slots in arguments.slots.split(","):
            measured = limited(arguments.memory, "--child", "ours", "--slots", slots, *common)
            result["ours"].append(measured)
            report(slots, measured)
        if not arguments.without_accelerate:
            result["accelerate"] = limited(arguments.memory, "--child", "accelerate", *common)
            print(f"accelerate: {json.dumps(result['accelerate'])}")

    from predict_train.predictors.provenance import command, hardware, versions

    result |= {"command": command(), "versions": versions(), "hardware": hardware()}
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {arguments.json}")


def report(slots: str, measured: dict[str, Any]) -> None:
    """One table for one number of slots."""
    if "failed" in measured:
        print(f"{slots} slots: {measured['failed']}")
        return
    peak = measured.get("peak_bytes_of_the_group", 0)
    print(
        f"{slots} slots, link {measured['link_bytes_per_second'] / 1e9:.2f} GB/s, {measured['limit']['kind']}: "
        f"peak {peak / 1e6:,.0f} MB, slots and weights {measured['bytes_of_slots_and_weights'] / 1e6:,.0f} MB"
    )
    on_demand = measured["times_by_round_ms"]["on_demand"]
    for row, times in zip(measured["results"], measured["times_by_round_ms"].values(), strict=True):
        # Round by round, since what drifts meets the policies of a round alike.
        change = statistics.median(own / other for own, other in zip(times, on_demand, strict=True)) - 1
        time, name = row["time_per_output_token_ms"], "/".join(filter(None, (row["policy"], row["gating"])))
        print(
            f"  {name:<24}{time['median']:7.1f} ms ({time['min']:.1f} to {time['max']:.1f}), "
            f"{change:+6.1%}; limit {row['limit_ms_per_token']:.1f}, "
            f"expected {row['expected_ms_per_token']:.1f}; {row['bytes_per_token'] / 1e6:.0f} MB, "
            f"stalled {row['stall_ms_per_token']:.1f}, speculating {row['speculating_ms_per_token']:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
