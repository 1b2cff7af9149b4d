"""What is speculated, and what is executed: the policies, the gatings, and the hooks that carry them out.

At source layer l the router has just decided, and the residual is known. From these `RoutingControl` speculates the
routing of the next MoE layer t, and hands the candidates to whoever fetches experts. When router t is called, the
policy decides what it returns to the model:

    on_demand, prefetch       the router's own decision: exact
    speculative / speculated  the speculation's ids and weights (the paper's form)
    speculative / true        the speculation's ids, weighted by the router as if it had chosen among them
    speculative / resident    the router's choice among the candidates and the experts now on the device
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from ..predictors.architecture import MoELayer, UnsupportedModelError, first_tensor, override_forward
from ..predictors.architecture import sources as nearest_sources
from ..predictors.folded import FoldedSpeculator, PlainRouter
from ..predictors.speculation import Routing, Speculator, candidates, flat_routing
from .settings import Gating, Policy

RECALL_ENOUGH = 0.99
COUNTED_AT_ONCE = 256


def candidates_from_recall(recall: list[float], top_k: int, policy: Policy, gating: Gating) -> int:
    """How many candidates of a target layer to fetch, of `top_k` to twice that; `recall` is that of as many candidates.

    Under gating `resident` the router chooses among them, so they buy quality: the fewest are taken that hold
    `RECALL_ENOUGH` of its choice. Under `prefetch` they only buy time: one more is worth its copy while it is more often
    right than wrong. Under the other gatings more than `top_k` are never executed.
    """
    if policy is Policy.PREFETCH:
        gains = [top_k * (after - before) for before, after in pairwise(recall)]
        return top_k + next((more for more, right in enumerate(gains) if right <= 0.5), len(gains))
    if policy is Policy.SPECULATIVE and gating is Gating.RESIDENT:
        return top_k + next((more for more, found in enumerate(recall) if found >= RECALL_ENOUGH), len(recall) - 1)
    return top_k


class RestrictedChoice(TorchFunctionMode):
    """Within it, the router of `[tokens, experts]` takes what `choose` names of the values that it would choose by.

    A router of any architecture ends in one `topk` over its experts; answering that call leaves everything around it
    (sigmoid or softmax, correction biases, groups, normalising, scaling) to the router itself. `free_ids` are the ids that
    the router would have chosen without the restriction.
    """

    def __init__(self, shape: tuple[int, int], top_k: int, choose: Callable[[torch.Tensor], torch.Tensor]):
        """`choose` takes the values `[tokens, experts]` and returns `[tokens, top_k]`: `fixed` or `allowed`."""
        super().__init__()
        self.shape, self.top_k, self._choose = shape, top_k, choose
        self.free_ids: torch.Tensor | None = None
        self.seconds = 0.0
        """What it took beside the router's own operations."""

    @staticmethod
    def fixed(ids: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """A choice of `ids` `[tokens, top_k]`, in their order."""
        return lambda _: ids

    @staticmethod
    def allowed(barred: torch.Tensor, top_k: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The best that are not `barred`, a mask `[tokens, experts]`.

        An allowed expert that the router ruled out (its group was not chosen) is ranked last, not excluded, so that there
        are always enough.
        """

        def choose(values: torch.Tensor) -> torch.Tensor:
            ranked = values.clamp(min=torch.finfo(values.dtype).min)
            return ranked.masked_fill_(barred, float("-inf")).topk(top_k, dim=-1).indices

        return choose

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (torch.topk, torch.Tensor.topk):
            begun = time.perf_counter()
            values, *rest = args
            if values.shape == self.shape and (rest[0] if rest else kwargs["k"]) == self.top_k:
                self.free_ids = result.indices
                ids = self._choose(values)
                # What is ruled out is minus infinity, of which no router could make weights.
                chosen = values.gather(-1, ids).clamp(min=torch.finfo(values.dtype).min)
                result = torch.return_types.topk((chosen, ids))
            self.seconds += time.perf_counter() - begun
        return result


class Replay(Protocol):
    """A routing in the place of what the model and its speculation choose; see `runtime.routing.replaying`."""

    def candidates(self, target: int, speculated: torch.Tensor) -> torch.Tensor:
        """What takes the place of the speculated candidates `[tokens, m]` of a target layer."""

    def values(self, target: int, tokens: int) -> torch.Tensor | None:
        """What its router is to choose by, `[tokens, experts]`, in place of its logits; None where it chooses itself."""


class RoutingControl:
    """Hooks on the MoE layers of a model that speculate one layer ahead and carry out a policy.

    It copies nothing itself: `fetch(target, candidates [tokens, m])` is called as soon as the candidates of a target
    layer are known, and `resident(target)` names the experts that are on the device besides the candidates. A forward
    pass over more than `max_tokens` tokens is neither speculated nor restricted. Layers are named by the model's numbers;
    `num_candidates` is one number or one for each target, and nowhere less than `top_k`. `sources` says which source each
    target has, by default the nearest; a source may have several targets, whose candidates are fetched nearest first.
    """

    def __init__(
        self,
        layers: list[MoELayer],
        speculators: dict[int, Speculator],
        policy: Policy,
        gating: Gating,
        num_candidates: int | dict[int, int] | None = None,
        max_tokens: int | None = None,
        fetch: Callable[[int, torch.Tensor], None] | None = None,
        resident: Callable[[int], list[int]] | None = None,
        sources: dict[int, int | None] | None = None,
    ):
        self.policy, self.gating = policy, gating
        self.is_on = True
        """While it is off, a forward pass that begins is executed as `on_demand` would."""
        self.replayed: Replay | None = None
        self.seconds = 0.0
        """Time that the host has spent on speculating: what a pass takes beyond the same pass on demand, but for copies."""
        self._top_k = layers[0].top_k
        by_layer = num_candidates if isinstance(num_candidates, dict) else {}
        everywhere = num_candidates if isinstance(num_candidates, int) else 0
        self.num_candidates = {x.index: max(by_layer.get(x.index, everywhere), x.top_k) for x in layers}
        self._max_tokens, self._fetch, self._resident = max_tokens, fetch, resident
        # Where the weights of a guess are executed its logits must be to scale, and on demand nothing is guessed.
        self._weighs = policy is Policy.SPECULATIVE and gating is Gating.SPECULATED
        guesses = layers if policy is not Policy.ON_DEMAND else []
        folded = {x.index: FoldedSpeculator.of(speculators[x.index], x, to_scale=self._weighs) for x in guesses}
        self._folded = {index: speculator for index, speculator in folded.items() if speculator is not None}
        # What is folded has no use for the rest of its predictor.
        self._speculators = {index: s for index, s in speculators.items() if index not in self._folded}
        by_index = {layer.index: layer for layer in layers}
        source_of = nearest_sources(layers) if sources is None else sources
        self._targets: dict[int, list[MoELayer]] = {}
        for target, source in sorted(source_of.items()):
            if source is not None:
                self._targets.setdefault(source, []).append(by_index[target])
        self._router_seconds = 0.0
        self._pending: dict[int, tuple[Routing | None, torch.Tensor]] = {}
        self._stream: dict[int, torch.Tensor] = {}
        self._beside: dict[tuple[int, int], torch.Tensor] = {}
        self._shared: dict[int, torch.Tensor] = {}
        self._speculating = False
        self._hits: dict[int, torch.Tensor] = {}
        self._seen: dict[int, int] = {}
        self._uncounted: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._attached = ExitStack()
        if policy is not Policy.ON_DEMAND:
            for layer in layers:
                if source_of[layer.index] is None:  # it reads its own input
                    self._attach_entry(layer, clears=layer is layers[0])
                if layer.index in self._targets:
                    self._keep_residual(layer)
                self._attach(layer)

    def detach(self) -> None:
        """Takes every hook away; the model is as it was."""
        self._attached.close()
        # The hooks and this object name one another, and what waits for the garbage collector fills memory meanwhile.
        self._folded.clear()
        self._speculators.clear()

    def hit_rates(self) -> dict[int, float]:
        """Recall of the candidates against the router's free choice, by target layer, since the last `reset`."""
        self._settle_all()
        return {index: float(hits) / self._seen[index] for index, hits in sorted(self._hits.items())}

    def hit_rate(self) -> float | None:
        """The same over all layers; None where nothing was speculated."""
        self._settle_all()
        seen = sum(self._seen.values())
        return sum(float(hits) for hits in self._hits.values()) / seen if seen else None

    def reset(self) -> None:
        """Forgets the counts, and whatever a forward pass that broke off has left."""
        for state in (self._hits, self._seen, self._uncounted, self._pending, self._stream, self._beside, self._shared):
            state.clear()
        self.seconds = 0.0

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _keep_residual(self, layer: MoELayer) -> None:
        """Keeps what the residual of a source layer is made of."""
        index, join = layer.index, layer.join

        def keep_stream(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._stream[index] = first_tensor((*args, *kwargs.values())).reshape(-1, layer.hidden_size)
            self._shared.pop(index, None)

        self._attached.callback(layer.entry.register_forward_pre_hook(keep_stream, with_kwargs=True).remove)
        for number, (module, _) in enumerate(join.beside):

            def keep_beside(_: Any, __: Any, output: Any, key: tuple[int, int] = (index, number)) -> None:
                self._beside[key] = first_tensor(output).reshape(-1, layer.hidden_size)

            self._attached.callback(module.register_forward_hook(keep_beside).remove)
        if join.shared is not None:
            # The shared expert belongs to the residual. It is asked for twice, by its block and by the speculation, in
            # either order: the first computes it, the second takes what was kept.
            def shared(x: torch.Tensor) -> torch.Tensor:
                kept = self._shared.pop(index, None)
                if kept is None:
                    kept = self._shared[index] = original_shared(x)
                return kept.view(*x.shape[:-1], -1)

            original_shared = self._attached.enter_context(override_forward(join.shared, shared))

    def _attach(self, layer: MoELayer) -> None:
        index, join = layer.index, layer.join
        targets = self._targets.get(index, [])

        def route(x: torch.Tensor, *args: Any, **kwargs: Any) -> Routing:
            begun = time.perf_counter()
            if self._speculating:  # this is the speculation's own use of the router
                return original_route(x, *args, **kwargs)
            routing = self._decide(layer, x, lambda: original_route(x, *args, **kwargs))
            if not self._speculates(len(routing.ids)):
                return routing
            if targets:
                flat = x.reshape(-1, layer.hidden_size)
                beside = [self._beside[index, number] for number in range(len(join.beside))]
                residual, inner = join.residual(self._stream[index], flat, beside, join.shared_term(flat))
                for target in targets:
                    self._speculate(target, residual, routing, inner)
            self.seconds += time.perf_counter() - begun - self._router_seconds
            return routing

        original_route = self._attached.enter_context(override_forward(layer.router, route))

    def _attach_entry(self, layer: MoELayer, clears: bool) -> None:
        def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if clears:
                self._pending.clear()
            flat = first_tensor((*args, *kwargs.values())).reshape(-1, layer.hidden_size)
            if self._speculates(len(flat)):
                begun = time.perf_counter()
                self._speculate(layer, flat, None)
                self.seconds += time.perf_counter() - begun

        self._attached.callback(layer.decoder.register_forward_pre_hook(enter, with_kwargs=True).remove)

    def _speculates(self, tokens: int) -> bool:
        return self.is_on and (self._max_tokens is None or tokens <= self._max_tokens)

    def _speculate(
        self, target: MoELayer, residual: torch.Tensor, source: Routing | None, inner: torch.Tensor | None = None
    ) -> None:
        index, m = target.index, self.num_candidates[target.index]
        if index in self._folded:
            folded, speculation = self._folded[index], None
            logits = folded.logits(residual, source)
            chosen = logits.topk(m, dim=-1).indices
            if self._weighs:
                speculation = folded.router.weighted(logits, chosen[:, : target.top_k])
        else:
            self._speculating = True
            try:
                with torch.no_grad():
                    speculation = self._speculators[index](residual, source, inner)
            finally:
                self._speculating = False
            chosen = candidates(speculation, m)
        if self.replayed is not None:
            begun = time.perf_counter()
            chosen = self.replayed.candidates(index, chosen)
            speculation = speculation and speculation._replace(ids=chosen[:, : target.top_k])
            self.seconds -= time.perf_counter() - begun
        self._pending[index] = speculation, chosen
        if self._fetch is not None:
            self._fetch(index, chosen)

    def _decide(self, layer: MoELayer, x: torch.Tensor, route: Callable[[], Any]) -> Routing:
        if layer.index not in self._pending:
            return self._routed(route)
        speculation, chosen = self._pending.pop(layer.index)
        if self.policy is Policy.PREFETCH:
            routing = self._routed(route)
            self._count(layer.index, chosen, routing.ids)
            return routing
        if self.gating is Gating.SPECULATED:
            assert speculation is not None
            self._count(layer.index, chosen, self._routed(route).ids)
            return speculation
        router = self._folded[layer.index].router if layer.index in self._folded else None
        barred: torch.Tensor | None = None
        if self.gating is Gating.RESIDENT:
            absent = bytearray(b"\1" * layer.num_experts)  # a write costs a hundredth of one to a tensor
            for expert in self._resident(layer.index) if self._resident is not None else ():
                absent[expert] = False
            barred = torch.frombuffer(absent, dtype=torch.bool).to(x.device)
            barred = barred.expand(len(chosen), -1).scatter(1, chosen.long(), False)
        if router is not None and router.weigh is not None:
            return self._decide_plainly(layer, router, x.reshape(-1, layer.hidden_size), chosen, barred)
        if barred is None:
            choose = RestrictedChoice.fixed(chosen[:, : layer.top_k].long())
        else:
            choose = RestrictedChoice.allowed(barred, layer.top_k)
        with RestrictedChoice((len(chosen), layer.num_experts), layer.top_k, choose) as choice:
            routing = self._routed(route)
        if choice.free_ids is None:
            raise UnsupportedModelError(
                f"the routers of this model don't choose by topk, so gating {self.gating} can't restrict them; "
                "use gating speculated"
            )
        self._router_seconds -= choice.seconds
        self._count(layer.index, chosen, choice.free_ids)
        if self.gating is Gating.TRUE:  # in the order of the guess, in which its experts are executed
            ids = chosen[:, : layer.top_k].to(routing.ids.dtype)
            places = (routing.ids.unsqueeze(-1) == ids.unsqueeze(-2)).int().argmax(1)
            return Routing(routing.logits, routing.weights.gather(-1, places), ids)
        return routing

    def _decide_plainly(
        self,
        layer: MoELayer,
        router: PlainRouter,
        state: torch.Tensor,
        chosen: torch.Tensor,
        barred: torch.Tensor | None,
    ) -> Routing:
        """The guess, or the best that are not `barred`, without asking the router: its weights follow from its logits, and
        what it would have chosen is only counted."""
        begun = time.perf_counter()
        logits = router.logits(state)
        values = None if self.replayed is None else self.replayed.values(layer.index, len(chosen))
        values = logits if values is None else values
        if barred is None:
            ids = chosen[:, : layer.top_k]
        else:
            ids = values.masked_fill(barred, float("-inf")).topk(layer.top_k, dim=-1).indices
        routing = router.weighted(logits, ids)
        self._router_seconds = time.perf_counter() - begun
        self._count(layer.index, chosen, values)
        return routing

    def _routed(self, route: Callable[[], Any]) -> Routing:
        """The model's own call of its router, which a pass on demand makes too."""
        begun = time.perf_counter()
        routing = flat_routing(route())
        self._router_seconds = time.perf_counter() - begun
        return routing

    def _count(self, index: int, chosen: torch.Tensor, experts: torch.Tensor) -> None:
        # Compared by the hundred: one token at a time it would cost as much as a router.
        counted = self._uncounted.setdefault(index, [])
        counted.append((chosen, experts))
        if len(counted) >= COUNTED_AT_ONCE:
            self._settle(index)

    def _settle(self, index: int) -> None:
        decisions = self._uncounted.pop(index, [])
        if decisions:
            chosen, experts = (torch.cat(parts) for parts in zip(*decisions, strict=True))
            if experts.is_floating_point():  # logits, of which the largest would have been chosen
                experts = experts.topk(self._top_k, dim=-1).indices
            hits = (experts.unsqueeze(-1) == chosen.unsqueeze(-2)).any(-1).sum()
            self._hits[index] = self._hits[index] + hits if index in self._hits else hits
            self._seen[index] = self._seen.get(index, 0) + experts.numel()

    def _settle_all(self) -> None:
        for index in list(self._uncounted):
            self._settle(index)
