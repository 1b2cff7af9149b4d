"""Speculation: from what a source layer knows before its experts run to the experts of the next MoE layer.

    s    residual         all of the source layer's output but its routed experts            [tokens, hidden]
    D    default vectors  row e: the mean output of the source layer's expert e              [experts, hidden]
    q    = norm_t(s + sum_j w_j D[id_j])       quasi-hidden state                            [tokens, hidden]
    a    = norm_t(s)                                                                         [tokens, hidden]
    q'   = q + MLP([q; a])                     only where a predictor was trained
    logits, weights, ids = router_t(q')        the model's own frozen router

(*Speculating Experts*, arXiv 2603.19289, section 3; the residual form of the predictor is this project's.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from predictors.mlp import ResidualMLP


class Routing(NamedTuple):
    """A router's decision, in the order in which transformers' routers return it."""

    logits: torch.Tensor
    """`[tokens, experts]`"""
    weights: torch.Tensor
    """`[tokens, top_k]`"""
    ids: torch.Tensor
    """`[tokens, top_k]`, integers"""


def quasi_residual(
    residual: torch.Tensor, source: Routing | None, default_vectors: torch.Tensor | None
) -> torch.Tensor:
    """The guess at the source layer's whole output: `s + sum_j w_j D[id_j]`, `[tokens, hidden]`, dtype of `residual`.

    The sum is taken in fp32. Without a source (the first MoE layer) or default vectors it is the residual itself.
    """
    if source is None or default_vectors is None:
        return residual
    guess = F.embedding_bag(
        source.ids.long(), default_vectors, per_sample_weights=source.weights.to(default_vectors.dtype), mode="sum"
    )
    return (residual.to(guess.dtype) + guess).to(residual.dtype)


class Speculator(nn.Module):
    """Guesses the routing of one target layer from its source layer's residual and routing."""

    def __init__(
        self,
        norm: nn.Module,
        router: nn.Module,
        default_vectors: torch.Tensor | None = None,
        mlp: ResidualMLP | None = None,
    ):
        super().__init__()
        # The norm and the router belong to the model: held, but not registered as children to move or save.
        self._model_parts = (norm, router)
        self.register_buffer("default_vectors", default_vectors)
        self.default_vectors: torch.Tensor | None
        self.mlp = mlp

    @property
    def norm(self) -> nn.Module:
        return self._model_parts[0]

    @property
    def router(self) -> nn.Module:
        return self._model_parts[1]

    def states(self, residual: torch.Tensor, source: Routing | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The quasi-hidden state `q` and the normed residual `a`, each `[tokens, hidden]`."""
        return self._normed(quasi_residual(residual, source, self.default_vectors)), self._normed(residual)

    def forward(self, residual: torch.Tensor, source: Routing | None) -> Routing:
        """The speculated routing of the target layer for `residual` `[tokens, hidden]` of its source layer."""
        if self.mlp is None:  # without an MLP nothing reads the normed residual
            return self._routed(self._normed(quasi_residual(residual, source, self.default_vectors)))
        return self._routed(self.mlp(*self.states(residual, source)))

    # Hooks on the norm and the router (a recorder's, transformers' own for `output_router_logits`) are there to see
    # what the model does, so a speculation calls past them.

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm.forward(x)
        return normed

    def _routed(self, state: torch.Tensor) -> Routing:
        return Routing(*self.router.forward(state))


def candidates(routing: Routing, m: int) -> torch.Tensor:
    """The `m` candidates of a speculation, `[tokens, m]`: the router's own choice first, then by falling logit.

    The router's choice comes first because it may differ from the top logits (score-correction biases, groups).
    """
    top_k = routing.ids.shape[-1]
    if m <= top_k:
        return routing.ids[:, :m]
    rest = routing.logits.scatter(-1, routing.ids.long(), float("-inf")).topk(m - top_k, dim=-1).indices
    return torch.cat([routing.ids.to(rest.dtype), rest], dim=-1)
