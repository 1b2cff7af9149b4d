from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from predict_train.predictors.direct import STACKS, DirectMLP, StackedDirectMLPs, prior_of
from predict_train.predictors.forms import Form, Stack
from predict_train.predictors.mlp import ResidualMLP, StackedResidualMLPs


def randomise(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)


def training_steps(stack: Stack, steps: int) -> None:
    layers, hidden, experts = stack.w1.shape[0], stack.w1.shape[2], stack.v.shape[2]
    optimizer = torch.optim.AdamW(stack.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        widths = [hidden, hidden, experts, *([stack.u.shape[2]] if stack.memory else [])]
        inputs = [torch.randn(layers, 7, width) for width in widths]  # the first is the quasi-hidden state
        (stack(*inputs) - 1).square().sum().backward()
        optimizer.step()


@given(
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    hidden=st.integers(1, 9),
    experts=st.integers(1, 9),
    rows=st.integers(0, 5),
    memory=st.integers(0, 2),
    form=st.sampled_from(list(Form)),
)
def test_a_layer_of_the_stack_is_its_slice_whatever_its_width(widths, hidden, experts, rows, memory, form):
    layers, stack = len(widths), STACKS[form](widths, hidden, experts, memory)
    training_steps(stack, 3)
    singles = [stack.layer(number) for number in range(layers)]
    assert [single.width for single in singles] == widths
    assert {single.memory for single in singles} == {memory}
    assert stack.count() == sum(p.numel() for single in singles for p in single.parameters())
    quasi, normed = torch.randn(2, layers, rows, hidden)
    mixture, remembers = torch.randn(layers, rows, experts), torch.randn(layers, rows, memory * 2 * experts)
    mixture[0] = 0  # as of a layer without a source
    for some in (remembers, 0 * remembers) if memory else (None,):
        expected = stack(quasi, normed, mixture, some)
        for number, single in enumerate(singles):
            own = None if some is None or not some.any() else some[number]  # zeros are nothing remembered
            actual = single(quasi[number], normed[number], mixture[number] if number else None, own)
            torch.testing.assert_close(actual, expected[number], rtol=1e-4, atol=1e-4)


def test_an_untrained_predictor_changes_nothing():
    quasi, normed = torch.randn(2, 3, 5, 8)
    mixture = torch.randn(3, 5, 4)
    assert torch.equal(StackedResidualMLPs([16] * 3, 8, 4)(quasi, normed, mixture), quasi)
    assert torch.equal(ResidualMLP(8, 4, 16)(quasi[0], normed[0], mixture[0]), quasi[0])


def test_an_untrained_predictor_can_learn_and_its_copy_is_one():
    stack = StackedResidualMLPs([16] * 2, 8, 4)
    quasi, normed = torch.randn(2, 2, 5, 8)
    stack(quasi, normed, torch.randn(2, 5, 4)).square().sum().backward()
    assert stack.w2.grad is not None
    assert stack.w2.grad.abs().sum() > 0
    copy = stack.layer(0)
    randomise(copy, seed=2)
    assert torch.equal(stack.w2, torch.zeros_like(stack.w2))


def test_an_untrained_direct_predictor_guesses_what_is_used_most():
    counts = torch.tensor([[3, 9, 0, 5], [1, 2, 8, 4]])
    stack = StackedDirectMLPs([16] * 2, 8, 4, memory=1, top_k=2)
    stack.prior.data = prior_of(counts)
    quasi, normed = torch.randn(2, 2, 5, 8)
    scores = stack(quasi, normed, torch.randn(2, 5, 4))
    assert torch.equal(scores, stack.prior.unsqueeze(1).expand_as(scores))
    training_steps(stack, 3)
    assert torch.equal(stack.prior, prior_of(counts))
    for number, single in enumerate(map(stack.layer, range(2))):
        assert isinstance(single, DirectMLP)
        left = single.untrained()
        routing, free = left.speculate(None, quasi[0], normed[0], torch.randn(5, 4))
        assert routing.ids.tolist() == [counts[number].topk(2).indices.tolist()] * 5
        assert free is None
        assert not torch.equal(single(quasi[0], normed[0], None), left(quasi[0], normed[0], None))
