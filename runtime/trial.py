"""Tries whether the slots that should fit do fit, in the first tokens. Where memory runs out, it takes fewer."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from contextlib import ExitStack

import torch
from transformers import PreTrainedModel

from ..predictors.generation import CACHE
from ..predictors.loading import resolve_device
from .errors import StoreError
from .room import Slots
from .settings import OffloadConfig

FEWER = 0.8
"""By this factor there are fewer slots in the next attempt."""
MOST_TOKENS = 512


def tried(
    model: PreTrainedModel, attach: Callable[[Slots, ExitStack], None], slots: Slots, fewest: int, config: OffloadConfig
) -> Slots:
    """The most slots up to `slots`, in steps of a fifth, with which a text and one more token run on a CUDA device.

    A warning says where these are fewer. On a CPU nothing is tried, since the system ends a process there, which can't be
    caught. Raises what the last attempt raises where not even the `fewest` slots fit.
    """
    device = resolve_device(config.device)
    if not _can_run_out(device):
        return slots
    first = slots.number
    while True:
        try:
            with ExitStack() as attached:
                attach(slots, attached)
                try:
                    _run(model, min(config.context, MOST_TOKENS))
                finally:
                    vars(model)["expert_offload"].detach()
        except (torch.OutOfMemoryError, StoreError):
            if slots.number <= fewest:
                raise
        else:
            if slots.number < first:
                warnings.warn(
                    f"with {first:,} slots the device ran out of memory in the first tokens, so there are {slots.number:,}; give "
                    "a larger reserve, or slots",
                    stacklevel=4,
                )
            return slots
        gc.collect()  # the error's frames hold tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        slots = Slots(max(fewest, int(slots.number * FEWER)), f"with {first:,} the device ran out of memory")


def _can_run_out(device: torch.device) -> bool:
    """Whether a lack of memory can be caught."""
    return device.type == "cuda"


@torch.inference_mode()
def _run(model: PreTrainedModel, tokens: int) -> None:
    """A text of `tokens` tokens and one more, as in generation."""
    token_ids = torch.zeros(1, tokens, dtype=torch.int64, device=model.device)
    cache = model(input_ids=token_ids, use_cache=True)[CACHE]
    model(input_ids=token_ids[:, :1], use_cache=True, **{CACHE: cache})
