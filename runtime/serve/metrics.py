"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..generate import Generation
from .worker import Worker

SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts requests and answers. Experts are counted for the tokens of an answer after its first."""

    def __init__(self, worker: Worker):
        self._registry = CollectorRegistry()
        named: Any = {"namespace": "predict_train", "registry": self._registry}
        self.requests = Counter("requests", "Requests that have ended.", ["path", "status"], **named)
        places = Gauge("places", "Requests that wait or are being answered.", **named)
        places.set_function(lambda: worker.places)
        self._prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **named)
        self._tokens = Counter("generated_tokens", "Tokens of answers.", **named)
        self._first = Histogram(
            "first_token_seconds", "Time to the first token of an answer.", buckets=SECONDS, **named
        )
        self._each = Histogram("token_seconds", "Median time per token of an answer.", buckets=SECONDS, **named)
        self._hits = Counter("expert_hits", "Executed experts that were in a slot or on their way.", **named)
        self._misses = Counter(
            "expert_misses", "Executed experts whose copy began only when they were needed.", **named
        )
        self._copies = Counter(
            "expert_copies", "Experts copied, each of which took another's slot or an empty one.", **named
        )
        self._bytes = Counter("copied_bytes", "Bytes of copied experts.", **named)
        self._stalled = Counter("stalled_seconds", "Time that computation waited for copies.", **named)
        self._guessed = Gauge("guess_hit_rate", "Share of the routers' choices that was guessed, last answer.", **named)

    def answered(self, prompt_tokens: int, result: Generation) -> None:
        """Counts an answer."""
        counters = result.counters
        self._prompt_tokens.inc(prompt_tokens)
        self._tokens.inc(len(result.token_ids))
        self._first.observe(result.seconds_to_first_token)
        if result.seconds_per_output_token is not None:
            self._each.observe(result.seconds_per_output_token)
        for counter, value in (
            (self._hits, counters.hits),
            (self._misses, counters.misses),
            (self._copies, counters.copies),
            (self._bytes, counters.bytes_copied),
            (self._stalled, counters.stalled_seconds or 0.0),
        ):
            counter.inc(value)
        if counters.speculation_hit_rate is not None:
            self._guessed.set(counters.speculation_hit_rate)

    def text(self) -> bytes:
        """Everything in Prometheus' format."""
        return generate_latest(self._registry)
