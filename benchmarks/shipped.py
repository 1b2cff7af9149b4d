"""Checkpoints with experts in the forms in which some models are shipped: written from another checkpoint, and their computing measured.

python -m benchmarks.shipped write checkpoints/tiny-moe OUT     a copy of a checkpoint, with experts in fp8
python -m benchmarks.shipped gguf checkpoints/tiny-moe OUT Q4_0 a GGUF file of a Qwen3-MoE checkpoint, with experts in Q4_0 and all else in F32
python -m benchmarks.shipped time                               the experts' computing alone, against bfloat16's
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from predict_train.runtime.formats.fp8 import BLOCK, Fp8Format
from predict_train.runtime.formats.ggml import TYPES, GgmlType
from predict_train.runtime.formats.mxfp4 import GROUP, Mxfp4Format
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

CONFIG = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
LARGEST = torch.finfo(torch.float8_e4m3fn).max
WIDTH, WEIGHTS = 1024, 48
"""Rows and columns of a weight, and how many there are, so that no processor's cache holds all of them."""
INPUTS_FIRST = "bf16, inputs first"
"""A weight that lies as those of gpt-oss do, which is shipped in MXFP4. Some processors take far longer for a product with it."""


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in e4m3, and the scales of its blocks, float32: the largest number of a block is the largest of e4m3."""
    rows, columns = (min(BLOCK, size) for size in weight.shape)
    blocks = weight.float().unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    scales = blocks.abs().amax((1, 3)).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
    packed = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return packed.flatten(2).flatten(0, 1), scales


def write(source: Path, out: Path) -> None:
    """Copies the checkpoint `source`, and puts its experts into fp8."""
    shutil.copytree(source, out)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if ".experts." in name and name.endswith("_proj.weight")]:
            tensors[name], tensors[f"{name}_scale_inv"] = quantized(tensors[name])
        save_file(tensors, file, metadata={"format": "pt"})
    config = out / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": CONFIG}, indent=2) + "\n")


def write_gguf(source: Path, out: Path, kind: str) -> None:
    """Writes the checkpoint `source` as a GGUF file, with its experts in a type that the package gguf can make."""
    import gguf

    model, number = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(out, "qwen3moe")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, model.config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        base, _, end = name.rpartition(".")
        if base.endswith(".experts"):
            gate = names.get_name(base.replace(".experts", ".gate"))
            assert gate is not None
            layer = gate.rpartition(".")[0]
            kinds = ("gate", "up") if end == "gate_up_proj" else ("down",)
            for part, values in zip(kinds, weight.chunk(len(kinds), 1), strict=True):
                packed = gguf.quantize(values.contiguous().numpy(), number)
                writer.add_tensor(f"{layer}.ffn_{part}_exps.weight", packed, raw_dtype=number)
        elif name != "lm_head.weight" or not model.config.tie_word_embeddings:
            writer.add_tensor(f"{names.get_name(base)}.{end}", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ggml_blocks(kind: GgmlType) -> torch.Tensor:
    """Random codes and scales of a GGML type for a weight, in the order in which they are widened."""
    heads = WIDTH * WIDTH // kind.weights * sum(kind.fields)
    codes = torch.randint(0, 256, (WIDTH * WIDTH * kind.bits // 8,), dtype=torch.uint8)
    return torch.cat([codes, torch.rand(heads // 2).half().view(torch.uint8)])


def widened_product(kind: GgmlType, blocks: list[torch.Tensor], x: torch.Tensor, number: int) -> torch.Tensor:
    wide = torch.empty(WIDTH, WIDTH, dtype=x.dtype)
    kind.widen(blocks[number], wide)
    return F.linear(x, wide)


@torch.no_grad()
def compare(rounds: int) -> None:
    """Prints the time of a token's product with a weight that is widened first, against the same in bfloat16, by turns and with one thread."""
    torch.set_num_threads(1)  # torch would share out some of these operations and not the others
    numbers = [torch.randint(0, 256, (WIDTH, WIDTH), dtype=torch.uint8) for _ in range(WEIGHTS)]
    nearly = [(number & 0xF7).view(torch.float8_e4m3fn) for number in numbers]  # none of these stands for no number
    packed = [number[:, : WIDTH // 2].reshape(-1, GROUP // 2, WIDTH) for number in numbers]
    plain = [torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16) for _ in range(WEIGHTS)]
    scales = torch.rand(WIDTH // BLOCK, WIDTH // BLOCK) * 1e-3
    exponents = torch.full((WIDTH // GROUP, WIDTH), 120, dtype=torch.uint8)
    x = torch.randn(1, WIDTH, dtype=torch.bfloat16)
    jobs: dict[str, Callable[[int], object]] = {
        "bf16": lambda n: F.linear(x, plain[n]),
        INPUTS_FIRST: lambda n: F.linear(x, plain[n].mT),
        "fp8": lambda n: F.linear(x, Fp8Format.widen(nearly[n], scales, x.dtype)),
        "fp8, float32": lambda n: F.linear(x.float(), Fp8Format.widen(nearly[n], scales)),
        "fp8 by Tensor.to": lambda n: F.linear(x, nearly[n].to(x.dtype)),
        "mxfp4": lambda n: F.linear(x, Mxfp4Format.widen(packed[n], exponents, x.dtype)),
        "mxfp4, float32": lambda n: F.linear(x.float(), Mxfp4Format.widen(packed[n], exponents)),
    }
    for name, kind in TYPES.items():
        blocks = [ggml_blocks(kind) for _ in range(WEIGHTS)]
        jobs[name] = partial(widened_product, kind, blocks, x)
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds + 1):
        for name, job in jobs.items():
            begun = time.perf_counter()
            for number in range(WEIGHTS):
                job(number)
            found[name].append(1e6 * (time.perf_counter() - begun) / WEIGHTS)
    for name, times in found.items():
        rival = INPUTS_FIRST if name.startswith("mxfp4") else "bf16"
        ratio = statistics.median(own / other for own, other in zip(times[1:], found[rival][1:], strict=True))
        fastest = min(times[1:]) / min(found[rival][1:])  # what is least disturbed by others on the machine
        print(
            f"{name:18} {statistics.median(times[1:]):7.0f} us per million weights, {ratio:.2f} of {rival}; fastest rounds {fastest:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    writing = jobs.add_parser("write")
    writing.add_argument("source", type=Path)
    writing.add_argument("out", type=Path)
    as_gguf = jobs.add_parser("gguf")
    as_gguf.add_argument("source", type=Path)
    as_gguf.add_argument("out", type=Path)
    as_gguf.add_argument("kind")
    jobs.add_parser("time").add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    if arguments.job == "write":
        write(arguments.source, arguments.out)
    elif arguments.job == "gguf":
        write_gguf(arguments.source, arguments.out, arguments.kind)
    else:
        compare(arguments.rounds)


if __name__ == "__main__":
    main()
