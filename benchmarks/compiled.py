"""Time of a decode step on a CPU in which nothing is computed to speak of: eager against compiled, by turns in one process.

    python -m benchmarks.compiled

An offloaded Qwen3-MoE with random weights in bf16, 12 layers, 64 experts, top 4, and a hidden size of 64. All experts are in slots
before anything is measured, so that nothing is copied. The time of a step is thus what the host needs to start its operations:
attention, norms, routers, speculation, slots and experts. It is the wall-clock time of one call of `model.forward` with one token.

    eager           the model as it is, over the cache that `generate` uses by default
    compiled        `torch.compile(model.forward, fullgraph=True)` (inductor), over a static cache
    compiled, C++   the same with `options={"cpp_wrapper": True}`: inductor's own calls are in C++ too

Each turn measures all three on the same offload, one after the other. A ratio is the median over turns of the ratio to eager
within a turn. The goals are for the faster of the two compiled ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from predict_train.predictors.generation import CACHE
from predict_train.predictors.provenance import command, hardware, versions
from predict_train.runtime import offloaded
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel, StaticCache

ROOT = Path(__file__).resolve().parent.parent
SHAPE: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 64,
    "num_experts_per_tok": 4,
}
GOALS = {"on_demand": 0.5, "speculative": 0.6}
OPTIONS: dict[str, dict[str, Any]] = {"compiled": {}, "compiled, C++": {"cpp_wrapper": True}}
PROMPT, WARMUP, STEPS = 8, 4, 20


def steps(model: PreTrainedModel, forward: Callable[..., Any], cache: Cache) -> float:
    """The median seconds of a decode step after a prompt."""
    ids = torch.arange(1, PROMPT + 1).unsqueeze(0)
    model(ids, **{CACHE: cache}, use_cache=True)
    seconds = []
    for number in range(WARMUP + STEPS):
        token = ids[:, number % PROMPT : number % PROMPT + 1]
        begun = time.perf_counter()
        forward(token, **{CACHE: cache}, use_cache=True)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[WARMUP:])


def measure(model: PreTrainedModel, policy: str, turns: int) -> dict[str, Any]:
    slots = SHAPE["num_hidden_layers"] * SHAPE["num_experts"]
    with offloaded(model, device="cpu", slots=slots, policy=policy) as offload, torch.inference_mode():
        for offset in range(4):  # every expert is needed in one of these prompts
            model(torch.arange(256).roll(offset).repeat(2).view(1, -1))
        static = StaticCache(model.config, max_cache_len=PROMPT + WARMUP + STEPS)
        forwards = {"eager": model.forward}
        compiling = {}
        for way, options in OPTIONS.items():
            forwards[way] = torch.compile(model.forward, fullgraph=True, options=options)
            begun = time.perf_counter()
            steps(model, forwards[way], static)
            compiling[way] = time.perf_counter() - begun
            static.reset()
        times: dict[str, list[float]] = {way: [] for way in forwards}
        copies = offload.counters.copies
        for _ in range(turns):
            for way, forward in forwards.items():
                static.reset()
                cache = DynamicCache(config=model.config) if way == "eager" else static
                times[way].append(steps(model, forward, cache))
        copies = offload.counters.copies - copies
    return {
        "policy": policy,
        "milliseconds": {way: 1000 * statistics.median(seconds) for way, seconds in times.items()},
        "milliseconds_by_turn": {way: [1000 * second for second in seconds] for way, seconds in times.items()},
        "ratio": {
            way: statistics.median(after / before for before, after in zip(times["eager"], times[way], strict=True))
            for way in OPTIONS
        },
        "goal": GOALS[policy],
        "seconds_to_compile": compiling,
        "copies": copies,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "compiled.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **SHAPE)).to(torch.bfloat16).eval()
    rows = []
    for policy, goal in GOALS.items():
        row = measure(model, policy, args.turns)
        rows.append(row)
        for way, milliseconds in row["milliseconds"].items():
            ratio = f"{row['ratio'][way]:.2f} of eager" if way in OPTIONS else ""
            print(f"{policy:>12}  {way:14} {milliseconds:6.2f} ms  {ratio}")
        reached = min(row["ratio"].values()) <= goal
        print(
            f"{policy:>12}  goal {goal}: {'reached' if reached else 'NOT reached'}; copies: {row['copies']}", flush=True
        )
    result = {"shape": SHAPE, "rows": rows, "command": command(), "versions": versions(), "hardware": hardware()}
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
