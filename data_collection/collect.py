"""The job `collect`: a full run of a model over text, with hooks on it, into a trace.

A collection can be stopped at any moment and resumed (see `progress.py`). It can be shared among the processes that
torchrun or SLURM starts: of N processes, each runs every N-th batch and writes its own shards. The first one then
writes the manifest.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from tqdm import tqdm
from transformers import PreTrainedModel

from ..predictors.architecture import MoELayer, moe_shape
from ..predictors.discovery import find_moe_layers
from ..predictors.forms import Form
from ..predictors.generation import check_generation
from ..predictors.loading import load_model, load_tokenizer, resolve_device, resolve_dtype
from ..predictors.provenance import command, versions
from ..predictors.tables import figure_table
from ..predictors.weights import commit_of, local_folder
from .batches import TokenBatch, read_batches
from .columns import TOKEN_IDS
from .hooks import Recorder, Watch, watch_resident
from .manifest import FORMAT_VERSION, LayerEntry, Manifest, ModelEntry
from .memory import keep_freed_memory
from .passes import Run, arguments_of, most_rows, run_batch
from .pilot import make_plan, speculation_state
from .processes import Group, joined
from .progress import (
    LOCK,
    Progress,
    Snapshot,
    add_tokens,
    check_origin,
    check_settings,
    common_origin,
    is_finished,
    load_progress,
    locked,
    origin_of,
    remove_progress,
    remove_unfinished,
    save_progress,
)
from .refusals import Refusals, Refuse
from .settings import CollectConfig, CollectError
from .statistics import SAMPLE_ROWS, hit_rates
from .trace import Trace
from .writer import TraceWriter, disk, write_manifest, write_speculation


class Source(NamedTuple):
    """A model to collect from."""

    model: PreTrainedModel
    watch: Watch = watch_resident
    """How its experts tell their outputs."""


Load = Callable[[CollectConfig, torch.device], Source]
"""Loads the model of a collection for a device."""


def load_whole(config: CollectConfig, device: torch.device) -> Source:
    """The model with all its weights on the device, or spread over several by `device_map`."""
    keep_freed_memory()
    return Source(load_model(config.model, device, resolve_dtype(config.dtype, device), config.device_map))


def collect(config: CollectConfig, console: Console | None = None, load: Load = load_whole) -> Path:
    """Runs the model that `load` gives and writes the trace, or resumes it; returns its folder.

    Raises a `UserError` if anything is wrong with the settings, the model, the corpus or the disk. Then, and after a
    `KeyboardInterrupt`, the folder holds a trace that can be resumed, or nothing if no batch has been run.
    """
    with joined(resolve_device(config.device)) as group:
        console = console or Console(quiet=not group.is_first)
        try:
            with locked(config.out) if group.is_first else nullcontext():
                finished = group.share(is_finished(config, group.count, group.device) if group.is_first else False)
                if finished:
                    console.print(f"{config.out} is finished already", highlight=False)
                else:
                    _collect(config, load, group, console)
                group.wait()  # the lock is held until all have ended
        except KeyboardInterrupt as stop:
            raise type(stop)(f"stopped; give --resume to go on with {config.out}") from stop
    return config.out


def _collect(config: CollectConfig, load: Load, group: Group, console: Console) -> None:
    before = load_progress(config.out, group.rank)
    if before is not None:
        check_settings(config, before.progress.settings, before.progress.processes, group.count)
    if config.device_map is not None and group.count > 1:
        raise CollectError("device_map auto spreads one process over all GPUs; start a single process, or leave it out")
    if config.phase == "decode" and config.max_new_tokens >= config.sequence_length:
        raise CollectError(
            f"max_new_tokens {config.max_new_tokens} leaves no room for a prompt in a sequence_length of "
            f"{config.sequence_length}; give fewer --max-new-tokens or a longer --sequence-length"
        )
    tokenizer = load_tokenizer(config.model)
    if config.phase == "decode":
        check_generation(config.model, tokenizer, partial(arguments_of, max_new_tokens=config.max_new_tokens))
    model, watch = load(config, group.device)
    layers, origin = find_moe_layers(model), origin_of(config, group.device)
    if before is not None:
        check_origin(config, before.progress.origin, origin)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and config.sequence_length > limit:
        raise CollectError(
            f"sequence_length {config.sequence_length} is beyond the {limit} positions of {config.model}"
        )
    run = Run(config, model, layers, tokenizer, watch)
    plan: Any = None
    if group.is_first:
        plan = before.progress.plan if before else make_plan(run, console, group.count)
    plan = group.share(plan)
    if before is None:
        before = Snapshot(
            Progress(settings=config.decides(), origin=origin, processes=group.count, plan=plan),
            run.recorder(plan.targets).state(),
        )
        with disk(config.out):
            save_progress(config.out, group.rank, before)
    refusals, started = Refusals(), time.perf_counter()
    with torch.inference_mode():
        done, stopped = _record(run, group, before, refusals.add)
    group.wait()
    if group.is_first:
        speed = (done.tokens - before.progress.tokens) / (time.perf_counter() - started)
        manifest = _finish(run, group)
        _report(manifest, console)
        refusals.report(console)
        if stopped:
            console.print(f"ended with the last whole batch within max_bytes {config.max_bytes:,}", highlight=False)
        elif done.tokens < config.tokens:
            console.print(f"the corpus gave {done.tokens:,} of {config.tokens:,} tokens", highlight=False)
        size = sum(file.stat().st_size for file in config.out.iterdir() if file.name != LOCK)
        console.print(
            f"{config.out}: {manifest.tokens:,} tokens, {size:,} bytes ({size / manifest.tokens:,.0f} a token), "
            f"{speed:,.0f} tokens/s",
            highlight=False,
        )


def _record(run: Run, group: Group, before: Snapshot, refuse: Refuse) -> tuple[Progress, bool]:
    """Runs this process's batches; returns its last progress, and whether it ended because of `max_bytes`."""
    config, model, _, tokenizer, _ = run
    start, plan = before.progress, before.progress.plan
    prefix = "shard" if group.count == 1 else f"shard-{group.rank:04d}"
    remove_unfinished(config.out, prefix, start)
    rows = sum(shard.rows for shard in start.shards)
    most = None if config.max_bytes is None else plan.most_rows(config.max_bytes, config.shard_bytes, group.count)
    digest, done, stopped = hashlib.blake2b(digest_size=16), start, False
    recorder = run.recorder(plan.targets)
    recorder.add_state(before.sums)
    hidden = None if group.is_first else True
    progress = tqdm(total=config.tokens, unit=" tokens", desc="collect", leave=False, disable=hidden)
    writer = TraceWriter(config.out, config.shard_bytes, group.rank, prefix, start.shards)

    def snapshot() -> Snapshot:
        return Snapshot(done, recorder.state())

    with recorder, closing(progress), writer:
        for batch in read_batches(config, tokenizer, config.tokens, refuse):
            add_tokens(digest, batch.token_ids)
            progress.update(_work(batch, config))
            if batch.number < start.batches:
                if batch.number + 1 == start.batches and digest.hexdigest() != start.digest:
                    break
                continue
            is_own = batch.number % group.count == group.rank
            if is_own and most is not None and rows + most_rows(batch, config) > most:
                stopped = True
                break
            columns = run_batch(model, recorder, batch, config) if is_own else None
            reach: dict[str, Any] = {"batches": batch.number + 1, "sequences": batch.first + len(batch.token_ids)}
            reach |= {"tokens": done.tokens + _work(batch, config), "digest": digest.hexdigest()}
            done = start.model_copy(update=reach)
            if columns is not None:
                rows += len(columns[TOKEN_IDS])
                writer.append(columns, snapshot)
        if start.batches and done is start and not stopped and digest.hexdigest() != start.digest:
            raise CollectError(
                f"the corpus {', '.join(config.corpora)} is not what it was when {config.out} was started; "
                "give it back as it was, or collect into another folder"
            )
        done = done.model_copy(update={"shards": writer.flush()})
    with disk(config.out):
        save_progress(config.out, group.rank, snapshot())
    return done, stopped


