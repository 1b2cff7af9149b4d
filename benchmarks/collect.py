"""Tokens per second of `collect` against the plain forward pass and against the naive way, and its peak memory.

    python -m benchmarks.collect            # speed, on the embedded model and one of 1 B parameters
    python -m benchmarks.collect --memory   # peak memory of `predict-train collect` at 100 k and at 1 M tokens

Four ways to run the same batches through the same model:

    plain        the model's body, with the experts implementation that transformers picks by itself
    ours         the same under the recorder, every layer a target, its columns handed to the real writer, until all is on disk
    naive        the model itself with output_hidden_states=True and output_router_logits=True, a torch.save a batch; with
                 these flags it computes its head and its auxiliary loss as well
    naive body   the same of the body alone

Plain has no head, which nobody needs here and which would hide what recording costs. The ways take turns, in another
order each round, and a ratio is the median over rounds of the ratio within a round: what else the machine does in the
meantime meets all of them. All of them run with the memory settings of a collection (`data_collection.memory`). Beside it stands the same ratio of CPU seconds, those of the writing thread included: on a busy
machine it is the steadier one, but it counts what overlaps.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Torch is imported only where it is needed: the parent of a memory measurement stays small.
if TYPE_CHECKING:
    from predict_train.data_collection.batches import TokenBatch
    from predict_train.data_collection.settings import CollectConfig
    from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = ROOT / "checkpoints" / "tiny-moe"
RESULTS = ROOT / "benchmarks" / "results"
BILLION: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_experts": 64,
    "num_local_experts": 64,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 384,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32_000,
    "tie_word_embeddings": True,
}
"""Of a Qwen3-MoE: 0.97 B parameters, 80 million of them active for a token."""
TARGET = 0.85
SHARDS = 8

Batches = list["TokenBatch"]


def plain(model: PreTrainedModel, batches: Batches, _: Path) -> None:
    import torch

    with torch.inference_mode():
        for batch in batches:
            model.base_model(input_ids=batch.token_ids, use_cache=False)


def naive(model: PreTrainedModel, batches: Batches, folder: Path) -> None:
    """What a user would write: the model's own flags, and torch.save. With them it computes its head and its
    auxiliary loss as well."""
    _saved(model, batches, folder)


def naive_body(model: PreTrainedModel, batches: Batches, folder: Path) -> None:
    """The same without head and auxiliary loss, for who thinks of that."""
    _saved(model.base_model, batches, folder)


def _saved(model: Any, batches: Batches, folder: Path) -> None:
    import torch

    folder.mkdir()
    with torch.inference_mode():
        for batch in batches:
            output = model(
                input_ids=batch.token_ids, use_cache=False, output_hidden_states=True, output_router_logits=True
            )
            kept = {"hidden_states": output.hidden_states, "router_logits": output.router_logits}
            torch.save(kept | {"token_ids": batch.token_ids}, folder / f"{batch.number}.pt")


def ours(model: PreTrainedModel, batches: Batches, folder: Path) -> None:
    import torch
    from predict_train.data_collection.hooks import Recorder
    from predict_train.data_collection.passes import run_batch
    from predict_train.data_collection.writer import TraceWriter

    layers = layers_of(model)
    tokens = sum(batch.tokens for batch in batches)
    # A pass is short; in shards of the usual size nothing would be written until its end, as in no real collection.
    shard_bytes = max(1, tokens * bytes_per_token(layers) // SHARDS)
    config = settings(tokens)
    with (
        torch.inference_mode(),
        Recorder(layers, [layer.index for layer in layers]) as recorder,
        TraceWriter(folder, shard_bytes) as writer,
    ):
        for batch in batches:
            writer.append(run_batch(model, recorder, batch, config))
        shards = writer.flush()
    assert sum(shard.rows for shard in shards) == tokens
    assert set(recorder.control_hit_rates().values()) == {1.0}, "the recording is wrong, so its speed says nothing"


WAYS: dict[str, Callable[[PreTrainedModel, Batches, Path], None]] = {
    "plain": plain,
    "ours": ours,
    "naive": naive,
    "naive body": naive_body,
}


@functools.cache
def layers_of(model: PreTrainedModel) -> list[Any]:
    """The MoE layers, found once a model, as in a collection."""
    from predict_train.predictors.discovery import find_moe_layers

    return find_moe_layers(model)


def bytes_per_token(layers: list[Any]) -> int:
    """Of a trace with every MoE layer as a target: the rule of `data_collection.trace.column_shapes`."""
    first = layers[0]
    # The last layer is no source, so its residual is not kept; the first target's input is.
    return len(layers) * (2 * first.hidden_size + 2 * first.num_experts + 4 * first.top_k) + 12


def load(name: str, dtype: str) -> PreTrainedModel:
    """The model `embedded` or `billion` (random weights, seed 0), on the CPU."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    if name == "embedded":
        return AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=kind).eval()
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **BILLION), dtype=kind).eval()


