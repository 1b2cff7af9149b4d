"""Measures every way to run a model whose experts don't fit: in turn, in one process, round after round.

A round of a way attaches it, runs a prompt and some tokens of warm-up, and then counts: the mean over a round's tokens is
one figure, and a result is the median, least and most of its rounds' figures. The device is waited for at the borders of
what is measured, and never between its tokens. All ways see the same tokens and, where one is given, the same routing.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...predictors.architecture import MoELayer
from ...predictors.checkpoint import Predictors, as_predictors
from ...predictors.discovery import find_moe_layers
from ...predictors.errors import UserError
from ...predictors.loading import resolve_device
from ..automatic import AUTO
from ..offload import ExpertOffload, offloaded, open_store, slots_of
from ..policy import Gating, Policy
from ..settings import OffloadConfig
from ..store import ExpertStore
from .link import measure_link
from .memory import peaks, reset_peaks
from .routing import ReplayedRouting, replaying
from .settings import Measuring
from .stopwatch import Stopwatch
from .timeline import Timeline, profiling, watching

TIMELINE_TOKENS = 4


class BenchError(UserError):
    """Something that can't be measured as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Way:
    """A way to run the model: `resident`, `accelerate`, or a policy, with its gating where it has one."""

    policy: str
    gating: str | None = None

    def __str__(self) -> str:
        return self.policy if self.gating is None else f"{self.policy}/{self.gating}"


def parse_ways(text: str) -> list[Way]:
    """The ways in a list with commas, like `resident,on_demand,speculative/true`; a bare `speculative` is all gatings.

    Raises `BenchError` for one that there is not.
    """
    known = [Way("resident"), *(Way(p) for p in Policy if p is not Policy.SPECULATIVE)]
    known += [Way(AUTO), *(Way(Policy.SPECULATIVE, gating) for gating in Gating), Way("accelerate")]
    ways: list[Way] = []
    for part in text.split(","):
        found = [way for way in known if part.strip() in (str(way), way.policy)]
        if not found:
            raise BenchError(f"there is no policy {part.strip()}; give some of {', '.join(map(str, known))}")
        ways += found
    return list(dict.fromkeys(ways))


@dataclass(frozen=True)
class Round:
    """What was measured of one way in one round. Seconds, bytes and shares are those of the counted tokens."""

    seconds_to_first_token: float
    seconds_per_token: float
    bytes_per_token: float | None = None
    stalled_per_token: float | None = None
    hit_rate: float | None = None
    """Share of the router's experts that were among the candidates."""
    speculating_per_token: float | None = None
    """Seconds that the host spends on speculation itself."""
    cache_hit_rate: float | None = None
    """Share of the executed experts that were on the device, or on their way."""
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None


@dataclass(frozen=True)
class Setup:
    """What all rounds have in common."""

    token_ids: torch.Tensor
    """The prompt, `[1, length]`."""
    device: torch.device
    config: Measuring
    """Its slots are a number."""
    store: ExpertStore | None = None
    predictors: Predictors | None = None
    routing: ReplayedRouting | None = None


@dataclass(frozen=True)
class Measured:
    """What `bench` returns."""

    rounds: dict[Way, list[Round]]
    skipped: dict[Way, str]
    """Ways that can't be run here, and why."""
    links: list[float]
    """Bytes per second from the store to the device while nothing computes, before each round: a disk that others use too is
    not always as fast."""
    expert_bytes: int
    slots: int

    @property
    def link(self) -> float:
        return statistics.median(self.links)


