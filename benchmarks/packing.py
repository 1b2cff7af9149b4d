"""Packs a checkpoint of 5 GB to int4 in a process that may use 1.5 GB, and kills it five times: the file is the same.

    python -m benchmarks.packing

The limit is a memory cgroup, or where none can be made a limit on the process's data.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from predict_train.predictors.provenance import command, hardware, versions
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.runtime import CONFIG, FREES, RESULTS, ROOT, drop_from_memory, memory_group

LAYERS, LIMIT, KILLS = 24, 1_500_000_000, 5


def start(folder: Path, out: Path, group: tuple[Path, Path] | None) -> subprocess.Popen[bytes]:
    def enter() -> None:
        if group is None:
            resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
        else:
            group[0].write_text(str(os.getpid()))

    words = [sys.executable, "-m", "predict_train", "pack", str(folder), "--out", str(out), "--quantize", "int4"]
    return subprocess.Popen(words, cwd=ROOT, env=os.environ | FREES, stdout=subprocess.DEVNULL, preexec_fn=enter)


def digest(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scratch", type=Path, help="where everything is written and kept [a temporary folder, removed]"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "packing.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (arguments.scratch or Path(temporary)).absolute()
        folder = scratch / "model"
        if not folder.exists():
            config = AutoConfig.from_pretrained(CONFIG)
            config.num_hidden_layers = LAYERS
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.save_pretrained(folder, max_shard_size="1GB")
            del model
        result: dict[str, Any] = {"checkpoint_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors"))}
        digests, begun, generator = [], time.perf_counter(), random.Random(0)
        for name, kills in (("whole", 0), ("killed", KILLS)):
            out = scratch / f"{name}.experts"
            out.unlink(missing_ok=True)
            drop_from_memory(folder)
            with memory_group(LIMIT) as group:
                for _ in range(kills):
                    child = start(folder, out, group)
                    time.sleep(generator.uniform(0.2, 0.9) * result["seconds"] / (kills + 1))
                    assert child.poll() is None, "it ended before it could be killed"
                    child.send_signal(signal.SIGKILL)
                    child.wait()
                begun = time.perf_counter()
                code = start(folder, out, group).wait()
                assert code == 0, f"it ended with exit code {code}"
                if kills == 0:
                    result["seconds"] = time.perf_counter() - begun
                    result["bytes"] = out.stat().st_size
                    result["limit"] = {"bytes": LIMIT, "kind": "RLIMIT_DATA" if group is None else "memory cgroup"}
                    result["peak_bytes"] = None if group is None else int(group[1].read_text())
                else:
                    result["seconds_after_the_last_kill"] = time.perf_counter() - begun
            digests.append(digest(out))
        result |= {"kills": KILLS, "same_bytes": digests[0] == digests[1]}
    result |= {"command": command(), "versions": versions(), "hardware": hardware()}
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "versions"}, indent=1))


if __name__ == "__main__":
    main()
