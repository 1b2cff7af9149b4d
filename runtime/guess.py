"""Guessers: each guesses the experts of one target layer, as fast as its architecture allows."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from ..predictors.direct import DirectMLP
from ..predictors.folded import Folded, FoldedDirect, FoldedSpeculator, PlainRouter
from ..predictors.routing import Routing
from ..predictors.speculation import Speculator, candidates
from .errors import OffloadError
from .targets import Target


class Guess(NamedTuple):
    """A guess for some tokens of a target layer."""

    candidates: torch.Tensor
    """`[tokens, m]`, the best guess first."""
    speculation: Routing | None
    """The guessed routing; it may be None where its weights are not executed."""
    free: torch.Tensor | None = None
    """The training-free logits `[tokens, experts]`, of which a memory is made; None where the predictor has none."""
    values: torch.Tensor | None = None
    """The speculated logits of the candidates, fp32, and of one more where the router chooses as many: `[tokens, n]`. Their margins
    follow from them (`predictors.confidence`). None unless they are asked for."""


class Guesser(Protocol):
    """Guesses for one target layer."""

    plain: PlainRouter | None
    """The target's router, if its decision follows from its logits alone."""
    depth: int
    """How many tokens its predictor remembers."""

    def guess(
        self,
        residual: torch.Tensor,
        source: Routing | None,
        inner: torch.Tensor | None,
        memory: torch.Tensor | None = None,
    ) -> Guess:
        """Guesses from `residual` `[tokens, hidden]` and the routing of the source layer.

        Without a source layer `residual` is the target's own input, and `source` is None. `inner` is what the source layer
        norms together with its experts, or None. `memory` `[tokens, depth * 2 experts]`, fp32, is what the tokens remember, or
        None where they remember nothing.
        """

    def ranks(self, logits: torch.Tensor) -> torch.Tensor:
        """The values `[tokens, experts]` by which the plain router is to choose, from its `logits` of the same shape."""


class FoldedGuesser:
    """Guesses where a speculator can be folded: with few operations, and without the model's own modules."""

    def __init__(self, speculator: Folded, top_k: int, m: int, weighs: bool, sure: bool = False):
        router = speculator.router
        self.plain: PlainRouter | None = None if router is None or router.weigh is None else router
        self._speculator, self._top_k, self._m, self._weighs, self._sure = speculator, top_k, m, weighs, sure
        self.depth = speculator.memory

    def guess(
        self,
        residual: torch.Tensor,
        source: Routing | None,
        inner: torch.Tensor | None,  # noqa: ARG002
        memory: torch.Tensor | None = None,
    ) -> Guess:
        logits, free = self._speculator.logits(residual, source, memory)
        weighted = None
        most = max(self._m, self._top_k + 1) if self._sure else self._m
        values, chosen = logits.topk(most, dim=-1)
        if most > self._m:
            chosen = chosen[:, : self._m]
        if self._weighs:
            assert self.plain is not None
            weighted = self.plain.weighted(logits, chosen[:, : self._top_k])
        return Guess(chosen, weighted, free, values if self._sure else None)

    def ranks(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


class ModelGuesser:
    """Guesses for any target with the speculator, which calls the model's own norm and router."""

    plain: PlainRouter | None = None

    def __init__(self, speculator: Speculator, m: int, sure: bool = False):
        self._speculator, self._m, self._sure = speculator, m, sure
        self.depth = 0 if speculator.mlp is None else speculator.mlp.memory

    @torch.no_grad()
    def guess(
        self,
        residual: torch.Tensor,
        source: Routing | None,
        inner: torch.Tensor | None,
        memory: torch.Tensor | None = None,
    ) -> Guess:
        speculation, free = self._speculator.with_free(residual, source, inner, memory)
        if not self._sure:
            return Guess(candidates(speculation, self._m), speculation, free)
        top_k = speculation.ids.shape[-1]
        found = candidates(speculation, max(self._m, top_k + 1))
        values = speculation.logits.float().gather(-1, found.long())
        return Guess(found[:, : self._m], speculation, free, values)

    def ranks(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


def make_guesser(speculator: Speculator, target: Target, weighs: bool, sure: bool = False) -> Guesser:
    """The fastest possible guesser of a target.

    `weighs` says that the weights of the guess will be executed, and `sure` that `Guess.values` are asked for, if it is known what they
    mean.
    """
    is_direct = isinstance(speculator.mlp, DirectMLP)
    if weighs and is_direct:
        raise OffloadError("direct predictors guess experts and not their weights; give gating true or resident")
    layer = target.routed
    sure = sure and target.confidence is not None and layer.top_k < layer.num_experts
    folded = (
        FoldedDirect.of(speculator, layer)
        if is_direct
        else FoldedSpeculator.of(speculator, layer, to_scale=weighs, values=sure)
    )
    if folded is None:
        return ModelGuesser(speculator, target.candidates, sure)
    return FoldedGuesser(folded, layer.top_k, target.candidates, weighs, sure)
