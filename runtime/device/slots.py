"""The engine of the device: kernels decide which experts get slots and copy them, so a decode step never waits for the host.

    main stream   attention l | router l | slots of l, missing ones copied | experts l       | attention t | router t | ...
    guesses                              | guess t | slots of t                                                       | guess of the next
    copies        those guessed for l ...................... | those guessed for t .................................... | ...

So that the link is never idle, a guess does not wait for the copies of the guess before.

A prompt is executed by the host's engine, in the same slots. Between the two, the books are handed over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ...predictors.experts import OnOutputs
from ..engine import Counters, Decision, Engine
from ..formats import ExpertFormat
from ..formats.gguf import GgufFormat
from ..formats.quantized import QuantizedFormat
from ..host.cache import Key
from ..host.slots import ExpertSlots
from ..observer import Observer
from ..store import MemoryStore
from .arithmetic import ExpertArithmetic
from .gguf import GgufArithmetic
from .hits import DeviceHitCount
from .quantized import QuantizedArithmetic
from .tables import Books, LayerTables, Link

PROGRAMS = 32, 64, 128
"""How many programs may copy."""
NEARLY = 1.02
"""Of two times, the longer one is as good if it is not longer than by this factor."""


_idle: defaultdict[torch.device, list[tuple[torch.Stream, torch.Stream]]] = defaultdict(list)
"""Streams of detached models. They are used again, since libraries keep memory for each stream (cuBLAS 32 MiB) and never free it."""


class Announced(NamedTuple):
    """What the streams beside the main one have been asked to do for a layer."""

    table: torch.Tensor
    """The places of the best candidates, `[tokens, m]`: of as many as the layer has slots for."""
    assigned: torch.Event | None
    """When the candidates are known and have slots."""
    copied: torch.Event | None


def arithmetic_of(
    experts: nn.Module, form: ExpertFormat, memory: torch.Tensor, blocks: torch.Tensor
) -> ExpertArithmetic:
    """The arithmetic of one layer's experts in `memory` `[slots, bytes]`, uint8. Their `blocks` `[experts, bytes]` are in host memory."""
    if isinstance(form, GgufFormat):
        return GgufArithmetic(experts, form, memory, blocks[0])
    if isinstance(form, QuantizedFormat):
        return QuantizedArithmetic(experts, form, memory)
    return ExpertArithmetic(experts, form, memory)


