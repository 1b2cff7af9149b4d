"""Memory that CUDA reads itself: registered once, unregistered before it is freed, and a way on where it can't be locked."""

from __future__ import annotations

import gc
import os
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model
from pages import CUDA, Cudart, Pages
from predict_train.predictors.discovery import find_moe_layers
from predict_train.runtime import offload_experts, offloaded
from predict_train.runtime import store as store_module
from predict_train.runtime.errors import StoreError
from predict_train.runtime.formats import PAGE
from predict_train.runtime.host import transfer
from predict_train.runtime.host.slots import Mailbox
from predict_train.runtime.registered import register
from predict_train.runtime.store import HostStore, empty_blocks
from test_offload import greedy, prompt
from transformers import PreTrainedModel

CPU = torch.device("cpu")


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Cudart:
    if not Path("/proc/self/maps").exists():
        pytest.skip("only Linux says which pages there are")
    return Cudart(monkeypatch)


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def has(model: PreTrainedModel, expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("as_from_device", [False, True])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_the_blocks_are_registered_until_the_store_is_closed(
    architecture: str, as_from_device: bool, pages: Pages, cudart: Cudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module._Layer, "was_on_device", as_from_device)
    model = build_model(architecture).to(torch.bfloat16)
    before, layers = weights(model), find_moe_layers(model)
    store = HostStore(layers, CUDA)
    assert store.is_registered
    assert cudart.registered == {blocks.data_ptr(): blocks.nbytes for blocks in store.blocks}
    assert cudart.bytes == len(layers) * 8 * store.format.bytes, "not a byte more than the blocks"
    assert has(model, before)
    store.close()
    assert cudart.registered == {}
    assert pages.left == 0
    assert has(model, before)


def test_a_store_that_nobody_closes_unregisters_its_memory_before_it_is_freed(pages: Pages, cudart: Cudart) -> None:
    model = build_model("qwen3_moe")
    store = HostStore(find_moe_layers(model), CUDA)
    del store
    assert cudart.registered == {}
    assert pages.left == 4, "the weights are in them"
    del model
    gc.collect()
    assert pages.left == 0


def test_memory_that_a_caller_still_holds_is_unregistered_and_stays_readable(pages: Pages, cudart: Cudart) -> None:
    model = build_model("qwen3_moe")
    before = weights(model)
    store = HostStore(find_moe_layers(model), CUDA)
    held = model.state_dict()
    store.close()
    assert cudart.registered == {}
    assert all(torch.equal(held[name], before[name]) for name in before)
    del held
    assert pages.left == 0


@pytest.mark.parametrize("layers_that_fit", [0, 2])
def test_too_little_memory_that_can_be_locked(layers_that_fit: int, pages: Pages, cudart: Cudart) -> None:
    model = build_model("qwen3_moe")
    before, layers = weights(model), find_moe_layers(model)
    size = 8 * HostStore(layers, CPU).format.bytes
    cudart.limit = layers_that_fit * size + size // 2
    with pytest.warns(
        UserWarning, match=r"CUDA could lock only .* GiB of experts in host memory.*small buffer"
    ) as told:
        store = HostStore(layers, CUDA)
    assert len(told) == 1
    assert not store.is_registered
    assert cudart.registered == {}, "what is locked in vain is missing elsewhere"
    assert cudart.calls == layers_that_fit + 1, "it is not tried again"
    assert float(torch.zeros(1, device=CUDA)) == 0, "no error is left for who comes next"
    (into,) = empty_blocks(1, store.format.bytes, CPU)
    for layer in range(4):
        for expert in range(8):
            store.read(layer, expert, into.numpy())
            assert torch.equal(into, store.block(layer, expert))
    store.close()
    assert has(model, before)
    del into
    assert pages.left == 0


@pytest.mark.parametrize("name", ["register", "_copy"])
@pytest.mark.parametrize("breaks_at", [2, 4])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_store_that_breaks_off_while_it_is_made_leaves_the_model_alone(
    name: str, breaks_at: int, error: type[BaseException], pages: Pages, cudart: Cudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While memory is registered, or while experts from a device are copied into it."""
    model, calls = build_model("qwen3_moe"), []
    before, original = weights(model), getattr(store_module, name)

    def breaking(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == breaks_at:
            raise error
        return original(*args)

    monkeypatch.setattr(store_module, name, breaking)
    monkeypatch.setattr(store_module._Layer, "was_on_device", name == "_copy")
    with pytest.raises(error) as caught:
        HostStore(find_moe_layers(model), CUDA)
    assert cudart.registered == {}, "though the exception holds the frames"
    assert has(model, before)
    del caught
    calls.clear()
    gc.collect()
    assert pages.left == 0


@pytest.mark.usefixtures("cudart")
def test_memory_is_filled_by_several_threads_before_it_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[str] = set()
    both = threading.Barrier(2)
    fill = store_module._Layer._fill

    def noted(layer: Any, expert: int) -> None:
        if len(threads) < 2:
            threads.add(threading.current_thread().name)
            both.wait(timeout=10)
        fill(layer, expert)

    def registered_when_full(memory: torch.Tensor, device: torch.device) -> Any:
        assert (memory.view(torch.float32).flatten(1) == 1).any(-1).all()
        return register(memory, device)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(store_module._Layer, "_fill", noted)
    monkeypatch.setattr(store_module, "register", registered_when_full)
    model = build_model("qwen3_moe")
    for layer in find_moe_layers(model):
        for parameter in layer.experts.parameters():
            parameter.data.fill_(1)
    HostStore(find_moe_layers(model), CUDA).close()
    assert len(threads) == 2


@pytest.mark.usefixtures("cudart")
def test_only_one_layer_is_in_memory_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer's blocks are made, the memory that the layers before it had is free."""
    model = build_model("qwen3_moe")
    layers, made = find_moe_layers(model), []
    mine = [{p.data_ptr() for p in layer.experts.parameters()} for layer in layers]

    def noted(*args: Any) -> torch.Tensor:
        for layer, before in zip(layers[: len(made)], mine, strict=False):
            assert not before & {p.data_ptr() for p in layer.experts.parameters()}
        made.append(empty_blocks(*args))
        return made[-1]

    monkeypatch.setattr(store_module, "empty_blocks", noted)
    HostStore(layers, CUDA).close()
    assert len(made) == 4


def test_a_registration_ends_once_and_only_in_its_own_process(pages: Pages, cudart: Cudart) -> None:
    memory = empty_blocks(1, 8192, CPU)
    registration = register(memory, CUDA)
    assert registration is not None
    assert register(memory, CUDA) is None, "it is registered already"
    assert cudart.registered == {memory.data_ptr(): 8192}
    child = os.fork()
    if not child:
        registration.close()
        os._exit(len(cudart.registered))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1, "the child has no CUDA to call"
    del memory
    assert pages.left == 1
    registration.close()
    registration.close()
    assert cudart.registered == {}
    assert pages.left == 0


def test_sizes_that_one_call_does_not_take_are_not_tried(cudart: Cudart) -> None:
    assert register(torch.empty(0, dtype=torch.uint8), CUDA) is None
    assert register(torch.empty(1, dtype=torch.uint8).expand(1 << 39), CUDA) is None
    assert cudart.calls == 0


class Event:
    def record(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize("limit", [0, 1 << 40])
def test_the_mailbox_uses_its_memory_again_and_frees_it(
    limit: int, pages: Pages, cudart: Cudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    cudart.limit = limit
    mailbox = Mailbox(CUDA)
    for count in (300, 1, 20, 300):  # 9600 bytes: three pages
        for layer in range(3):
            mailbox.put(layer, torch.arange(count * 4, dtype=torch.int32).view(count, 4), None)
        guess = list(range(0, count * 4, 4)) + list(range(1, count * 4, 4))
        found = list(mailbox.take())
        assert [layer for layer, _, _ in found] == [0, 1, 2]
        assert all(mine[: 2 * count] == guess for _, mine, _ in found)
    assert pages.made == 3
    mailbox.put(0, torch.tensor([[5]]), None)
    mailbox.clear()
    assert list(mailbox.take()) == []
    assert cudart.bytes == (3 * 12288 if limit else 0)
    mailbox.close()
    assert cudart.registered == {}
    assert pages.left == 0


@pytest.mark.parametrize("registered", [True, False])
def test_a_store_that_is_not_registered_is_copied_through_the_ring(
    registered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnCuda:
        is_cuda = True

    store = HostStore(find_moe_layers(build_model("qwen3_moe")), CPU)
    store.is_registered = registered
    for name in ("CudaTransfers", "StagedTransfers"):
        monkeypatch.setattr(transfer, name, lambda *_, name=name: name)
    found: object = transfer.make_transfers(store, OnCuda(), 1)  # type: ignore[arg-type]
    assert found == ("CudaTransfers" if registered else "StagedTransfers")


@pytest.mark.parametrize("policy", ["on_demand", "prefetch", "speculative", "auto"])
def test_detaching_frees_all_memory_at_once(tiny_moe: PreTrainedModel, policy: str, pages: Pages) -> None:
    """Also where the caller keeps the `ExpertOffload`."""
    ids = prompt(1, 6)
    for keeps in (False, True):
        offload_experts(tiny_moe, policy=policy, slots=4, device="cpu")
        kept = tiny_moe.expert_offload if keeps else None
        greedy(tiny_moe, ids)
        assert pages.left == 5
        tiny_moe.expert_offload.detach()
        assert pages.left == 0
        del kept


def test_detaching_frees_an_offload_at_once(tiny_moe: PreTrainedModel, exported: Path, pages: Pages) -> None:
    """With it go the predictors' weights, and what is left of the last pass."""
    offload_experts(tiny_moe, exported, policy="prefetch", slots=4, device="cpu")
    greedy(tiny_moe, prompt(1, 6))
    control = tiny_moe.expert_offload._control
    gone = [weakref.ref(it) for it in (tiny_moe.expert_offload, control, *control.layers, control.layers[1].guesser)]
    del control
    tiny_moe.expert_offload.detach()
    assert [ref() for ref in gone] == [None] * len(gone)
    assert pages.left == 0


@pytest.mark.parametrize("policy", ["on_demand", "prefetch", "speculative"])
def test_detaching_frees_all_memory_after_reads_that_failed(
    tiny_moe: PreTrainedModel, policy: str, pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    read = HostStore.read

    def failing(store: HostStore, layer: int, expert: int, into: store_module.Bytes) -> None:
        reads.append(layer)
        if len(reads) % 5 == 0:
            raise StoreError("it can't be read")
        read(store, layer, expert, into)

    monkeypatch.setattr(HostStore, "read", failing)
    with offloaded(tiny_moe, policy=policy, slots=4, device="cpu"):
        for _ in range(10):
            with suppress(StoreError):
                greedy(tiny_moe, prompt(1, 6))
    assert len(reads) >= 5
    assert pages.left == 0


@pytest.fixture
def large(build_moe: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """100 MB of experts, on the host."""
    return build_moe("qwen3_moe", hidden_size=256, moe_intermediate_size=1024, num_experts=16, vocab_size=257)


@pytest.mark.gpu
@pytest.mark.parametrize("begins_on", ["cpu", "cuda"])
def test_on_a_gpu_the_experts_are_registered_and_detaching_frees_all(large: PreTrainedModel, begins_on: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    large.to(begins_on)
    expected, left = weights(large), []
    torchs_own = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    gc.collect()
    gc.disable()
    try:
        for policy in ("prefetch", "on_demand", "prefetch", "speculative"):
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                offload_experts(large, policy=policy, slots=20, device=device)
            blocks = large.expert_offload.store.blocks
            assert all(memory.is_pinned() for memory in blocks)
            experts = sum(p.nbytes for layer in find_moe_layers(large) for p in layer.experts.parameters())
            assert sum(memory.nbytes for memory in blocks) <= 1.03 * experts
            with torch.no_grad():
                large(prompt(1, 6).to(device))
                large(prompt(1, 30).to(device))
            grown = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) - torchs_own
            assert grown < PAGE, "torch takes some bytes itself to read a number back"
            del blocks
            large.expert_offload.detach()
            torch.cuda.synchronize()
            left.append(torch.cuda.memory_allocated())
    finally:
        gc.enable()
    assert has(large, expected)
    assert left == [left[0]] * 4, "the first one leaves what the libraries keep"


@pytest.mark.gpu
@pytest.mark.parametrize("limit", [0, 1 << 20, 1 << 24])
@pytest.mark.parametrize("policy", ["on_demand", "prefetch"])
def test_on_a_gpu_with_little_lockable_memory_the_tokens_are_the_same(
    large: PreTrainedModel, policy: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real registration that fails above a limit: of nothing, of the mailbox's size, and of the ring's too."""
    model, ids = large.to("cuda"), prompt(1, 6, "cuda")
    expected = greedy(model, ids)
    cudart = torch.cuda.cudart()

    class Limited:
        registered: dict[int, int] = {}  # noqa: RUF012
        cudaHostUnregister = staticmethod(cudart.cudaHostUnregister)  # noqa: N815

        @classmethod
        def cudaHostRegister(cls, begin: int, size: int, flags: int) -> Any:  # noqa: N802
            return cudart.cudaHostRegister(begin, size if size <= limit else 0, flags)  # CUDA refuses 0 bytes

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Limited)
    with pytest.warns(UserWarning, match="CUDA could lock only"):
        offload_experts(model, policy=policy, slots=8, device="cuda")
    assert isinstance(model.expert_offload._engine.transfers, transfer.StagedTransfers)
    assert torch.equal(greedy(model, ids), expected)
    model.expert_offload.detach()
    assert float(torch.zeros(3, device="cuda").add_(1).sum()) == 3
