"""What the exact sum of a layer's experts costs a decode step: products rounded and then summed, against one batched product.

    python -m benchmarks.exact_sum

Transformers rounds each expert's weighted output before it sums them, and so does the runtime, to give the same logits in bf16. A batched
matrix product would round once. The model of `benchmarks.runtime` (1.2 B parameters, bf16, a packed file, 150 slots) decodes on
demand, and takes the two sums by turns, token by token. Times are of the same tokens, so a pair's ratio says what the sum costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from predict_train.predictors import experts
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.generation import CACHE
from predict_train.predictors.provenance import command, hardware, versions
from predict_train.runtime.load import load_offloaded
from predict_train.runtime.measure.routing import PRESETS, draw_routing, replaying
from transformers import AutoConfig

from benchmarks.runtime import CONFIG, RESULTS, packed, prompt

SLOTS, WARMUP, TURN = 150, 36, 8
"""`TURN` is how many tokens in a row take the same sum."""


def batched(outputs: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `experts.combine` returns, by one matrix product for all tokens, and so rounded once."""
    wider = torch.promote_types(outputs.dtype, weights.dtype)
    stacked = outputs.view(*weights.shape, outputs.shape[-1]).to(wider)
    return torch.bmm(weights.unsqueeze(1).to(wider), stacked).squeeze(1).to(dtype)


SUMS = {"exact": experts.combine, "batched": batched}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=120, help=f"of turns of {TURN} tokens")
    parser.add_argument(
        "--scratch", type=Path, help="where the packed file is written and kept [a temporary folder, removed]"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "exact_sum.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as attached:
        scratch = arguments.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        model: Any = load_offloaded(
            AutoConfig.from_pretrained(CONFIG), pack=packed(scratch), device="cpu", dtype=torch.bfloat16, slots=SLOTS,
            policy="on_demand",
        )  # fmt: skip
        steps = WARMUP + 2 * TURN * arguments.pairs + 8
        routing = draw_routing(PRESETS["qwen3-30b-a3b"], steps=steps, layers=12, num_experts=64, top_k=4, candidates=4)
        attached.enter_context(replaying(find_moe_layers(model), routing))
        cache = model(input_ids=prompt(), use_cache=True)[CACHE]
        token_ids = torch.zeros(1, 1, dtype=torch.int64)

        def milliseconds(tokens: int) -> float:
            begun = time.perf_counter()
            for _ in range(tokens):
                model(input_ids=token_ids, **{CACHE: cache}, use_cache=True)
            return 1000 * (time.perf_counter() - begun) / tokens

        milliseconds(WARMUP)
        times: dict[str, list[float]] = {name: [] for name in SUMS}
        for number in range(arguments.pairs):
            for name in list(SUMS)[:: 1 if number % 2 else -1]:  # so that neither always comes first
                with patch.object(experts, "combine", SUMS[name]):
                    times[name].append(milliseconds(TURN))
    ratios = sorted(a / b for a, b in zip(times["exact"], times["batched"], strict=True))
    medians = {name: statistics.median(own) for name, own in times.items()}
    # By the signs of the pairs, the median of all lies between these with 95 %.
    off = round(0.98 * len(ratios) ** 0.5)
    between = ratios[max(0, len(ratios) // 2 - off)], ratios[min(len(ratios) - 1, len(ratios) // 2 + off)]
    result = {
        "slots": SLOTS,
        "median_ms": medians,
        "ratio": {"median": statistics.median(ratios), "between": between, "pairs": len(ratios)},
        "of_medians": medians["exact"] / medians["batched"],
    }
    print(json.dumps(result, indent=2))
    result |= {"times_ms": times, "versions": versions(), "hardware": hardware(), "command": command()}
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
