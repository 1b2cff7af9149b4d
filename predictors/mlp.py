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


class ResidualMLP(nn.Module):
    """The predictor of one target layer; untrained, it changes nothing: the speculation is training-free."""

    def __init__(self, hidden_size: int, num_experts: int, width: int, memory: int = 0):
        """`memory` is how many tokens it remembers."""
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(width, hidden_size))
        self.v = nn.Parameter(torch.empty(width, num_experts))
        self.b1 = nn.Parameter(torch.zeros(width))
        self.w2 = nn.Parameter(torch.zeros(hidden_size, width))
        self.b2 = nn.Parameter(torch.zeros(hidden_size))
        self.u = nn.Parameter(torch.zeros(width, memory * 2 * num_experts)) if memory else None
        for weight in (self.w1, self.v):
            nn.init.normal_(weight, std=(hidden_size + num_experts) ** -0.5)

    @property
    def width(self) -> int:
        return self.b1.shape[0]

    @property
    def memory(self) -> int:
        """How many tokens it remembers."""
        return 0 if self.u is None else self.u.shape[1] // (2 * self.v.shape[1])

    @staticmethod
    def count(hidden_size: int, num_experts: int, width: int, memory: int = 0) -> int:
        """The number of parameters of a predictor."""
        return width * (2 * hidden_size + (1 + 2 * memory) * num_experts + 1) + hidden_size

    def forward(
        self,
        quasi: torch.Tensor,
        normed: torch.Tensor,
        mixture: torch.Tensor | None,
        memory: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The corrected state `[tokens, hidden]` from `q`, `a`, `m` and `h`.

        `m` is None without a source layer. `h` is None where nothing is remembered, and must be for a predictor without a memory.
        """
        hidden = F.linear(normed, self.w1, self.b1)
        if mixture is not None:
            hidden = torch.addmm(hidden, mixture, self.v.T)
        if memory is not None:
            assert self.u is not None
            hidden = torch.addmm(hidden, memory.to(hidden.dtype), self.u.T)
        return quasi + F.linear(F.silu(hidden), self.w2, self.b2)


class StackedResidualMLPs(nn.Module):
    """The predictors of all target layers as one batched computation, for training; weights are `[layers, ...]`.

    A predictor narrower than the widest has zeros in its last units. They stay zeros: such a unit outputs silu(0) = 0,
    so no gradient reaches its weights, and weight decay keeps zeros.
    """

    w1: nn.Parameter
    v: nn.Parameter
    b1: nn.Parameter
    w2: nn.Parameter
    b2: nn.Parameter
    u: nn.Parameter
    """Only where there is a memory, of values times `scale`."""
    scale: torch.Tensor
    """`[layers, 1, memory * 2 experts]`: makes what is remembered about as large in every layer. A layer's own `u` has it in it."""

    def __init__(self, widths: list[int], hidden_size: int, num_experts: int, memory: int = 0):
        super().__init__()
        self.widths, self.memory = list(widths), memory
        single = [ResidualMLP(hidden_size, num_experts, max(widths), memory) for _ in widths]
        for mlp, width in zip(single, widths, strict=True):
            mlp.w1.data[width:] = 0
            mlp.v.data[width:] = 0
        for name, _ in single[0].named_parameters():
            self.register_parameter(name, nn.Parameter(torch.stack([getattr(mlp, name).detach() for mlp in single])))
        if memory:
            self.register_buffer("scale", torch.ones_like(self.u[:, :1]))

    def forward(
        self, quasi: torch.Tensor, normed: torch.Tensor, mixture: torch.Tensor, memory: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The corrected states, `[layers, tokens, hidden]`; `mixture` is zero for a layer without a source.

        `memory` is zero for a token that remembers nothing, and None if none does.
        """
        hidden = torch.baddbmm(self.b1.unsqueeze(1), normed, self.w1.mT)
        hidden = torch.baddbmm(hidden, mixture, self.v.mT)
        if memory is not None:
            hidden = torch.baddbmm(hidden, memory, (self.u * self.scale).mT)
        return quasi + torch.baddbmm(self.b2.unsqueeze(1), F.silu(hidden), self.w2.mT)

    def count(self) -> int:
        """The number of parameters of all predictors, without the units that only fill up the stack."""
        return sum(ResidualMLP.count(self.w1.shape[2], self.v.shape[2], width, self.memory) for width in self.widths)

    def layer(self, number: int) -> ResidualMLP:
        """A copy of one layer's predictor; `number` counts the stack, not the model's layers."""
        width = self.widths[number]
        mlp = ResidualMLP(self.w1.shape[2], self.v.shape[2], width, self.memory)
        own = {name: p.detach()[number].clone() for name, p in self.named_parameters()}
        if self.memory:
            own["u"] *= self.scale[number]
        cut = {name: p[:width] for name, p in own.items() if name not in ("w2", "b2")}
        mlp.load_state_dict(own | cut | {"w2": own["w2"][:, :width]})
        return mlp
