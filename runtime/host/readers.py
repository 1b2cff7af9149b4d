"""Threads that make copies, the urgent ones first.

The thread that asks may be interrupted (Ctrl-C) between any two steps, and may not leave a lock behind or a copy that
nobody makes. So it takes no lock: what is shared is a step that the interpreter does as one (`deque.append`,
`dict.setdefault`, `SimpleQueue.put`), and every reader that is woken takes all there is to do.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from ..errors import StoreError
from .cache import Key

POLL_SECONDS = 1.0


class Copy:
    """One expert on its way into one slot. It belongs to the reader that makes it, or to nobody once it is cancelled."""

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
        """Whether it was made, failed or was cancelled."""
        return self._is_made or self._owner.get("owner", self) is None

    def cancel(self) -> bool:
        """Whether the copy had not begun; then it never will."""
        return self._owner.setdefault("owner", None) is None

    def make(self, copy: Callable[[Copy], None]) -> None:
        """Makes it, in a reader thread, unless it is cancelled or another makes it."""
        if self.has_begun or self._owner.setdefault("owner", threading.current_thread()) is not (
            threading.current_thread()
        ):
            return
        try:
            copy(self)
        except BaseException as error:  # whoever waits for the copy is told
            self.error = error
        self._is_made = True
        self._made.release()

    def wait(self) -> bool:
        """Waits a moment, or until it is over, which it returns."""
        return self.is_over or (self._made.acquire(timeout=POLL_SECONDS) or self.is_over)

    def is_lost(self, readers: list[threading.Thread]) -> bool:
        """Whether no thread is left that could end it: a fork, or an interpreter that ends, takes them without a word."""
        alive = [thread for thread in readers if thread.is_alive()]
        owner = self._owner.get("owner")
        return not self.is_over and (not alive if owner is None else owner not in alive)


class Readers:
    """The threads, and what they are asked for."""

    def __init__(self, count: int, copy: Callable[[Copy], None]):
        self._copy = copy
        self._urgent: deque[Copy] = deque()
        self._others: deque[Copy] = deque()
        self._calls: SimpleQueue[None] = SimpleQueue()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"expert-reader-{number}", daemon=True) for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def ask(self, copy: Copy, urgent: bool) -> None:
        """Asks for a copy; a second time to make it urgent."""
        (self._urgent if urgent else self._others).append(copy)
        self._calls.put(None)

    def wait(self, copy: Copy) -> None:
        """Returns when the copy is over. Raises `StoreError` where no thread is left to make it."""
        while not copy.wait():
            if copy.is_lost(self._threads):
                raise StoreError("a thread that reads experts is gone; detach the model and offload it again")
            self._calls.put(None)  # whoever asked for it may have been interrupted before the call

    def close(self) -> None:
        """Begins no other copy; returns when those that have begun are over."""
        self._closed = True
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _run(self) -> None:
        while True:
            self._calls.get()
            while not self._closed and (copy := self._next()) is not None:
                copy.make(self._copy)
            if self._closed:
                return

    def _next(self) -> Copy | None:
        for queue in (self._urgent, self._others):
            try:
                return queue.popleft()
            except IndexError:  # another reader may have been faster
                continue
        return None
