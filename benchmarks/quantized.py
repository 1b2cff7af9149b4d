"""Time per output token with experts in bf16, int8 and int4, by turns in one process, with the same bytes of slots.

    python -m benchmarks.quantized

The model, its routing and its predictors are those of `benchmarks.runtime`. Its experts are in packed files, which are read past
the page cache. The experts' computation is measured alone too, for one token, with all blocks in memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.provenance import command, hardware, versions
from predict_train.runtime.load import load_to_host
from predict_train.runtime.measure.bench import bench
from predict_train.runtime.pack import pack_random
from predict_train.runtime.packfile import PackedStore
from predict_train.runtime.quantization import Quantization
from predict_train.runtime.settings import Loading
from predict_train.runtime.store import empty_blocks
from transformers import AutoConfig

from benchmarks.runtime import CONFIG, RESULTS, predictors_of, prompt, routing_of, settings_of

FORMATS = (None, *Quantization)
WAYS = "on_demand,speculative/true"


def computing(model: Any, file: Path, rounds: int) -> list[float]:
    """Milliseconds of the experts of one token in one layer, in each round; no two tokens have the same experts."""
    store, layer = PackedStore(file), find_moe_layers(model)[0]
    blocks = empty_blocks(layer.num_experts, store.format.bytes, torch.device("cpu"))
    for expert, block in enumerate(blocks):
        store.read(0, expert, block.numpy())
    weights = [store.format.views(block) for block in blocks]
    store.close()
    x, found = torch.randn(1, layer.hidden_size, dtype=torch.bfloat16), []
    tokens = layer.num_experts // layer.top_k
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        for expert_weights in weights[: tokens * layer.top_k]:
            store.format.outputs(layer.experts, [expert_weights], [x])
        found.append(1000 * (time.perf_counter() - begun) / tokens)
    return found[1:]


def ratios(times: list[float], others: list[float]) -> float:
    """The median of the ratios, round by round."""
    return statistics.median(own / other for own, other in zip(times, others, strict=True))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", default="60,150,300", help="in bf16; the others have as many bytes")
    parser.add_argument("--tokens", type=int, default=24, help="counted in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--scratch", type=Path, help="where the models are written and kept [a temporary folder, removed]"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "quantized.json")
    arguments = parser.parse_args()
    config, models = AutoConfig.from_pretrained(CONFIG), {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = arguments.scratch or Path(folder)
        scratch.mkdir(parents=True, exist_ok=True)
        for quantize in FORMATS:
            file = scratch / f"experts.{quantize or 'bf16'}"
            if not file.exists():
                pack_random(config, file, torch.bfloat16, quantize=quantize)
            models[quantize] = load_to_host(config, Loading(pack=file, dtype="bfloat16"))
        result: dict[str, Any] = {"computing_ms": {}, "rows": []}
        for quantize, model in models.items():
            result["computing_ms"][quantize or "bf16"] = computing(
                model, scratch / f"experts.{quantize or 'bf16'}", arguments.rounds
            )
        plain = result["computing_ms"]["bf16"]
        for name, times in result["computing_ms"].items():
            print(
                f"experts of a token in a layer, {name}: {statistics.median(times):.3f} ms, {ratios(times, plain):.2f} of bf16"
            )
        known = predictors_of(config, find_moe_layers(models[None]), 3)
        for slots in map(int, arguments.slots.split(",")):
            result["rows"].append(measured(models, known, slots, arguments))
            report(result["rows"][-1])
        result |= {"command": command(), "versions": versions(), "hardware": hardware()}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def measured(models: dict[Any, Any], known: Any, slots: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The times of all formats with so many slots in bf16, by turns."""
    row: dict[str, Any] = {
        "slots": slots,
        "ms": {},
        "own_slots": {},
        "bytes_per_token": {},
        "link_bytes_per_second": [],
    }
    size = slots * PackedStore(vars(models[None])["expert_pack"]).format.bytes
    for _ in range(arguments.rounds):
        for quantize, model in models.items():
            name = quantize or "bf16"
            layers = find_moe_layers(model)
            block = PackedStore(vars(model)["expert_pack"]).format.bytes
            own = min(size // block, sum(layer.num_experts for layer in layers))
            config = settings_of(WAYS, arguments.tokens, 1, own)
            found = bench(model, prompt(), config, known, routing_of(arguments.tokens))
            row["own_slots"][name] = own
            row["link_bytes_per_second"].append(found.link)
            for way, rounds in found.rounds.items():
                row["ms"].setdefault(str(way), {}).setdefault(name, []).append(1000 * rounds[0].seconds_per_token)
                row["bytes_per_token"].setdefault(str(way), {})[name] = rounds[0].bytes_per_token
    return row


def report(row: dict[str, Any]) -> None:
    print(f"{row['slots']} slots in bf16, link {statistics.median(row['link_bytes_per_second']) / 1e9:.2f} GB/s")
    for way, formats in row["ms"].items():
        for name, times in formats.items():
            copied = row["bytes_per_token"][way][name] / 1e6
            print(
                f"  {way:18} {name:5} {row['own_slots'][name]:4} slots {statistics.median(times):7.1f} ms, "
                f"{ratios(times, formats['bf16']):.2f} of bf16; {copied:.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
