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
from ..offload import ExpertOffload
from ..store import Bytes, ExpertStore

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


class WatchedStore:
    """A store whose reads are put on a timeline, a track for each thread that reads, as `layer:expert`."""

    def __init__(self, store: ExpertStore, timeline: Timeline):
        self.layout = store.layout
        self._store, self._timeline = store, timeline

    def read(self, layer: int, expert: int, into: Bytes) -> None:
        track = f"copying {threading.current_thread().name.rpartition('-')[2]}"
        with self._timeline.span(track, f"{layer}:{expert}"):
            self._store.read(layer, expert, into)

    def restore(self) -> None:
        self._store.restore()

    def close(self) -> None:
        self._store.close()


@contextmanager
def watching(
    timeline: Timeline, model: PreTrainedModel, layers: list[MoELayer], offload: ExpertOffload | None
) -> Iterator[None]:
    """Puts what the model computes on the timeline, and where `offload` waits for a copy. For a model on the CPU.

    Each token is a span, within it each decoder layer, and within it its router, the speculations made there, and its experts.
    """
    numbers = {layer.index: number for number, layer in enumerate(layers)}
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
            transfers: Any = offload._slots.transfers
            original = transfers.wait

            def wait(slot: int) -> None:
                if transfers.copying(slot):
                    with timeline.span("computing", "wait for a copy"):
                        original(slot)
                else:
                    original(slot)

            transfers.wait = wait
            stack.callback(delattr, transfers, "wait")
            control: Any = offload._control
            speculate = control._speculate

            def speculated(target: MoELayer, *states: Any) -> None:
                with timeline.span("computing", f"speculate {numbers[target.index]}"):
                    speculate(target, *states)

            control._speculate = speculated
            stack.callback(delattr, control, "_speculate")
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
