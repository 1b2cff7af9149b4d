"""The offload runtime on real generation: exact where it promises exactness, and gone without a trace."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from predict_train.predictors.architecture import moe_shape
from predict_train.predictors.checkpoint import Predictors, TargetLayer
from predict_train.predictors.discovery import find_moe_layers
from predict_train.predictors.errors import UserError
from predict_train.predictors.routing import Routing
from predict_train.runtime import offload_experts, offloaded
from predict_train.runtime.guess import Guess, Guesser
from predict_train.runtime.settings import OffloadConfig
from predict_train.runtime.store import Bytes, HostStore
from transformers import PreTrainedModel

SUPPORTED = ["qwen3_moe", "mixtral", "olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class AnyOrder(HostStore):
    """A store whose reads take as long as they are told, so that they finish in any order."""

    def __init__(self, layers: Any, delays: list[int]):
        super().__init__(layers, torch.device("cpu"))
        self._delays, self._lock = itertools.cycle(delays), threading.Lock()

    def read(self, layer: int, expert: int, into: Bytes) -> None:
        with self._lock:
            delay = next(self._delays)
        into[: len(into) // 2] = 0xFF  # not a number: what is read too early is seen
        time.sleep(delay * 2e-4)
        super().read(layer, expert, into)


def assert_plain(logits: torch.Tensor, plain: torch.Tensor) -> None:
    """`logits` are those of plain transformers: bit for bit on a CPU, up to rounding where its kernels are others."""
    if plain.is_cuda:
        torch.testing.assert_close(logits, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
    else:
        assert torch.equal(logits, plain)


def prompt(batch: int, length: int, device: str = "cpu") -> torch.Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(length)).to(device)


def greedy(model: PreTrainedModel, ids: torch.Tensor, tokens: int = 8) -> torch.Tensor:
    output: torch.Tensor = model.generate(
        ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(ids)
    )
    return output


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("architecture", SUPPORTED)
def test_exact_policies_give_the_resident_models_tokens(
    build_moe: Callable[..., PreTrainedModel], architecture: str, device: str
) -> None:
    model = build_moe(architecture).to(device)
    top_k, experts, all_slots = 2, 8, 24
    for batch, sizes in ((1, (top_k, experts // 2)), (3, (top_k + 1, experts, all_slots))):
        ids = prompt(batch, 7, device)
        expected, expected_logits = greedy(model, ids), model(ids).logits
        for policy in ("on_demand", "prefetch"):
            for slots in sizes:
                offload_experts(model, policy=policy, slots=slots, device=device)
                assert torch.equal(greedy(model, ids), expected), (policy, slots, batch)
                assert_plain(model(ids).logits, expected_logits)
                model.expert_offload.detach()


@pytest.mark.parametrize("device", DEVICES)
def test_long_prompts_stream_through_few_slots(build_moe: Callable[..., PreTrainedModel], device: str) -> None:
    model = build_moe("qwen3_moe").to(device)
    ids = prompt(2, 600, device)
    with torch.no_grad():
        expected = model(ids).logits
    offload_experts(model, policy="prefetch", slots=2, device=device)
    with torch.no_grad():
        assert_plain(model(ids).logits, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gating", ["speculated", "true", "resident"])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_speculation_with_every_expert_allowed_is_exact(
    build_moe: Callable[..., PreTrainedModel], architecture: str, gating: str, device: str
) -> None:
    """With all experts as candidates gating resident restricts nothing; the others execute what they speculated."""
    model = build_moe(architecture).to(device)
    ids = prompt(1, 7, device)
    expected = greedy(model, ids)
    candidates = 8 if gating == "resident" else None
    offload_experts(model, policy="speculative", gating=gating, slots=24, candidates=candidates, device=device)
    output = greedy(model, ids)
    counters = model.expert_offload.counters
    if gating == "resident":
        assert torch.equal(output, expected)
        assert counters.speculation_hit_rate == 1.0
    else:
        assert counters.speculation_hit_rate is not None
        assert 0 < counters.speculation_hit_rate < 1


@pytest.mark.parametrize("gating", ["speculated", "true", "resident"])
@pytest.mark.parametrize("batch", [1, 3])
def test_speculative_tokens_do_not_depend_on_slots(tiny_moe: PreTrainedModel, gating: str, batch: int) -> None:
    """What was guessed is executed however few slots there are; only gating resident looks at what is on the device."""
    ids = prompt(batch, 5)
    outputs = []
    for slots in (32, 2, 3, 8):
        offload_experts(tiny_moe, policy="speculative", gating=gating, slots=slots)
        outputs.append(greedy(tiny_moe, ids))
        tiny_moe.expert_offload.detach()
    for output in outputs[1:]:
        assert output.shape == outputs[0].shape
        if gating != "resident":
            assert torch.equal(output, outputs[0])


def test_detaching_restores_the_model_exactly(tiny_moe: PreTrainedModel) -> None:
    ids = prompt(1, 9)
    before = {name: tensor.clone() for name, tensor in tiny_moe.state_dict().items()}
    objects = [id(p) for p in tiny_moe.parameters()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in tiny_moe.modules()]
    logits = tiny_moe(ids).logits
    for policy in ("on_demand", "prefetch", "speculative"):
        offload_experts(tiny_moe, policy=policy, slots=3)
        tiny_moe(ids)
        for name, tensor in tiny_moe.state_dict().items():
            assert torch.equal(tensor, before[name]), "weights can be saved while the experts are away"
        tiny_moe.expert_offload.detach()
        assert not hasattr(tiny_moe, "expert_offload")
    after = tiny_moe.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) and after[name].is_contiguous() for name in before)
    assert [id(p) for p in tiny_moe.parameters()] == objects
    assert hooks == [
        (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in tiny_moe.modules()
    ]
    assert torch.equal(tiny_moe(ids).logits, logits)


def test_counters_conserve(tiny_moe: PreTrainedModel) -> None:
    store = AnyOrder(find_moe_layers(tiny_moe), [25])  # 5 ms: waited for on a busy machine as well
    offload_experts(tiny_moe, policy="on_demand", slots=5, device="cpu", store=store)
    offload = tiny_moe.expert_offload
    greedy(tiny_moe, prompt(1, 4), tokens=6)
    counters = offload.counters
    assert counters.tokens == 4 + 5, "the last token is not fed back"
    assert counters.copies == counters.misses, "on demand, exactly what was missing is copied"
    assert counters.bytes_copied == counters.copies * offload.expert_bytes
    assert counters.hits + counters.misses >= 5 * 4 * 2
    assert counters.stalled_seconds > 0
    assert counters.speculation_hit_rate is None
    offload.reset()
    assert (offload.counters.tokens, offload.counters.stalled_seconds) == (0, 0.0)


def test_all_slots_copy_each_expert_once(tiny_moe: PreTrainedModel) -> None:
    offload_experts(tiny_moe, policy="prefetch", slots=32)
    greedy(tiny_moe, prompt(3, OffloadConfig().speculated_tokens), tokens=20)
    assert tiny_moe.expert_offload.counters.copies <= 32


def test_a_pass_that_breaks_off_leaves_the_runtime_usable(tiny_moe: PreTrainedModel) -> None:
    ids = prompt(1, 5)
    expected = greedy(tiny_moe, ids)
    offload_experts(tiny_moe, policy="prefetch", slots=3)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = tiny_moe.model.layers[2].self_attn.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny_moe(ids[:, :1])
    handle.remove()
    assert torch.equal(greedy(tiny_moe, ids), expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"slots": 1}, "from 2"),
        ({"slots": 33}, "to 32"),
        ({"policy": "magic"}, "on_demand, prefetch, speculative"),
        ({"gating": "magic"}, "speculated, true, resident"),
        ({"candidates": 9}, "9 candidates"),
        ({"candidates": "many"}, "candidates: give a number or auto"),
        ({"eviction": "magic"}, "lru, least_stale, frequency"),
        ({"store": "nowhere"}, "No such file"),
        ({"readers": 0}, "readers: input should be greater than 0"),
        ({"device": "cuda"}, "no CUDA device"),
    ],
)
def test_wrong_arguments_leave_the_model_alone(
    tiny_moe: PreTrainedModel, arguments: dict[str, object], words: str
) -> None:
    if arguments.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    before = tiny_moe(prompt(1, 3)).logits
    with pytest.raises(UserError, match=words):
        offload_experts(tiny_moe, **arguments)  # type: ignore[arg-type]
    assert torch.equal(tiny_moe(prompt(1, 3)).logits, before)


class Counted:
    """A guesser that notes how many candidates it names."""

    def __init__(self, found: dict[int, int], target: int, guesser: Guesser):
        self.found, self.target, self.guesser = found, target, guesser
        self.plain, self.depth = guesser.plain, guesser.depth

    def guess(
        self,
        residual: torch.Tensor,
        source: Routing | None,
        inner: torch.Tensor | None,
        memory: torch.Tensor | None = None,
    ) -> Guess:
        guess = self.guesser.guess(residual, source, inner, memory)
        self.found[self.target] = guess.candidates.shape[-1]
        return guess

    def ranks(self, logits: torch.Tensor) -> torch.Tensor:
        return self.guesser.ranks(logits)


def test_candidates_follow_the_recall_of_each_layer(tiny_moe: PreTrainedModel) -> None:
    """`recall` is that of 2, 3 and 4 candidates of the 2 experts of each token."""
    layers = find_moe_layers(tiny_moe)
    recall = ([0.995, 1.0, 1.0], [0.9, 0.995, 1.0], [0.4, 0.7, 0.9])  # of layer 3 nothing is known
    targets = [TargetLayer(layer, recall=curve) for layer, curve in enumerate(recall)]
    predictors = Predictors({"name": "tiny"} | moe_shape(tiny_moe.config, layers), targets)
    expected = {
        ("prefetch", "true"): [2, 2, 3, 2],
        ("speculative", "true"): [2, 2, 2, 2],
        ("speculative", "resident"): [2, 3, 4, 4],
    }
    for (policy, gating), numbers in expected.items():
        found: dict[int, int] = {}
        arguments = {"policy": policy, "gating": gating, "candidates": "auto", "slots": 20, "device": "cpu"}
        with offloaded(tiny_moe, predictors, **arguments) as offload:
            offload.guess_by(partial(Counted, found))
            greedy(tiny_moe, prompt(1, 3), 2)
        assert [found[index] for index in range(4)] == numbers, (policy, gating)


def test_offloading_twice_is_refused(tiny_moe: PreTrainedModel) -> None:
    offload_experts(tiny_moe)
    with pytest.raises(UserError, match="already"):
        offload_experts(tiny_moe)


def test_a_dense_model_is_refused(build_moe: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(UserError, match="mixture-of-experts"):
        offload_experts(build_moe("qwen3"))
