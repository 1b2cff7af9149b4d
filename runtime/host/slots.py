"""The engine that the host decides for: a model's experts over device slots, each copied as early as it is known to be needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import nn

from ...predictors.experts import combine, group_by_expert
from ..engine import Counters, Decision
from ..observer import Observer
from ..store import ExpertStore, empty_blocks
from .cache import Eviction
from .schedule import Schedule
from .transfer import make_transfers


class Mailbox:
    """Candidates on their way to the host: on CUDA the copy is under way while the host goes on enqueuing.

    Each message has pinned memory of its own until it is taken, and the next message gets it then.
    """

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._messages: deque[tuple[int, torch.Tensor, torch.cuda.Event | None]] = deque()
        self._spare: list[tuple[torch.Tensor, torch.cuda.Event]] = []

    def put(self, number: int, candidates: torch.Tensor) -> None:
        """Takes the candidates `[tokens, m]` of layer `number`."""
        if not self._is_cuda:
            self._messages.append((number, candidates, None))
            return
        memory, copied = self._spare.pop() if self._spare else (torch.empty(0, dtype=torch.int64), torch.cuda.Event())
        if memory.numel() < candidates.numel():
            memory = torch.empty(candidates.numel(), dtype=torch.int64, pin_memory=True)
        host = memory[: candidates.numel()].view(candidates.shape)
        host.copy_(candidates.to(torch.int64), non_blocking=True)
        copied.record(torch.cuda.current_stream(candidates.device))
        self._messages.append((number, host, copied))

    def take(self) -> Iterator[tuple[int, list[int]]]:
        """The layers and their distinct candidates, every token's best guess before anyone's second, in the order in which
        they were put. Waits for each until it has arrived."""
        while self._messages:
            number, host, copied = self._messages.popleft()
            if copied is not None:
                copied.synchronize()
            guess = list(dict.fromkeys(host.T.flatten().tolist()))
            if copied is not None:
                self._spare.append((host.view(-1), copied))
            yield number, guess

    def clear(self) -> None:
        self._messages.clear()


class ExpertSlots:
    """The slots of one model and what is on the way to them; an `Engine`. `slots` are shared by all layers."""

    def __init__(self, store: ExpertStore, slots: int, device: torch.device, readers: int, eviction: Eviction):
        self._format = store.format
        layers, self._num_experts = store.extent
        # Written once, since a system that hands out pages at their first use would do it in the midst of a token.
        memory = empty_blocks(slots, self._format.bytes, device).zero_()
        self._tensors = [self._format.views(slot) for slot in memory]
        self.transfers = make_transfers(store, memory, readers)
        self._schedule = Schedule(self.transfers, slots, layers, eviction)
        self._mailbox = Mailbox(device)
        self._tokens = 0
        self._stalled_before = 0.0
        self._broke_off = False

    def close(self) -> None:
        self.transfers.close()

    def observe(self, observer: Observer | None) -> None:
        self._schedule.observer = self.transfers.observer = observer

    def counters(self) -> Counters:
        schedule = self._schedule
        return Counters(
            hits=schedule.hits,
            misses=schedule.misses,
            copies=schedule.copied,
            cancelled=schedule.cancelled,
            bytes_copied=schedule.copied * self._format.bytes,
            tokens=self._tokens,
            stalled_seconds=self.transfers.stalled_seconds() - self._stalled_before,
        )

    def reset(self) -> None:
        self._stalled_before = self.transfers.stalled_seconds()
        self._tokens = 0
        schedule = self._schedule
        schedule.hits = schedule.misses = schedule.copied = schedule.cancelled = 0

    def begin_pass(self) -> None:
        if self._broke_off:
            self._schedule.restart()
        self._broke_off = False
        self._schedule.begin_pass()
        self._mailbox.clear()

    def resident(self, layer: int) -> list[int]:
        return self._schedule.resident(layer)

    def announce(self, layer: int, candidates: torch.Tensor, now: bool) -> None:
        self._mailbox.put(layer, candidates)
        if now:
            self._broke_off = True
            self._open_mail()
            self._broke_off = False

    def execute(self, layer: int, experts: nn.Module, x: torch.Tensor, decision: Decision) -> torch.Tensor:
        """What is on the device is computed first, while the rest is being copied, one slot being filled as another becomes
        free; so any number of experts passes through any number of slots. Each expert sees the rows that it would see with
        everything resident, and their sum is taken in the order of the ids: the result is the same.
        """
        self._broke_off = True
        schedule, ids = self._schedule, decision.ids
        guess = schedule.guess(layer) if decision.known else None
        jobs = self._jobs(x, ids, None if guess is None else guess[: ids.shape[-1]])
        order = schedule.enter(layer, jobs.keys())
        self._tokens += len(x) if layer == 0 else 0
        if guess is None or not x.is_cuda:  # opened later where the host has not waited for the device
            self._open_mail()
        outputs = x.new_empty(ids.numel(), x.shape[-1])
        for expert in order:
            slot = schedule.slot(layer, expert)
            inputs, positions = jobs[expert]
            outputs[positions] = self._format.output(experts, self._tensors[slot], inputs)
            self.transfers.computed(slot)
            schedule.left(layer, expert)
        self._open_mail()
        result = combine(outputs, decision.weights)
        self._broke_off = False
        return result

    def _open_mail(self) -> None:
        for layer, guess in self._mailbox.take():
            self._schedule.announce(layer, guess)
        self._schedule.begin_copies()

    def _jobs(
        self, x: torch.Tensor, ids: torch.Tensor, known: list[int] | None
    ) -> dict[int, tuple[torch.Tensor, slice | torch.Tensor]]:
        """What each expert computes: its rows of `x`, and where its outputs stand among `[tokens * top_k]`.

        `known` are the ids of a single token, where the host has them already.
        """
        if len(x) == 1:
            executed = ids[0].tolist() if known is None else known
            return {expert: (x, slice(i, i + 1)) for i, expert in enumerate(executed)}
        groups = group_by_expert(ids, self._num_experts)
        rows = x[groups.order // ids.shape[-1]].split(groups.sizes)
        return dict(zip(groups.experts, zip(rows, groups.order.split(groups.sizes), strict=True), strict=True))
