"""`on_demand` and `prefetch` against plain transformers, bit for bit: all model types."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import UNTRAINED, build_model
from hypothesis import given, settings
from hypothesis import strategies as st
from predict_train.data_collection.catalog import examine, moe_types, tiny_model
from predict_train.predictors.architecture import UnsupportedModelError, moe_shape
from predict_train.predictors.checkpoint import Predictors, TargetLayer
from predict_train.predictors.direct import DirectMLP
from predict_train.predictors.discovery import Found, find_layers, find_moe_layers
from predict_train.predictors.generation import CACHE
from predict_train.runtime import Eviction, offload_experts, offloaded
from test_offload import AnyOrder, greedy, prompt
from transformers import PreTrainedModel

POLICIES = ("on_demand", "prefetch")
TOP_K = 2


def offloadable(model_type: str) -> tuple[PreTrainedModel, Found]:
    try:
        model = tiny_model(model_type)
        return model, find_layers(model)
    except UnsupportedModelError as error:
        pytest.skip(str(error))
    except Exception:
        support = examine(model_type)
        if support.offload is not None:
            pytest.skip(support.offload)
        raise


def supported_model(model_type: str) -> PreTrainedModel:
    """A tiny model whose experts can be offloaded and guessed."""
    model, _ = offloadable(model_type)
    try:
        find_moe_layers(model)
    except UnsupportedModelError as error:
        pytest.skip(str(error))
    return model


DTYPES = (torch.float32, torch.bfloat16)
PASSES = ((1, 7, 2), (3, 40, 0))
"""Sequences and tokens of prompts, and decode steps after them. With two experts a token, 120 tokens give an expert some 30 rows."""
LONG = ((3, 300, 1),)


@torch.no_grad()
def all_logits(model: PreTrainedModel, passes: Sequence[tuple[int, int, int]] = PASSES) -> list[torch.Tensor]:
    """Those of prompts, and of the tokens after each."""
    found = []
    for batch, length, steps in passes:
        output = model(prompt(batch, length), use_cache=True)
        found.append(output.logits)
        for _ in range(steps):
            cache = output[CACHE]
            output = model(output.logits[:, -1:].argmax(-1), **{CACHE: cache}, use_cache=True)
            found.append(output.logits)
    return found


def convert(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Converts a model as `from_pretrained` loads it: what it declares to need fp32 stays in fp32."""
    model.to(dtype)
    kept = {f".{name}." for name in getattr(model, "_keep_in_fp32_modules_strict", None) or ()}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and any(part in f".{name}." for part in kept):
            tensor.data = tensor.data.float()


def random_predictors(model: PreTrainedModel, found: Found) -> Predictors:
    """Direct predictors of all layers, since the experts of a model whose residual can't be followed are guessed by nothing else."""
    layers, generator = found.moe_layers, torch.Generator().manual_seed(0)
    entries = []
    for layer in layers:
        mlp = DirectMLP(layer.hidden_size, layer.num_experts, width=8, memory=1, top_k=layer.top_k)
        for parameter in mlp.parameters():
            parameter.data.normal_(0.0, 0.5, generator=generator)
        entries.append(TargetLayer(layer.index, mlp=mlp))
    return Predictors(model=moe_shape(model.config, layers), layers=entries)


