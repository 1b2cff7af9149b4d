"""The job `export`: the best epoch of a run as a predictors folder, shaped like a Hub repository.

A predictor whose validation hit rate is not above that of training-free speculation is left out as useless.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from ..data_collection.columns import SEQUENCE, Columns
from ..data_collection.statistics import hit_rates
from ..data_collection.trace import RUN, Trace
from ..predictors.checkpoint import Predictors, TargetLayer, refuse_existing, save_predictors
from ..predictors.direct import STACKS, DirectMLP
from ..predictors.files import checksum
from ..predictors.forms import Form, PredictorForm
from ..predictors.loading import DTYPES
from ..predictors.provenance import command, versions
from ..predictors.reuse import Reuse, ReusePredictors
from ..predictors.tables import broken, figure_table
from .calibration import calibrate
from .card import Rounding, layer_table, model_card, remarks
from .data import FitError, held_out_sequences
from .fit import RESULT, REUSE, is_trained_on, read_checkpoint, read_result, read_run
from .settings import ExportConfig

ROUNDING_ROWS = 20_000
"""About the most validation rows that the cost of rounding is measured on."""


def export(config: ExportConfig, console: Console | None = None) -> Path:
    """Writes the predictors of a run's best epoch to a new folder and returns it.

    With `also`, of each layer that both runs trained those of the run with the higher validation hit rate. On validation rows it is
    fitted how sure each layer's speculation is. If the dtype rounds, the loss of hit rate is measured on them too. Raises a `UserError`
    if a run is not finished or was changed, if the runs were validated on other rows, or if the folder exists.
    """
    run, dtype = config.run, DTYPES[config.dtype]
    settings = read_run(run)
    refuse_existing(config.out)
    source = Trace.open(config.trace or settings["trace"]["path"])
    result, trained = _finished(run, settings, source)
    entries = {entry["layer"]: entry for entry in result["layers"]}
    commands = {"collect": source.manifest.command, "fit": settings["command"], "export": command()}
    if config.also is not None:
        other = read_run(config.also)
        _check_alike(run, settings["settings"], config.also, other["settings"])
        others, of_other = _finished(config.also, other, source)
        for entry in others["layers"]:
            target = entry["layer"]
            if target in entries and _reached(entry) > _reached(entries[target]):
                entries[target], trained[target] = entry, of_other[target]
        commands["fit also"] = other["command"]
    predictors = Predictors(
        model=source.manifest.model.identity(),
        layers=[
            _layer(entry, trained[target], source.manifest.form is Form.CORRECTING) for target, entry in entries.items()
        ],
        default_vectors=source.default_vectors(),
        provenance={
            "commands": commands,
            "versions": versions(),
            "trace": {name: settings["trace"][name] for name in ("corpus", "split", "tokens")},
            "settings": {name: value for name, value in settings["settings"].items() if name not in ("trace", "out")},
        },
        reuse=_reuse(run, result, source),
    )
    kept, rounding = _cast(predictors, dtype), None
    rows = _validation_rows(source, settings["settings"]["validation"], settings["settings"]["seed"])
    kept = _calibrated(kept, source, rows)
    if dtype != torch.float32 and kept.mlps:
        before, after = (_hit_rates(some, source, rows) for some in (predictors, kept))
        rounding = Rounding(config.dtype, sum(map(len, rows)), before, after)
    folder = save_predictors(config.out, kept, model_card(kept, entries, rounding))
    _report(folder, kept, entries, rounding, console or Console())
    return folder


def _finished(run: Path, settings: dict[str, Any], trace: Trace) -> tuple[dict[str, Any], dict[int, PredictorForm]]:
    """The result of a run with these `settings`, and its predictors by target. Raises `FitError` unless it was finished on `trace`."""
    result = read_result(run)
    if result is None:
        raise FitError(f"the run in {run} is not finished (no {RESULT}); go on with it by fit --resume")
    if not is_trained_on(settings, trace):
        raise FitError(f"{trace.path} is not the trace that {run} was trained on; name that one with --trace")
    widths = {entry["layer"]: entry["width"] for entry in result["layers"]}
    own = settings["settings"]
    form = Form(own["form"] or trace.manifest.form)
    return result, predictors_in(run / result["checkpoint"], widths, own["memory"], trace, form)


def _check_alike(run: Path, settings: dict[str, Any], also: Path, others: dict[str, Any]) -> None:
    """Raises `FitError` unless the hit rates of two runs with these settings can be compared, and their predictors be mixed."""
    for name in ("validation", "seed", "memory", "source", "horizon"):
        mine, its = settings.get(name), others.get(name)
        if mine != its:
            raise FitError(
                f"{run} was trained with {name} {mine} and {also} with {its}, so their layers can't be compared; "
                "train both with the same"
            )


def _reached(entry: dict[str, Any]) -> float:
    """The validation hit rate of a layer's predictor."""
    rate: float = entry["predictor"]["recall@k"]
    return rate