def bench(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    config: Measuring,
    predictors: Predictors | str | Path | None = None,
    routing: ReplayedRouting | None = None,
    reference: Callable[[int], Any] | None = None,
    on_round: Callable[[Way, Round], None] = lambda *_: None,
    store: ExpertStore | None = None,
) -> Measured:
    """Measures ways to run `model`, which is in host memory or has its experts in a packed file, and is not offloaded.

    `token_ids` `[1, length]` are the prompt. `reference(bytes)` is a context manager that yields another copy of the model,
    offloaded by accelerate with that much memory for its experts; it is measured after all others. `store` is where the
    experts are, if not in the model or in its packed file.

    Raises `BenchError` where there is no way left that can be run, and what `offload_experts` raises.
    """
    ways, device, layers = parse_ways(config.policies), resolve_device(config.device), find_moe_layers(model)
    slots = slots_of(config, layers)
    config = config.model_copy(update={"slots": slots, "expert_memory": None})
    with ExitStack() as opened:
        store = open_store(opened, model, layers, store, device)
        setup = Setup(token_ids, device, config, store, as_predictors(predictors), routing)
        size = store.format.bytes
        skipped = {way: why for way in ways if (why := _hindrance(way, model, device, reference))}
        ours = [way for way in ways if way not in skipped and way.policy != "accelerate"]
        if len(skipped) == len(ways):
            raise BenchError(f"nothing is left to measure: {'; '.join(f'{w}: {why}' for w, why in skipped.items())}")
        links: list[float] = []
        rounds: dict[Way, list[Round]] = {way: [] for way in ways if way not in skipped}

        def measure(way: Way, subject: PreTrainedModel, its_layers: list[MoELayer]) -> None:
            gc.collect()  # else what was detached before may still hold its slots, and count to this round's peak
            with running(way, subject, its_layers, setup) as offload:
                measured = measure_round(subject, offload, setup)
            rounds[way].append(measured)
            on_round(way, measured)

        for number in range(config.rounds):
            links.append(measure_link(store, device, config.readers))
            start = number % len(ours) if ours else 0
            for way in ours[start:] + ours[:start]:  # whatever else the machine does meets all of them
                measure(way, model, layers)
        if config.timeline is not None and ours:
            _record(config.timeline, ours, model, layers, setup)
    if Way("accelerate") in rounds and reference is not None:
        with reference(slots * size) as other:
            its_layers = find_moe_layers(other)
            for _ in range(config.rounds):
                measure(Way("accelerate"), other, its_layers)
    return Measured(rounds, skipped, links, size, slots)


def _hindrance(way: Way, model: PreTrainedModel, device: torch.device, reference: Any) -> str | None:
    """Why a way can't be run, or None."""
    if way.policy == "accelerate" and reference is None:
        return "there is no checkpoint that accelerate could load"
    if way.policy != "resident":
        return None
    if any(p.is_meta for p in model.parameters()):
        return "the experts are in a packed file"
    size = sum(p.nbytes for p in model.parameters())
    if device.type == "cuda" and size > 0.9 * torch.cuda.mem_get_info(device)[0]:
        return f"its {size / 2**30:.1f} GiB do not fit the device"
    return None


@contextmanager
def running(way: Way, model: PreTrainedModel, layers: list[MoELayer], setup: Setup) -> Iterator[ExpertOffload | None]:
    """The model, run in this way."""
    with ExitStack() as stack:
        if way.policy == "resident":
            stack.enter_context(_moved(model, setup.device))
        replayed = None if setup.routing is None else stack.enter_context(replaying(layers, setup.routing))
        if way.policy in ("resident", "accelerate"):
            yield None
            return
        settings = setup.config.values_of(OffloadConfig) | {"policy": way.policy, "device": setup.device}
        settings |= {} if way.gating is None else {"gating": way.gating}
        offload = stack.enter_context(offloaded(model, setup.predictors, store=setup.store, **settings))
        if replayed is not None:
            offload.guess_by(replayed.guesser)
        yield offload


