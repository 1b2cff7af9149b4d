"""Measures every way to run a model whose experts don't fit: one after another, in one process, in several rounds.

In each round, a way is attached, runs a prompt and some tokens of warm-up, and is then measured. The mean over the tokens
of a round is one figure. A result is the median, the least and the most of all rounds. The host waits for the device before
and after the measured tokens, and never between them. All ways see the same tokens, and the same routing where one is given.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function
from transformers import PreTrainedModel, StaticCache

from ...predictors.architecture import MoELayer
from ...predictors.checkpoint import Predictors, as_predictors
from ...predictors.discovery import find_moe_layers
from ...predictors.errors import UserError
from ...predictors.generation import CACHE
from ...predictors.loading import resolve_device
from ..automatic import AUTO
from ..offload import ExpertOffload, offloaded
from ..policy import Gating, Policy
from ..room import slots_of
from ..settings import OffloadConfig
from ..store import ExpertStore
from ..stores import open_store
from .link import measure_link
from .memory import peaks, reset_peaks
from .routing import ReplayedRouting, replaying
from .settings import Measuring
from .stopwatch import Stopwatch
from .timeline import Timeline, profiling, spanning

TIMELINE_TOKENS = 4


class BenchError(UserError):
    """A model can't be measured as asked. The message says why and what to do."""


@dataclass(frozen=True)
class Way:
    """A way to run the model: `resident`, `accelerate` or a policy, with a gating if the policy has one."""

    policy: str
    gating: str | None = None

    def __str__(self) -> str:
        return self.policy if self.gating is None else f"{self.policy}/{self.gating}"


def parse_ways(text: str) -> list[Way]:
    """The ways in a list with commas, like `resident,on_demand,speculative/true`. `speculative` alone means all gatings.

    Raises `BenchError` for a way that does not exist.
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
    """The figures of one way in one round. Times, bytes and rates are those of the measured tokens."""

    seconds_to_first_token: float
    seconds_per_token: float
    bytes_per_token: float | None = None
    stalled_per_token: float | None = None
    hit_rate: float | None = None
    """Share of the router's experts that were among the candidates."""
    speculating_per_token: float | None = None
    """Seconds in which the host speculates."""
    cache_hit_rate: float | None = None
    """Share of the executed experts that were on the device or on their way to it."""
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None


@dataclass(frozen=True)
class Setup:
    """What is the same in all rounds."""

    token_ids: torch.Tensor
    """The prompt, `[1, length]`."""
    device: torch.device
    config: Measuring
    """`slots` is a number here."""
    store: ExpertStore | None = None
    predictors: Predictors | None = None
    routing: ReplayedRouting | None = None


@dataclass(frozen=True)
class Measured:
    """What `bench` returns."""

    rounds: dict[Way, list[Round]]
    skipped: dict[Way, str]
    """Ways that can't run here, and why."""
    links: list[float]
    """Bytes per second from the store to the device while nothing computes. It is measured before each round, since a disk that
    others use too changes its speed."""
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
    """Measures the ways that `config` names to run `model`, which must not be offloaded yet.

    `token_ids` `[1, length]` are the prompt. `reference(bytes)` is a context manager. It yields another copy of the model, which
    accelerate has offloaded with that much memory for the experts. This copy is measured last. `store` says where the experts
    are; by default they are in the model or in its packed file.

    Raises `BenchError` where none of the ways can run, and what `offload_experts` raises.
    """
    ways, device, layers = parse_ways(config.policies), resolve_device(config.device), find_moe_layers(model)
    with ExitStack() as opened:
        store = open_store(opened, model, layers, store, device, config.host_memory)
        slots = slots_of(config, model, layers, store, device).number
        config = config.model_copy(update={"slots": slots, "expert_memory": None, "host_memory": None})
        setup = Setup(token_ids, device, config, store, as_predictors(predictors), routing)
        size = store.format.bytes
        skipped = {way: why for way in ways if (why := _hindrance(way, model, device, reference))}
        ours = [way for way in ways if way not in skipped and way.policy != "accelerate"]
        if len(skipped) == len(ways):
            raise BenchError(f"nothing is left to measure: {'; '.join(f'{w}: {why}' for w, why in skipped.items())}")
        links: list[float] = []
        rounds: dict[Way, list[Round]] = {way: [] for way in ways if way not in skipped}

        def measure(way: Way, subject: PreTrainedModel, its_layers: list[MoELayer]) -> None:
            gc.collect()  # else the slots of the way before may still be in memory, and raise the peak of this round
            with running(way, subject, its_layers, setup) as offload:
                measured = measure_round(subject, offload, setup)
            rounds[way].append(measured)
            on_round(way, measured)

        for number in range(config.rounds):
            links.append(measure_link(store, device, config.readers))
            start = number % len(ours) if ours else 0
            for way in ours[start:] + ours[:start]:  # so that no way always has the same place
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
    """Why a way can't run, or None."""
    if way.policy == "accelerate" and reference is None:
        return "there is no checkpoint that accelerate could load"
    if way.policy != "resident":
        return None
    if any(p.is_meta for p in model.parameters()):
        return "the experts are in a packed file or quantised, and not in the model"
    size = sum(p.nbytes for p in model.parameters())
    if device.type == "cuda" and size > 0.9 * torch.cuda.mem_get_info(device)[0]:
        return f"its {size / 2**30:.1f} GiB do not fit the device"
    return None


