"""All that validation measures of the speculated routings, with and without the predictors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ..predictors.metrics import Calibration, CalibrationCurve, ExpertRecall, HitRate, RecallCurve
from ..predictors.speculation import Routing, candidates

Kind = Literal["training_free", "predictor"]


class Measured(NamedTuple):
    """What one kind of speculation reached, the target layers stacked: fp64, on the CPU, of all processes together."""

    recall: torch.Tensor
    """With k, k + 1, ..., 2k candidates (as many as there are experts, where that is fewer), `[layers, 2k - k + 1]`."""
    exact: torch.Tensor
    """Share of the tokens all of whose experts are among k candidates, `[layers]`."""
    expert_recall: torch.Tensor
    """How often each expert was among k candidates when the router chose it, `[layers, experts]`; NaN where it never did."""
    calibration: CalibrationCurve
    """Of up to 2k candidates."""

    def summary(self, number: int) -> dict[str, Any]:
        """The rates of one layer, counted from the stack's start, as plain values; `recall` is the whole curve."""
        curve = self.recall[number].tolist()
        return {"recall@k": curve[0], "recall@2k": curve[-1], "exact": float(self.exact[number]), "recall": curve}


class Counts(nn.Module):
    """What is counted of one kind of speculation."""

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
        self.calibration.update(routing.logits, found, ids)

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
    """Counts over a validation, for training-free speculation and for the predictors.

    The metrics are submodules, so they move to the device with the module that holds this one, are summed over processes
    by whatever backend these have, and leave nothing in a checkpoint.
    """

    def __init__(self, num_layers: int, top_k: int, num_experts: int):
        super().__init__()
        self.training_free = Counts(num_layers, top_k, num_experts)
        self.predictor = Counts(num_layers, top_k, num_experts)

    def update(self, kind: Kind, routings: Sequence[Routing], ids: torch.Tensor) -> None:
        """Counts the speculated `routings`, one a layer, against the routers' choice `ids` `[layers, rows, top_k]`."""
        counts = self.training_free if kind == "training_free" else self.predictor
        counts.update(Routing(*(torch.stack(parts) for parts in zip(*routings, strict=True))), ids)

    def compute(self) -> dict[Kind, Measured]:
        """By kind, over all updates since `reset`, in all processes: each of them has to call it."""
        return {"training_free": self.training_free.compute(), "predictor": self.predictor.compute()}

    def reset(self) -> None:
        self.training_free.reset()
        self.predictor.reset()
