"""A routing from elsewhere: drawn from statistics or replayed from a trace, and put in the place of a model's own.

A model with random weights soon decodes one token over and over and routes it the same way each time, so that its cache
hits say nothing. Under `replaying` every decode step goes to the experts that the routing names, whatever the model would
have chosen, and the speculation names the candidates of the routing; router, norm and predictor still run and cost
what they cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...predictors.architecture import MoELayer, first_tensor, override_forward
from ...predictors.errors import UserError
from ...predictors.speculation import Routing
from ..guess import Guess, Guesser

Ids = NDArray[np.int64]
Numbers = NDArray[np.float64]


class RoutingError(UserError):
    """A routing that can't be drawn or does not fit the model; the message says why and what to do."""


@dataclass(frozen=True)
class Statistics:
    """What a synthetic routing is drawn from; shares are between 0 and 1."""

    kept: float
    """Share of a layer's experts that the previous token used there too."""
    hit_rate: float
    """Share of the router's experts among the top k of the speculation."""
    skew: float = 0.0
    """Exponent of Zipf's law of how popular a layer's experts are; 0 makes them equally popular."""
    beyond: float = 0.6
    """Probability with which a candidate beyond the top k is an expert that the candidates before it missed."""


PRESETS = {
    "qwen3-30b-a3b": Statistics(kept=0.43, hit_rate=0.89),
    "moe-1b": Statistics(kept=0.38, hit_rate=0.93),
}
"""`qwen3-30b-a3b` is as others measured it. `beyond` is what raised the embedded model's recall@4 of .957 to recall@8 of
.999."""


@dataclass(frozen=True)
class ReplayedRouting:
    """What the routers decide and what is speculated, step by step. After the last step comes the first again."""

    ids: Ids
    """`[steps, layers, top_k]`: the experts, the router's first choice first. Layers are the MoE layers in their order."""
    candidates: Ids
    """`[steps, layers, m]` with `m >= top_k`: the speculation's experts, its best guess first."""
    source: dict[str, Any]
    """Where it is from, as plain JSON values."""

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
    """Draws `steps` steps; `candidates` (by default `top_k`) are drawn for each layer.

    How many experts are kept, and how many are guessed, is binomial, layer by layer and step by step. Which ones are
    kept or missed does not depend on how popular they are; the others are drawn by popularity. Wrong guesses stand
    behind the right ones.

    Raises `RoutingError` for statistics that so few experts can't have.
    """
    m = top_k if candidates is None else candidates
    _check(statistics, num_experts, top_k, m)
    generator = np.random.default_rng(seed)
    popularity = -statistics.skew * np.log(np.arange(1, num_experts + 1))
    popularity = np.stack([generator.permutation(popularity) for _ in range(layers)])
    ids = np.empty((steps, layers, top_k), dtype=np.int64)
    guesses = np.empty((steps, layers, m), dtype=np.int64)
    for step in range(steps):
        drawn = _ranked(popularity, generator)
        if step == 0:
            ids[0] = drawn[:, :top_k]
        else:
            kept = generator.permuted(ids[step - 1], axis=1)
            number = _binomial(generator, layers, top_k, statistics.kept, num_experts)
            ids[step] = generator.permuted(_joined(kept, _without(drawn, kept), number, top_k), axis=1)
        number = _binomial(generator, layers, top_k, statistics.hit_rate, num_experts)
        hits = generator.permuted(ids[step], axis=1)
        wrong = _without(_ranked(popularity, generator), hits)
        found = generator.random((layers, m - top_k)) < statistics.beyond
        guesses[step] = _candidates(hits, wrong, number, found)
    source = {"routing": "synthetic", **vars(statistics), "seed": seed, "steps": steps}
    return ReplayedRouting(ids, guesses, source)


def _check(statistics: Statistics, num_experts: int, top_k: int, m: int) -> None:
    least = _least(num_experts, top_k) / top_k
    for name in ("kept", "hit_rate"):
        share = getattr(statistics, name)
        if not least <= share <= 1:
            raise RoutingError(
                f"{name} can't be {share}: with {top_k} of {num_experts} experts it is between {least:.2f} and 1"
            )
    if not 0 <= statistics.beyond <= 1 or statistics.skew < 0:
        raise RoutingError(f"beyond is between 0 and 1 and skew at least 0, not {statistics.beyond}, {statistics.skew}")
    if not top_k <= m <= num_experts:
        raise RoutingError(f"{m} candidates are asked for; this model takes from {top_k} to {num_experts}")


