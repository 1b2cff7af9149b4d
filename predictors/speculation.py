"""Speculation: guesses the next MoE layer's experts from what the source layer knows before its own experts run.

    s    residual         all of the source layer's output but its routed experts            [tokens, hidden]
    D    default vectors  row e: the mean output of the source layer's expert e              [experts, hidden]
    q    = norm_t(s + sum_j w_j D[id_j])       quasi-hidden state                            [tokens, hidden]
    a    = norm_t(s)                                                                         [tokens, hidden]
    m    = k w_j at the place of id_j          the source router's mixture of experts      [tokens, experts]
    h    what the last tokens left             what a predictor with a memory reads of them (`memory`)
    q'   = q + MLP(a, m, h)                    only where a predictor was trained
    logits, weights, ids = router_t(q')        the model's own frozen router

(*Speculating Experts*, arXiv 2603.19289, section 3; the residual form of the predictor is this project's.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn

from .architecture import MoELayer
from .forms import PredictorForm
from .routing import Routing, flat_routing


def mixture_of(source: Routing, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    """The source router's weights, times k, each at its expert's place: `[tokens, num_experts]`.

    Routings of several layers may be stacked before it: `[layers, tokens, num_experts]`.
    """
    *rows, top_k = source.ids.shape
    mixture = torch.zeros(*rows, num_experts, dtype=dtype, device=source.weights.device)
    return mixture.scatter_(-1, source.ids.long(), (top_k * source.weights).to(dtype))


class Router(nn.Module):
    """A model's router, called as the model calls it, but without the hooks on it.

    `forward(state [tokens, hidden])` returns the `Routing`. Hooks (a recorder's, transformers' own for
    `output_router_logits`) must see only what the model does, so a speculation does not call them. It also draws no random
    numbers, as some routers do in training mode: the model's own draws would be others.
    """

    def __init__(self, router: nn.Module, arguments: tuple[torch.Tensor, ...] = (), ndim: int = 2):
        super().__init__()
        self.router, self.ndim = router, ndim
        self._count = len(arguments)
        for number, argument in enumerate(arguments):
            self.register_buffer(f"argument_{number}", argument, persistent=False)

    @property
    def arguments(self) -> list[torch.Tensor]:
        return [getattr(self, f"argument_{number}") for number in range(self._count)]

    @classmethod
    def of(cls, layer: MoELayer) -> Router:
        return cls(layer.router, layer.router_arguments, layer.router_ndim)

    def forward(self, state: torch.Tensor) -> Routing:
        if self.ndim == 3:
            state = state.unsqueeze(0)
        training = [module for module in self.router.modules() if module.training]
        for module in training:
            module.training = False
        try:
            return flat_routing(self.router.forward(state, *self.arguments))
        finally:
            for module in training:
                module.training = True


@dataclass(frozen=True)
class Wiring:
    """The parts of the model that one speculation uses. Modules are the model's own, not copies."""

    norm: nn.Module
    """Of the target layer."""
    router: Router
    """Of the target layer."""
    default_vectors: torch.Tensor | None = None
    """Of the source layer, `[experts, hidden]`, fp32; None if there are none, or the target has no source."""
    post_norm: nn.Module | None = None
    """The norm on the source layer's experts' sum, or None."""
    post_scale: float = 1.0
    """Factor of that norm's output."""

    @classmethod
    def of(cls, target: MoELayer, source: MoELayer | None, default_vectors: torch.Tensor | None) -> Self:
        """The wiring from `source` to `target`; the default vectors are moved to the device of the target's router."""
        norm, router = target.norm, Router.of(target)
        if target.unfollowed is not None:
            return cls(norm, router)
        if source is None:
            return cls(norm, router)
        if default_vectors is not None:
            default_vectors = default_vectors.to(next(target.router.parameters()).device)
        return cls(norm, router, default_vectors, source.join.post_norm, source.join.post_scale)

    @property
    def modules(self) -> list[nn.Module]:
        return [module for module in (self.norm, self.router, self.post_norm) if module is not None]

    def to(self, device: torch.device) -> Wiring:
        """The same on `device`. It moves the modules themselves, so they must be copies of the model's."""
        for module in self.modules:
            module.to(device)
        vectors = self.default_vectors
        return self if vectors is None else replace(self, default_vectors=vectors.to(device))

    def quasi_residual(
        self, residual: torch.Tensor, source: Routing | None, inner: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The guess at the source layer's whole output, `[tokens, hidden]`, in the dtype of `residual`.

        It is `s + sum_j w_j D[id_j]`, summed in fp32. If the source layer has a post-norm, it is
        `s + post_scale * post_norm(inner + sum_j w_j D[id_j])` (see `architecture.Join`). Without a source or default
        vectors it is the residual itself.
        """
        vectors = self.default_vectors
        if source is None or vectors is None:
            return residual
        guess = F.embedding_bag(
            source.ids.long(), vectors, per_sample_weights=source.weights.to(vectors.dtype), mode="sum"
        )
        if self.post_norm is not None:
            guess = guess if inner is None else inner.to(guess.dtype) + guess
            guess = self.post_scale * self.post_norm.forward(guess.to(residual.dtype))
        return (residual.to(guess.dtype) + guess).to(residual.dtype)


def wire(
    layers: list[MoELayer], source_of: dict[int, int | None], default_vectors: dict[int, torch.Tensor]
) -> dict[int, Wiring]:
    """The wiring of each target layer in `source_of`, which names its source; `default_vectors` are by source layer.

    Of layers that can't be followed, the router is the model's own, which a direct predictor does not ask.
    """
    by_index: dict[int | None, MoELayer] = {layer.index: layer for layer in layers}
    wirings = {}
    for target, source in source_of.items():
        vectors = None if source is None else default_vectors.get(source)
        wirings[target] = Wiring.of(by_index[target], by_index.get(source), vectors)
    return wirings


class Speculator(nn.Module):
    """Guesses the routing of one target layer from its source layer's residual and routing."""

    def __init__(self, wiring: Wiring, mlp: PredictorForm | None = None):
        super().__init__()
        self.wiring = wiring
        """No submodule: it belongs to the model, and is neither moved nor saved with this module."""
        self.mlp = mlp

    def quasi(self, residual: torch.Tensor, source: Routing | None, inner: torch.Tensor | None = None) -> torch.Tensor:
        """The quasi-hidden state `q` `[tokens, hidden]`."""
        return self.wiring.norm.forward(self.wiring.quasi_residual(residual, source, inner))

    def states(
        self, residual: torch.Tensor, source: Routing | None, inner: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The quasi-hidden state `q` and the normed residual `a`, each `[tokens, hidden]`."""
        guess = self.wiring.quasi_residual(residual, source, inner)
        # A norm works row by row, so one call is enough for both: with a single token, the calls are what costs time.
        quasi, normed = self.wiring.norm.forward(torch.stack((guess, residual))).unbind()
        return quasi, normed

    def forward(
        self,
        residual: torch.Tensor,
        source: Routing | None,
        inner: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
    ) -> Routing:
        """The speculated routing of the target layer for `residual` `[tokens, hidden]` of its source layer.

        `inner` is the source layer's shared term, if that goes through its post-norm. `memory` `[tokens, memory * 2 experts]` is
        what the tokens before these left, the most recent first, if the predictor has a memory; without it nothing is remembered.
        """
        return self.with_free(residual, source, inner, memory)[0]

    def with_free(
        self,
        residual: torch.Tensor,
        source: Routing | None,
        inner: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
    ) -> tuple[Routing, torch.Tensor | None]:
        """What `forward` returns, and the training-free logits `[tokens, experts]`, which `memory.memory_of` reads.

        These are None unless the predictor has a memory.
        """
        route, mlp = self.wiring.router.forward, self.mlp
        if mlp is None:  # without an MLP nothing reads the normed residual
            return route(self.quasi(residual, source, inner)), None
        quasi, normed = self.states(residual, source, inner)
        mixture = None if source is None else mixture_of(source, mlp.num_experts, normed.dtype)
        return mlp.speculate(route, quasi, normed, mixture, memory)


def candidates(routing: Routing, m: int) -> torch.Tensor:
    """The `m` candidates of a speculation, `[tokens, m]`: the router's own choice first, then by falling logit.

    The router's choice comes first because it may differ from the top logits (score-correction biases, groups).
    Routings of several layers may be stacked before it: `[layers, tokens, m]`.
    """
    top_k = routing.ids.shape[-1]
    if m <= top_k:
        return routing.ids[..., :m]
    rest = routing.logits.scatter(-1, routing.ids.long(), float("-inf")).topk(m - top_k, dim=-1).indices
    return torch.cat([routing.ids.to(rest.dtype), rest], dim=-1)
