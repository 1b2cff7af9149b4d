"""The predictor: a small residual MLP that corrects the quasi-hidden state where it is weak."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class ResidualMLP(nn.Module):
    """`q' = q + W2 · silu(W1 · [q; a] + b1) + b2`, the predictor of one target layer.

    `W2` and `b2` start at zero, so an untrained predictor is exactly training-free speculation.
    """

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(width, 2 * hidden_size))
        self.b1 = nn.Parameter(torch.zeros(width))
        self.w2 = nn.Parameter(torch.zeros(hidden_size, width))
        self.b2 = nn.Parameter(torch.zeros(hidden_size))
        nn.init.normal_(self.w1, std=(2 * hidden_size) ** -0.5)

    def forward(self, quasi: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """The corrected state, `[tokens, hidden]`, from `q` and `a` of the same shape."""
        hidden = F.silu(F.linear(torch.cat([quasi, normed], dim=-1), self.w1, self.b1))
        return quasi + F.linear(hidden, self.w2, self.b2)


class StackedResidualMLPs(nn.Module):
    """The predictors of all target layers as one batched computation, for training; weights are `[layers, ...]`."""

    w1: nn.Parameter
    b1: nn.Parameter
    w2: nn.Parameter
    b2: nn.Parameter

    def __init__(self, num_layers: int, hidden_size: int, width: int):
        super().__init__()
        single = [ResidualMLP(hidden_size, width) for _ in range(num_layers)]
        for name, _ in single[0].named_parameters():
            self.register_parameter(name, nn.Parameter(torch.stack([getattr(mlp, name).detach() for mlp in single])))

    def forward(self, quasi: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """The corrected states, `[layers, tokens, hidden]`, from `q` and `a` of the same shape."""
        hidden = torch.baddbmm(self.b1.unsqueeze(1), torch.cat([quasi, normed], dim=-1), self.w1.mT)
        return quasi + torch.baddbmm(self.b2.unsqueeze(1), F.silu(hidden), self.w2.mT)

    def layer(self, number: int) -> ResidualMLP:
        """A copy of one layer's predictor; `number` counts the stack, not the model's layers."""
        width, inputs = self.w1.shape[1:]
        mlp = ResidualMLP(inputs // 2, width)
        mlp.load_state_dict({name: p.detach()[number].clone() for name, p in self.named_parameters()})
        return mlp
