"""The job `fit`: trains the predictors of a trace's target layers, into a run folder.

config.json      the settings and the trace
checkpoints/     `best-*.ckpt`, the epoch with the highest mean validation hit rate, and `last.ckpt` to resume from
events.out.*     TensorBoard logs
reuse.safetensors  the reuse predictors, if there are some
result.json      hit rates of the best epoch, by layer, beside the training-free ones; written last
"""

from __future__ import annotations

import json
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from safetensors.torch import save

from ..data_collection.memory import keep_freed_memory
from ..data_collection.trace import Trace
from ..predictors.files import CHECKSUM, is_changed, sealed, written_whole
from ..predictors.forms import Form
from ..predictors.loading import resolve_device
from ..predictors.metrics import gap_closed
from ..predictors.provenance import command, versions
from ..predictors.tables import broken, figure_table
from .board import Board
from .data import FitError, TraceData, held_out_sequences
from .measures import KINDS
from .module import MEAN_HIT_RATE, PredictorTraining, mean_of
from .reuse import train_reuse
from .settings import FitConfig
from .targets import choose_targets, form_of, loss_of
from .trainer import lightning_trainer, quiet

CONFIG, RESULT, CHECKPOINTS, REUSE = "config.json", "result.json", "checkpoints", "reuse.safetensors"
ENTRIES = {CONFIG: {"settings", "trace", "command", "versions"}, RESULT: {"checkpoint", "layers", "mean", "epochs"}}
"""What these files hold beside their checksum, which those of older releases lack, and what there is only of some runs."""
OPTIONAL = {CHECKSUM, "reuse"}
WHERE_AND_HOW = {"trace", "out", "resume", "device", "workers", "devices", "num_nodes", "strategy"}
"""Settings that may change when a run is resumed; the others decide what is learned."""


def fit(config: FitConfig, console: Console | None = None) -> Path:
    """Trains and returns the run's folder.

    Raises a `UserError` before it writes anything if it can't train. If the disk is full, and after a `KeyboardInterrupt`, the
    folder holds a run that can be resumed.
    """
    console = console or Console(quiet=not is_first())
    device = resolve_device(config.device)
    keep_freed_memory()
    last = config.out / CHECKPOINTS / "last.ckpt"
    if is_first():
        _check_folder(config)
    trace = Trace.open(config.trace)
    if is_first():
        trace.verify()
        if config.resume and last.is_file():
            read_checkpoint(last)
    targets = choose_targets(trace, config)
    sources = {target.layer: target.source for target in targets}
    data = TraceData(trace, sources, config.batch_size, config.validation, config.seed, config.workers, config.memory)
    torch.manual_seed(config.seed)
    form = form_of(trace, config)
    learning = config.loss or loss_of(trace, form, sources), config.learning_rate, config.weight_decay
    module = PredictorTraining(trace, targets, *learning, config.memory, form)
    settings = config.model_dump(mode="json")
    run = {"settings": settings, "trace": _identity(trace), "command": command(), "versions": versions()}
    best = ModelCheckpoint(config.out / CHECKPOINTS, "best-{epoch}", monitor=MEAN_HIT_RATE, mode="max", save_last=True)
    stopping = EarlyStopping(MEAN_HIT_RATE, patience=config.patience, mode="max", check_on_train_epoch_end=False)
    logger = TensorBoardLogger(config.out, name="", version="", default_hp_metric=False)
    learned_by = {name: value for name, value in settings.items() if name not in WHERE_AND_HOW}
    board = Board(logger, run, learned_by)
    watched = sys.stderr.isatty()  # in a log file, a progress bar would be thousands of lines
    with quiet(), resumable(config.out):
        trainer = lightning_trainer(
            config,
            device,
            callbacks=[best, board, stopping, *([TQDMProgressBar(leave=False)] if watched else [])],
            enable_progress_bar=watched,
            logger=logger,
        )
        if is_first():
            config.out.mkdir(parents=True, exist_ok=True)
            _write(config.out / CONFIG, run)
        console.print(
            f"{len(targets)} predictors are trained on {trace.rows:,} rows (epochs: at most {config.epochs}); "
            f"tensorboard --logdir {config.out} shows how",
            highlight=False,
            soft_wrap=True,
        )
        logger.log_hyperparams(settings)
        started = time.perf_counter()
        trainer.fit(module, data, ckpt_path=last if config.resume and last.exists() else None, weights_only=True)
        seconds = time.perf_counter() - started
        if not is_first():
            return config.out
        results = read_checkpoint(Path(best.best_model_path))["results"]
        result: dict[str, Any] = {
            "checkpoint": f"{CHECKPOINTS}/{Path(best.best_model_path).name}",
            "layers": [
                {"layer": target.layer, "source": target.source, "width": target.width, **results[target.layer]}
                for target in targets
            ],
            "mean": {kind: mean_of(results, kind) for kind in module.measures.kinds},
            "epochs": trainer.current_epoch,
        }
        board.finish(results, trace.manifest.model.top_k, module.mlps.count())
        if config.reuse:
            result |= _reuse(config, trace, board, console)
        _write(config.out / RESULT, result)
    _report(result["layers"], console)
    console.print(
        f"{config.out}: {len(targets)} predictors, {trainer.current_epoch} epochs, {seconds:,.0f} s; "
        f"mean hit rate {result['mean']['training_free']:.3f} -> {result['mean']['predictor']:.3f}",
        highlight=False,
    )
    return config.out


