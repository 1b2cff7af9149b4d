"""Policy `auto` on a GPU: it tries whether prefetching is faster, and prefetches only then. On a CPU each copy has a price instead:
`runtime.host.price`.

Which is faster depends on the link, on how long a layer computes, on how many guesses are right and on what the slots hold already.
The time of a token includes all of that. `on_demand` and `prefetch` give the same tokens, so the first tokens are run under
both of them in turn.
"""

from __future__ import annotations

import statistics
from typing import Protocol

AUTO = "auto"
BLOCK = 4
"""Tokens of a turn. The first of them does not count."""
BLOCKS = 9
"""Turns of a trial, of both policies together. The first does not count: after a prompt most experts are missing."""
TRIED_AGAIN_AFTER = 2048
"""Tokens until the next trial, since the text and with it the routing may have changed."""
CLOSE, CLOSE_TRIED_AGAIN_AFTER = 0.1, 256
"""Where the times differ by less than this share, the choice may be chance. Then the next trial comes so many tokens later."""


class Choice(Protocol):
    """Says under policy `auto` whether the next pass guesses."""

    @property
    def prefetches(self) -> bool: ...

    @property
    def is_timed(self) -> bool:
        """Whether it reads how long passes take."""

    def took(self, seconds: float) -> None:
        """Notes how long the forward pass over a decoded token took."""


class Trial:
    """Chooses the policy of the next decoded tokens, from the times of those before."""

    def __init__(self) -> None:
        self.prefetches = True
        self._token = 0
        self._again = 0  # the token at which the next trial begins
        self._times: dict[bool, list[float]] = {True: [], False: []}

    @property
    def is_over(self) -> bool:
        return self._token >= BLOCK * BLOCKS

    @property
    def is_timed(self) -> bool:
        return not self.is_over

    def took(self, seconds: float) -> None:
        """Notes how long the forward pass over a decoded token took."""
        if not self.is_over and self._token > BLOCK and self._token % BLOCK:
            self._times[self.prefetches].append(seconds)
        self._token += 1
        if not self.is_over:
            turn = self._token // BLOCK
            if turn:  # in the order 1 2 2 1 1 2 2 1, so that a steady change of speed favours neither
                self.prefetches = turn % 4 in (2, 3)
        elif self._token == BLOCK * BLOCKS:
            demand, prefetch = (statistics.median(self._times[kind]) for kind in (False, True))
            self.prefetches = prefetch < demand
            is_close = abs(prefetch - demand) < CLOSE * max(prefetch, demand)
            self._again = self._token + (CLOSE_TRIED_AGAIN_AFTER if is_close else TRIED_AGAIN_AFTER)
        elif self._token >= self._again:
            self._token = 0
            self._times = {True: [], False: []}
