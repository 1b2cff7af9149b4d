"""Which experts are used again soon. Who keeps a slot is decided by that.

A *reuse predictor* says after each layer's pass how soon each of its experts is used again. All layers write what their routers say
into one state, of which each part fades with the tokens at its own rate, and each reads it when its router has decided:

    h     = what is left of the state + x_0 + ... + x_l             x_l = A_l · g_l
    score = D_l · g_l + W_l · silu( c_l * h + x_l + b_l ) + e_l

`g_l` are the router's logits for the token. The state is `h` of the last layer, and `left` of it is what the next token finds. So it
knows of the layers before in this token, and of all layers in the tokens before, those used often included. Where the next use is
`d` tokens ahead, sigmoid(score) is trained to be `exp(-(d - 1) / 5)`, with the binary cross-entropy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

HALF_LIFE = 24.0
"""After so many tokens a use counts half. `benchmarks.keeping` compares half-lives."""
TOKENS = 5.0
"""Where the next use is so many tokens farther, the target is 1/e of what it was."""
AGES = 2.5 / TOKENS
"""So much a score rises in a token, since the next use comes nearer."""
HALF_LIVES = (0.4, 60.0)
"""The least and the most, in tokens, of the parts of the state before they are trained."""
LONGEST = 1024
"""Tokens of a prompt, its last ones, that are read."""


def decayed_uses(ids: NDArray[np.int64], num_experts: int, rate: float = 2 ** (-1 / HALF_LIFE)) -> NDArray[np.float64]:
    """What the choice of some tokens counts after the last one, `[num_experts]`. Rows of `ids` `[tokens, k]` are in order.

    What is no expert of the layer is left out.
    """
    tokens, k = ids.shape
    worth = rate ** np.arange(tokens - 1, -1, -1)
    counts = np.bincount(ids.ravel(), worth.repeat(k), num_experts)[:num_experts]
    return counts.astype(np.float64, copy=False)  # as it is already; NumPy's types do not say so


def target_of(distance: torch.Tensor) -> torch.Tensor:
    """What sigmoid(score) should be where an expert's next use is `distance` tokens ahead."""
    return torch.exp(-(distance - 1) / TOKENS)


class ReusePredictors(nn.Module):
    """The reuse predictors of several layers, as one computation."""

    def __init__(self, layers: int, num_experts: int, width: int):
        """`width` is that of the state."""
        super().__init__()
        shortest, longest = HALF_LIVES
        left = 2 ** (-1 / (shortest * (longest / shortest) ** torch.linspace(0, 1, width)))
        self.fading = nn.Parameter(left.logit())
        self.a = nn.Parameter(torch.randn(layers, num_experts, width) * 0.5 * num_experts**-0.5)
        self.c = nn.Parameter((0.6 * (1 - left**2).sqrt()).expand(layers, -1).clone())
        self.b = nn.Parameter(torch.zeros(layers, width))
        self.w = nn.Parameter(torch.zeros(layers, width, num_experts))
        self.d = nn.Parameter(torch.zeros(layers, num_experts, num_experts))
        self.e = nn.Parameter(torch.zeros(layers, num_experts))

    @property
    def width(self) -> int:
        return len(self.fading)

    @property
    def left(self) -> torch.Tensor:
        """What is left of each part of the state after one token, `[width]`."""
        return self.fading.sigmoid()

    def states(self, logits: torch.Tensor) -> torch.Tensor:
        """What is left of the state when each token begins, `[sequences, tokens, width]`, from zeros on.

        `logits` `[sequences, tokens, layers, experts]`, fp32, are those of all layers.
        """
        left, written = self.left, logits.flatten(2) @ self.a.flatten(0, 1)
        state, found = torch.zeros_like(written[:, 0]), []
        for x in written.unbind(1):
            found.append(state)
            state = (state + x) * left
        return torch.stack(found, 1)

    def forward(self, logits: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The scores `[layers, rows, experts]` of tokens that find these `states` `[rows, width]`.

        `logits`, fp32, are shaped like the scores.
        """
        x = logits @ self.a
        hidden = F.silu((states + x.cumsum(0)) * self.c[:, None] + x + self.b[:, None])
        return torch.baddbmm(self.e[:, None], hidden, self.w) + logits @ self.d


class Reuse(NamedTuple):
    """The reuse predictors of a model."""

    predictors: ReusePredictors
    layers: list[int]
    """The model's numbers of their layers."""
    slots: list[int]
    """Numbers of slots of a layer."""
    hit_rates: dict[str, list[float]]
    """How often so many slots hit on validation sequences, by the rule that says what they keep: `learned` and others."""


class ReuseScores:
    """The reuse predictors of all layers beside a running model on a CPU: the state, and the scores after each layer's pass.

    It is in NumPy, which starts an operation on so few numbers in a fifth of the time of torch.
    """

    def __init__(self, predictors: ReusePredictors):
        a, c, b, w, d, e = (
            part.detach().float().numpy()
            for part in (predictors.a, predictors.c, predictors.b, predictors.w, predictors.d, predictors.e)
        )
        # What the logits are multiplied by is one matrix, so that one operation does it. Passes add up, beyond what fp32 can tell apart.
        # The state is half of what is written above: silu(2 y) = y + y tanh(y), which never overflows.
        self._layers = list(zip(np.concatenate((a / 2, d), -1), c, b / 2, w, e.astype(np.float64), strict=True))
        self._left: NDArray[np.float32] = predictors.left.detach().float().numpy()
        self._state = np.zeros_like(self._left)
        self._age, self._passes = AGES / len(a), 0

    def after(self, layer: int, logits: NDArray[np.float32]) -> list[float]:
        """The score of each expert of a layer whose router has said `logits` `[tokens, experts]` of tokens in their order.

        Scores of different layers, and of different passes, can be compared: what was said earlier has come nearer. The layers, which
        count from 0 among those of the predictors, pass in their order.
        """
        both, c, b, w, e = self._layers[layer]
        state, width = self._state, len(self._left)
        self._passes += 1
        if len(logits) == 1:
            if layer == 0:
                state *= self._left
            said = logits[0] @ both
            state += said[:width]
        else:
            ages = np.arange(min(len(logits), LONGEST))[::-1]
            if layer == 0:
                state *= self._left ** len(logits)
            written = logits[-len(ages) :] @ both
            state += (written[:, :width] * self._left ** ages[:, None]).sum(0)
            said = written[-1]
        hidden = state * c
        hidden += said[:width]
        hidden += b
        hidden += hidden * np.tanh(hidden)
        score = hidden @ w
        score += said[width:]
        scores: list[float] = (score + (e - self._age * self._passes)).tolist()
        return scores