def _work(batch: TokenBatch, config: CollectConfig) -> int:
    """The batch's tokens as `--tokens` counts them: its own, or the most that can be generated from it."""
    return len(batch.token_ids) * config.max_new_tokens if config.phase == "decode" else batch.tokens


def _finish(run: Run, group: Group) -> Manifest:
    """Makes one trace of everything that the processes have written to the folder."""
    config, model, layers, _, _ = run
    parts: list[Progress] = []
    recorder: Recorder | None = None
    for rank in range(group.count):
        part = load_progress(config.out, rank)
        if part is None:
            raise CollectError(f"process {rank} left nothing in {config.out}; all must write to one shared folder")
        recorder = recorder or run.recorder(part.progress.plan.targets)
        recorder.add_state(part.sums)
        parts.append(part.progress)
    assert recorder is not None
    if not any(part.shards for part in parts):
        remove_progress(config.out)
        raise CollectError(
            "not one token was recorded: not even one batch fits; give a larger --max-bytes, or a smaller --batch-size"
            if config.max_bytes is not None
            else "not one token was recorded; give a larger --sample, or more --tokens"
        )
    checksums = write_speculation(config.out, speculation_state(layers, recorder), model.config.to_json_string())
    manifest = _manifest(run, parts, recorder, checksums)
    # Measured on the trace itself, as `fit` will read it.
    trace = Trace(config.out, manifest, is_checked=True)
    sample, top_k = trace.sample(SAMPLE_ROWS), manifest.model.top_k
    [rates] = hit_rates(sample, trace.sources, trace.stacked(), [top_k])
    for entry in manifest.layers:
        entry.training_free = rates[entry.layer]
    write_manifest(config.out, manifest)
    remove_progress(config.out)
    return manifest


