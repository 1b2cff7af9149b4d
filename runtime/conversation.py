"""A chat with a model: its messages, in the form of the model's chat template, and the keys and values of what was said."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..predictors.errors import UserError, one_line
from .generate import Generation, generate
from .offload import ExpertOffload
from .settings import Sampling


class ChatError(UserError):
    """A message that can't be answered; the sentence says why and what to do."""


class Conversation:
    """Answers messages one after another, each with all that was said before.

    A model whose tokenizer has no chat template goes on with the text as it is.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, system: str | None = None
    ):
        """Raises `ChatError` for a `system` message without a chat template."""
        self.has_template = bool(tokenizer.chat_template)
        if system is not None and not self.has_template:
            raise ChatError("the model's tokenizer has no chat template, so it knows no system message; leave it out")
        self.messages: list[dict[str, str]] = []
        """Each with its `role` and `content`."""
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._cache: Cache | None = None
        self._cached: list[int] = []
        self.reset()

    def reset(self) -> None:
        """Forgets what was said, but for the system message."""
        self.messages = list(self._first)
        self._cache, self._cached = None, []

    def answer(self, text: str, on_text: Callable[[str], None] = lambda _: None, seed: int = 0) -> Generation:
        """The model's answer to `text`, which `on_text` gets as it comes. What is broken off (Ctrl-C) counts as said.

        Raises `ChatError` if the chat becomes longer than the model's context, or the template does not render it. Nothing is
        said then.
        """
        said: list[str] = []

        def tell(piece: str) -> None:
            said.append(piece)
            on_text(piece)

        asked = [*self.messages, {"role": "user", "content": text}]
        ids = self._ids_of(asked)
        cache = self._cache_for(ids)
        self._cache, self._cached = None, []  # an answer that is broken off leaves a cache that nobody should use
        try:
            result = generate(self._model, self._tokenizer, torch.tensor([ids]), self._sampling, seed, tell, cache)
        except KeyboardInterrupt:
            self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]
            raise
        self.messages = [*asked, {"role": "assistant", "content": result.text}]
        self._cache, self._cached = cache, [*ids, *result.token_ids[:-1]]
        return result

    def _ids_of(self, messages: list[dict[str, str]]) -> list[int]:
        if self.has_template:
            try:
                rendered = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            except Exception as error:  # a template is a program of the model's authors
                raise ChatError(
                    f"the tokenizer's chat template can't render this chat ({one_line(error)}); begin a new one"
                ) from error
        else:
            rendered = "".join(message["content"] for message in messages)
        assert isinstance(rendered, str)
        ids: list[int] = self._tokenizer(rendered, add_special_tokens=not self.has_template)["input_ids"]
        longest = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and len(ids) + self._sampling.max_new_tokens > longest:
            raise ChatError(
                f"the chat has {len(ids):,} tokens and the answer up to {self._sampling.max_new_tokens:,}, and the model's "
                f"context is {longest:,}; begin a new chat, or give fewer max_new_tokens"
            )
        return ids

    def _cache_for(self, ids: list[int]) -> Cache | None:
        """The keys and values of the first of `ids`, as far as they are known; None where `generate` has its own.

        A template may write earlier turns otherwise than they were generated (many drop what the model thought), and then the
        cache is cut back to where both agree. Where steps are captured, `generate` has a static cache of its own for each answer.
        """
        offload: ExpertOffload | None = vars(self._model).get("expert_offload")
        if offload is not None and offload.captures:
            return None
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._cached, ids[:-1], strict=False)))
        cache: Any = self._cache
        if cache is None or known == 0:
            return DynamicCache(config=self._model.config)
        if known < len(self._cached):
            if not all(getattr(layer, "is_croppable", False) for layer in cache.layers):
                return DynamicCache(config=self._model.config)
            cache.crop(known - len(self._cached))
        return self._cache
