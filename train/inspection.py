"""`predict-train inspect`: the content of a trace, a run of `fit` or a predictors folder, as tables, JSON and a figure.

Lightning is imported only for a run, and matplotlib only for a figure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors.torch import load_file

from ..data_collection.keeping import MOST_ROWS, RULES, keep_rates, learned
from ..data_collection.statistics import SAMPLE_ROWS, trace_statistics
from ..data_collection.trace import Trace
from ..predictors.architecture import describe_shape
from ..predictors.checkpoint import WEIGHTS, load_predictors
from ..predictors.config import read_config
from ..predictors.errors import UserError
from ..predictors.metrics import gap_closed
from ..predictors.tables import broken, figure_table
from .reuse import reuse_of

SIZES = ("k", "k+2", "2k")


class InspectError(UserError):
    """A folder that can't be inspected, or a figure that can't be written; the message says why."""


def inspect(
    path: Path, sample_rows: int | None = None, keep: bool = False, predictors: str | None = None
) -> dict[str, Any]:
    """The content of the folder `path` as plain JSON values; `kind` is `trace`, `run` or `predictors`.

    `sample_rows` bounds the rows that a trace's training-free hit rates are measured on. With `keep`, what slots should keep is
    measured too (see `keep_rates`); with `predictors`, also what their reuse predictors keep. Raises a `UserError` if the folder is none of the three, if one of its files is not what was
    written, or if what slots keep is asked of something else than a trace.
    """
    kind = _kind(path)
    if kind == "trace":
        return _trace(path, sample_rows, keep, predictors)
    if keep:
        raise InspectError(f"{path} is no trace, so it says nothing about slots; give a trace, or leave out keep")
    return _run(path) if kind == "run" else _predictors(path)


def _kind(path: Path) -> str:
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise InspectError(f"{path} {what}; give the folder that collect, fit or export wrote")
    if (path / "manifest.json").exists() or any(path.glob("shard-*")):
        return "trace"
    if (path / "predictors.safetensors").exists():
        return "predictors"
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = None
    keys = set(config) if isinstance(config, dict) else set()
    if {"format_version", "default_vectors"} <= keys:
        return "predictors"
    if {"settings", "trace"} <= keys:
        return "run"
    raise InspectError(
        f"{path} holds neither a trace, nor a run, nor predictors; give the folder that collect, fit or export wrote"
    )


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _trace(path: Path, sample_rows: int | None, keep: bool, predictors: str | None) -> dict[str, Any]:
    trace = Trace.open(path)
    trace.verify()
    provenance = trace.manifest.model_dump(mode="json", exclude={"layers", "shards"})
    found = trace_statistics(trace, sample_rows or SAMPLE_ROWS)
    files = {"bytes": _size(path), "shards": len(trace.manifest.shards)}
    if keep:
        rules = RULES if predictors is None else RULES | {"learned": learned(*reuse_of(trace, predictors))}
        found["keep"] = keep_rates(trace, rules, min(sample_rows or MOST_ROWS, MOST_ROWS))
    return {"kind": "trace", "path": str(path), **files, "provenance": provenance, **found}


def _run(path: Path) -> dict[str, Any]:
    from .fit import read_result, read_run

    settings, result = read_run(path), read_result(path)
    found = {"kind": "run", "path": str(path), "bytes": _size(path), **settings, "epochs": _epochs(path)}
    if result is None:
        return found | {"finished": False, "layers": []}
    names = ("layer", "source", "training_free", "without_memory", "predictor")
    layers = [{name: entry[name] for name in names if name in entry} for entry in result["layers"]]
    return found | {"finished": True, "checkpoint": result["checkpoint"], "mean": result["mean"], "layers": layers}


def _epochs(path: Path) -> list[dict[str, float]]:
    """The mean validation hit rate and the validation loss of each logged epoch."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path)).Reload()
    known = set(events.Tags()["scalars"])
    tags = ("hit_rate/mean", "loss/validation")
    curves = ([event.value for event in events.Scalars(tag)] if tag in known else [] for tag in tags)
    return [
        {"epoch": number, "hit_rate": rate, "loss": loss}
        for number, (rate, loss) in enumerate(zip(*curves, strict=False))
    ]


