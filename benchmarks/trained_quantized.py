"""Predictors trained on the embedded model, and on the same model in four bits, each used by both.

python -m benchmarks.trained_quantized SCRATCH

collects a trace of either model, fits predictors on both, and evaluates four combinations on held-out text. What is in the folder
SCRATCH already is not made again, so that it may be stopped. Prints hit rates by layer, and writes them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from predict_train.predictors.checkpoint import load_predictors
from predict_train.predictors.loading import load_tokenizer
from predict_train.predictors.provenance import command, hardware, versions
from predict_train.predictors.tables import figure_table
from predict_train.runtime.measure.evaluate import evaluate
from predict_train.train.export import export
from predict_train.train.fit import fit
from predict_train.train.settings import ExportConfig, FitConfig
from rich.console import Console

from predict_train.collecting import collect
from predict_train.running import batches_of, load_to_evaluate
from predict_train.settings import CollectingConfig, EvaluateConfig

ROOT = Path(__file__).resolve().parents[1]
MODEL = str(ROOT / "checkpoints" / "tiny-moe")
RESULTS = Path(__file__).parent / "results" / "trained-quantized.json"
FORMS: dict[str, str | None] = {"unquantised": None, "int4": "int4"}


def train(scratch: Path, form: str, tokens: int, epochs: int, console: Console) -> Path:
    """Predictors that were trained on what a model in `form` records; their folder."""
    trace, run, out = (scratch / f"{form}-{part}" for part in ("trace", "run", "predictors"))
    if not out.exists():
        collect(
            CollectingConfig(model=MODEL, out=trace, tokens=tokens, quantize=FORMS[form], resume=True, device="cpu"),
            console,
        )
        fit(FitConfig(trace=trace, out=run, epochs=epochs, resume=run.exists()), console)
        export(ExportConfig(run=run, out=out), console)
    return out


def rates(folder: Path, form: str, tokens: int) -> dict[str, Any]:
    """Hit rates by layer, and losses, of a model in `form` with the predictors in `folder`, on held-out text."""
    config = EvaluateConfig(model=MODEL, tokens=tokens, quantize=FORMS[form], device="cpu")
    model, tokenizer = load_to_evaluate(config), load_tokenizer(MODEL)
    found = evaluate(
        model, batches_of(tokenizer, config, lambda *_: None), load_predictors(folder, model), progress=True
    )
    layers = [layer["predictor"] for layer in found["layers"]]
    return {"hit_rates": layers, "mean": statistics.fmean(layers), "cross_entropy": found["cross_entropy"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--tokens", type=int, default=200_000, help="tokens of each trace")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--held-out", type=int, default=20_000, help="tokens of each evaluation")
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    console, found = Console(), {}
    given.scratch.mkdir(parents=True, exist_ok=True)
    for trained in FORMS:
        folder = train(given.scratch, trained, given.tokens, given.epochs, console)
        for used in FORMS:
            file = given.scratch / f"{trained}-{used}.json"
            if not file.exists():
                file.write_text(json.dumps(rates(folder, used, given.held_out)))
            found[f"{trained}, used {used}"] = json.loads(file.read_text())
    table = figure_table("layer", *found, title="hit rate by what predictors are trained on and used with")
    for layer, row in enumerate(zip(*(figures["hit_rates"] for figures in found.values()), strict=True)):
        table.add_row(str(layer), *(f"{rate:.3f}" for rate in row))
    table.add_row("mean", *(f"{figures['mean']:.4f}" for figures in found.values()))
    console.print(table)
    settings = {
        "tokens": given.tokens,
        "epochs": given.epochs,
        "held_out": given.held_out,
        "model": "checkpoints/tiny-moe",
    }
    result = {
        "results": found,
        "settings": settings,
        "hardware": hardware(),
        "versions": versions(),
        "command": command().replace(str(given.scratch), "SCRATCH"),
    }
    given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
