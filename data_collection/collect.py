"""The job `collect`: a full run of a model over text, with hooks on it, into a trace."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_collection.corpus import EMBEDDED, Split, read_documents, sequences
from data_collection.hooks import LayerRecord, Recorder
from data_collection.trace import (
    FORMAT_VERSION,
    Columns,
    LayerEntry,
    Manifest,
    ModelEntry,
    ShardEntry,
    Trace,
    make_batch,
)
from data_collection.writer import TraceWriter
from predictors.architecture import MoELayer, find_moe_layers, moe_shape
from predictors.errors import UserError
from predictors.loading import load_model, load_tokenizer, resolve_device, resolve_dtype
from predictors.metrics import HitRate
from predictors.provenance import command, versions
from predictors.settings import Settings
from predictors.speculation import Speculator

PILOT_TOKENS = 4096
SAMPLE_ROWS = 32768

Count = Annotated[int, Field(gt=0)]


class CollectError(UserError):
    """A collection that can't be made as asked; the message says why and what to do."""


class CollectConfig(Settings):
    """Settings of `collect`."""

    model: str
    """Folder or Hub name of a mixture-of-experts model."""
    out: Path
    """The trace's folder; it must not exist, or be empty."""
    corpus: str = EMBEDDED
    """`embedded`, a text file, a folder of text files, or a .jsonl file."""
    split: Split = "train"
    """Of the embedded corpus: `train` or `held_out`."""
    text_column: str = "text"
    """The key of the text in a .jsonl corpus."""
    tokens: Count = 400_000
    """How many tokens to run; fewer where the corpus has fewer."""
    layers: Literal["all", "auto"] | list[int] = "all"
    """Target layers: `all`, a list of them, or `auto`: those whose training-free hit rate is below `threshold`."""
    threshold: float = Field(0.9, gt=0, le=1)
    """The training-free hit rate below which `auto` takes a layer."""
    sequence_length: Count = 256
    """Tokens of a sequence; documents are packed into sequences."""
    batch_size: Count = 16
    """Sequences of a forward pass."""
    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu` or `cuda`."""
    dtype: str = "auto"
    """`auto` (the checkpoint's on CUDA, float32 on a CPU), `float32`, `bfloat16` or `float16`."""
    seed: int = 0
    """Of torch's generator, for a model that draws while it runs; the text is read in a fixed order."""


def collect(config: CollectConfig, console: Console | None = None) -> Path:
    """Runs the model and writes the trace; returns its folder. Nothing is left behind where it fails.

    Raises a `UserError` for whatever is wrong with the settings, the model, the corpus or the disk.
    """
    console = console or Console()
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise CollectError(f"{config.out} exists already; name a new folder or remove it")
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, device, dtype)
    layers = find_moe_layers(model)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and config.sequence_length > limit:
        raise CollectError(
            f"sequence_length {config.sequence_length} is beyond the {limit} positions of {config.model}"
        )
    next(_documents(config))  # a corpus that holds no text is refused here
    targets = _choose_targets(config, model, layers, tokenizer, console)
    torch.manual_seed(config.seed)
    with torch.inference_mode(), TraceWriter(config.out) as writer:
        started = time.perf_counter()
        recorder, tokens, count = _record(config, model, layers, targets, tokenizer, writer)
        shards = writer.flush()
        seconds = time.perf_counter() - started
        digest = writer.write_speculation(_speculation_state(layers, recorder), model.config.to_json_string())
        manifest = _manifest(config, model, layers, recorder, shards, digest, tokens, count)
        _measure(Trace(config.out, manifest))
        size = writer.finish(manifest)
    _report(manifest, console)
    console.print(
        f"{config.out}: {tokens:,} tokens, {size:,} bytes ({size / tokens:,.0f} a token), {tokens / seconds:,.0f} tokens/s",
        highlight=False,
    )
    return config.out


def _documents(config: CollectConfig) -> Iterator[str]:
    return read_documents(config.corpus, config.split, config.text_column)


def _batches(config: CollectConfig, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Iterator[torch.Tensor]:
    """Token ids `[sequences, length]`; consecutive sequences of one length are stacked, so nothing is padded."""
    stream = sequences(_documents(config), tokenizer, config.sequence_length, tokens)
    for _, same in itertools.groupby(stream, key=len):
        while stack := list(itertools.islice(same, config.batch_size)):
            yield torch.stack(stack)


def _run(model: PreTrainedModel, token_ids: torch.Tensor) -> None:
    # The body without the head: logits over a large vocabulary would cost more than a layer, and nobody reads them.
    model.base_model(input_ids=token_ids.to(model.device), use_cache=False)


def _choose_targets(
    config: CollectConfig,
    model: PreTrainedModel,
    layers: list[MoELayer],
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> list[int]:
    known = [layer.index for layer in layers]
    if config.layers == "all":
        return known
    if config.layers != "auto":
        unknown = [index for index in config.layers if index not in known]
        if unknown or not config.layers:
            wrong = f"layer {unknown[0]} is not an MoE layer" if unknown else "no layer is named"
            raise CollectError(f"{wrong}; the MoE layers of {config.model} are {_spans(known)}")
        return sorted(set(config.layers))
    rates = _pilot(config, model, layers, tokenizer)
    chosen = [target for target, rate in rates.items() if rate < config.threshold]
    console.print(
        f"training-free hit rates on the first {PILOT_TOKENS} tokens: "
        + ", ".join(f"{target}: {rate:.3f}" for target, rate in rates.items()),
        highlight=False,
    )
    if not chosen:
        raise CollectError(
            f"no layer's training-free hit rate is below the threshold of {config.threshold} (the lowest is "
            f"{min(rates.values()):.3f}); raise --threshold or give --layers all"
        )
    return chosen


def _pilot(
    config: CollectConfig, model: PreTrainedModel, layers: list[MoELayer], tokenizer: PreTrainedTokenizerBase
) -> dict[int, float]:
    """Training-free hit rate of every MoE layer on the first few thousand tokens, all in memory."""
    with torch.inference_mode(), Recorder(layers, [layer.index for layer in layers]) as recorder:
        batches: list[Columns] = []
        for token_ids in _batches(config, tokenizer, min(PILOT_TOKENS, config.tokens)):
            _run(model, token_ids)
            batches.append(_columns(recorder.take(), recorder.sources))
    vectors = recorder.default_vectors()
    by_index = {layer.index: layer for layer in layers}
    speculators = {
        target: Speculator(
            by_index[target].norm, by_index[target].router, None if source is None else vectors[source]
        ).to(model.device)
        for target, source in recorder.sources.items()
    }
    moved = ({name: tensor.to(model.device) for name, tensor in columns.items()} for columns in batches)
    return training_free_hit_rates(moved, recorder.sources, speculators)


def training_free_hit_rates(
    batches: Iterator[Columns], sources: dict[int, int | None], speculators: dict[int, Speculator]
) -> dict[int, float]:
    """By target: recall@k of the router on the quasi-hidden state, over the rows of `batches`."""
    metric = HitRate(len(sources))
    for columns in batches:
        batch = make_batch(columns, sources, speculators)
        chosen = []
        for target, quasi in zip(sources, batch.quasi, strict=True):
            router = speculators[target].router
            chosen.append(router(quasi.to(next(router.parameters()).dtype))[2])
        metric.update(torch.stack(chosen).cpu(), batch.ids.cpu())
    return dict(zip(sources, metric.rates(), strict=True))


def _record(
    config: CollectConfig,
    model: PreTrainedModel,
    layers: list[MoELayer],
    targets: list[int],
    tokenizer: PreTrainedTokenizerBase,
    writer: TraceWriter,
) -> tuple[Recorder, int, int]:
    """The one pass; returns the recorder and how many tokens and sequences there were."""
    recorder, rows, number = Recorder(layers, targets), 0, 0
    progress = tqdm(total=config.tokens, unit=" tokens", desc="collect", leave=False, disable=None)
    with recorder, closing(progress):
        for token_ids in _batches(config, tokenizer, config.tokens):
            _run(model, token_ids)
            columns = _columns(recorder.take(), recorder.sources)
            count, length = token_ids.shape
            columns["token_ids"] = token_ids.flatten().int()
            columns["position"] = torch.arange(length, dtype=torch.int32).repeat(count)
            columns["sequence"] = torch.arange(number, number + count, dtype=torch.int32).repeat_interleave(length)
            if rows == 0:
                _check_room(config, columns, token_ids.numel())
            writer.append(columns)
            rows, number = rows + token_ids.numel(), number + count
            progress.update(token_ids.numel())
    return recorder, rows, number


def _check_room(config: CollectConfig, columns: Columns, rows: int) -> None:
    needed = sum(tensor.nbytes for tensor in columns.values()) * config.tokens // rows
    free = shutil.disk_usage(config.out).free
    if needed > free:
        raise CollectError(
            f"{config.tokens} tokens make a trace of {needed / 1e9:.1f} GB, and {config.out} has {free / 1e9:.1f} GB left; "
            "give fewer --tokens or --layers, or another folder"
        )


def _columns(records: dict[int, LayerRecord], sources: dict[int, int | None]) -> Columns:
    """What a trace keeps of the records of one forward pass, on the CPU."""
    columns: Columns = {}
    used_as_source = set(sources.values())
    for layer, record in records.items():
        name = f"layers.{layer}"
        columns[f"{name}.expert_ids"] = record.routing.ids.to("cpu", torch.int16)
        columns[f"{name}.expert_weights"] = record.routing.weights.to("cpu", torch.bfloat16)
        if layer in used_as_source:
            columns[f"{name}.residual"] = record.residual.to(torch.bfloat16).cpu()
        if layer in sources:
            columns[f"{name}.router_logits"] = record.routing.logits.to(torch.bfloat16).cpu()
        if record.input is not None:
            columns[f"{name}.input"] = record.input.to(torch.bfloat16).cpu()
    return columns


def _speculation_state(layers: list[MoELayer], recorder: Recorder) -> Columns:
    state = {f"default_vectors.{source}": vectors for source, vectors in recorder.default_vectors().items()}
    for layer in layers:
        if layer.index in recorder.sources:
            for part, module in (("norm", layer.norm), ("router", layer.router)):
                for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                    state[f"layers.{layer.index}.{part}.{name}"] = tensor.detach().cpu().clone()
    return state


def _manifest(
    config: CollectConfig,
    model: PreTrainedModel,
    layers: list[MoELayer],
    recorder: Recorder,
    shards: list[ShardEntry],
    speculation_sha256: str,
    tokens: int,
    count: int,
) -> Manifest:
    names = {layer.index: layer.names for layer in layers}
    control = recorder.control_hit_rates()
    return Manifest(
        format_version=FORMAT_VERSION,
        model=ModelEntry(
            name=config.model,
            revision=getattr(model.config, "_commit_hash", None),
            architecture=type(model).__name__,
            **moe_shape(model.config, layers),
        ),
        layers=[
            LayerEntry(layer=target, source=source, **names[target], training_free=0.0, control=control[target])
            for target, source in recorder.sources.items()
        ],
        dtype=str(model.dtype).removeprefix("torch."),
        phase="prefill",
        corpus=config.corpus,
        split=config.split,
        seed=config.seed,
        sequence_length=config.sequence_length,
        sequences=count,
        tokens=tokens,
        speculation_sha256=speculation_sha256,
        shards=shards,
        versions=versions(),
        command=command(),
    )


def _measure(trace: Trace) -> None:
    """Fills in the training-free hit rates, read back from the disk as `fit` will, on evenly spaced rows."""
    rates = training_free_hit_rates(trace.sample(SAMPLE_ROWS), trace.sources, trace.speculators())
    for entry in trace.manifest.layers:
        entry.training_free = rates[entry.layer]


def _report(manifest: Manifest, console: Console) -> None:
    table = Table(
        "target",
        "source",
        "training-free",
        "control",
        title="hit rate by layer",
        caption=f"training-free: on about {min(SAMPLE_ROWS, manifest.tokens):,} tokens, evenly spaced; control: on all",
    )
    for entry in manifest.layers:
        source = "its input" if entry.source is None else str(entry.source)
        table.add_row(str(entry.layer), source, f"{entry.training_free:.3f}", f"{entry.control:.4f}")
    console.print(table)


def _spans(numbers: list[int]) -> str:
    """`0 to 11`, or the list itself where it has gaps."""
    gapless = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]} to {numbers[-1]}" if gapless else ", ".join(map(str, numbers))
