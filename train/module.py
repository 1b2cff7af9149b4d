"""The training of all predictors at once: its loss and its measures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning
import torch
from transformers import get_cosine_schedule_with_warmup

from ..data_collection.columns import Column
from ..data_collection.examples import Batch, make_batch
from ..data_collection.statistics import SAMPLE_ROWS
from ..data_collection.trace import Trace
from ..predictors.direct import STACKS, prior_of
from ..predictors.forms import Form
from ..predictors.memory import memory_of
from ..predictors.stacked import StackedSpeculators
from .data import FitError, Rows
from .losses import LOSSES
from .measures import Kind, Measured, Measures
from .targets import Target

MEAN_HIT_RATE = "hit_rate/mean"
WARM_UP = 0.1
SCALE_ROWS = 2048
"""Rows that the size of what is remembered is measured on."""

Results = dict[int, dict[str, dict[str, Any]]]
"""Target layer -> kind (`measures.Kind`) -> measure -> value, as plain values."""


class PredictorTraining(lightning.LightningModule):
    """Trains the predictors of every target layer of a trace against the model's frozen routers.

    Only `mlps` is learned and saved; norms, routers and default vectors come from the trace.
    """

    def __init__(
        self,
        trace: Trace,
        targets: list[Target],
        loss: str,
        learning_rate: float,
        weight_decay: float,
        memory: int = 0,
        form: Form = Form.CORRECTING,
    ):
        """`memory` is how many tokens the predictors remember."""
        super().__init__()
        self.sources = {target.layer: target.source for target in targets}
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.row_losses = LOSSES[loss]
        self.top_k = trace.manifest.model.top_k
        model = trace.manifest.model
        widths = [target.width for target in targets]
        self.mlps = STACKS[form](widths, model.hidden_size, model.num_experts, memory, self.top_k)
        if form is Form.DIRECT:
            self.mlps.get_parameter("prior").data = prior_of(_choices_in(trace, self.sources))
        # No submodule: the frozen parts are no parameters of this module and not in its checkpoints.
        self.speculators = trace.stacked(self.sources)
        if memory:
            self.mlps.scale.copy_(_scale_of(trace, self.sources, self.speculators).repeat(1, 1, memory))
        self.measures = Measures(len(self.sources), self.top_k, model.num_experts, memory)
        self.measured: dict[Kind, Measured] = {}
        """All measures of the last validation."""
        self.results: Results = {}
        """The summaries of the last validation; see `Measured.summary`."""

    def on_fit_start(self) -> None:
        self.speculators.to(self.device)

    def on_validation_start(self) -> None:
        self.speculators.to(self.device)

    def transfer_batch_to_device(self, batch: Rows, device: torch.device, dataloader_idx: int) -> Rows:  # noqa: ARG002
        # Lightning's own way searches every column; on a CPU that took a fifth of a step.
        if device.type == "cpu":
            return batch
        return batch._replace(columns={n: column.to(device, non_blocking=True) for n, column in batch.columns.items()})

    def loss(self, batch: Batch, speculated: torch.Tensor, in_all: int) -> torch.Tensor:
        """The loss of a step with the `speculated` logits `[layers, rows, experts]`: the sum over layers of the mean
        over rows. All processes together have `in_all` rows."""
        rows = self.row_losses(speculated, batch.logits, batch.ids)
        # Gradients are averaged over processes, so each process multiplies its part by their number.
        return rows.sum() * (self.trainer.world_size if self._trainer is not None else 1) / in_all

    def guessed(self, batch: Batch) -> torch.Tensor:
        """What the predictors make of a batch, in fp32; see `forms.Stack.forward`."""
        return self.mlps(batch.quasi, batch.normed, batch.mixture, batch.memory).float()

    def batch(self, rows: Rows) -> Batch:
        """What the predictors read of `rows`, and the true routings."""
        return make_batch(rows.columns, self.sources, self.speculators, self.mlps.memory)

    def training_step(self, rows: Rows, _: int) -> torch.Tensor:
        # Only the predictors compute in mixed precision: routers choose in fp32, as at inference.
        with torch.autocast(self.device.type, enabled=False):
            batch = self.batch(rows)
        guessed = self.guessed(batch)
        with torch.autocast(self.device.type, enabled=False):
            loss = self.loss(batch, self.mlps.logits(guessed, self.speculators), rows.in_all)
        self.log("loss/train", loss, prog_bar=True, batch_size=rows.in_all)
        return loss

    def validation_step(self, rows: Rows, _: int) -> None:
        with torch.autocast(self.device.type, enabled=False):  # measures what an fp32 export does
            batch = self.batch(rows)
            guessed = self.mlps.routings(self.guessed(batch), self.speculators)
            loss = self.loss(batch, torch.stack([routing.logits for routing in guessed]), rows.in_all)
            self.measures.update("training_free", self.speculators.route(batch.quasi), batch.ids)
            self.measures.update("predictor", guessed, batch.ids)
            if batch.memory is not None:
                alone = self.mlps.routings(self.guessed(batch._replace(memory=None)), self.speculators)
                self.measures.update("without_memory", alone, batch.ids)
        self.log("loss/validation", loss, batch_size=rows.in_all, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        # Once a loss is not finite, weights never are again: they are looked at once an epoch.
        wrong = {
            layer for p in self.mlps.parameters() for layer in (~p.isfinite()).flatten(1).any(1).nonzero().flatten()
        }
        if wrong:
            raise FitError(
                f"the loss of layer {list(self.sources)[min(wrong)]} is not finite any more in epoch "
                f"{self.current_epoch}; give a smaller --learning-rate than {self.learning_rate}, or another --loss"
            )
        self.measured = self.measures.compute()
        self.measures.reset()
        self.results = {
            target: {kind: measured.summary(number) for kind, measured in self.measured.items()}
            for number, target in enumerate(self.sources)
        }
        self.log(MEAN_HIT_RATE, mean_of(self.results, "predictor"), prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["results"] = self.results

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            [p for p in self.mlps.parameters() if p.requires_grad],
            self.learning_rate,
            weight_decay=self.weight_decay,
            fused=True,
        )
        schedule = one_cycle(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _choices_in(trace: Trace, targets: Iterable[int]) -> torch.Tensor:
    """How often each target chose each expert, `[targets, experts]`, over a sample of the trace."""
    names = [Column.EXPERT_IDS.of(target) for target in targets]
    counts = torch.zeros(len(names), trace.manifest.model.num_experts)
    for columns in trace.sample(SAMPLE_ROWS, names):
        for number, name in enumerate(names):
            counts[number] += torch.bincount(columns[name].flatten().long(), minlength=counts.shape[1])
    return counts


@torch.no_grad()
def _scale_of(trace: Trace, sources: dict[int, int | None], speculators: StackedSpeculators) -> torch.Tensor:
    """One over the spread of what tokens leave, of the logits and of the errors: `[layers, 1, 2 experts]`.

    Errors are often much smaller than logits, and logits of another size in each layer.
    """
    rows = torch.arange(0, trace.manifest.shards[0].rows, -(-trace.manifest.shards[0].rows // SCALE_ROWS))
    batch = make_batch(trace.read(0, rows, trace.columns_for(sources)), sources, speculators)
    trace.unmap()
    left = memory_of(batch.logits, speculators.logits(batch.quasi)).unflatten(-1, (2, -1))
    spread = left.std((1, 3), correction=0)  # [layers, 2]
    spread = spread.maximum(1e-3 * spread[:, :1]).clamp(min=1e-6)
    return (1 / spread).repeat_interleave(left.shape[-1], 1).unsqueeze(1)


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate over `steps` steps: for a tenth of them it rises to the optimizer's, then falls as half a cosine."""
    warm_up: Any = WARM_UP * steps  # the function declares an int, but is right for any number
    return get_cosine_schedule_with_warmup(optimizer, warm_up, steps)


def mean_of(results: Results, kind: str, measure: str = "recall@k") -> float:
    """The mean of a measure over the target layers."""
    return sum(result[kind][measure] for result in results.values()) / len(results)
