"""A routing that replaces a model's own: drawn from statistics, or replayed from a trace.

A model with random weights soon decodes the same token again and again, and routes it the same way each time. So its cache
hits say nothing. Under `replaying`, every decode step executes the experts of the routing, and the speculation gives the
candidates of the routing. Router, norm and predictor still run and take their time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...predictors.architecture import MoELayer, first_tensor
from ...predictors.errors import UserError
from ...predictors.override import override_forward
from ...predictors.routing import Routing
from ..guess import Guess, Guesser
from .reuse import Ids, Numbers, ReuseCurve, ReuseStack


class RoutingError(UserError):
    """A routing can't be drawn, or does not fit the model. The message says why and what to do."""


@dataclass(frozen=True)
class Statistics:
    """A synthetic routing is drawn from these: by `kept` or by `curve`, one of the two. Shares are between 0 and 1."""

    kept: float | None
    """Share of a layer's experts that the previous token used in the same layer. All others are drawn by popularity alone, so
    larger caches hit less often than with a real routing."""
    hit_rate: float
    """Share of the router's experts among the top k of the speculation."""
    skew: float = 0.0
    """How unequally popular a layer's experts are: the exponent of Zipf's law. With 0 they are equally popular. Goes with `kept`."""
    beyond: float = 0.6
    """Probability that a candidate beyond the top k is an expert that the candidates before it missed."""
    curve: ReuseCurve | None = None
    """How soon a layer uses its experts again. Slots of any number hit as often as it says."""


MEASURED = ReuseCurve(((8, 0.366), (24, 0.741), (48, 0.894), (81, 0.962)), num_experts=128, top_k=8, tokens=256)
"""Of Qwen3-30B-A3B, by others' traces. What is drawn from it keeps 44 % of the previous token's experts, and 78 % were used
within eight tokens; of the real ones it is 45 and 80 %."""

PRESETS = {
    "qwen3-30b-a3b": Statistics(kept=None, hit_rate=0.89, curve=MEASURED),
    "moe-1b": Statistics(kept=0.38, hit_rate=0.93),
}
"""`qwen3-30b-a3b` is what others measured. With this `beyond`, the embedded model's recall@4 of .957 becomes its recall@8 of
.999."""


@dataclass(frozen=True)
class ReplayedRouting:
    """What the routers decide and what is speculated, in each step. After the last step comes the first one again."""

    ids: Ids
    """`[steps, layers, top_k]`: the experts, the router's first choice first. Layers are the MoE layers, in the model's order."""
    candidates: Ids
    """`[steps, layers, m]` with `m >= top_k`: the speculated experts, the best guess first."""
    source: dict[str, Any]
    """Where the routing comes from, as plain JSON values."""
    scores: Numbers | None = None
    """`[steps, layers, experts]`: what reuse predictors say after each step, if there are some."""
    chances: Numbers | None = None
    """The probabilities of the candidates, in their shape; None if they are not known."""

    @property
    def steps(self) -> int:
        return len(self.ids)

    @property
    def hit_rate(self) -> float:
        """Share of the experts that are among the speculation's top k."""
        top = self.candidates[:, :, : self.ids.shape[-1]]
        return float((self.ids[..., None] == top[..., None, :]).any(-1).mean())

    @property
    def kept(self) -> float:
        """Share of a step's experts that the step before used in the same layer."""
        same = self.ids[1:, :, :, None] == self.ids[:-1, :, None, :]
        return float(same.any(-1).mean()) if self.steps > 1 else 0.0


