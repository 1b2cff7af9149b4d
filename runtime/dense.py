"""Experts that are called with rows for every expert, most of them zeros, as if they were called with ids.

Transformers' Llama 4 weights a token's rows before its experts see them. All experts get all tokens, and those that were not chosen
get zeros, for which they return zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..predictors.experts import count_of, unmarked
from .engine import Decision
from .errors import OffloadError
from .guard import without_gradients
from .operations import is_traced

Execute = Callable[[torch.Tensor, Decision], torch.Tensor]
"""From `x` `[rows, hidden]` and what is to be executed, one expert a row, to the outputs `[rows, hidden]`."""


def execute_dense(rows: torch.Tensor, num_experts: int, execute: Execute) -> torch.Tensor:
    """The outputs `[experts * tokens, hidden]` for `rows` of the same shape, of which only the chosen experts are executed.

    An executed expert gets the rows of all tokens, zeros too: a product may be rounded otherwise for fewer rows.
    """
    by_expert = rows.view(num_experts, -1, rows.shape[-1])
    tokens = by_expert.shape[1]
    chosen = (by_expert != 0).flatten(1).any(1).nonzero().flatten()
    ids = chosen.repeat_interleave(tokens).unsqueeze(-1)
    weights = torch.ones(ids.shape, dtype=rows.dtype, device=rows.device)
    found = execute(by_expert[chosen].flatten(0, 1), Decision(ids, weights, known=False, tokens=tokens))
    outputs = torch.zeros_like(by_expert)
    outputs[chosen] = found.view(len(chosen), tokens, -1)
    return outputs.flatten(0, 1)


def is_dense(experts: nn.Module) -> bool:
    """Whether `experts` are called so."""
    marks = unmarked(experts)
    return marks is not None and marks.is_dense


def dense_forward(experts: nn.Module, execute: Execute) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward to put in the place of that of `experts`. Raises `OffloadError` where it is compiled."""

    def forward(rows: torch.Tensor) -> torch.Tensor:
        if is_traced():
            raise OffloadError(
                f"{type(experts).__name__} can't be compiled while they are offloaded; run it uncompiled"
            )
        with torch.no_grad():
            output = execute_dense(rows, count_of(experts), execute)
        return without_gradients(output, (rows,), experts)

    return forward
