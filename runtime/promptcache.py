"""The keys and values of the last text, for the next one that begins like it."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedModel

from .offload import ExpertOffload


class PromptCache:
    """Keeps the keys and values of one text. The next turn of a chat then computes what is new in it only."""

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self.clear()

    def clear(self) -> None:
        self._ids: list[int] = []
        self._cache: Any = None

    def take(self, ids: list[int]) -> Cache | None:
        """A cache with the keys and values of the first of `ids`, as far as they are known. It is the caller's then.

        A template may write earlier turns otherwise than they were generated (many drop what the model thought), and then the
        cache is cut back to where both agree. None where decode steps are captured: `generate` has a static cache of its own there.
        """
        known, cache = self._ids, self._cache
        self.clear()
        offload: ExpertOffload | None = vars(self._model).get("expert_offload")
        if offload is not None and offload.captures:
            return None
        # At least one token must be computed.
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(known, ids[:-1], strict=False)))
        if same < len(known) and not all(
            getattr(layer, "is_croppable", False) for layer in getattr(cache, "layers", [])
        ):
            same = 0
        if cache is None or same == 0:
            return DynamicCache(config=self._model.config)
        if same < len(known):
            cache.crop(same - len(known))
        kept: Cache = cache
        return kept

    def keep(self, ids: list[int], cache: Cache | None) -> None:
        """Keeps a cache that holds `ids`."""
        self._ids, self._cache = ids, cache
