"""The command line: one short function for each command; its flags are made from its configuration class.

Only these classes are imported at the top, because they need no torch. A command imports its job when it runs.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from .data_collection.settings import ModelsConfig
from .flags import command
from .predictors.errors import TerminatedError, UserError
from .predictors.files import written_whole
from .runtime.measure.settings import BenchConfig, PlanConfig
from .runtime.settings import ChatConfig, GenerateConfig, PackConfig, ServeConfig
from .settings import CollectingConfig, DemoConfig, EvaluateConfig
from .train.settings import ExportConfig, FitConfig, InspectConfig

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"predict-train {version('predict-train')}")
        raise typer.Exit


@app.callback()
def predict_train(
    version: Annotated[  # the callback does the work
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Trains the predictors of speculated experts, and runs mixture-of-experts models that don't fit the GPU with them."""


@command(app)
def collect(config: CollectingConfig) -> None:
    """Runs MODEL over text with hooks on it and writes the trace that fit trains on.

    Under torchrun or srun the processes share the work. What is stopped or killed goes on with --resume.
    """
    from .collecting import collect as job

    job(config)


@command(app)
def fit(config: FitConfig) -> None:
    """Trains the predictors of all target layers in TRACE at once."""
    from .train.fit import fit as job

    job(config)


@command(app)
def export(config: ExportConfig) -> None:
    """Writes the best epoch of RUN as a predictors folder, which the runtime loads."""
    from .train.export import export as job

    job(config)


@command(app)
def inspect(config: InspectConfig) -> None:
    """Tells what a trace, a run or a predictors folder holds: where it is from, hit rates and expert loads by layer."""
    from .train.inspection import inspect as job
    from .train.inspection import plot, report

    found = job(config.path, config.rows, config.keep, config.predictors)
    report(found, Console())
    _write(found, config.json_file)
    if config.plot is not None:
        plot(found, config.plot)


@command(app)
def models(config: ModelsConfig) -> None:
    """Tries every mixture-of-experts type of the installed transformers on a tiny random model of it."""
    import torch
    from tqdm import tqdm

    from .data_collection import catalog
    from .predictors.tables import figure_table

    torch.set_num_threads(1)  # the models are tiny
    types = catalog.moe_types()
    supports = [catalog.examine(name) for name in tqdm(types, desc="models", leave=False, disable=None)]
    if config.markdown:
        print(catalog.markdown(supports))
        return
    table = figure_table("model type", "offload", "record", "predict", "remarks, or the reason why not")
    for support in supports:
        table.add_row(support.model_type, *catalog.abilities(support), support.reason or ", ".join(support.remarks))
    console = Console()
    console.print(table)
    console.print(catalog.counted(supports))


@command(app)
def generate(config: GenerateConfig) -> None:
    """Streams text from MODEL with its experts in host memory or a packed file, and says what each token cost."""
    from .generating import generate as job

    _write(job(config), config.json_file)


@command(app)
def chat(config: ChatConfig) -> None:
    """Chats with MODEL in the terminal, with its experts in host memory or a packed file."""
    from .generating import chat as job

    job(config)


@command(app)
def serve(config: ServeConfig) -> None:
    """Serves MODEL by OpenAI's interface, with its experts in host memory or a packed file, until it is stopped."""
    from .serving import serve as job

    job(config)


@command(app)
def evaluate(config: EvaluateConfig) -> None:
    """Measures hit rates by layer, and MODEL's cross-entropy under every policy, on held-out text."""
    from .data_collection.refusals import Refusals
    from .predictors.loading import load_tokenizer
    from .predictors.provenance import command, versions
    from .running import batches_of, load_to_evaluate, quantization_asked, unquantized_cross_entropy
    from .runtime.measure.evaluate import evaluate as job
    from .runtime.measure.report import print_hit_rates, print_losses, print_quantization

    tokenizer, refusals = load_tokenizer(config.model), Refusals()
    batches = batches_of(tokenizer, config, refusals.add)
    quantize = quantization_asked(config)
    before = None if quantize is None else unquantized_cross_entropy(config, batches)
    result = job(load_to_evaluate(config), batches, config.predictors, config, progress=True)
    result |= {"quantized": quantize, "unquantized_cross_entropy": before}
    result |= {"model": config.model, "predictors": config.predictors, "versions": versions(), "command": command()}
    print_hit_rates(Console(), result)
    print_losses(Console(), result, {})
    print_quantization(Console(), result)
    refusals.report(Console())
    _write(result, config.json_file)


@command(app)
def demo(config: DemoConfig) -> None:
    """The whole loop on the embedded model: collect, fit, export, evaluate, and generate under every policy."""
    from .demo import demo as job

    job(config)


@command(app)
def bench(config: BenchConfig) -> None:
    """Measures every way to run MODEL with its experts offloaded, in turn, and how close each is to its limit."""
    from .measuring import bench as job
    from .runtime.measure.figures import draw_bench, print_bench

    console = Console()
    result = job(config, console)
    print_bench(console, result)
    _write(result, config.json_file)
    if config.plot is not None:
        draw_bench(result, config.plot)


@command(app)
def plan(config: PlanConfig) -> None:
    """Tells whether MODEL fits a machine, by default this one, how to run it, and what a token takes, without running it."""
    from .planning import plan as job
    from .runtime.measure.figures import print_plan, print_verdict

    result = job(config)
    print_plan(Console(), result)
    print_verdict(Console(), result)
    _write(result, config.json_file)


@command(app)
def pack(config: PackConfig) -> None:
    """Packs MODEL's experts into one file, from which the runtime reads them as they are needed."""
    import torch

    from .predictors.loading import read_model_config, resolve_dtype
    from .runtime.pack import given, load_and_pack

    dtype = resolve_dtype(config.dtype, torch.device("cuda"))  # on CUDA, auto leaves it to the checkpoint
    source = read_model_config(config.random_weights) if config.random_weights is not None else config.model
    assert source is not None, "the class requires one of both"
    _, file = load_and_pack(source, config.out, dtype, config.seed, config.quantize, **given(config.gguf))
    print(f"{file}: {file.stat().st_size:,} bytes")


def _write(figures: dict[str, Any], file: Path | None) -> None:
    if file is None:
        return
    is_new = file.is_file() or not file.exists()  # a pipe or /dev/stdout must stay what it is
    try:
        with written_whole(file.resolve()) if is_new else nullcontext(file) as place:
            place.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} can't be written ({error.strerror}); name another file with --json") from error


def main() -> None:
    """Runs the command line; a `UserError` ends it with one sentence and an exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_MININTERVAL", "0.5")
    os.environ["MPLBACKEND"] = "agg"  # a notebook sets its own, which may not be installed here
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may know ASCII only
    try:
        app()
    except UserError as error:
        print(f"predict-train: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _terminate(*_: object) -> NoReturn:
    raise TerminatedError
