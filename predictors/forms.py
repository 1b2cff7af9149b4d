"""The forms of predictors: how the MLP of a target layer makes a guess at its routing.

    correcting   corrects the quasi-hidden state, which the target's own router then reads: `mlp.ResidualMLP`
    direct       goes from a router's input straight to the target's scores: `direct.DirectMLP`

The correcting form needs a residual that can be followed. `fit` chooses, and `export --also` by layer; `direct.KINDS` has their
classes by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import StrEnum
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from .routing import Routing

Route = Callable[[torch.Tensor], Routing]
"""A target's own router, from states `[tokens, hidden]`."""


class Form(StrEnum):
    """The forms of predictors."""

    CORRECTING = "correcting"
    DIRECT = "direct"


class PredictorForm(nn.Module, ABC):
    """The predictor of one target layer, in some form."""

    form: ClassVar[Form]
    w1: nn.Parameter
    v: nn.Parameter
    b1: nn.Parameter
    w2: nn.Parameter
    b2: nn.Parameter
    u: nn.Parameter | None

    def __init__(self, hidden_size: int, num_experts: int, width: int, memory: int, top_k: int):
        """`memory` is how many tokens it remembers."""
        super().__init__()
        self.top_k = top_k
        self.w1 = nn.Parameter(torch.empty(width, hidden_size))
        self.v = nn.Parameter(torch.empty(width, num_experts))
        self.b1 = nn.Parameter(torch.zeros(width))
        for weight in (self.w1, self.v):
            nn.init.normal_(weight, std=(hidden_size + num_experts) ** -0.5)
        self._memory = memory

    def _add_memory(self) -> None:
        """Adds `u`, which is the last parameter: those who save an optimizer's state count on the order."""
        self.u = nn.Parameter(torch.zeros(self.width, self._memory * 2 * self.num_experts)) if self._memory else None

    @classmethod
    def count(cls, hidden_size: int, num_experts: int, width: int, memory: int = 0) -> int:
        """The number of parameters of a predictor."""
        with torch.device("meta"):
            return sum(p.numel() for p in cls(hidden_size, num_experts, width, memory, 1).parameters())

    @property
    def width(self) -> int:
        return self.b1.shape[0]

    @property
    def num_experts(self) -> int:
        return self.v.shape[1]

    @property
    def memory(self) -> int:
        """How many tokens it remembers."""
        return self._memory

    def hidden(self, normed: torch.Tensor, mixture: torch.Tensor | None, memory: torch.Tensor | None) -> torch.Tensor:
        """The hidden units before their nonlinearity, `[tokens, width]`."""
        hidden = F.linear(normed, self.w1, self.b1)
        if mixture is not None:
            hidden = torch.addmm(hidden, mixture, self.v.T)
        if memory is not None:
            assert self.u is not None
            hidden = torch.addmm(hidden, memory.to(hidden.dtype), self.u.T)
        return hidden

    @abstractmethod
    def forward(
        self,
        quasi: torch.Tensor,
        normed: torch.Tensor,
        mixture: torch.Tensor | None,
        memory: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The corrected state `[tokens, hidden]`, or the scores `[tokens, experts]`, from `q`, `a`, `m` and `h`.

        `m` is None without a source layer. `h` is None where nothing is remembered, and must be for a predictor without a memory.
        """

    @abstractmethod
    def speculate(
        self,
        route: Route,
        quasi: torch.Tensor,
        normed: torch.Tensor,
        mixture: torch.Tensor | None,
        memory: torch.Tensor | None = None,
    ) -> tuple[Routing, torch.Tensor | None]:
        """The guessed routing, and the logits `[tokens, experts]` that its memory compares with; None if it has no memory.

        `quasi` and `normed` are `[tokens, hidden]`, `mixture` `[tokens, experts]` and `memory` `[tokens, memory * 2 experts]`. The
        last two may be None, which is as zeros.
        """


class Routers(Protocol):
    """The targets' own routers, stacked; see `stacked.StackedSpeculators`."""

    def logits(self, states: torch.Tensor) -> torch.Tensor: ...
    def route(self, states: torch.Tensor) -> list[Routing]: ...


class Stack(nn.Module, ABC):
    """The predictors of all target layers as one batched computation, for training; weights are `[layers, ...]`.

    A predictor narrower than the widest has zeros in its last units. They stay zeros: such a unit outputs silu(0) = 0,
    so no gradient reaches its weights, and weight decay keeps zeros.
    """

    kind: ClassVar[type[PredictorForm]]
    cut: ClassVar[tuple[str, ...]] = ("w1", "v", "b1", "u")
    """The parameters with a row for each hidden unit; `w2` has a column for each."""
    scale: torch.Tensor
    """`[layers, 1, memory * 2 experts]`: makes what is remembered about as large in every layer. A layer's own `u` has it in it."""
    w1: nn.Parameter
    v: nn.Parameter
    b1: nn.Parameter
    w2: nn.Parameter
    b2: nn.Parameter
    u: nn.Parameter
    """Only where there is a memory, of values times `scale`."""

    def __init__(self, widths: list[int], hidden_size: int, num_experts: int, memory: int = 0, top_k: int = 1):
        super().__init__()
        self.widths, self.memory, self.top_k = list(widths), memory, top_k
        single = [self.kind(hidden_size, num_experts, max(widths), memory, top_k) for _ in widths]
        for mlp, width in zip(single, widths, strict=True):
            mlp.w1.data[width:] = 0
            mlp.v.data[width:] = 0
        for name, first in single[0].named_parameters():
            stacked = torch.stack([mlp.get_parameter(name).detach() for mlp in single])
            self.register_parameter(name, nn.Parameter(stacked, requires_grad=first.requires_grad))
        if memory:
            self.register_buffer("scale", torch.ones_like(self.u[:, :1]))

    def hidden(self, normed: torch.Tensor, mixture: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
        """The hidden units before their nonlinearity, `[layers, rows, width]`."""
        hidden = torch.baddbmm(self.b1.unsqueeze(1), normed, self.w1.mT)
        hidden = torch.baddbmm(hidden, mixture, self.v.mT)
        return hidden if memory is None else torch.baddbmm(hidden, memory, (self.u * self.scale).mT)

    @abstractmethod
    def forward(
        self, quasi: torch.Tensor, normed: torch.Tensor, mixture: torch.Tensor, memory: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What `logits` and `routings` take, `[layers, rows, columns]`. All arguments are `[layers, rows, columns]`.

        `mixture` is zero for a layer without a source. `memory` is zero for a token that remembers nothing, and None if none does.
        """

    @abstractmethod
    def logits(self, guessed: torch.Tensor, routers: Routers) -> torch.Tensor:
        """The speculated logits `[layers, rows, experts]`."""

    @abstractmethod
    def routings(self, guessed: torch.Tensor, routers: Routers) -> list[Routing]:
        """The speculated routing of each layer."""

    def count(self) -> int:
        """The number of parameters of all predictors, without the units that only fill up the stack."""
        return sum(self.kind.count(self.w1.shape[2], self.v.shape[2], width, self.memory) for width in self.widths)

    def layer(self, number: int) -> PredictorForm:
        """A copy of one layer's predictor; `number` counts the stack, not the model's layers."""
        width = self.widths[number]
        mlp = self.kind(self.w1.shape[2], self.v.shape[2], width, self.memory, self.top_k)
        own = {name: p.detach()[number].clone() for name, p in self.named_parameters()}
        if self.memory:
            own["u"] *= self.scale[number]
        own |= {name: own[name][:width] for name in self.cut if name in own}
        mlp.load_state_dict(own | {"w2": own["w2"][:, :width]})
        return mlp
