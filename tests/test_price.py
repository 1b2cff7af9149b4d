"""What a guess is worth: the rule itself, and a model whose copies are priced, which computes what the plain model does."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_model
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from predict_train.predictors.architecture import farther, moe_shape
from predict_train.predictors.checkpoint import Predictors, TargetLayer
from predict_train.predictors.confidence import Confidence, Confidences, margins
from predict_train.predictors.discovery import find_moe_layers
from predict_train.runtime import offloaded
from predict_train.runtime.host.price import AT_FIRST, CAUTION, TRIED, TRIED_EVERY, LinkUse, Prices, Unguessed
from predict_train.runtime.measure.routing import Statistics, draw_routing
from predict_train.runtime.measure.simulation import Costs, nearest, simulate
from predict_train.runtime.settings import OffloadConfig
from test_offload import greedy, prompt
from transformers import PreTrainedModel

LAYERS, SLOTS = 4, 16


class Ran:
    """Prices that have seen some passes of `LAYERS` layers, with the first layer of another pass entered."""

    def __init__(
        self, copy: float, before: float = 1.0, executing: float = 1.0, stalled: float = 0.0, missing: int = 1
    ):
        self.now, self.copy = 0.0, copy
        self.prices = Prices(LAYERS, SLOTS, lambda: self.now, lambda: self.copy)
        for _ in range(100):
            self.prices.begin_pass(1)
            for layer in range(LAYERS):
                self.now += before
                self.prices.enter(layer, range(missing), missing)
                self.now += executing + stalled
                self.prices.stalled(stalled)
                self.prices.left()
        self.prices.begin_pass(1)
        self.now += before
        self.prices.enter(0, [], 0)

    def is_worth(self, chance: float, layer: int = 1, ahead: int = 0, needed: int = 0, evicts: bool = True) -> bool:
        self.prices.announce(layer, [7], {7: chance}, {7})
        return self.prices.chance(layer, 7) > self.prices.least_chance(layer, ahead, needed, evicts)


copies = st.floats(0.01, 10.0)
chances = st.floats(0.02, 0.999)
runs = st.builds(Ran, copies, st.floats(0.01, 5), st.floats(0.01, 5), st.floats(0.05, 5), st.integers(1, 4))


@given(runs, st.integers(1, 3), st.integers(0, 9), st.booleans())
def test_what_is_never_needed_is_never_copied(ran: Ran, layer: int, ahead: int, evicts: bool) -> None:
    assert not ran.is_worth(0.0, layer, ahead, evicts=evicts)


@given(runs, chances)
def test_nothing_begins_that_the_router_decides_before(ran: Ran, chance: float) -> None:
    """So many copies are to be made before it that it would not even begin in time."""
    until = 20.0  # more than all layers take
    assert not ran.is_worth(chance, ahead=int(until / ran.copy) + 2)


@given(chances, st.floats(0.001, 0.9))
def test_all_candidates_are_copied_while_the_link_is_idle_and_slots_are_free(chance: float, copy: float) -> None:
    ran = Ran(copy, stalled=copy)
    assert ran.is_worth(chance, evicts=False)
    # Where another expert has to go, a guess has to be right more often.
    again = ran.prices.link.again
    assert 0 < again < 5
    assert ran.is_worth(chance) == (chance > (1 - chance) * CAUTION * (again + ran.prices.link.queue))


@given(runs, chances, chances, st.integers(0, 3), st.booleans())
def test_a_surer_guess_is_worth_more(ran: Ran, chance: float, other: float, ahead: int, evicts: bool) -> None:
    low, high = sorted((chance, other))
    if ran.is_worth(low, ahead=ahead, evicts=evicts):
        assert ran.is_worth(high, ahead=ahead, evicts=evicts)


@given(runs, chances, st.integers(0, 5), st.integers(0, 3), st.booleans())
def test_a_copy_is_worth_less_behind_others_and_where_it_evicts(
    ran: Ran, chance: float, ahead: int, more: int, evicts: bool
) -> None:
    if ran.is_worth(chance, ahead=ahead + more, evicts=evicts):
        assert ran.is_worth(chance, ahead=ahead, evicts=evicts)
        assert ran.is_worth(chance, ahead=ahead, evicts=False)


@given(chances)
def test_a_slow_copy_is_only_for_guesses_that_are_sure(chance: float) -> None:
    """A tenth of it is made in time. A wrong one holds up what is missing for the other nine tenths."""
    ran = Ran(copy=20.0, before=1.0, executing=1.0, stalled=20.0)
    saved, late = 2.0, 18.0
    waits = ran.prices._times[1].missing.value
    assert waits == pytest.approx(1, abs=0.01)
    others = (ran.prices.link.again + ran.prices.link.queue) * 20.0
    assert ran.is_worth(chance) == (chance * saved > (1 - chance) * CAUTION * (late * waits + others))


def test_a_guess_two_layers_ahead_has_more_time_but_holds_up_the_layer_between() -> None:
    quick = Ran(copy=3.0, stalled=3.0, missing=1)
    # 2 seconds until the next layer is entered, and 5 more until the one after it, waits included: it is there in time.
    assert quick.is_worth(0.5, layer=2, evicts=False)
    assert not quick.is_worth(0.2, layer=2, evicts=False), "what layer 1 is missing would wait for a second"
    # What layer 1 is missing would wait for 28 seconds, whether the guess is right or not. It saves 30.
    slow = Ran(copy=30.0, stalled=30.0, missing=1)
    assert not slow.is_worth(0.5, layer=2, evicts=False)
    assert slow.is_worth(0.999, layer=2, evicts=False)


def test_without_measurements_everything_is_copied() -> None:
    for copy in (None, 1.0):
        prices = Prices(LAYERS, SLOTS, lambda: 0.0, lambda copy=copy: copy)
        assert prices.chance(1, 7) > prices.least_chance(1, 5, 5, True)


def test_what_is_not_known_is_learned_by_the_place_in_a_guess() -> None:
    ran = Ran(copy=0.1, stalled=0.1)
    for _ in range(60):
        ran.prices.begin_pass(1)
        for layer in range(LAYERS):
            ran.prices.announce(layer, [1, 2, 3], None, {1, 3})
            ran.now += 1
            ran.prices.enter(layer, [1, 2], 0)
            ran.prices.left()
    ran.prices.announce(1, [4, 5, 6], None, {4, 6})
    least = ran.prices.least_chance(1, 0, 0, True)
    assert [ran.prices.chance(1, expert) > least for expert in (4, 6)] == [True, False]


def test_what_wrong_copies_cost_follows_from_what_comes_back_and_from_how_busy_the_link_is() -> None:
    def link(back: int, copies: int) -> LinkUse:
        use = LinkUse(SLOTS)
        for token in range(1, 200):
            for number in range(copies):
                # An expert that has just left, or one that never had a slot.
                left = (0, (token - 1) * copies + number)
                use.copied(left if number < back else (1, token * copies + number), (0, token * copies + number))
            use.waited(0.5 * copies)
            use.end_pass(1.0, 0.1, guessing=0.0)
            use.begin_pass(1)
        return use

    assert link(0, 2).again < 0.01 < 1 < link(1, 1).again
    assert link(0, 2).queue == pytest.approx(0.125, abs=0.01)
    assert link(0, 8).queue == pytest.approx(2, abs=0.05)
    assert link(0, 20).queue == pytest.approx(9.5, abs=0.1)
    assert link(0, 8).stall.value == pytest.approx(0.5)


@given(st.floats(0, 1), st.floats(0.1, 10), st.integers(0, 100))
def test_how_much_copies_slow_the_computation_beside_them_is_measured(slower: float, alone: float, seed: int) -> None:
    use, drawn, copy, guessing = LinkUse(SLOTS), random.Random(seed), 0.2, 0.03
    for token in range(100):
        copies, waited = drawn.randint(0, 9), drawn.random()
        for number in range(copies):
            use.copied((token, number), None)
        use.waited(waited)
        beside = max(0.0, copies * copy - waited)
        use.end_pass(alone + slower * beside + waited + guessing, copy, guessing)
        use.begin_pass(1)
    assert use.beside == pytest.approx(slower, abs=1e-6)


@given(st.integers(0, 100))
def test_neither_a_prompt_nor_noise_looks_like_slower_computation(seed: int) -> None:
    """A prompt copies much and computes long. What else a machine does makes times noisy."""
    use, drawn = LinkUse(SLOTS), random.Random(seed)
    for token in range(60):
        use.begin_pass(1 if token else 32)
        copies = drawn.randint(3, 9) if token else 400
        for number in range(copies):
            use.copied((token, number), None)
        use.end_pass(drawn.gauss(4.0, 0.4) if token else 40.0, 0.1, 0.0)
    assert use.beside < 0.7


def test_a_copy_that_slows_the_computation_as_long_as_it_takes_saves_nothing() -> None:
    ran = Ran(copy=0.5, stalled=0.5)
    assert ran.is_worth(1.0)
    for copies in range(20):
        for number in range(copies):
            ran.prices.link.copied((number, copies), None)
        # Beside the computation, or waited for.
        ran.prices.link.waited(0.0 if copies % 2 else 0.5 * copies)
        ran.prices.link.end_pass(8 + (0.6 if copies % 2 else 0.5) * copies, 0.5, 0.0)
        ran.prices.link.begin_pass(1)
    assert not ran.is_worth(1.0)


@given(st.integers(1, 8), st.floats(0.01, 5), st.floats(0.0, 5))
def test_what_a_layer_would_have_waited_without_a_guess(needed: int, copy: float, executing: float) -> None:
    """As a link that copies one after another and a layer that executes one after another have it."""
    for missing in range(1, needed + 1):
        told, one = Unguessed(), executing / needed
        told.add(missing, needed, copy, executing)
        now, waited = (needed - missing) * one, 0.0
        for number in range(1, missing + 1):
            waited += max(0.0, number * copy - now)
            now = max(now, number * copy) + one
        assert told.copies == missing
        assert told.stalled == pytest.approx(waited)


def test_guesses_that_do_not_pay_are_made_now_and_then_only() -> None:
    ran, made = Ran(copy=0.1, stalled=0.1), 0
    for token in range(4 * TRIED_EVERY):
        pays = token >= 2 * TRIED_EVERY
        if token == 2 * TRIED_EVERY:
            made = 0
        guesses = ran.prices.prefetches
        made += guesses
        ran.prices.begin_pass(1)
        for layer in range(LAYERS):
            is_there = guesses and pays
            if guesses:
                ran.prices.guessed(1e-3)
                ran.prices.announce(layer, [7], {7: 1.0 if pays else 0.0}, {7})
                if ran.prices.chance(layer, 7) > ran.prices.least_chance(layer, 0, 0, True):
                    ran.prices.copied((layer, 7), None)
            ran.now += 1
            ran.prices.enter(layer, [7], 0 if is_there else 1)
            if not is_there:
                ran.prices.copied((layer, 7), None)
                ran.now += 0.1
                ran.prices.stalled(0.1)
            ran.prices.left()
        if token == 2 * TRIED_EVERY - 1:
            assert made <= AT_FIRST + 3 * TRIED
    assert made > TRIED_EVERY, "it finds out that guesses pay now"


@given(
    seed=st.integers(0, 20),
    copy=st.sampled_from([0.05, 0.3, 1.0, 3.0]),
    slots=st.integers(12, 90),
    hit_rate=st.floats(0.5, 1.0),
    horizon=st.integers(1, 2),
    known=st.booleans(),
)
@settings(max_examples=8, deadline=None, phases=[Phase.generate])  # to shrink would take minutes
def test_priced_guesses_are_hardly_ever_slower_than_the_better_policy(
    seed: int, copy: float, slots: int, hit_rate: float, horizon: int, known: bool
) -> None:
    routing = draw_routing(
        Statistics(0.4, hit_rate), steps=150, layers=6, num_experts=16, top_k=3, candidates=3, seed=seed
    )
    if known:
        right = (routing.candidates[..., None] == routing.ids[..., None, :]).any(-1).mean((0, 1))
        routing = replace(routing, chances=np.broadcast_to(right, routing.candidates.shape))
    costs = Costs(layer=1.0, expert=0.3, copy=copy, rest=0.5, speculation=0.02)
    sources = farther(nearest(range(6)), horizon)
    seconds = {
        policy: simulate(costs, routing, OffloadConfig(policy=policy, slots=slots), sources, warmup=50).seconds
        for policy in ("on_demand", "prefetch", "auto")
    }
    # Routing of one kind for each rank says little of each guess, and 100 tokens vary: the margin is wider than the benchmark's.
    assert seconds["auto"] <= 1.08 * min(seconds["on_demand"], seconds["prefetch"])


def sure_predictors(model: PreTrainedModel, horizon: int) -> Predictors:
    """Training-free ones that say how sure they are, for guesses so far ahead."""
    layers, drawn = find_moe_layers(model), torch.Generator().manual_seed(0)
    near = {layer.index: None if layer.index == 0 else layer.index - 1 for layer in layers}
    sources: dict[int, Any] = farther(near, horizon)
    return Predictors(
        model={"name": "tiny"} | moe_shape(model.config, layers),
        layers=[TargetLayer(target, source, confidence=Confidence(0.5)) for target, source in sources.items()],
        default_vectors={layer.index: torch.randn(8, 32, generator=drawn) for layer in layers},
    )


def decide_at_random(monkeypatch: pytest.MonkeyPatch, prefetching: float = 1.0) -> set[bool]:
    """From now on it is drawn which copies are worth their price, and whether to prefetch, with this probability.

    Returns what is said of copies, which comes in as it is said.
    """
    drawn, said = random.Random(0), set()

    def chance(*_: Any) -> float:
        worth = drawn.random() < 0.5
        said.add(worth)
        return float(worth)

    monkeypatch.setattr(Prices, "chance", chance)
    monkeypatch.setattr(Prices, "least_chance", lambda *_, **__: 0.5)
    monkeypatch.setattr(Prices, "prefetches", property(lambda _: drawn.random() < prefetching))
    return said


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("horizon", [1, 2])
def test_whatever_is_copied_the_tokens_are_those_of_the_plain_model(
    architecture: str, horizon: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(architecture)
    expected = {rows: greedy(model, prompt(rows, 6), 12) for rows in (1, 2)}
    predictors = None if architecture == "deepseek_v3" else sure_predictors(model, horizon)
    said: set[bool] = set()
    for is_drawn in (False, True):
        if is_drawn:
            said = decide_at_random(monkeypatch, prefetching=0.8)
        for rows, tokens in expected.items():
            with offloaded(model, predictors, policy="auto", slots=5, horizon=horizon, device="cpu") as offload:
                assert torch.equal(greedy(model, prompt(rows, 6), 12), tokens)
                assert offload.counters.speculation_hit_rate is not None
    assert said == {True, False}


def test_the_runtime_measures_what_it_needs_and_knows_how_sure_guesses_are() -> None:
    model = build_model("qwen3_moe")
    told: list[dict[int, float] | None] = []
    with offloaded(model, sure_predictors(model, 1), policy="auto", slots=4, device="cpu") as offload:
        prices = offload._engine.prices
        announce = prices.announce
        prices.announce = lambda layer, guess, chances, absent: (
            told.append(chances),
            announce(layer, guess, chances, absent),
        )
        greedy(model, prompt(1, 6), 12)
        assert prices._copy_seconds() > 0
        for layer in prices._of(1):
            assert layer.before.value > 0
        assert all(layer.executing.value > 0 for layer in prices._of(1)[:-1])
    assert told
    assert all(chances and all(0 < chance < 1 for chance in chances.values()) for chances in told)


@given(st.integers(1, 3), st.integers(2, 6), st.integers(0, 99))
def test_a_candidate_is_right_if_any_token_needs_it(tokens: int, m: int, seed: int) -> None:
    """With the probabilities of the tokens' margins, in whatever order the router's own choice comes."""
    logits, top_k, sure = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed)), 2, Confidence(0.5, 0.1)
    found = logits.topk(max(m, top_k + 1)).indices
    found[:, :top_k] = found[:, :top_k].flip(1)
    right = sure.probabilities(margins(logits, found, top_k))
    needed = torch.ones(8).expand(tokens, 8).scatter(1, found[:, :m], 1 - right[:, :m]).prod(0)
    values = logits.gather(1, found).tolist()
    chances = Confidences([sure], top_k).chances(0, zip(found[:, :m].tolist(), values, strict=True))
    assert chances is not None
    assert chances == pytest.approx({int(e): 1 - float(needed[e]) for e in found[:, :m].unique()}, abs=1e-6)
