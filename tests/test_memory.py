"""What rows remember of the rows before them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from predict_train.predictors.memory import follows, memory_of, remembered

PLACES = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), max_size=12)
"""Sequence and position of rows, in any order, with gaps and repetitions."""


@given(places=PLACES, tokens=st.integers(1, 2), layers=st.integers(1, 3))
def test_a_row_remembers_the_tokens_right_before_it_in_its_sequence(places, tokens, layers):
    sequence, position = torch.tensor(places, dtype=torch.int32).view(-1, 2).T
    left = torch.rand(layers, len(places), 6) + 1
    found = remembered(left, follows(sequence, position), tokens)
    assert found.shape == (layers, len(places), tokens * 6)
    for row, (own, place) in enumerate(places):
        known = True
        for back in range(1, tokens + 1):
            known = known and row >= back and places[row - back] == (own, place - back)
            expected = left[:, row - back] if known else torch.zeros(layers, 6)
            assert torch.equal(found[:, row, (back - 1) * 6 : back * 6], expected)


def test_a_token_leaves_its_logits_and_the_error_of_the_guess():
    logits, guess = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    left = memory_of(logits, guess)
    assert torch.equal(left, torch.cat((logits, logits - guess), -1))
    assert memory_of(logits.bfloat16(), guess.bfloat16()).dtype == torch.float32
