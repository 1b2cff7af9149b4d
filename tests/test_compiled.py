"""Offloaded models through `torch.compile(model.forward, fullgraph=True)`: the same logits as eagerly, and the same counts."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import skip_if_lacking
from predict_train.data_collection.catalog import tiny_model
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.errors import UserError
from predict_train.predictors.generation import CACHE
from predict_train.runtime import offload_experts, offloaded, operations
from predict_train.runtime.automatic import BLOCK, BLOCKS, Trial
from predict_train.runtime.errors import OffloadError
from predict_train.runtime.observer import Observer
from test_offload import greedy, prompt
from test_policy import direct, with_default_vectors
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import PreTrainedModel, StaticCache

CASES = [
    ("qwen3_moe", "on_demand", "true", "eager"),
    ("qwen2_moe", "speculative", "true", "aot_eager"),
    ("deepseek_v3", "speculative", "resident", "eager"),
    ("gpt_oss", "prefetch", "true", "eager"),
    ("mixtral", "speculative", "speculated", "eager"),
]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No test sees what another one has compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: PreTrainedModel, backend: Any = "aot_eager", **options: Any) -> Any:
    return torch.compile(model.forward, fullgraph=True, backend=backend, **options)


class Events(Observer):
    """Counts what it is told of each layer."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def executed(self, layer: int, begin: float, end: float) -> None:
        assert begin <= end
        self.seen.append(("executed", layer))

    def routed(self, layer: int, begin: float, end: float) -> None:
        assert begin <= end
        self.seen.append(("routed", layer))

    def guessed(self, target: int, begin: float, end: float) -> None:
        assert begin <= end
        self.seen.append(("guessed", target))

    def controlled(self, layer: int, begin: float, end: float) -> None:
        assert begin <= end
        self.seen.append(("controlled", layer))


