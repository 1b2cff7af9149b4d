"""How a guessed layer decides what it executes. Each policy and gating is one function, called in the place of the router.

A new one is a function here, its name in `runtime.policy`, and an entry in `GATINGS` or `decider`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..predictors.architecture import UnsupportedModelError
from ..predictors.routing import Routing
from .guess import Guess, Guesser
from .operations import is_traced
from .policy import Gating, Policy
from .restricted import Choose, RestrictedChoice, allowed, fixed
from .targets import Target


class Decided(NamedTuple):
    """What a layer executes, and what its router would have chosen by itself."""

    routing: Routing
    own: torch.Tensor
    """The router's own choice: ids `[tokens, top_k]`, or logits `[tokens, experts]`, of which it chooses the largest."""
    logits: torch.Tensor
    """The router's logits, `[tokens, experts]`."""
    known: bool = False
    """Whether the ids are the first candidates of the guess, in order."""


@dataclass(slots=True)
class RouterCall:
    """One call of the router of a guessed layer."""

    target: Target
    guesser: Guesser
    guess: Guess
    state: torch.Tensor
    """The router's input, `[tokens, hidden]`."""
    route: Callable[[], Routing]
    """Calls the model's own router."""
    absent: Callable[[], torch.Tensor | None]
    """Returns which of the layer's experts are not on the device, bool `[experts]`; see `engine.Ahead.absent`."""
    routed: Callable[[float], None]
    """Is called after something else has done the work of `route`, with the time when that began."""


Decide = Callable[[RouterCall], Decided]


def prefetch(call: RouterCall) -> Decided:
    """Executes the router's own decision."""
    routing = call.route()
    return Decided(routing, routing.ids, routing.logits)


def speculated(call: RouterCall) -> Decided:
    """Executes the ids and weights of the speculation (the paper's form). The router's choice is only counted."""
    assert call.guess.speculation is not None
    own = call.route()
    return Decided(call.guess.speculation, own.ids, own.logits, known=True)


def true(call: RouterCall) -> Decided:
    """Executes the guessed ids, with the weights that the router would give them if it had chosen them."""
    ids = call.guess.candidates[:, : call.target.layer.top_k]
    restricted = _restricted(call, fixed(ids))
    if restricted is None:
        return prefetch(call)
    routing, own, logits, _ = restricted
    if call.guesser.plain is None:  # a router may return its choice in another order than the guess
        ids = ids.to(routing.ids.dtype)
        places = (routing.ids.unsqueeze(-1) == ids.unsqueeze(-2)).int().argmax(1)
        routing = Routing(routing.logits, routing.weights.gather(-1, places), ids)
    return Decided(routing, own, logits, known=True)


def resident(call: RouterCall) -> Decided:
    """Executes the router's choice among the candidates and the experts that are on the device."""
    layer, chosen = call.target.layer, call.guess.candidates
    absent = call.absent()
    if absent is None:
        absent = torch.ones(layer.num_experts, dtype=torch.bool, device=chosen.device)
    if layer.identities:  # they need no slot
        absent = F.pad(absent, (0, layer.num_experts - len(absent)), value=False)
    barred = absent.expand(len(chosen), -1).scatter(1, chosen.long(), False)
    return _restricted(call, allowed(barred, layer.top_k)) or prefetch(call)


GATINGS: dict[Gating, Decide] = {Gating.SPECULATED: speculated, Gating.TRUE: true, Gating.RESIDENT: resident}


def decider(policy: Policy, gating: Gating) -> Decide | None:
    """The function for a policy and gating. None where nothing is guessed."""
    return {Policy.ON_DEMAND: None, Policy.PREFETCH: prefetch, Policy.SPECULATIVE: GATINGS[gating]}[policy]


def _restricted(call: RouterCall, choose: Choose) -> Decided | None:
    """The router's decision if it takes the experts that `choose` returns.

    None if it is one of those that look experts up by the token, beside others that choose: it is executed as it decides then.
    """
    layer, plain = call.target.layer, call.guesser.plain
    if plain is not None:  # its weights follow from its logits, so it need not be called
        begun = 0.0 if is_traced() else time.perf_counter()
        logits = plain.logits(call.state)
        ranks = call.guesser.ranks(logits)
        routing = plain.weighted(logits, choose(ranks))
        call.routed(begun)
        return Decided(routing, ranks, logits)
    with RestrictedChoice((len(call.state), layer.num_experts), layer.top_k, choose) as choice:
        routing = call.route()
    if choice.free_ids is None and call.target.routed.unfollowed is not None:
        return None
    if choice.free_ids is None:
        raise UnsupportedModelError(
            "the routers of this model don't choose by topk, so that they can't be restricted; use gating speculated"
        )
    return Decided(routing, choice.free_ids, routing.logits)
