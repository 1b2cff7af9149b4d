"""Everything that `generate` can do, with experts offloaded against plain transformers, bit for bit."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import pytest
import torch
from conftest import IS_OLDER_RELEASE, build_model
from hypothesis import given, settings
from hypothesis import strategies as st
from predict_train.predictors.generation import CACHE
from predict_train.runtime import offloaded
from test_offload import prompt
from transformers import (
    AsyncTextIteratorStreamer,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.utils import ModelOutput

TYPES = "qwen3_moe", "gpt_oss"
AGAINST = [("on_demand", 2), ("prefetch", 12)]
"""Each way meets one of them with each type; any mix of arguments meets all."""


def generated(model: PreTrainedModel, ids: torch.Tensor, **arguments: Any) -> Any:
    """With plain draws; eight tokens, whatever they are."""
    torch.manual_seed(5)
    usual = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, **(usual | arguments))


def assistant(**config: Any) -> PreTrainedModel:
    return build_model("qwen3", num_hidden_layers=2, **config)


def padded(model: PreTrainedModel, _: Any) -> Any:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :6], mask[2, :1] = 0, 0
    return generated(model, prompt(3, 9), attention_mask=mask)


def another_turn(model: PreTrainedModel, _: Any) -> Any:
    first = generated(model, prompt(1, 6), return_dict_in_generate=True)
    ids = torch.cat([first.sequences, prompt(1, 4)], dim=1)
    return generated(model, ids, **{CACHE: first[CACHE]})


def printed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> str:
    with redirect_stdout(io.StringIO()) as out:
        generated(model, prompt(1, 6), streamer=TextStreamer(tokenizer))
    return out.getvalue()


def in_a_thread(model: PreTrainedModel, streamer: Any) -> threading.Thread:
    thread = threading.Thread(target=lambda: generated(model, prompt(1, 6), streamer=streamer))
    thread.start()
    return thread


def streamed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    thread = in_a_thread(model, streamer)
    texts = list(streamer)
    thread.join()
    return texts


def streamed_to_a_loop(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    async def listen() -> list[str]:
        streamer = AsyncTextIteratorStreamer(tokenizer, timeout=60)
        thread = in_a_thread(model, streamer)
        texts = [text async for text in streamer]
        thread.join()
        return texts

    return asyncio.run(listen())


def piped(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Any:
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    torch.manual_seed(5)
    texts = ["The stone", "River number 12 is"]
    return pipe(texts, batch_size=2, max_new_tokens=6, do_sample=True, num_return_sequences=2)


def batched_as_they_come(model: PreTrainedModel, _: Any) -> Any:
    if IS_OLDER_RELEASE:
        pytest.skip("older releases want a GPU for continuous batching")
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)  # by default it takes most of the memory
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=small, warmup=False)
    return [output.generated_tokens for output in outputs.values()]


def own_loop(model: PreTrainedModel, _: Any) -> Any:
    def loop(own: Any, input_ids: torch.Tensor, **rest: Any) -> Any:
        return own._sample(input_ids, **rest)

    return generated(model, prompt(1, 6), custom_generate=loop, do_sample=True)


Way = Callable[[PreTrainedModel, PreTrainedTokenizerFast], Any]
WAYS: dict[str, Way] = {
    "left padding": padded,
    "another turn": another_turn,
    "text streamer": printed,
    "iterator streamer": streamed,
    "async streamer": streamed_to_a_loop,
    "pipeline": piped,
    "continuous batching": batched_as_they_come,
    "own loop": own_loop,
    "no prompt": lambda model, _: model.generate(max_new_tokens=8, bos_token_id=3, pad_token_id=0),
    "embeddings": lambda model, _: model.generate(
        inputs_embeds=model.get_input_embeddings()(prompt(2, 6)).detach(), max_new_tokens=8, pad_token_id=0
    ),
    "assistant": lambda model, _: generated(model, prompt(1, 6), assistant_model=assistant(), do_sample=True),
    "its own assistant": lambda model, _: generated(model, prompt(1, 6), assistant_model=model),
    "assistant with another tokenizer": lambda model, tokenizer: generated(
        model,
        prompt(1, 6),
        assistant_model=assistant(vocab_size=260),
        tokenizer=tokenizer,
        assistant_tokenizer=tokenizer,
    ),
    "prompt lookup": lambda model, _: generated(model, prompt(1, 3).repeat(1, 5), prompt_lookup_num_tokens=3),
    "guidance": lambda model, _: generated(model, prompt(2, 6), guidance_scale=2.0, negative_prompt_ids=prompt(2, 4)),
    "stop strings": lambda model, tokenizer: generated(
        model, prompt(2, 6), stop_strings=["a", "l"], tokenizer=tokenizer, do_sample=True, temperature=3.0
    ),
    "allowed tokens": lambda model, _: generated(
        model, prompt(2, 6), num_beams=2, prefix_allowed_tokens_fn=lambda *_: [5, 6, 7, 8]
    ),
}


def tensors(found: Any) -> list[Any]:
    """The parts of a result that can be compared."""
    if isinstance(found, ModelOutput):
        found = [value for name, value in found.items() if name != CACHE]
    if isinstance(found, list | tuple):
        return [part for value in found for part in tensors(value)]
    return [found.tolist() if isinstance(found, torch.Tensor) else found]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", TYPES)
def test_every_way_to_generate(tokenizer: PreTrainedTokenizerFast, architecture: str, way: str) -> None:
    model = build_model(architecture)
    expected = tensors(WAYS[way](model, tokenizer))
    policy, slots = AGAINST[TYPES.index(architecture)]
    with offloaded(model, policy=policy, slots=slots, device="cpu"):
        assert tensors(WAYS[way](model, tokenizer)) == expected


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {architecture: build_model(architecture) for architecture in TYPES}


MODES: list[dict[str, Any]] = [
    {"do_sample": False}, {"do_sample": True, "temperature": 2.0}, {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 2, "do_sample": True, "length_penalty": 0.5, "early_stopping": True}, {"prompt_lookup_num_tokens": 2},
    {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
]  # fmt: skip
CACHES: list[dict[str, Any]] = [
    {}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2}, {"prefill_chunk_size": 3},
    {"cache_implementation": "static", "prefill_chunk_size": 4},
]  # fmt: skip
SCORES: list[dict[str, Any]] = [
    {}, {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2}, {"guidance_scale": 1.5}, {"min_p": 0.2, "top_h": 0.6},
    {"suppress_tokens": list(range(40, 120))}, {"eos_token_id": list(range(128)), "min_new_tokens": 3},
]  # fmt: skip
OUTPUTS: list[dict[str, Any]] = [
    {}, {"output_scores": True, "output_logits": True}, {"output_hidden_states": True}, {"output_router_logits": True},
]  # fmt: skip


@given(
    architecture=st.sampled_from(TYPES),
    asked=st.tuples(*map(st.sampled_from, (MODES, CACHES, SCORES, OUTPUTS))),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9)),
    against=st.sampled_from(AGAINST),
    data=st.data(),
)
@settings(max_examples=15)
def test_any_mix_of_arguments(
    models: dict[str, PreTrainedModel],
    architecture: str,
    asked: tuple[dict[str, Any], ...],
    shape: tuple[int, int],
    against: tuple[str, int],
    data: st.DataObject,
) -> None:
    """Tokens, scores, logits and hidden states are those of plain transformers, and so is what it refuses."""
    model, (batch, length) = models[architecture], shape
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in mask:
        row[: data.draw(st.integers(0, length - 1))] = 0
    arguments = {"attention_mask": mask, "return_dict_in_generate": True}
    for part in asked:
        arguments |= part

    def outcome() -> Any:
        try:
            return tensors(generated(model, prompt(batch, length), **arguments))
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            return type(error), str(error)

    expected, (policy, slots) = outcome(), against
    with offloaded(model, policy=policy, slots=slots, device="cpu"):
        assert outcome() == expected
        assert outcome() == expected, "over what the first time has left in the slots"
