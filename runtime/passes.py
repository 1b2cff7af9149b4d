"""The forward passes of an offload: what they do at each layer, and under policy `auto` how long they take.

An eager pass has its turn from its first layer to its last. In a compiled graph each operation takes a turn by itself, since
nothing can be sure to end a turn if the graph breaks off. So the compiled passes of several threads may alternate.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..predictors.routing import Routing
from . import operations
from .automatic import Choice
from .control import RoutingControl
from .engine import Decision, Engine
from .guard import Guard
from .observer import Observer
from .targets import Target


class Passes:
    """The forward passes of one offload, one at a time. It is `operations.Operated`."""

    def __init__(
        self,
        turn: AbstractContextManager[Any],
        device: torch.device,
        engine: Engine,
        targets: list[Target],
        choice: Choice | None,
        most_tokens: int,
    ):
        """`turn` is the lock of the offload. Passes over up to `most_tokens` tokens count for the `choice` of policy `auto`."""
        self.turn, self.device, self.choice = turn, device, choice
        self.handle = operations.register(self)
        """By this number, compiled graphs know the offload."""
        self.control: RoutingControl
        self.guard: Guard
        self.observer: Observer | None = None
        self.is_running = False
        """Whether a pass has its turn. Here no code runs where it is set, so that Ctrl-C can't come before it has been."""
        self.tokens = 0
        """Of the current pass, as far as its first layer has executed them."""
        self._engine, self._targets, self._most_tokens = engine, targets, most_tokens
        self._begun = 0.0

    def execute(self, number: int, x: torch.Tensor, decision: Decision) -> torch.Tensor:
        """See `Engine.execute`. Raises `OffloadError` where weights have changed; see `Guard.check`."""
        begun = time.perf_counter()
        self.guard.check(number)
        output = self._engine.execute(number, self._targets[number].layer.experts, x, decision)
        if number == 0:
            self.tokens += decision.rows
        if self.observer is not None:
            self.observer.executed(number, begun, time.perf_counter())
        return output

    def start(self) -> float:
        """Has policy `auto` decide whether a pass guesses. Returns the time."""
        if self.choice is not None:
            self.control.is_on = self.choice.prefetches
        self.tokens = 0
        return time.perf_counter()

    def end(self, begun: float) -> None:
        """Tells policy `auto` how long a pass has taken."""
        if self.choice is None:
            return
        if self.device.type == "cuda" and self.choice.is_timed:
            torch.cuda.synchronize(self.device)
        if 0 < self.tokens <= self._most_tokens:
            self.choice.took(time.perf_counter() - begun)

    def begin(self, x: torch.Tensor) -> None:
        self._begun = self.start()
        # A graph does not say how full the cache is, so a prompt of one token is taken for a step.
        self.control.is_exact = x.ndim < 3 or x.shape[-2] != 1
        self._engine.begin_pass(x.numel() // x.shape[-1])

    def enter(self, layer: int, x: torch.Tensor) -> None:
        self.control.enter(self.control.layers[layer], x)

    def route(self, layer: int, x: torch.Tensor, residual: torch.Tensor, inner: torch.Tensor | None) -> Routing:
        control, arguments = self.control.layers[layer], self._targets[layer].routed.router_arguments
        return self.control.route(control, x, lambda: control.own(x, *arguments), lambda _: (residual, inner))

    def tell(self, layer: int, x: torch.Tensor, routing: Routing) -> None:
        control = self.control.layers[layer]
        self.control.route(control, x, lambda: routing, control.residual)

    def entered(self, layer: int, candidates: torch.Tensor) -> None:
        self.control.entered(self.control.layers[layer], candidates)

    def decided(self, layer: int, own: torch.Tensor, candidates: torch.Tensor, guesses: list[torch.Tensor]) -> None:
        self.control.decided(self.control.layers[layer], own, candidates, guesses)

    def form(self, layer: int) -> Routing:
        return self.control.layers[layer].form

    def experts(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        # What was announced for the layer may be another thread's guess, so it is not known to be these ids.
        output = self.execute(layer, x, Decision(ids, weights, known=False))
        if layer == len(self._targets) - 1:
            self.end(self._begun)
        return output
