"""Attaches the offload runtime to a transformers model, and detaches it.

One decode step at source layer l (DESIGN: everything known as early as it can be):

    computing   attention l | router l | speculate t | experts l | attention t | router t ...
    copying                            | misses of l | candidates of t that are not on the device
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from predictors.architecture import MoELayer, override_forward, sources
from predictors.checkpoint import Predictors, make_speculators
from predictors.discovery import find_moe_layers
from predictors.errors import UserError
from predictors.experts import combine, expert_output, expert_parameters, group_by_expert
from runtime.cache import Key, SlotCache
from runtime.policy import Gating, Policy, RoutingControl
from runtime.store import ExpertStore
from runtime.transfer import make_transfers

SPECULATED_TOKENS = 16


class OffloadError(UserError):
    """The model can't be offloaded as asked; the message says why and what to do."""


@dataclass
class Counters:
    """What the runtime has done since it was attached or `reset`."""

    hits: int = 0
    """Experts that were on the device, or on their way to it, when a layer came to execute them."""
    misses: int = 0
    """Experts that a layer had to wait for from the start of their copy."""
    copies: int = 0
    """Experts copied to the device, needed or not."""
    bytes_copied: int = 0
    tokens: int = 0
    """Tokens that passed through the model."""
    stalled_seconds: float = 0.0
    """Time that computing waited for copies."""
    speculation_hit_rate: float | None = None
    """Share of the router's own choice that was among the candidates; None where nothing was speculated."""


