"""The scalars, figures and texts that `fit` writes for TensorBoard; Lightning itself logs the losses.

Custom Scalars    the first page to look at: loss, hit rates beside their training-free baselines, throughput
Scalars           hit_rate, training_free, without_memory, hit_rate_at_2k, exact (each by layer, and the mean), calibration,
                  throughput; of the best epoch: final, and recall_by_candidates, whose step is the number of candidates;
                  reuse: the loss of the reuse predictors, and hit rates by what slots keep, whose step is the number of slots
Images            hit rate by layer, recall by candidates, missed experts, calibration: of the last validation, and of those before
                  that are `PAUSE` seconds apart
HParams           the settings with the final measures
Text              the settings and the run's provenance
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import lightning
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from ..predictors.metrics import gap_closed
from ..predictors.provenance import hardware
from . import figures
from .measures import KINDS, Kind
from .module import PredictorTraining, Results, mean_of

WINDOW = 20
"""Batches per measurement of the throughput."""
PAUSE = 30.0
"""Seconds at least between figures, which take a second to draw. A short training would take longer for them than for all else."""
GROUPS: dict[Kind, str] = {
    "training_free": "training_free",
    "without_memory": "without_memory",
    "predictor": "hit_rate",
}
"""The group of scalars with the hit rates of each kind."""


def layout(targets: Sequence[int], kinds: Sequence[Kind]) -> dict[str, dict[str, list[Any]]]:
    """The charts of the Custom Scalars page: category -> title -> kind of chart and its tags, as regexes.

    `kinds` are those that are measured.
    """

    def chart(*tags: str) -> list[Any]:
        return ["Multiline", [f"^{tag}$" for tag in tags]]

    def rates(name: str) -> list[Any]:
        return chart(*(f"{GROUPS[kind]}/{name}" for kind in reversed(kinds)))

    return {
        "Overview": {
            "loss, train and validation": chart("loss/train", "loss/validation"),
            "hit rate, mean of all layers; flat: training-free": rates("mean"),
            "hit rate, weakest layer; flat: training-free": rates("weakest"),
            "recall by number of candidates (the step), at the end": chart("recall_by_candidates/.*"),
            "recall with 2k candidates; below: exact": chart("hit_rate_at_2k/mean", "exact/mean"),
            "training rows per second": chart("throughput/rows_per_second"),
        },
        "Hit rate by layer; flat: training-free": {f"layer {target}": rates(_name(target)) for target in targets},
    }


class Board(Callback):
    """Writes scalars of each validation, and figures, to the run's TensorBoard logger, in the first process only."""

    def __init__(self, logger: TensorBoardLogger, run: dict[str, Any], hyperparameters: dict[str, Any]):
        self.logger, self.run = logger, run
        """`run` is the content of the run's config.json."""
        self.hyperparameters = {
            name: value if isinstance(value, (bool, int, float)) else str(value)
            for name, value in hyperparameters.items()
        }
        self._rows = self._batches = 0
        self._since = self._drawn = time.perf_counter()
        self._undrawn: int | None = None
        """The step of the last validation, if its figures have not been drawn."""

    @property
    def writer(self) -> SummaryWriter:
        return self.logger.experiment

    @rank_zero_only
    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        assert isinstance(module, PredictorTraining)
        self.writer.add_custom_scalars(layout(list(module.sources), module.measures.kinds))
        for name, facts in _texts(self.run).items():
            self.writer.add_text(f"run/{name}", _table(facts), trainer.global_step)

    def on_train_epoch_start(self, *_: Any) -> None:
        self._open_window()

    def on_train_batch_end(self, trainer: lightning.Trainer, *arguments: Any) -> None:
        _, _, rows, _ = arguments
        self._rows += rows.in_all
        self._batches += 1
        if self._batches == WINDOW:
            self._close_window(_step(trainer))

    def on_validation_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        # The rest of an epoch is too short to time, unless it is the whole epoch.
        if self._batches == trainer.fit_loop.epoch_loop.batch_idx + 1:
            self._close_window(_step(trainer))

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        assert isinstance(module, PredictorTraining)
        self._write_validation(module, _step(trainer))
        self._undrawn = _step(trainer)
        if time.perf_counter() - self._drawn >= PAUSE:
            self._draw(module)
        self._open_window()

    def on_train_end(self, _: lightning.Trainer, module: lightning.LightningModule) -> None:
        assert isinstance(module, PredictorTraining)
        self._draw(module)

    def _open_window(self) -> None:
        self._rows = self._batches = 0
        self._since = time.perf_counter()

    def _close_window(self, step: int) -> None:
        self._write({"throughput/rows_per_second": self._rows / (time.perf_counter() - self._since)}, step)
        self._open_window()

    @rank_zero_only
    def _write(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    @rank_zero_only
    def _write_validation(self, module: PredictorTraining, step: int) -> None:
        scalars: dict[str, float] = {}
        for target, result in module.results.items():
            for kind in module.measures.kinds:
                scalars[f"{GROUPS[kind]}/{_name(target)}"] = result[kind]["recall@k"]
            scalars[f"hit_rate_at_2k/{_name(target)}"] = result["predictor"]["recall@2k"]
            scalars[f"exact/{_name(target)}"] = result["predictor"]["exact"]
        scalars["hit_rate_at_2k/mean"] = mean_of(module.results, "predictor", "recall@2k")
        scalars["exact/mean"] = mean_of(module.results, "predictor", "exact")
        for kind in module.measures.kinds:
            scalars[f"{GROUPS[kind]}/weakest"] = weakest(module.results, kind)
            if kind != "predictor":  # Lightning logs that one
                scalars[f"{GROUPS[kind]}/mean"] = mean_of(module.results, kind)
            scalars[f"calibration/error_{kind}"] = float(module.measured[kind].calibration.error().mean())
        self._write(scalars, step)

    @rank_zero_only
    def _draw(self, module: PredictorTraining) -> None:
        """Draws the figures of the last validation, unless it has been done."""
        if self._undrawn is None:
            return
        layers, measured = list(module.sources), module.measured
        for name, figure in (
            ("hit_rate_by_layer", figures.hit_rates(layers, measured)),
            ("recall_by_candidates", figures.recall_by_candidates(layers, module.top_k, measured)),
            ("missed_experts", figures.missed_experts(layers, measured)),
            ("calibration", figures.calibration(measured)),
        ):
            self.writer.add_image(f"validation/{name}", _pixels(figure), self._undrawn, dataformats="HWC")
        self._drawn, self._undrawn = time.perf_counter(), None

    @rank_zero_only
    def finish(self, results: Results, top_k: int, parameters: int) -> None:
        """Writes the results of the best epoch, its `PredictorTraining.results`."""
        free, reached = mean_of(results, "training_free"), mean_of(results, "predictor")
        final = {
            "final/hit_rate": reached,
            "final/training_free": free,
            "final/gap_closed": gap_closed(free, reached),
            "final/weakest_layer": weakest(results, "predictor"),
            "final/hit_rate_at_2k": mean_of(results, "predictor", "recall@2k"),
            "final/exact": mean_of(results, "predictor", "exact"),
            "final/parameters": float(parameters),
        }
        kinds = [kind for kind in KINDS if all(kind in result for result in results.values())]
        if "without_memory" in kinds:
            final["final/without_memory"] = mean_of(results, "without_memory")
        with self.own_writer() as writer:
            for kind in kinds:
                curves = zip(*(result[kind]["recall"] for result in results.values()), strict=True)
                for number, layers in enumerate(curves, top_k):
                    writer.add_scalar(f"recall_by_candidates/{kind}", sum(layers) / len(layers), number)
                    writer.add_scalar(f"recall_by_candidates/{kind}_weakest", min(layers), number)
            for summary in hparams(self.hyperparameters, final):
                writer.file_writer.add_summary(summary)
            for name, value in final.items():
                writer.add_scalar(name, value)

    def own_writer(self) -> SummaryWriter:
        """A writer to another file of the run: Lightning closes the logger's when training ends."""
        return SummaryWriter(self.logger.log_dir)


def weakest(results: Results, kind: Kind) -> float:
    """The lowest hit rate of all layers."""
    return min(result[kind]["recall@k"] for result in results.values())


def _step(trainer: lightning.Trainer) -> int:
    """The last step done, at which Lightning writes its own scalars too."""
    return max(0, trainer.global_step - 1)


def _name(target: int) -> str:
    return f"layer_{target:02d}"


def _pixels(figure: Any) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


def _texts(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    trace = {name: value for name, value in run["trace"].items() if name not in ("model", "shards", "command")}
    return {
        "settings": run["settings"],
        "provenance": {
            "fit": f"`{run['command']}`",
            "collect": f"`{run['trace']['command']}`",
            "model": run["trace"]["model"]["name"],
            **{f"trace: {name}": value for name, value in trace.items()},
            **{f"model: {name}": value for name, value in run["trace"]["model"].items() if name != "name"},
            **{f"version: {name}": value for name, value in run["versions"].items()},
            **{f"machine: {name}": value for name, value in hardware().items()},
        },
    }


def _table(facts: dict[str, Any]) -> str:
    """A table in Markdown."""
    rows = (f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in facts.items())
    return "\n".join(["| name | value |", "| --- | --- |", *rows])
