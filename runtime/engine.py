"""The interface of an engine: it executes experts in slots, and copies experts into slots.

The policy decides what is executed, and the engine does it. `runtime.host` is the engine in which the host decides what to copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import nn

from .observer import Observer


class Decision(NamedTuple):
    """What a layer is to execute. Nothing else passes from the policy to the engine."""

    ids: torch.Tensor
    """`[tokens, top_k]`, int64."""
    weights: torch.Tensor
    """`[tokens, top_k]`."""
    known: bool
    """Whether the ids are the first of the candidates that were announced for the layer, in order. The host knows them then."""


@dataclass
class Counters:
    """What the runtime has done since it was attached or reset."""

    hits: int = 0
    """Executed experts that were on the device or on their way to it when their layer was entered."""
    misses: int = 0
    """Executed experts whose copy began only when their layer was entered."""
    copies: int = 0
    """Experts copied to the device, needed or not."""
    cancelled: int = 0
    """Copies of wrong guesses that were cancelled before they began. No other field counts them."""
    bytes_copied: int = 0
    tokens: int = 0
    """Tokens that passed through the model."""
    stalled_seconds: float = 0.0
    """Seconds that the computation waited for copies."""
    speculation_hit_rate: float | None = None
    """Share of the router's own choice that was among the candidates. None where nothing was speculated."""


class Engine(Protocol):
    """Executes experts for an offload. Layers are counted from 0 among the MoE layers."""

    def begin_pass(self) -> None:
        """Says that a forward pass begins. The pass before may have broken off (Ctrl-C, an error, a callback)."""

    def resident(self, layer: int) -> list[int]:
        """The experts of a layer that are on the device or on their way to it."""

    def announce(self, layer: int, candidates: torch.Tensor, now: bool) -> None:
        """Takes the candidates `[tokens, m]` of a layer. With `now`, their copies begin at once, if there are slots for them.

        Else they begin when the next layer is executed, after the copies of the experts that this layer is missing.
        """

    def execute(self, layer: int, experts: nn.Module, x: torch.Tensor, decision: Decision) -> torch.Tensor:
        """The weighted sum `[tokens, hidden]` of the experts of `decision`, for `x` `[tokens, hidden]`.

        It equals what `experts` returns with all experts resident. Raises `StoreError` where an expert can't be read.
        """

    def observe(self, observer: Observer | None) -> None:
        """Tells `observer` what happens from now on. None ends this."""

    def counters(self) -> Counters:
        """What has happened since the last `reset`. On CUDA this waits for the device."""

    def reset(self) -> None:
        """Sets the counters to zero."""

    def close(self) -> None:
        """Ends all copies and frees the slots."""
