"""Policy `auto`: prefetching where it pays, and only there, found out by trying.

Whether it pays depends on the link, on how long a layer computes, on how many guesses are right and on what the slots hold
already; others saw it lose where the link is busy all the time. All of that is in the time that a token takes, and
`on_demand` and `prefetch` give the same tokens, so the first tokens are run under each of them by turns.
"""

from __future__ import annotations

import statistics

AUTO = "auto"
BLOCK = 4
"""Tokens that are run under one policy before the other has its turn; the first of them is not counted."""
BLOCKS = 9
"""Turns of a trial, of both together. The first is not counted: what follows a prompt waits for most of its experts."""
TRIED_AGAIN_AFTER = 2048
"""Tokens until the next trial: the text, and with it the routing, may have changed."""
CLOSE, CLOSE_TRIED_AGAIN_AFTER = 0.1, 256
"""Where the two are closer than this share, chance may have picked, and the next trial comes so many tokens later."""


class Trial:
    """Which of the two policies the next decoded tokens are run under, from the times of those before."""

    def __init__(self) -> None:
        self.prefetches = True
        self._token = 0
        self._again = 0  # the token at which the next trial begins
        self._times: dict[bool, list[float]] = {True: [], False: []}

    @property
    def is_over(self) -> bool:
        return self._token >= BLOCK * BLOCKS

    def took(self, seconds: float) -> None:
        """Takes note of how long the forward pass over a decoded token took."""
        if not self.is_over and self._token > BLOCK and self._token % BLOCK:
            self._times[self.prefetches].append(seconds)
        self._token += 1
        if not self.is_over:
            turn = self._token // BLOCK
            if turn:  # there and back, so that what drifts meets both alike
                self.prefetches = turn % 4 in (2, 3)
        elif self._token == BLOCK * BLOCKS:
            demand, prefetch = (statistics.median(self._times[kind]) for kind in (False, True))
            self.prefetches = prefetch < demand
            is_close = abs(prefetch - demand) < CLOSE * max(prefetch, demand)
            self._again = self._token + (CLOSE_TRIED_AGAIN_AFTER if is_close else TRIED_AGAIN_AFTER)
        elif self._token >= self._again:
            self._token = 0
            self._times = {True: [], False: []}