def draw_routing(
    statistics: Statistics,
    *,
    steps: int,
    layers: int,
    num_experts: int,
    top_k: int,
    candidates: int | None = None,
    seed: int = 0,
) -> ReplayedRouting:
    """Draws `steps` steps, with `candidates` (by default `top_k`) for each layer.

    With a curve, experts are drawn by how recently they were used, from a stack in a random order (see `reuse`). With `kept`, the
    number of kept experts is binomial for each layer and step; which are kept does not depend on their popularity, and the
    others are drawn by popularity. The number of guessed experts is always binomial. Wrong guesses come after right ones.
    The `source` of the result says by which of the two it was drawn.

    Raises `RoutingError` for statistics that are not possible with so few experts, or that name both ways or none.
    """
    m = top_k if candidates is None else candidates
    _check(statistics, num_experts, top_k, m)
    generator = np.random.default_rng(seed)
    drawn: _KeptExperts | ReuseStack
    if statistics.curve is None:
        drawn = _KeptExperts(statistics, layers, num_experts, top_k, generator)
    else:
        drawn = ReuseStack(statistics.curve, layers, num_experts, top_k, generator)
    ids = np.empty((steps, layers, top_k), dtype=np.int64)
    guesses = np.empty((steps, layers, m), dtype=np.int64)
    for step in range(steps):
        ids[step] = drawn.use()
        number = _binomial(generator, layers, top_k, statistics.hit_rate, num_experts)
        hits = generator.permuted(ids[step], axis=1)
        wrong = _without(_ranked(drawn.likelihoods(), generator), hits)
        found = generator.random((layers, m - top_k)) < statistics.beyond
        guesses[step] = _candidates(hits, wrong, number, found)
    known = {name: value for name, value in asdict(statistics).items() if value is not None}
    way = {"routing": "synthetic", "drawn_by": "kept" if statistics.curve is None else "curve"}
    return ReplayedRouting(ids, guesses, way | known | {"seed": seed, "steps": steps})


class _KeptExperts:
    """Every token keeps a share of the previous one's experts, and the others are drawn by popularity."""

    def __init__(
        self, statistics: Statistics, layers: int, num_experts: int, top_k: int, generator: np.random.Generator
    ):
        self._kept, self._top_k, self._generator = statistics.kept, top_k, generator
        popularity = -statistics.skew * np.log(np.arange(1, num_experts + 1))
        self._popularity = np.stack([generator.permutation(popularity) for _ in range(layers)])
        self._ids: Ids | None = None

    def use(self) -> Ids:
        """The next token's experts, `[layers, top_k]`."""
        assert self._kept is not None
        generator, drawn = self._generator, _ranked(self._popularity, self._generator)
        if self._ids is None:
            self._ids = drawn[:, : self._top_k]
        else:
            kept = generator.permuted(self._ids, axis=1)
            number = _binomial(generator, len(kept), self._top_k, self._kept, drawn.shape[1])
            self._ids = generator.permuted(_joined(kept, _without(drawn, kept), number, self._top_k), axis=1)
        return self._ids

    def likelihoods(self) -> Numbers:
        """How likely each expert `[layers, experts]` is a wrong guess, as logarithms."""
        return self._popularity


def _check(statistics: Statistics, num_experts: int, top_k: int, m: int) -> None:
    least, curve = _least(num_experts, top_k) / top_k, statistics.curve
    if (statistics.kept is None) == (curve is None):
        raise RoutingError("a routing is drawn by kept or by a curve; give one of the two")
    if curve is not None and statistics.skew:
        raise RoutingError("a curve does not tell how popular experts are; give kept with the skew, or leave skew out")
    if curve is not None and not _rises(curve):
        raise RoutingError("the slots and the hit rates of a curve rise, the rates between 0 and 1; give such a curve")
    for name in ("kept", "hit_rate"):
        share = getattr(statistics, name)
        if share is not None and not least <= share <= 1:
            raise RoutingError(
                f"{name} can't be {share}: with {top_k} of {num_experts} experts it is between {least:.2f} and 1"
            )
    if not 0 <= statistics.beyond <= 1 or statistics.skew < 0:
        raise RoutingError(f"beyond is between 0 and 1 and skew at least 0, not {statistics.beyond}, {statistics.skew}")
    if not top_k <= m <= num_experts:
        raise RoutingError(f"{m} candidates are asked for; this model takes from {top_k} to {num_experts}")


def _rises(curve: ReuseCurve) -> bool:
    slots, rates = zip((0, 0.0), *curve.hit_rates, (curve.num_experts + 1, 1.0), strict=True)
    return bool(curve.hit_rates) and all(bool((np.diff(numbers) > 0).all()) for numbers in (slots, rates))


