"""Which experts follow on those of a token. It is counted as the model runs, and has no slots and makes no copies.

What the experts of one layer are worth after a token that has used the experts `e`:

    soon(f)    = the uses of f after any use of an expert, those `d` tokens later counting RATE^(d - 1), on average
    soon(e, f) = the same after a use of e
    worth(f)   = soon(f) · prod_e soon(e, f) / soon(f) + SHARE · (the decayed count of f, as a rate like soon(f))

The product is naive Bayes: each `e` tells something about `f`, as if the others did not tell the same. The decayed count is
that of eviction `frequency`. Nothing is trained: it learns from the tokens that pass, prompts included.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...predictors.reuse import HALF_LIFE

RATE = 0.6
"""How much less a use counts that is one token later."""
SURE = 4.0
"""What is known of `f` alone weighs as much as so many uses of `e`."""
SHARE = 0.5
"""Of the decayed count. `benchmarks.keeping` compares."""
MOST = 2.0**16
"""Uses of a layer's experts after which all that was counted is halved, so that the model's last texts count most."""
BLOCK = 64
"""Tokens of a prompt that are counted at a time."""
TINY = 1e-9


class Followers:
    """What it is worth to keep each expert of one layer."""

    def __init__(self, num_experts: int):
        self._soon = np.zeros((num_experts, num_experts))  # [e, f]: the sum over uses of e
        self._uses = np.zeros(num_experts)  # of e
        self._recent = np.zeros(num_experts)  # the uses of e, those `d` tokens ago as RATE^d
        self._count = np.zeros(num_experts)
        self._last: list[int] = []

    def add(self, ids: NDArray[np.int64]) -> None:
        """Says what tokens have used: the rows of `ids` `[tokens, k]`. What is no expert of the layer is left out."""
        if len(ids) > 1:
            self._add_tokens(ids)
            return
        used = [expert for expert in ids[0].tolist() if expert < len(self._uses)]
        self._soon[:, used] += self._recent[:, None]
        self._recent *= RATE
        self._recent[used] += 1
        self._uses[used] += 1
        self._count *= 2 ** (-1 / HALF_LIFE)
        self._count[used] += 1
        self._used(used)

    def _add_tokens(self, ids: NDArray[np.int64]) -> None:
        experts = len(self._uses)
        for some in np.split(ids, range(BLOCK, len(ids), BLOCK)):
            used = np.zeros((len(some), max(experts, int(some.max()) + 1)))
            np.put_along_axis(used, some, 1.0, axis=1)
            used = used[:, :experts]
            ages = np.arange(len(some))[:, None] - np.arange(len(some))  # [now, then]
            before = np.where(ages > 0, RATE ** np.maximum(ages - 1.0, 0), 0) @ used
            before += RATE ** np.arange(len(some))[:, None] * self._recent
            self._soon += before.T @ used
            self._recent = RATE * before[-1] + used[-1]
            self._uses += used.sum(0)
            self._count = 2 ** (-len(some) / HALF_LIFE) * self._count + 2 ** (-ages[-1] / HALF_LIFE) @ used
            self._used(np.flatnonzero(used[-1]).tolist())

    def _used(self, last: list[int]) -> None:
        self._last = last
        if self._uses.sum() > MOST:
            self._soon *= 0.5
            self._uses *= 0.5

    @property
    def worth(self) -> list[float]:
        """What each expert is worth now."""
        last, uses = self._last, self._uses
        soon = uses * (len(last) / (1 - RATE) / max(uses.sum(), 1.0)) + TINY
        after = self._soon[last] + SURE * soon
        after /= (uses[last] + SURE)[:, None] * soon
        own = SHARE * (1 - 2 ** (-1 / HALF_LIFE)) / (1 - RATE)
        worth: list[float] = (soon * after.prod(0) + own * self._count).tolist()
        return worth
