"""What predictors with a memory know at each step: that of the tokens before it in its own row, or nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import build_model
from predict_train.data_collection.hooks import Recorder
from predict_train.predictors.architecture import moe_shape
from predict_train.predictors.checkpoint import Predictors, TargetLayer, make_speculators
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.generation import CACHE
from predict_train.predictors.memory import memory_of, remembered
from predict_train.predictors.mlp import ResidualMLP
from predict_train.runtime import offloaded
from predict_train.runtime.guess import Guess, Guesser
from predict_train.runtime.measure.evaluate import evaluate
from predict_train.runtime.measure.settings import Evaluating
from predict_train.runtime.offload import ExpertOffload
from transformers import DynamicCache, PreTrainedModel, StaticCache

DEPTHS = 2, 1, 0, 2
"""How many tokens the predictor of each layer remembers."""


@pytest.fixture(params=["qwen3_moe", "qwen2_moe", "deepseek_v3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """One whose norms and routers are folded, one with a shared expert, and one with a router that chooses by groups."""
    found = build_model(request.param)
    found.generation_config.eos_token_id = None
    return found


def with_memory(model: PreTrainedModel) -> Predictors:
    """Random predictors, large enough to change guesses."""
    layers = find_moe_layers(model)
    torch.manual_seed(1)
    entries, vectors = [], {}
    for layer, depth in zip(layers, DEPTHS, strict=False):
        mlp = ResidualMLP(layer.hidden_size, layer.num_experts, 16, depth)
        for parameter in mlp.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        entries.append(TargetLayer(layer.index, mlp=mlp))
        vectors[layer.index] = torch.randn(layer.num_experts, layer.hidden_size)
    vectors.pop(layers[-1].index)
    return Predictors(model={"name": "tiny"} | moe_shape(model.config, layers), layers=entries, default_vectors=vectors)


@torch.no_grad()
def expected(model: PreTrainedModel, predictors: Predictors, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """For each layer with a memory what each token of one text remembers, computed from the whole text at once."""
    layers = find_moe_layers(model)
    speculators = make_speculators(model, predictors, layers)
    with Recorder(layers, [layer.index for layer in layers]) as recorder:
        model(ids.unsqueeze(0))
        records = recorder.take()
    found, source = {}, None
    for layer, depth in zip(layers, DEPTHS, strict=False):
        record = records[layer.index if source is None else source]
        reading = (record.input, None) if source is None else (record.residual, record.routing)
        _, free = speculators[layer.index].with_free(*reading)
        if free is not None:
            left = memory_of(records[layer.index].routing.logits, free)
            found[layer.index] = remembered(left, torch.arange(len(ids)) > 0, depth)
        source = layer.index
    return found


class Watching:
    """A guesser that notes what the tokens remember."""

    def __init__(self, guesser: Guesser, seen: list[torch.Tensor | None]):
        self.plain, self.depth, self._guesser, self._seen = guesser.plain, guesser.depth, guesser, seen

    def guess(self, residual: Any, source: Any, inner: Any, memory: torch.Tensor | None = None) -> Guess:
        self._seen.append(None if memory is None else memory.clone())
        return self._guesser.guess(residual, source, inner, memory)

    def ranks(self, logits: torch.Tensor) -> torch.Tensor:
        return self._guesser.ranks(logits)


@contextmanager
def watched(
    model: PreTrainedModel, **settings: Any
) -> Iterator[tuple[Predictors, dict[int, list[torch.Tensor | None]], ExpertOffload]]:
    """The model offloaded, and by layer what the tokens of each guess remember."""
    predictors = with_memory(model)
    seen: dict[int, list[torch.Tensor | None]] = {}
    with offloaded(model, predictors, **{"policy": "prefetch", "device": "cpu", "slots": 8} | settings) as offload:
        offload.guess_by(lambda index, guesser: Watching(guesser, seen.setdefault(index, [])))
        for noted in seen.values():
            noted.clear()
        yield predictors, seen, offload


def close(found: torch.Tensor | None, wanted: torch.Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def text(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 250, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
def test_each_step_remembers_its_own_row_in_a_batch_of_prompts_of_any_length(
    model: PreTrainedModel, cache_kind: str
) -> None:
    lengths, new = (1, 2, 3, 5, 8, 9, 4, 7), 4
    rows = [text(length, seed=length) for length in lengths]
    longest = max(lengths)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :], mask[number, longest - len(row) :] = row, 1
    with watched(model) as (predictors, seen, offload):
        static = {"cache_implementation": "static"} if cache_kind == "static" else {}
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **static)
        assert offload.counters.tokens
        noted = {index: [memory for memory in memories if memory is not None] for index, memories in seen.items()}
    for number, length in enumerate(lengths):
        wanted = expected(model, predictors, out[number, longest - length :])
        for index, memory in wanted.items():
            assert len(noted[index]) == new - 1
            for step, found in enumerate(noted[index]):
                close(found[number], memory[length + step])


def test_a_chat_goes_on_with_its_cache_and_another_one_begins_anew(model: PreTrainedModel) -> None:
    whole = text(1, 20)
    with watched(model) as (predictors, seen, _), torch.no_grad():
        cache, reached = DynamicCache(config=model.config), 0
        at = []
        for size in (5, 1, 1, 6, 1, 1, 1):  # a prompt, an answer, the next turn, an answer
            model(whole[:, reached : reached + size], **{CACHE: cache})
            if size == 1:
                at.append(reached)
            reached += size
        noted = {index: [memory for memory in memories if memory is not None] for index, memories in seen.items()}
        for memories in seen.values():
            memories.clear()
        other = DynamicCache(config=model.config)
        model(whole[:, :4], **{CACHE: other})
        model(whole[:, reached : reached + 1], **{CACHE: cache})
        for memories in seen.values():
            assert not any(memory is not None and memory.any() for memory in memories), "another text ran meanwhile"
    for index, memory in expected(model, predictors, whole[0]).items():
        assert len(noted[index]) == len(at)
        for position, found in zip(at, noted[index], strict=True):
            close(found[0], memory[position])


def changes(cache: Any) -> dict[str, Any]:
    return {
        "cropped": lambda: cache.crop(-1),
        "reordered": lambda: cache.reorder_cache(torch.tensor([1, 0])),
        "repeated": lambda: cache.batch_repeat_interleave(2),
        "selected": lambda: cache.batch_select_indices(torch.tensor([1])),
    }


@pytest.mark.parametrize("change", ["nothing", "cropped", "reordered", "repeated", "selected", "no cache", "a copy"])
def test_nothing_is_remembered_after_something_was_done_to_the_cache(model: PreTrainedModel, change: str) -> None:
    with watched(model) as (_, seen, _), torch.no_grad():
        cache: Any = DynamicCache(config=model.config)
        model(text(2, 6), **{CACHE: cache})
        model(text(2, 1), **{CACHE: cache})
        rows = {"repeated": 4, "selected": 1}.get(change, 2)
        if change in changes(cache):
            changes(cache)[change]()
        elif change == "a copy":
            cache = copy.deepcopy(cache)
        for memories in seen.values():
            memories.clear()
        if change == "no cache":
            model(text(2, 1), use_cache=False)
        else:
            model(text(rows, 1), **{CACHE: cache})
        remembers = any(memory is not None and memory.any() for memories in seen.values() for memory in memories)
        assert remembers == (change == "nothing")


def test_a_static_cache_that_was_reset_is_a_new_one(model: PreTrainedModel) -> None:
    with watched(model) as (_, seen, _), torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=16)
        for size in (6, 1, 1):
            model(text(1, size), **{CACHE: cache})
        assert any(memory is not None and memory.any() for memories in seen.values() for memory in memories)
        for memories in seen.values():
            memories.clear()
        cache.reset()
        model(text(1, 1), **{CACHE: cache})
        assert not any(memory is not None and memory.any() for memories in seen.values() for memory in memories)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {}, "beams": {"num_beams": 3}, "drafts": {"prompt_lookup_num_tokens": 3},
    "sampled": {"do_sample": True, "num_return_sequences": 2}, "several beams": {"num_beams": 4, "num_return_sequences": 2},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_exact_policies_stay_exact_and_speculated_texts_the_same_every_time(model: PreTrainedModel, way: str) -> None:
    ids = text(1, 3).repeat(1, 4)
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 9, "pad_token_id": 0, **WAYS[way]}

    def said() -> list[list[int]]:
        torch.manual_seed(0)
        return model.generate(ids, **asked).tolist()  # type: ignore[no-any-return]

    plain = said()
    for policy in ("prefetch", "speculative"):
        with watched(model, policy=policy) as (_, seen, _):
            texts = [said(), said()]
            assert texts[0] == texts[1]
            if policy == "prefetch":
                assert texts[0] == plain
            assert any(memory is not None and memory.any() for memories in seen.values() for memory in memories) or (
                way in ("beams", "several beams", "drafts")
            )


def test_evaluation_remembers_as_decoding_does(model: PreTrainedModel) -> None:
    rows = text(3, 14)
    predictors = with_memory(model)
    found = evaluate(model, [rows], predictors, Evaluating(slots=8, device="cpu"))
    rates = {layer["layer"]: layer["predictor"] for layer in found["layers"]}
    with offloaded(model, predictors, policy="prefetch", device="cpu", slots=8) as offload, torch.no_grad():
        cache = DynamicCache(config=model.config)
        for token in rows.split(1, 1):
            model(token, **{CACHE: cache})
        decoded = offload._control.hit_rates()
    assert decoded == pytest.approx(rates, abs=0.02)


def test_steps_find_their_memory_in_the_same_place(model: PreTrainedModel) -> None:
    """A captured step reads and writes the addresses that it was captured with."""
    places = set()
    with watched(model) as (_, _, offload), torch.no_grad():
        for _ in range(2):
            cache = DynamicCache(config=model.config)
            for size in (4, 1, 1):
                model(text(2, size), **{CACHE: cache})
                places.add(offload._control.memory._by_rows[2].data_ptr())
    assert len(places) == 1
