"""The engine of the host: it executes experts in device slots, and copies each as soon as it is known to be needed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn

from ...predictors.confidence import Confidences
from ...predictors.experts import OnOutputs, group_by_expert, weighted_sum
from ...predictors.reuse import ReuseScores
from ..engine import Counters, Decision, Engine
from ..formats import PAGE
from ..observer import Observer
from ..registered import Registration, register
from ..store import ExpertStore, empty_blocks
from .cache import Eviction, Key
from .counts import DecayedCounts
from .price import Prices
from .schedule import Schedule
from .transfer import make_transfers

FEW = 64
"""Of so many rows, the experts that are there are computed together. The rows of a prompt would take too much memory, and save nothing."""


Job = tuple[torch.Tensor, slice | torch.Tensor]
"""What one expert is to execute: its rows `[n, hidden]`, and the places of their outputs among `[tokens * top_k]`."""


class Envelope(NamedTuple):
    """Host memory for one message from the device at a time, int64."""

    memory: torch.Tensor
    registration: Registration | None
    copied: torch.cuda.Event

    @classmethod
    def of(cls, count: int, device: torch.device) -> Envelope:
        """One for `count` numbers. Where its memory can't be registered, the host waits while a message is copied."""
        pages = -(-count * 8 // PAGE)
        memory = empty_blocks(pages, PAGE, torch.device("cpu")).zero_()
        return cls(memory.view(torch.int64).flatten(), register(memory, device), torch.cuda.Event())


class Mailbox:
    """Takes candidates to the host. On CUDA they are copied while the host goes on.

    Each message has its own envelope until it is taken. Then another message uses it.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._messages: deque[tuple[int, torch.Tensor, torch.Tensor | None, Envelope | None]] = deque()
        self._spare: list[Envelope] = []

    def put(self, number: int, candidates: torch.Tensor, values: torch.Tensor | None) -> None:
        """Takes the candidates `[tokens, m]` of layer `number`. From a CUDA device no `values` are taken (`Guess.values`)."""
        if self._device.type != "cuda":
            self._messages.append((number, candidates, values, None))
            return
        count = candidates.numel()
        envelope = self._spare.pop() if self._spare else None
        if envelope is None or len(envelope.memory) < count:
            envelope = Envelope.of(count, self._device)
        host = envelope.memory[:count].view(candidates.shape)
        host.copy_(candidates.to(torch.int64), non_blocking=True)
        envelope.copied.record(torch.cuda.current_stream(candidates.device))
        self._messages.append((number, host, None, envelope))

    def take(self) -> Iterator[tuple[int, list[int], Iterator[tuple[list[int], list[float]]] | None]]:
        """The layers with their distinct candidates, in the order of `put`. It waits until each has arrived.

        With them come each token's candidates with their `values`, if these are known.

        The best guess of every token comes before the second one of any token.
        """
        while self._messages:
            number, host, values, envelope = self._messages.popleft()
            if envelope is not None:
                envelope.copied.synchronize()
            by_token = host.tolist()
            if envelope is not None:
                self._spare.append(envelope)
            guess = list(dict.fromkeys(chain.from_iterable(zip(*by_token, strict=True))))
            yield number, guess, None if values is None else zip(by_token, values.tolist(), strict=True)

    def clear(self) -> None:
        """Drops all messages. Their envelopes are free when the copies into them are over."""
        for _ in self.take():
            pass

    def close(self) -> None:
        self._messages.clear()
        self._spare.clear()


class ExpertSlots(Engine):
    """The `Engine` of the host for one model. All layers share the `slots`."""

    def __init__(
        self,
        store: ExpertStore,
        slots: int,
        device: torch.device,
        readers: int,
        eviction: Eviction,
        reuse: ReuseScores | None = None,
        confidences: Confidences | None = None,
    ):
        """`reuse` are those of the model, if they decide who leaves a slot. With `confidences`, how sure the speculation of each layer
        is, guesses are priced."""
        self._format = store.format
        layers, self._num_experts = store.extent
        # Written once, since the system provides memory at its first use, which would else fall into a token.
        memory = empty_blocks(slots, self._format.bytes, device).zero_()
        self.memory = memory
        self._tensors = [self._format.views(slot) for slot in memory]
        self.transfers = make_transfers(store, memory, readers)
        self._confidences = confidences
        self.prices: Prices | None = None
        if confidences is not None:
            self.prices = Prices(layers, slots, time.perf_counter, self.transfers.copy_seconds)
        try:
            self._schedule = Schedule(self.transfers, slots, layers, eviction, self._num_experts, self.prices)
        except BaseException:  # what refers to each other would keep the slots
            self.transfers.close()
            raise
        self._mailbox = Mailbox(device)
        self._reuse = reuse
        self._logits: dict[int, torch.Tensor] = {}
        """By layer: what its router said of the tokens, until the layer is executed."""
        self._watching: dict[int, OnOutputs] = {}
        self._tokens = 0
        self._stalled_before = 0.0
        self._broke_off = False

    def close(self) -> None:
        self.transfers.close()
        self._mailbox.close()
        self._tensors.clear()
        del self.memory

    def observe(self, observer: Observer | None) -> None:
        self._schedule.observer = observer
        self.transfers.observe(observer)

    @property
    def is_watched(self) -> bool:
        return bool(self._watching)

    def watch(self, layer: int, on_outputs: OnOutputs | None) -> None:
        if on_outputs is None:
            del self._watching[layer]
        else:
            self._watching[layer] = on_outputs

    def counters(self) -> Counters:
        return replace(
            self._schedule.counters,
            bytes_copied=self._schedule.counters.copies * self._format.bytes,
            tokens=self._tokens,
            stalled_seconds=self.transfers.stalled_seconds() - self._stalled_before,
        )

    def reset(self) -> None:
        self._stalled_before = self.transfers.stalled_seconds()
        self._tokens = 0
        self._schedule.counters = Counters()

    def begin_pass(self, tokens: int) -> None:
        if self._broke_off:
            self._schedule.restart()
        self._broke_off = False
        self._schedule.begin_pass(tokens)
        self._mailbox.clear()

    def absent(self, layer: int) -> torch.Tensor:
        absent = bytearray(b"\1" * self._num_experts)  # a hundred times as fast to write to as a tensor
        for expert in self._schedule.resident(layer):
            absent[expert] = False
        return torch.frombuffer(absent, dtype=torch.bool).to(self.memory.device)

    @property
    def counts(self) -> torch.Tensor | None:
        """Each expert's decayed count, `[layers, experts]`, fp32 on the CPU, if it decides who leaves a slot."""
        counts = self._counts
        return torch.tensor([layer.of(range(self._num_experts)) for layer in counts]) if counts else None

    def settled(self) -> list[tuple[Key, int]]:
        """Ends the pass. Returns who is in which slot, of each layer the first to leave first; new computation sees them there."""
        self.begin_pass(0)
        return self._schedule.settled()

    def take_over(self, resident: list[tuple[Key, int]], counts: torch.Tensor | None = None) -> None:
        """Says who is in which slot, the least recently used first. Nothing is being computed or copied.

        `counts` replace those that there are, as the property of that name has them.
        """
        self._schedule.restart(resident)
        if counts is not None:
            for layer, own in zip(self._counts, counts.tolist(), strict=True):
                layer.set(own)

    @property
    def _counts(self) -> list[DecayedCounts]:
        return [layer for layer in self._schedule.counted or () if isinstance(layer, DecayedCounts)]

    @contextmanager
    def guessing(self, *inputs: Any) -> Iterator[None]:  # noqa: ARG002
        begun = time.perf_counter()
        yield
        if self.prices is not None:
            self.prices.guessed(time.perf_counter() - begun)

    def announce(self, layer: int, candidates: torch.Tensor, now: bool, values: torch.Tensor | None = None) -> None:
        self._mailbox.put(layer, candidates, values)
        if now:
            self._broke_off = True
            self._open_mail()
            self._broke_off = False

    def execute(self, layer: int, experts: nn.Module, x: torch.Tensor, decision: Decision) -> torch.Tensor:
        """See `Engine.execute`. Experts on the device are computed first, while the others are copied.

        A slot that becomes free is filled at once, so any number of experts passes through any number of slots. Each expert gets
        the same rows as with all experts resident, and the outputs are summed in the order of the ids. So the result is the same.
        """
        self._broke_off = True
        schedule, ids = self._schedule, decision.ids
        guess = schedule.guess(layer) if decision.known and len(x) == 1 else None
        jobs = self._jobs(x, ids, None if guess is None else guess[: ids.shape[-1]])
        if self._reuse is not None and (logits := self._logits.pop(layer, None)) is not None:
            schedule.rate(layer, self._reuse.after(layer, logits.numpy()))
        is_by_token = schedule.counted is not None and len(x) > 1 and decision.tokens is None
        # Others return their input, and have no slot.
        needed = [expert for expert in jobs if expert < self._num_experts]
        order = schedule.enter(layer, needed, ids.cpu().numpy() if is_by_token else None)
        self._tokens += decision.rows if layer == 0 else 0
        if guess is None or not x.is_cuda:  # else the host would wait for the device here
            self._open_mail()
        outputs = self._outputs(layer, experts, x, jobs, order)
        self._open_mail()
        if (on_outputs := self._watching.get(layer)) is not None:
            groups = group_by_expert(ids, self._num_experts)
            on_outputs(groups, outputs.index_select(0, groups.order))
        result = weighted_sum(experts, outputs, ids, decision.weights, x.dtype)
        self._broke_off = False
        return result

    def _outputs(
        self, layer: int, experts: nn.Module, x: torch.Tensor, jobs: Mapping[int, Job], order: list[int]
    ) -> torch.Tensor:
        """The unweighted outputs of all jobs, `[tokens * top_k, hidden]`. The experts of a layer that have slots are executed in `order`."""
        count = sum(len(inputs) for inputs, _ in jobs.values())
        outputs = x.new_empty(count, x.shape[-1])
        for expert, (inputs, positions) in jobs.items():
            if expert >= self._num_experts:
                outputs[positions] = inputs
        for group in self._groups(layer, order, count):
            slots = [self._schedule.slot(layer, expert) for expert in group]
            rows = [jobs[expert][0] for expert in group]
            found = self._format.outputs(experts, [self._tensors[slot] for slot in slots], rows)
            if found.dtype != outputs.dtype:  # under autocast, or with experts in another dtype than the rest
                outputs = outputs.to(found.dtype)
            if len(x) == 1 and len(group) == count and group == [*jobs]:  # they are in the order of the ids
                outputs = found
            else:
                for expert, output in zip(group, found.split_with_sizes([len(inputs) for inputs in rows]), strict=True):
                    outputs[jobs[expert][1]] = output
            for slot in slots:
                self.transfers.computed(slot)
            self._schedule.left(layer, group)
        return outputs

    def _groups(self, layer: int, order: list[int], rows: int) -> Iterator[list[int]]:
        """The experts to compute, in turn: together those that are there, if their rows are few."""
        waiting = deque(order)
        while waiting:
            group = [waiting.popleft()]
            while waiting and rows <= FEW and self._schedule.is_ready(layer, waiting[0]):
                group.append(waiting.popleft())
            yield group

    def routed(self, layer: int, logits: torch.Tensor) -> None:
        if self._reuse is not None:
            self._logits[layer] = logits.float().cpu()

    def _open_mail(self) -> None:
        for layer, guess, by_token in self._mailbox.take():
            known, chances = [expert for expert in guess if expert < self._num_experts], None
            if by_token is not None and self._confidences is not None:
                chances = self._confidences.chances(layer, by_token)
            self._schedule.announce(layer, known, chances)
        self._schedule.begin_copies()

    def _jobs(self, x: torch.Tensor, ids: torch.Tensor, known: list[int] | None) -> dict[int, Job]:
        """The jobs for `x` by expert.

        `known` are the ids of a single token, if the host has them already.
        """
        if len(x) == 1:
            executed = ids.tolist()[0] if known is None else known
            jobs: dict[int, Job] = {expert: (x, slice(i, i + 1)) for i, expert in enumerate(executed)}
            if len(jobs) == len(executed):  # else a router has chosen an expert twice
                return jobs
        groups = group_by_expert(ids, self._num_experts)
        rows = x[groups.order // ids.shape[-1]].split(groups.sizes)
        return dict(zip(groups.experts, zip(rows, groups.order.split(groups.sizes), strict=True), strict=True))
