"""The control of routing as a compiler sees it: what belongs to the graph, and which operations stand for the rest.

In a decode step on a CPU, guesses and decisions belong to the graph, where a compiler fuses what they compute. Then one operation a layer
(`operations.decided`) tells the host what was decided and guessed. In other passes an operation decides and guesses
(`operations.route`): in prompts, under policy `auto`, under gating `resident`, and with predictors that remember, since these ask the
host for something; and on a GPU, where guesses are made beside the computation, which no graph can say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..predictors.routing import Routing
from . import operations
from .errors import OffloadError
from .gating import Decide, RouterCall, prefetch, speculated, true
from .guess import FoldedGuesser
from .layercontrol import LayerControl
from .policy import Policy

FREE = prefetch, speculated, true
"""The decisions for which the host is not asked."""


def is_free(layer: LayerControl, decide: Decide) -> bool:
    """Whether neither the guess for a layer nor its decision asks the host for anything."""
    guesser = layer.guesser
    return (
        decide in FREE
        and isinstance(guesser, FoldedGuesser)
        and not guesser.depth
        and layer.target.routed.unfollowed is None
        and (decide is not true or guesser.plain is not None)
    )


class CompiledControl:
    """What the hooks of one `RoutingControl` do while they are traced."""

    def __init__(self, layers: list[LayerControl], decide: Decide | None):
        self.handle = 0
        """By this number, graphs know the offload that it belongs to. 0 where it belongs to none."""
        self.is_free = False
        """Whether guesses and decisions of decode steps belong to the graph."""
        self._layers, self._decide = layers, decide
        self._is_whole = False

    def whole(self, forward: Callable[[], Any]) -> Any:
        """The forward pass of the whole model. Only in it a guess and its decision are surely in one graph.

        Where the compiler can't trace all of it, this runs as it is, and parts are compiled: it resumes nothing within a `try`.
        """
        for layer in self._layers:
            layer.traced = None
        self._is_whole = torch.compiler.is_dynamo_compiling()
        try:
            return forward()
        finally:
            self._is_whole = False

    def enter(self, layer: LayerControl, x: torch.Tensor, guesses: Callable[[int], bool]) -> torch.Tensor:
        """`RoutingControl.enter`. Returns what the layer is to read in the place of `x` `[..., hidden]`.

        `guesses` says of a number of tokens whether they are guessed.
        """
        handle, number = self.handle, layer.target.number
        is_step = x.ndim > 2 and x.shape[-2] == 1
        if not (is_step and self.is_free and self._is_whole and guesses(x.numel() // x.shape[-1])):
            return operations.enter(x, handle, number)
        with torch.no_grad():
            layer.traced = layer.guesser.guess(layer.target.layer.own_input(x), None, None)
        return operations.entered(x, layer.traced.candidates, handle, number)

    @torch.no_grad()
    def route(self, layer: LayerControl, x: torch.Tensor) -> Routing:
        """`RoutingControl.route` for the router's input `x` `[..., hidden]`."""
        state = x.reshape(-1, layer.target.layer.hidden_size)
        # Most of the residual the graph computes anyway.
        residual, inner = layer.residual(state) if layer.targets else (state, None)
        guess, layer.traced = layer.traced, None
        if guess is None:
            return Routing(*operations.route(x, residual, inner, self.handle, layer.target.number))

        def own() -> Routing:
            return layer.read(layer.own(x, *layer.target.routed.router_arguments))

        assert self._decide is not None
        call = RouterCall(layer.target, layer.guesser, guess, state, own, lambda: None, lambda _: None)
        routing, chosen, *_ = self._decide(call)
        guesses = []
        for target in layer.targets if len(residual) else []:
            target.traced = target.guesser.guess(residual, routing, inner)
            guesses.append(target.traced.candidates)
        ids = operations.decided(routing.ids, chosen, guess.candidates, guesses, self.handle, layer.target.number)
        return routing._replace(ids=ids)

    def tell(self, layer: LayerControl, x: torch.Tensor, output: Any) -> Any:
        """`RoutingControl.route` where a router may return more than a routing, its `output`. It belongs to the graph then."""
        # What the experts are called with comes from the operation, so that no compiler leaves it out or moves it.
        place = next((n for n, part in enumerate(output) if not part.is_floating_point()), None)
        if place is None or self._decide is not prefetch:
            raise OffloadError(
                f"this policy can't be compiled with a model whose residual can't be followed; give policy {Policy.ON_DEMAND}, or run "
                "the model uncompiled"
            )
        logits, weights, ids = layer.read(output)
        told = operations.tell(output[place], x, logits, weights, ids, self.handle, layer.target.number)
        return (*output[:place], told, *output[place + 1 :])