@contextmanager
def running(way: Way, model: PreTrainedModel, layers: list[MoELayer], setup: Setup) -> Iterator[ExpertOffload | None]:
    """Runs the model in this way for the length of a `with`."""
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
    """Moves the whole model to the device. Afterwards its tensors are what they were."""
    tensors = [t for t in [*model.parameters(), *model.buffers()] if t.device != device]
    before = [t.data for t in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


class Decoding:
    """Greedy decoding that has passed the setup's prompt and its tokens of warm-up."""

    def __init__(self, model: PreTrainedModel, offload: ExpertOffload | None, setup: Setup):
        self._model, self._device = model, setup.device
        length = setup.token_ids.shape[1] + setup.config.warmup + setup.config.tokens + TIMELINE_TOKENS + 2
        is_captured = offload is not None and offload.captures
        self._cache = StaticCache(config=model.config, max_cache_len=length) if is_captured else None
        self._ids = setup.token_ids.to(next(model.get_input_embeddings().parameters()).device)
        self.seconds_to_first_token = self.run(1)
        self.run(setup.config.warmup)

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """Decodes one more token, and returns its logits `[1, vocabulary]`."""
        output = self._model(input_ids=self._ids, use_cache=True, **{CACHE: self._cache})
        self._ids, self._cache = output.logits[:, -1:].argmax(-1), output[CACHE]
        return output.logits[:, -1]

    def run(self, tokens: int) -> float:
        """Decodes so many more tokens, and returns the seconds that it took. It waits for the device before and after."""
        _synchronize(self._device)
        begun = time.perf_counter()
        for _ in range(tokens):
            self.step()
        _synchronize(self._device)
        return time.perf_counter() - begun


def measure_round(model: PreTrainedModel, offload: ExpertOffload | None, setup: Setup) -> Round:
    """One round of a model, however it is run. `offload` is None where it is not our runtime that runs it."""
    reset_peaks(setup.device)
    decoding, tokens, stopwatch = Decoding(model, offload, setup), setup.config.tokens, Stopwatch()
    if offload is not None:
        offload.reset()
    with nullcontext() if offload is None else offload.observed(stopwatch):
        seconds = decoding.run(tokens)
    host, device = peaks(setup.device)
    measured = Round(decoding.seconds_to_first_token, seconds / tokens, peak_host_bytes=host, peak_device_bytes=device)
    if offload is None:
        return measured
    counters = offload.counters
    return replace(
        measured,
        bytes_per_token=counters.bytes_copied / tokens,
        stalled_per_token=None if counters.stalled_seconds is None else counters.stalled_seconds / tokens,
        speculating_per_token=stopwatch.speculating / tokens,
        hit_rate=counters.speculation_hit_rate,
        cache_hit_rate=counters.hits / (counters.hits + counters.misses),
    )


def _record(file: Path, ways: list[Way], model: PreTrainedModel, layers: list[MoELayer], setup: Setup) -> None:
    """Writes the timeline of a few tokens of each way: one file on a CPU, and one for each way on CUDA."""
    timeline = Timeline() if setup.device.type == "cpu" else None
    for way in ways:
        own = file.with_stem(f"{file.stem}.{str(way).replace('/', '-')}")
        span = record_function if timeline is None else timeline.span
        with running(way, model, layers, setup) as offload, spanning(model, layers, span):
            decoding = Decoding(model, offload, setup)
            with profiling(own) if timeline is None else timeline.watching(str(way), offload):
                decoding.run(TIMELINE_TOKENS)
    if timeline is not None:
        timeline.save(file)


def results(measured: Measured) -> list[dict[str, Any]]:
    """One row for each way, as it stands in the JSON. Times are in milliseconds.

    The limit is `max(compute, bytes / link)`. Compute is the least time per token, without stalls, of all ways but accelerate.
    """
    ours = {way: rounds for way, rounds in measured.rounds.items() if way.policy != "accelerate"}
    work = [r.seconds_per_token - (r.stalled_per_token or 0.0) for rounds in ours.values() for r in rounds]
    rows = []
    for way, rounds in measured.rounds.items():
        times = [1000 * r.seconds_per_token for r in rounds]
        spread = {"median": statistics.median(times), "min": min(times), "max": max(times)}
        copied = _median(rounds, "bytes_per_token")
        limit = 1000 * max(min(work), (copied or 0.0) / measured.link) if way in ours else None
        rows.append(
            {
                "policy": way.policy,
                "gating": way.gating,
                "time_per_output_token_ms": spread,
                "time_to_first_token_ms": _median(rounds, "seconds_to_first_token", 1000),
                "hit_rate": _median(rounds, "hit_rate"),
                "cache_hit_rate": _median(rounds, "cache_hit_rate"),
                "bytes_per_token": copied,
                "stall_ms_per_token": _median(rounds, "stalled_per_token", 1000),
                "speculating_ms_per_token": _median(rounds, "speculating_per_token", 1000),
                "limit_ms_per_token": limit,
                "overlap_efficiency": None if limit is None else limit / spread["median"],
                "peak_host_bytes": max((r.peak_host_bytes for r in rounds if r.peak_host_bytes), default=None),
                "peak_device_bytes": max((r.peak_device_bytes for r in rounds if r.peak_device_bytes), default=None),
            }
        )
    return rows


def _median(rounds: list[Round], field: str, scale: float = 1) -> float | None:
    """The median of one figure of the rounds, times `scale`; None where it was not measured."""
    known = [value for r in rounds if (value := getattr(r, field)) is not None]
    return scale * statistics.median(known) if known else None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