class DeviceSlots(Engine):
    """The `Engine` of the device. Each layer has an equal part of the slots, so no layer evicts another one's experts."""

    def __init__(self, host: ExpertSlots, store: MemoryStore, modules: list[nn.Module], most_tokens: int):
        """`host` executes prompts, and the device passes over up to `most_tokens` tokens. `modules` are the layers' experts."""
        (layers, experts), memory = store.extent, host.memory
        slots, device = len(memory), memory.device
        shares = [slots // layers + (layer < slots % layers) for layer in range(layers)]
        self._host, self._most_tokens, self._experts = host, most_tokens, experts
        self._books = torch.empty(layers, experts + 3 * shares[0], dtype=torch.int32, device=device)
        self._counters = torch.zeros(layers, 3, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(1, dtype=torch.int64, device=device)
        self._link = Link(memory.view(torch.int64), torch.zeros(1, dtype=torch.int32, device=device), PROGRAMS[0])
        counts = host.counts
        self._score = None if counts is None else counts.to(device)
        """Each expert's decayed count, if it decides who leaves a slot: `[layers, experts]`, fp32."""
        scores = [None] * layers if self._score is None else self._score
        parts = zip(self._books, shares, self._counters, store.blocks, scores, strict=True)
        self._layers = [
            LayerTables(Books.of(row, experts, share), counters, blocks, self._link, score)
            for row, share, counters, blocks, score in parts
        ]
        self._arithmetic = [
            arithmetic_of(module, store.format, memory, blocks)
            for module, blocks in zip(modules, store.blocks, strict=True)
        ]
        self._guesses: torch.Stream | None = None
        self._copies: torch.Stream | None = None
        if device.type != "cpu":
            idle = _idle[device]
            self._guesses, self._copies = idle.pop() if idle else (torch.Stream(device), torch.Stream(device))
        self._announced: dict[int, Announced] = {}
        self._read_beside: list[Any] = []
        """What the guesses read in this pass. Its memory must not be used again before the main stream has waited."""
        self._decides = False
        """Whether the device decides in this pass. In a prompt the host does."""
        self._broke_off = False
        self._write([[] for _ in self._layers])
        if memory.is_cuda:
            self.programs = self._enough_programs()

    @property
    def programs(self) -> int:
        """How many programs copy; see `Link`."""
        return self._link.programs

    @programs.setter
    def programs(self, programs: int) -> None:
        self._link.programs = programs

    def close(self) -> None:
        if self._guesses is not None and self._copies is not None:
            self._guesses.synchronize()
            self._copies.synchronize()
            _idle[self._guesses.device].append((self._guesses, self._copies))
        for held in (self._announced, self._read_beside, self._layers, self._arithmetic):
            held.clear()
        del self._link, self._books
        self._host.close()

    def observe(self, observer: Observer | None) -> None:
        self._host.observe(observer)

    def watch(self, layer: int, on_outputs: OnOutputs | None) -> None:
        self._host.watch(layer, on_outputs)

    def counters(self) -> Counters:
        """See `Engine.counters`. How long a device has waited for copies, nobody can say."""
        host, (copies, hits, misses) = self._host.counters(), self._counters.sum(0).tolist()
        return replace(
            host,
            hits=host.hits + hits,
            misses=host.misses + misses,
            copies=host.copies + copies,
            bytes_copied=host.bytes_copied + copies * self._host.memory.shape[1],
            tokens=host.tokens + int(self._tokens),
            stalled_seconds=None,
        )

    def reset(self) -> None:
        self._host.reset()
        self._counters.zero_()
        self._tokens.zero_()

    def hit_count(self, top_k: int) -> DeviceHitCount:
        return DeviceHitCount(top_k, self._books.device)

    def prepare(self, tokens: int) -> bool:
        """Whether the device decides in the next pass, which is over so many tokens. If this changes, the books are handed over.

        A hand-over waits for the device. So this is called before a pass is captured or replayed. Under autocast the host
        decides, since the device's kernels know nothing of it, and so it does while outputs are watched.
        """
        is_cast = torch.is_autocast_enabled(self._books.device.type)
        decides = tokens <= self._most_tokens and not is_cast and not self._host.is_watched
        if self._broke_off:
            if self._guesses is not None:
                torch.accelerator.synchronize(self._guesses.device)
            self._host.take_over([], self._score)
            self._write([[] for _ in self._layers])
        elif decides and not self._decides:
            found: list[list[tuple[int, int]]] = [[] for _ in self._layers]
            for (layer, expert), place in self._host.settled():
                found[layer].append((expert, place))
            self._write([pairs[-tables.slots :] for pairs, tables in zip(found, self._layers, strict=True)])
            if self._score is not None and (counts := self._host.counts) is not None:
                self._score.copy_(counts)
        elif self._decides and not decides:
            self._host.take_over(self._resident(), self._score)
        self._decides, self._broke_off = decides, False
        return decides

    def begin_pass(self, tokens: int) -> None:
        if not self.prepare(tokens):
            self._host.begin_pass(tokens)
            return
        self._broke_off = True
        self._announced.clear()
        self._read_beside.clear()
        self._link.clock.add_(1)
        self._tokens.add_(tokens)

    @contextmanager
    def guessing(self, *inputs: Any) -> Iterator[None]:
        if not self._decides or self._guesses is None:
            yield
            return
        self._read_beside.append(inputs)
        self._guesses.wait_stream(torch.accelerator.current_stream(self._guesses.device))
        with self._guesses:
            yield

    def announce(self, layer: int, candidates: torch.Tensor, now: bool, values: torch.Tensor | None = None) -> None:
        if not self._decides:
            self._host.announce(layer, candidates, now, values)
            return
        tables = self._layers[layer]
        best = candidates[:, : tables.slots // len(candidates)]  # of every token
        table = tables.assign(best, late=False) if best.numel() else best
        assigned = self._mark()
        with nullcontext() if self._copies is None else self._copies:
            self._await(assigned)
            if best.numel():
                tables.copy()
            self._announced[layer] = Announced(table, assigned, self._mark())

    def guessed(self, layer: int) -> None:
        if layer in self._announced:
            self._await(self._announced[layer].assigned)

    def absent(self, layer: int) -> torch.Tensor:
        return self._layers[layer].books.slot_of < 0 if self._decides else self._host.absent(layer)

    def execute(self, layer: int, experts: nn.Module, x: torch.Tensor, decision: Decision) -> torch.Tensor:
        """See `Engine.execute`. Tokens that need more experts than the layer has slots are executed in parts."""
        if not self._decides:
            return self._host.execute(layer, experts, x, decision)
        tables, arithmetic, (_, ids, weights) = self._layers[layer], self._arithmetic[layer], (x, *decision[:2])
        announced, k = self._announced.pop(layer, None), ids.shape[1]
        if announced is not None:
            self._await(announced.copied)
        if decision.known and announced is not None and announced.table.shape[1] >= k:
            tables.executes(ids)
            output = arithmetic.output(x, weights, announced.table)
        else:
            at_once, outputs = max(1, tables.slots // k), []
            for part in range(0, len(x), at_once):
                rows = slice(part, part + at_once)
                table = tables.assign(ids[rows], late=True)
                tables.copy()
                outputs.append(arithmetic.output(x[rows], weights[rows], table))
            output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if layer == len(self._layers) - 1:
            self._broke_off = False
        return output

    def _enough_programs(self) -> int:
        """The fewest programs that copy about as fast as any number of them."""
        times = {}
        for programs in PROGRAMS:
            self.programs = programs
            self._layers[0].measure_copy()  # it compiles the kernel and warms up
            times[programs] = min(self._layers[0].measure_copy() for _ in range(3))
        return min(programs for programs, time in times.items() if time <= NEARLY * min(times.values()))

    def _mark(self) -> torch.Event | None:
        return None if self._copies is None else torch.accelerator.current_stream(self._copies.device).record_event()

    def _await(self, event: torch.Event | None) -> None:
        if event is not None:
            event.wait()

    def _write(self, found: list[list[tuple[int, int]]]) -> None:
        """Writes the books: for each layer the experts and their places, the least recently used first."""
        taken = {place for pairs in found for _, place in pairs}
        free = [place for place in range(len(self._host.memory)) if place not in taken]
        written = torch.full(self._books.shape, -1, dtype=torch.int32, device="cpu")
        for row, tables, pairs in zip(written, self._layers, found, strict=True):
            slot_of, owner, used, pool = (part.numpy() for part in Books.of(row, self._experts, tables.slots))
            count, most = len(pairs), tables.slots
            owner[:count], pool[:count] = np.reshape(pairs, (count, 2)).T
            slot_of[owner[:count]] = np.arange(count)
            used[:] = np.arange(most) - 2 * most  # before all that the device will use
            used[count:] -= most  # empty slots first
            pool[count:] = [free.pop() for _ in range(most - count)]
        self._link.clock.zero_()
        self._books.copy_(written)

    def _resident(self) -> list[tuple[Key, int]]:
        """All experts with their places, the least recently used first. It waits for the device."""
        found = []
        for layer, (row, tables) in enumerate(zip(self._books.cpu(), self._layers, strict=True)):
            books = Books.of(row, self._experts, tables.slots)
            for expert, used, place in zip(*(part.tolist() for part in books[1:]), strict=True):
                if expert >= 0:
                    found.append((used, (layer, expert), place))
        return [(key, place) for _, key, place in sorted(found)]
