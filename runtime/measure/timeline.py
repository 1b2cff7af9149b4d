"""What happened when, as a trace for Chrome (chrome://tracing) or Perfetto: computing and copying side by side."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...predictors.architecture import MoELayer, override_forward
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
"""Chrome's names of them (blue, green, red, orange), by the first word of a span's name, or of its track. Perfetto colours by
name, whatever it is told."""


class Timeline:
    """Spans of wall-clock time on named tracks, of one or several runs that all begin at 0."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str, str, float, float]] = []
        """Run, track, name, begin and end (seconds since the run began)."""
        self._run, self._zero = "", 0.0
        self.active = False
        """Whether spans are kept."""

    def begin(self, run: str) -> None:
        """What is added from now on belongs to `run`, which begins now."""
        self._run, self._zero, self.active = run, time.perf_counter(), True

    def end(self) -> None:
        self.active = False

    def add(self, track: str, name: str, begin: float, end: float) -> None:
        """Adds a span between two readings of `time.perf_counter`; threads may do so at once."""
        if self.active and begin >= self._zero:
            self.spans.append((self._run, track, name, begin - self._zero, end - self._zero))

    @contextmanager
    def span(self, track: str, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(track, name, begin, time.perf_counter())

    def save(self, file: Path) -> None:
        """Writes all spans as JSON in Chrome's trace event format: a process a run, a thread a track."""
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
    """Puts what an offload on the CPU does on a timeline: each reader thread has a track, with copies as `layer:expert`."""

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
def watching(
    timeline: Timeline, model: PreTrainedModel, layers: list[MoELayer], offload: ExpertOffload | None
) -> Iterator[None]:
    """Puts what the model computes on the timeline, and what `offload` does for it. For a model on the CPU.

    Each token is a span, within it each decoder layer, and within it its router, the speculations made there, and its experts.
    """
    with ExitStack() as stack:
        _watch(stack, timeline, model, "token")
        for number, layer in enumerate(layers):
            for module, name in (
                (layer.decoder, f"layer {number}"),
                (layer.router, f"router {number}"),
                (layer.experts, f"experts {number}"),
            ):
                _watch(stack, timeline, module, name)
        if offload is not None:
            stack.enter_context(offload.observed(Spans(timeline)))
        yield


def _watch(stack: ExitStack, timeline: Timeline, module: torch.nn.Module, name: str) -> None:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with timeline.span("computing", name):
            return original(*args, **kwargs)

    original = stack.enter_context(override_forward(module, forward))


@contextmanager
def profiling(file: Path) -> Iterator[None]:
    """Writes kernels and copies of the CUDA device, as torch's profiler saw them, in the same format."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        yield
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(file))
