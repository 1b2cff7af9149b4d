"""What a guess is worth: which copies of candidates are begun under policy `auto`.

The copy of a candidate for layer `t` begins if it is expected to save more than it is expected to cost, both in seconds in which the
computation waits:

    p x (1 - B) x saved  >  (1 - p) x C x (late x W_t + (R + Q) x stall + B x copy)  +  sum over layers j before t of late_j x W_j

    p        the probability that t's router chooses the candidate
    saved    how much of the copy is made by the time the router decides, when the copy of what is missing would begin: nothing if the
             copies before it keep the link busy until then, and at most what would be waited for, since the experts that are there
             are computed meanwhile
    late     how much of the copy is left then. If the guess is wrong, what t is missing has to wait so long
    late_j   the same at the entry of a layer j in between, as there is one for a guess two layers ahead: what j is missing waits,
             whether the guess is right or not
    W_j      how likely it is that layer j is missing something
    R        how many more copies a wrong one brings about, since another expert leaves its slot for it; 0 while slots are free
    Q        how many copies one waits for on average: busy / (2 (1 - busy)) where the link is busy so much of the time, since copies
             are all of one length (M/D/1, Pollaczek-Khinchine)
    stall    how long one copy is waited for, on average over all copies
    B        how much longer the computation beside a copy takes, per second of copying: much where both use the same memory
    C        `CAUTION`

`R` follows from the last `g` experts that left their slots. If a share of all copies is of one of these, `g` slots more would have
spared that share. An expert that nobody needs has a slot for as long as it takes to make a copy into each of the `slots`, and so
costs `share x slots / g` copies.

What a token's copies ahead save in all must pay for its guesses, too. Else only a few tokens now and then are guessed, to see whether
that has changed. This saving is more than the sum of what each copy saves beside all others: an expert that alone is missing is copied
while those that are there are computed. So it is what the token would have waited without any guess (`Unguessed`), less what it waited.
All times and shares are running means of what is measured, by a clock that the caller gives: the runtime's or a
simulation's. While they are not known, all candidates are copied, as under policy `prefetch`.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

from .cache import Key
from .running import Effect, Mean, Share

RIGHT_AT_FIRST = 0.8
"""The share of right guesses that is assumed before there were any."""
GONE = 8
"""Of so many slots one expert that left is remembered."""
BUSIEST = 0.95
CAUTION = 1.5
"""A wrong copy counts for so many times what it is expected to cost. It loses a thousandth of the time, and spares a sixth of the wrong copies
(docs/pricing.md)."""
AT_FIRST = 32
"""Of so many tokens a quarter is not guessed, and the others are, since little is known before."""
TRIED, TRIED_EVERY = 2, 128
"""Where guesses do not pay, so many tokens of so many are guessed nevertheless; and where they pay, so many are not."""
MOST_TOKENS = 64
"""Nothing is measured in a pass over more tokens: it is a prompt."""


class LayerTimes:
    """What is measured of one layer, in passes over one number of tokens. Seconds are of computation, without its waits."""

    def __init__(self) -> None:
        self.before = Mean()
        """Seconds from the last expert of the layer before to the entry of this one."""
        self.executing = Mean()
        """Seconds from its entry to its last expert."""
        self.stalled = Mean()
        """Seconds of waits in between."""
        self.missing = Mean(0.5, 2.0)
        """How often it was missing something."""
        self.exposed = Mean(1.0, 1.0)
        """The part of the copy of something missing that was waited for."""
        self.right: defaultdict[int, Share] = defaultdict(Share)
        """By the place in a guess: how often a candidate was right that was not on the device."""


class Unguessed:
    """What a pass would have cost if nothing had been guessed."""

    def __init__(self) -> None:
        self.copies = 0
        self.stalled = 0.0
        """Seconds."""

    def add(self, missing: int, needed: int, copy: float, executing: float) -> None:
        """Adds a layer that executes `needed` experts in so many seconds beside copies, and would have been `missing` some of them.

        Their copies begin as its router decides, and the experts that are there are executed meanwhile.
        """
        if missing:
            one = executing / needed
            self.copies += missing
            self.stalled += max(0.0, copy - (needed - missing) * one, missing * copy - (needed - 1) * one)


class PassTimes:
    """What is measured of passes over one number of tokens."""

    def __init__(self) -> None:
        self.beside = Effect()
        """Of a copy that is made beside the computation, rather than waited for, on the seconds of computation."""
        self.waited, self.expected = Mean(), Mean()
        """Seconds of waits in passes without guesses, and what `Unguessed` says of them."""


class LinkUse:
    """What is measured of the link and the slots of all layers."""

    def __init__(self, slots: int):
        self.busy = Mean(0.5, 8.0)
        """The share of the time in which the link is busy."""
        self.stall = Mean()
        """Seconds that one copy is waited for."""
        self._hidden = Mean(0.5, 8.0)  # the share of the computation that copies are made beside
        self._slots, self._remembered = slots, max(1, slots // GONE)
        self._gone: OrderedDict[Key, None] = OrderedDict()
        self._back = Mean(0.1, 10.0)  # the share of copies of experts that had just left
        self._by_tokens: defaultdict[int, PassTimes] = defaultdict(PassTimes)
        self._copy = 0.0  # seconds, in the last pass
        self.begin_pass(1)

    def copied(self, key: Key, evicted: Key | None) -> None:
        self._copies += 1
        self._back.add(float(key in self._gone))
        self._gone.pop(key, None)
        if evicted is not None:
            self._gone[evicted] = None
            if len(self._gone) > self._remembered:
                self._gone.popitem(last=False)

    def waited(self, seconds: float) -> None:
        self._waited += seconds

    def end_pass(self, seconds: float, copy: float, guessing: float) -> None:
        """A pass took so many seconds, `guessing` of them for its guesses. `copy` is what one copy takes."""
        copying, self._copy = self._copies * copy, copy
        if seconds > 0:
            self.busy.add(min(1.0, copying / seconds))
            hidden, computing = max(0.0, copying - self._waited), seconds - self._waited
            self._hidden.add(min(1.0, hidden / computing) if computing > 0 else 1.0)
            # Over the number of copies: where the machine is slow for a while, both copies and computation take longer.
            self._times.beside.add(self._copies, hidden / copy, computing - guessing)
        if self._copies:
            self.stall.add(self._waited / self._copies)

    def gain(self, unguessed: Unguessed, copy: float) -> float:
        """How many seconds sooner the pass is over than if nothing had been guessed, but for the time of the guesses themselves."""
        waited, expected = float(self._times.waited), float(self._times.expected)
        stalled = unguessed.stalled * (waited / expected if expected else 1.0)
        hidden = self._copies * copy - self._waited
        more = hidden - max(0.0, unguessed.copies * copy - stalled)
        return stalled - self._waited - self.beside * more

    def without_guesses(self, unguessed: Unguessed) -> None:
        """Says that nothing was guessed in the pass, so that what it has waited shows how much `unguessed` is off."""
        self._times.waited.add(self._waited)
        self._times.expected.add(unguessed.stalled)

    def begin_pass(self, tokens: int) -> None:
        """Forgets what has not been counted by `end_pass`. `tokens` are those of the pass, or 0 where nothing is measured in it."""
        self._copies, self._waited = 0, 0.0
        self._times = self._by_tokens[tokens]
        self.beside = min(1.0, max(0.0, self._times.beside.least / self._copy)) if self._copy else 0.0
        """How much longer the computation beside a copy takes, per second of copying: as much as is sure, since times are noisy."""

    @property
    def slower(self) -> float:
        """How many times as long as it takes on average computation takes if copies are made beside all of it."""
        beside = min(BUSIEST, self.beside)
        return (1 - beside * float(self._hidden)) / (1 - beside)

    @property
    def again(self) -> float:
        """How many more copies a wrong one brings about."""
        return float(self._back) * self._slots / self._remembered

    @property
    def queue(self) -> float:
        """How many copies one waits for."""
        busy = min(BUSIEST, float(self.busy))
        return busy / (2 * (1 - busy))


class Prices:
    """Prices the guesses of one schedule. Layers are counted from 0 among the MoE layers. It is an `automatic.Choice`."""

    is_timed = False
    """It has a clock of its own."""

    def __init__(self, layers: int, slots: int, clock: Callable[[], float], copy_seconds: Callable[[], float | None]):
        """`clock` returns the time in seconds. `copy_seconds` returns how long one copy takes, or None if that is not known."""
        self.clock = clock
        self._copy_seconds, self._layers = copy_seconds, layers
        self._by_tokens: dict[int, list[LayerTimes]] = {}
        self._times = self._of(1)
        self._right: defaultdict[int, Share] = defaultdict(Share)  # as of one layer, but of all
        self._is_counted = False
        self._chances: list[Mapping[int, float]] = [{} for _ in range(layers)]  # of the current guesses, by expert
        self._places: list[dict[int, int]] = [{} for _ in range(layers)]
        self._layer, self._missed = -1, 0  # before the first one
        self._begun = self._entered = self._left = clock()
        self._stalled = 0.0
        self.link = LinkUse(slots)
        self._ahead: list[set[int]] = [set() for _ in range(layers)]  # copied before their layer was entered
        self._unguessed = Unguessed()
        self._cost = 0.0
        self._gains, self._costs = Mean(), Mean()  # of a pass in which something is guessed
        self._again, self._queue, self._stall = 0.0, 0.0, math.inf
        self._passes = 0

    @property
    def prefetches(self) -> bool:
        """Whether the next pass should guess."""
        if self._passes <= AT_FIRST:
            return self._passes % 8 < 6
        return (float(self._gains) > float(self._costs)) != (self._passes % TRIED_EVERY < TRIED)

    def took(self, seconds: float) -> None:
        pass

    def begin_pass(self, tokens: int) -> None:
        copy = self._copy_seconds()
        if self._is_counted and copy and self._layer == self._layers - 1:
            self._leave(copy)
            if self._cost:
                self._gains.add(self.link.gain(self._unguessed, copy))
                self._costs.add(self._cost)
            else:
                self.link.without_guesses(self._unguessed)
            self.link.end_pass(self._left - self._begun, copy, self._cost)
        self._unguessed, self._cost = Unguessed(), 0.0
        for ahead in self._ahead:
            ahead.clear()
        self._passes += 1
        self._is_counted = 0 < tokens <= MOST_TOKENS
        self.link.begin_pass(tokens if self._is_counted else 0)
        # They hardly change in a pass, and are asked for at every copy.
        self._again, self._queue = self.link.again, self.link.queue
        self._stall = math.inf if self.link.stall.value is None else self.link.stall.value
        if self._is_counted:
            self._times = self._of(tokens)
        self._layer, self._stalled, self._missed = -1, 0.0, 0
        self._begun = self._entered = self._left = self.clock()

    def guessed(self, seconds: float) -> None:
        """Says that a guess has taken so much computation."""
        self._cost += seconds

    def announce(
        self, layer: int, guess: Sequence[int], chances: Mapping[int, float] | None, absent: Collection[int]
    ) -> None:
        """Takes a guess, the best candidate first. `absent` are the candidates that are not on the device.

        `chances` are the probabilities of the candidates. Where they are not known, it is the share of the candidates at the same
        place of a guess that were right so far, of those that were absent.
        """
        places = {expert: place for place, expert in enumerate(guess) if expert in absent} if chances is None else {}
        if chances is None:
            chances = {expert: self._share_right(layer, place) for expert, place in places.items()}
        self._chances[layer], self._places[layer] = chances, places

    def copied(self, key: Key, evicted: Key | None) -> None:
        """Says that the copy of an expert has begun, and which expert leaves its slot for it."""
        self.link.copied(key, evicted)
        layer, expert = key
        if layer > self._layer:
            self._ahead[layer].add(expert)

    def enter(self, layer: int, needed: Collection[int], missing: int) -> None:
        """Says that a layer is to execute the experts `needed`, and how many of these are not even on their way to the device."""
        now = self.clock()
        if self._is_counted and layer == self._layer + 1:
            own, copy = self._times[layer], self._copy_seconds()
            own.before.add(now - self._left)
            own.missing.add(float(missing > 0))
            if layer:
                self._leave(copy)
            if copy:
                right = len(self._ahead[layer].intersection(needed))
                self._unguessed.add(missing + right, len(needed), copy, float(own.executing) * self.link.slower)
            for expert, place in self._places[layer].items():
                is_right = expert in needed
                own.right[place].add(is_right)
                self._right[place].add(is_right)
        self._chances[layer], self._places[layer] = {}, {}
        self._layer, self._stalled, self._missed = layer, 0.0, missing
        self._entered = self._left = now

    def stalled(self, seconds: float) -> None:
        """Says that the computation has waited for a copy."""
        self._stalled += seconds
        self.link.waited(seconds)

    def left(self) -> None:
        """Says that an expert of the layer that was entered last has been executed."""
        self._left = self.clock()

    def chance(self, layer: int, expert: int) -> float:
        """The probability that a candidate is right; infinity where nothing is known of it."""
        return self._chances[layer].get(expert, math.inf)

    def least_chance(self, layer: int, ahead: int, needed: int, evicts: bool) -> float:
        """The copy of an absent candidate of a layer should begin now if the chance that it is right is greater than this.

        `ahead` copies are to be made before it, and the layer that was entered last waits for `needed` of these. `evicts` says
        that another expert would leave its slot. It is the `p` with which both sides of the rule above are equal; infinity if there is
        none, and less than any chance while too little is known.
        """
        copy, own = self._copy_seconds(), self._times[layer]
        if copy is None or own.before.value is None:
            return -math.inf
        begin, price = max(0.0, ahead - 0.5) * copy, 0.0  # of the one that is being made, half is over on average
        if self._layer < 0:
            until = self._entered - self.clock()
        else:
            done = self.clock() - self._entered - self._stalled
            until = max(float(self._times[self._layer].executing) - done, needed * copy, 0.0)
        for between in self._times[self._layer + 1 : layer]:
            until += float(between.before)
            price += late(begin, copy, until) * float(between.missing)
            until += float(between.executing) + float(between.stalled)
            if begin >= until:  # what that layer is missing is copied before it
                begin += float(between.stalled)
        until += own.before.value
        beside, others = self.link.beside, (self._again * evicts + self._queue) * min(copy, self._stall)
        wrong = CAUTION * (late(begin, copy, until) * float(own.missing) + others + beside * copy)
        saved = (1 - beside) * min(float(own.exposed) * copy, until - begin)
        return (wrong + price) / (saved + wrong) if saved + wrong > 0 else math.inf

    def _leave(self, copy: float | None) -> None:
        """Notes what was measured of the layer that was entered last."""
        own = self._times[self._layer]
        own.executing.add(self._left - self._entered - self._stalled)
        own.stalled.add(self._stalled)
        if self._missed and copy:
            own.exposed.add(min(1.0, self._stalled / (self._missed * copy)))

    def _share_right(self, layer: int, place: int) -> float:
        """Of a layer's candidates at this place. As long as there were few of them, it is much like that of all layers."""
        return self._times[layer].right[place].given(self._right[place].given(RIGHT_AT_FIRST))

    def _of(self, tokens: int) -> list[LayerTimes]:
        if tokens not in self._by_tokens:
            self._by_tokens[tokens] = [LayerTimes() for _ in range(self._layers)]
        return self._by_tokens[tokens]


def late(begin: float, copy: float, until: float) -> float:
    """How much of a copy is left at the time `until`, if it begins before that."""
    return min(copy, max(0.0, begin + copy - until)) if begin < until else 0.0