def _reuse(config: FitConfig, trace: Trace, board: Board, console: Console) -> dict[str, Any]:
    """Trains the reuse predictors of a trace, and writes them into the run. Returns what is said of them in its result."""
    started = time.perf_counter()
    is_held_out = held_out_sequences(trace.manifest.sequences, config.validation, config.seed)
    with board.own_writer() as writer:
        found = train_reuse(
            trace, is_held_out, config.seed, lambda loss, step: writer.add_scalar("reuse/loss", loss, step)
        )
        if found is None:
            console.print("no reuse predictors: the trace has too few consecutive tokens", highlight=False)
            return {}
        predictors, kept = found
        means = {rule: [sum(rate) / len(rate) for rate in rates] for rule, rates in kept["hit_rates"].items()}
        for rule, rates in means.items():
            for slots, rate in zip(kept["slots"], rates, strict=True):
                writer.add_scalar(f"reuse/hit_rate_by_slots/{rule}", rate, slots)
    weights = save({name: p.contiguous() for name, p in predictors.state_dict().items()})
    with written_whole(config.out / REUSE) as aside:
        aside.write_bytes(weights)
    ways = [None if way is None else f"{way:.0%}" for way in kept["way"]["learned"]]
    told = ", ".join(f"{way} at {slots} slots" for way, slots in zip(ways, kept["slots"], strict=True) if way)
    console.print(
        f"reuse predictors, {time.perf_counter() - started:,.0f} s; of the misses that Belady's rule spares they spare "
        f"{told or 'none, since no number of slots leaves a choice'}",
        highlight=False,
    )
    facts = {"layers": kept["layers"], "slots": kept["slots"], "hit_rates": means, "rows": kept["rows"]}
    return {"reuse": facts | {"width": predictors.width, "xxh3": xxhash.xxh3_128_hexdigest(weights)}}


def is_first() -> bool:
    """Whether this is the first of the processes that train together, or the only one: it writes for all."""
    return (_get_rank() or 0) == 0


