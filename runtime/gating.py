"""How a layer decides whose experts were guessed. Each policy and gating is one function of the call of the layer's router.

A new one is a function here, its name in `runtime.policy`, and a line in `decider`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..predictors.architecture import UnsupportedModelError
from ..predictors.speculation import Routing
from .guess import Guess, Guesser
from .policy import Gating, Policy
from .restricted import Choose, RestrictedChoice, allowed, fixed
from .targets import Target


class Decided(NamedTuple):
    """What a layer executes, and what its router would have chosen."""

    routing: Routing
    own: torch.Tensor
    """The router's own choice: ids `[tokens, top_k]`, or logits `[tokens, experts]` of which the largest are its choice."""
    known: bool = False
    """The ids are the first candidates of the guess, in their order."""


@dataclass(slots=True)
class RouterCall:
    """One call of the router of a layer whose experts were guessed."""

    target: Target
    guesser: Guesser
    guess: Guess
    state: torch.Tensor
    """What the router reads, `[tokens, hidden]`."""
    route: Callable[[], Routing]
    """The model's own call of the router, which a pass on demand makes too."""
    resident: Callable[[], list[int]]
    """The layer's experts that are on the device, or on their way there."""
    routed: Callable[[float], None]
    """Is told when what stands in the place of `route` was begun, after it is done."""


Decide = Callable[[RouterCall], Decided]


def prefetch(call: RouterCall) -> Decided:
    """The router's own decision."""
    routing = call.route()
    return Decided(routing, routing.ids)


def speculated(call: RouterCall) -> Decided:
    """The speculation's ids and weights (the paper's form); what the router says is only counted."""
    assert call.guess.speculation is not None
    return Decided(call.guess.speculation, call.route().ids, known=True)


def true(call: RouterCall) -> Decided:
    """The speculation's ids, weighted by the router as if it had chosen among them."""
    ids = call.guess.candidates[:, : call.target.layer.top_k]
    routing, own, _ = _restricted(call, fixed(ids))
    if call.guesser.plain is None:  # a router may return what it chose in another order than that of the guess
        ids = ids.to(routing.ids.dtype)
        places = (routing.ids.unsqueeze(-1) == ids.unsqueeze(-2)).int().argmax(1)
        routing = Routing(routing.logits, routing.weights.gather(-1, places), ids)
    return Decided(routing, own, known=True)


def resident(call: RouterCall) -> Decided:
    """The router's choice among the candidates and the experts now on the device."""
    layer, chosen = call.target.layer, call.guess.candidates
    absent = bytearray(b"\1" * layer.num_experts)  # a write costs a hundredth of one to a tensor
    for expert in call.resident():
        absent[expert] = False
    barred = torch.frombuffer(absent, dtype=torch.bool).to(chosen.device)
    barred = barred.expand(len(chosen), -1).scatter(1, chosen.long(), False)
    return _restricted(call, allowed(barred, layer.top_k))


GATINGS: dict[Gating, Decide] = {Gating.SPECULATED: speculated, Gating.TRUE: true, Gating.RESIDENT: resident}


def decider(policy: Policy, gating: Gating) -> Decide | None:
    """How layers decide under a policy and gating; None where nothing is guessed."""
    return {Policy.ON_DEMAND: None, Policy.PREFETCH: prefetch, Policy.SPECULATIVE: GATINGS[gating]}[policy]


def _restricted(call: RouterCall, choose: Choose) -> Decided:
    """The router's decision where it takes what `choose` names."""
    layer, plain = call.target.layer, call.guesser.plain
    if plain is not None:  # its weights follow from its logits, so that it need not be asked
        begun = time.perf_counter()
        logits = plain.logits(call.state)
        ranks = call.guesser.ranks(logits)
        routing = plain.weighted(logits, choose(ranks))
        call.routed(begun)
        return Decided(routing, ranks)
    with RestrictedChoice((len(call.state), layer.num_experts), layer.top_k, choose) as choice:
        routing = call.route()
    if choice.free_ids is None:
        raise UnsupportedModelError(
            "the routers of this model don't choose by topk, so that they can't be restricted; use gating speculated"
        )
    return Decided(routing, choice.free_ids)
