"""Where and when an offloaded model runs, and what is left of it: contexts, threads, exceptions, and the memory of each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from conftest import build_model
from pages import Pages
from predict_train.runtime import (
    OffloadError,
    StoreError,
    offload_experts,
    offloaded,
)
from predict_train.runtime import offload as offload_module
from predict_train.runtime.device.graphs import StepGraphs
from predict_train.runtime.guard import Weights
from predict_train.runtime.host.schedule import Schedule
from predict_train.runtime.layercontrol import LayerControl
from test_attached import LowRank
from test_guard import CPU, IDS, experts_of, logits
from test_offload import greedy
from torch import nn
from transformers import PreTrainedModel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["qwen2_moe", "gpt_oss"])
def test_autocast(architecture: str, dtype: torch.dtype) -> None:
    model = build_model(architecture, num_hidden_layers=2).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = logits(model)
        for policy in ("on_demand", "prefetch", "auto", "speculative"):
            for gating in ("speculated", "true", "resident") if policy == "speculative" else ["true"]:
                with offloaded(model, slots=5, device="cpu", policy=policy, gating=gating):
                    found = logits(model)
                assert found.dtype == expected.dtype
                assert policy == "speculative" or torch.equal(found, expected)


def test_inference_mode_may_begin_and_end_anywhere(moe: PreTrainedModel) -> None:
    expected = logits(moe)
    for inside in ((True, False, False), (False, True, True), (True, True, False), (False, False, True)):
        attaching, running, detaching = (torch.inference_mode(mode) for mode in inside)
        with attaching:
            offload_experts(moe, slots=5, device="cpu", policy="auto")
        with running:
            assert torch.equal(logits(moe), expected)
        assert torch.equal(logits(moe), expected)
        with detaching:
            moe.expert_offload.detach()
        assert not any(parameter.is_inference() for parameter in moe.parameters())
        assert torch.equal(logits(moe), expected)
    moe(IDS).logits.sum().backward()


@pytest.mark.parametrize("policy", ["on_demand", "prefetch", "speculative"])
def test_defaults_that_somebody_set(policy: str, moe: PreTrainedModel) -> None:
    """Where nothing says where tensors are made, they are made on some device in some dtype."""
    with offloaded(moe, slots=5, device="cpu", policy=policy):
        expected = logits(moe)
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        offload_experts(moe, slots=5, device="cpu", policy=policy)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(logits(moe), expected)


@pytest.mark.parametrize("policy", ["prefetch", "speculative"])
def test_in_a_pass_counters_are_reset_and_nothing_is_detached(policy: str, moe: PreTrainedModel) -> None:
    offload: Any = offload_experts(moe, slots=5, device="cpu", policy=policy).expert_offload
    expected = logits(moe)
    handle = moe.model.layers[1].self_attn.register_forward_hook(lambda *_: offload.reset())
    assert torch.equal(logits(moe), expected)
    assert offload.counters.tokens == 0, "they are counted in the first layer"
    handle.remove()
    handle = moe.model.layers[1].register_forward_hook(lambda *_: offload.detach())
    with pytest.raises(OffloadError, match="can't be detached in a forward pass; detach it when the pass is over"):
        logits(moe)
    handle.remove()
    assert torch.equal(logits(moe), expected)
    offload.detach()
    offload.detach()
    offload_experts(moe, slots=5, device="cpu")
    offload.detach()
    assert moe.expert_offload is not offload, "it belongs to the second one"


def test_another_thread_resets_and_detaches_between_passes(moe: PreTrainedModel) -> None:
    expected, ends = greedy(moe, IDS, 2), threading.Event()
    for policy in ("on_demand", "auto"):
        offload: Any = offload_experts(moe, slots=5, device="cpu", policy=policy).expert_offload
        found: list[bool] = []
        ends.clear()

        def run(found: list[bool] = found) -> None:
            while not ends.is_set():
                found.append(torch.equal(greedy(moe, IDS, 2), expected))

        thread = threading.Thread(target=run)
        thread.start()
        while len(found) < 2:
            offload.reset()
        offload.detach()
        count = len(found)
        while len(found) < count + 2 and thread.is_alive():
            pass
        ends.set()
        thread.join()
        assert all(found)
        assert len(found) >= count + 2


# -- memory ------------------------------------------------------------------------------------------------------


def test_whoever_keeps_an_exception_keeps_no_slots(
    moe: PreTrainedModel, pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook keeps the last one, with all its frames."""
    kept: list[BaseException] = []
    for error in (RuntimeError, KeyboardInterrupt):
        for place in ("an expert", "attention", "a guess"):

            def fail(*_: Any, error: type[BaseException] = error) -> None:
                raise error("out of everything")

            offload = offload_experts(moe, slots=5, device="cpu", policy="prefetch", readers=1).expert_offload
            with monkeypatch.context() as patch, ExitStack() as hooked:
                if place == "a guess":
                    patch.setattr(type(offload._control.layers[1].guesser), "guess", fail)
                else:
                    module: Any = experts_of(moe).act_fn if place == "an expert" else moe.model.layers[1].self_attn
                    hooked.callback(module.register_forward_hook(fail).remove)
                with pytest.raises(error, match="out of everything") as caught:
                    logits(moe)
            kept.append(caught.value)
            del offload, caught
            moe.expert_offload.detach()
            assert pages.left == 0, place
    assert all(error.__traceback__ is not None for error in kept)


