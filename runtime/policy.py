"""The policies and gatings by name. A policy says what is copied, and together with a gating what is executed.

    policy        gating       copies                             what a layer executes
    on_demand                  after its router decided           the router's choice: exact
    prefetch                   candidates early, then misses      the router's choice: exact
    speculative   speculated   candidates early, no others        the guess, with the weights of the guess (the paper's form)
    speculative   true         candidates early, no others        the guess, weighted by the router as if it had chosen it
    speculative   resident     candidates early, no others        the router's choice among the experts on the device

`runtime.gating` has the code of each. Whatever is no decode step (`runtime.steps`) is executed under `speculative` as under
`prefetch`.
"""

from __future__ import annotations

from enum import StrEnum
from itertools import pairwise


class Policy(StrEnum):
    """Which experts are copied, and when; see the table above."""

    ON_DEMAND = "on_demand"
    PREFETCH = "prefetch"
    SPECULATIVE = "speculative"


class Gating(StrEnum):
    """Where the weights come from under `speculative`; see the table above."""

    SPECULATED = "speculated"
    TRUE = "true"
    RESIDENT = "resident"


RECALL_ENOUGH = 0.99


def candidates_from_recall(recall: list[float], top_k: int, policy: Policy, gating: Gating) -> int:
    """How many candidates of a target layer to fetch. `recall` holds the recall of `top_k`, `top_k + 1`, ... candidates.

    Under gating `resident` the router chooses among them, so more of them mean better quality. The fewest are fetched that
    contain `RECALL_ENOUGH` of its choice. Under `prefetch` they only save time: one more is fetched while it is right more
    often than wrong. The other gatings execute no more than `top_k`.
    """
    if policy is Policy.PREFETCH:
        gains = [top_k * (after - before) for before, after in pairwise(recall)]
        return top_k + next((more for more, right in enumerate(gains) if right <= 0.5), len(gains))
    if policy is Policy.SPECULATIVE and gating is Gating.RESIDENT:
        return top_k + next((more for more, found in enumerate(recall) if found >= RECALL_ENOUGH), len(recall) - 1)
    return top_k