def settings(tokens: int, sequence_length: int = 256, batch_size: int = 16) -> CollectConfig:
    """Those of a collection of packed sequences: with nothing padded, a token costs the same in all three ways."""
    from predict_train.data_collection.settings import CollectConfig

    return CollectConfig(
        model=str(EMBEDDED),
        out=Path("unused"),
        split="held_out",
        tokens=tokens,
        concatenate=True,
        sequence_length=sequence_length,
        batch_size=batch_size,
    )


def batches_of(tokens: int, batch_size: int) -> Batches:
    """Text of the embedded corpus in whole batches; the embedded model's tokens serve both models."""
    from predict_train.data_collection.batches import read_batches
    from predict_train.predictors.loading import load_tokenizer

    count = max(1, tokens // (256 * batch_size))
    whole = count * 256 * batch_size
    return list(read_batches(settings(whole, batch_size=batch_size), load_tokenizer(str(EMBEDDED)), whole))


def compare(name: str, dtype: str, tokens: int, rounds: int, batch_size: int, scratch: Path) -> dict[str, Any]:
    """Seconds of each way in each round, tokens per second (median) and ratios to the plain forward (median)."""
    from predict_train.data_collection.memory import keep_freed_memory

    keep_freed_memory()
    model, batches = load(name, dtype), batches_of(tokens, batch_size)
    tokens = sum(batch.tokens for batch in batches)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu_seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    size: dict[str, int] = {}
    for number in range(-1, rounds):
        names = list(WAYS)
        start = number % len(names)
        for way in names[start:] + names[:start]:
            folder = scratch / way
            shutil.rmtree(folder, ignore_errors=True)
            # The first round is a single batch of each way: it warms up, and is not counted.
            started, worked = time.perf_counter(), time.process_time()
            WAYS[way](model, batches if number >= 0 else batches[:1], folder)
            elapsed, worked = time.perf_counter() - started, time.process_time() - worked
            if number >= 0:
                seconds[way].append(elapsed)
                cpu_seconds[way].append(worked)
                size[way] = sum(file.stat().st_size for file in folder.iterdir()) if folder.exists() else 0
                print(
                    f"{name:>9} round {number} {way:>10}: {tokens / elapsed:10,.0f} tokens/s, {worked:6.1f} CPU s",
                    flush=True,
                )
            shutil.rmtree(folder, ignore_errors=True)
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": dtype,
        "experts_implementation": model.config._experts_implementation,
        "tokens": tokens,
        "sequence_length": 256,
        "batch_size": batch_size,
        "rounds": rounds,
        "seconds": seconds,
        "tokens_per_second": {way: tokens / statistics.median(values) for way, values in seconds.items()},
        "ratio_to_plain": {way: _ratio(seconds, way) for way in WAYS},
        "cpu_seconds": cpu_seconds,
        "cpu_ratio_to_plain": {way: _ratio(cpu_seconds, way) for way in WAYS},
        "bytes_per_token": {way: round(total / tokens) for way, total in size.items()},
    }


def _ratio(seconds: dict[str, list[float]], way: str) -> float:
    """The median over rounds of plain's seconds over those of `way`: its share of plain's tokens per second."""
    return statistics.median(p / s for p, s in zip(seconds["plain"], seconds[way], strict=True))


