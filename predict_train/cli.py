"""The command line: thin, and each command imports its rooms only when it runs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __path__
from . import commands as runtime_commands
from .predictors.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .predictors.checkpoint import Predictors

# Beside the rooms, wherever they lie.
EMBEDDED_MODEL = next(path for place in __path__ if (path := Path(place) / "checkpoints" / "tiny-moe").exists())

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Trains the predictors of speculated experts, and runs mixture-of-experts models that don't fit the GPU with them.",
)

Model = Annotated[str, typer.Argument(help="Folder or Hub name of a mixture-of-experts model.")]
Config = Annotated[Path | None, typer.Option(help="YAML file of settings; flags beat it, and it beats the defaults.")]
Device = Annotated[str | None, typer.Option(help="auto (CUDA where there is one), cpu or cuda.")]
Dtype = Annotated[
    str | None, typer.Option(help="auto (the checkpoint's on CUDA, float32 on a CPU), float32, bfloat16 or float16.")
]
PredictorsOption = Annotated[
    str | None,
    typer.Option("--predictors", help="Folder or Hub name of predictors; without them speculation is training-free."),
]


@app.command()
def collect(
    model: Annotated[str | None, typer.Argument(help="Folder or Hub name of a mixture-of-experts model.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The trace's folder; it must be new, unless the collection is resumed.")
    ] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Go on with the unfinished trace in --out, if there is one.")
    ] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="embedded, a text file, a folder, a glob, a .jsonl, .json or .parquet file, a folder of save_to_disk, or "
            "a Hub dataset as name:config:split. Give it again to mix several, each as path@weight [default: embedded]."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of the embedded corpus: train or held_out.")] = None,
    text_column: Annotated[
        str | None,
        typer.Option(help="The column with the text or the chat [default: text, or else messages or conversations]."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="How many tokens to run [default: 400000].")] = None,
    sample: Annotated[
        float | None, typer.Option(help="Probability with which a token that was run is recorded [default: 1].")
    ] = None,
    max_bytes: Annotated[str | None, typer.Option(help="The most bytes of the trace, like 20GB.")] = None,
    phase: Annotated[
        str | None,
        typer.Option(help="prefill records text; decode what the model generates, prompted by it [default: prefill]."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Of decode: tokens generated from each prompt [default: 128].")
    ] = None,
    pack: Annotated[bool | None, typer.Option("--pack", help="Let documents follow one another in a sequence.")] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Target layers: all, auto (those below the threshold), or a list like 0,1,5 [default: all]."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Training-free hit rate below which auto takes a layer [default: 0.9].")
    ] = None,
    inputs: Annotated[
        bool | None, typer.Option("--inputs", help="Record each target's own input too, for fit --source layer_input.")
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(help="The most tokens of a sequence [default: 256].")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Full sequences of a forward pass; more of shorter ones [default: 16].")
    ] = None,
    shard_bytes: Annotated[
        str | None, typer.Option(help="Bytes of a shard: what an interruption costs [default: 256MiB].")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of whatever is drawn [default: 0].")] = None,
    device: Device = None,
    device_map: Annotated[
        str | None, typer.Option(help="auto spreads a model that is larger than one GPU over all of them.")
    ] = None,
    dtype: Dtype = None,
    config: Config = None,
) -> None:
    """Runs MODEL over text with hooks on it and writes the trace that fit trains on.

    Under torchrun or srun the processes share the work. What is stopped or killed goes on with --resume.
    """
    from .data_collection.collect import CollectConfig
    from .data_collection.collect import collect as job
    from .predictors.settings import load_config

    flags = {name: value for name, value in locals().items() if name in CollectConfig.model_fields}
    job(load_config(CollectConfig, config, flags | {"layers": _layers(layers), "corpus": corpus or None}))


def _layers(layers: str | None) -> str | list[int] | None:
    if layers is None or layers in ("all", "auto"):
        return layers
    try:
        return [int(part) for part in layers.split(",")]
    except ValueError as error:
        raise UserError(f"--layers can't be {layers}; give all, auto, or layer numbers like 0,1,5") from error


@app.command()
def fit(
    trace: Annotated[Path | None, typer.Argument(help="The folder that collect wrote.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; new, unless the run is resumed.")] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Go on with the run in --out from its last whole epoch.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers to train: all, auto (those below the threshold), or a list like 0,1,5 [default: all]."
        ),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Training-free hit rate below which auto takes a layer [default: 0.9].")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="What is corrected: quasi_hidden, or the later layer_input [default: quasi_hidden]."),
    ] = None,
    horizon: Annotated[int | None, typer.Option(help="MoE layers from source to target, 1 or 2 [default: 1].")] = None,
    width: Annotated[int | None, typer.Option(help="Hidden width of each predictor [default: 320].")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Instead of a width, what all predictors may take in bfloat16: like 2MB, or like 1% of the model's weights "
            "without its routed experts. Layers that are hard to guess get more of it."
        ),
    ] = None,
    loss: Annotated[str | None, typer.Option(help="kl, bce or ranking [default: kl].")] = None,
    epochs: Annotated[int | None, typer.Option(help="How often each row is seen at the most [default: 5].")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Epochs without a better hit rate that end training early [default: 3].")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a step [default: 512].")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest of a one-cycle schedule.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    validation: Annotated[
        float | None, typer.Option(help="Share of the sequences kept for validation [default: 0.1].")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the split, the order and the initial weights [default: 0].")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="32-true, bf16-mixed, or auto: the latter where the device has it [default: auto]."),
    ] = None,
    devices: Annotated[int | None, typer.Option(help="Processes that train together on a node [default: 1].")] = None,
    num_nodes: Annotated[int | None, typer.Option(help="Nodes that train together [default: 1].")] = None,
    strategy: Annotated[str | None, typer.Option(help="Lightning's name of how they do [default: auto].")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that read the trace [default: 0, this one].")] = None,
    device: Device = None,
    config: Config = None,
) -> None:
    """Trains the predictors of all target layers in TRACE at once."""
    from .predictors.settings import load_config
    from .train.fit import FitConfig
    from .train.fit import fit as job

    flags = {name: value for name, value in locals().items() if name in FitConfig.model_fields}
    job(load_config(FitConfig, config, flags | {"layers": _layers(layers)}))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The folder that fit wrote.")],
    out: Annotated[Path, typer.Option(help="The predictors' folder; it must be new.")],
    dtype: Annotated[str, typer.Option(help="Of the predictors' weights: float32 or bfloat16.")] = "float32",
    trace: Annotated[Path | None, typer.Option(help="Where the trace is, if it was moved.")] = None,
) -> None:
    """Writes the best epoch of RUN as a predictors folder, which the runtime loads."""
    from .train.export import export as job

    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype can't be {dtype}; give float32 or bfloat16")
    job(run, out, dtype, trace)  # type: ignore[arg-type]


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="The folder that collect, fit or export wrote.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read a trace whole and compare every checksum.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draws hit rate by layer, and of a trace the expert loads, to this .png.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Writes all figures to this file.")] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Of a trace, how many to measure hit rates on [default: 32768].")
    ] = None,
) -> None:
    """Tells what a trace, a run or a predictors folder holds: where it is from, hit rates and expert loads by layer."""
    from rich.console import Console

    from .train.inspection import inspect as job
    from .train.inspection import plot as draw
    from .train.inspection import report

    for file in (plot, json_file):
        if file is not None and not file.absolute().parent.is_dir():
            raise UserError(f"there is no folder {file.parent} to write {file.name} to; make it first")
    if plot is not None and plot.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot can't be {plot}; give a file that ends in .png, .pdf or .svg")
    found = job(path, verify, rows)
    report(found, Console())
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n")
    if plot is not None:
        draw(found, plot)


@app.command()
def models(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables of the README instead.")] = False,
) -> None:
    """Tries every mixture-of-experts type of the installed transformers on a tiny random model of it."""
    import torch
    import transformers
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

    from .data_collection import catalog

    torch.set_num_threads(1)  # the models are tiny
    types = catalog.moe_types()
    supports = [catalog.examine(name) for name in tqdm(types, desc="models", leave=False, disable=None)]
    if markdown:
        print(catalog.markdown(supports))
        return
    table = Table("model type", "supported", "remarks, or the reason why not")
    for support in supports:
        yes = support.reason is None
        table.add_row(support.model_type, "yes" if yes else "no", ", ".join(support.remarks) if yes else support.reason)
    console = Console()
    console.print(table)
    count = sum(support.reason is None for support in supports)
    console.print(f"{count} of {len(supports)} types of transformers {transformers.__version__} are supported")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    predictors: PredictorsOption = None,
    policy: Annotated[
        str, typer.Option(help="on_demand, prefetch, speculative, or auto: the faster of the first two.")
    ] = "speculative",
    gating: Annotated[str, typer.Option(help="Under speculative: speculated, true or resident.")] = "true",
    slots: Annotated[
        int | None, typer.Option(help="Experts on the device at a time [default: a quarter of them].")
    ] = None,
    candidates: runtime_commands.Candidates = None,
    horizon: runtime_commands.Horizon = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Streams text from MODEL with its experts in host memory, and says what each token cost."""
    from .runtime import offload_experts
    from .runtime.generate import generate as job

    if not prompt:
        raise UserError("the prompt is empty; give --prompt some text to go on from")
    # The model waits in host memory: only what computes moves to the device.
    loaded, tokenizer, where = _load(model, device, dtype, host=True)
    offload_experts(
        loaded,
        _load_predictors(predictors, loaded),
        policy=policy,
        gating=gating,
        device=where,
        slots=slots,
        candidates=runtime_commands.parse_candidates(candidates),
        horizon=horizon,
    )
    result = job(
        loaded,
        tokenizer,
        prompt,
        max_new_tokens,
        temperature,
        seed,
        on_text=lambda text: print(text, end="", flush=True),
    )
    hit_rate = result.counters.speculation_hit_rate
    figures = {
        "time to first token": f"{result.seconds_to_first_token * 1000:.1f} ms",
        "time per output token": _or_none(result.seconds_per_output_token, lambda x: f"{x * 1000:.1f} ms (median)"),
        "hit rate": _or_none(hit_rate, "{:.3f} of the router's experts were among the candidates".format),
        "bytes per token": _or_none(result.bytes_per_token, "{:,.0f}".format),
        "stalled per token": _or_none(result.stalled_seconds_per_token, lambda x: f"{x * 1000:.2f} ms"),
    }
    for name, value in figures.items():
        typer.echo(f"{name:>22}: {value}", err=True)


