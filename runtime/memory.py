"""What predictors with a memory know of the tokens before: kept for each layer and row of a batch, from one pass to the next.

A decode step remembers where it goes on exactly where the pass before ended: with the same cache, to which nothing has been done
meanwhile, and as many rows. Everywhere else nothing is remembered: at a new prompt, in another cache, after a cache was cropped
(rejected drafts) or its rows were reordered (beams). In a pass over several tokens of a row, no token can know the routing of the
one before it in time, so none remembers; what its last tokens leave is kept for the pass after it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache

from ..predictors.memory import MOST, memory_of, remembered
from ..predictors.routing import Routing
from .guess import Guess, Guesser


class Memory:
    """What the last tokens of each row left at each layer.

    Its tensors stay where they are from one step to the next, so that captured steps can read and write them.
    """

    def __init__(self, depths: list[int], num_experts: int, most_rows: int, device: torch.device):
        """`depths` says for each layer how many tokens its predictor remembers. More rows than `most_rows` are not kept."""
        self.depths = depths
        self._columns, self._most_rows, self._device = 2 * num_experts, most_rows, device
        self._by_rows: dict[int, torch.Tensor] = {}
        self._kept: torch.Tensor | None = None
        self._tokens = 0
        self._real: torch.Tensor | None = None
        """Which of each row's last tokens are tokens of its text, `[rows, tokens]`; None for all."""
        self._left: tuple[Any, ...] = ()

    @property
    def is_on(self) -> bool:
        """Whether what this pass leaves is kept."""
        return self._kept is not None

    @contextmanager
    def during(self, shape: torch.Size | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """A pass over `shape` `[rows, tokens]`, with the arguments of the model's forward. Without a shape nothing is kept."""
        left, self._left = self._left, ()
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if not any(self.depths) or shape is None or len(shape) != 2 or shape[0] > self._most_rows or cache is None:
            yield
            return
        rows, self._tokens = shape
        kept = self._of_rows(rows)
        if self._tokens != 1 or left != (rows, *_state(cache)):
            kept.zero_()
        mask, positions = kwargs.get("attention_mask", args[1] if len(args) > 1 else None), kwargs.get("position_ids")
        self._kept, self._real = kept, None if self._tokens == 1 else _real(mask, positions, min(self._tokens, MOST))
        try:
            yield
        finally:
            self._kept = self._real = None
        self._left = (rows, *_state(cache))

    def _of_rows(self, rows: int) -> torch.Tensor:
        if rows not in self._by_rows:
            size = len(self.depths), rows, max(self.depths) * self._columns
            with torch.inference_mode(False):
                self._by_rows[rows] = torch.zeros(size, device=self._device)
        return self._by_rows[rows]

    def read(self, layer: int) -> torch.Tensor | None:
        """What the tokens of this pass remember, `[tokens, depth * 2 experts]`, fp32; None where they can't remember anything."""
        if self._kept is None or self._tokens != 1 or not self.depths[layer]:
            return None
        return self._kept[layer, :, : self.depths[layer] * self._columns]

    def last(self, layer: int, values: torch.Tensor) -> torch.Tensor:
        """Of `values` `[tokens, ...]` those of each row's last tokens: as many as the layer remembers."""
        depth = min(self.depths[layer], self._tokens)
        return values.unflatten(0, (-1, self._tokens))[:, -depth:].flatten(0, 1)

    def write(self, layer: int, logits: torch.Tensor, free: torch.Tensor) -> None:
        """Keeps what each row's last tokens leave, from their router's logits and the training-free guess at them.

        Both are `[rows * n, experts]`; see `last`.
        """
        assert self._kept is not None
        kept = self._kept[layer, :, : self.depths[layer] * self._columns]
        left = memory_of(logits.detach(), free.detach()).unflatten(0, (len(kept), -1)).flip(1)
        if self._real is not None:
            left = torch.where(self._real[:, -left.shape[1] :].flip(1).unsqueeze(-1), left, 0)
        new = left.flatten(1)
        if new.shape[1] < kept.shape[1]:
            new = torch.cat((new, kept[:, : kept.shape[1] - new.shape[1]]), 1)
        kept.copy_(new)


def _state(cache: Cache) -> tuple[Any, ...]:
    """How a cache is: whatever is done to it between passes gives another one.

    Cropping and reordering replace the tensors of every layer, so one layer is enough. What is written in place is counted by
    torch, but in inference mode; there the length tells.
    """
    held = (
        [value for value in vars(cache.layers[0]).values() if isinstance(value, torch.Tensor)] if cache.layers else []
    )
    counts = [None if tensor.is_inference() else tensor._version for tensor in held]
    length = cache.get_seq_length() if held and not held[0].is_cuda else None
    return weakref.ref(cache), [_Same(tensor) for tensor in held], counts, length


class _Same:
    """Is equal where it is of the same tensor, which it does not keep."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor = weakref.ref(tensor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._tensor() is not None and self._tensor() is other._tensor()


def _real(mask: Any, positions: Any, tokens: int) -> torch.Tensor | None:
    """Which of each row's last `tokens` are no padding, `[rows, tokens]`, as far as the mask or the positions tell.

    `generate` gives positions, and for some caches a mask that says less: padding does not count up to the last token.
    """
    found = None
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        found = mask[:, -tokens:].bool()
    if isinstance(positions, torch.Tensor) and positions.ndim == 2:
        last = positions[:, -tokens:]
        counts = last == last[:, -1:] + torch.arange(1 - tokens, 1, device=last.device)
        found = counts if found is None else found & counts
    return found


def in_order(
    guesser: Guesser,
    depth: int,
    reading: tuple[torch.Tensor, Routing | None, torch.Tensor | None],
    logits: torch.Tensor,
    rows: int,
) -> Guess:
    """The guess for whole sequences as if their tokens came one by one, each remembering the ones before it.

    `reading` are the arguments of `Guesser.guess`, for tokens `[rows * length, ...]`, and `logits` those of the target's router.
    """
    free = guesser.guess(*reading).free
    assert free is not None
    follows = torch.ones(len(free), dtype=torch.bool, device=free.device)
    follows[:: len(free) // rows] = False
    return guesser.guess(*reading, remembered(memory_of(logits, free), follows, depth))
