"""The books of the device's engine and of the host's: what one hands over, the other one has, and the slots hold what they say."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from conftest import UNTRAINED
from hypothesis import example, given, settings
from hypothesis import strategies as st
from predict_train.predictors.experts import combine, expert_outputs
from predict_train.runtime import Eviction
from predict_train.runtime.device.slots import DeviceSlots
from predict_train.runtime.device.tables import Books
from predict_train.runtime.engine import Decision
from predict_train.runtime.host.cache import Key
from predict_train.runtime.host.slots import ExpertSlots
from predict_train.runtime.store import HostStore
from test_arithmetic import Experts, integers
from test_device import DEVICE

LAYERS, EXPERTS, TOP_K, MOST_TOKENS = 2, 6, 2, 3
ON_DEVICE = [eviction for eviction in UNTRAINED if eviction is not Eviction.FOLLOWERS]


class Guess(NamedTuple):
    candidates: list[list[int]]
    known: bool
    """Whether the best of them are what is executed."""


class Pass(NamedTuple):
    ids: list[list[list[int]]]
    """Of each layer, `[tokens, k]`."""
    guesses: list[Guess | None]
    """For each layer."""
    layers: int
    """How many layers are executed before it breaks off."""


@st.composite
def passes(draw: st.DrawFn) -> list[Pass]:
    orders, found = st.permutations(range(EXPERTS)), []
    for _ in range(6):
        tokens = draw(st.sampled_from([1, 2, MOST_TOKENS, MOST_TOKENS + 1, MOST_TOKENS + 2]))
        ids = [[draw(orders)[:TOP_K] for _ in range(tokens)] for _ in range(LAYERS)]
        guesses: list[Guess | None] = []
        for chosen in ids:
            m, known = draw(st.integers(0, 4)), draw(st.booleans())
            candidates = [draw(orders) for _ in range(tokens)]
            if known:
                candidates = [
                    [*own, *(e for e in row if e not in own)] for own, row in zip(chosen, candidates, strict=True)
                ]
            guesses.append(Guess([row[:m] for row in candidates], known and m >= TOP_K) if m else None)
        found.append(Pass(ids, guesses, draw(st.sampled_from([LAYERS] * 4 + [1]))))
    return found


class Machine:
    """An engine of the device with small experts, and all that can be seen of it."""

    def __init__(self, slots: int, eviction: Eviction):
        torch.manual_seed(0)
        modules = [Experts(EXPERTS, 6, 4, torch.float32, "relu", (False, False, False)) for _ in range(LAYERS)]
        # The parameters are moved into the store.
        self.plain = [{name: p.detach().clone() for name, p in module.named_parameters()} for module in modules]
        self.modules, device = modules, torch.device(DEVICE)
        layers: Any = [SimpleNamespace(experts=module, num_experts=EXPERTS, stored=EXPERTS) for module in modules]
        self.store = HostStore(layers, device)
        self.host = ExpertSlots(self.store, slots, device, 1, eviction)
        self.engine = DeviceSlots(self.host, self.store, list(modules), MOST_TOKENS)
        self.engine.programs = 2

    def close(self) -> None:
        self.engine.close()
        self.store.close()

    def books(self) -> list[Books]:
        return [Books(*(part.cpu() for part in tables.books)) for tables in self.engine._layers]

    def on_device(self) -> list[tuple[Key, int]]:
        """The books of the device, as the host has them."""
        found = []
        for layer, books in enumerate(self.books()):
            for expert, used, place in zip(*(part.tolist() for part in books[1:]), strict=True):
                if expert >= 0:
                    found.append((used, (layer, expert), place))
        return [(key, place) for _, key, place in sorted(found)]

    def check_books(self) -> None:
        """Each place is one layer's, and each expert that has a slot owns it."""
        books = self.books()
        assert sorted(chain(*(part.pool.tolist() for part in books))) == list(range(len(self.host.memory)))
        for part in books:
            owners = [(slot, expert) for slot, expert in enumerate(part.owner.tolist()) if expert >= 0]
            assert owners == sorted((slot, expert) for expert, slot in enumerate(part.slot_of.tolist()) if slot >= 0)

    def check_memory(self, resident: list[tuple[Key, int]]) -> None:
        for (layer, expert), place in resident:
            assert torch.equal(self.host.memory[place].cpu(), self.store.block(layer, expert)), (layer, expert)

    def expected(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = [
            expert_outputs(
                self.modules[layer], [{n: p[expert] for n, p in self.plain[layer].items()}], [x[token : token + 1]]
            )
            for token, chosen in enumerate(ids.tolist())
            for expert in chosen
        ]
        return combine(torch.cat(rows), weights, x.dtype)

    def run(self, asked: Pass) -> None:
        """One forward pass, whose layers all compute what they should."""
        engine, tokens = self.engine, len(asked.ids[0])
        engine.begin_pass(tokens)
        self._announce(asked, 0, now=True)
        for layer, chosen in enumerate(asked.ids[: asked.layers]):
            if layer + 1 < LAYERS:
                self._announce(asked, layer + 1, now=False)
            guess, slots = asked.guesses[layer], engine._layers[layer].slots
            if guess is not None:
                engine.guessed(layer)
            x, ids, weights = integers(tokens, 6), torch.tensor(chosen), torch.randint(1, 9, (tokens, TOP_K)) / 8
            absent, before = engine.absent(layer).cpu(), engine.counters()
            decision = Decision(ids.to(DEVICE), weights.to(DEVICE), guess is not None and guess.known)
            output = engine.execute(layer, self.modules[layer], x.to(DEVICE), decision)
            assert torch.equal(output.cpu(), self.expected(layer, x, ids, weights))
            after = engine.counters()
            if tokens <= MOST_TOKENS:
                misses = after.misses - before.misses
                assert after.hits - before.hits + misses == ids.numel()
                if (
                    tokens * TOP_K <= slots
                ):  # else it is executed in parts, and a part may evict what the next one needs
                    assert misses == absent[ids].sum()
                    assert after.copies - before.copies == absent[ids.unique()].sum()
                    assert not engine.absent(layer).cpu()[ids].any()
                    by_use = self.host.counts is None and not decision.known
                    self._check_eviction(layer, ids, absent, is_last=by_use)
                    if guess is not None and guess.known and len(guess.candidates[0]) * tokens <= slots:
                        assert misses == 0

    def _check_eviction(self, layer: int, ids: torch.Tensor, absent: torch.Tensor, is_last: bool) -> None:
        """Empty slots are filled before any expert is evicted. With `is_last`, what was executed is the last to be evicted."""
        there = [expert for (number, expert), _ in self.on_device() if number == layer]
        wanted = {*ids.flatten().tolist(), *(~absent).nonzero().flatten().tolist()}
        assert len(there) == min(self.engine._layers[layer].slots, len(wanted))
        executed = set(ids.flatten().tolist())
        assert not is_last or set(there[-len(executed) :]) == executed

    def _announce(self, asked: Pass, layer: int, now: bool) -> None:
        guess = asked.guesses[layer]
        if guess is not None:
            candidates = torch.tensor(guess.candidates, device=DEVICE)
            with self.engine.guessing(candidates):
                self.engine.announce(layer, candidates, now)


PROMPT = Pass([[[0, 1]] * (MOST_TOKENS + 1)] * LAYERS, [None] * LAYERS, LAYERS)
TOKEN = Pass([[[2, 3]]] * LAYERS, [None] * LAYERS, LAYERS)
GUESSED = TOKEN._replace(guesses=[None, Guess([[2, 3]], known=True)])
TOO_MANY_TO_GUESS = Pass([[[4, 5]] * MOST_TOKENS] * LAYERS, [None, Guess([[4, 5]] * MOST_TOKENS, known=True)], LAYERS)


@settings(max_examples=6)
@given(passes(), st.integers(LAYERS * TOP_K, LAYERS * EXPERTS), st.sampled_from(ON_DEVICE))
@example([PROMPT, TOKEN._replace(layers=1), PROMPT], LAYERS * TOP_K, Eviction.LEAST_STALE)
@example([PROMPT, TOKEN._replace(layers=1), TOKEN], LAYERS * TOP_K, Eviction.FREQUENCY)
@example([PROMPT, TOKEN, PROMPT], LAYERS * TOP_K, Eviction.LEAST_STALE)
@example([PROMPT, TOKEN, PROMPT], LAYERS * TOP_K, Eviction.FREQUENCY)
@example([GUESSED._replace(layers=1), TOO_MANY_TO_GUESS], LAYERS * TOP_K, Eviction.LEAST_STALE)
def test_books_go_to_and_fro_and_the_slots_hold_what_they_say(
    asked: list[Pass], slots: int, eviction: Eviction
) -> None:
    """Prompts and decode passes in any order, with guesses, and some of them break off."""
    machine = Machine(slots, eviction)
    try:
        engine, decided, broke_off, tokens = machine.engine, False, False, 0
        for one in asked:
            decides = len(one.ids[0]) <= MOST_TOKENS
            before = machine.on_device() if decided else machine.host.settled()
            if broke_off and decided:
                before = []
            assert engine.prepare(len(one.ids[0])) == decides
            if decides:
                machine.check_books()
                after = machine.on_device()
                for layer, books in enumerate(machine.books()):  # of a layer's experts the last used find room
                    own = [pair for pair in before if pair[0][0] == layer][-len(books.owner) :]
                    assert [pair for pair in after if pair[0][0] == layer] == own
                if machine.host.counts is not None and not decided:  # else they are those of the last prompt
                    torch.testing.assert_close(engine._score.cpu(), machine.host.counts)
            elif decided:
                counts = machine.host.counts
                before.sort(key=lambda pair: 0.0 if counts is None else float(counts[pair[0]]))
                assert machine.host.settled() == before
                if counts is not None:
                    torch.testing.assert_close(engine._score.cpu(), counts)
            machine.run(one)
            decided, broke_off = decides, one.layers < LAYERS
            tokens += len(one.ids[0])
            if not broke_off:
                if decided:
                    machine.check_books()
                machine.check_memory(machine.on_device() if decided else machine.host.settled())
        if not any(one.layers < LAYERS for one in asked):
            counters = engine.counters()
            assert counters.tokens == tokens
            assert counters.bytes_copied == counters.copies * machine.host.memory.shape[1]
        engine.reset()
        assert engine.counters().copies == engine.counters().hits == engine.counters().tokens == 0
    finally:
        machine.close()