def offload_experts(
    model: PreTrainedModel,
    predictors: Predictors | None = None,
    *,
    policy: Policy | str = Policy.PREFETCH,
    gating: Gating | str = Gating.TRUE,
    device: torch.device | str | None = None,
    slots: int | None = None,
    candidates: int | None = None,
    speculated_tokens: int = SPECULATED_TOKENS,
    readers: int = 2,
) -> PreTrainedModel:
    """Moves a model's experts to host memory and lets it run with `slots` of them on the device at a time.

    Returns the same model, which stays a transformers model: `generate`, pipelines and streamers work on it. Its
    `expert_offload` attribute is the `ExpertOffload` that counts what happens and detaches it again.

    Args:
        predictors: what `load_predictors` returned; without them speculation is training-free.
        policy, gating: see `runtime.policy`. `on_demand` and `prefetch` are exact.
        device: where the model computes; by default CUDA where there is one. Everything but the experts moves there.
        slots: experts that fit on the device, over all layers, from `top_k` up; by default a quarter of them all.
        candidates: experts fetched for each speculated token, `top_k` or more; by default `top_k`, and two more under
            gating `resident`.
        speculated_tokens: a forward pass over more tokens than this is a prompt: it is executed exactly, streaming the
            experts through the slots, since it needs nearly all of them and a guess saves nothing.
        readers: copying threads, on the CPU.

    Raises `OffloadError`, `UnsupportedModelError` or `PredictorsError`, and then leaves the model as it was.
    """
    try:
        policy, gating = Policy(policy), Gating(gating)
    except ValueError as error:
        raise OffloadError(f"{error}; policies are {', '.join(Policy)}, gatings {', '.join(Gating)}") from error
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if target.type == "cuda" and not torch.cuda.is_available():
        raise OffloadError("CUDA was asked for, and this machine has no CUDA device; use device cpu")
    if getattr(model, "expert_offload", None) is not None:
        raise OffloadError("the model's experts are offloaded already; detach it first: model.expert_offload.detach()")
    layers = find_moe_layers(model)
    top_k, total = layers[0].top_k, sum(layer.num_experts for layer in layers)
    slots = max(2 * top_k, total // 4) if slots is None else slots
    if not top_k <= slots <= total:
        raise OffloadError(
            f"{slots} slots are asked for; this model takes from {top_k} (its top k) to {total} (all its experts)"
        )
    if candidates is None:
        candidates = min(top_k + 2, layers[0].num_experts) if gating is Gating.RESIDENT else top_k
    if not top_k <= candidates <= layers[0].num_experts:
        raise OffloadError(
            f"{candidates} candidates are asked for; this model takes from {top_k} to {layers[0].num_experts}"
        )
    if readers < 1:
        raise OffloadError(f"{readers} readers are asked for; at least one must copy")
    if predictors is not None:
        predictors.check(model, layers)
    for layer in layers:
        expert_parameters(layer.experts)
    offload = ExpertOffload(
        model, layers, predictors, policy, gating, target, slots, candidates, speculated_tokens, readers
    )
    vars(model)["expert_offload"] = offload
    return model


@contextmanager
def offloaded(
    model: PreTrainedModel, predictors: Predictors | None = None, **arguments: Any
) -> Iterator[ExpertOffload]:
    """`offload_experts` for the length of a `with`: yields the `ExpertOffload` and detaches it at the end."""
    offload: ExpertOffload = vars(offload_experts(model, predictors, **arguments))["expert_offload"]
    try:
        yield offload
    finally:
        offload.detach()


class Guess(NamedTuple):
    """The candidates of a target layer, on the device and on the host."""

    candidates: torch.Tensor
    """`[tokens, m]`"""
    experts: list[int]
    """The distinct ones, every token's best guess before anyone's second."""


class Announcement:
    """Candidates on their way to the host: on CUDA the copy is under way while the host goes on enqueuing."""

    def __init__(self, number: int, candidates: torch.Tensor):
        self.number, self.candidates = number, candidates
        self._host, self._event = candidates, None
        if candidates.is_cuda:
            self._host = torch.empty(candidates.shape, dtype=candidates.dtype, pin_memory=True)
            self._host.copy_(candidates, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(candidates.device))

    def experts(self) -> list[int]:
        """The distinct candidates. Waits until they are known."""
        if self._event is not None:
            self._event.synchronize()
        return list(dict.fromkeys(self._host.T.flatten().tolist()))


class ExpertOffload:
    """A model's experts in host memory and its slots on the device; made by `offload_experts`."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: list[MoELayer],
        predictors: Predictors | None,
        policy: Policy,
        gating: Gating,
        device: torch.device,
        slots: int,
        candidates: int,
        speculated_tokens: int,
        readers: int,
    ):
        self.policy, self.gating, self.device, self.slots = policy, gating, device, slots
        self._model, self._layers = model, layers
        self._number = {layer.index: number for number, layer in enumerate(layers)}
        self._without_source = {self._number[target] for target, source in sources(layers).items() if source is None}
        self._counters = Counters()
        self._announced: Announcement | None = None
        self._guesses: dict[int, Guess] = {}  # by layer number
        self._demands: deque[Key] = deque()  # copies not begun for want of a slot
        self._prefetches: deque[Key] = deque()
        self._executes_guess = policy is Policy.SPECULATIVE and gating is not Gating.RESIDENT
        self._attached = ExitStack()
        try:
            self.store = ExpertStore(layers, pinned=device.type == "cuda")
            self._attached.callback(self.store.restore)
            self._move_rest()
            self._cache = SlotCache(slots)
            memory = self._allocate(slots)
            self._slot_tensors = [self.store.layout.views(slot) for slot in memory]
            self._transfers = make_transfers(memory, readers)
            self._attached.callback(self._transfers.close)
            self._stalled_before = 0.0
            for number, layer in enumerate(layers):
                self._attach(number, layer)
            self._control = RoutingControl(
                layers,
                make_speculators(model, predictors, layers),
                policy,
                gating,
                num_candidates=candidates,
                max_tokens=speculated_tokens,
                fetch=self._announce,
                resident=lambda index: self._cache.experts_of(self._number[index]),
            )
            self._attached.callback(self._control.detach)
        except BaseException:
            self._attached.close()
            raise

    @property
    def counters(self) -> Counters:
        """What has happened so far. On CUDA, reading it waits for the device."""
        self._counters.stalled_seconds = self._transfers.stalled_seconds() - self._stalled_before
        self._counters.speculation_hit_rate = self._control.hit_rate()
        return self._counters

    def reset(self) -> None:
        """Sets the counters back to zero."""
        self._stalled_before = self._transfers.stalled_seconds()
        self._counters = Counters()
        self._control.reset()

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's block."""
        return self.store.layout.bytes

    def detach(self) -> None:
        """Takes the runtime off the model, whose weights, devices and forwards are then what they were."""
        self._attached.close()
        vars(self._model).pop("expert_offload", None)

    # -- attaching -----------------------------------------------------------------------------------------------

    def _move_rest(self) -> None:
        """Moves everything but the experts to the device, and has `detach` move it back."""
        experts = {id(p) for layer in self._layers for p in layer.experts.parameters(recurse=False)}
        for parameter in self._model.parameters():
            if id(parameter) not in experts and parameter.device != self.device:
                self._attached.callback(setattr, parameter, "data", parameter.data)
                parameter.data = parameter.data.to(self.device)
        for buffer in self._model.buffers():
            if buffer.device != self.device:
                # In place, as the parameters: a router's arguments may be buffers, and the layers hold them too.
                self._attached.callback(setattr, buffer, "data", buffer.data)
                buffer.data = buffer.data.to(self.device)

    def _allocate(self, slots: int) -> torch.Tensor:
        layout = self.store.layout
        try:
            return torch.empty(slots, layout.size, dtype=layout.dtype, device=self.device)
        except torch.OutOfMemoryError as error:
            size = slots * layout.bytes / 2**30
            raise OffloadError(
                f"{slots} slots take {size:.1f} GiB, which {self.device} has not left; ask for fewer"
            ) from error

    def _attach(self, number: int, layer: MoELayer) -> None:
        def forward(
            hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, *_: Any, **__: Any
        ) -> torch.Tensor:
            with torch.no_grad():
                return self._execute(number, layer.experts, hidden_states, top_k_index, top_k_weights)

        if number == 0:
            handle = layer.decoder.register_forward_pre_hook(lambda *_: self._begin_pass(), prepend=True)
            self._attached.callback(handle.remove)
        self._attached.enter_context(override_forward(layer.experts, forward))

    def _begin_pass(self) -> None:
        # A pass that broke off (Ctrl-C, an error in a callback) may have left pins and wishes behind.
        self._cache.unpin_all()
        self._guesses.clear()
        self._demands.clear()
        self._prefetches.clear()
        self._announced = None

    # -- one layer -----------------------------------------------------------------------------------------------

    def _announce(self, index: int, candidates: torch.Tensor) -> None:
        """Takes note of the candidates `[tokens, m]` of a target layer."""
        self._announced = Announcement(self._number[index], candidates)
        if self._announced.number in self._without_source:  # no layer computes before it: its copies begin at once
            self._take_announced()

    def _take_announced(self) -> None:
        if self._announced is not None:
            announced, self._announced = self._announced, None
            guess = Guess(announced.candidates, announced.experts())
            self._guesses[announced.number] = guess
            self._prefetches = deque((announced.number, expert) for expert in guess.experts)
            self._begin_copies()

    def _begin_copies(self) -> None:
        """Begins as many copies as there are slots for; what the layer at hand demands goes before what is guessed."""
        for queue in (self._demands, self._prefetches):
            while queue:
                key = queue[0]
                if key in self._cache:
                    self._cache.pin(key)
                else:
                    slot = self._cache.admit(key)
                    if slot is None:
                        return
                    self._transfers.start(slot, self.store.block(*key))
                    self._counters.copies += 1
                    self._counters.bytes_copied += self.expert_bytes
                queue.popleft()

    def _execute(
        self, number: int, experts: nn.Module, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """`experts(x, ids, weights)` over slots: demand fetches first, then prefetches, then the computation.

        What is on the device is computed first, while the rest is being copied, one slot being filled as another
        becomes free; so any number of experts passes through any number of slots. Each expert sees the rows that it
        would see with everything resident, and their sum is taken in the order of `ids`: the result is the same.
        """
        guess = self._guesses.pop(number, None)
        self._prefetches.clear()  # what was guessed for this layer and not begun is no longer a guess
        if guess is not None:
            for expert in guess.experts:
                self._cache.unpin((number, expert))
        # Where the guess is executed whatever the router says, the host has known the experts since the layer before,
        # and on CUDA it need not wait for the router.
        known = guess is not None and len(x) == 1 and self._executes_guess
        jobs = self._jobs(x, guess.experts[: ids.shape[-1]] if guess is not None and known else None, ids, number)

        present = [expert for expert in jobs if (number, expert) in self._cache]
        missing = [expert for expert in jobs if (number, expert) not in self._cache]
        self._counters.hits += len(present)
        self._counters.misses += len(missing)
        self._counters.tokens += len(x) if number == 0 else 0
        for expert in present:
            self._cache.pin((number, expert))
        self._demands = deque((number, expert) for expert in missing)
        self._begin_copies()
        if not (known and x.is_cuda):
            self._take_announced()

        outputs = x.new_empty(ids.numel(), x.shape[-1])
        for expert in present + missing:
            key = (number, expert)
            slot = self._cache.slot(key)
            try:
                self._transfers.wait(slot)
            except BaseException:
                self._cache.forget(key)
                raise
            inputs, positions = jobs[expert]
            outputs[positions] = expert_output(experts, self._slot_tensors[slot], inputs)
            self._transfers.computed(slot)
            self._cache.unpin(key)
            self._begin_copies()
        self._take_announced()
        if guess is not None and known:  # from the order of the guess into that of the router
            outputs = outputs[(guess.candidates[:, : ids.shape[-1]] == ids.T).int().argmax(-1)]
        return combine(outputs, weights)

    def _jobs(
        self, x: torch.Tensor, known: list[int] | None, ids: torch.Tensor, number: int
    ) -> dict[int, tuple[torch.Tensor, slice | torch.Tensor]]:
        """What each expert computes: its rows of `x`, and where its outputs stand among `[tokens * top_k]`."""
        if len(x) == 1:
            executed = ids[0].tolist() if known is None else known
            return {expert: (x, slice(i, i + 1)) for i, expert in enumerate(executed)}
        groups = group_by_expert(ids, self._layers[number].num_experts)
        rows = x[groups.order // ids.shape[-1]].split(groups.sizes)
        return dict(zip(groups.experts, zip(rows, groups.order.split(groups.sizes), strict=True), strict=True))