@contextmanager
def _moved(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """The whole model on the device; afterwards its tensors are what they were."""
    tensors = [t for t in [*model.parameters(), *model.buffers()] if t.device != device]
    before = [t.data for t in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


@torch.inference_mode()
def _decode(model: PreTrainedModel, setup: Setup, tokens: int, counted: Any) -> tuple[float, float]:
    """Greedy decoding: seconds to the first token, and seconds of the `tokens` tokens that run within `counted`."""
    ids = setup.token_ids.to(next(model.get_input_embeddings().parameters()).device)
    _synchronize(setup.device)
    begun = time.perf_counter()
    output = model(input_ids=ids, use_cache=True)
    ids = output.logits[:, -1:].argmax(-1)
    _synchronize(setup.device)
    first = time.perf_counter() - begun
    for _ in range(setup.config.warmup):
        output = model(input_ids=ids, past_key_values=output.past_key_values, use_cache=True)
        ids = output.logits[:, -1:].argmax(-1)
    _synchronize(setup.device)
    with counted:
        begun = time.perf_counter()
        for _ in range(tokens):
            output = model(input_ids=ids, past_key_values=output.past_key_values, use_cache=True)
            ids = output.logits[:, -1:].argmax(-1)
        _synchronize(setup.device)
        return first, time.perf_counter() - begun


def measure_round(model: PreTrainedModel, offload: ExpertOffload | None, setup: Setup) -> Round:
    """One round of a model that is run in whatever way it is; `offload` is what it is run by, if it is ours."""
    reset_peaks(setup.device)

    stopwatch = Stopwatch()

    @contextmanager
    def counted() -> Iterator[None]:
        if offload is None:
            yield
            return
        offload.reset()
        with offload.observed(stopwatch):
            yield

    tokens = setup.config.tokens
    first, seconds = _decode(model, setup, tokens, counted())
    host, device = peaks(setup.device)
    measured = Round(first, seconds / tokens, peak_host_bytes=host, peak_device_bytes=device)
    if offload is None:
        return measured
    counters = offload.counters
    return replace(
        measured,
        bytes_per_token=counters.bytes_copied / tokens,
        stalled_per_token=counters.stalled_seconds / tokens,
        speculating_per_token=stopwatch.speculating / tokens,
        hit_rate=counters.speculation_hit_rate,
        cache_hit_rate=counters.hits / (counters.hits + counters.misses),
    )


def _record(
    file: Path,
    ways: list[Way],
    model: PreTrainedModel,
    layers: list[MoELayer],
    setup: Setup,
) -> None:
    """Writes the trace of a few tokens of each way."""
    timeline = Timeline()
    on_cpu = setup.device.type == "cpu"
    for way in ways:
        with running(way, model, layers, setup) as offload:
            if not on_cpu:
                name = f"{file.stem}.{str(way).replace('/', '-')}{file.suffix}"
                _decode(model, setup, TIMELINE_TOKENS, profiling(file.with_name(name)))
                continue

            @contextmanager
            def counted(name: str = str(way)) -> Iterator[None]:
                timeline.begin(name)
                yield
                timeline.end()

            with watching(timeline, model, layers, offload):
                _decode(model, setup, TIMELINE_TOKENS, counted())
    if on_cpu:
        timeline.save(file)


def results(measured: Measured) -> list[dict[str, Any]]:
    """A row a way as it stands in the JSON, times in milliseconds.

    The limit is `max(compute, bytes / link)`. Compute is the least time per token, without stalls, of all the ways.
    """
    every = [r for rounds in measured.rounds.values() for r in rounds if r.stalled_per_token is not None]
    plain = [r for way, rounds in measured.rounds.items() if way.policy == "resident" for r in rounds]
    work = [r.seconds_per_token - (r.stalled_per_token or 0.0) for r in [*every, *plain]]
    rows = []
    for way, rounds in measured.rounds.items():
        times = [1000 * r.seconds_per_token for r in rounds]
        copied = _median([r.bytes_per_token for r in rounds])
        limit = 1000 * max(min(work), (copied or 0.0) / measured.link) if work and way.policy != "accelerate" else None
        stall = _median([r.stalled_per_token for r in rounds])
        speculating = _median([r.speculating_per_token for r in rounds])
        rows.append(
            {
                "policy": way.policy,
                "gating": way.gating,
                "time_per_output_token_ms": {
                    "median": statistics.median(times),
                    "min": min(times),
                    "max": max(times),
                },
                "time_to_first_token_ms": 1000 * statistics.median(r.seconds_to_first_token for r in rounds),
                "hit_rate": _median([r.hit_rate for r in rounds]),
                "cache_hit_rate": _median([r.cache_hit_rate for r in rounds]),
                "bytes_per_token": copied,
                "stall_ms_per_token": None if stall is None else 1000 * stall,
                "speculating_ms_per_token": None if speculating is None else 1000 * speculating,
                "limit_ms_per_token": limit,
                "overlap_efficiency": None if limit is None else limit / statistics.median(times),
                "peak_host_bytes": max((r.peak_host_bytes for r in rounds if r.peak_host_bytes), default=None),
                "peak_device_bytes": max((r.peak_device_bytes for r in rounds if r.peak_device_bytes), default=None),
            }
        )
    return rows


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
