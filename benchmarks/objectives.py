"""What a predictor should minimise, what it should correct, and how far ahead: `fit` run once for each combination.

    predict-train collect checkpoints/tiny-moe --inputs --tokens 1000000 --out trace
    python -m benchmarks.objectives trace

Every row is a run of `fit` with its defaults but for what the row names, on the same trace, split and seed. Prints and writes,
over all target layers on validation sequences: training-free and predicted hit rate, recall with 2k candidates, the gap closed,
parameters and seconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from predict_train.data_collection.trace import Trace
from predict_train.predictors.metrics import gap_closed
from predict_train.predictors.mlp import ResidualMLP
from predict_train.predictors.provenance import command, hardware, versions
from predict_train.predictors.tables import figure_table
from predict_train.train.fit import fit
from predict_train.train.losses import LOSSES
from predict_train.train.settings import FitConfig
from rich.console import Console

RESULTS = Path(__file__).parent / "results"
FROM: list[dict[str, Any]] = [{}, {"horizon": 2}, {"source": "layer_input"}]
VARIANTS: list[dict[str, Any]] = [{"loss": loss} | source for source in FROM for loss in LOSSES]
VARIANTS += [{"width": width} for width in (80, 160, 640)]


def measure(trace: Path, epochs: int, variant: dict[str, Any], out: Path) -> dict[str, Any]:
    """One run of `fit`, and what it reached."""
    config = FitConfig(trace=trace, out=out, epochs=epochs, **variant)
    begun = time.perf_counter()
    fit(config, Console(quiet=True))
    seconds = time.perf_counter() - begun
    result = json.loads((out / "result.json").read_text())
    model, layers = Trace.open(trace).manifest.model, result["layers"]
    free, reached = result["mean"]["training_free"], result["mean"]["predictor"]
    return {
        "loss": config.loss or "kl",
        "source": config.source,
        "horizon": config.horizon,
        "width": config.width,
        "training_free": free,
        "hit_rate": reached,
        "weakest": min(entry["predictor"]["recall@k"] for entry in layers),
        "recall_at_2k": sum(entry["predictor"]["recall@2k"] for entry in layers) / len(layers),
        "gap_closed": gap_closed(free, reached),
        "parameters": sum(
            ResidualMLP.count(model.hidden_size, model.num_experts, entry["width"], config.memory) for entry in layers
        ),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="made with --inputs")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS / "objectives.json")
    arguments = parser.parse_args()
    rows = []
    columns = ("loss", "source", "horizon", "width", "training-free", "hit rate", "weakest", "at 2k", "closed", "s")
    table = figure_table(*columns, title="all target layers, validation sequences")
    with tempfile.TemporaryDirectory() as folder:
        for number, variant in enumerate(VARIANTS):
            row = measure(arguments.trace, arguments.epochs, variant, Path(folder) / str(number))
            rows.append(row)
            print(json.dumps(row), flush=True)
            rates = [f"{row[name]:.4f}" for name in ("training_free", "hit_rate", "weakest", "recall_at_2k")]
            kind = [str(row[name]) for name in ("loss", "source", "horizon", "width")]
            table.add_row(*kind, *rates, f"{row['gap_closed']:.1%}", f"{row['seconds']:.0f}")
    Console().print(table)
    facts = {"tokens": Trace.open(arguments.trace).rows, "epochs": arguments.epochs, "results": rows}
    facts |= {"command": command(), "versions": versions(), "hardware": hardware()}
    arguments.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
