"""Speculation of all layers at once is that of each layer by itself, whatever the model type."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from predict_train.data_collection import catalog
from predict_train.predictors.architecture import MoELayer, sources
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.errors import UserError
from predict_train.predictors.routing import Routing
from predict_train.predictors.speculation import Router, Speculator, Wiring, wire
from predict_train.predictors.stacked import StackedSpeculators
from torch import nn

ROWS = 12


def frozen_layers(model_type: str) -> list[MoELayer]:
    model = catalog.tiny_model(model_type)
    return find_moe_layers(model.requires_grad_(False))


def wirings_of(layers: list[MoELayer], generator: torch.Generator) -> dict[int, Wiring]:
    """As a trace's are, with random default vectors."""
    vectors = {x.index: torch.randn(x.num_experts, x.hidden_size, generator=generator) for x in layers}
    return wire(layers, sources(layers), vectors)


@pytest.mark.timeout(300)
def test_a_stack_of_any_model_type_is_its_layers():
    generator, seen = torch.Generator().manual_seed(0), 0
    for model_type in catalog.moe_types():
        try:
            layers = frozen_layers(model_type)
        except UserError:
            continue
        if any(layer.unfollowed for layer in layers):
            continue  # direct predictors guess these
        hidden, experts, top_k = layers[0].hidden_size, layers[0].num_experts, layers[0].top_k
        wirings = wirings_of(layers, generator)
        stack = StackedSpeculators(wirings.values(), hidden)
        residual, inner = torch.randn(2, len(layers), ROWS, hidden, generator=generator)
        weights, ids = torch.rand(len(layers), ROWS, experts, generator=generator).topk(top_k)
        quasi, normed = stack.states(residual, Routing(weights, weights, ids), list(inner))
        logits, routings = stack.logits(quasi), stack.route(quasi)
        for n, (target, source) in enumerate(sources(layers).items()):
            routing = None if source is None else Routing(weights[n], weights[n], ids[n])
            with torch.no_grad():
                speculator = Speculator(wirings[target])
                own = speculator.states(residual[n], routing, inner[n])
                decided = speculator(residual[n], routing, inner[n])
            for actual, expected in zip((quasi[n], normed[n]), own, strict=True):
                torch.testing.assert_close(actual, expected, msg=lambda text, name=model_type: f"{name}: {text}")
            spread = float(decided.logits.abs().max())
            torch.testing.assert_close(logits[n], decided.logits, rtol=1e-4, atol=1e-5 * spread)
            torch.testing.assert_close(routings[n].logits, decided.logits, rtol=1e-4, atol=1e-5 * spread)
            assert routings[n].ids.shape == (ROWS, top_k)
        seen += 1
    assert 3 * seen >= 2 * len(catalog.moe_types())


class Scaled(nn.Module):
    """A norm that is what its own attribute, and no weight of it, says."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.scale * state


class Gate(nn.Module):
    """A router whose logits are linear in the state, or not."""

    def __init__(self, hidden: int, experts: int, squashing: bool):
        super().__init__()
        self.gate, self.squash = nn.Linear(hidden, experts), torch.tanh if squashing else nn.Identity()

    def forward(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = self.squash(self.gate(state))
        return logits, *logits.topk(2)


@given(
    norms=st.lists(st.sampled_from(["layer", "rms", "small", "double"]), min_size=1, max_size=4),
    squashing=st.booleans(),
    vectors=st.lists(st.booleans(), min_size=4, max_size=4),
    rows=st.integers(0, 5),
)
def test_parts_that_can_not_be_batched_are_called_themselves(norms, squashing, vectors, rows):
    hidden, experts, layers = 8, 6, len(norms)
    made = {
        "layer": lambda: nn.LayerNorm(hidden),
        "rms": lambda: nn.RMSNorm(hidden, eps=1.0),
        "small": lambda: nn.RMSNorm(hidden, eps=1e-6),
        "double": lambda: Scaled(2.0 + torch.rand(()).item()),
    }
    parts = [
        Wiring(
            made[norm](),
            Router(Gate(hidden, experts, squashing)),
            torch.randn(experts, hidden) if has_vectors else None,
        )
        for norm, has_vectors in zip(norms, vectors, strict=False)
    ]
    stack = StackedSpeculators(parts, hidden)
    residual = torch.randn(layers, rows, hidden)
    weights, ids = torch.rand(layers, rows, experts).topk(2)
    quasi, normed = stack.states(residual, Routing(weights, weights, ids), [None] * layers)
    states = quasi.clone().requires_grad_()
    stack.logits(states).square().sum().backward()
    for n, part in enumerate(parts):
        with torch.no_grad():
            own = Speculator(part).states(residual[n], Routing(weights[n], weights[n], ids[n]))
        torch.testing.assert_close(quasi[n], own[0])
        torch.testing.assert_close(normed[n], own[1])
        state = quasi[n].clone().requires_grad_()
        part.router(state).logits.square().sum().backward()
        torch.testing.assert_close(stack.logits(quasi)[n], part.router(state).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(states.grad[n], state.grad, rtol=1e-3, atol=1e-3)
