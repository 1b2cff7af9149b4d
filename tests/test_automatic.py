"""Policy `auto`: it finds the faster of the two exact policies, whatever the first tokens took, and changes no token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from predict_train.runtime import load_offloaded, offloaded
from predict_train.runtime.automatic import BLOCK, BLOCKS, CLOSE_TRIED_AGAIN_AFTER, TRIED_AGAIN_AFTER, Trial
from predict_train.runtime.measure.stopwatch import Stopwatch
from test_gguf import MIXED, by_transformers, made, write
from test_offload import greedy, prompt
from test_price import decide_at_random
from test_quantized import logits
from test_shipped import SHIPPED
from transformers import AutoModelForCausalLM, PreTrainedModel


@given(st.floats(0.01, 10), st.floats(0.01, 10), st.lists(st.integers(0, BLOCK * BLOCKS - 1), max_size=4, unique=True))
def test_the_faster_policy_is_picked(demand: float, prefetch: float, interrupted: list[int]) -> None:
    """A few tokens may take any time: the first ones, for their experts, and any, since others use the machine too."""
    trial = Trial()
    seen = []
    for token in range(BLOCK * BLOCKS):
        seen.append(trial.prefetches)
        trial.took(60.0 if token <= BLOCK or token in interrupted else prefetch if trial.prefetches else demand)
    counted = seen[BLOCK:]
    assert counted.count(True) == counted.count(False)
    for _ in range(3):
        assert trial.prefetches == (prefetch < demand)
        trial.took(1e9)


@given(st.booleans(), st.floats(1.15, 2.0), st.floats(0.0, 10.0), st.floats(0.5, 0.9))
def test_slots_that_fill_meanwhile_mislead_nobody(prefetches: bool, slower: float, cold: float, falls: float) -> None:
    """The first tokens after a prompt wait for most of their experts, under either policy."""
    trial = Trial()
    for token in range(BLOCK * BLOCKS):
        own = 1.0 if trial.prefetches == prefetches else slower
        trial.took(own * (1 + cold * falls**token))
    assert trial.prefetches == prefetches


@pytest.mark.parametrize(("slower", "after"), [(2.0, TRIED_AGAIN_AFTER), (1.05, CLOSE_TRIED_AGAIN_AFTER)])
def test_it_tries_again_and_sooner_where_it_was_close(slower: float, after: int) -> None:
    trial = Trial()
    for cost in ({True: 1.0, False: slower}, {True: slower, False: 1.0}):
        for _ in range(BLOCK * BLOCKS):
            assert not trial.is_over
            trial.took(cost[trial.prefetches])
        for _ in range(after):
            assert trial.is_over
            assert trial.prefetches == (cost[True] < cost[False])
            trial.took(1.0)


def test_tokens_are_those_of_the_resident_model(tiny_moe: PreTrainedModel) -> None:
    tokens = BLOCK * BLOCKS + 12  # the trial, and what comes after it
    expected = greedy(tiny_moe, prompt(1, 6), tokens)
    with offloaded(tiny_moe, policy="auto", slots=5, device="cpu") as offload:
        stopwatch = Stopwatch()
        with offload.observed(stopwatch):
            assert torch.equal(greedy(tiny_moe, prompt(1, 6), tokens), expected)
        assert stopwatch.speculating > 0


def in_gguf(folder: Path) -> tuple[dict[str, Any], PreTrainedModel]:
    """Writes a GGUF file of several types. Returns how it is loaded, and the model that transformers widens."""
    write(made("qwen3_moe"), folder, MIXED)
    return {"gguf": "model.gguf"}, by_transformers(folder, torch.float32)


def as_shipped(kind: str) -> Callable[[Path], tuple[dict[str, Any], PreTrainedModel]]:
    def written(folder: Path) -> tuple[dict[str, Any], PreTrainedModel]:
        SHIPPED[kind][1](folder)
        return {}, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().float()

    return written


@pytest.mark.parametrize("write_model", [as_shipped("fp8, qwen3_moe"), as_shipped("mxfp4, gpt_oss"), in_gguf])
def test_experts_as_they_are_shipped_give_the_logits_of_the_widened_model(
    write_model: Callable[[Path], tuple[dict[str, Any], PreTrainedModel]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever copies are thought to be worth their price."""
    settings, widened = write_model(tmp_path)
    expected, said = logits(widened), set()
    for is_drawn in (False, True):
        if is_drawn:
            said = decide_at_random(monkeypatch)
        model = load_offloaded(tmp_path, policy="auto", dtype="float32", slots=5, device="cpu", **settings)
        assert torch.equal(logits(model), expected)
        assert model.expert_offload.counters.speculation_hit_rate is not None
        model.expert_offload.detach()
    assert said == {True, False}
