"""The work of a simulated CUDA device: streams and events. A `Plan` decides when it does what it may do.

It respects what CUDA promises and nothing else: the order within a stream, and events.
"""

from __future__ import annotations

import random
import threading
from collections import Counter, deque
from collections.abc import Callable
from enum import StrEnum
from typing import ClassVar, NamedTuple, Self

import torch
from pages import CUDA, Cudart

Work = Callable[[], object]


class Plan(StrEnum):
    """When the device does its work. Each plan is an order that a real device might choose."""

    SERIAL = "serial"
    """At once."""
    RANDOM = "random"
    """Now and then some work of a stream that the seed chooses."""
    COPY_FIRST = "copy_first"
    """All streams but the first are as far ahead as they may be. The first does only what somebody waits for."""
    COMPUTE_FIRST = "compute_first"
    """The first stream is as far ahead as it may be. The others do only what somebody waits for."""
    LAZY = "lazy"
    """Every stream does only what somebody waits for."""


class Mark(NamedTuple):
    """The point in a stream's work where so much of it is done."""

    stream: Stream
    position: int

    @property
    def is_over(self) -> bool:
        return self.stream.done >= self.position

    def next(self) -> Stream:
        """The stream whose next work is needed to come closer to this point."""
        stream = self.stream
        while isinstance(head := stream.queue[0], Mark) and not head.is_over:
            stream = head.stream
        return stream


class Device:
    """The simulated device. Its first stream is the default one."""

    present: ClassVar[Device]
    """The one that there is within `simulated_cuda.simulated`."""

    def __init__(self, plan: Plan, seed: int, cudart: Cudart):
        self.waits: Counter[str] = Counter()
        """How often the host has waited for the device, by the operation that made it wait."""
        self.cudart, self.lock = cudart, threading.RLock()
        self.streams: list[Stream] = []
        self._plan, self._random, self._threads = plan, random.Random(seed), threading.local()

    @property
    def entered(self) -> list[Stream]:
        """The streams that the calling thread has entered, the current one last."""
        if not hasattr(self._threads, "entered"):
            self._threads.entered = self.streams[:1]
        return self._threads.entered

    def go_on(self) -> None:
        """Does as much work as the plan says. It is called whenever the host gives work or asks what is done."""
        with self.lock:
            if self._plan is Plan.RANDOM:
                for _ in range(self._random.choice((0, 0, 0, 0, 1, 2, 5))):
                    if ready := [stream for stream in self.streams if stream.is_ready]:
                        self._random.choice(ready).work()
                return
            ahead = {Plan.SERIAL: slice(None), Plan.COPY_FIRST: slice(1, None), Plan.COMPUTE_FIRST: slice(1)}
            streams = self.streams[ahead.get(self._plan, slice(0))]
            while ready := [stream for stream in streams if stream.is_ready]:
                ready[0].work()

    def wait(self, mark: Mark, reason: str) -> None:
        """Has the host wait."""
        with self.lock:
            self.waits[reason] += 1
            while not mark.is_over:
                if self._plan is Plan.RANDOM:
                    self._random.choice([stream for stream in self.streams if stream.is_ready]).work()
                else:
                    mark.next().work()
                self.go_on()

    def drain(self, reason: str) -> None:
        """Has the host wait for all that the current stream has been given."""
        self.wait(self.entered[-1].mark, reason)

    def synchronize(self, _: object = None) -> None:
        for stream in self.streams:
            self.wait(stream.mark, "synchronize")

    def can_read(self, memory: torch.Tensor) -> bool:
        """Whether host memory is registered, so that the device reads and writes it when it comes to it."""
        begin, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        return any(low <= begin and end <= low + size for low, size in self.cudart.registered.items())


class Stream:
    """`torch.cuda.Stream` and `torch.Stream`."""

    def __init__(self, *_: object):
        self.queue: deque[Work | Mark] = deque()
        self.count = self.done = 0
        self.freed: list[torch.Tensor] = []
        """Memory that its next tensors may get."""
        self.device, self._of = CUDA, Device.present
        self._of.streams.append(self)

    @property
    def mark(self) -> Mark:
        return Mark(self, self.count)

    @property
    def is_ready(self) -> bool:
        return bool(self.queue) and (not isinstance(head := self.queue[0], Mark) or head.is_over)

    def work(self) -> None:
        """Does the next work, or leaves a wait that is over."""
        work = self.queue.popleft()
        if not isinstance(work, Mark):
            with torch._C._DisableTorchDispatch(), torch._C._InferenceMode(True):
                work()
        self.done += 1

    def put(self, work: Work | Mark) -> None:
        with self._of.lock:
            self.queue.append(work)
            self.count += 1
            self._of.go_on()

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, other: Stream) -> None:
        self.put(other.mark)

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._of.wait(self.mark, "stream")

    def __enter__(self) -> Self:
        self._of.entered.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._of.entered.pop()


class Event:
    """`torch.cuda.Event` and `torch.Event`."""

    def __init__(self, enable_timing: bool = False):  # noqa: ARG002
        self._mark: Mark | None = None

    def record(self, stream: Stream | None = None) -> None:
        self._mark = (stream or Device.present.entered[-1]).mark

    def wait(self, stream: Stream | None = None) -> None:
        if self._mark is not None:
            (stream or Device.present.entered[-1]).put(self._mark)

    def query(self) -> bool:
        Device.present.go_on()
        return self._mark is None or self._mark.is_over

    def synchronize(self) -> None:
        if self._mark is not None:
            Device.present.wait(self._mark, "event")

    def elapsed_time(self, _: Event) -> float:
        return 1.0