def _or_none(value: float | None, text: Any) -> str:
    return "none" if value is None else text(value)


@app.command()
def evaluate(
    model: Model,
    predictors: PredictorsOption = None,
    corpus: Annotated[str, typer.Option(help="Whatever collect takes as a corpus.")] = "embedded",
    split: Annotated[str, typer.Option(help="Of the embedded corpus: train or held_out.")] = "held_out",
    tokens: Annotated[int, typer.Option(min=2)] = 20_000,
    sequence_length: Annotated[int, typer.Option(min=2)] = 256,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    candidates: Annotated[
        str | None, typer.Option(help="Of gating resident: a number, or auto [default: top k + 2].")
    ] = None,
    horizon: runtime_commands.Horizon = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Writes all figures to this file.")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measures hit rates by layer, and MODEL's cross-entropy under every policy, on held-out text."""
    from rich.console import Console

    from .predictors.provenance import command, versions

    if split not in ("train", "held_out"):
        raise UserError(f"--split can't be {split}; give train or held_out")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise UserError(f"there is no folder {json_file.parent} to write {json_file.name} to; make it first")
    loaded, tokenizer, _ = _load(model, device, dtype)
    batches = _batches(tokenizer, corpus, split, tokens, sequence_length, batch_size)
    from .runtime.measure.evaluate import evaluate as job
    from .runtime.measure.report import print_hit_rates, print_losses

    wide = runtime_commands.parse_candidates(candidates)
    result = job(loaded, batches, _load_predictors(predictors, loaded), wide, progress=True, horizon=horizon)
    result |= {"model": model, "predictors": predictors, "versions": versions(), "command": command()}
    print_hit_rates(Console(), result)
    print_losses(Console(), result, {})
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")


def _batches(
    tokenizer: PreTrainedTokenizerBase, corpus: str, split: Any, tokens: int, sequence_length: int, batch_size: int
) -> list[torch.Tensor]:
    """Token ids `[sequences, length]`; a last short sequence stands alone, so nothing is padded."""
    import torch

    from .data_collection.corpus import read_documents, sequences

    rows = list(sequences(read_documents(corpus, split, tokenizer=tokenizer), tokenizer, sequence_length, tokens))
    whole = [row for row in rows if len(row) == sequence_length]
    batches = list(torch.stack(whole).split(batch_size)) if whole else []
    return batches + [row.unsqueeze(0) for row in rows[len(whole) :]]


def _load(
    model: str, device: str | None, dtype: str | None, host: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, torch.device]:
    """Model, tokenizer and the device to compute on; with `host` the model is loaded into host memory."""
    import torch

    from .predictors.loading import load_model, load_tokenizer, resolve_device, resolve_dtype

    where = resolve_device(device or "auto")
    kind = resolve_dtype(dtype or "auto", where)
    tokenizer = load_tokenizer(model)
    return load_model(model, torch.device("cpu") if host else where, kind), tokenizer, where


def _load_predictors(folder: str | None, model: PreTrainedModel) -> Predictors | None:
    from .predictors.checkpoint import load_predictors

    return None if folder is None else load_predictors(folder, model)


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for everything the demo writes; a demo that stands there is replaced.")
    ] = Path("checkpoints/demo"),
    tokens: Annotated[int, typer.Option(min=20_000, help="Tokens to collect.")] = 200_000,
) -> None:
    """The whole loop on the embedded model: collect, fit, export, evaluate, and generate under every policy."""
    from rich.console import Console

    from .data_collection.collect import CollectConfig
    from .data_collection.collect import collect as run_collect
    from .runtime.measure.evaluate import evaluate as run_evaluate
    from .runtime.measure.report import print_hit_rates, print_losses
    from .train.export import export as run_export
    from .train.fit import FitConfig
    from .train.fit import fit as run_fit

    console = Console()
    if out.exists() and not (out / "trace").exists() and any(out.iterdir()):
        raise UserError(f"{out} exists and holds something else than a demo; name another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    model = str(EMBEDDED_MODEL)
    console.rule("1. collect: a full run of the model, with hooks on it")
    trace = run_collect(CollectConfig(model=model, out=out / "trace", tokens=tokens), console)
    console.rule("2. fit: a small predictor for every layer")
    run = run_fit(FitConfig(trace=trace, out=out / "run"), console)
    console.rule("3. export: a folder that the runtime loads")
    folder = run_export(run, out / "predictors", console=console)
    console.rule("4. evaluate and generate, on text that neither the model nor the predictors have seen")
    loaded, tokenizer, _ = _load(model, "cpu", None)
    predictors = _load_predictors(str(folder), loaded)
    result = run_evaluate(
        loaded, _batches(tokenizer, "embedded", "held_out", 10_000, 256, 16), predictors, progress=True
    )
    times, text = _time_policies(loaded, tokenizer, predictors)
    console.print(text, style="dim", markup=False, highlight=False)
    print_hit_rates(console, result)
    print_losses(console, result, times)
    console.print(
        "The embedded model is so small that its copies take no time: what a policy gains is seen on real sizes.\n\n"
        "Go on with:\n"
        f"  tensorboard --logdir {run}\n"
        f"  predict-train generate {model} --predictors {folder} --prompt 'def main():'\n"
        f"  predict-train evaluate {model} --predictors {folder} --json evaluation.json\n"
        "  predict-train collect YOUR_MODEL --out trace   (then fit and export, as above)",
        highlight=False,
        soft_wrap=True,
    )


def _time_policies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, predictors: Predictors | None
) -> tuple[dict[str, float], str]:
    """Milliseconds per output token by policy and gating, and the text that was generated under the last of them."""
    from .runtime import Gating, Policy, offloaded
    from .runtime.generate import generate as job

    prompt = 'import os\nimport sys\n\n\nclass Reader:\n    def __init__(self, path, mode="r"):'
    ways = [(p, Gating.TRUE) for p in (Policy.ON_DEMAND, Policy.PREFETCH)] + [(Policy.SPECULATIVE, g) for g in Gating]
    milliseconds, text = {}, ""
    for policy, gating in ways:
        with offloaded(model, predictors, policy=policy, gating=gating, device=model.device):
            result = job(model, tokenizer, prompt, max_new_tokens=64, temperature=0.8, seed=2)
        name = f"{policy}/{gating}" if policy is Policy.SPECULATIVE else str(policy)
        milliseconds[name] = 1000 * (result.seconds_per_output_token or 0.0)
        text = prompt + result.text
    return milliseconds, text


for command in (runtime_commands.bench, runtime_commands.plan, runtime_commands.pack):
    app.command()(command)


def main() -> None:
    """Runs the command line; a `UserError` ends it with one sentence and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_MININTERVAL", "0.5")
    try:
        app()
    except UserError as error:
        print(f"predict-train: {error}", file=sys.stderr)
        sys.exit(2)