def _reuse(run: Path, result: dict[str, Any], trace: Trace) -> Reuse | None:
    """The reuse predictors of a run, if it has some. Raises `FitError` if their file is not what `fit` wrote."""
    if "reuse" not in result:
        return None
    facts = result["reuse"]
    try:
        if checksum(run / REUSE) != facts["xxh3"]:
            raise FitError(f"{run / REUSE} is not what fit wrote; train again")
        predictors = ReusePredictors(len(facts["layers"]), trace.manifest.model.num_experts, facts["width"])
        predictors.load_state_dict(load_file(run / REUSE))
    except (OSError, RuntimeError) as error:  # RuntimeError: of an older release
        raise FitError(f"{run / REUSE} is missing, broken or of an older release; train again") from error
    return Reuse(predictors.requires_grad_(False), facts["layers"], facts["slots"], facts["hit_rates"])


def _layer(entry: dict[str, Any], mlp: PredictorForm, followed: bool) -> TargetLayer:
    """The layer of a run's result, with its trained predictor if that is better than none.

    Where the residual is not `followed`, none is a predictor that guesses the experts used most.
    """
    # The last kind is the exported speculation.
    kinds = ["training_free"]
    if entry["predictor"]["recall@k"] > entry["training_free"]["recall@k"]:
        kinds += [kind for kind in ("without_memory", "predictor") if kind in entry]
    rates, recall = {kind: entry[kind]["recall@k"] for kind in kinds}, entry[kinds[-1]]["recall"]
    none = None if followed or not isinstance(mlp, DirectMLP) else mlp.untrained()
    return TargetLayer(entry["layer"], entry["source"], mlp if "predictor" in kinds else none, rates, recall)


def predictors_in(
    checkpoint: Path, widths: dict[int, int], memory: int, trace: Trace, form: Form
) -> dict[int, PredictorForm]:
    """The predictors of a checkpoint by target layer, fp32, of this `form`, with these `widths` and this `memory`."""
    model = trace.manifest.model
    stack = STACKS[form](list(widths.values()), model.hidden_size, model.num_experts, memory, model.top_k)
    state = read_checkpoint(checkpoint)["state_dict"]
    stack.load_state_dict({n.removeprefix("mlps."): tensor for n, tensor in state.items() if n.startswith("mlps.")})
    return {target: stack.layer(number) for number, target in enumerate(widths)}


def _validation_rows(trace: Trace, share: float, seed: int) -> list[torch.Tensor]:
    """Rows of each shard that `fit` kept for validation, about `ROUNDING_ROWS` in all: evenly spaced runs of consecutive tokens."""
    held_out = held_out_sequences(trace.manifest.sequences, share, seed)
    found = []
    for shard in range(len(trace.manifest.shards)):
        _, rows = trace.by_token(shard)
        found.append(rows[held_out[trace.column(shard, SEQUENCE)[rows].long()]])
    step = -(-sum(map(len, found)) // ROUNDING_ROWS)
    return [rows[torch.arange(len(rows)) // RUN % step == 0] for rows in found]


def _hit_rates(predictors: Predictors, trace: Trace, rows: list[torch.Tensor]) -> dict[int, float]:
    """The hit rate of each layer that has an MLP, computed in fp32, on the given rows of each shard."""
    mlps = _cast(predictors, torch.float32).mlps
    sources = predictors.sources_among({target: trace.sources[target] for target in mlps})
    batches = _batches(trace, sources, mlps, rows)
    [rates] = hit_rates(batches, sources, trace.stacked(sources), [trace.manifest.model.top_k], mlps)
    return rates


def _calibrated(predictors: Predictors, trace: Trace, rows: list[torch.Tensor]) -> Predictors:
    """The same, with how sure each layer's speculation is, with or without an MLP, from the given rows of each shard."""
    mlps, model = _cast(predictors, torch.float32).mlps, trace.manifest.model
    sources = predictors.sources_among({entry.layer: trace.sources[entry.layer] for entry in predictors.layers})
    batches, most = _batches(trace, sources, mlps, rows), min(2 * model.top_k, model.num_experts)
    found = calibrate(batches, sources, trace.stacked(sources), mlps, most)
    return replace(
        predictors, layers=[replace(entry, confidence=found.get(entry.layer)) for entry in predictors.layers]
    )


def _batches(
    trace: Trace, sources: dict[int, int | None], mlps: dict[int, PredictorForm], rows: list[torch.Tensor]
) -> Iterator[Columns]:
    """The given rows of each shard, with what speculation reads of them."""
    names = trace.columns_for(sources, max((mlp.memory for mlp in mlps.values()), default=0))
    return (trace.read(shard, piece, names) for shard, piece in trace.pieces(rows))


def _cast(predictors: Predictors, dtype: torch.dtype) -> Predictors:
    """The same with copies of the MLPs in `dtype`."""
    mlps = {target: copy.deepcopy(mlp).to(dtype) for target, mlp in predictors.mlps.items()}
    return replace(predictors, layers=[replace(entry, mlp=mlps.get(entry.layer)) for entry in predictors.layers])


def _report(
    folder: Path, predictors: Predictors, entries: dict[int, Any], rounding: Rounding | None, console: Console
) -> None:
    headers, rows = layer_table(predictors, entries, rounding)
    shown = [number for number, header in enumerate(headers) if header != "bytes"]  # so that it fits 80 columns
    table = figure_table(*(broken(headers[number]) for number in shown), title="hit rate on validation sequences")
    for row in rows:
        table.add_row(*(row[number] for number in shown))
    console.print(table)
    size = sum(file.stat().st_size for file in folder.iterdir())
    for line in (*remarks(predictors, rounding), f"{folder}: {size:,} bytes"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