def run(model: PreTrainedModel, forward: Callable[..., Any], ids: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
    """Logits, and all that is counted or told."""
    offload, events = model.expert_offload, Events()
    offload.reset()
    with offload.observed(events), torch.no_grad():
        logits = forward(ids).logits
    return logits, [events.seen, offload.counters.tokens, offload.counters.speculation_hit_rate]


@pytest.mark.parametrize(("architecture", "policy", "gating", "backend"), CASES)
def test_logits_counts_and_events_are_those_of_the_eager_model(
    build_moe: Callable[..., PreTrainedModel], architecture: str, policy: str, gating: str, backend: str
) -> None:
    model, ids, found = (
        build_moe(architecture, num_hidden_layers=3 if architecture == "deepseek_v3" else 2),
        prompt(2, 3),
        [],
    )
    for compiles in (False, True):
        with offloaded(model, policy=policy, gating=gating, slots=16, device="cpu"):
            run(model, model, prompt(2, 40))  # leaves all experts in slots
            forward = compiled(model, backend) if compiles else model
            found += [run(model, forward, ids), run(model, forward, ids.flip(1))]
    for eager, same in zip(found[:2], found[2:], strict=True):
        assert torch.equal(same[0], eager[0])
        assert same[1] == eager[1]


def test_guesses_of_direct_predictors_are_those_of_the_eager_model() -> None:
    """Routers are compiled where they may return more than a routing."""
    skip_if_lacking("gemma4_text")
    model, ids, found = tiny_model("gemma4_text").float().eval(), prompt(2, 3), []
    predictors = direct(model)
    for compiles in (False, True):
        with offloaded(model, predictors, policy="prefetch", slots=16, device="cpu"):
            run(model, model, prompt(2, 40))
            forward = compiled(model, "eager") if compiles else model
            found += [run(model, forward, ids), run(model, forward, ids.flip(1))]
    for eager, same in zip(found[:2], found[2:], strict=True):
        assert torch.equal(same[0], eager[0])
        assert same[1] == eager[1]
        assert same[1][2] is not None
    with (
        offloaded(model, predictors, policy="speculative", slots=16, device="cpu"),
        pytest.raises(Exception, match="can't be compiled with a model whose residual"),
        torch.no_grad(),
    ):
        compiled(model)(ids)


def noting(seen: set[str]) -> Callable[..., Any]:
    """A backend that adds the names of the runtime's operations in each graph to `seen`."""

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        names = (str(node.target) for node in graph.graph.nodes)
        seen.update(name.split(".")[1] for name in names if name.startswith("predict_train."))
        return graph

    return backend


def decoded(
    model: PreTrainedModel, step: Callable[..., Any], sequences: int, steps: int = 8
) -> tuple[torch.Tensor, list[Any]]:
    """The logits of a few decode steps over a static cache, and what is counted in them."""
    ids, offload = prompt(sequences, 12), model.expert_offload
    cache = StaticCache(model.config, max_cache_len=12)
    with torch.no_grad():
        model(ids[:, :4], **{CACHE: cache}, use_cache=True)
        offload.reset()
        logits = [step(ids[:, n : n + 1], **{CACHE: cache}, use_cache=True).logits for n in range(4, 4 + steps)]
    counters = offload.counters
    return torch.cat(logits, 1), [counters.tokens, counters.hits, counters.misses, counters.speculation_hit_rate]


IN_GRAPH, BY_OPERATION = {"begin", "entered", "decided", "experts"}, {"begin", "enter", "route", "experts"}


@pytest.mark.parametrize(
    ("architecture", "policy", "gating", "horizon", "sequences", "expected"),
    [
        ("qwen3_moe", "speculative", "true", 1, 1, IN_GRAPH),
        ("qwen3_moe", "prefetch", "true", 2, 2, IN_GRAPH),
        ("qwen2_moe", "speculative", "true", 2, 1, IN_GRAPH),  # its shared experts belong to the residual
        ("mixtral", "speculative", "speculated", 1, 3, IN_GRAPH),
        ("qwen3_moe", "speculative", "resident", 1, 1, BY_OPERATION),
        ("qwen3_moe", "auto", "true", 1, 1, BY_OPERATION),
        ("deepseek_v3", "speculative", "true", 1, 1, BY_OPERATION),
    ],
)
def test_decode_steps_are_the_eager_ones(
    build_moe: Callable[..., PreTrainedModel],
    architecture: str,
    policy: str,
    gating: str,
    horizon: int,
    sequences: int,
    expected: set[str],
) -> None:
    """Guesses and decisions are in the graph where neither asks the host for anything."""
    model, found = build_moe(architecture, num_hidden_layers=4 if architecture == "deepseek_v3" else 3), []
    seen: set[str] = set()

    for compiles in (False, True):
        settings = {"policy": policy, "gating": gating, "horizon": horizon, "slots": 24, "device": "cpu"}
        predictors = with_default_vectors(model) if horizon == 1 else None
        with offloaded(model, predictors, **settings), torch.no_grad():
            for seed in range(3):
                model(prompt(2, 40 + seed))  # leaves all experts in slots
            found.append(decoded(model, compiled(model, noting(seen)) if compiles else model, sequences))
    # A compiler takes `addcdiv` apart, so the weights that a guess says are rounded otherwise.
    rounding = 1e-5 if gating == "speculated" else 0
    torch.testing.assert_close(found[1][0], found[0][0], rtol=rounding, atol=rounding)
    if policy != "auto":  # it decides by the clock
        assert found[1][1] == found[0][1]
    assert seen == expected


@pytest.mark.parametrize("parts", ["layers", "what can be traced"])
def test_guesses_of_a_model_that_is_compiled_in_parts_are_in_no_graph(
    parts: str, build_moe: Callable[..., PreTrainedModel]
) -> None:
    """A guess and its decision may be in graphs of different passes then."""
    model, found = build_moe("qwen3_moe", num_hidden_layers=2), []
    seen: set[str] = set()

    for compiles in (False, True):
        with offloaded(model, policy="speculative", gating="true", slots=16, device="cpu"), torch.no_grad():
            model(prompt(2, 40))
            step: Callable[..., Any] = model
            if compiles and parts == "layers":
                for layer in model.model.layers:
                    layer.compile(backend=noting(seen))
            elif compiles:
                hook = model.model.layers[0].self_attn.register_forward_hook(lambda *_: torch._dynamo.graph_break())
                step = torch.compile(model.forward, backend=noting(seen))
            found.append(decoded(model, step, 1, steps=3))
    if parts == "layers":
        for layer in model.model.layers:
            layer._compiled_call_impl = None
    else:
        hook.remove()
    assert torch.equal(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]
    assert "experts" in seen
    assert not seen & {"entered", "decided"}


@pytest.mark.gpu
@pytest.mark.parametrize(("architecture", "policy", "gating", "backend"), CASES)
def test_compiled_decode_steps_on_a_gpu_are_the_eager_ones(
    build_moe: Callable[..., PreTrainedModel], architecture: str, policy: str, gating: str, backend: str
) -> None:
    """The device decides in both. In the eager steps nothing is captured, and all experts are in slots before."""
    model, found = build_moe(architecture, num_hidden_layers=3), []
    ids, layers = prompt(1, 40).to("cuda"), find_moe_layers(model)
    slots = len(layers) * layers[0].num_experts
    for compiles in (False, True):
        with (
            offloaded(model, policy=policy, gating=gating, slots=slots, device="cuda") as offload,
            torch.no_grad(),
        ):
            assert offload.why_host is None
            offload._graphs = None
            step = compiled(model, backend, dynamic=True) if compiles else model
            cache = model(ids, use_cache=True)[CACHE]
            found.append(torch.cat([step(ids[:, n : n + 1], **{CACHE: cache}).logits for n in range(9)]))
    assert torch.equal(*found)


def test_one_graph_is_enough_for_prompts_of_any_length(build_moe: Callable[..., PreTrainedModel]) -> None:
    """Also for those that are too long to be speculated on."""
    model, graphs = build_moe("qwen3_moe", num_hidden_layers=2), CompileCounterWithBackend("eager")
    with offloaded(model, policy="prefetch", slots=6, device="cpu"):
        forward = compiled(model, graphs, dynamic=True)
        for ids in (prompt(2, 3), prompt(2, 40), prompt(2, 7)):
            (logits, told), (expected, eager) = run(model, forward, ids), run(model, model, ids)
            assert torch.equal(logits, expected)
            assert told == eager
    assert graphs.frame_count == 1


def test_decoding_over_a_static_cache_compiles_once_and_auto_chooses_a_policy(
    build_moe: Callable[..., PreTrainedModel],
) -> None:
    model, ids, steps = build_moe("qwen3_moe", num_hidden_layers=2), prompt(1, 5), BLOCK * BLOCKS + 4
    with offloaded(model, policy="auto", slots=6, device="cpu") as offload, torch.no_grad():
        expected = greedy(model, ids, steps)
        cache, graphs = (
            StaticCache(model.config, max_cache_len=ids.shape[1] + steps),
            CompileCounterWithBackend("aot_eager"),
        )
        step = compiled(model, graphs)
        trial = offload._passes.choice = Trial()  # as on a GPU
        tokens, modes = [ids], set()
        for _ in range(steps):
            forward = model if len(tokens) == 1 else step
            tokens.append(forward(tokens[-1], **{CACHE: cache}).logits[:, -1:].argmax(-1))
            modes.add(offload._control.is_on)
        assert torch.equal(torch.cat(tokens, 1), expected)
        assert graphs.frame_count == 1
        assert trial.is_over
        assert modes == {True, False}


def test_the_operations_are_what_they_say(tiny_moe: PreTrainedModel) -> None:
    offload_experts(tiny_moe, policy="prefetch", slots=8, device="cpu")
    handle, x = tiny_moe.expert_offload._passes.handle, torch.randn(3, 32)
    ids, weights = torch.tensor([[0, 1], [2, 0], [7, 3]]), torch.rand(3, 2)
    for operation, arguments in (
        (operations.begin, (x.view(1, 3, 32), handle)),
        (operations.enter, (x.view(1, 3, 32), handle, 0)),
        (operations.route, (x, x, None, handle, 0)),
        (operations.entered, (x.view(3, 1, 32), ids, handle, 0)),
        (operations.decided, (ids, ids, ids, [ids], handle, 0)),
        (operations.experts, (x, ids, weights, handle, 3)),
    ):
        torch.library.opcheck(operation, arguments)
    rates = []
    for overwrites in (False, True):  # a graph may write to all that it gets
        tiny_moe.expert_offload.reset()
        operations.begin(x, handle)
        operations.enter(x, handle, 0)
        routing = operations.route(x, x, None, handle, 0)
        if overwrites:
            [part.fill_(-1) for part in routing]
        rates.append(tiny_moe.expert_offload.counters.speculation_hit_rate)
    assert rates[1] == rates[0] > 0


def test_a_graph_never_calls_an_offload_that_is_gone(build_moe: Callable[..., PreTrainedModel]) -> None:
    model, ids = build_moe("qwen3_moe", num_hidden_layers=1), prompt(1, 5)
    with torch.no_grad():
        own, before = model(ids).logits, compiled(model, "eager")
        before(ids)
        with offloaded(model, policy="on_demand", slots=4, device="cpu") as offload:
            expected, handle = model(ids).logits, offload._passes.handle
            forward = compiled(model, "eager")
            for function in (forward, before):  # what was compiled before is compiled again
                offload.reset()
                assert torch.equal(function(ids).logits, expected)
                assert offload.counters.tokens == ids.numel()
        assert torch.equal(forward(ids).logits, own)
        with offloaded(model, policy="prefetch", slots=4, device="cpu") as offload:
            assert torch.equal(forward(ids).logits, expected)
            assert offload.counters.tokens == ids.numel()
            assert offload.counters.speculation_hit_rate is not None
    for call in (lambda: operations.begin(own, handle), lambda: operations.experts(own, ids, ids, handle, 0)):
        with pytest.raises(OffloadError, match="is detached; compile"):
            call()


def test_compiled_passes_of_several_threads(build_moe: Callable[..., PreTrainedModel]) -> None:
    """They alternate layer by layer. Each executes its own guesses, and a prompt none."""
    model, prompts = build_moe("qwen3_moe", num_hidden_layers=2), [torch.tensor([ids]) for ids in ([5], [9], [7, 3, 8])]
    interval = sys.getswitchinterval()
    with offloaded(model, policy="speculative", gating="speculated", slots=8, device="cpu"), torch.no_grad():
        # Without fullgraph: torch counts the frames of such a call for all threads together, and may find none of its own.
        counters.clear()
        forward = torch.compile(model.forward, backend="eager")
        expected = [forward(ids).logits for ids in prompts]

        def passes(number: int) -> bool:
            with torch.no_grad():
                return all(torch.equal(forward(prompts[number]).logits, expected[number]) for _ in range(12))

        sys.setswitchinterval(1e-5)
        try:
            with ThreadPoolExecutor(3) as threads:
                assert all(threads.map(passes, range(3)))
        finally:
            sys.setswitchinterval(interval)
        assert counters["stats"]["unique_graphs"] > 0
        assert not counters["graph_break"]


def test_an_eager_pass_while_another_thread_compiles(build_moe: Callable[..., PreTrainedModel]) -> None:
    """It has its turn to the end, and calls no operation of a graph. The other thread waits for it."""
    model, ids = build_moe("qwen3_moe", num_hidden_layers=2), prompt(1, 5)
    entered, compiling = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        if not torch.compiler.is_dynamo_compiling() and not entered.is_set():
            entered.set()
            compiling.wait(20)

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiling.set()
        assert running.result(timeout=20)  # until then this is compiling
        return graph

    with offloaded(model, policy="prefetch", slots=16, device="cpu") as offload, torch.no_grad():
        expected = model(ids).logits
        model.model.layers[1].input_layernorm.register_forward_hook(wait)
        offload.reset()
        with mock.patch.object(operations, "_in_turn", side_effect=AssertionError), ThreadPoolExecutor(1) as threads:

            def run_eagerly() -> bool:
                with torch.no_grad():
                    return torch.equal(model(ids).logits, expected)

            running = threads.submit(run_eagerly)
            entered.wait(20)
            torch.compile(lambda x: x + 1, backend=backend)(ids)
        assert offload.counters.tokens == ids.numel()
        assert offload.counters.speculation_hit_rate is not None


def test_gradients_and_changes_are_refused_as_by_the_eager_model(build_moe: Callable[..., PreTrainedModel]) -> None:
    model = build_moe("qwen3_moe", num_hidden_layers=1)
    with offloaded(model, policy="on_demand", slots=8, device="cpu"):
        for forward in (model.forward, compiled(model)):
            loss = forward(prompt(1, 5)).logits.sum()
            with pytest.raises(UserError, match="no gradients pass through offloaded experts"):
                loss.backward()
        model.model.layers[0].mlp.experts.down_proj.data += 1
        with pytest.raises(OffloadError, match="have changed since the experts were offloaded"):
            forward(prompt(1, 5))


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_model_runs_until_it_is_detached(strict: bool, build_moe: Callable[..., PreTrainedModel]) -> None:
    model, ids = build_moe("qwen3_moe", num_hidden_layers=1), prompt(1, 5)
    offload_experts(model, policy="speculative", slots=4, device="cpu")
    with torch.no_grad():
        for tokens in (ids[:, :1], ids):  # the first is a decode step
            exported = torch.export.export(model, (tokens,), {"use_cache": False}, strict=strict).module()
        assert torch.equal(exported(ids, use_cache=False).logits, model(ids).logits)
        model.expert_offload.detach()
        with pytest.raises(OffloadError, match="is detached; compile"):
            exported(ids, use_cache=False)
