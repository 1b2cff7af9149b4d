"""Tells decode steps from prompts."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers import Cache


def shape_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Size | None:
    """The numbers `[sequences, tokens]` of a forward pass, if its arguments say them."""
    ids, states = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
    if isinstance(ids, torch.Tensor):
        return ids.shape
    return states.shape[:-1] if isinstance(states, torch.Tensor) else None


class Steps:
    """Knows of each forward pass of a model whether it is a decode step: one token of each sequence, after others in a cache.

    Any other pass may be a prompt: the first one, one without a cache, and one over several tokens of a sequence. The last is a
    part of a prompt, the next turn of a chat, or what an assistant has written. Nothing tells these from each other.
    """

    def __init__(self) -> None:
        self._last: weakref.ref[Cache] | None = None

    def is_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the next pass is a decode step. It is asked once before each pass."""
        last = None if self._last is None else self._last()
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        self._last = None if cache is None else weakref.ref(cache)
        shape = shape_of(args, kwargs)
        if cache is None or shape is None or shape[-1] != 1:
            return False
        try:
            length = cache.get_seq_length()
        except ValueError:  # no layer of it counts tokens
            return False
        if isinstance(length, torch.Tensor) and length.is_cuda and cache is last:
            return True  # it was filled by the pass before; to read its length would wait for the device
        return int(length) > 0
