"""Both forms of a predictor side by side: one corrects the state that a target's router reads, one guesses that router's choice.

    predict-train collect checkpoints/tiny-moe --tokens 300000 --out trace
    predict-train collect checkpoints/tiny-moe --split held_out --tokens 60000 --out held-out
    python -m benchmarks.forms trace held-out runs

Each variant is a run of `fit` below the folder `runs`, and what is there already is not trained again. All have as many parameters in each layer as a correcting predictor of width 320 without a memory, the
same trace, split and seeds. Hit rates are those on the held-out trace. Prints and writes them by layer, the mean over seeds, and the
most that two seeds of one variant are apart in a layer.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from predict_train.data_collection.statistics import hit_rates
from predict_train.data_collection.trace import Trace
from predict_train.predictors.direct import KINDS
from predict_train.predictors.forms import Form, PredictorForm
from predict_train.predictors.provenance import hardware, versions
from predict_train.predictors.tables import figure_table
from predict_train.train.export import predictors_in
from predict_train.train.fit import RESULT, fit
from predict_train.train.settings import FitConfig
from rich.console import Console

RESULTS = Path(__file__).parent / "results" / "forms.json"
WIDTH = 320
ROWS = 4096


class Variant(NamedTuple):
    form: Form
    loss: Literal["kl", "choice"]
    epochs: int

    def width(self, hidden: int, experts: int) -> int:
        """That at which it has the parameters of a correcting predictor of width `WIDTH`."""
        most = KINDS[Form.CORRECTING].count(hidden, experts, WIDTH)
        fixed, one = (KINDS[self.form].count(hidden, experts, width) for width in (0, 1))
        return round((most - fixed) / (one - fixed))


VARIANTS = [
    Variant(Form.CORRECTING, "kl", 3),
    Variant(Form.DIRECT, "kl", 3),
    Variant(Form.DIRECT, "choice", 3),
]


def train(trace: Trace, variant: Variant, width: int, seed: int, out: Path) -> dict[int, PredictorForm]:
    """The predictors of the best epoch of a run in the folder `out`, which is finished if it is there."""
    if not (out / RESULT).exists():
        learning = {"epochs": variant.epochs, "seed": seed, "reuse": False, "memory": 0, "device": "cpu"}
        config = FitConfig(
            trace=trace.path,
            out=out,
            width=width,
            form=variant.form.value,
            loss=variant.loss,
            resume=out.exists(),
            **learning,
        )
        fit(config, Console(quiet=True))
    result = json.loads((out / RESULT).read_text())
    return predictors_in(out / result["checkpoint"], dict.fromkeys(trace.sources, width), 0, trace, variant.form)


def rates_of(held_out: Trace, mlps: dict[int, PredictorForm]) -> list[float]:
    """By layer, over the whole trace; those of training-free speculation where there are no `mlps`."""
    names = held_out.columns_for(held_out.sources)
    batches = (
        held_out.read(shard, rows, names)
        for shard, entry in enumerate(held_out.manifest.shards)
        for rows in torch.arange(entry.rows).split(ROWS)
    )
    [found] = hit_rates(batches, held_out.sources, held_out.stacked(), [held_out.manifest.model.top_k], mlps)
    return list(found.values())


def measure(trace: Trace, held_out: Trace, variant: Variant, seeds: int, runs: Path) -> dict[str, Any]:
    """What a variant reached, over all seeds."""
    hidden, experts = trace.manifest.model.hidden_size, trace.manifest.model.num_experts
    width = variant.width(hidden, experts)
    outs = [runs / "-".join(map(str, (*variant, seed))) for seed in range(seeds)]
    found = [rates_of(held_out, train(trace, variant, width, seed, out)) for seed, out in enumerate(outs)]
    by_layer = list(zip(*found, strict=True))
    return {
        **variant._asdict(),
        "width": width,
        "parameters": KINDS[variant.form].count(hidden, experts, width),
        "hit_rates": [statistics.fmean(rates) for rates in by_layer],
        "mean": statistics.fmean(map(statistics.fmean, found)),
        "seeds_apart": max(max(rates) - min(rates) for rates in by_layer) if seeds > 1 else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--variants", help="numbers of the variants, like 0,2; by default all")
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    trace, held_out = Trace.open(given.trace), Trace.open(given.held_out)
    if trace.sources != held_out.sources:
        parser.error("the two traces have different layers; collect them of the same model, with the same --layers")
    chosen = [VARIANTS[int(number)] for number in given.variants.split(",")] if given.variants else VARIANTS
    free = rates_of(held_out, {})
    table = figure_table("form", "loss", "epochs", "width", "mean", *map(str, trace.sources), "seeds apart")
    table.add_row("training-free", "", "", "", *(f"{rate:.3f}" for rate in (statistics.fmean(free), *free)))
    results = []
    for variant in chosen:
        row = measure(trace, held_out, variant, given.seeds, given.runs)
        results.append(row)
        print(json.dumps(row), flush=True)
        about = [*map(str, variant), str(row["width"]), f"{row['mean']:.4f}"]
        table.add_row(*about, *(f"{rate:.3f}" for rate in row["hit_rates"]), str(row["seeds_apart"]))
    Console(width=200).print(table)
    facts = {
        "model": trace.manifest.model.name,
        "tokens": trace.rows,
        "held_out": held_out.rows,
        "seeds": given.seeds,
        "layers": list(trace.sources),
        "training_free": free,
        "results": results,
        "command": "python -m benchmarks.forms trace held-out runs",
        "versions": versions(),
        "hardware": hardware(),
    }
    given.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