def _least(num_experts: int, top_k: int) -> int:
    """How many experts any two choices of `top_k` have in common."""
    return max(0, 2 * top_k - num_experts)


def _ranked(popularity: Numbers, generator: np.random.Generator) -> Ids:
    """All experts `[layers, experts]` in an order drawn by popularity (Gumbel's trick)."""
    return np.argsort(-(popularity + generator.gumbel(size=popularity.shape)), axis=1)


def _binomial(generator: np.random.Generator, layers: int, top_k: int, share: float, num_experts: int) -> Ids:
    """For each layer a number of experts whose mean is `share * top_k`."""
    least = _least(num_experts, top_k)
    probability = (share * top_k - least) / (top_k - least) if top_k > least else 1.0
    return least + generator.binomial(top_k - least, min(max(probability, 0.0), 1.0), layers)


def _without(ranked: Ids, taken: Ids) -> Ids:
    """`ranked` `[layers, experts]` without those `taken` `[layers, k]`, the order kept."""
    free = ~(ranked[:, :, None] == taken[:, None, :]).any(-1)
    return ranked[free].reshape(len(ranked), -1)


def _joined(first: Ids, then: Ids, number: Ids, length: int) -> Ids:
    """By row, `number` of `first` and after them those of `then`, `length` in all."""
    if then.shape[1] == 0:  # every expert is in `first`
        return first[:, :length]
    columns = np.arange(length)[None, :]
    behind = np.clip(columns - number[:, None], 0, then.shape[1] - 1)
    ahead = np.clip(columns, 0, first.shape[1] - 1)
    from_first = np.take_along_axis(first, np.broadcast_to(ahead, behind.shape), axis=1)
    return np.where(columns < number[:, None], from_first, np.take_along_axis(then, behind, axis=1))


def _candidates(ids: Ids, wrong: Ids, hits: Ids, found: NDArray[np.bool_]) -> Ids:
    """By row, `hits` of `ids`, wrong ones up to the top k, and then a missed one wherever `found` says so."""
    layers, top_k = ids.shape
    guesses = [_joined(ids, wrong, hits, top_k)]
    right, used = hits.copy(), top_k - hits
    for column in found.T:
        # With every wrong expert used up only missed ones are left, and the other way round.
        take = (column | (used >= wrong.shape[1])) & (right < top_k)
        missed = ids[np.arange(layers), np.minimum(right, top_k - 1)]
        other = wrong[np.arange(layers), np.minimum(used, wrong.shape[1] - 1)] if wrong.shape[1] else missed
        guesses.append(np.where(take, missed, other)[:, None])
        right, used = right + take, used + ~take
    return np.concatenate(guesses, axis=1)


class Replayed:
    """A routing and the step of it that a model is at."""

    def __init__(self, layers: list[MoELayer], routing: ReplayedRouting, device: torch.device):
        self.step = -1
        """Of the routing; -1 in a prompt."""
        number = {layer.index: place for place, layer in enumerate(layers)}
        values = _ranks(routing, layers[0].num_experts).to(device).unsqueeze(2)
        candidates = torch.from_numpy(routing.candidates).to(device).unsqueeze(2)
        self._ranks = {index: values[:, place].unbind() for index, place in number.items()}
        self._candidates = {index: candidates[:, place].unbind() for index, place in number.items()}

    def candidates(self, target: int, guessed: torch.Tensor) -> torch.Tensor:
        """What takes the place of the candidates `[tokens, m]` that were guessed for a layer."""
        if self.step < 0 or len(guessed) != 1:
            return guessed
        steps = self._candidates[target]
        return steps[self.step % len(steps)][:, : guessed.shape[1]]

    def ranks(self, target: int, tokens: int) -> torch.Tensor | None:
        """What a layer's router is to choose by, `[tokens, experts]`, in place of its logits; None where it chooses itself."""
        steps = self._ranks[target]
        return None if self.step < 0 or tokens != 1 else steps[self.step % len(steps)]

    def guesser(self, target: int, guesser: Guesser) -> Guesser:
        """For `ExpertOffload.guess_by`: the layer's own guesser guesses, and the routing's candidates are what it says."""
        return _ReplayedGuesser(self, target, guesser)


