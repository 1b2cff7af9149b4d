"""Which experts are used again soon. Who keeps a slot is decided by that.

A *reuse predictor* says after each token how soon each expert of a layer is used again:

    f_e   = [g_e ; 2 sqrt(u_e1 (1 - r_1)) ; 2 sqrt(u_e2 (1 - r_2)) ; ...]
    score = f · a + W2 · silu( W1 · f + b1 ) + b2

`g` are the router's logits for the token, `u_ei` the expert's decayed count with the rate `r_i`, the token included. `a` is the
same for all experts of a layer, `W1` reads all of a layer. Where the next use is `d` tokens ahead, sigmoid(score) is trained to be
`exp(-(d - 1) / 8)`, with the binary cross-entropy. Logarithms in the place of roots keep less, and take longer.
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
RATES = (0.6, 0.8, 0.9, 0.95, 0.98, 0.995)
"""What is left of a use after one token, in the counts that a reuse predictor reads."""
TOKENS = 8.0
"""Where the next use is so many tokens farther, the target is 1/e of what it was."""
FEATURES = 1 + len(RATES)
TINY = 1e-20
"""Is added to counts with each token, since numbers below 1e-38 are slow to compute with."""


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
        super().__init__()
        inputs = FEATURES * num_experts
        self.own = nn.Parameter(torch.zeros(layers, FEATURES))
        self.w1 = nn.Parameter(torch.randn(layers, inputs, width) * inputs**-0.5)
        self.b1 = nn.Parameter(torch.zeros(layers, width))
        self.w2 = nn.Parameter(torch.zeros(layers, width, num_experts))
        self.b2 = nn.Parameter(torch.zeros(layers, num_experts))

    @property
    def width(self) -> int:
        return self.w1.shape[-1]

    def forward(self, logits: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The scores `[layers, rows, experts]`. `logits` are shaped alike, and `counts` `[layers, rows, experts, rates]`; all fp32."""
        f = features(logits, counts)
        hidden = F.silu(torch.baddbmm(self.b1[:, None], f.flatten(2), self.w1))
        own = torch.einsum("lref,lf->lre", f, self.own)
        return own + torch.baddbmm(self.b2[:, None], hidden, self.w2)


class Reuse(NamedTuple):
    """The reuse predictors of a model."""

    predictors: ReusePredictors
    layers: list[int]
    """The model's numbers of their layers."""
    slots: list[int]
    """Numbers of slots of a layer."""
    hit_rates: dict[str, list[float]]
    """How often so many slots hit on validation sequences, by the rule that says what they keep: `learned` and others."""


def features(logits: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """What the predictors read: `[..., experts, 1 + rates]` from `logits` `[..., experts]` and `counts` `[..., experts, rates]`."""
    scale = 1 - torch.tensor(RATES, device=counts.device)
    return torch.cat((logits.unsqueeze(-1), 2 * (counts * scale).sqrt()), -1)


class ReuseScores:
    """The reuse predictor of one layer beside a running model on a CPU: the counts, and the scores after each token.

    It is in NumPy, which starts an operation on so few numbers in a fifth of the time of torch.
    """

    def __init__(self, predictors: ReusePredictors, layer: int):
        """`layer` counts from 0 among those of `predictors`."""
        own, w1, b1, w2, b2 = (p.detach().float().numpy()[layer] for p in predictors.parameters())
        self._own, self._w1, self._b1, self._w2, self._b2 = own, w1, b1, w2, b2
        experts = len(b2)
        rates = np.array([1.0, *RATES], dtype=np.float32)
        self._rates = np.broadcast_to(rates, (experts, FEATURES)).copy()  # of one shape they are multiplied faster
        self._scale = 4 * (1 - self._rates)
        # The first column of the features are the logits. That of the counts says nothing.
        self._counts, self._features = np.zeros((2, experts, FEATURES), dtype=np.float32)

    def use(self, ids: torch.Tensor) -> None:
        """Counts the experts `ids` `[tokens, k]`, int64, of tokens in their order."""
        counts = self._counts
        if len(ids) == 1:
            counts *= self._rates
            counts += TINY
            for expert in ids[0].tolist():
                counts[expert] += 1
            return
        counts *= self._rates ** len(ids)
        for number, rate in enumerate(RATES, start=1):
            counts[:, number] += decayed_uses(ids.numpy(), len(counts), rate)

    def after(self, logits: NDArray[np.float32]) -> list[float]:
        """The score of each expert after the last token that was counted, whose router said `logits` `[experts]`."""
        f = self._features
        np.multiply(self._counts, self._scale, out=f)
        np.sqrt(f, out=f)
        f[:, 0] = logits
        hidden = f.reshape(-1) @ self._w1
        hidden += self._b1
        hidden /= 1 + np.exp(-hidden)
        score = hidden @ self._w2
        score += self._b2
        score += f @ self._own
        scores: list[float] = score.tolist()
        return scores
