"""The model as accelerate offloads it, for comparison: whole layers are on the CPU or on the disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ...predictors.experts import expert_modules


@contextmanager
def accelerated(
    model: PreTrainedModel, checkpoint: str | Path | None, device: torch.device, expert_bytes: int
) -> Iterator[PreTrainedModel]:
    """Yields another copy of `model` with `device_map="auto"`, limited to its non-expert weights plus `expert_bytes`.

    Layers that do not fit are on the CPU where `device` is CUDA, and on the disk where it is a CPU. `checkpoint` is the model's
    folder or Hub name. Without it the model is saved to a temporary folder first.
    """
    experts = {id(p) for module in expert_modules(model).values() for p in module.parameters()}
    memory = expert_bytes + sum(p.nbytes for p in model.parameters() if id(p) not in experts)
    limits: dict[Any, Any] = {"cpu": memory}
    if device.type == "cuda":
        limits = {device.index or 0: memory, "cpu": "10000GiB"}
    with tempfile.TemporaryDirectory() as folder:
        if checkpoint is None:
            checkpoint = Path(folder) / "model"
            model.save_pretrained(checkpoint)
        other: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(checkpoint),
            dtype=model.dtype,
            device_map="auto",
            max_memory=limits,
            offload_folder=Path(folder) / "offload",
        )
        yield other.eval()
