"""Both engines on a simulated CUDA device, which does its work in any legal order: no order changes a bit of the logits."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model, skip_if_lacking
from predict_train.data_collection.catalog import tiny_model
from predict_train.predictors.checkpoint import Predictors
from predict_train.predictors.experts import expert_outputs
from predict_train.predictors.generation import CACHE
from predict_train.runtime import engines, offload_experts, offloaded
from predict_train.runtime.device.arithmetic import ExpertArithmetic
from predict_train.runtime.device.hits import DeviceHitCount
from predict_train.runtime.device.slots import DeviceSlots
from predict_train.runtime.device.tables import LayerTables
from predict_train.runtime.formats.full import FullFormat
from predict_train.runtime.guess import FoldedGuesser
from predict_train.runtime.host.transfer import CudaTransfers, StagedTransfers, ThreadTransfers
from predict_train.runtime.measure import bench as bench_module
from predict_train.runtime.measure.bench import bench
from predict_train.runtime.measure.routing import Statistics, draw_routing
from predict_train.runtime.measure.settings import Measuring
from predict_train.runtime.offload import ExpertOffload
from predict_train.runtime.pack import pack
from simulated_cuda import Plan, launch, simulated
from test_policy import direct
from transformers import PreTrainedModel

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a real device"),
    pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says which pages there are"),
    pytest.mark.filterwarnings("ignore:CUDA could lock only"),
]

LAYERS, EXPERTS, TOP_K = 3, 8, 2
PASSES = [12, 1, 1, 9, 1]
"""Tokens of each text in each forward pass: two prompts, and decode steps after them."""
SPECULATED = 8
"""In passes over no more tokens the runtime guesses, and the device decides where it can."""
ORDERS = {1: (Plan.COPY_FIRST, Plan.LAZY), 3: (Plan.COMPUTE_FIRST, Plan.RANDOM)}
"""By the number of texts: every way meets each order that is far from the host's."""
WAYS: dict[str, dict[str, Any]] = {
    "on_demand": {"policy": "on_demand", "slots": 4},
    "prefetch": {"policy": "prefetch", "slots": 5},
    "far": {"policy": "prefetch", "slots": 7, "horizon": 2, "candidates": 3},
    "speculated": {"policy": "speculative", "gating": "speculated", "slots": 4},
    "true": {"policy": "speculative", "gating": "true", "slots": 5},
    "resident": {"policy": "speculative", "gating": "resident", "slots": LAYERS * EXPERTS},
    "direct": {"policy": "speculative", "gating": "true", "slots": 5},
}
"""What is executed must not depend on when copies are over. Under gating `resident` it does, unless every expert has a slot."""
SLOTS = {1: 11, 3: 17}
"""Of the device's engine, by the number of texts. Some layers have one more than others."""
FEW = LAYERS * TOP_K
"""Slots of the device's engine, of which three texts leave none for guesses."""
MOST = 1 << 40
STORES = {
    "registered": (MOST, CudaTransfers, slice(None)),
    "not registered": (0, StagedTransfers, slice(1, None)),
    "file": (MOST, StagedTransfers, slice(1)),
}
"""The bytes that can be registered, what copies, and which of `ORDERS` it meets: two stores have the same transfers."""


@cache
def model() -> PreTrainedModel:
    """On the CPU attention is computed by other kernels, unless it is eager."""
    return build_model("qwen3_moe", num_hidden_layers=LAYERS, attn_implementation="eager")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    model().save_pretrained(folder / "model")
    return pack(folder / "model", folder / "experts.pack")


@pytest.fixture(autouse=True)
def nothing_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it depends on the readers which experts have slots, and so what gating `resident` executes."""
    monkeypatch.setattr(ThreadTransfers, "cancel", lambda *_: False)


@contextmanager
def decided_by(engine: str) -> Iterator[None]:
    """Has the host or the device decide. The device's kernels are written in torch here, since interpreted ones take long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "hindrance_of", lambda *_: None if engine == "device" else "the test wants the host")
        patch.setattr(LayerTables, "assign", assign)
        patch.setattr(LayerTables, "copy", copy)
        patch.setattr(ExpertArithmetic, "output", output)
        patch.setattr(DeviceHitCount, "add", add)
        yield


