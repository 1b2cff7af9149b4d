"""Time a token by the share of a packed file's experts that host memory keeps: 0, 25, 50 and 100 %, by turns in one run.

    python -m benchmarks.tiers

The model of `benchmarks.runtime` (1.2 B parameters) decodes on demand with its experts in a packed file and 60 slots; its routing is drawn as
local as real routing is. What host memory has learned in the tokens before those that count is kept from round to round.
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

import torch
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.generation import CACHE
from predict_train.predictors.provenance import command, hardware, versions
from predict_train.runtime.load import load_offloaded
from predict_train.runtime.measure.routing import PRESETS, draw_routing, replaying
from predict_train.runtime.offload import offloaded
from predict_train.runtime.packfile import read_header
from transformers import AutoConfig

from benchmarks.runtime import CONFIG, RESULTS, packed, prompt

SHARES = (0.0, 0.25, 0.5, 1.0)
SLOTS, WARMUP, TOKENS = 60, 160, 24


class Run:
    """A model that keeps one share in host memory, and how far it has come in the routing."""

    def __init__(self, pack: Path, share: float, steps: int, attached: ExitStack):
        header = read_header(pack)
        whole = header.block_bytes * header.num_experts * len(header.layers)
        self.model = load_offloaded(AutoConfig.from_pretrained(CONFIG), pack=pack, device="cpu", dtype=torch.bfloat16)
        vars(self.model)["expert_offload"].detach()
        layers = find_moe_layers(self.model)
        routing = draw_routing(PRESETS["qwen3-30b-a3b"], steps=steps, layers=12, num_experts=64, top_k=4, candidates=6)
        attached.enter_context(replaying(layers, routing))
        memory: dict[str, Any] = {} if share == 0 else {"host_memory": int(share * whole)}
        attached.enter_context(offloaded(self.model, device="cpu", slots=SLOTS, policy="on_demand", **memory))
        self.cache = self.model(input_ids=prompt(), use_cache=True)[CACHE]

    def milliseconds(self, tokens: int) -> float:
        """The mean time of the next tokens."""
        token_ids = torch.zeros(1, 1, dtype=torch.int64)
        begun = time.perf_counter()
        for _ in range(tokens):
            self.model(input_ids=token_ids, **{CACHE: self.cache}, use_cache=True)
        return 1000 * (time.perf_counter() - begun) / tokens


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--scratch", type=Path, help="where the packed file is written and kept [a temporary folder, removed]"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "tiers.json")
    arguments = parser.parse_args()
    times: dict[float, list[float]] = {share: [] for share in SHARES}
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as attached:
        scratch = arguments.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        pack, steps = packed(scratch), WARMUP + arguments.rounds * TOKENS
        runs = {share: Run(pack, share, steps, attached) for share in SHARES}
        for run in runs.values():
            run.milliseconds(WARMUP)
        for number in range(arguments.rounds):
            for share in SHARES[number % 4 :] + SHARES[: number % 4]:  # so that none always has the same place
                times[share].append(runs[share].milliseconds(TOKENS))
    shares = []
    for share, own in times.items():
        ratio = statistics.median(mine / other for mine, other in zip(own, times[0.0], strict=True))
        shares.append({"share": share, "median_ms": statistics.median(own), "rounds_ms": own, "of_none": ratio})
        print(f"{share:4.0%} in host memory: {statistics.median(own):6.1f} ms a token, {ratio:.2f} of none", flush=True)
    result = {"slots": SLOTS, "experts": 768, "shares": shares}
    result |= {"versions": versions(), "hardware": hardware(), "command": command()}
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
