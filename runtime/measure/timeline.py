"""A timeline of computing and copying, side by side, for Chrome (chrome://tracing) or Perfetto."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...predictors.architecture import MoELayer
from ...predictors.override import override_forward
from ..host.cache import Key
from ..observer import Observer
from ..offload import ExpertOffload

COLOURS = {
    "token": "grey",
    "layer": "rail_response",
    "router": "olive",
    "speculate": "yellow",
    "experts": "thread_state_running",
    "wait": "terrible",
    "copying": "thread_state_iowait",
}
"""Chrome's names of colours, by the first word of a span's name or of its track. Perfetto chooses colours itself, by name."""


class Timeline:
    """Spans of wall-clock time on named tracks, of one or several runs. The time of each run begins at 0."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str, str, float, float]] = []
        """Run, track, name, begin and end (seconds since the run began)."""
        self._run, self._zero = "", math.inf

    @contextmanager
    def watching(self, run: str, offload: ExpertOffload | None) -> Iterator[None]:
        """Keeps the spans of a new run, and those of `offload`, for the length of a `with`. Outside of it none are kept."""
        self._run, self._zero = run, time.perf_counter()
        with nullcontext() if offload is None else offload.observed(Spans(self)):
            yield
        self._zero = math.inf

    def add(self, track: str, name: str, begin: float, end: float) -> None:
        """Adds a span between two readings of `time.perf_counter`. Several threads may call it at once."""
        if begin >= self._zero:
            self.spans.append((self._run, track, name, begin - self._zero, end - self._zero))

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Adds the length of a `with` as a span of the computation."""
        begin = time.perf_counter()
        yield
        self.add("computing", name, begin, time.perf_counter())

    def save(self, file: Path) -> None:
        """Writes all spans as JSON in Chrome's trace event format: each run is a process, and each track a thread."""
        runs = list(dict.fromkeys(span[0] for span in self.spans))
        tracks = sorted({span[1] for span in self.spans})
        events: list[dict[str, Any]] = []
        for pid, run in enumerate(runs):
            events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": run}})
            for tid, track in enumerate(tracks):
                events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": track}})
        for run, track, name, begin, end in sorted(self.spans, key=lambda span: (span[3], -span[4])):
            kind = track.split()[0]
            events.append(
                {
                    "ph": "X",
                    "name": name,
                    "cat": kind,
                    "cname": COLOURS.get(name.split()[0]) or COLOURS[kind],
                    "pid": runs.index(run),
                    "tid": tracks.index(track),
                    "ts": 1e6 * begin,
                    "dur": 1e6 * (end - begin),
                }
            )
        file.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")


class Spans(Observer):
    """Adds to a timeline what an offload on the CPU does. Each reader thread has a track, with its copies as `layer:expert`."""

    def __init__(self, timeline: Timeline):
        self._timeline = timeline

    def copy_over(self, key: Key, begin: float, end: float) -> None:
        track = f"copying {threading.current_thread().name.rpartition('-')[2]}"
        self._timeline.add(track, f"{key[0]}:{key[1]}", begin, end)

    def waited(self, key: Key, begin: float, end: float) -> None:  # noqa: ARG002
        self._timeline.add("computing", "wait for a copy", begin, end)

    def guessed(self, target: int, begin: float, end: float) -> None:
        self._timeline.add("computing", f"speculate {target}", begin, end)


@contextmanager
def spanning(
    model: PreTrainedModel, layers: list[MoELayer], span: Callable[[str], AbstractContextManager[Any]]
) -> Iterator[None]:
    """Has the model compute each of its parts within `span(name)`: `Timeline.span`, or torch's `record_function`.

    The parts are the whole model (`token`), each decoder layer, its router and its experts.
    """
    parts: list[tuple[nn.Module, str]] = [(model, "token")]
    for number, layer in enumerate(layers):
        parts += [(layer.decoder, f"layer {number}"), (layer.router, f"router {number}")]
        parts += [(layer.experts, f"experts {number}")]

    def within(name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with span(name):
            return original(*args, **kwargs)

    with ExitStack() as stack:
        for module, name in parts:
            stack.enter_context(override_forward(module, partial(within, name, module.forward)))
        yield


@contextmanager
def profiling(file: Path) -> Iterator[None]:
    """Writes what torch's profiler sees of the CUDA device (kernels, copies, `spanning`'s parts), in the same format."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        yield
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(file))
