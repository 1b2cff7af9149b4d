"""Policy `auto`: it finds the faster of the two exact policies, whatever the first tokens took, and changes no token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from predict_train.runtime import offloaded
from predict_train.runtime.automatic import BLOCK, BLOCKS, CLOSE_TRIED_AGAIN_AFTER, TRIED_AGAIN_AFTER, Trial
from predict_train.runtime.measure.stopwatch import Stopwatch
from test_offload import greedy, prompt
from transformers import PreTrainedModel


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
