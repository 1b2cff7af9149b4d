"""A router's decision, and how it is read from what a router returns."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch


class Routing(NamedTuple):
    """A router's decision, in the order in which transformers' routers return it."""

    logits: torch.Tensor
    """`[tokens, experts]`"""
    weights: torch.Tensor
    """`[tokens, top_k]`"""
    ids: torch.Tensor
    """`[tokens, top_k]`, integers"""


def flat_routing(output: tuple[torch.Tensor, ...]) -> Routing:
    """A router's output as a `Routing` with one row a token."""
    return Routing(*(part.flatten(0, -2) for part in output))


class Chosen(Protocol):
    """Among how many experts a layer's router chooses, and how many."""

    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...


def read_routing(output: tuple[torch.Tensor, ...], layer: Chosen) -> Routing:
    """What the output of any router says of its decision, with one row a token. Raises `ValueError` if it says nothing.

    A router returns logits, weights and ids, and perhaps more; or weights that are zero where an expert was not chosen, and logits.
    Logits of more than the experts (of skipping them all) are cut.
    """
    parts = [part.flatten(0, -2) for part in output if isinstance(part, torch.Tensor) and part.ndim > 1]
    if len(parts) >= 3 and parts[2].dtype in (torch.int32, torch.int64) and parts[1].shape == parts[2].shape:
        return Routing(parts[0][:, : layer.num_experts], parts[1], parts[2])
    if len(parts) == 2 and parts[0].shape == parts[1].shape and parts[0].shape[-1] == layer.num_experts:
        weights, ids = parts[0].topk(layer.top_k, dim=-1)
        return Routing(parts[1], weights, ids)
    raise ValueError("this output of a router says nothing of its choice")


def routing_of(scores: torch.Tensor, top_k: int) -> Routing:
    """The `top_k` largest `scores` `[..., experts]` as a routing. Its weights are those of a softmax, and a router's may be others."""
    values, ids = scores.topk(top_k, dim=-1)
    return Routing(scores, values.softmax(-1), ids)