def _predictors(path: Path) -> dict[str, Any]:
    predictors, weights = load_predictors(path), load_file(path / WEIGHTS)
    layers = [
        {
            "layer": entry.layer,
            "source": entry.source,
            "width": 0 if entry.mlp is None else entry.mlp.width,
            "memory": 0 if entry.mlp is None else entry.mlp.memory,
            # Their size in the file; in memory they are fp32.
            "bytes": sum(w.nbytes for name, w in weights.items() if name.startswith(f"layers.{entry.layer}.")),
            "hit_rate": entry.hit_rates,
            "recall": entry.recall,
            "confidence": None if entry.confidence is None else entry.confidence._asdict(),
        }
        for entry in predictors.layers
    ]
    return {
        "kind": "predictors",
        "path": str(path),
        "bytes": _size(path),
        "bytes_of_weights": (path / WEIGHTS).stat().st_size,
        "format_version": read_config(path).format_version,
        "model": predictors.model,
        "default_vectors": sorted(predictors.default_vectors),
        "provenance": predictors.provenance,
        "layers": layers,
        **(
            {}
            if predictors.reuse is None
            else {"reuse": {"slots": predictors.reuse.slots, "hit_rates": predictors.reuse.hit_rates}}
        ),
    }


def report(found: dict[str, Any], console: Console) -> None:
    """Prints the result of `inspect` as tables."""
    {"trace": _report_trace, "run": _report_run, "predictors": _report_predictors}[found["kind"]](found, console)


def _facts(console: Console, title: str, facts: dict[str, Any]) -> None:
    # Wrapped, not cut: a command is useless without its end.
    table = Table(title=escape(title), show_header=False, box=None, padding=(0, 2, 0, 0), title_justify="left")
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {part}" for key, part in value.items())
        elif isinstance(value, int) and not isinstance(value, bool) and name != "seed":
            value = f"{value:,}"
        table.add_row(name.replace("_", " "), escape(str(value)))
    console.print(table)


def _print(
    console: Console, headers: Iterable[str], rows: Iterable[list[str]], title: str, caption: str | None = None
) -> None:
    table = figure_table(*headers, title=title, caption=caption)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _model(model: dict[str, Any]) -> str:
    return f"{model['name']}: {describe_shape(model)}"


def _places(entry: dict[str, Any]) -> list[str]:
    """The cells of an entry's target and source layer."""
    return [str(entry["layer"]), "input" if entry["source"] is None else str(entry["source"])]


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.3f}"


