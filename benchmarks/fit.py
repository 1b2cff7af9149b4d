"""Rows per second of `fit` against one training a layer in turn, and against the arithmetic that is in it.

    python -m benchmarks.fit TRACE

Whole trainings of an epoch are timed first, as `fit` is called: of all layers, and of one layer after the other. Then three
ways to take the same steps, in turn, round after round:

    fit           all layers at once, as `fit` trains them: reading the trace, frozen parts, loss and optimiser included
    by layer      a Lightning run for each layer after the other; a row counts when all layers have seen it
    arithmetic    nothing but the matrix products of a step, of the same sizes, batched over layers, in fp32: forward through
                  predictor and router, backward to their inputs where a gradient needs it, and the weights' gradients

Each Lightning run is then timed from its fifth step on. A ratio is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from predict_train.data_collection.memory import keep_freed_memory
from predict_train.data_collection.trace import Trace
from predict_train.predictors.provenance import command, hardware, versions
from predict_train.train.data import TraceData
from predict_train.train.fit import fit
from predict_train.train.module import PredictorTraining
from predict_train.train.settings import FitConfig
from predict_train.train.targets import Target, choose_targets
from predict_train.train.trainer import lightning_trainer, quiet
from rich.console import Console

RESULTS = Path(__file__).parent / "results"
WARM_UP = 5
TARGETS = {"by layer": 3.0, "arithmetic": 0.5}


class Clock(lightning.Callback):
    """The time of the steps after the first few."""

    def __init__(self) -> None:
        self.begun = self.seconds = 0.0

    def on_train_batch_start(self, _: Any, __: Any, ___: Any, number: int) -> None:
        if number == WARM_UP:
            self.begun = time.perf_counter()

    def on_train_end(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.begun


def train(config: FitConfig, trace: Trace, targets: list[Target], steps: int) -> float:
    """Seconds of `steps` steps of these targets."""
    sources = {target.layer: target.source for target in targets}
    data = TraceData(trace, sources, config.batch_size, config.validation, config.seed, config.workers, config.memory)
    module = PredictorTraining(
        trace, targets, config.loss or "kl", config.learning_rate, config.weight_decay, config.memory
    )
    clock = Clock()
    with quiet():
        trainer = lightning_trainer(
            config,
            torch.device(config.device),
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            limit_train_batches=WARM_UP + steps,
            limit_val_batches=0,
        )
        trainer.fit(module, data)
    return clock.seconds


def whole(config: FitConfig, layers: list[int]) -> float:
    """Seconds of one epoch of `fit`, from its call to its return."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        fit(config.model_copy(update={"out": Path(folder) / "run", "layers": layers, "epochs": 1}), Console(quiet=True))
        return time.perf_counter() - begun


def arithmetic(config: FitConfig, trace: Trace, targets: list[Target], steps: int) -> float:
    """Seconds of the matrix products of as many steps."""
    model = trace.manifest.model
    layers, rows, width = len(targets), config.batch_size, max(target.width for target in targets)
    a, h, e = (torch.randn(layers, rows, n) for n in (model.hidden_size, width, model.num_experts))
    w1 = torch.randn(layers, width, model.hidden_size)
    v = torch.randn(layers, width, model.num_experts)
    router = torch.randn(layers, model.num_experts, model.hidden_size)

    def step() -> None:
        # Forward: both inputs into the hidden units, out of them, and the router.
        torch.bmm(a, w1.mT)
        torch.bmm(e, v.mT)
        torch.bmm(h, w1)
        torch.bmm(a, router.mT)
        # Backward: through the router, through the second matrix, and the gradients of all three.
        torch.bmm(e, router)
        torch.bmm(a, w1.mT)
        torch.bmm(a.mT, h)
        torch.bmm(h.mT, a)
        torch.bmm(h.mT, e)

    for _ in range(WARM_UP):
        step()
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--steps", type=int, default=60, help="of a round")
    parser.add_argument("--whole-rounds", type=int, default=3, help="of whole trainings")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="auto", help="of fit, and of the trainings by layer")
    parser.add_argument("--batch-size", type=int, default=FitConfig.model_fields["batch_size"].default)
    parser.add_argument("--json", type=Path, default=RESULTS / "fit.json")
    arguments = parser.parse_args()
    keep_freed_memory()  # as fit does
    trace = Trace.open(arguments.trace)
    config = FitConfig(
        trace=arguments.trace,
        out=Path("unused"),
        device="cpu",
        precision=arguments.precision,
        batch_size=arguments.batch_size,
    )
    targets = choose_targets(trace, config)
    layers = [target.layer for target in targets]
    trainings: dict[str, list[float]] = {"fit": [], "by layer": []}
    for number in range(arguments.whole_rounds):
        trainings["fit"].append(whole(config, layers))
        trainings["by layer"].append(sum(whole(config, [layer]) for layer in layers))
        print(f"training {number}: " + ", ".join(f"{way} {values[-1]:.1f} s" for way, values in trainings.items()))
    ways = {
        "fit": lambda: train(config, trace, targets, arguments.steps),
        "by layer": lambda: sum(train(config, trace, [target], arguments.steps) for target in targets),
        "arithmetic": lambda: arithmetic(config, trace, targets, arguments.steps),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(arguments.rounds):
        names = list(ways)
        start = number % len(names)
        for way in names[start:] + names[:start]:
            seconds[way].append(ways[way]())
            rate = arguments.steps * config.batch_size / seconds[way][-1]
            print(f"round {number} {way:>10}: {rate:10,.0f} rows/s", flush=True)
    rows = arguments.steps * config.batch_size
    ratios = {
        way: statistics.median(other / own for other, own in zip(seconds[way], seconds["fit"], strict=True))
        for way in TARGETS
    }
    whole_ratio = statistics.median(
        other / own for other, own in zip(trainings["by layer"], trainings["fit"], strict=True)
    )
    result = {
        "training_seconds": trainings,
        "training_over_by_layer": whole_ratio,
        "rows_of_the_trace": trace.rows,
        "rows_per_second": {way: rows / statistics.median(values) for way, values in seconds.items()},
        "fit_over": ratios,
        "targets": TARGETS,
        "layers": len(targets),
        "batch_size": config.batch_size,
        "width": config.width,
        "precision": arguments.precision,
        "seconds": seconds,
        "command": command(),
        "versions": versions(),
        "hardware": hardware(),
    }
    print(f"a whole training is {whole_ratio:.2f} times as fast as by layer (at least {TARGETS['by layer']} asked)")
    for way, ratio in ratios.items():
        print(f"a step of fit is {ratio:.2f} times as fast as {way} (at least {TARGETS[way]} asked)")
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
