"""The tables of `evaluate`."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from ...predictors.metrics import gap_closed
from ...predictors.tables import figure_table
from ..quantization import Shipped


def print_hit_rates(console: Console, result: dict[str, Any]) -> None:
    """Prints the hit rates by target layer from a result of `evaluate`."""
    sure = any(row["calibration_error"] is not None for row in result["layers"])
    title, headers = "hit rate by target layer", ("layer", "training-free", "predictor", "gap closed", "control")
    caption = "ECE: expected calibration error of the candidates' probabilities" if sure else None
    table = figure_table(*headers, *(["ECE"] if sure else []), title=title, caption=caption)
    for row in result["layers"]:
        before, after = row["training_free"], row["predictor"]
        closed = "" if after is None or before == 1 else f"{gap_closed(before, after):.0%}"
        cells = [
            str(row["layer"]),
            f"{before:.3f}",
            "" if after is None else f"{after:.3f}",
            closed,
            f"{row['control']:.4f}",
        ]
        error = row["calibration_error"]
        table.add_row(*cells, *(["" if error is None else f"{error:.4f}"] if sure else []))
    console.print(table)


def print_losses(console: Console, result: dict[str, Any], milliseconds: dict[str, float]) -> None:
    """Prints the cross-entropies, and beside them the milliseconds per token of the policies for which they are known."""
    title = f"cross-entropy over {result['tokens']:,} tokens, nats per token"
    timed = ["ms per token"] if milliseconds else []
    table = figure_table("policy / gating", "training-free", "with predictors", *timed, title=title)
    full = result["cross_entropy"]["full"]
    for name, value in result["cross_entropy"].items():
        free = result["training_free_cross_entropy"][name]
        cells = [f"{full:.4f}"] * 2 if name == "full" else [f"{round(x - full, 4) + 0.0:+.4f}" for x in (free, value)]
        if milliseconds:
            cells.append(f"{milliseconds[name]:.1f}" if name in milliseconds else "")
        table.add_row(name, *cells)
    console.print(table)


def print_quantization(console: Console, result: dict[str, Any]) -> None:
    """Prints what quantising loses, if the experts are quantised. What speculating loses beside is in `print_losses`."""
    before, full = result["unquantized_cross_entropy"], result["cross_entropy"]["full"]
    if before is not None:
        other = (
            "where transformers widens them" if result["quantized"] in list(Shipped) else "before they were quantised"
        )
        console.print(
            f"experts in {result['quantized']}: cross-entropy {full:.4f}, and {before:.4f} {other} "
            f"({full / before - 1:+.3%}); the table above compares with the quantised model",
            highlight=False,
        )
