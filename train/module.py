"""The training of all predictors at once: what is minimised, and what is measured."""

from __future__ import annotations

import math
from typing import Any

import lightning
import torch
import torch.nn.functional as F

from data_collection.trace import Batch, Columns, Trace, make_batch
from predictors.mlp import StackedResidualMLPs
from predictors.speculation import Routing
from train.measures import Kind, Measured, Measures

MEAN_HIT_RATE = "hit_rate/mean"
WARM_UP = 0.1


class PredictorTraining(lightning.LightningModule):
    """Trains the predictors of every target layer of a trace against the model's frozen routers.

    Only `mlps` is learned and saved; norms, routers and default vectors come from the trace.
    """

    def __init__(self, trace: Trace, width: int, learning_rate: float, weight_decay: float):
        super().__init__()
        self.sources = trace.sources
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.top_k = trace.manifest.model.top_k
        model = trace.manifest.model
        self.mlps = StackedResidualMLPs(len(self.sources), model.hidden_size, model.num_experts, width)
        # In a plain dict, so that the frozen parts are neither parameters of this module nor in its checkpoints.
        self.speculators = trace.speculators()
        self.measures = Measures(len(self.sources), self.top_k, model.num_experts)
        self.measured: dict[Kind, Measured] = {}
        """Of the last validation: all that was measured."""
        self.recall: dict[int, list[float]] = {}
        """Of the last validation: target layer -> the predictor's recall at k, k + 1, ..., 2k candidates."""
        self.results: dict[int, dict[str, dict[str, float]]] = {}
        """Of the last validation: target layer -> `training_free` or `predictor` -> measure -> value."""

    def on_fit_start(self) -> None:
        self._follow()

    def on_validation_start(self) -> None:
        self._follow()

    def _follow(self) -> None:
        for speculator in self.speculators.values():
            speculator.to(self.device)
            for part in (speculator.norm, speculator.router, speculator.post_norm):
                if part is not None:
                    part.to(self.device)

    def route(self, states: torch.Tensor) -> list[Routing]:
        """Each target layer's own router on its states, `[layers, rows, hidden]`."""
        return [speculator.router(state) for speculator, state in zip(self.speculators.values(), states, strict=True)]

    def loss(self, batch: Batch, routings: list[Routing]) -> torch.Tensor:
        """KL divergence from the true router distribution to the speculated one, nats a row, summed over layers."""
        total = torch.zeros((), device=self.device)
        for logits, routing in zip(batch.logits, routings, strict=True):
            speculated, true = F.log_softmax(routing.logits.float(), -1), F.log_softmax(logits, -1)
            total = total + F.kl_div(speculated, true, log_target=True, reduction="batchmean")
        return total

    def training_step(self, columns: Columns, _: int) -> torch.Tensor:
        batch = make_batch(columns, self.sources, self.speculators)
        loss = self.loss(batch, self.route(self.mlps(batch.quasi, batch.normed, batch.mixture)))
        self.log("loss/train", loss, prog_bar=True, batch_size=batch.ids.shape[1])
        return loss

    def validation_step(self, columns: Columns, _: int) -> None:
        batch = make_batch(columns, self.sources, self.speculators)
        corrected = self.route(self.mlps(batch.quasi, batch.normed, batch.mixture))
        rows = batch.ids.shape[1]
        self.log("loss/validation", self.loss(batch, corrected), batch_size=rows, sync_dist=True)
        self.measures.update("training_free", self.route(batch.quasi), batch.ids)
        self.measures.update("predictor", corrected, batch.ids)

    def on_validation_epoch_end(self) -> None:
        self.measured = self.measures.compute()
        self.measures.reset()
        self.results = {
            target: {kind: measured.summary(number) for kind, measured in self.measured.items()}
            for number, target in enumerate(self.sources)
        }
        self.recall = dict(zip(self.sources, self.measured["predictor"].recall.tolist(), strict=True))
        self.log(MEAN_HIT_RATE, mean_of(self.results, "predictor"), prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.mlps.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def one_cycle(done: float) -> float:
    """The share of the highest learning rate after the share `done` of training: a tenth rising, then half a cosine.

    Epochs may differ by a batch, so `done` may pass 1.
    """
    if done < WARM_UP:
        return done / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - WARM_UP) / (1 - WARM_UP))))


def mean_of(results: dict[int, dict[str, dict[str, float]]], kind: str, measure: str = "recall@k") -> float:
    """The mean of a measure over the target layers."""
    return sum(result[kind][measure] for result in results.values()) / len(results)
