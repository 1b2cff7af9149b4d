"""All measures of validation, with and without the predictors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ..predictors.metrics import (
    Calibration,
    CalibrationCurve,
    ExpertRecall,
    HitRate,
    RecallCurve,
    among,
    probability_of_choice,
)
from ..predictors.routing import Routing
from ..predictors.speculation import candidates

Kind = Literal["training_free", "without_memory", "predictor"]
KINDS: tuple[Kind, ...] = ("training_free", "without_memory", "predictor")
"""`without_memory` is what predictors with a memory do where they remember nothing; others have no such kind."""


class Measured(NamedTuple):
    """The measures of one kind of speculation, target layers stacked, over all processes: fp64, on the CPU."""

    recall: torch.Tensor
    """With k, k + 1, ..., 2k candidates (at most the number of experts), `[layers, 2k - k + 1]`."""
    exact: torch.Tensor
    """Share of the tokens whose experts are all among k candidates, `[layers]`."""
    expert_recall: torch.Tensor
    """How often an expert was among k candidates when the router chose it, `[layers, experts]`; NaN if it never did."""
    calibration: CalibrationCurve
    """The calibration of up to 2k candidates."""

    def summary(self, number: int) -> dict[str, Any]:
        """The rates of layer `number` of the stack, as plain values; `recall` is the whole curve."""
        curve = self.recall[number].tolist()
        return {"recall@k": curve[0], "recall@2k": curve[-1], "exact": float(self.exact[number]), "recall": curve}


class Counts(nn.Module):
    """The metrics of one kind of speculation."""

    def __init__(self, num_layers: int, top_k: int, num_experts: int):
        super().__init__()
        self.num_layers, self.top_k = num_layers, top_k
        self.most = min(2 * top_k, num_experts)
        self.recall = RecallCurve(num_layers, top_k, self.most)
        self.exact = HitRate(num_layers, exact=True)
        self.expert_recall = ExpertRecall(num_layers, num_experts)
        self.calibration = Calibration(num_layers)

    def update(self, routing: Routing, ids: torch.Tensor) -> None:
        found = candidates(routing, self.most)
        self.recall.update(found, ids)
        self.exact.update(found[..., : self.top_k], ids)
        self.expert_recall.update(found[..., : self.top_k], ids)
        right = among(found, ids, routing.logits.shape[-1])
        self.calibration.update(probability_of_choice(routing.logits, found, self.top_k), right)

    def compute(self) -> Measured:
        # torchmetrics makes a scalar of a tensor of one element.
        return Measured(
            self.recall.compute().cpu().reshape(self.num_layers, -1),
            self.exact.compute().cpu().reshape(self.num_layers),
            self.expert_recall.compute().cpu().reshape(self.num_layers, -1),
            CalibrationCurve(*(part.cpu().reshape(self.num_layers, -1) for part in self.calibration.compute())),
        )

    def reset(self) -> None:
        for metric in (self.recall, self.exact, self.expert_recall, self.calibration):
            metric.reset()


class Measures(nn.Module):
    """Counts over a validation by kind: training-free speculation and the predictors, without their memory too if they have one.

    The metrics are submodules, so that they move to the device with this module; they leave nothing in a checkpoint.
    """

    def __init__(self, num_layers: int, top_k: int, num_experts: int, memory: int = 0):
        super().__init__()
        kinds = [kind for kind in KINDS if memory or kind != "without_memory"]
        self.counts = nn.ModuleDict({kind: Counts(num_layers, top_k, num_experts) for kind in kinds})

    def of(self, kind: Kind) -> Counts:
        counts = self.counts[kind]
        assert isinstance(counts, Counts)
        return counts

    @property
    def kinds(self) -> list[Kind]:
        return [kind for kind in KINDS if kind in self.counts]

    def update(self, kind: Kind, routings: Sequence[Routing], ids: torch.Tensor) -> None:
        """Compares the speculated `routings`, one a layer, with the routers' choice `ids` `[layers, rows, top_k]`."""
        self.of(kind).update(Routing(*(torch.stack(parts) for parts in zip(*routings, strict=True))), ids)

    def compute(self) -> dict[Kind, Measured]:
        """The measures by kind, over all updates since `reset` in all processes: every process must call it."""
        return {kind: self.of(kind).compute() for kind in self.kinds}

    def reset(self) -> None:
        for kind in self.kinds:
            self.of(kind).reset()