def interrupted(original: Callable[..., Any]) -> Callable[..., Any]:
    """What does the same as `original`, and is interrupted at its end."""

    def fail(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        del args, kwargs  # this frame is the test's
        raise KeyboardInterrupt

    return fail


def test_an_attachment_that_fails_leaves_nothing(
    moe: PreTrainedModel, pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the exception is kept."""
    expected, kept = logits(moe), []
    steps: list[tuple[Any, str]] = [
        (offload_module, "make_speculators"),
        (Weights, "__init__"),
        (LayerControl, "watch_residual"),
        (Schedule, "__init__"),
    ]
    for owner, name in steps:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted(getattr(owner, name)))
            with pytest.raises(KeyboardInterrupt) as caught:
                offload_experts(moe, slots=5, device="cpu", policy="auto")
        kept.append(caught.value)
        assert {type(parameter) for parameter in moe.parameters()} == {nn.Parameter}
        for module in moe.modules():
            assert not vars(module).keys() & {"forward", "_apply", "expert_offload"}
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        assert pages.left == 0, name
    assert torch.equal(logits(moe), expected)
    assert all(error.__traceback__ is not None for error in kept)


def test_too_many_readers_are_refused(moe: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def scarce(thread: threading.Thread) -> None:
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        start(thread)
        started.append(thread)

    monkeypatch.setattr(threading.Thread, "start", scarce)
    with pytest.raises(StoreError, match="has not 9 threads left for readers; give fewer readers"):
        offload_experts(moe, slots=5, device="cpu", readers=9)
    assert len(started) == 3
    assert not any(thread.is_alive() for thread in started)


def test_graphs_are_forgotten_when_the_model_is_another(moe: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that is switched off has the same modules and weights as before."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    graphs, attention = StepGraphs(CPU), moe.model.layers[1].self_attn
    attention.q_proj = adapter = LowRank(attention.q_proj)
    adapter.scaling, adapter.active = {"first": 1.0}, ["first"]
    handles = []
    changes: list[Callable[[], Any]] = [
        lambda: setattr(adapter, "is_on", False),
        lambda: adapter.scaling.update(first=2.0),
        lambda: adapter.active.append("second"),
        lambda: handles.append(attention.register_forward_hook(lambda *_: None)),
        lambda: (handles.pop().remove(), attention.register_forward_hook(lambda *_: None)),
        lambda: setattr(adapter, "forward", adapter.base_layer.forward),
        lambda: setattr(moe.config, "output_router_logits", True),
        lambda: moe.set_attn_implementation("eager"),
        moe.train,
    ]
    for change in (lambda: None, *changes):
        change()
        graphs._graphs[(0,)] = None
        graphs.look_at(moe)
        assert not graphs._graphs
        graphs._graphs[(0,)] = None
        graphs.look_at(moe)
        assert graphs._graphs, "nothing has changed since the last look"
    graphs.look_again(moe)
    assert graphs._graphs
    adapter.is_on = True
    graphs.look_again(moe)
    assert not graphs._graphs, "in every step it looks at adapters"