class _ReplayedGuesser:
    def __init__(self, replayed: Replayed, target: int, guesser: Guesser):
        self.plain = guesser.plain
        self._replayed, self._target, self._guesser = replayed, target, guesser

    def guess(self, residual: torch.Tensor, source: Routing | None, inner: torch.Tensor | None) -> Guess:
        found, speculation = self._guesser.guess(residual, source, inner)
        chosen = self._replayed.candidates(self._target, found)
        return Guess(chosen, speculation and speculation._replace(ids=chosen[:, : speculation.ids.shape[-1]]))

    def ranks(self, logits: torch.Tensor) -> torch.Tensor:
        replayed = self._replayed.ranks(self._target, len(logits))
        return logits if replayed is None else replayed


@contextmanager
def replaying(layers: list[MoELayer], routing: ReplayedRouting) -> Iterator[Replayed]:
    """Puts `routing` into the model of `layers` for the length of a `with`, which offloading must lie within.

    A forward pass over one token is the next step of the routing. One over more is a prompt: it is routed by the model,
    and the step after it is the first of the routing again. Weights are those of the model's router. What is yielded is
    for `ExpertOffload.guess_by(replayed.guesser)`, which has the routing's candidates guessed.

    Raises `RoutingError` where the routing is one of another shape.
    """
    first = layers[0]
    shape = len(layers), first.top_k
    if routing.ids.shape[1:] != shape or int(max(routing.ids.max(), routing.candidates.max())) >= first.num_experts:
        raise RoutingError(
            f"the routing has {routing.ids.shape[1]} layers, top {routing.ids.shape[2]}, and experts up to "
            f"{max(routing.ids.max(), routing.candidates.max())}, but the model has {len(layers)} layers, top "
            f"{first.top_k}, and {first.num_experts} experts; give a routing of this model"
        )
    replayed = Replayed(layers, routing, next(first.router.parameters()).device)
    with ExitStack() as stack:

        def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            is_decoding = first_tensor((*args, *kwargs.values())).numel() == first.hidden_size
            replayed.step = replayed.step + 1 if is_decoding else -1

        # The speculation for the first layer is made when its decoder layer is entered, and the step begins before it.
        handle = first.decoder.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        stack.callback(handle.remove)
        for layer in layers:
            _attach(stack, layer, replayed)
        yield replayed


def _attach(stack: ExitStack, layer: MoELayer, replayed: Replayed) -> None:
    """Overrides one router."""

    def route(x: torch.Tensor, *args: Any, **kwargs: Any) -> Routing:
        logits, weights, ids = original(x, *args, **kwargs)
        values = replayed.ranks(layer.index, x.numel() // layer.hidden_size)
        if values is None:
            return Routing(logits, weights, ids)
        # Chosen by topk, as a router chooses: a policy that restricts the router's choice restricts this one too.
        chosen = torch.topk(values, layer.top_k, dim=-1).indices
        return Routing(values.view_as(logits), weights, chosen.to(ids.dtype).view_as(ids))

    original = stack.enter_context(override_forward(layer.router, route))


def _ranks(routing: ReplayedRouting, num_experts: int) -> torch.Tensor:
    """Values `[steps, layers, experts]` by which a topk gives the ids, and then the candidates behind them.

    They are small integers, which are exact in every dtype, and fall by one from expert to expert.
    """
    values = np.zeros((*routing.ids.shape[:2], num_experts), dtype=np.float32)
    base = 0
    for part in (routing.candidates, routing.ids):  # an expert of both keeps what the ids give it
        falling = base + np.arange(part.shape[-1], 0, -1, dtype=np.float32)
        np.put_along_axis(values, part, np.broadcast_to(falling, part.shape), axis=-1)
        base += part.shape[-1]
    return torch.from_numpy(values)
