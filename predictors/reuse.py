"""Which experts are used again soon. Who keeps a slot is decided by that."""

from __future__ import annotations

import torch

HALF_LIFE = 24.0
"""After so many tokens a use counts half. `benchmarks.keeping` compares half-lives."""


def decayed_uses(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """What the choice of some tokens counts after the last one, `[num_experts]`, fp32. Rows of `ids` `[tokens, k]` are in order."""
    tokens, k = ids.shape
    ages = torch.arange(tokens - 1, -1, -1, device=ids.device)
    worth = torch.exp2(-ages / HALF_LIFE).repeat_interleave(k)
    return torch.zeros(num_experts, device=ids.device).index_add_(0, ids.flatten(), worth)
