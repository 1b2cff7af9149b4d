"""The command `collect`: of a model that is in memory whole, or whose experts pass through slots."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from .data_collection.collect import Source
from .data_collection.collect import collect as job
from .data_collection.memory import spare_memory
from .data_collection.settings import CollectConfig, CollectError
from .predictors.loading import read_model_config, resolve_device
from .running import dtype_of, header_of, quantization_asked, tell_slots
from .runtime.load import load_offloaded
from .runtime.pack import pack
from .runtime.policy import Policy
from .runtime.quantization import Quantization
from .runtime.room import for_batches
from .runtime.settings import LoadConfig
from .settings import CollectingConfig

EXPERTS = "num_experts", "num_local_experts", "n_routed_experts"
CHOICES = "num_experts_per_tok", "moe_topk", "top_k_experts"
"""What configs call these numbers."""


def collect(config: CollectingConfig, console: Console | None = None) -> Path:
    """Collects as `config` says; see `data_collection.collect`."""
    if not config.is_offloaded:
        return job(config, console)
    if config.device_map is not None:
        raise CollectError(
            "device_map spreads a whole model over GPUs, and this one's experts pass through slots; leave it out"
        )
    return job(_settled(config), console, load_in_slots)


def _settled(config: CollectingConfig) -> CollectingConfig:
    """The settings with what the packed file decides. The file is made if it does not exist, since a resumed trace will find it."""
    if config.pack is not None and not config.pack.exists():
        pack(config.model, config.pack, dtype_of(config, resolve_device(config.device)), config.quantize, config.gguf)
    quantized = quantization_asked(config)
    made = Quantization(quantized) if quantized in set(Quantization) else None
    header = header_of(config)
    dtype = header.dtype if header is not None and config.dtype == "auto" else config.dtype
    return config.model_copy(update={"quantize": made, "dtype": dtype})


def _recording_bytes(config: CollectingConfig, device: torch.device) -> int:
    """About how much memory of the device a recorded batch takes: what the hooks keep, the experts' outputs, and a shard.

    Of each layer the hooks keep up to four hidden states and two rows of router logits. The experts' outputs are there three times:
    as they come, sorted, and weighted.
    """
    text = read_model_config(config.model).get_text_config()
    experts, top_k = (max((getattr(text, name, None) or 0) for name in names) for names in (EXPERTS, CHOICES))
    hooked = text.num_hidden_layers * (4 * text.hidden_size + 2 * experts)
    outputs = 3 * max(1, top_k) * text.hidden_size
    batch = config.batch_tokens * (hooked + outputs) * 4
    return batch + (2 * config.shard_bytes if device.type == "cpu" else 0)


def load_in_slots(config: CollectConfig, device: torch.device) -> Source:
    """The model with its experts in a store. They pass through slots on the device, and tell there what they give."""
    assert isinstance(config, CollectingConfig)
    spare_memory()
    settings = config.values_of(LoadConfig) | {"dtype": dtype_of(config, device), "device": str(device)}
    settings |= for_batches(config, device, config.batch_tokens, _recording_bytes(config, device))
    settings |= {"policy": Policy.ON_DEMAND}
    model = load_offloaded(config.model, config=LoadConfig(**settings))
    tell_slots(model, config)
    return Source(model, vars(model)["expert_offload"].outputs_watched)
