"""What the field's mixture-of-experts models need: bytes an expert in each form, and how many fit on small GPUs.

    python -m benchmarks.field

Shapes are those of the installed transformers' configs, whose defaults are those of a published checkpoint, with the few changes that
another one needs. Nothing is loaded. Prints the table of docs/models.md.
"""

from __future__ import annotations

from typing import Any

import torch
from predict_train.runtime.measure.plan import Counted, Shape, read_shape
from predict_train.runtime.quantization import Quantization
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

GEMMA: dict[str, Any] = {
    "hidden_size": 2816, "intermediate_size": 2112, "num_attention_heads": 16, "num_key_value_heads": 8, "sliding_window": 1024,
    "num_global_key_value_heads": 2, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "enable_moe_block": True,
    "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704,
}  # fmt: skip
"""The text model of Gemma 4 26B-A4B, of which transformers' defaults say nothing: from Google's MaxText,
src/maxtext/configs/models/gemma4-26b.yml."""
FIELD: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3.5-35B-A3B": ("qwen3_5_moe_text", {}),
    "Qwen3-Next-80B-A3B": ("qwen3_next", {}),
    "gpt-oss-20b": ("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "gpt-oss-120b": ("gpt_oss", {}),
    "GLM-4.5-Air": ("glm4_moe", {}),
    "DeepSeek-V4-Flash": ("deepseek_v4", {}),
    "Gemma-4-26B-A4B": ("gemma4_text", GEMMA),
    "Mixtral-8x7B": ("mixtral", {}),
}
"""By name: the model type, and what differs from the defaults of its config."""
FORMS = (None, Quantization.INT8, Quantization.INT4)
GPUS = (12, 16, 24)
RESERVE = 2 * 2**30
"""Bytes left for keys, values and activations."""


def shapes_of(name: str) -> list[Shape]:
    """The shape of a model with its experts in bfloat16, int8 and int4."""
    model_type, changes = FIELD[name]
    counted = Counted.of(CONFIG_MAPPING[model_type](**changes))
    return [read_shape(counted, torch.bfloat16, form) for form in FORMS]


def fits(shape: Shape, gibibytes: int) -> str:
    """The share of the experts that have a slot on a GPU beside the other weights, for a table."""
    slots = min(
        (gibibytes * 2**30 - RESERVE - shape.resident_bytes) // shape.expert_bytes, shape.layers * shape.num_experts
    )
    return "no" if slots < shape.top_k else f"{slots / (shape.layers * shape.num_experts):.0%}"


def row(name: str) -> str:
    """A model's row of the table."""
    shapes = shapes_of(name)
    first = shapes[0]
    sizes = " | ".join(f"{shape.expert_bytes / 1e6:.1f}" for shape in shapes)
    shares = " | ".join(", ".join(fits(shape, size) for shape in shapes) for size in GPUS)
    return f"| {name} | {first.layers} x {first.num_experts}, top {first.top_k} | {first.resident_bytes / 1e9:.1f} | {sizes} | {shares} |"


def table() -> str:
    head = "| model | MoE layers x experts | other weights, GB | MB an expert in bf16 | int8 | int4 | 12 GB | 16 GB | 24 GB |"
    return "\n".join([head, "| --- " * head.count(" | ") + "| --- |", *map(row, FIELD)])


if __name__ == "__main__":
    print(table())
