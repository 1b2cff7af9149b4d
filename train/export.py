"""The job `export`: the best epoch of a run as a predictors folder, shaped like a Hub repository.

A predictor that does not find more on validation than training-free speculation does is left out: it would cost its bytes and its
time for nothing.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from ..data_collection.columns import SEQUENCE
from ..data_collection.statistics import CHUNK_ROWS, hit_rates
from ..data_collection.trace import Trace
from ..predictors.checkpoint import Predictors, refuse_existing, save_predictors
from ..predictors.loading import DTYPES
from ..predictors.mlp import ResidualMLP, StackedResidualMLPs
from ..predictors.provenance import command, versions
from .card import Rounding, layer_table, model_card, remarks
from .data import FitError, held_out_sequences
from .fit import RESULT, read_run

ROUNDING_ROWS = 20_000
"""Validation rows that the cost of rounding is measured on, at the most."""


def export(
    run: Path,
    out: Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    trace: Path | None = None,
    console: Console | None = None,
) -> Path:
    """Writes the predictors of the best epoch of `run` to the new folder `out` and returns it.

    `dtype` is that of the predictors' weights in the file; default vectors are fp32. Where it rounds, what that costs in hit
    rate is measured on validation rows. `trace` says where the trace is, if it was moved since. Raises a `UserError` for a
    run that is not finished or was changed, and where `out` exists.
    """
    settings = read_run(run)
    refuse_existing(out)
    try:
        result = json.loads((run / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FitError(f"the run in {run} is not finished (no {RESULT}); go on with it by fit --resume") from error
    source = Trace.open(trace or settings["trace"]["path"])
    if [shard.xxh3 for shard in source.manifest.shards] != settings["trace"]["shards"]:
        raise FitError(f"{source.path} is not the trace that {run} was trained on; name that one with --trace")
    entries = {entry["layer"]: entry for entry in result["layers"]}
    kinds = {  # the last of them is what speculates
        target: ["training_free", "predictor"]
        if entry["predictor"]["recall@k"] > entry["training_free"]["recall@k"]
        else ["training_free"]
        for target, entry in entries.items()
    }
    trained = _trained(run / result["checkpoint"], {t: entry["width"] for t, entry in entries.items()}, source)
    mlps = {target: mlp for target, mlp in trained.items() if "predictor" in kinds[target]}
    sources = {target: entry["source"] for target, entry in entries.items()}
    rounding = None
    if dtype != "float32" and mlps:
        rows = _validation_rows(source, settings["settings"]["validation"], settings["settings"]["seed"])
        rounding = _rounding(mlps, DTYPES[dtype], source, sources, rows)
    predictors = Predictors(
        model=source.manifest.model.identity(),
        mlps={target: _cast(mlp, DTYPES[dtype]) for target, mlp in mlps.items()},
        sources=sources,
        default_vectors=source.default_vectors(),
        hit_rates={target: {kind: entries[target][kind]["recall@k"] for kind in kinds[target]} for target in entries},
        recall={target: entries[target][kinds[target][-1]]["recall"] for target in entries},
        provenance={
            "commands": {
                "collect": source.manifest.command,
                "fit": settings["command"],
                "export": command(),
            },
            "versions": versions(),
            "trace": {name: settings["trace"][name] for name in ("corpus", "split", "tokens")},
            "settings": {name: value for name, value in settings["settings"].items() if name not in ("trace", "out")},
        },
    )
    folder = save_predictors(out, predictors, model_card(predictors, entries, rounding))
    _report(folder, predictors, entries, rounding, console or Console())
    return folder


def _trained(checkpoint: Path, widths: dict[int, int], trace: Trace) -> dict[int, ResidualMLP]:
    """The predictors of a checkpoint by target layer, fp32; `widths` are theirs."""
    model = trace.manifest.model
    stack = StackedResidualMLPs(list(widths.values()), model.hidden_size, model.num_experts)
    try:
        # weights_only: whatever a checkpoint holds, none of it is run.
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:  # torch.load raises what it meets: zip, pickle, key and file errors
        raise FitError(f"{checkpoint} is missing or broken; train the run again") from error
    stack.load_state_dict({n.removeprefix("mlps."): tensor for n, tensor in state.items() if n.startswith("mlps.")})
    return {target: stack.layer(number) for number, target in enumerate(widths)}


def _validation_rows(trace: Trace, share: float, seed: int) -> list[torch.Tensor]:
    """Rows of each shard that `fit` kept for validation, evenly spaced, `ROUNDING_ROWS` in all at the most."""
    held_out = held_out_sequences(trace.manifest.sequences, share, seed)
    shards = range(len(trace.manifest.shards))
    rows = [held_out[trace.column(shard, SEQUENCE).long()].nonzero().flatten() for shard in shards]
    step = -(-sum(map(len, rows)) // ROUNDING_ROWS)
    return [some[::step] for some in rows]


def _rounding(
    mlps: dict[int, ResidualMLP],
    dtype: torch.dtype,
    trace: Trace,
    sources: dict[int, int | None],
    rows: list[torch.Tensor],
) -> Rounding:
    """What rounding the predictors to `dtype` costs on the given rows of each shard."""
    sources = {target: sources[target] for target in mlps}
    speculators, names = trace.stacked(sources), trace.columns_for(sources)

    def measure(some: dict[int, ResidualMLP]) -> dict[int, float]:
        pieces = [(shard, piece) for shard, own in enumerate(rows) for piece in own.split(CHUNK_ROWS) if len(piece)]
        batches = (trace.read(shard, piece, names) for shard, piece in pieces)
        return hit_rates(batches, sources, speculators, [trace.manifest.model.top_k], some)[0]

    rounded = {target: _cast(_cast(mlp, dtype), torch.float32) for target, mlp in mlps.items()}
    return Rounding(str(dtype).removeprefix("torch."), sum(map(len, rows)), measure(mlps), measure(rounded))


def _cast(mlp: ResidualMLP, dtype: torch.dtype) -> ResidualMLP:
    return copy.deepcopy(mlp).to(dtype)


def _report(
    folder: Path, predictors: Predictors, entries: dict[int, Any], rounding: Rounding | None, console: Console
) -> None:
    headers, rows = layer_table(predictors, entries, rounding)
    shown = [number for number, header in enumerate(headers) if header != "bytes"]  # so that it fits 80 columns
    table = Table(
        *(headers[number] for number in shown),
        title="hit rate on validation sequences",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    for row in rows:
        table.add_row(*(row[number] for number in shown))
    console.print(table)
    size = sum(file.stat().st_size for file in folder.iterdir())
    for line in (*remarks(predictors, entries, rounding), f"{folder}: {size:,} bytes"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
