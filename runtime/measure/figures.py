"""The tables and the chart of `bench` and `plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from ...predictors.tables import figure_table
from ..room import gib
from .verdict import Verdict


def name_of(row: dict[str, Any]) -> str:
    """The name of a row's policy and gating, like `speculative/true`."""
    return row["policy"] if row["gating"] is None else f"{row['policy']}/{row['gating']}"


def print_bench(console: Console, result: dict[str, Any]) -> None:
    """Prints what `bench` measured, and what it could not measure and why."""
    table = figure_table(
        "policy / gating",
        "first",
        "token",
        "from-to",
        "limit",
        "reach",
        "hits",
        "cached",
        "MB",
        "stall",
        justify="right",
    )
    for row in result["results"]:
        time = row["time_per_output_token_ms"]
        table.add_row(
            name_of(row),
            f"{row['time_to_first_token_ms']:.0f}",
            f"{time['median']:.1f}",
            f"{time['min']:.0f}-{time['max']:.0f}",
            _cell(row["limit_ms_per_token"], ".1f"),
            _cell(row["overlap_efficiency"], ".2f"),
            _cell(row["hit_rate"], ".2f"),
            _cell(row["cache_hit_rate"], ".2f"),
            "" if row["bytes_per_token"] is None else f"{row['bytes_per_token'] / 1e6:.0f}",
            _cell(row["stall_ms_per_token"], ".1f"),
        )
    console.print("ms to the first token and for each after it; reach is limit / time", style="italic", highlight=False)
    console.print(table)
    for name, reason in result["skipped"].items():
        console.print(f"not measured: {name}, because {reason}", highlight=False)
    console.print(
        f"routing: {_words(result['routing'])}\npeak memory: {_peaks(result['results'])}\n"
        f"{result['settings']['slots']} slots of {result['expert_bytes']:,} bytes; link {result['link_bytes_per_second'] / 1e9:.2f} GB/s",
        highlight=False,
    )


def print_plan(console: Console, result: dict[str, Any]) -> None:
    """Prints what `plan` expects."""
    table = figure_table(
        "policy / gating",
        "token",
        "gain",
        "limit",
        "compute",
        "copy",
        "copies",
        "stall",
        "MB",
        "bound",
        justify="right",
    )
    for row in result["results"]:
        table.add_row(
            name_of(row),
            f"{row['time_per_output_token_ms']:.1f}",
            f"{row['gain_over_on_demand']:+.1%}",
            f"{row['limit_ms_per_token']:.1f}",
            f"{row['compute_ms_per_token']:.1f}",
            f"{row['copy_ms_per_token']:.1f}",
            f"{row['copies_share']:.0%}",
            f"{row['stall_ms_per_token']:.1f}",
            f"{row['bytes_per_token'] / 1e6:,.0f}",
            row["bound"],
        )
    console.print("expected ms for each token; gain is over on_demand", style="italic", highlight=False)
    console.print(table)
    fitting = ", ".join(
        f"{name} {'impossible' if found is None else format(found['slots'], ',')}"
        for name, found in result["formats"].items()
    )
    console.print(f"experts that fit, by format: {fitting}", highlight=False)
    console.print(
        f"{result['slots']:,} of {result['experts']:,} experts of {result['expert_bytes']:,} bytes fit the device beside "
        f"{result['resident_bytes'] / 2**30:.1f} GiB of other weights\nrouting: {_words(result['routing'])}",
        highlight=False,
    )


def print_verdict(console: Console, result: dict[str, Any]) -> None:
    """Prints what `plan` advises, and for which machine."""
    machine, verdict = result["machine"], Verdict(**result["verdict"])
    kind = "GPU" if machine["is_cuda"] else "CPU"
    console.print(
        f"{kind} with {gib(machine['device_memory'])} at {machine['memory_bandwidth'] / 1e9:,.0f} GB/s, link "
        f"{machine['link'] / 1e9:.1f} GB/s\n",
        highlight=False,
    )
    for sentence in verdict.words(machine["is_cuda"]):
        console.print(sentence, highlight=False)
    console.print(f"\n  {verdict.command}", highlight=False, soft_wrap=True, markup=False)


def draw_bench(result: dict[str, Any], file: Path) -> None:
    """Draws a bar for each way: its time per token with its spread, and its limit."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["results"]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.45 * len(rows)), layout="constrained")
    times = [row["time_per_output_token_ms"] for row in rows]
    middle = [time["median"] for time in times]
    spread = [[t["median"] - t["min"] for t in times], [t["max"] - t["median"] for t in times]]
    axes.barh(range(len(rows)), middle, xerr=spread, color="#4878a8", ecolor="#303030", capsize=3)
    limits = [(row["limit_ms_per_token"], at) for at, row in enumerate(rows) if row["limit_ms_per_token"] is not None]
    if limits:
        xs, ys = zip(*limits, strict=True)
        axes.scatter(xs, ys, marker="|", s=260, color="#c04030", zorder=3, label="limit")
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    axes.set_yticks(range(len(rows)), [name_of(row) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("ms per output token (bar: median of rounds; whiskers: least and most)")
    axes.set_title(f"{result['model']}, {result['settings']['slots']} slots", fontsize=10)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _peaks(rows: list[dict[str, Any]]) -> str:
    """The highest memory peaks of all rows, on the host and on the device."""
    told = []
    for where in ("host", "device"):
        known = [row[f"peak_{where}_bytes"] for row in rows if row[f"peak_{where}_bytes"] is not None]
        told += [f"{where} {max(known) / 1e9:.2f} GB"] if known else []
    return ", ".join(told) or "not known here"


def _words(source: dict[str, Any]) -> str:
    told = {key: value for key, value in source.items() if not isinstance(value, dict)}
    return ", ".join(str(value) if key == "routing" else f"{key} {value}" for key, value in told.items())
