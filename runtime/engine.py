"""What an engine is: it executes experts over slots, and copies into these what was announced or is missing.

Engines carry out what the policy decided and decide nothing of it themselves. `runtime.host` is the one whose bookkeeping the
host does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import nn

from .observer import Observer


class Decision(NamedTuple):
    """What a layer executes: all that passes from the policy to the engine."""

    ids: torch.Tensor
    """`[tokens, top_k]`, int64."""
    weights: torch.Tensor
    """`[tokens, top_k]`."""
    known: bool
    """The ids are the first of the candidates that were announced for the layer, in their order: nobody waits for them."""


@dataclass
class Counters:
    """What the runtime has done since it was attached or `reset`."""

    hits: int = 0
    """Experts that were on the device, or on their way to it, when a layer came to execute them."""
    misses: int = 0
    """Experts that a layer had to wait for from the start of their copy."""
    copies: int = 0
    """Experts copied to the device, needed or not."""
    cancelled: int = 0
    """Copies of guesses that proved wrong before they began; they count to no other field."""
    bytes_copied: int = 0
    tokens: int = 0
    """Tokens that passed through the model."""
    stalled_seconds: float = 0.0
    """Time that computing waited for copies."""
    speculation_hit_rate: float | None = None
    """Share of the router's own choice that was among the candidates; None where nothing was speculated."""


class Engine(Protocol):
    """What the offload asks of it. Layers are numbered from 0 among the MoE layers."""

    def begin_pass(self) -> None:
        """Says that a forward pass begins. The one before may have broken off (Ctrl-C, an error, a callback)."""

    def resident(self, layer: int) -> list[int]:
        """The experts of a layer that are on the device or on their way there."""

    def announce(self, layer: int, candidates: torch.Tensor, now: bool) -> None:
        """Takes note of the candidates `[tokens, m]` of a layer; `now` begins their copies, if there are slots for them.

        Else they begin with the next layer that is executed, after the copies of what that one is missing.
        """

    def execute(self, layer: int, experts: nn.Module, x: torch.Tensor, decision: Decision) -> torch.Tensor:
        """The sum `[tokens, hidden]` of the experts that were decided on, for `x` `[tokens, hidden]`.

        It is what `experts` would give with all of them resident. Raises `StoreError` where an expert can't be had.
        """

    def observe(self, observer: Observer | None) -> None:
        """Tells `observer` what happens from now on; None tells nobody."""

    def counters(self) -> Counters:
        """What has happened since the last `reset`. On CUDA it waits for the device."""

    def reset(self) -> None:
        """Counts from zero again."""

    def close(self) -> None:
        """Ends all copies and gives the slots back."""