def assign(self: LayerTables, ids: torch.Tensor, late: bool) -> torch.Tensor:
    table = torch.empty_like(ids, dtype=torch.int32)

    def kernel(ids: torch.Tensor, clock: torch.Tensor, *tensors: torch.Tensor) -> None:
        slot_of, owner, used, pool, table, moved, counters = (tensor.numpy() for tensor in tensors)
        experts, now, copies = ids.flatten().tolist(), 2 * int(clock) + late, []
        hits = sum(int(slot_of[expert] >= 0) for expert in experts)
        used[[slot_of[expert] for expert in experts if slot_of[expert] >= 0]] = now + 2  # later than all others
        for expert in experts:
            if slot_of[expert] < 0:
                slot = used.argmin()
                if owner[slot] >= 0:
                    slot_of[owner[slot]] = -1
                slot_of[expert], owner[slot], used[slot] = slot, expert, now + 2
                copies += [expert, pool[slot]]
        used[used == now + 2] = now
        table.flat = pool[slot_of[experts]]
        moved[: len(copies)], moved[-1] = copies, len(copies) // 2
        counters += [len(copies) // 2, late * hits, late * (len(experts) - hits)]

    launch(kernel, ids, self._link.clock, *self.books, table, self._moved, self.counters)
    return table


def copy(self: LayerTables) -> None:
    def kernel(blocks: torch.Tensor, memory: torch.Tensor, moved: torch.Tensor) -> None:
        for expert, place in moved[: 2 * int(moved[-1])].view(-1, 2).tolist():
            memory[place] = blocks[expert]

    launch(kernel, self._blocks, self._link.memory, self._moved)


def output(self: ExpertArithmetic, x: torch.Tensor, weights: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    result = torch.empty_like(x)

    def kernel(result: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, table: torch.Tensor, memory: Any) -> None:
        views = FullFormat(self._places, 0).views(memory.view(torch.uint8))
        for token, (inputs, weighs, places) in enumerate(zip(x.split(1), weights, table.tolist(), strict=True)):
            parts = (
                expert_outputs(self._experts, [{n: v[place] for n, v in views.items()}], [inputs]) for place in places
            )
            result[token] = sum(weight * part[0] for weight, part in zip(weighs, parts, strict=False))

    launch(kernel, result, x, weights, table, self._memory)
    return result


def add(self: DeviceHitCount, chosen: torch.Tensor, own: torch.Tensor) -> None:
    def kernel(chosen: torch.Tensor, own: torch.Tensor, counted: torch.Tensor) -> None:
        own = own.topk(self._top_k).indices if own.is_floating_point() else own
        counted += torch.tensor([int((own[:, :, None] == chosen[:, None]).sum()), own.numel()])

    launch(kernel, chosen, own, self._counted)


def logits(batch: int, of: PreTrainedModel | None = None) -> torch.Tensor:
    """The logits of all tokens of `PASSES`, given one after another, so that the host need not wait for a token."""
    of = of or model()
    ids = torch.randint(1, 256, (batch, sum(PASSES)), generator=torch.Generator().manual_seed(batch)).to(of.device)
    cache, found = None, []
    with torch.no_grad():
        for begin, end in pairwise(accumulate(PASSES, initial=0)):
            output = of(ids[:, begin:end], **{CACHE: cache}, use_cache=True)
            cache = output[CACHE]
            found.append(output.logits)
        return torch.cat(found, 1).cpu()


@cache
def predictors() -> Predictors:
    return direct(model())


def settings(way: str, device: str, **others: Any) -> dict[str, Any]:
    of = {"predictors": predictors()} if way == "direct" else {}
    return WAYS[way] | of | {"speculated_tokens": SPECULATED, "device": device} | others


@cache
def expected(way: str, batch: int, engine: str, **others: Any) -> torch.Tensor:
    """The logits without a device. Those of the device's engine are its own, since its kernels round otherwise."""
    if engine == "host" and WAYS[way]["policy"] != "speculative":
        return logits(batch)
    with decided_by(engine), offloaded(model(), **settings(way, "cpu", **others)):
        return logits(batch)


@pytest.mark.parametrize("batch", ORDERS)
@pytest.mark.parametrize("way", sorted(WAYS.keys() - {"direct"}))  # to the host a guess is like another
@pytest.mark.parametrize("store", STORES)
def test_the_engine_of_the_host_is_right_in_every_order(store: str, way: str, batch: int, packed: Path) -> None:
    (lockable, transfers, plans), right = STORES[store], expected(way, batch, "host")
    for plan in ORDERS[batch][plans]:
        its_own = settings(way, "cuda:0", **({"store": packed} if store == "file" else {}))
        with simulated(plan, lockable=lockable), decided_by("host"), offloaded(model(), **its_own) as offload:
            assert type(offload._engine.transfers) is transfers
            assert torch.equal(logits(batch), right), plan


@pytest.mark.parametrize(("batch", "slots"), [*SLOTS.items(), (3, FEW)])
@pytest.mark.parametrize("way", WAYS)
def test_the_engine_of_the_device_is_right_in_every_order(way: str, batch: int, slots: int) -> None:
    right = expected(way, batch, "device", slots=slots)
    for plan in ORDERS[batch]:
        its_own = settings(way, "cuda:0", slots=slots)
        with simulated(plan), decided_by("device"), offloaded(model(), **its_own) as offload:
            assert isinstance(offload._engine, DeviceSlots)
            assert torch.equal(logits(batch), right), plan


@pytest.mark.parametrize("model_type", ["qwen4_exp_text", "gemma4_text", "deepseek_v4"])
def test_the_device_decides_where_the_residual_can_not_be_followed(model_type: str) -> None:
    """Such layers are guessed by direct predictors, folded."""
    skip_if_lacking(model_type)
    other = tiny_model(model_type).float().eval()
    other.set_attn_implementation("eager")
    found: list[tuple[torch.Tensor, int, float | None]] = []
    for device, plan in (("cpu", nullcontext()), ("cuda:0", simulated(Plan.RANDOM))):
        its_own = {"policy": "prefetch", "slots": 12, "speculated_tokens": SPECULATED, "device": device}
        with plan, decided_by("device"), offloaded(other, direct(other), **its_own) as offload:
            assert isinstance(offload._engine, DeviceSlots)
            assert all(isinstance(layer.guesser, FoldedGuesser) for layer in offload._control.layers)
            output, counters = logits(1, other), offload.counters
            found.append((output, counters.hits, counters.speculation_hit_rate))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]
    assert found[0][1] > 0


@pytest.mark.parametrize("way", WAYS)
def test_the_host_never_waits_where_the_device_decides(way: str) -> None:
    with (
        torch.no_grad(),
        simulated(Plan.LAZY) as device,
        decided_by("device"),
        offloaded(model(), **settings(way, "cuda:0", slots=SLOTS[1])),
    ):
        ids = torch.arange(1, 10).view(1, -1).to("cuda:0")
        cache = model()(ids, use_cache=True)[CACHE]
        model()(ids[:, :1], **{CACHE: cache})  # the books are handed over
        before = device.waits.total()
        for _ in range(3):
            output = model()(ids[:, :1], **{CACHE: cache})
        assert device.waits.total() == before
        output.logits.cpu()
        assert device.waits.total() == before + 1


def test_streams_are_used_again() -> None:
    """Libraries keep memory for each stream, on a real device 32 MiB."""
    other, way = build_model("qwen3_moe", num_hidden_layers=LAYERS), settings("prefetch", "cuda:0", slots=SLOTS[1])

    def streams(offload: ExpertOffload) -> set[Any]:
        engine: Any = offload._engine
        return {engine._guesses, engine._copies}

    with simulated(Plan.SERIAL), decided_by("device"):
        with offloaded(model(), **way) as offload:
            first = streams(offload)
        with offloaded(model(), **way) as offload, offloaded(other, **way) as beside:
            assert streams(offload) == first
            assert len(streams(beside) | first) == 4


def test_under_autocast_the_host_decides() -> None:
    """The device's kernels know nothing of it."""
    right, its_own = expected("prefetch", 1, "host"), settings("prefetch", "cuda:0", slots=SLOTS[1])
    with simulated(Plan.SERIAL), decided_by("device"), offloaded(model(), **its_own) as offload:
        torch.set_autocast_enabled("cuda", True)
        try:
            assert torch.equal(logits(1), right)
        finally:
            torch.set_autocast_enabled("cuda", False)
        assert not offload._engine._decides


def test_what_was_added_on_the_device_comes_back_from_it() -> None:
    """An adapter that was put on an offloaded model goes where the model goes."""
    right, norm = logits(1), model().model.norm
    with simulated(Plan.SERIAL), decided_by("host"):
        with offloaded(model(), **settings("on_demand", "cuda:0")):
            norm.adapter = torch.nn.Linear(2, 2, device="cuda:0")
            assert norm.adapter.weight.is_cuda
            assert norm.weight.is_cuda
        assert not any(parameter.is_cuda for parameter in model().parameters())
    assert torch.equal(logits(1), right)
    del norm.adapter


class Graph:
    """Does nothing when it is replayed. What it computed when it was captured stays."""

    def replay(self) -> None:
        pass


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize(("engine", "way"), [("host", "on_demand"), ("device", "true")])
def test_detaching_frees_what_is_on_the_device_at_once(
    engine: str, way: str, breaks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With graphs, and where the caller keeps the cache and the exception of a pass that broke off."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    kept: list[Any] = []

    def fail(*_: Any) -> None:
        if kept and breaks:
            raise RuntimeError("out of everything")
        kept.append("a call")

    gc.collect()
    gc.disable()
    with simulated(Plan.SERIAL), decided_by(engine), torch.no_grad():
        offload = offload_experts(model(), **settings(way, "cuda:0", slots=SLOTS[1])).expert_offload
        host = getattr(offload._engine, "_host", offload._engine)
        memory, alive = weakref.ref(host.memory.memory), weakref.ref(offload)
        layer = model().model.layers[1]
        part = layer.mlp.experts.act_fn if engine == "host" else layer.self_attn  # the kernels call no module
        hook = part.register_forward_hook(fail)
        ids = torch.arange(1, 7).view(1, -1).to("cuda:0")
        try:
            kept.append(model().generate(ids, max_new_tokens=5, eos_token_id=None, return_dict_in_generate=True))
        except RuntimeError as error:
            kept.append(error)
        hook.remove()
        assert offload.captures is (engine == "device")
        del offload, host
        model().expert_offload.detach()
        assert memory() is None
        assert breaks or alive() is None
    gc.enable()
    assert len(kept) >= 2


def test_a_replayed_routing_is_executed_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is moved to the device after its routers have been replaced."""
    monkeypatch.setattr(bench_module, "measure_link", lambda *_: 1.0)
    routing = draw_routing(Statistics(0.4, 0.7), steps=3, layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, candidates=4)
    found = []
    for device in ("cpu", "cuda:0"):
        config = Measuring(
            policies="on_demand,prefetch,speculative", device=device, tokens=2, warmup=1, rounds=1, slots=20
        )
        with simulated(Plan.RANDOM) if device != "cpu" else nullcontext(), decided_by("host"):
            measured = bench(model(), torch.arange(1, 20).view(1, -1), config, routing=routing)
        found.append(
            {way: (r[0].hit_rate, r[0].bytes_per_token, r[0].cache_hit_rate) for way, r in measured.rounds.items()}
        )
    assert found[0] == found[1]
