"""The direct form of a predictor, for layers whose residual can't be followed: from a router's input straight to the next one's scores.

    z = p + L a + M m + W2 silu( W1 a + V m + U h + b1 ) + b2          all but p, W1 and V start at zero

    a  the source router's input, divided by its root mean square     [tokens, hidden]
    m  mixture: the source router's weights, times k, each at its expert's place     [tokens, experts]
    h  memory: what the last tokens left, see `memory`; the guess that it compares with is 0     [tokens, memory * 2 experts]
    p  prior: the logarithm of how often the target chooses each expert     [experts]
    z  scores, of which the largest are guessed     [tokens, experts]

It needs neither the target's norm and router nor default vectors. Untrained, it guesses the experts that are used most. Where a
residual `s` can be followed, `a` is `norm_t(s)`, as for the correcting form (`mlp`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .forms import Form, PredictorForm, Route, Routers, Stack
from .mlp import ResidualMLP, StackedResidualMLPs
from .routing import Routing, routing_of


class UnitNorm(nn.Module):
    """Divides by the root mean square: it stands where a target's norm does in the correcting form."""

    eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)


class PriorRouter(nn.Module):
    """Chooses the experts of the largest `prior` `[experts]`, whatever it reads: it stands where a target's router does."""

    def __init__(self, prior: torch.Tensor, top_k: int):
        super().__init__()
        self.prior: torch.Tensor
        self.register_buffer("prior", prior)
        self.top_k = top_k

    def forward(self, state: torch.Tensor) -> Routing:
        return routing_of(self.prior.expand(*state.shape[:-1], -1), self.top_k)


def prior_of(counts: torch.Tensor) -> torch.Tensor:
    """The prior, fp32, from how often each expert was chosen, `[..., experts]`."""
    smooth = counts.float() + 1
    return (smooth / smooth.sum(-1, keepdim=True)).log()


class DirectMLP(PredictorForm):
    """The direct predictor of one target layer."""

    form = Form.DIRECT

    def __init__(self, hidden_size: int, num_experts: int, width: int, memory: int = 0, top_k: int = 1):
        super().__init__(hidden_size, num_experts, width, memory, top_k)
        self.w2 = nn.Parameter(torch.zeros(num_experts, width))
        self.b2 = nn.Parameter(torch.zeros(num_experts))
        self.skip = nn.Parameter(torch.zeros(num_experts, hidden_size))
        self.mix = nn.Parameter(torch.zeros(num_experts, num_experts))
        self.prior = nn.Parameter(torch.zeros(num_experts), requires_grad=False)
        self._add_memory()

    def untrained(self) -> DirectMLP:
        """A copy that has nothing but the prior."""
        copy = DirectMLP(self.w1.shape[1], self.num_experts, 1, 0, self.top_k).to(self.prior.device, self.prior.dtype)
        for name, weight in copy.named_parameters():
            weight.data = self.prior.data.clone() if name == "prior" else torch.zeros_like(weight.data)
        return copy

    def forward(
        self,
        quasi: torch.Tensor,  # noqa: ARG002
        normed: torch.Tensor,
        mixture: torch.Tensor | None,
        memory: torch.Tensor | None = None,
    ) -> torch.Tensor:
        normed = normed.to(self.w1.dtype)  # some routers read fp32 in a model of bfloat16
        scores = F.linear(normed, self.skip, self.b2 + self.prior)
        if mixture is not None:
            mixture = mixture.to(self.w1.dtype)
            scores = torch.addmm(scores, mixture, self.mix.T)
        return scores + F.linear(F.silu(self.hidden(normed, mixture, memory)), self.w2)

    def speculate(
        self,
        route: Route,  # noqa: ARG002
        quasi: torch.Tensor,
        normed: torch.Tensor,
        mixture: torch.Tensor | None,
        memory: torch.Tensor | None = None,
    ) -> tuple[Routing, torch.Tensor | None]:
        scores = self(quasi, normed, mixture, memory)
        return routing_of(scores, self.top_k), torch.zeros_like(scores) if self.memory else None


class StackedDirectMLPs(Stack):
    """Direct predictors, stacked."""

    kind = DirectMLP
    skip: nn.Parameter
    mix: nn.Parameter
    prior: nn.Parameter

    def forward(
        self,
        quasi: torch.Tensor,  # noqa: ARG002
        normed: torch.Tensor,
        mixture: torch.Tensor,
        memory: torch.Tensor | None = None,
    ) -> torch.Tensor:
        scores = torch.baddbmm((self.b2 + self.prior).unsqueeze(1), normed, self.skip.mT)
        scores = torch.baddbmm(scores, mixture, self.mix.mT)
        return scores + torch.bmm(F.silu(self.hidden(normed, mixture, memory)), self.w2.mT)

    def logits(self, guessed: torch.Tensor, routers: Routers) -> torch.Tensor:  # noqa: ARG002
        return guessed

    def routings(self, guessed: torch.Tensor, routers: Routers) -> list[Routing]:  # noqa: ARG002
        return [routing_of(scores, self.top_k) for scores in guessed]


STACKS: dict[Form, type[Stack]] = {Form.CORRECTING: StackedResidualMLPs, Form.DIRECT: StackedDirectMLPs}
KINDS: dict[Form, type[PredictorForm]] = {Form.CORRECTING: ResidualMLP, Form.DIRECT: DirectMLP}