def _manifest(run: Run, parts: list[Progress], recorder: Recorder, checksums: dict[str, str]) -> Manifest:
    config, model, layers, _, _ = run
    by_index = {layer.index: layer for layer in layers}
    control = recorder.control_hit_rates()
    shards = [shard for part in parts for shard in part.shards]
    return Manifest(
        format_version=FORMAT_VERSION,
        model=ModelEntry(
            name=config.model,
            revision=commit_of(local_folder(config.model)),
            architecture=type(model).__name__,
            **moe_shape(model.config, layers),
        ),
        layers=[
            LayerEntry(
                layer=target,
                source=source,
                **{name: by_index[target].names[name] for name in ("norm", "router", "router_arguments")},
                router_ndim=by_index[target].router_ndim,
                form=Form.CORRECTING if by_index[target].unfollowed is None else Form.DIRECT,
                has_input=source is None or config.inputs,
                **({} if source is None else _joined(by_index[source])),
                training_free=0.0,
                control=control[target],
            )
            for target, source in recorder.sources.items()
        ],
        dtype=str(model.dtype).removeprefix("torch."),
        corpus=", ".join(config.corpora),
        **config.model_dump(include={"phase", "split", "seed", "sequence_length"}),
        sequences=max(part.sequences for part in parts),
        tokens=sum(shard.rows for shard in shards),
        **checksums,
        shards=shards,
        settings=config.decides(),
        origin=common_origin(parts),
        processes=len(parts),
        versions=versions(),
        command=command(),
    )


def _joined(source: MoELayer) -> dict[str, Any]:
    """How a source layer's experts join its output, as far as a speculation needs it."""
    return {
        "post_norm": source.names["post_norm"],
        "post_scale": source.join.post_scale,
        "has_inner": source.join.has_inner,
    }


def _report(manifest: Manifest, console: Console) -> None:
    table = figure_table(
        *("target", "source", "training-free", "control"),
        title="hit rate by layer",
        caption=f"training-free: on about {min(SAMPLE_ROWS, manifest.tokens):,} tokens, evenly spaced; control: on every eighth",
    )
    for entry in manifest.layers:
        source = "its input" if entry.source is None else str(entry.source)
        table.add_row(str(entry.layer), source, f"{entry.training_free:.3f}", f"{entry.control:.4f}")
    console.print(table)
