"""What is a decode step and what is a prompt: under `speculative`, prompts are exact and decode steps are guessed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import IS_OLDER_RELEASE
from predict_train.predictors.generation import CACHE
from predict_train.runtime import Gating, offloaded
from predict_train.runtime.settings import OffloadConfig
from predict_train.runtime.steps import Steps
from test_offload import prompt
from transformers import DynamicCache, PreTrainedModel, StaticCache

MOST = OffloadConfig().speculated_tokens


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_step_is_one_token_of_each_sequence_after_others(tiny_moe: PreTrainedModel, kind: type) -> None:
    arguments = {"max_cache_len": 20} if kind is StaticCache else {}
    steps, cache = Steps(), kind(config=tiny_moe.config, **arguments)

    def is_step(*args: Any, **kwargs: Any) -> bool:
        found = steps.is_step(args, kwargs)
        with torch.no_grad():
            tiny_moe(*args, **kwargs)
        return found

    ids, batch = prompt(3, 5), prompt(3, 1)
    assert not is_step(batch, **{CACHE: cache}), "the cache is empty"
    assert is_step(batch, **{CACHE: cache})
    assert is_step(batch, None, None, cache)
    assert is_step(inputs_embeds=torch.ones(3, 1, 32), **{CACHE: cache})
    assert not is_step(ids, **{CACHE: cache}), "a further turn of a chat, a part of a prompt, an assistant's tokens"
    assert is_step(input_ids=batch, **{CACHE: cache})
    assert not is_step(ids)
    assert not is_step(ids[:, :1]), "there is no cache"
    cache.reset()
    is_empty = int(cache.get_seq_length()) == 0
    assert is_empty or IS_OLDER_RELEASE  # those keep the tokens of a dynamic cache
    assert is_step(batch, **{CACHE: cache}) is not is_empty


@pytest.mark.parametrize("gating", Gating)
@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_a_short_prompt_is_exact_and_what_follows_is_guessed(
    build_moe: Callable[..., PreTrainedModel], architecture: str, gating: Gating
) -> None:
    model = build_moe(architecture)
    prompts = [prompt(1, 1), prompt(1, 5), prompt(3, 5), prompt(1, MOST), prompt(MOST, 1)]

    def turns(ids: torch.Tensor) -> list[torch.Tensor]:
        """Logits of a prompt, of another turn over its cache, of a prompt without a cache, and of a decode step."""
        cache, more = DynamicCache(config=model.config), torch.cat([ids, ids], dim=1)
        exact = [model(ids, **{CACHE: cache}).logits, model(more, **{CACHE: cache}).logits, model(ids).logits]
        return [*exact, model(ids[:, -1:], **{CACHE: cache}).logits]

    with torch.no_grad():
        expected = [turns(ids) for ids in prompts]
        with offloaded(model, policy="speculative", gating=gating, slots=3, device="cpu"):
            found = [turns(ids) for ids in prompts]
    same = [[torch.equal(*logits) for logits in zip(*pair, strict=True)] for pair in zip(found, expected, strict=True)]
    assert all(all(exact) for *exact, _ in same)
    *_, step_of_many = same[-1]
    # Where the experts on the device are those that the router wants, resident is exact as well.
    assert gating is Gating.RESIDENT or not step_of_many, "decode steps of up to 16 sequences are guessed"