def _closed(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None or before == 1 else f"{gap_closed(before, after):.0%}"


def _without(remember: bool) -> list[str]:
    """The header of the column with the hit rates without a memory, if there is one."""
    return [broken("without memory")] if remember else []


def _report_trace(found: dict[str, Any], console: Console) -> None:
    provenance = dict(found["provenance"])
    facts = {"model": _model(provenance.pop("model")), "bytes": found["bytes"], "shards": found["shards"]}
    facts["checksums"] = "right, all of them"
    _facts(console, f"trace {found['path']}", facts | provenance)
    k, rows = found["top_k"], found["rows"]
    measures = (*SIZES, "previous_token")
    _print(
        console,
        ("target", "source", *(f"top {size}" for size in (k, k + 2, 2 * k)), "previous", "control"),
        (
            [*_places(entry), *(_rate(entry["hit_rate"][name]) for name in measures), f"{entry['control']:.4f}"]
            for entry in found["layers"]
        ),
        title="training-free hit rate by number of candidates",
        caption=f"on {rows['training_free']:,} rows, evenly spaced; previous: the previous token's experts as the guess, "
        f"on {rows['previous_token']:,} rows; control: on every eighth",
    )
    curve = found["reuse"]
    _print(
        console,
        ("slots of a layer", *map(str, curve["slots"])),
        [["hit rate", *map(_rate, curve["hit_rates"])]],
        title="slots that hold the experts used last",
        caption=f"mean over layers, on {rows['reuse']:,} rows of {curve['sequences']:,} sequences; each begins with empty slots",
    )
    if "keep" in found:
        _report_keep(found["keep"], console)
    balances = {entry["layer"]: entry["balance"] for entry in found["layers"]}
    _print(
        console,
        ("target", "busiest", "entropy", "idle"),
        (
            [str(layer), f"{balance['max_over_mean']:.2f}", f"{balance['entropy']:.3f}", str(balance["idle"])]
            for layer, balance in balances.items()
        ),
        title="expert load",
        caption=f"on all {rows['load']:,} rows; busiest: its load over the mean; entropy: 1 is uniform; "
        "idle: experts without a token",
    )


def _report_keep(found: dict[str, Any], console: Console) -> None:
    rates, layers = found["hit_rates"], found["layers"]
    for number, slots in enumerate(found["slots"]):
        by_layer = zip(layers, *(rate[number] for rate in rates.values()), strict=True)
        rows = [[str(layer), *map(_rate, values)] for layer, *values in by_layer]
        rows.append(["mean", *(_rate(sum(rate[number]) / len(layers)) for rate in rates.values())])
        way = {name: share[number] for name, share in found["way"].items()}
        rows.append(["way", *("" if way.get(name) is None else f"{way[name]:.0%}" for name in rates)])
        _print(
            console,
            ("layer", *rates),
            rows,
            title=f"hit rate of {slots} slots a layer by what they keep",
            caption=f"on {found['rows']:,} rows of {found['sequences']:,} sequences; each begins with empty slots; belady knows the "
            "future; way: of the misses that belady spares against lru",
        )


def _report_run(found: dict[str, Any], console: Console) -> None:
    trace = dict(found["trace"])
    shards = len(trace.pop("shards", []))
    facts = {
        "model": _model(trace.pop("model")),
        "trace": trace.pop("path"),
        **{name: trace[name] for name in ("corpus", "split", "tokens") if name in trace},
        "shards": shards,
        "bytes": found["bytes"],
        "state": f"finished; the best epoch is in {found['checkpoint']}" if found["finished"] else "not finished",
        **{name: value for name, value in found["settings"].items() if name != "trace"},
        "versions": found["versions"],
        "command": found["command"],
    }
    _facts(console, f"run {found['path']}", facts)
    if found["epochs"]:
        rows = ([str(e["epoch"]), f"{e['hit_rate']:.4f}", f"{e['loss']:.4f}"] for e in found["epochs"])
        _print(console, ("epoch", "hit rate", "loss"), rows, "mean over all layers, on validation sequences")
    layers, remember = [], any("without_memory" in entry for entry in found["layers"])
    for entry in found["layers"]:
        before, after = entry["training_free"]["recall@k"], entry["predictor"]
        alone = [_rate(entry["without_memory"]["recall@k"])] if remember else []
        rates = [_rate(before), *alone, _rate(after["recall@k"]), _closed(before, after["recall@k"])]
        layers.append([*_places(entry), *rates, _rate(after.get("recall@2k")), _rate(after.get("exact"))])
    if layers:
        headers = (
            "target",
            "source",
            "training-free",
            *_without(remember),
            "predictor",
            "gap closed",
            "at 2k",
            "exact",
        )
        _print(console, headers, layers, "best epoch")


def _report_predictors(found: dict[str, Any], console: Console) -> None:
    provenance = dict(found["provenance"])
    commands = provenance.pop("commands", {})
    facts = {
        "model": _model(found["model"]),
        "bytes": found["bytes"],
        "default vectors": f"of layers {', '.join(map(str, found['default_vectors']))}",
        **provenance,
        **commands,
    }
    _facts(console, f"predictors {found['path']}", facts)
    k, experts = found["model"]["top_k"], found["model"]["num_experts"]
    sizes = [min(size, 2 * k, experts) for size in (k + 2, 2 * k)]
    rows, remember = [], any(entry["memory"] for entry in found["layers"])
    sure = any(entry["confidence"] for entry in found["layers"])
    for entry in found["layers"]:
        before, after = entry["hit_rate"].get("training_free"), entry["hit_rate"].get("predictor")
        row = [*_places(entry), str(entry["width"] or "none"), f"{entry['bytes'] / 1000:,.0f}", _rate(before)]
        row += [_rate(entry["hit_rate"].get("without_memory"))] if remember else []
        row += [_rate(after), _closed(before, after)]
        row += [_rate(entry["recall"][size - k]) if entry["recall"] else "" for size in sizes]
        rows.append(row + ([_rate((entry["confidence"] or {}).get("error"))] if sure else []))
    headers = ("target", "source", "width", "kB", "training-free", *_without(remember), "predictor", "gap closed")
    _print(
        console,
        map(broken, (*headers, *(f"top {size}" for size in sizes), *(["ECE"] if sure else []))),
        rows,
        title="hit rate by layer, on validation sequences",
        caption="top: of the speculation, with so many candidates; without a predictor it is training-free"
        + ("; ECE: expected calibration error of the candidates' probabilities" if sure else ""),
    )
    if reuse := found.get("reuse"):
        rows = [[rule, *map(_rate, rates)] for rule, rates in reuse["hit_rates"].items()]
        title, caption = (
            "hit rate of slots by what they keep",
            "mean over layers, on validation sequences; belady knows the future",
        )
        _print(console, ("eviction", *(f"{slots} slots" for slots in reuse["slots"])), rows, title, caption)


def plot(found: dict[str, Any], file: Path) -> None:
    """Draws the result of `inspect` to a PNG, PDF or SVG `file`: hit rates by layer, and for a trace each expert's load.

    Raises `InspectError` if there is nothing to draw or the file can't be written.
    """
    curves = _curves(found)
    if not found["layers"] or not any(rate is not None for values in curves.values() for rate in values):
        raise InspectError(f"{found['path']} has no hit rates to draw yet; finish the run with fit --resume")
    from .figures import draw_kept, draw_loads, draw_rates, new_figure

    layers = [entry["layer"] for entry in found["layers"]]
    loads, keep = found["kind"] == "trace", found.get("keep")
    width, height = max(7.5, min(14.0, 4 + 0.2 * len(layers))), 4.6 + loads * max(2.6, 0.16 * len(layers) + 1.2)
    figure = new_figure(width, height + (4.0 if keep else 0.0))
    heights = [3.4, max(2.2, 0.16 * len(layers) + 0.8)] if loads else [1.0]
    heights += [2.8] if keep else []
    axes = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    model = found["trace"]["model"] if found["kind"] == "run" else found.get("model") or found["provenance"]["model"]
    figure.suptitle(f"{found['kind']} of {model['name']}", fontsize=12)
    draw_rates(axes[0], layers, curves)
    if loads:
        draw_loads(axes[1], layers, [entry["load"] for entry in found["layers"]])
    if keep:
        draw_kept(axes[2], keep["layers"], keep["slots"], keep["hit_rates"])
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise InspectError(f"the figure can't be written to {file} ({error}); name a .png in a folder") from error


def _curves(found: dict[str, Any]) -> dict[str, list[float | None]]:
    layers = found["layers"]
    if found["kind"] == "trace":
        k = found["top_k"]
        names = {name: f"training-free, {m} candidates" for name, m in zip(SIZES, (k, k + 2, 2 * k), strict=True)}
        names["previous_token"] = "previous token's experts"
        return {label: [entry["hit_rate"][name] for entry in layers] for name, label in names.items()}
    if found["kind"] == "run":
        curves = {
            "predictor": [entry["predictor"]["recall@k"] for entry in layers],
            "predictor, 2k candidates": [entry["predictor"].get("recall@2k") for entry in layers],
            "training-free": [entry["training_free"]["recall@k"] for entry in layers],
        }
        alone = [entry.get("without_memory", {}).get("recall@k") for entry in layers]
    else:
        curves = {
            "predictor": [entry["hit_rate"].get("predictor") for entry in layers],
            "training-free": [entry["hit_rate"].get("training_free") for entry in layers],
        }
        alone = [entry["hit_rate"].get("without_memory") for entry in layers]
    if any(rate is not None for rate in alone):
        curves["predictor without its memory"] = alone
    return curves
