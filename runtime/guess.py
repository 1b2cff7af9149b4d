"""Who guesses the experts of one target layer, as fast as its architecture allows."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from ..predictors.folded import FoldedSpeculator, PlainRouter
from ..predictors.speculation import Routing, Speculator, candidates
from .targets import Target


class Guess(NamedTuple):
    """What is guessed for some tokens of a target layer."""

    candidates: torch.Tensor
    """`[tokens, m]`, the best guess first."""
    speculation: Routing | None
    """The guessed routing, where its weights are to be executed."""


class Guesser(Protocol):
    """Guesses for one target layer."""

    plain: PlainRouter | None
    """The target's router, where its decision follows from its logits alone."""

    def guess(self, residual: torch.Tensor, source: Routing | None, inner: torch.Tensor | None) -> Guess:
        """The guess for `residual` `[tokens, hidden]` and the routing of the source layer, or None for the target's own input.

        `inner` is what the source layer norms together with its experts, where it does.
        """

    def ranks(self, logits: torch.Tensor) -> torch.Tensor:
        """The values `[tokens, experts]` by which the plain router chooses, from its `logits`."""


class FoldedGuesser:
    """Of a target whose norm and router are plain: a few operations, without the model's own modules."""

    def __init__(self, speculator: FoldedSpeculator, m: int, weighs: bool):
        self.plain: PlainRouter | None = speculator.router if speculator.router.weigh is not None else None
        self._speculator, self._m, self._weighs = speculator, m, weighs

    def guess(self, residual: torch.Tensor, source: Routing | None, inner: torch.Tensor | None) -> Guess:  # noqa: ARG002
        logits = self._speculator.logits(residual, source)
        chosen = logits.topk(self._m, dim=-1).indices
        if not self._weighs:
            return Guess(chosen, None)
        router = self._speculator.router
        return Guess(chosen, router.weighted(logits, chosen[:, : router.top_k]))

    def ranks(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


class ModelGuesser:
    """Of any target: the speculator itself, which asks the model's own norm and router."""

    plain: PlainRouter | None = None

    def __init__(self, speculator: Speculator, m: int):
        self._speculator, self._m = speculator, m

    @torch.no_grad()
    def guess(self, residual: torch.Tensor, source: Routing | None, inner: torch.Tensor | None) -> Guess:
        speculation = self._speculator(residual, source, inner)
        return Guess(candidates(speculation, self._m), speculation)

    def ranks(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


def make_guesser(speculator: Speculator, target: Target, weighs: bool) -> Guesser:
    """The fastest guesser of a target; `weighs` says that the weights of the guess will be executed."""
    folded = FoldedSpeculator.of(speculator, target.layer, to_scale=weighs)
    if folded is None:
        return ModelGuesser(speculator, target.candidates)
    return FoldedGuesser(folded, target.candidates, weighs)
