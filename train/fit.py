"""The job `fit`: trains the predictors of a trace's target layers, into a run folder.

config.json      the settings, and which trace they were used on
checkpoints/     `best-*.ckpt`, the epoch of the highest mean validation hit rate, and `last.ckpt` to resume from
events.out.*     TensorBoard logs
result.json      hit rates of the best epoch, by layer, beside the training-free ones; written last
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from pydantic import Field
from rich.console import Console
from rich.table import Table

from data_collection.trace import Trace, write_durably
from predictors.loading import resolve_device
from predictors.metrics import gap_closed
from predictors.provenance import command, versions
from predictors.settings import Settings
from train.board import Board
from train.data import FitError, TraceData
from train.module import MEAN_HIT_RATE, PredictorTraining, mean_of

CONFIG, RESULT, CHECKPOINTS = "config.json", "result.json", "checkpoints"
WHERE_AND_HOW = {"trace", "out", "resume", "device", "workers"}
"""Settings that may differ between a run and its resumption; the others decide what is learned."""

Count = Annotated[int, Field(gt=0)]


class FitConfig(Settings):
    """Settings of `fit`."""

    trace: Path
    """The folder that `collect` wrote."""
    out: Path
    """The run's folder; it must not exist, unless the run is resumed."""
    resume: bool = False
    """Go on with the run in `out` from its last whole epoch."""
    width: Count = 320
    """Hidden width of each predictor."""
    epochs: Count = 5
    """How often each row is seen."""
    batch_size: Count = 512
    """Rows of a step; every row trains all layers."""
    learning_rate: float = Field(5e-3, gt=0)
    """The highest of a one-cycle schedule."""
    weight_decay: float = Field(0.01, ge=0)
    """Of AdamW."""
    validation: float = Field(0.1, gt=0, lt=1)
    """Share of the sequences that is kept for validation."""
    seed: int = Field(0, ge=0)
    """Of the split, the order and the initial weights."""
    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu` or `cuda`."""
    workers: int = Field(0, ge=0)
    """Processes that read the trace; 0 reads it in this one, which is enough beside a CPU."""


def fit(config: FitConfig, console: Console | None = None) -> Path:
    """Trains and returns the run's folder. Raises a `UserError` before anything is written where it can't."""
    console = console or Console()
    device = resolve_device(config.device)
    last = _check_folder(config)
    trace = Trace.open(config.trace)
    trace.verify()
    data = TraceData(trace, config.batch_size, config.validation, config.seed, config.workers)
    torch.manual_seed(config.seed)
    module = PredictorTraining(trace, config.width, config.learning_rate, config.weight_decay)
    run = _write_config(config, trace)

    best = ModelCheckpoint(config.out / CHECKPOINTS, "best-{epoch}", monitor=MEAN_HIT_RATE, mode="max", save_last=True)
    logger = TensorBoardLogger(config.out, name="", version="", default_hp_metric=False)
    logger.log_hyperparams(config.model_dump(mode="json"))
    learned_by = {name: value for name, value in run["settings"].items() if name not in WHERE_AND_HOW}
    board = Board(logger, run, learned_by)
    watched = sys.stderr.isatty()  # in a log file a progress bar is thousands of lines
    with _quiet():
        trainer = lightning.Trainer(
            max_epochs=config.epochs,
            callbacks=[best, board, *([TQDMProgressBar(leave=False)] if watched else [])],
            enable_progress_bar=watched,
            logger=logger,
            log_every_n_steps=10,
            num_sanity_val_steps=0,
            reload_dataloaders_every_n_epochs=1,  # the order is another in each epoch
            **_on(device),
        )
        started = time.perf_counter()
        trainer.fit(module, data, ckpt_path=last, weights_only=True)
        seconds = time.perf_counter() - started
        check = lightning.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, **_on(device))
        check.validate(module, data, ckpt_path=best.best_model_path, verbose=False, weights_only=True)
    result: dict[str, Any] = {
        "checkpoint": f"{CHECKPOINTS}/{Path(best.best_model_path).name}",
        "layers": [
            {"layer": target, "source": trace.sources[target], **kinds, "recall": module.recall[target]}
            for target, kinds in module.results.items()
        ],
        "mean": {kind: mean_of(module.results, kind) for kind in ("training_free", "predictor")},
    }
    board.finish(module)
    write_durably(config.out / RESULT, json.dumps(result, indent=2) + "\n")
    _report(module, console)
    console.print(
        f"{config.out}: {len(trace.sources)} predictors, {seconds:,.0f} s; "
        f"mean hit rate {result['mean']['training_free']:.3f} -> {result['mean']['predictor']:.3f}",
        highlight=False,
    )
    return config.out


def read_run(run: Path) -> dict[str, Any]:
    """The settings of a run, as `fit` wrote them. Raises `FitError` where there is no run."""
    try:
        settings = json.loads((run / CONFIG).read_text(encoding="utf-8"))
        FitConfig(**settings["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FitError(f"{run} holds no run of fit (no {CONFIG} of one); give the folder that fit wrote") from error
    assert isinstance(settings, dict)
    return settings


def _check_folder(config: FitConfig) -> Path | None:
    """The checkpoint to resume from, if any; raises unless `out` is new, or holds this very run."""
    if not config.resume:
        if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
            raise FitError(f"{config.out} exists already; name a new folder, or give --resume to go on with that run")
        return None
    before = read_run(config.out)
    now = config.model_dump(mode="json")
    for name in FitConfig.model_fields.keys() - WHERE_AND_HOW:
        if before["settings"][name] != now[name]:
            raise FitError(
                f"the run in {config.out} was started with {name} {before['settings'][name]}, not {now[name]}; "
                "resume it with the same settings, or start another"
            )
    if before["trace"]["shards"] != _identity(Trace.open(config.trace))["shards"]:
        raise FitError(f"the run in {config.out} was started on another trace than {config.trace}; give that one")
    last = config.out / CHECKPOINTS / "last.ckpt"
    return last if last.exists() else None


def _identity(trace: Trace) -> dict[str, Any]:
    manifest = trace.manifest
    return {
        "path": str(trace.path.resolve()),
        "model": manifest.model.identity(),
        "shards": [shard.xxh3 for shard in manifest.shards],
        "corpus": manifest.corpus,
        "split": manifest.split,
        "tokens": manifest.tokens,
        "command": manifest.command,
    }


def _write_config(config: FitConfig, trace: Trace) -> dict[str, Any]:
    config.out.mkdir(parents=True, exist_ok=True)
    content = {
        "settings": config.model_dump(mode="json"),
        "trace": _identity(trace),
        "command": command(),
        "versions": versions(),
    }
    write_durably(config.out / CONFIG, json.dumps(content, indent=2) + "\n")
    return content


def _on(device: torch.device) -> dict[str, Any]:
    quiet = {"enable_model_summary": False}
    if device.type == "cuda":
        return quiet | {"accelerator": "gpu", "devices": [device.index or 0]}
    return quiet | {"accelerator": "cpu", "devices": 1}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Lightning's remarks on devices, workers and folders from the user, who can't act on them."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _report(module: PredictorTraining, console: Console) -> None:
    table = Table(
        "target",
        "training-free",
        "predictor",
        "gap closed",
        "at 2k",
        "exact",
        title="hit rate on validation sequences",
        caption="at 2k: with twice as many candidates; exact: all experts found",
    )
    for target, kinds in module.results.items():
        before, after = kinds["training_free"]["recall@k"], kinds["predictor"]
        closed = gap_closed(before, after["recall@k"])
        rates = [before, after["recall@k"], after["recall@2k"], after["exact"]]
        row = [f"{rate:.3f}" for rate in rates]
        table.add_row(str(target), *row[:2], f"{closed:.0%}", *row[2:])
    console.print(table)
