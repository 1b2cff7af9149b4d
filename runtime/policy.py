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
from enum import StrEnum
from itertools import pairwise
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from predictors.architecture import MoELayer, UnsupportedModelError, first_tensor, override_forward
from predictors.architecture import sources as nearest_sources
from predictors.speculation import Routing, Speculator, candidates, flat_routing


class Policy(StrEnum):
    """What happens to experts; see the module's text."""

    ON_DEMAND = "on_demand"
    PREFETCH = "prefetch"
    SPECULATIVE = "speculative"


class Gating(StrEnum):
    """What weights experts under `speculative`; see the module's text."""

    SPECULATED = "speculated"
    TRUE = "true"
    RESIDENT = "resident"


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
    """Within it, a router chooses none of the experts that are `barred`, a mask `[tokens, experts]`.

    A router of any architecture ends in one `topk` over its experts; masking the values of that call leaves everything
    around it (sigmoid or softmax, correction biases, groups, normalising, scaling) to the router itself. An allowed
    expert that the router ruled out (its group was not chosen) is ranked last, not excluded, so that there are always
    enough. `free_ids` are the ids that the router would have chosen without the restriction.
    """

    def __init__(self, barred: torch.Tensor, top_k: int):
        super().__init__()
        self.barred, self.top_k = barred, top_k
        self.free_ids: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, torch.Tensor.topk):
            values, *rest = args
            if values.shape == self.barred.shape and (rest[0] if rest else kwargs["k"]) == self.top_k:
                self.free_ids = func(*args, **kwargs).indices
                ranked = values.clamp(min=torch.finfo(values.dtype).min)
                return func(ranked.masked_fill_(self.barred, float("-inf")), *rest, **kwargs)
        return func(*args, **kwargs)


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
        self.seconds = 0.0
        """Time that the host has spent on speculating: what a pass takes beyond the same pass on demand, but for copies."""
        by_layer = num_candidates if isinstance(num_candidates, dict) else {}
        everywhere = num_candidates if isinstance(num_candidates, int) else 0
        self.num_candidates = {x.index: max(by_layer.get(x.index, everywhere), x.top_k) for x in layers}
        self._max_tokens, self._fetch, self._resident = max_tokens, fetch, resident
        self._speculators = speculators
        by_index = {layer.index: layer for layer in layers}
        source_of = nearest_sources(layers) if sources is None else sources
        self._targets: dict[int, list[MoELayer]] = {}
        for target, source in sorted(source_of.items()):
            if source is not None:
                self._targets.setdefault(source, []).append(by_index[target])
        self._router_seconds: dict[int, float] = {}
        self._pending: dict[int, tuple[Routing, torch.Tensor]] = {}
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
                routing = original_route(x, *args, **kwargs)
                self._router_seconds[index] = time.perf_counter() - begun
                return routing
            routing = self._decide(layer, x, lambda: original_route(x, *args, **kwargs))
            if not self._speculates(len(routing.ids)):
                return routing
            if targets:
                flat = x.reshape(-1, layer.hidden_size)
                beside = [self._beside[index, number] for number in range(len(join.beside))]
                residual, inner = join.residual(self._stream[index], flat, beside, join.shared_term(flat))
                for target in targets:
                    self._speculate(target, residual, routing, inner)
            # The model's own call of the router took what the speculation's call of it took.
            self.seconds += time.perf_counter() - begun - self._router_seconds.get(index, 0.0)
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
        self._speculating = True
        try:
            with torch.no_grad():
                speculation = self._speculators[target.index](residual, source, inner)
        finally:
            self._speculating = False
        chosen = candidates(speculation, self.num_candidates[target.index])
        self._pending[target.index] = speculation, chosen
        if self._fetch is not None:
            self._fetch(target.index, chosen)

    def _decide(self, layer: MoELayer, x: torch.Tensor, route: Callable[[], Any]) -> Routing:
        if layer.index not in self._pending:
            return flat_routing(route())
        speculation, chosen = self._pending.pop(layer.index)
        if self.policy is Policy.SPECULATIVE and self.gating is not Gating.SPECULATED:
            barred = torch.ones(len(chosen), layer.num_experts, dtype=torch.bool, device=x.device)
            barred.scatter_(1, (speculation.ids if self.gating is Gating.TRUE else chosen).long(), False)
            if self.gating is Gating.RESIDENT and self._resident is not None:
                barred[:, self._resident(layer.index)] = False
            with RestrictedChoice(barred, layer.top_k) as choice:
                routing = flat_routing(route())
            if choice.free_ids is None:
                raise UnsupportedModelError(
                    f"the routers of this model don't choose by topk, so gating {self.gating} can't restrict them; "
                    "use gating speculated"
                )
            self._count(layer.index, chosen, choice.free_ids)
            return routing
        routing = flat_routing(route())
        self._count(layer.index, chosen, routing.ids)
        return routing if self.policy is Policy.PREFETCH else speculation

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
            hits = (experts.unsqueeze(-1) == chosen.unsqueeze(-2)).any(-1).sum()
            self._hits[index] = self._hits[index] + hits if index in self._hits else hits
            self._seen[index] = self._seen.get(index, 0) + experts.numel()

    def _settle_all(self) -> None:
        for index in list(self._uncounted):
            self._settle(index)
