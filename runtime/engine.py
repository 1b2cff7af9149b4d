"""The interface of an engine: it executes experts in slots, and copies experts into slots.

The policy decides what is executed, and the engine does it. There are two engines. In `runtime.host` the host decides what to
copy. In `runtime.device` the device does, so that a decode step never waits for the host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ..predictors.experts import OnOutputs
from .hits import HitCount
from .observer import Observer


class Decision(NamedTuple):
    """What a layer is to execute. Nothing else passes from the policy to the engine."""

    ids: torch.Tensor
    """`[tokens, top_k]`, int64."""
    weights: torch.Tensor
    """`[tokens, top_k]`."""
    known: bool
    """Whether the ids are the first of the candidates that were announced for the layer, in order. The host knows them then."""
    tokens: int | None = None
    """How many tokens they are of. None for as many as there are rows."""

    @property
    def rows(self) -> int:
        """How many tokens they are of."""
        return len(self.ids) if self.tokens is None else self.tokens


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
    stalled_seconds: float | None = 0.0
    """Seconds that the computation waited for copies. None where the device decides, since nobody can say."""
    speculation_hit_rate: float | None = None
    """Share of the router's own choice that was among the candidates. None where nothing was speculated."""


class Ahead:
    """What guesses need of an engine. This one has no slots: guesses are made and counted, and nothing is copied."""

    def hit_count(self, top_k: int) -> HitCount:
        """Something to count a layer's right guesses with."""
        return HitCount(top_k)

    def guessing(self, *inputs: Any) -> AbstractContextManager[None]:  # noqa: ARG002
        """Within it guesses are made from `inputs`, and announced. On a device this may be beside the computation."""
        return nullcontext()

    def announce(self, layer: int, candidates: torch.Tensor, now: bool, values: torch.Tensor | None = None) -> None:
        """Takes the candidates `[tokens, m]` of a layer. With `now`, their copies begin at once, if there are slots for them.

        Else they begin when the next layer is executed, after the copies of the experts that this layer is missing. For `values`
        see `Guess.values`.
        """

    def guessed(self, layer: int) -> None:
        """Says that the guess for a layer is used from now on."""

    def absent(self, layer: int) -> torch.Tensor | None:  # noqa: ARG002
        """Which experts of a layer are neither on the device nor on their way to it, bool `[experts]`. None means all."""
        return None


class Engine(Ahead, ABC):
    """Executes experts for an offload. Layers are counted from 0 among the MoE layers."""

    def prepare(self, tokens: int) -> bool:  # noqa: ARG002
        """Says that the next forward pass is over so many tokens. Returns whether the host has nothing to decide in it."""
        return False

    @abstractmethod
    def begin_pass(self, tokens: int) -> None:
        """Says that a forward pass over so many tokens begins. The pass before may have broken off (Ctrl-C, an error)."""

    def routed(self, layer: int, logits: torch.Tensor) -> None:  # an engine may not care
        """Tells what the router of a layer said, `[tokens, experts]`, before the layer is executed."""

    @abstractmethod
    def execute(self, layer: int, experts: nn.Module, x: torch.Tensor, decision: Decision) -> torch.Tensor:
        """The weighted sum `[tokens, hidden]` of the experts of `decision`, for `x` `[tokens, hidden]`.

        It equals what `experts` returns with all experts resident. Raises `StoreError` where an expert can't be read.
        """

    @abstractmethod
    def observe(self, observer: Observer | None) -> None:
        """Tells `observer` what happens from now on. None ends this."""

    @abstractmethod
    def watch(self, layer: int, on_outputs: OnOutputs | None) -> None:
        """Tells `on_outputs` the outputs of a layer's experts in each pass from now on. None ends this.

        Meanwhile the host decides in all passes.
        """

    @abstractmethod
    def counters(self) -> Counters:
        """What has happened since the last `reset`. On CUDA this waits for the device."""

    @abstractmethod
    def reset(self) -> None:
        """Sets the counters to zero."""

    @abstractmethod
    def close(self) -> None:
        """Ends all copies and frees the slots."""