def peak_memory(tokens: int, scratch: Path) -> dict[str, Any]:
    """Peak resident bytes of a whole `predict-train collect` of the embedded model in a process of its own (Linux).

    The pages of a trace's mapped files count while they are in memory, though the system may drop them.
    """
    out = scratch / "trace"
    # Of VmHWM and not ru_maxrss: the latter goes on from the parent's memory where a process was made by vfork.
    script = (
        "import atexit, pathlib, re, sys\n"
        "from predict_train import cli\n"
        "status = pathlib.Path('/proc/self/status')\n"
        "atexit.register(lambda: print('PEAK', re.search(r'VmHWM:\\s*(\\d+) kB', status.read_text())[1]))\n"
        "sys.argv[0] = 'predict-train'\n"
        "cli.main()\n"
    )
    arguments = ["collect", str(EMBEDDED), "--tokens", str(tokens), "--out", str(out)]
    started = time.perf_counter()
    child = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    shutil.rmtree(out, ignore_errors=True)
    if child.returncode:
        sys.exit(f"collect of {tokens} tokens failed: {child.stderr.strip()}")
    peak = int(child.stdout.rsplit("PEAK", 1)[1]) * 1024
    print(f"{tokens:>11,} tokens: {peak / 1e6:,.0f} MB at the peak, {seconds:,.0f} s", flush=True)
    return {"tokens": tokens, "peak_bytes": peak, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="embedded,billion", help="embedded, billion, or both with a comma")
    parser.add_argument("--tokens", type=int, default=65_536, help="of a pass of the embedded model")
    parser.add_argument("--billion-tokens", type=int, default=16_384, help="of a pass of the 1 B model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences of 256 tokens")
    parser.add_argument("--dtype", default="float32", help="of the models")
    parser.add_argument(
        "--memory", type=int, nargs="*", help="measure peak memory at so many tokens [100000 1000000], and no speed"
    )
    parser.add_argument("--scratch", type=Path, help="where traces are written, and removed again [a temporary folder]")
    parser.add_argument("--json", type=Path, help="[benchmarks/results/collect.json, or collect-memory.json]")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        scratch = Path(folder)
        result: dict[str, Any]
        if arguments.memory is not None:
            counts = arguments.memory or [100_000, 1_000_000]
            result = {"memory": [peak_memory(tokens, scratch) for tokens in counts]}
        else:
            result = {"target": TARGET, "speed": []}
            for name in arguments.models.split(","):
                tokens = arguments.tokens if name == "embedded" else arguments.billion_tokens
                result["speed"].append(
                    compare(name, arguments.dtype, tokens, arguments.rounds, arguments.batch_size, scratch)
                )
    if "speed" in result:
        report(result["speed"])

    from predict_train.predictors.provenance import command, hardware, versions

    result |= {"command": command(), "versions": versions(), "hardware": hardware()}
    default = "collect-memory.json" if "memory" in result else "collect.json"
    file = arguments.json or RESULTS / default
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {file}")


def report(speed: list[dict[str, Any]]) -> None:
    """The table of one run: tokens per second (median of the rounds), and the share of the plain forward's."""
    print(f"\n{'model':>9} {'':>10} {'tokens/s':>10} {'of plain':>9} {'of its CPU':>10} {'bytes/token':>12}")
    for entry in speed:
        for way in WAYS:
            print(
                f"{entry['model']:>9} {way:>10} {entry['tokens_per_second'][way]:10,.0f} "
                f"{entry['ratio_to_plain'][way]:9.3f} {entry['cpu_ratio_to_plain'][way]:10.3f} {entry['bytes_per_token'][way]:12,}"
            )
        ratio = entry["ratio_to_plain"]
        reached = ratio["ours"] >= TARGET and ratio["ours"] > ratio["naive"]
        print(f"{entry['model']:>9} target: {TARGET} of plain and ahead of naive: {'yes' if reached else 'NO'}")


if __name__ == "__main__":
    main()
