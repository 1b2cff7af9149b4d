"""A chat with a model: its messages, in the form of the model's chat template, and the keys and values of what was said."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..predictors.errors import UserError, one_line
from .generate import Generation, generate
from .promptcache import PromptCache
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
        self._kept = PromptCache(model)
        self.reset()

    def reset(self) -> None:
        """Forgets what was said, but for the system message."""
        self.messages = list(self._first)
        self._kept.clear()

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
        ids = token_ids_of(asked, self._tokenizer)
        check_length(self._model, ids, self._sampling.max_new_tokens)
        cache = self._kept.take(ids)
        try:
            result = generate(
                self._model, self._tokenizer, torch.tensor([ids]), self._sampling, seed, tell, cache=cache
            )
        except KeyboardInterrupt:
            self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]
            raise
        self.messages = [*asked, {"role": "assistant", "content": result.text}]
        self._kept.keep([*ids, *result.token_ids[:-1]], cache)
        return result


def token_ids_of(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a chat, up to where the answer begins. Without a chat template they are those of the messages' text.

    Raises `ChatError` if the template does not render it.
    """
    if tokenizer.chat_template:
        try:
            rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program of the model's authors
            raise ChatError(
                f"the tokenizer's chat template can't render this chat ({one_line(error)}); begin a new one"
            ) from error
    else:
        rendered = "".join(message["content"] for message in messages)
    assert isinstance(rendered, str)
    ids: list[int] = tokenizer(rendered, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    return ids


def check_length(model: PreTrainedModel, ids: list[int], new_tokens: int) -> None:
    """Raises `ChatError` if `ids` and `new_tokens` more do not fit the model's context."""
    longest = context_of(model)
    if longest is not None and len(ids) + new_tokens > longest:
        raise ChatError(
            f"the chat has {len(ids):,} tokens and the answer up to {new_tokens:,}, and the model's context is {longest:,}; "
            "begin a new chat, or give fewer max_new_tokens"
        )


def context_of(model: PreTrainedModel) -> int | None:
    """The most tokens of a text that the model reads; None if its config does not say."""
    longest: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest
