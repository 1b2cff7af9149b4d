"""Chooses the engine of a model: the device's where it can decide alone, else the host's."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from ..predictors.architecture import ExpertLayer
from ..predictors.checkpoint import Predictors
from ..predictors.confidence import Confidences
from ..predictors.experts import unmarked
from .automatic import AUTO
from .engine import Engine
from .errors import OffloadError
from .formats.ggml import kept_kind
from .formats.gguf import GgufFormat
from .host.cache import Eviction
from .host.slots import ExpertSlots
from .reusing import reuse_scores
from .settings import OffloadConfig
from .store import ExpertStore, MemoryStore

ON_A_CPU = {
    Eviction.FOLLOWERS: "they are counted there",
    Eviction.LEARNED: "the reuse predictors run there",
}
"""Evictions that a CPU has to compute, and why."""


def check_eviction(eviction: Eviction, on_cpu: bool) -> None:
    """Raises `OffloadError` for one that only models that compute on a CPU can have, unless this one does."""
    if eviction in ON_A_CPU and not on_cpu:
        raise OffloadError(
            f"eviction {eviction} is for models that compute on a CPU, since {ON_A_CPU[eviction]}; give eviction=frequency"
        )


def make_engine(
    store: ExpertStore, layers: Sequence[ExpertLayer], config: OffloadConfig, predictors: Predictors | None
) -> tuple[Engine, str | None]:
    """The engine for `layers`, and in one sentence why it is not the device's; None if it is.

    `config` gives the number of slots and names the device. Raises `StoreError` where the device has too little memory, and
    `OffloadError` for an eviction that `predictors` lack, or that can't be had on the device.
    """
    assert config.slots is not None
    device = torch.device(config.device)
    check_eviction(Eviction(config.eviction), device.type == "cpu")
    reuse, confidences = reuse_scores(predictors, layers, config), None
    # On a CUDA device the host does not see when something is computed or copied, so nothing could be priced.
    if config.policy == AUTO and device.type == "cpu":
        found = [None if predictors is None else predictors.of(layer.index).confidence for layer in layers]
        confidences = Confidences(found, layers[0].top_k)
    host = ExpertSlots(store, config.slots, device, config.readers, Eviction(config.eviction), reuse, confidences)
    hindrance = hindrance_of(store, layers, config.slots, device)
    if hindrance is not None or not isinstance(store, MemoryStore):
        return host, hindrance
    from .device.slots import DeviceSlots  # needs Triton

    most_tokens = max(config.speculated_tokens, 1)
    try:
        return DeviceSlots(host, store, [layer.experts for layer in layers], most_tokens), None
    except BaseException:
        host.close()
        raise


def hindrance_of(store: ExpertStore, layers: Sequence[ExpertLayer], slots: int, device: torch.device) -> str | None:
    """Why the device can't decide, or None."""
    needed = len(layers) * layers[0].top_k
    if device.type != "cuda":
        return f"the host decides what is copied, since the model computes on a {device.type.upper()}"
    if not isinstance(store, MemoryStore):
        return "the host decides what is copied, since the experts are in a file"
    if not store.is_registered:
        return "the host decides what is copied, since the system does not let so much memory be registered"
    if slots < needed:
        return f"the host decides what is copied, since {slots} slots are fewer than the {needed} that one token needs"
    if unmarked(layers[0].experts) is not None:
        return "the host decides what is copied, since the device has no kernels for this model's experts"
    if next(layers[0].experts.parameters()).dtype != layers[0].dtype:
        return "the host decides what is copied, since the experts are in another dtype than the rest of the model"
    if isinstance(store.format, GgufFormat) and (kinds := _kept_kinds(store, store.format)):
        return f"the host decides what is copied, since the device has no kernels for GGUF's {', '.join(kinds)}"
    if importlib.util.find_spec("triton") is None:
        return "the host decides what is copied, since Triton is not installed; pip install triton"
    return None


def _kept_kinds(store: MemoryStore, form: GgufFormat) -> list[str]:
    """The types of the experts in `store` that are only kept, not rearranged."""
    told = (part for blocks in store.blocks for parts in form.parts(blocks[0]).values() for part in parts)
    return sorted({kind for part in told if (kind := kept_kind(part.number, part.rows)) is not None})
