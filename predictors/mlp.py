"""The predictor: a small residual MLP that corrects the quasi-hidden state.

    q' = q + W2 · silu( W1 · a + V · m + U · h + b1 ) + b2          W2, b2 and U start at zero

    q  quasi-hidden state                                       [tokens, hidden]
    a  normed residual, norm_t(s)                               [tokens, hidden]
    m  mixture: the source router's weights, times k, each at its expert's place     [tokens, experts]
    h  memory: what the last tokens left (see `memory`)         [tokens, memory * 2 experts]

`q` misses what the source layer's experts do beyond their default vectors. That depends on the residual and on which
experts run with which weights. `q` itself is no input: it is made of the residual and the mixture, and with the same
number of parameters the mixture closes more of the gap (docs/predictors.md). A predictor may have no memory; then there is no `U`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .forms import Form, PredictorForm, Route, Routers, Stack
from .routing import Routing


class ResidualMLP(PredictorForm):
    """The correcting predictor of one target layer; untrained, it changes nothing: the speculation is training-free."""

    form = Form.CORRECTING

    def __init__(self, hidden_size: int, num_experts: int, width: int, memory: int = 0, top_k: int = 1):
        super().__init__(hidden_size, num_experts, width, memory, top_k)
        self.w2 = nn.Parameter(torch.zeros(hidden_size, width))
        self.b2 = nn.Parameter(torch.zeros(hidden_size))
        self._add_memory()

    def forward(
        self,
        quasi: torch.Tensor,
        normed: torch.Tensor,
        mixture: torch.Tensor | None,
        memory: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return quasi + F.linear(F.silu(self.hidden(normed, mixture, memory)), self.w2, self.b2)

    def speculate(
        self,
        route: Route,
        quasi: torch.Tensor,
        normed: torch.Tensor,
        mixture: torch.Tensor | None,
        memory: torch.Tensor | None = None,
    ) -> tuple[Routing, torch.Tensor | None]:
        state = self(quasi, normed, mixture, memory)
        if not self.memory:
            return route(state), None
        parts = [part.tensor_split(2) for part in route(torch.cat((state, quasi)))]
        return Routing(*(own for own, _ in parts)), parts[0][1]


class StackedResidualMLPs(Stack):
    """Correcting predictors, stacked."""

    kind = ResidualMLP

    def forward(
        self, quasi: torch.Tensor, normed: torch.Tensor, mixture: torch.Tensor, memory: torch.Tensor | None = None
    ) -> torch.Tensor:
        hidden = F.silu(self.hidden(normed, mixture, memory))
        return quasi + torch.baddbmm(self.b2.unsqueeze(1), hidden, self.w2.mT)

    def logits(self, guessed: torch.Tensor, routers: Routers) -> torch.Tensor:
        return routers.logits(guessed)

    def routings(self, guessed: torch.Tensor, routers: Routers) -> list[Routing]:
        return routers.route(guessed)
