"""A model's experts computed over a fixed number of device slots, each copied as early as it is known to be needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ...predictors.experts import combine, expert_output, group_by_expert
from ..store import ExpertStore, empty_blocks
from .cache import Eviction, Key, SlotCache
from .transfer import make_transfers


@dataclass
class Counters:
    """What the runtime has done since it was attached or `reset`."""

    hits: int = 0
    """Experts that were on the device, or on their way to it, when a layer came to execute them."""
    misses: int = 0
    """Experts that a layer had to wait for from the start of their copy."""
    copies: int = 0
    """Experts copied to the device, needed or not."""
    cancelled: int = 0
    """Copies of guesses that proved wrong before they began; they count to no other field."""
    bytes_copied: int = 0
    tokens: int = 0
    """Tokens that passed through the model."""
    stalled_seconds: float = 0.0
    """Time that computing waited for copies."""
    speculating_seconds: float = 0.0
    """Time that the host spent on speculating: norms, predictors, routers and bookkeeping."""
    speculation_hit_rate: float | None = None
    """Share of the router's own choice that was among the candidates; None where nothing was speculated."""


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
    """The slots of one model and what is on the way to them. Layers are numbered from 0 among the MoE layers."""

    def __init__(
        self,
        store: ExpertStore,
        num_experts: list[int],
        slots: int,
        device: torch.device,
        readers: int,
        eviction: Eviction,
        executes_guess: bool,
    ):
        """`executes_guess` says that a single token's guess is executed, whatever the router says."""
        self.store, self.slots = store, slots
        self.counters = Counters()
        self._num_experts, self._eviction, self._executes_guess = num_experts, eviction, executes_guess
        # Written once, since a system that hands out pages at their first use would do it in the midst of a token.
        memory = empty_blocks(slots, store.layout, device).zero_()
        self._slot_tensors = [store.layout.views(slot) for slot in memory]
        self._cache = SlotCache(slots, len(num_experts), eviction)
        self._mailbox = Mailbox(device)
        self._guesses: dict[int, list[int]] = {}
        self._demands: deque[Key] = deque()  # copies not begun for want of a slot
        self._prefetches: deque[Key] = deque()
        self._broke_off = False
        self.transfers = make_transfers(store, memory, readers)

    def close(self) -> None:
        self.transfers.close()

    def begin_pass(self) -> None:
        """Says that a forward pass begins. The one before may have broken off (Ctrl-C, an error, a callback)."""
        if self._broke_off:
            # Who sits where was being written down at that moment: nothing of it is trusted.
            self.transfers.abandon()
            self._cache = SlotCache(self.slots, len(self._num_experts), self._eviction)
        self._broke_off = False
        self._cache.unpin_all()
        self._guesses.clear()
        self._demands.clear()
        self._prefetches.clear()
        self._mailbox.clear()

    def resident(self, number: int) -> list[int]:
        """The experts of a layer that are on the device or on their way there."""
        return self._cache.experts_of(number)

    def announce(self, number: int, candidates: torch.Tensor, now: bool) -> None:
        """Takes note of the candidates `[tokens, m]` of a layer; `now` begins their copies, if there are slots for them.

        Else they begin with the next layer that is executed, after what that one demands.
        """
        self._mailbox.put(number, candidates)
        if now:
            self._broke_off = True
            self._open_mail()
            self._broke_off = False

    def execute(
        self, number: int, experts: nn.Module, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """`experts(x, ids, weights)` over slots: demand fetches first, then prefetches, then the computation.

        `x` is `[tokens, hidden]`, `ids` and `weights` are `[tokens, top_k]`. What is on the device is computed first,
        while the rest is being copied, one slot being filled as another becomes free; so any number of experts passes
        through any number of slots. Each expert sees the rows that it would see with everything resident, and their sum
        is taken in the order of `ids`: the result is the same. Raises `StoreError` where an expert can't be had.
        """
        self._broke_off = True
        self._cache.layer = number
        guess = self._guesses.pop(number, None)
        # What was guessed for this layer and not begun is no longer a guess.
        self._prefetches = deque(key for key in self._prefetches if key[0] != number)
        # Where the guess is executed whatever the router says, the host has known the experts since the layer before,
        # and on CUDA it need not wait for the router.
        known = guess is not None and len(x) == 1 and self._executes_guess
        # The router returns a guess that is executed in the order of the guess.
        jobs = self._jobs(x, guess[: ids.shape[-1]] if guess is not None and known else None, ids, number)
        if guess is not None:
            self._release(number, guess, jobs.keys())

        present: list[int] = []
        in_flight: list[int] = []
        missing: list[int] = []
        for expert in jobs:
            key = number, expert
            if key not in self._cache:
                missing.append(expert)
                continue
            self._cache.pin(key)
            slot = self._cache.slot(key)
            self.transfers.hurry(slot)
            (in_flight if self.transfers.copying(slot) else present).append(expert)
        self.counters.hits += len(present) + len(in_flight)
        self.counters.misses += len(missing)
        self.counters.tokens += len(x) if number == 0 else 0
        self._demands = deque((number, expert) for expert in missing)
        self._begin_copies()
        if not (known and x.is_cuda):
            self._open_mail()

        outputs = x.new_empty(ids.numel(), x.shape[-1])
        for expert in present + in_flight + missing:
            key = number, expert
            if key not in self._cache:  # every slot without a pin is still being copied into
                self._begin_copies(wait=True)
            slot = self._cache.slot(key)
            try:
                self.transfers.wait(slot)
            except BaseException:
                self._cache.forget(key)
                raise
            inputs, positions = jobs[expert]
            outputs[positions] = expert_output(experts, self._slot_tensors[slot], inputs)
            self.transfers.computed(slot)
            self._cache.unpin(key)
            self._begin_copies()
        self._open_mail()
        result = combine(outputs, weights)
        self._broke_off = False
        return result

    def _release(self, number: int, guess: list[int], needed: Collection[int]) -> None:
        """Lets go of what was guessed for a layer; wrong guesses whose copies have not begun are never copied."""
        for expert in guess:
            key = number, expert
            if key not in self._cache:
                continue
            self._cache.unpin(key)
            if expert not in needed and self.transfers.cancel(self._cache.slot(key)):
                self._cache.forget(key)
                self.counters.copies -= 1
                self.counters.bytes_copied -= self.store.layout.bytes
                self.counters.cancelled += 1

    def _open_mail(self) -> None:
        for number, guess in self._mailbox.take():
            self._guesses[number] = guess
            keys = [(number, expert) for expert in guess]
            # A nearer layer's go before a farther one's, however early those were known.
            nearer = [key for key in self._prefetches if key[0] <= number]
            self._prefetches = deque([*nearer, *keys, *(key for key in self._prefetches if key[0] > number)])
        self._begin_copies()

    def _begin_copies(self, wait: bool = False) -> None:
        """Begins as many copies as there are slots for; what the layer at hand demands goes before what is guessed.

        With `wait` the first of them may take a slot that is still being copied into, after that copy is over.
        """
        for queue, urgent in ((self._demands, True), (self._prefetches, False)):
            while queue:
                key = queue[0]
                if key in self._cache:
                    self._cache.pin(key)
                else:
                    slot = self._cache.admit(key) if wait else self._cache.admit(key, self.transfers.copying)
                    if slot is None and wait:  # the guesses for later layers hold every slot
                        self._cache.unpin_all()
                        slot = self._cache.admit(key)
                    if slot is None:
                        return
                    self.transfers.start(slot, key, urgent)
                    wait = False
                    self.counters.copies += 1
                    self.counters.bytes_copied += self.store.layout.bytes
                queue.popleft()

    def _jobs(
        self, x: torch.Tensor, known: list[int] | None, ids: torch.Tensor, number: int
    ) -> dict[int, tuple[torch.Tensor, slice | torch.Tensor]]:
        """What each expert computes: its rows of `x`, and where its outputs stand among `[tokens * top_k]`."""
        if len(x) == 1:
            executed = ids[0].tolist() if known is None else known
            return {expert: (x, slice(i, i + 1)) for i, expert in enumerate(executed)}
        groups = group_by_expert(ids, self._num_experts[number])
        rows = x[groups.order // ids.shape[-1]].split(groups.sizes)
        return dict(zip(groups.experts, zip(rows, groups.order.split(groups.sizes), strict=True), strict=True))
