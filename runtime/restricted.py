"""A router of any architecture, made to choose among some experts only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Choose = Callable[[torch.Tensor], torch.Tensor]
"""From the values `[tokens, experts]` that a router would choose by to the ids `[tokens, top_k]` that it is to take."""


def fixed(ids: torch.Tensor) -> Choose:
    """A choice of `ids` `[tokens, top_k]`, in their order."""
    return lambda _: ids


def allowed(barred: torch.Tensor, top_k: int) -> Choose:
    """The best that are not `barred`, a mask `[tokens, experts]`."""
    return lambda values: values.masked_fill(barred, float("-inf")).topk(top_k, dim=-1).indices


class RestrictedChoice(TorchFunctionMode):
    """Within it, the router of `[tokens, experts]` takes what `choose` names of the values that it would choose by.

    A router of any architecture ends in one `topk` over its experts. Answering that call leaves everything around it
    (sigmoid or softmax, correction biases, groups, normalising, scaling) to the router itself. `free_ids` are the ids that
    the router would have chosen without the restriction.

    An expert that the router ruled out (its group was not chosen) is ranked last, not excluded, so that there are always
    enough.
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
                # What is ruled out is minus infinity, of which no router could make weights.
                ranked = values.clamp(min=torch.finfo(values.dtype).min)
                ids = self._choose(ranked).long()
                result = torch.return_types.topk((ranked.gather(-1, ids), ids))
        return result