@pytest.mark.parametrize("model_type", moe_types())
def test_every_model_type_has_the_logits_of_plain_transformers(model_type: str) -> None:
    """Bit for bit, under both policies where experts can be guessed at all. float16 takes the way of bfloat16; see below."""
    model, found = offloadable(model_type)
    is_guessed = found.unrecorded is None
    predictors = random_predictors(model, found) if is_guessed and found.unfollowed is not None else None
    total, top_k = sum(layer.stored for layer in found.layers), found.layers[0].top_k
    sizes = itertools.cycle((top_k, total // 2, top_k + 1, total))
    for dtype in DTYPES:
        convert(model, dtype)
        plain = all_logits(model)
        for policy, slots in zip(POLICIES if is_guessed else POLICIES[:1], sizes, strict=False):
            with offloaded(model, predictors, policy=policy, slots=slots, device="cpu") as offload:
                assert offload.config.policy == policy
                for number, (ours, theirs) in enumerate(zip(all_logits(model), plain, strict=True)):
                    assert torch.equal(ours, theirs), (dtype, policy, slots, number)


def test_long_prompts_have_the_logits_of_plain_transformers(build_moe: Callable[..., PreTrainedModel]) -> None:
    for dtype, architecture in itertools.product(DTYPES, ("qwen3_moe", "deepseek_v3", "gpt_oss")):
        model = build_moe(architecture).to(dtype)
        plain = all_logits(model, LONG)
        for policy, slots in zip(POLICIES, (TOP_K, 7), strict=True):
            with offloaded(model, policy=policy, slots=slots, device="cpu"):
                assert all(map(torch.equal, all_logits(model, LONG), plain))


def generated(model: PreTrainedModel, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    output: torch.Tensor = model.generate(
        ids,
        **({"attention_mask": torch.ones_like(ids)} | arguments),
        max_new_tokens=8,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output


def test_a_prompt_of_4096_tokens_through_k_slots(build_moe: Callable[..., PreTrainedModel]) -> None:
    model = build_moe("qwen3_moe", max_position_embeddings=5000)
    ids = prompt(1, 4096)
    expected = greedy(model, ids, 2)
    for policy in POLICIES:
        with offloaded(model, policy=policy, slots=TOP_K, device="cpu"):
            assert torch.equal(greedy(model, ids, 2), expected)


def alone_then_offloaded(models: list[PreTrainedModel], tokens: int) -> list[torch.Tensor]:
    """What each model says alone with everything resident. Afterwards each is offloaded, with three slots of its own."""
    expected = []
    for model in models:
        expected.append(greedy(model, prompt(1, 9), tokens))
        offload_experts(model, policy="prefetch", slots=3, device="cpu")
    return expected


def test_two_models_at_once(build_moe: Callable[..., PreTrainedModel]) -> None:
    models = [build_moe("qwen3_moe"), build_moe("mixtral")]
    alone = alone_then_offloaded(models, 6)
    caches: list[Any] = [None, None]
    tokens = [prompt(1, 9), prompt(1, 9)]
    for _ in range(6):  # token by token, in turn
        for i, model in enumerate(models):
            with torch.no_grad():
                output = model(tokens[i] if caches[i] is None else tokens[i][:, -1:], **{CACHE: caches[i]})
            caches[i] = output[CACHE]
            tokens[i] = torch.cat([tokens[i], output.logits[:, -1:].argmax(-1)], dim=1)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(tokens, alone, strict=True))


def test_an_assistant_may_be_offloaded_as_well(build_moe: Callable[..., PreTrainedModel]) -> None:
    """Two models in one call of `generate`, each with slots of its own."""
    model, assistant = build_moe("qwen3_moe"), build_moe("qwen3_moe", num_hidden_layers=2)
    arguments: dict[str, Any] = {"assistant_model": assistant, "do_sample": False}
    expected = generated(model, prompt(1, 6), **arguments)
    for mine, its in itertools.product(POLICIES, POLICIES):
        with (
            offloaded(model, policy=mine, slots=5, device="cpu"),
            offloaded(assistant, policy=its, slots=TOP_K, device="cpu") as offload,
        ):
            for _ in range(2):
                assert torch.equal(generated(model, prompt(1, 6), **arguments), expected)
            assert offload.counters.tokens > 0


def test_tokens_drafted_from_the_prompt_change_nothing(build_moe: Callable[..., PreTrainedModel]) -> None:
    model, ids = build_moe("qwen3_moe"), prompt(1, 5).repeat(1, 4)
    expected = generated(model, ids, do_sample=False)
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for policy in POLICIES:
        with offloaded(model, policy=policy, slots=5, device="cpu"):
            lengths.clear()
            assert torch.equal(generated(model, ids, do_sample=False, prompt_lookup_num_tokens=3), expected)
            assert any(1 < length < 5 for length in lengths[1:])  # some were drafted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_half_precision_is_exact_too(
    build_moe: Callable[..., PreTrainedModel], architecture: str, dtype: torch.dtype
) -> None:
    model = build_moe(architecture).to(dtype)
    for ids in (prompt(1, 7), prompt(3, 40)):
        expected = greedy(model, ids, 5)
        for policy, slots in zip((*POLICIES, "auto"), (TOP_K, 7, 5), strict=True):
            with offloaded(model, policy=policy, slots=slots, device="cpu"):
                assert torch.equal(greedy(model, ids, 5), expected), (policy, slots)


def test_two_models_in_two_threads(build_moe: Callable[..., PreTrainedModel]) -> None:
    models = [build_moe("qwen3_moe"), build_moe("gpt_oss")]
    expected = alone_then_offloaded(models, 20)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            outputs = list(pool.map(lambda model: greedy(model, prompt(1, 9), 20), models))
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
def test_threads_that_share_a_model_take_turns(tiny_moe: PreTrainedModel, policy: str) -> None:
    prompts = [prompt(1 + i % 2, 3 + i) for i in range(6)]
    expected = [greedy(tiny_moe, ids, 12) for ids in prompts]
    with offloaded(tiny_moe, policy=policy, slots=3, device="cpu"), ThreadPoolExecutor(3) as pool:
        outputs = list(pool.map(lambda ids: greedy(tiny_moe, ids, 12), prompts))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(outputs, expected, strict=True))


@contextmanager
def any_order(model: PreTrainedModel, delays: list[int], **arguments: Any) -> Iterator[None]:
    store = AnyOrder(find_moe_layers(model), delays)
    with offloaded(model, store=store, device="cpu", **arguments):
        yield


@pytest.fixture(scope="module")
def shared_model() -> PreTrainedModel:
    return build_model("qwen3_moe")


@functools.cache
def resident_tokens(model: PreTrainedModel, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A prompt, and what the resident model makes of it. Many examples are compared with these."""
    ids = prompt(batch, 5)
    return ids, greedy(model, ids, 5)


@given(
    delays=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    slots=st.integers(TOP_K, 14),
    readers=st.integers(1, 4),
    policy=st.sampled_from(POLICIES),
    batch=st.integers(1, 2),
    eviction=st.sampled_from(UNTRAINED),
    candidates=st.integers(TOP_K, 5),
    horizon=st.integers(1, 2),
)
@settings(max_examples=25)
def test_no_order_of_arrival_changes_a_token(
    shared_model: PreTrainedModel,
    delays: list[int],
    slots: int,
    readers: int,
    policy: str,
    batch: int,
    eviction: Eviction,
    candidates: int,
    horizon: int,
) -> None:
    ids, expected = resident_tokens(shared_model, batch)
    arguments = {"slots": slots, "readers": readers, "policy": policy, "eviction": eviction, "candidates": candidates}
    arguments["horizon"] = horizon
    with any_order(shared_model, delays, **arguments):
        assert torch.equal(greedy(shared_model, ids, 5), expected)
