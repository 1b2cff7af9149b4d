"""Restricts the choice of a router, of any architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Choose = Callable[[torch.Tensor], torch.Tensor]
"""Returns the ids `[tokens, top_k]` that a router is to take, from the values `[tokens, experts]` by which it would choose."""


def fixed(ids: torch.Tensor) -> Choose:
    """Always chooses `ids` `[tokens, top_k]`, in their order."""
    return lambda _: ids


def allowed(barred: torch.Tensor, top_k: int) -> Choose:
    """Chooses the best experts that are not `barred`, a mask `[tokens, experts]`."""
    return lambda values: values.masked_fill(barred, float("-inf")).topk(top_k, dim=-1).indices


class RestrictedChoice(TorchFunctionMode):
    """Within it, a router with values of `shape` `(tokens, experts)` takes the experts that `choose` returns.

    A router of any architecture ends in one `topk` over its experts. This answers that call. Everything around the call
    (sigmoid or softmax, correction biases, groups, normalising, scaling) stays the router's own. `free_ids` are the ids that
    the router would have chosen without the restriction.

    An expert that the router has excluded (its group was not chosen) is ranked last, so that there are always enough experts.
    """

    def __init__(self, shape: tuple[int, int], top_k: int, choose: Choose):
        super().__init__()
        self.shape, self.top_k, self._choose = shape, top_k, choose
        self.free_ids: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (torch.topk, torch.Tensor.topk):
            values, *rest = args
            if values.shape == self.shape and (rest[0] if rest else kwargs["k"]) == self.top_k:
                self.free_ids = result.indices
                # Excluded experts have minus infinity, from which no router could compute weights.
                ranked = values.clamp(min=torch.finfo(values.dtype).min)
                ids = self._choose(ranked).long()
                result = torch.return_types.topk((ranked.gather(-1, ids), ids))
        return result
