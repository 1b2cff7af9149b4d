"""A folded speculator names the candidates of the one that it was folded from, and only plain routers are folded."""

from __future__ import annotations

import warnings
from functools import cache

import pytest
import torch
from conftest import skip_if_lacking
from predict_train.data_collection import catalog
from predict_train.predictors.architecture import MoELayer, UnsupportedModelError
from predict_train.predictors.direct import DirectMLP
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.folded import FoldedDirect, FoldedSpeculator, PlainRouter
from predict_train.predictors.mlp import ResidualMLP
from predict_train.predictors.routing import Routing
from predict_train.predictors.speculation import Router, Speculator, Wiring, candidates
from predict_train.runtime.restricted import RestrictedChoice, fixed

PLAIN = {"qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss", "jamba", "granitemoe"}


def layers_of(model_type: str, seed: int = 0) -> list[MoELayer]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = catalog.tiny_model(model_type, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for module in model.modules():  # gains, biases and corrections start as ones and zeros, which would hide them
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.data += 0.3 * torch.randn(tensor.shape, generator=generator)
    return find_moe_layers(model)


@cache
def last_layer(model_type: str) -> MoELayer:
    """The last MoE layer of a random model of that type, which no test changes; a type that is not supported is skipped."""
    try:
        return layers_of(model_type)[-1]
    except UnsupportedModelError:
        pytest.skip("not supported")


def speculator_of(layer: MoELayer, seed: int, trained: bool, has_vectors: bool = True, memory: int = 0) -> Speculator:
    torch.manual_seed(seed)
    mlp = None
    if trained:
        mlp = ResidualMLP(layer.hidden_size, layer.num_experts, 24, memory)
        for parameter in mlp.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    vectors = torch.randn(layer.num_experts, layer.hidden_size) if has_vectors else None
    return Speculator(Wiring(layer.norm, Router.of(layer), vectors), mlp).requires_grad_(False)


def routing_of(layer: MoELayer, tokens: int, generator: torch.Generator) -> Routing:
    logits = torch.randn(tokens, layer.num_experts, generator=generator)
    values, ids = logits.topk(layer.top_k, dim=-1)
    return Routing(logits, values.softmax(-1), ids)


@pytest.mark.parametrize("model_type", catalog.moe_types())
def test_it_is_the_speculator_to_rounding(model_type: str) -> None:
    layer = last_layer(model_type)
    generator = torch.Generator().manual_seed(5)
    folded_any = False
    for trained in (False, True):
        speculator = speculator_of(layer, 3, trained)
        folded = FoldedSpeculator.of(speculator, layer)
        if folded is None:
            continue
        folded_any = True
        # Behind the choice a speculator ranks by logits; a router that adds a bias to them is ranked by the sum here.
        m = min(layer.top_k + 2 * (model_type in PLAIN), layer.num_experts)
        for tokens in (1, 1, 1, 200):
            residual = 0.5 * torch.randn(tokens, layer.hidden_size, generator=generator)
            for source in (routing_of(layer, tokens, generator), None):
                expected = candidates(speculator(residual, source), m).sort(-1).values
                named = folded.logits(residual, source)[0].topk(m).indices.sort(-1).values
                assert named.shape == expected.shape
                # A tie to rounding may be decided either way.
                assert (named == expected).all(-1).float().mean() >= (1.0 if tokens == 1 else 0.98)
    if model_type in PLAIN:
        assert folded_any, "this router is plain"


@pytest.mark.parametrize("has_vectors", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("model_type", sorted(PLAIN))
def test_to_scale_it_weights_its_guess_as_the_speculator_does(
    model_type: str, trained: bool, has_vectors: bool
) -> None:
    skip_if_lacking(model_type)
    layer = layers_of(model_type)[-1]
    speculator = speculator_of(layer, 3, trained, has_vectors)
    if speculator.mlp is not None:  # as training begins: nothing here may rest on a bias that is not zero
        torch.nn.init.zeros_(speculator.mlp.b1)
        torch.nn.init.zeros_(speculator.mlp.b2)
    folded, ordered = (FoldedSpeculator.of(speculator, layer, to_scale=to_scale) for to_scale in (True, False))
    assert folded is not None
    assert ordered is not None
    generator = torch.Generator().manual_seed(9)
    residual = 0.5 * torch.randn(50, layer.hidden_size, generator=generator)
    for source in (routing_of(layer, 50, generator), None):
        with torch.no_grad():
            expected = speculator(residual, source)
        logits, _ = folded.logits(residual, source)
        assert not logits.requires_grad
        weighted = folded.router.weighted(logits, expected.ids.long())
        torch.testing.assert_close(weighted.weights, expected.weights, rtol=1e-3, atol=1e-4)
        same = ordered.logits(residual, source)[0].topk(layer.top_k).indices == logits.topk(layer.top_k).indices
        assert same.all(-1).float().mean() >= 0.98


@pytest.mark.parametrize("model_type", catalog.moe_types())
def test_with_a_memory_its_logits_are_those_of_the_speculator(model_type: str) -> None:
    """The training-free ones too, since a memory is made of them; so routers whose logits are others are not folded."""
    layer = last_layer(model_type)
    for memory, has_vectors in ((1, False), (2, True)):
        speculator = speculator_of(layer, 3, True, has_vectors, memory)
        folded = FoldedSpeculator.of(speculator, layer)
        if folded is None:
            assert model_type not in PLAIN, "this router is plain"
            return
        free = Speculator(speculator.wiring)
        generator = torch.Generator().manual_seed(9)
        residual = 0.5 * torch.randn(9, layer.hidden_size, generator=generator)
        left = torch.randn(9, memory * 2 * layer.num_experts, generator=generator)
        with torch.no_grad():
            for source in (routing_of(layer, 9, generator), None):
                for remembers in (left, torch.zeros_like(left), None):
                    routing, guess = speculator.with_free(residual, source, None, remembers)
                    torch.testing.assert_close(speculator(residual, source, None, remembers), routing)
                    assert guess is not None
                    torch.testing.assert_close(guess, free(residual, source).logits, rtol=1e-4, atol=1e-4)
                    logits, own = folded.logits(residual, source, remembers)
                    torch.testing.assert_close(logits.float(), routing.logits.float(), rtol=1e-3, atol=1e-3)
                    torch.testing.assert_close(own.float(), guess.float(), rtol=1e-3, atol=1e-3)


def test_without_a_memory_there_are_no_training_free_logits() -> None:
    layer, generator = layers_of("qwen3_moe")[-1], torch.Generator().manual_seed(9)
    residual, source = torch.randn(3, layer.hidden_size, generator=generator), routing_of(layer, 3, generator)
    for trained in (False, True):
        speculator = speculator_of(layer, 3, trained)
        folded = FoldedSpeculator.of(speculator, layer)
        assert folded is not None
        assert folded.logits(residual, source)[1] is speculator.with_free(residual, source)[1] is None


@pytest.mark.parametrize("trained", [False, True])
def test_in_half_precision_large_states_have_weights_too(trained: bool) -> None:
    """Some models' residuals have entries in the thousands, of which float16 may not hold a product."""
    layer = layers_of("qwen3_moe")[-1]
    generator = torch.Generator().manual_seed(10)
    residual, source = torch.randn(50, layer.hidden_size, generator=generator), routing_of(layer, 50, generator)
    residual[:, 3] = 6000.0
    with torch.no_grad():
        largest = speculator_of(layer, 3, trained)(residual, source).logits.abs().max()
        layer.router.weight *= 20 / largest
    layer.norm.half(), layer.router.half()
    speculator = speculator_of(layer, 3, trained)
    if speculator.mlp is not None:
        speculator.mlp.half()
    folded = FoldedSpeculator.of(speculator, layer, to_scale=True)
    assert folded is not None
    halved = Routing(source.logits.half(), source.weights.half(), source.ids)
    with torch.no_grad():
        expected = speculator(residual.half(), halved)
    weighted = folded.router.weighted(folded.logits(residual.half(), halved)[0], expected.ids.long())
    torch.testing.assert_close(weighted.weights.float(), expected.weights.float(), rtol=0, atol=0.1)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe", "minimax_m2"])
def test_a_router_that_corrects_its_choice_is_not_folded(model_type: str) -> None:
    layer = layers_of(model_type)[-1]
    assert FoldedSpeculator.of(speculator_of(layer, 0, trained=True), layer) is None


def test_in_bfloat16_the_same_experts_are_found() -> None:
    layer = layers_of("qwen3_moe")[-1]
    exact = speculator_of(layer, 3, trained=True)
    generator = torch.Generator().manual_seed(6)
    residual, source = torch.randn(400, layer.hidden_size, generator=generator), routing_of(layer, 400, generator)
    true = exact(residual, source).ids
    layer.norm.bfloat16(), layer.router.bfloat16()
    speculator = speculator_of(layer, 3, trained=True)
    assert speculator.mlp is not None
    speculator.mlp.bfloat16()
    folded = FoldedSpeculator.of(speculator, layer)
    assert folded is not None

    def recall(ids: torch.Tensor) -> float:
        return (true.unsqueeze(-1) == ids.unsqueeze(-2)).any(-1).float().mean().item()

    rounded = Routing(source.logits.bfloat16(), source.weights.bfloat16(), source.ids)
    in_bf16 = recall(speculator(residual.bfloat16(), rounded).ids)
    assert recall(folded.logits(residual.bfloat16(), rounded)[0].topk(layer.top_k).indices) >= in_bf16 - 0.01


@pytest.mark.parametrize("model_type", catalog.moe_types())
def test_a_plain_router_weights_what_it_must_choose_as_it_does(model_type: str) -> None:
    """Of what it chose itself the weights are its own, and of other experts those that its restricted choice gives."""
    layer = last_layer(model_type)
    if layer.unfollowed:
        pytest.skip("direct predictors guess it")
    states = torch.randn(64, layer.hidden_size, generator=torch.Generator().manual_seed(7))
    router = Router.of(layer)
    plain = PlainRouter.of(router, layer.num_experts, states)
    if plain is None or plain.weigh is None:
        assert model_type not in {"qwen3_moe", "mixtral", "olmoe", "gpt_oss"}
        return
    with torch.no_grad():
        own = router.forward(states[:9])
        logits = plain.logits(states[:9])
        torch.testing.assert_close(plain.weighted(logits, own.ids.long()).weights, own.weights, rtol=1e-4, atol=1e-5)
        ids = torch.rand(9, layer.num_experts, generator=torch.Generator().manual_seed(8)).topk(layer.top_k).indices
        choose = fixed(ids)
        with RestrictedChoice((9, layer.num_experts), layer.top_k, choose) as choice:
            restricted = router.forward(states[:9])
        assert choice.free_ids is not None
        forced = plain.weighted(logits, ids)
    assert torch.equal(forced.ids, restricted.ids)
    torch.testing.assert_close(forced.weights, restricted.weights, rtol=1e-4, atol=1e-5)


def direct_speculator(layer: MoELayer, seed: int, memory: int = 0) -> Speculator:
    torch.manual_seed(seed)
    mlp = DirectMLP(layer.hidden_size, layer.num_experts, 24, memory, layer.top_k)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return Speculator(Wiring.of(layer, None, None), mlp).requires_grad_(False)


@pytest.mark.parametrize("model_type", catalog.moe_types())
def test_a_direct_predictor_is_folded_with_every_router(model_type: str) -> None:
    layer, generator = last_layer(model_type), torch.Generator().manual_seed(9)
    for memory in (0, 2):
        speculator = direct_speculator(layer, 3, memory)
        folded = FoldedDirect.of(speculator, layer)
        if folded is None:
            assert layer.unfollowed is None
            assert model_type not in PLAIN, "this norm is plain"
            return
        left = torch.randn(9, memory * 2 * layer.num_experts, generator=generator)
        for tokens in (1, 9):
            residual = 0.5 * torch.randn(tokens, layer.hidden_size, generator=generator)
            for source in (routing_of(layer, tokens, generator), None):
                for remembers in (left[:tokens], None) if memory else (None,):
                    expected, guess = speculator.with_free(residual, source, None, remembers)
                    scores, own = folded.logits(residual, source, remembers)
                    torch.testing.assert_close(scores, expected.logits, rtol=1e-3, atol=1e-3)
                    assert (guess is None) == (own is None) == (memory == 0)
                    assert own is None or not own.any()
