"""The speculators of all target layers as one batched computation, for the many rows of a trace.

The runtime speculates layer by layer, as the model computes. Over recorded rows the layers are independent, and
separate calls for each layer would cost more than the arithmetic. Trying on random states shows what can be batched:
norms of one kind are mapped over their stacked weights, and routers with logits that are linear in the state become one
batched matrix. If a batched result differs from that of the separate parts, the parts are called one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from .routing import Routing
from .speculation import Router, Wiring

PROBES = 16
"""How many random states the batched form is compared on with the separate parts."""

Weights = dict[str, torch.Tensor]
"""By name, `[layers, ...]`."""


class StackedSpeculators:
    """Training-free speculators of one model, in fp32, each given by its `Wiring`.

    The weights are taken as they are now. No gradient flows into them; `logits` passes gradients to the states.
    """

    def __init__(self, wirings: Iterable[Wiring], hidden_size: int):
        self.wirings = list(wirings)
        self._default_vectors = _stacked_default_vectors(self.wirings)
        self._norms = _stacked_norms([wiring.norm for wiring in self.wirings], hidden_size)
        self._routers = _stacked_routers([wiring.router for wiring in self.wirings], hidden_size)

    def to(self, device: torch.device) -> None:
        """Moves everything to `device`."""
        self.wirings = [wiring.to(device) for wiring in self.wirings]
        if self._default_vectors is not None:
            self._default_vectors = self._default_vectors.to(device)
        for weights in (self._norms, self._routers):
            if weights is not None:
                weights.update({name: weight.to(device) for name, weight in weights.items()})

    @torch.no_grad()
    def states(
        self, residual: torch.Tensor, source: Routing, inner: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The results of `Speculator.states` for each layer: `q` and `a`, `[layers, rows, hidden]`, fp32.

        `residual` is `[layers, rows, hidden]`, fp32; weights (fp32) and ids (int64) of `source` are `[layers, rows,
        top_k]`; a layer without default vectors ignores them. `inner` of a layer is `[rows, hidden]` or None.
        """
        states = torch.stack((self._guesses(residual, source, inner), residual))
        if self._norms is None:
            each = [wiring.norm.forward(states[:, number]) for number, wiring in enumerate(self.wirings)]
            quasi, normed = torch.stack(each, 1).unbind()
        else:
            quasi, normed = _mapped(self.wirings[0].norm, self._norms, states).unbind()
        return quasi, normed

    def _guesses(self, residual: torch.Tensor, source: Routing, inner: Sequence[torch.Tensor | None]) -> torch.Tensor:
        if self._default_vectors is None:
            parts = zip(self.wirings, residual, map(Routing, *source), inner, strict=True)
            return torch.stack([wiring.quasi_residual(*read) for wiring, *read in parts])
        layers, experts, _ = self._default_vectors.shape
        first = torch.arange(0, layers * experts, experts, device=residual.device)
        sums = F.embedding_bag(
            (source.ids + first[:, None, None]).flatten(0, 1),
            self._default_vectors.flatten(0, 1),
            per_sample_weights=source.weights.flatten(0, 1),
            mode="sum",
        )
        return residual + sums.view_as(residual)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The routers' logits `[layers, rows, experts]` for `states` `[layers, rows, hidden]`, fp32."""
        if self._routers is None:
            return torch.stack([routing.logits for routing in self.route(states)])
        return torch.baddbmm(self._routers["offset"], states, self._routers["matrix"])

    def route(self, states: Sequence[torch.Tensor] | torch.Tensor) -> list[Routing]:
        """The decision of each router itself on its layer's states `[rows, hidden]`, fp32."""
        return [wiring.router(state) for wiring, state in zip(self.wirings, states, strict=True)]


def _stacked_default_vectors(wirings: list[Wiring]) -> torch.Tensor | None:
    """`[layers, experts, hidden]`, zero for a layer without any; None if no layer has any, or one has a post-norm."""
    vectors = [wiring.default_vectors for wiring in wirings]
    some = next((own for own in vectors if own is not None), None)
    if some is None or any(wiring.post_norm is not None for wiring in wirings):
        return None
    return torch.stack([torch.zeros_like(some) if own is None else own for own in vectors])


@torch.no_grad()
def _stacked_norms(norms: list[nn.Module], hidden_size: int) -> Weights | None:
    """Their weights, or None if the first norm with another norm's weights does not compute what that one does."""
    shapes = [{name: tensor.shape for name, tensor in norm.state_dict().items()} for norm in norms]
    if any(type(norm) is not type(norms[0]) or own != shapes[0] for norm, own in zip(norms, shapes, strict=True)):
        return None
    weights: Weights = {name: part for parts in stack_module_state(norms) for name, part in parts.items()}
    states = _probes(2, len(norms), PROBES, hidden_size)
    own = torch.stack([norm.forward(states[:, number]) for number, norm in enumerate(norms)], 1)
    return weights if torch.allclose(_mapped(norms[0], weights, states), own, rtol=1e-4, atol=1e-5) else None


def _mapped(norm: nn.Module, weights: Weights, states: torch.Tensor) -> torch.Tensor:
    """The norm with each layer's own weights, on `[2, layers, rows, hidden]`."""

    def one(own: Weights, state: torch.Tensor) -> torch.Tensor:
        return functional_call(norm, own, (state,))

    return vmap(one, in_dims=(0, 1), out_dims=1)(weights, states)


@torch.no_grad()
def _stacked_routers(routers: list[Router], hidden_size: int) -> Weights | None:
    """`matrix` `[layers, hidden, experts]` and `offset` `[layers, 1, experts]` of the logits; None if they aren't linear."""
    identity, origin = torch.eye(hidden_size), torch.zeros(1, hidden_size)
    offsets = [router(origin).logits for router in routers]
    matrices = [router(identity).logits - offset for router, offset in zip(routers, offsets, strict=True)]
    for router, matrix, offset in zip(routers, matrices, offsets, strict=True):
        states = _probes(PROBES, hidden_size)
        own = router(states).logits
        if not torch.allclose(torch.addmm(offset, states, matrix), own, rtol=0, atol=1e-4 * float(own.abs().max())):
            return None
    return {"matrix": torch.stack(matrices), "offset": torch.stack(offsets)}


def _probes(*shape: int) -> torch.Tensor:
    """Random states of several sizes: `shape` is `[..., rows, hidden]`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator) * torch.logspace(-2, 2, shape[-2]).unsqueeze(-1)
