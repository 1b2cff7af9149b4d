"""Fits how sure each layer's speculation is, on validation rows: `predictors.confidence`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F

from ..data_collection.columns import Columns
from ..data_collection.statistics import speculated
from ..predictors.confidence import Confidence, margins
from ..predictors.forms import PredictorForm
from ..predictors.metrics import Calibration, among
from ..predictors.speculation import candidates
from ..predictors.stacked import StackedSpeculators

POINTS = 1024
"""The margins of a layer are fitted as the means of so many groups of equal size: each step costs nothing then."""
LEAST_ROWS = 64
"""With fewer rows nothing is fitted: four numbers would fit the noise."""


def calibrate(
    batches: Iterable[Columns],
    sources: dict[int, int | None],
    speculators: StackedSpeculators,
    mlps: Mapping[int, PredictorForm],
    most: int,
) -> dict[int, Confidence]:
    """How sure the speculation of each target is, over `most` candidates of each row. The arguments are those of `hit_rates`.

    It is fitted on the first half of the rows, and its expected calibration error measured on the second. Rows in the order of their
    sequences share at most one sequence between the two. Empty if there are too few rows, or no candidates beyond the top k.
    """
    found: list[torch.Tensor] = []
    right: list[torch.Tensor] = []
    for routings, ids in speculated(batches, sources, speculators, mlps):
        chosen = [candidates(routing, most) for routing in routings]
        if chosen[0].shape[-1] <= ids.shape[-1]:
            return {}
        parts = zip(routings, chosen, strict=True)
        found.append(torch.stack([margins(routing.logits, own, ids.shape[-1]) for routing, own in parts]))
        right.append(among(torch.stack(chosen), ids, routings[0].logits.shape[-1]))
    rows = sum(part.shape[1] for part in found)
    if rows < LEAST_ROWS:
        return {}
    every, hits, half = torch.cat(found, 1), torch.cat(right, 1), rows // 2
    made = {}
    for number, target in enumerate(sources):
        if not every[number].isfinite().all():
            continue  # what is exported is finite, but it may overflow on some state
        fitted = fit_confidence(every[number, :half], hits[number, :half])
        measured = Calibration(1)
        measured.update(fitted.probabilities(every[number : number + 1, half:]), hits[number : number + 1, half:])
        made[target] = fitted._replace(error=float(measured.compute().error()))
    return made


def fit_confidence(found: torch.Tensor, right: torch.Tensor) -> Confidence:
    """The most likely `Confidence` for candidates with the margins `found`, and whether each was `right`, of any shape."""
    order = found.flatten().argsort()
    size = -(-len(order) // POINTS)
    groups = [part.flatten()[order].double().split(size) for part in (found, right)]
    x, y = (torch.stack([group.mean() for group in part]) for part in groups)
    weight = torch.tensor([float(len(group)) for group in groups[0]], dtype=torch.float64) / len(order)
    spread = float(x.std().clamp(min=1e-6))
    # Its numbers of one size, the constraints built in: the logarithm of the temperature, and logits of least and most.
    raw = torch.tensor([0.0, 0.0, -5.0, 5.0], dtype=torch.float64, requires_grad=True)

    def made() -> tuple[torch.Tensor, ...]:
        low, high = raw[2].sigmoid(), raw[3].sigmoid()
        return raw[0].exp() * spread, raw[1], torch.minimum(low, high), torch.maximum(low, high)

    optimizer = torch.optim.LBFGS([raw], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        temperature, bias, least, most = made()
        probability = least + (most - least) * (x / temperature + bias).sigmoid()
        # A weak prior, so that a layer whose guesses are all right has a finite temperature.
        loss = F.binary_cross_entropy(probability.clamp(1e-9, 1 - 1e-9), y, weight, reduction="sum")
        loss = loss + 1e-5 * (raw[0].square() + raw[1].square() + (raw[2] + 5).square() + (raw[3] - 5).square())
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    temperature, bias, least, most = (float(value.detach()) for value in made())
    return Confidence(temperature, bias, least, most)
