"""A short run before the collection: it chooses the layers and estimates the bytes and the time.

What it can't use of the corpus is left for the collection to tell.
"""

from __future__ import annotations

import copy
import math
import shutil
import time

import torch
from accelerate.hooks import remove_hook_from_module
from rich.console import Console

from ..predictors.architecture import MoELayer
from ..predictors.direct import PriorRouter, UnitNorm, prior_of
from ..predictors.speculation import Router, Wiring, wire
from ..predictors.stacked import StackedSpeculators
from .batches import read_batches
from .columns import TOKEN_IDS, Columns
from .hooks import Recorder
from .passes import Run, run_batch
from .progress import Plan
from .refusals import Refusals
from .settings import CollectError
from .statistics import hit_rates
from .wiring import wiring_state

RATES_TOKENS = 4096
# The estimate runs at most a sixteenth of the tokens, and no more than a few batches.
ESTIMATE_SHARE = 16
ESTIMATE_BATCHES = 3
ESTIMATE_NEW_TOKENS = 16


def make_plan(run: Run, console: Console, processes: int) -> Plan:
    """Runs the pilot, prints what the collection will take, and returns the plan.

    Raises `CollectError` if the layers are not as asked, or the disk is too small for the trace.
    """
    config, targets = run.config, _choose_targets(run, console)
    plan, seconds = _estimate(run, targets)
    rows = int(config.tokens * config.sample)
    needed = min(plan.trace_bytes(rows, config.shard_bytes), config.max_bytes or math.inf)
    console.print(
        f"{config.tokens:,} tokens, {len(targets)} target layers: at most {size_text(needed)}, "
        f"about {_time_text(seconds * config.tokens / processes)}",
        highlight=False,
    )
    # A new progress file is written before the old one is removed.
    aside = 2 * processes * plan.state_bytes
    free = shutil.disk_usage(config.out).free
    if needed + aside > free:
        raise CollectError(
            f"{config.tokens} tokens make a trace of {size_text(needed)} (and {size_text(aside)} while it is made), and "
            f"{config.out} has {size_text(free)} left; give fewer --tokens or --layers, a smaller --sample, or another folder"
        )
    return plan


def _estimate(run: Run, targets: list[int]) -> tuple[Plan, float]:
    """The plan, and seconds a token."""
    config, model, layers, tokenizer, _ = run
    new_tokens = min(config.max_new_tokens, ESTIMATE_NEW_TOKENS)
    short = config.model_copy(update={"sample": 1.0, "max_new_tokens": new_tokens})
    tokens = min(ESTIMATE_BATCHES * config.batch_tokens, max(1, config.tokens // ESTIMATE_SHARE))
    if config.phase == "decode":
        tokens = min(tokens, config.batch_size * new_tokens)
    times, rows, size = [], [], 0
    with torch.inference_mode(), run.recorder(targets) as recorder:
        for batch in read_batches(short, tokenizer, tokens, Refusals().add):
            started = time.perf_counter()
            columns = run_batch(model, recorder, batch, short)
            times.append(time.perf_counter() - started)
            rows.append(len(columns[TOKEN_IDS]))
            size += sum(tensor.nbytes for tensor in columns.values())
    first = 1 if len(times) > 1 else 0  # the first batch also warms up
    fixed = sum(tensor.nbytes for tensor in speculation_state(layers, recorder).values())
    plan = Plan(
        targets=targets,
        row_bytes=size // max(1, sum(rows)),
        # The entry of each column in the shard's header, and of the shard in the manifest.
        shard_overhead=400 + sum(len(name) + 110 for name in columns),
        fixed_bytes=fixed + len(model.config.to_json_string()) + 500 * len(targets) + 10_000,
        state_bytes=sum(tensor.nbytes for tensor in recorder.state().values()),
    )
    return plan, sum(times[first:]) / max(1, sum(rows[first:]))


def wirings_of(layers: list[MoELayer], recorder: Recorder) -> dict[int, Wiring]:
    """The wirings of what was recorded. Where a layer can't be followed, its experts that were chosen most are guessed."""
    if layers[0].unfollowed is None:
        return wire(layers, recorder.sources, recorder.default_vectors())
    counts = recorder.choices()
    return {
        target: Wiring(UnitNorm(), Router(PriorRouter(prior_of(counts[target]), layers[0].top_k)))
        for target in recorder.sources
    }


def speculation_state(layers: list[MoELayer], recorder: Recorder) -> Columns:
    """What a trace's speculators need beside its rows. Raises `CollectError` if a default vector is not finite."""
    vectors = recorder.default_vectors()
    for source, own in vectors.items():
        if wrong := (~own.isfinite()).any(-1).nonzero().flatten().tolist():
            raise CollectError(
                f"the mean output of expert {wrong[0]} of layer {source} is not finite; give --dtype bfloat16 or float32"
            )
    return wiring_state(wirings_of(layers, recorder), vectors)


def _choose_targets(run: Run, console: Console) -> list[int]:
    config = run.config
    known = [layer.index for layer in run.layers]
    if config.layers == "all":
        return known
    if config.layers != "auto":
        unknown = [index for index in config.layers if index not in known]
        if unknown or not config.layers:
            wrong = f"layer {unknown[0]} is not an MoE layer" if unknown else "no layer is named"
            raise CollectError(f"{wrong}; the MoE layers of {config.model} are {_spans(known)}")
        return sorted(set(config.layers))
    rates, tokens = _training_free(run)
    chosen = [target for target, rate in rates.items() if rate < config.threshold]
    console.print(
        f"training-free hit rates on the first {tokens:,} tokens: "
        + ", ".join(f"{target}: {rate:.3f}" for target, rate in rates.items()),
        highlight=False,
    )
    if not chosen:
        raise CollectError(
            f"no layer's training-free hit rate is below the threshold of {config.threshold} (the lowest is "
            f"{min(rates.values()):.3f}); raise --threshold or give --layers all"
        )
    return chosen


def _training_free(run: Run) -> tuple[dict[int, float], int]:
    """Training-free hit rate of every MoE layer on the corpus's first few thousand tokens, and the number of these tokens."""
    config, model, layers, tokenizer, _ = run
    prefill = config.model_copy(update={"phase": "prefill", "sample": 1.0})
    batches: list[Columns] = []
    with torch.inference_mode(), run.recorder(layer.index for layer in layers) as recorder:
        for batch in read_batches(prefill, tokenizer, min(RATES_TOKENS, config.tokens), Refusals().add):
            batches.append(run_batch(model, recorder, batch, prefill))
    stacked = StackedSpeculators(map(_own, wirings_of(layers, recorder).values()), layers[0].hidden_size)
    [rates] = hit_rates(iter(batches), recorder.sources, stacked, [layers[0].top_k])
    return rates, sum(len(columns[TOKEN_IDS]) for columns in batches)


def _own(wiring: Wiring) -> Wiring:
    """A copy on the CPU in fp32, like a trace's wiring; a model's own parts may lie on several devices."""
    own = copy.deepcopy(wiring)
    for module in own.modules:
        remove_hook_from_module(module, recurse=True)
        module.float()
    return own.to(torch.device("cpu"))


def size_text(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _time_text(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _spans(numbers: list[int]) -> str:
    """`0 to 11`, or the list itself if it has gaps."""
    gapless = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]} to {numbers[-1]}" if gapless else ", ".join(map(str, numbers))