def read_run(run: Path) -> dict[str, Any]:
    """The content of a run's config.json. Raises `FitError` if there is no run."""
    try:
        settings = json.loads((run / CONFIG).read_text(encoding="utf-8"))
        FitConfig(**settings["settings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FitError(f"{run} holds no run of fit (no {CONFIG} of one); give the folder that fit wrote") from error
    if is_changed(settings) or settings.keys() - {CHECKSUM} != ENTRIES[CONFIG]:
        raise FitError(f"{run / CONFIG} is not what fit wrote; train again")
    settings.pop(CHECKSUM, None)
    # Of an older release.
    settings["settings"] = {"memory": 0, "form": None, "reuse": False} | settings["settings"]
    return settings


def read_result(run: Path) -> dict[str, Any] | None:
    """The content of a run's result.json, or None before it is finished. Raises `FitError` if it is broken."""
    file = run / RESULT
    if not file.exists():
        return None
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        if is_changed(result) or result.keys() - OPTIONAL != ENTRIES[RESULT]:
            raise ValueError("it is not what fit wrote")
        str(result["checkpoint"]), result["mean"]
        for entry in result["layers"]:
            (
                entry["layer"],
                entry["source"],
                float(entry["training_free"]["recall@k"]),
                float(entry["predictor"]["recall@k"]),
            )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FitError(f"{file} is broken ({type(error).__name__}: {error}); run fit --resume again") from error
    return result


def read_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint of a run. Raises `FitError` if it is missing or broken."""
    try:
        with zipfile.ZipFile(file) as parts:
            if (part := parts.testzip()) is not None:  # torch does not compare the checksums that it writes
                raise ValueError(f"{part} is not what was written")
        # weights_only: no code in a checkpoint is run.
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return content
    except Exception as error:  # zip, pickle, key and file errors
        raise FitError(f"{file} is missing or broken; train the run again") from error


def is_trained_on(run: dict[str, Any], trace: Trace) -> bool:
    """Whether a run, by the content of its config.json, reads this trace. Older releases did not write `speculation`."""
    before, now = run["trace"], _identity(trace)
    return all(before.get(name, now[name]) == now[name] for name in ("shards", "speculation"))


def _check_folder(config: FitConfig) -> None:
    """Raises `FitError` unless `out` is new, or holds this run and `resume` is set."""
    if not config.resume:
        if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
            raise FitError(f"{config.out} exists already; name a new folder, or give --resume to go on with that run")
        return
    before = read_run(config.out)
    trace, now = Trace.open(config.trace), config.model_dump(mode="json")
    # Older releases wrote the default so.
    if before["settings"]["loss"] == "kl" and form_of(trace, config) is Form.CORRECTING:
        now["loss"] = now["loss"] or before["settings"]["loss"]
    for name in FitConfig.model_fields.keys() - WHERE_AND_HOW:
        if before["settings"].get(name) != now[name]:
            raise FitError(
                f"the run in {config.out} was started with {name} {before['settings'].get(name)}, not {now[name]}; "
                "resume it with the same settings, or start another"
            )
    if not is_trained_on(before, trace):
        raise FitError(f"the run in {config.out} was started on another trace than {config.trace}; give that one")


def _identity(trace: Trace) -> dict[str, Any]:
    manifest = trace.manifest
    return {
        "path": str(trace.path.resolve()),
        "model": manifest.model.identity(),
        "shards": [shard.xxh3 for shard in manifest.shards],
        "speculation": manifest.speculation_xxh3,
        **{name: getattr(manifest, name) for name in ("corpus", "split", "tokens", "command")},
    }


def _write(file: Path, content: dict[str, Any]) -> None:
    with written_whole(file) as aside:
        aside.write_text(json.dumps(sealed(content), indent=2) + "\n", encoding="utf-8")


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Has a training that is stopped, or that can't write, end with a sentence that says how to go on."""

    def advice() -> str:
        if (out / CONFIG).exists():
            return f"give --resume to go on with {out}"
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        return "nothing is kept of the run"

    try:
        yield
    except KeyboardInterrupt as stop:
        raise type(stop)(f"stopped; {advice()}") from stop
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):  # which Lightning turns into an exit
            raise
        raise type(end.__context__)(f"stopped; {advice()}") from end
    except OSError as error:
        raise FitError(f"{out} can't be written ({error.strerror or error}); make room: {advice()}") from error


def _report(layers: list[dict[str, Any]], console: Console) -> None:
    kinds = [kind for kind in KINDS if kind in layers[0]]
    headers = {"training_free": "training-free", "without_memory": broken("without memory"), "predictor": "predictor"}
    table = figure_table(
        *("target", "source", "width", *(headers[kind] for kind in kinds), "gap closed", "at 2k", "exact"),
        title="hit rate on validation sequences",
        caption="at 2k: with twice as many candidates; exact: all experts found",
    )
    for entry in layers:
        rates, after = [entry[kind]["recall@k"] for kind in kinds], entry["predictor"]
        source = "input" if entry["source"] is None else str(entry["source"])
        row = [str(entry["layer"]), source, str(entry["width"]), *(f"{rate:.3f}" for rate in rates)]
        row.append(f"{gap_closed(rates[0], rates[-1]):.0%}")
        table.add_row(*row, *(f"{rate:.3f}" for rate in (after["recall@2k"], after["exact"])))
    console.print(table)
