"""Threads that make copies, the urgent ones first.

Ctrl-C may interrupt the asking thread between any two steps. It must not leave a locked lock behind, or a copy that nobody
makes. So it takes no lock. All that it does to shared objects is a single step of the interpreter (`deque.append`,
`dict.setdefault`, `SimpleQueue.put`), and a reader that wakes makes all copies that are asked for.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

from ..errors import StoreError
from ..observer import Observer
from .cache import Key

POLL_SECONDS = 1.0
NEWEST = 0.02
"""The weight of the last copy in the mean."""


class Copy:
    """The copy of one expert into one slot. Its owner is the reader that makes it, or None where it was cancelled."""

    def __init__(self, slot: int, key: Key):
        self.slot, self.key = slot, key
        self.error: BaseException | None = None
        self._owner: dict[str, threading.Thread | None] = {}
        self._is_made = False
        self._made = threading.Lock()
        self._made.acquire()

    @property
    def has_begun(self) -> bool:
        return bool(self._owner)

    @property
    def is_over(self) -> bool:
        """Whether it was made, has failed or was cancelled."""
        return self._is_made or self._owner.get("owner", self) is None

    def cancel(self) -> bool:
        """Cancels the copy if it has not begun, and returns whether it is cancelled."""
        return self._owner.setdefault("owner", None) is None

    def make(self, copy: Callable[[Copy], None]) -> None:
        """Makes it, in a reader thread, unless it is cancelled or another reader makes it."""
        reader = threading.current_thread()
        if self.has_begun or self._owner.setdefault("owner", reader) is not reader:
            return
        try:
            copy(self)
        except BaseException as error:  # `wait` of the transfers raises it
            self.error = error
            traceback.clear_frames(error.__traceback__)  # else they hold the slot until the next garbage collection
        self._is_made = True
        self._made.release()

    def wait(self) -> bool:
        """Waits until it is over, but no more than a moment; returns whether it is over."""
        return self.is_over or self._made.acquire(timeout=POLL_SECONDS) or self.is_over

    def is_lost(self, readers: list[threading.Thread]) -> bool:
        """Whether no thread is left that could end it: a fork, or the end of the interpreter, ends threads silently."""
        alive = [thread for thread in readers if thread.is_alive()]
        owner = self._owner.get("owner")
        return not self.is_over and (not alive if owner is None else owner not in alive)


class Readers:
    """The reader threads, and the copies that they are asked for."""

    def __init__(self, count: int, copy: Callable[[Copy], None]):
        self.observer: Observer | None = None
        self.seconds: float | None = None
        """A running mean of what one copy takes. Where several are made beside each other, each counts from the end of the one before.
        Readers may overwrite each other's value, which does no harm."""
        self._last_end = 0.0
        self._copy = copy
        self._urgent: deque[Copy] = deque()
        self._others: deque[Copy] = deque()
        self._calls: SimpleQueue[None] = SimpleQueue()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"expert-reader-{number}", daemon=True) for number in range(count)
        ]
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError as error:
            self.close()
            raise StoreError(f"the system has not {count} threads left for readers; give fewer readers") from error

    def ask(self, copy: Copy, urgent: bool) -> None:
        """Asks for a copy. To make it urgent later, ask for it again."""
        (self._urgent if urgent else self._others).append(copy)
        self._calls.put(None)

    def wait(self, copy: Copy) -> None:
        """Returns when the copy is over. Raises `StoreError` where no thread is left to make it."""
        while not copy.wait():
            if copy.is_lost(self._threads):
                raise StoreError("a thread that reads experts is gone; detach the model and offload it again")
            self._calls.put(None)  # Ctrl-C may have come between the copy and its call

    def close(self) -> None:
        """Begins no further copy, and returns when those that have begun are over."""
        self._closed = True
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join()

    def _run(self) -> None:
        while True:
            self._calls.get()
            while not self._closed and (copy := self._next()) is not None:
                copy.make(self._timed)
            if self._closed:
                return

    def _timed(self, copy: Copy) -> None:
        begun = time.perf_counter()
        self._copy(copy)
        end = time.perf_counter()
        taken, self._last_end = end - max(begun, self._last_end), end
        self.seconds = taken if self.seconds is None else self.seconds + NEWEST * (taken - self.seconds)
        if (observer := self.observer) is not None:
            observer.copy_over(copy.key, begun, end)

    def _next(self) -> Copy | None:
        for queue in (self._urgent, self._others):
            with suppress(IndexError):  # it is empty, or another reader was faster
                return queue.popleft()
        return None
