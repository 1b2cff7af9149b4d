"""Every command on a model of 4 GB in a process that may use 2 GB: its time, and the peak of its memory.

    python -m benchmarks.small_machine

The model has random weights (20 layers of `benchmarks.runtime`'s model, bf16) and the embedded model's tokenizer. Each command runs in
a memory cgroup of its own, or where none can be made with a limit on its data. `collect` is also run with the whole model in memory and no
limit: the traces are compared byte for byte, and the times in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch
from predict_train.predictors.provenance import command, hardware, versions
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.runtime import CONFIG, FREES, RESULTS, ROOT, drop_from_memory, memory_group

LAYERS, LIMIT = 20, 2_000_000_000
TOKENS, BATCH = 2_048, 256


def make(folder: Path) -> None:
    """Writes the checkpoint, unless it is there."""
    if folder.exists():
        return
    config = AutoConfig.from_pretrained(CONFIG)
    config.num_hidden_layers = LAYERS
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="1GB")
    AutoTokenizer.from_pretrained(ROOT / "checkpoints" / "tiny-moe").save_pretrained(folder)


def run(words: list[object], limit: int | None) -> dict[str, Any]:
    """Runs a command of predict-train, with a limit if there is one. `serve` is asked one question, and stopped."""
    with memory_group(limit or 1 << 40) as group:

        def enter() -> None:
            if group is not None:
                group[0].write_text(str(os.getpid()))
            elif limit is not None:
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

        command_line = [sys.executable, "-m", "predict_train", *map(str, words)]
        begun = time.perf_counter()
        child = subprocess.Popen(
            command_line, cwd=ROOT, env=os.environ | FREES, preexec_fn=enter, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert child.stdout is not None
        lines: list[str] = []
        if words[0] == "serve":
            for line in child.stdout:
                lines.append(line)
                if " is served at " in line:
                    address = line.split(" is served at ")[1].strip()
                    body = json.dumps({"prompt": "def ", "max_tokens": 8}).encode()
                    asked = urllib.request.Request(f"{address}/completions", body, {"Content-Type": "application/json"})
                    with urllib.request.urlopen(asked, timeout=600) as answer:
                        lines.append(answer.read().decode())
                    child.send_signal(signal.SIGTERM)
        lines += child.stdout.readlines()
        code = child.wait()
        seconds = time.perf_counter() - begun
        result = {"exit_code": code, "seconds": seconds, "ends_with": "".join(lines)[-300:] if code else None}
        return result | {"peak_bytes": None if group is None else int(group[1].read_text())}


def tensors(trace: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(trace.glob("*.safetensors"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scratch", type=Path, help="where everything is written and kept [a temporary folder, removed]"
    )
    parser.add_argument("--rounds", type=int, default=1, help="of collect, in turn")
    parser.add_argument("--json", type=Path, default=RESULTS / "small_machine.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (arguments.scratch or Path(temporary)).absolute()
        scratch.mkdir(parents=True, exist_ok=True)
        model, pack = scratch / "model", scratch / "experts"
        make(model)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        result: dict[str, Any] = {"checkpoint_bytes": size, "limit_bytes": LIMIT, "commands": {}}

        def measure(name: str, *words: object, limit: int | None = LIMIT) -> dict[str, Any]:
            drop_from_memory(scratch)
            found = run([name, *words], limit)
            peak = "" if found["peak_bytes"] is None else f", peak {found['peak_bytes'] / 1e6:,.0f} MB"
            print(f"{name}: exit code {found['exit_code']}, {found['seconds']:.0f} s{peak}", flush=True)
            if found["exit_code"]:
                print(found["ends_with"], flush=True)
            return found

        if not pack.exists():
            result["commands"]["pack"] = measure("pack", model, "--out", pack)
        common = [model, "--tokens", TOKENS, "--sequence-length", 128, "--batch-size", BATCH // 128, "--dtype", "bfloat16",
                  "--shard-bytes", "64MB"]  # fmt: skip
        ratios = []
        for _ in range(arguments.rounds):
            for name in ("whole", "packed"):
                shutil.rmtree(scratch / name, ignore_errors=True)
            whole = measure("collect", *common, "--out", scratch / "whole", limit=None)
            packed = measure("collect", *common, "--out", scratch / "packed", "--pack", pack)
            ratios.append(whole["seconds"] / packed["seconds"])
        result["commands"]["collect"] = packed
        result["collect"] = {
            "speed_of_the_packed_model_over_that_in_memory": {"median": statistics.median(ratios), "rounds": ratios},
            "same_bytes": tensors(scratch / "whole") == tensors(scratch / "packed"),
        }
        print(result["collect"], flush=True)
        for name in ("run", "predictors"):
            shutil.rmtree(scratch / name, ignore_errors=True)
        found = result["commands"]
        found["fit"] = measure("fit", scratch / "packed", "--out", scratch / "run", "--epochs", 1, "--width", 64)
        found["export"] = measure("export", scratch / "run", "--out", scratch / "predictors")
        offloaded = [model, "--pack", pack, "--predictors", scratch / "predictors", "--dtype", "bfloat16"]
        found["evaluate"] = measure("evaluate", *offloaded, "--tokens", 64, "--sequence-length", 32, "--batch-size", 2)
        found["generate"] = measure("generate", *offloaded, "--prompt", "def mean(values):", "--max-new-tokens", 32)
        found["serve"] = measure("serve", *offloaded, "--port", 0)
    result |= {"versions": versions(), "hardware": hardware(), "command": command()}
    arguments.json.write_text(json.dumps(result, indent=2).replace(str(scratch), "SCRATCH") + "\n")
    print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
