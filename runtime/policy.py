"""What happens to experts, and what weights them: the names of policies and gatings.

    policy        gating       copies                             what a layer executes
    on_demand                  after its router decided           what its router decided: exact
    prefetch                   candidates early, then misses      what its router decided: exact
    speculative   speculated   candidates early, no others        the guess, with the weights of the guess (the paper's form)
    speculative   true         candidates early, no others        the guess, weighted by the router as if it had chosen so
    speculative   resident     candidates early, no others        what the router chooses of the experts that are there

How each of them decides stands in `runtime.gating`.
"""

from __future__ import annotations

from enum import StrEnum
from itertools import pairwise


class Policy(StrEnum):
    """What happens to experts; see the module's text."""

    ON_DEMAND = "on_demand"
    PREFETCH = "prefetch"
    SPECULATIVE = "speculative"


class Gating(StrEnum):
    """What weights experts under `speculative`; see the module's text."""

    SPECULATED = "speculated"
    TRUE = "true"
    RESIDENT = "resident"


RECALL_ENOUGH = 0.99


def candidates_from_recall(recall: list[float], top_k: int, policy: Policy, gating: Gating) -> int:
    """How many candidates of a target layer to fetch, of `top_k` to twice that; `recall` is that of as many candidates.

    Under gating `resident` the router chooses among them, so they buy quality: the fewest are taken that hold
    `RECALL_ENOUGH` of its choice. Under `prefetch` they only buy time: one more is worth its copy while it is more often
    right than wrong. Under the other gatings more than `top_k` are never executed.
    """
    if policy is Policy.PREFETCH:
        gains = [top_k * (after - before) for before, after in pairwise(recall)]
        return top_k + next((more for more, right in enumerate(gains) if right <= 0.5), len(gains))
    if policy is Policy.SPECULATIVE and gating is Gating.RESIDENT:
        return top_k + next((more for more, found in enumerate(recall) if found >= RECALL_ENOUGH), len(recall) - 1)
    return top_k
