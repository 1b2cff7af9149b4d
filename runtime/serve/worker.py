"""The one thread in which the server's model runs, and the places in front of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generate import Generation, generate
from ..promptcache import PromptCache
from ..settings import Sampling
from .forms import RequestError


@dataclass
class Job:
    """An answer to be made."""

    ids: list[int]
    """The tokens of its prompt."""
    sampling: Sampling
    seed: int
    on_text: Callable[[str], None] = lambda _: None
    """Is called in the worker's thread."""
    is_given_up: threading.Event = field(default_factory=threading.Event)
    """Set where nobody waits for the answer any more."""


class Worker:
    """Makes answers one after another. Several threads may ask it."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, most_waiting: int):
        self.model, self.tokenizer = model, tokenizer
        self.places = 0
        """Requests that wait or are being answered."""
        self._most = most_waiting + 1
        self._kept = PromptCache(model)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in front of the model, for the length of a `with`. Raises `RequestError` where all are taken."""
        if self.places >= self._most:
            raise RequestError(429, f"{self._most} requests are waiting or being answered already; try again later")
        self.places += 1
        try:
            yield
        finally:
            self.places -= 1

    def begin(self, job: Job) -> Future[Generation | None]:
        """Begins a job when those before it are over. Its result is None if it was given up before it began."""
        return self._thread.submit(self._run, job)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _run(self, job: Job) -> Generation | None:
        if job.is_given_up.is_set():
            return None
        cache = self._kept.take(job.ids)
        ids = torch.tensor([job.ids])
        result = generate(
            self.model, self.tokenizer, ids, job.sampling, job.seed, job.on_text, job.is_given_up.is_set, cache
        )
        self._kept.keep([*job.ids, *result.token_ids[:-1]], cache)
        return result
