"""The hooks that guess experts ahead on a running model, and have its layers execute what the policy decides.

When the router of source layer l has decided, the residual is known. From both, the experts of each target layer t are guessed
and announced. When the router of t is called, `runtime.gating` decides what the router returns to the model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from ..predictors.architecture import first_tensor, with_first_tensor
from ..predictors.override import override_forward
from ..predictors.routing import Routing
from ..predictors.speculation import Speculator
from .compiled import CompiledControl, is_free
from .engine import Ahead
from .gating import RouterCall, decider, prefetch
from .guess import Guess, make_guesser
from .layercontrol import LayerControl, Reading, form_of
from .memory import Memory, in_order
from .observer import Observer
from .operations import is_traced
from .policy import Gating, Policy
from .targets import Target


class Pass(threading.local):
    """What a thread's forward pass keeps from layer to layer. Compiled passes of several threads can alternate."""

    def __init__(self) -> None:
        self.guesses: dict[int, Guess | Reading] = {}
        """By the target's number, until its router is called. A guess that is made in order is only then made."""
        self.frees: dict[int, torch.Tensor] = {}
        """The same of training-free logits for each row's last tokens, where nothing is guessed but something is remembered."""
        self.is_exact = False


class RoutingControl:
    """Guesses for every MoE layer of a model and applies a policy, until it is detached.

    It copies nothing itself. It announces the candidates of a target layer to `engine` as soon as they are known. In a forward
    pass over more than `max_tokens` tokens nothing is guessed, and the routers decide alone. In an exact pass guesses are only
    announced, whatever the policy.

    With `in_order`, passes are over whole sequences `[sequences, length]`, and each token remembers the ones before it, as when a
    text is read token by token. Nothing is announced in time then.

    With `sure`, guesses tell how sure they are of their candidates (`Guess.values`).
    """

    def __init__(
        self,
        targets: list[Target],
        speculators: dict[int, Speculator],
        policy: Policy,
        gating: Gating,
        max_tokens: int | None = None,
        engine: Ahead = Ahead(),  # noqa: B008  # it has no state
        in_order: bool = False,
        sure: bool = False,
    ):
        self.is_on = True
        """While it is off, new forward passes are executed as under `on_demand`."""
        self.observer: Observer | None = None
        self._decide = decider(policy, gating)
        self._max_tokens, self._engine, self._in_order = max_tokens, engine, in_order
        self._rows = 1
        self.memory = Memory([], 0, 0, torch.device("cpu"))
        self._attached = ExitStack()
        self._pass = Pass()
        self.layers: list[LayerControl] = []
        """In the model's order. Empty where nothing is guessed."""
        self.compiled = CompiledControl(self.layers, self._decide)
        if self._decide is None:
            return
        weighs = policy is Policy.SPECULATIVE and gating is Gating.SPECULATED
        for target in targets:
            guesser = make_guesser(speculators[target.layer.index], target, weighs, sure)
            self.layers.append(LayerControl(target, guesser, engine.hit_count(target.layer.top_k)))
        depths = [layer.guesser.depth for layer in self.layers]
        first = targets[0].routed
        device = next(first.router.parameters()).device
        self.memory = Memory(depths, first.num_experts, max_tokens or 0, device)
        self.compiled.is_free = (
            device.type == "cpu" and not sure and all(is_free(layer, self._decide) for layer in self.layers)
        )
        by_index = {layer.target.layer.index: layer for layer in self.layers}
        for layer in self.layers:
            if layer.target.source is not None:
                by_index[layer.target.source].targets.append(layer)
        try:
            for layer in self.layers:
                if layer.target.source is None:
                    self._attach_entry(layer)
                if layer.targets:
                    layer.watch_residual(self._attached)
                self._attach_router(layer)
        except BaseException:
            self.detach()
            raise

    @property
    def is_exact(self) -> bool:
        """Whether this thread's next forward pass is executed as under `prefetch`, whatever the policy."""
        return self._pass.is_exact

    @is_exact.setter
    def is_exact(self, is_exact: bool) -> None:
        self._pass.is_exact = is_exact

    def detach(self) -> None:
        """Removes all hooks. The model is then as it was."""
        self._attached.close()
        # The hooks and this object refer to each other. Until they are collected, the guessers' weights would stay in memory.
        for layer in self.layers:
            del layer.guesser

    def hit_rates(self) -> dict[int, float]:
        """Recall of the candidates against the router's own choice since the last `reset`, by the model's number of each layer."""
        found = {layer.target.layer.index: layer.count.totals() for layer in self.layers}
        return {index: hits / seen for index, (hits, seen) in found.items() if seen}

    def hit_rate(self) -> float | None:
        """The same over all layers. None where nothing was guessed."""
        totals = [layer.count.totals() for layer in self.layers]
        seen = sum(seen for _, seen in totals)
        return sum(hits for hits, _ in totals) / seen if seen else None

    def reset(self) -> None:
        """Forgets the counts."""
        for layer in self.layers:
            layer.count.clear()

    def enter(self, layer: LayerControl, x: torch.Tensor) -> None:
        """Guesses a layer without a source from its own input `x` `[..., hidden]`."""
        if layer is self.layers[0]:
            self._begin(len(x) if x.ndim > 2 else 1)
        state = layer.target.layer.own_input(x)
        if self._guesses(len(state)):
            begun = time.perf_counter()
            self._guess([layer], Reading(state, None, None))
            if self.observer is not None:
                self.observer.controlled(layer.target.number, begun, time.perf_counter())
        elif self.memory.is_on:
            self._note([layer], Reading(state, None, None))

    def entered(self, layer: LayerControl, candidates: torch.Tensor) -> None:
        """Takes the guess for a layer without a source, `[tokens, m]`, that a compiled graph has made in the place of `enter`."""
        if layer is self.layers[0]:
            self._begin(len(candidates))
        self._engine.announce(layer.target.number, candidates, True)

    def decided(
        self, layer: LayerControl, own: torch.Tensor, candidates: torch.Tensor, guesses: list[torch.Tensor]
    ) -> None:
        """Takes what a compiled graph has decided and guessed in the place of `route`.

        `candidates` was the guess for the layer, for `own` see `gating.Decided.own`, and `guesses` are those for the layers whose
        source it is, `[tokens, m]` each.
        """
        self._engine.guessed(layer.target.number)
        layer.count.add(candidates.clone(), own.clone())  # the graph may write to its own
        # There are none where the residual is not known.
        for target, guess in zip(layer.targets, guesses, strict=False):
            self._engine.announce(target.target.number, guess, False)

    def route(
        self,
        layer: LayerControl,
        x: torch.Tensor,
        own: Callable[[], Any],
        residual: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]],
    ) -> Routing:
        """What a layer executes, and the guesses of the layers whose source it is.

        `x` `[..., hidden]` is its router's input, and `own` calls the router. `residual` is `LayerControl.residual`, or what has
        been computed by it.
        """
        begun = time.perf_counter()
        state = x.reshape(-1, layer.target.layer.hidden_size)
        routing = self._decided(layer, state, own)
        if self._guesses(len(state)):
            if layer.targets:
                known, inner = residual(state)
                if len(known):
                    self._guess(layer.targets, Reading(known, routing, inner))
            if self.observer is not None:
                self.observer.controlled(layer.target.number, begun, time.perf_counter())
        elif self.memory.is_on and any(target.guesser.depth for target in layer.targets):
            known, inner = residual(state)
            if len(known):
                self._note(layer.targets, Reading(known, routing, inner))
        return routing

    def _begin(self, sequences: int) -> None:
        """Forgets what was guessed in the pass before."""
        self._pass.guesses.clear()
        self._pass.frees.clear()
        self._rows = sequences

    def _attach_router(self, layer: LayerControl) -> None:
        def route(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if is_traced():
                if layer.target.routed.unfollowed is None:
                    return self.compiled.route(layer, x)
                return self.compiled.tell(layer, x, original(x, *args, **kwargs))
            if layer.is_guessing:
                return original(x, *args, **kwargs)
            if layer.target.routed.unfollowed is None:
                return self.route(layer, x, lambda: original(x, *args, **kwargs), layer.residual)
            # The router may return more than a routing, so the model gets what it has returned.
            returned: list[Any] = []

            def own() -> Any:
                returned[:] = [original(x, *args, **kwargs)]
                return returned[0]

            self.route(layer, x, own, layer.residual)
            return returned[0]

        if layer.target.routed.unfollowed is None:
            layer.form = form_of(layer.target.routed)
        original = layer.own = self._attached.enter_context(override_forward(layer.target.routed.router, route))

    def _attach_entry(self, layer: LayerControl) -> None:
        def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if is_traced():
                return with_first_tensor(args, kwargs, lambda x: self.compiled.enter(layer, x, self._guesses))
            self.enter(layer, first_tensor((*args, *kwargs.values())))
            return None

        self._attached.callback(layer.target.layer.decoder.register_forward_pre_hook(enter, with_kwargs=True).remove)

    def _guesses(self, tokens: int) -> bool:
        return self.is_on and (self._max_tokens is None or tokens <= self._max_tokens)

    def _guess(self, targets: list[LayerControl], reading: Reading) -> None:
        with self._engine.guessing(*reading):
            for target in targets:
                number = target.target.number
                if self._in_order and target.guesser.depth:
                    self._pass.guesses[number] = reading
                    continue
                begun = time.perf_counter()
                guess = self._made(target, reading, self.memory.read(number))
                # For a target without a source no layer computes before it. So its copies begin at once.
                self._pass.guesses[number] = guess
                self._engine.announce(number, guess.candidates, reading.source is None, guess.values)
                if self.observer is not None:
                    self.observer.guessed(number, begun, time.perf_counter())

    def _note(self, targets: list[LayerControl], reading: Reading) -> None:
        """Keeps the training-free logits of each row's last tokens, in a pass in which nothing is guessed."""
        for target in targets:
            number = target.target.number
            if not target.guesser.depth:
                continue
            residual, source, inner = reading
            last = partial(self.memory.last, number)
            part = Reading(
                last(residual),
                None if source is None else Routing(*map(last, source)),
                None if inner is None else last(inner),
            )
            free = self._made(target, part, None).free
            assert free is not None
            self._pass.frees[number] = free

    def _made(self, target: LayerControl, reading: Reading, memory: torch.Tensor | None) -> Guess:
        target.is_guessing = True
        try:
            return target.guesser.guess(*reading, memory)
        finally:
            target.is_guessing = False

    def _decided(self, layer: LayerControl, state: torch.Tensor, route: Callable[[], Any]) -> Routing:
        number = layer.target.number

        def routed(begun: float) -> None:
            if self.observer is not None:
                self.observer.routed(number, begun, time.perf_counter())

        def own() -> Routing:
            begun = time.perf_counter()
            routing = layer.read(route())
            routed(begun)
            return routing

        found, layer.known = self._pass.guesses.pop(number, None), False
        if found is None or self._decide is None:
            routing = own()
            if (free := self._pass.frees.pop(number, None)) is not None:
                self.memory.write(number, self.memory.last(number, routing.logits), free)
            return routing
        guess = found if isinstance(found, Guess) else self._in_turn(layer, found, own)
        self._engine.guessed(number)
        if len(guess.candidates) != len(state):  # where layers are called one by one, it may be of other tokens
            return own()
        call = RouterCall(layer.target, layer.guesser, guess, state, own, lambda: self._engine.absent(number), routed)
        decided = (prefetch if self._pass.is_exact else self._decide)(call)
        layer.known = decided.known and layer.target.routed.unfollowed is None
        if guess.free is not None and self.memory.is_on:
            logits, free = (self.memory.last(number, values) for values in (decided.logits, guess.free))
            self.memory.write(number, logits, free)
        layer.count.add(guess.candidates, decided.own)
        if layer.told is not None:
            layer.told(guess, decided.own)
        return decided.routing

    def _in_turn(self, layer: LayerControl, reading: Reading, own: Callable[[], Routing]) -> Guess:
        """The guess for sequences whose tokens come one by one."""
        logits = own().logits
        layer.is_guessing = True
        try:
            return in_order(layer.guesser, layer.guesser.depth, reading, logits, self._rows)
        finally:
            layer.is_guessing = False