def _least(num_experts: int, top_k: int) -> int:
    """How many experts any two choices of `top_k` have in common at least."""
    return max(0, 2 * top_k - num_experts)


def _ranked(popularity: Numbers, generator: np.random.Generator) -> Ids:
    """All experts `[layers, experts]` in an order drawn by popularity, given as logarithms (Gumbel's trick)."""
    return np.argsort(-(popularity + generator.gumbel(size=popularity.shape)), axis=1)


def _binomial(generator: np.random.Generator, layers: int, top_k: int, share: float, num_experts: int) -> Ids:
    """A number of experts for each layer, `[layers]`, with the mean `share * top_k`."""
    least = _least(num_experts, top_k)
    probability = (share * top_k - least) / (top_k - least) if top_k > least else 1.0
    return least + generator.binomial(top_k - least, min(max(probability, 0.0), 1.0), layers)


def _without(ranked: Ids, taken: Ids) -> Ids:
    """`ranked` `[layers, experts]` without `taken` `[layers, k]`, in the same order."""
    free = ~(ranked[:, :, None] == taken[:, None, :]).any(-1)
    return ranked[free].reshape(len(ranked), -1)


def _joined(first: Ids, then: Ids, number: Ids, length: int) -> Ids:
    """For each row the first `number` of `first`, then those of `then`: `length` in all."""
    if then.shape[1] == 0:  # every expert is in `first`
        return first[:, :length]
    columns = np.arange(length)[None, :]
    behind = np.clip(columns - number[:, None], 0, then.shape[1] - 1)
    ahead = np.clip(columns, 0, first.shape[1] - 1)
    from_first = np.take_along_axis(first, np.broadcast_to(ahead, behind.shape), axis=1)
    return np.where(columns < number[:, None], from_first, np.take_along_axis(then, behind, axis=1))


def _candidates(ids: Ids, wrong: Ids, hits: Ids, found: NDArray[np.bool_]) -> Ids:
    """For each row `hits` of `ids`, then wrong ones up to the top k. Beyond it come missed ones where `found`, else wrong ones."""
    layers, top_k = ids.shape
    guesses = [_joined(ids, wrong, hits, top_k)]
    right, used = hits.copy(), top_k - hits
    for column in found.T:
        # When all wrong experts are used, only missed ones are left, and the other way round.
        take = (column | (used >= wrong.shape[1])) & (right < top_k)
        missed = ids[np.arange(layers), np.minimum(right, top_k - 1)]
        other = wrong[np.arange(layers), np.minimum(used, wrong.shape[1] - 1)] if wrong.shape[1] else missed
        guesses.append(np.where(take, missed, other)[:, None])
        right, used = right + take, used + ~take
    return np.concatenate(guesses, axis=1)


class Replayed:
    """A routing, and the step of it at which a model is. The step is a tensor, so that a captured forward pass goes on too."""

    def __init__(self, layers: list[MoELayer], routing: ReplayedRouting):
        self._is_decoding = False
        with torch.inference_mode(False):  # else only passes in inference mode could write to it
            self._step = torch.zeros(1, dtype=torch.int64)
        tables = torch.from_numpy(routing.candidates), _ranks(routing, layers[0].num_experts)
        self._tables = {layer.index: [table[:, place] for table in tables] for place, layer in enumerate(layers)}

    def enter(self, tokens: int, device: torch.device) -> None:
        """Says that a forward pass over so many tokens begins, on a device."""
        if self._step.device != device:
            self._step = self._step.to(device)
            self._tables = {layer: [table.to(device) for table in tables] for layer, tables in self._tables.items()}
        self._is_decoding = tokens == 1
        if self._is_decoding:
            self._step.add_(1).remainder_(len(next(iter(self._tables.values()))[0]))
        else:
            self._step.fill_(-1)

    def now(self, layer: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A layer's candidates `[1, m]` and the values `[1, experts]` that its router is to choose by; None in a prompt."""
        if not self._is_decoding or tokens != 1:
            return None
        candidates, ranks = self._tables[layer]
        return candidates.index_select(0, self._step), ranks.index_select(0, self._step)

    def guesser(self, target: int, guesser: Guesser) -> Guesser:
        """For `ExpertOffload.guess_by`: the layer's own guesser still runs, but the candidates are those of the routing."""
        return _ReplayedGuesser(self, target, guesser)


class _ReplayedGuesser:
    def __init__(self, replayed: Replayed, target: int, guesser: Guesser):
        self.plain, self.depth = guesser.plain, guesser.depth
        self._replayed, self._target, self._guesser = replayed, target, guesser

    def guess(
        self,
        residual: torch.Tensor,
        source: Routing | None,
        inner: torch.Tensor | None,
        memory: torch.Tensor | None = None,
    ) -> Guess:
        found, speculation, free, values = self._guesser.guess(residual, source, inner, memory)
        now = self._replayed.now(self._target, len(found))
        if now is None:
            return Guess(found, speculation, free, values)
        chosen = now[0][:, : found.shape[1]]
        # The values are those of other candidates.
        return Guess(chosen, speculation and speculation._replace(ids=chosen[:, : speculation.ids.shape[-1]]), free)

    def ranks(self, logits: torch.Tensor) -> torch.Tensor:
        now = self._replayed.now(self._target, len(logits))
        return logits if now is None else now[1]


@contextmanager
def replaying(layers: list[MoELayer], routing: ReplayedRouting) -> Iterator[Replayed]:
    """Replaces the routing of the model of `layers` by `routing`, for the length of a `with`. Offload the model inside it.

    A forward pass over one token is the next step of the routing. A pass over more tokens is a prompt: the model routes it,
    and the step after it is the first of the routing again. Weights are those of the model's router. Give the yielded value's
    `guesser` to `ExpertOffload.guess_by`, so that the routing's candidates are guessed.

    Raises `RoutingError` where the routing has another shape than the model.
    """
    first, most = layers[0], max(routing.ids.max(), routing.candidates.max())
    if routing.ids.shape[1:] != (len(layers), first.top_k) or most >= first.num_experts:
        raise RoutingError(
            f"the routing has {routing.ids.shape[1]} layers, top {routing.ids.shape[2]}, and experts up to {most}, but the "
            f"model has {len(layers)} layers, top {first.top_k}, and {first.num_experts} experts; give a routing of this model"
        )
    replayed = Replayed(layers, routing)
    with ExitStack() as stack:

        def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state = first_tensor((*args, *kwargs.values()))
            replayed.enter(state.numel() // first.hidden_size, state.device)

        # The first layer is guessed by a hook on the same decoder layer. The step must begin before that.
        stack.callback(first.decoder.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
        for layer in layers:
            _attach(stack, layer, replayed)
        yield replayed


def _attach(stack: ExitStack, layer: MoELayer, replayed: Replayed) -> None:
    """Has the routing decide for one router."""

    def route(x: torch.Tensor, *args: Any, **kwargs: Any) -> Routing:
        logits, weights, ids = original(x, *args, **kwargs)
        now = replayed.now(layer.index, x.numel() // layer.hidden_size)
        if now is None:
            return Routing(logits, weights, ids)
        # By topk, as a router chooses, so that a policy which restricts the router restricts this choice too.
        chosen = torch.topk(now[1], layer.top_k, dim=-1).indices
        return Routing(now[1].view_as(logits), weights, chosen.to(ids.dtype).view_as(ids))

    original = stack.enter_context(override_forward(layer.router, route))


def _ranks(routing: ReplayedRouting, num_experts: int) -> torch.Tensor:
    """Values `[steps, layers, experts]`, float32. Their largest are the ids, in order, and then the other candidates.

    They are small integers, which are exact in every dtype.
    """
    values = np.zeros((*routing.ids.shape[:2], num_experts), dtype=np.float32)
    base = 0
    for part in (routing.candidates, routing.ids):  # an expert of both gets its value from the ids
        falling = base + np.arange(part.shape[-1], 0, -1, dtype=np.float32)
        np.put_along_axis(values, part, np.broadcast_to(falling, part.shape), axis=-1)
        base += part.shape[-1]
    return torch.from_numpy(values)
