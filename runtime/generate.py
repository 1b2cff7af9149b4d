"""Generates text with an offloaded model, and measures what each token costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import Cache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from ..predictors.errors import UserError
from ..predictors.generation import CACHE, taken_over
from ..predictors.loading import check_tokens
from .engine import Counters
from .offload import ExpertOffload
from .settings import Sampling
from .stops import Stops

COLDEST = 1e-5
"""Colder temperatures are greedy: logits divided by them would soon not be finite."""


@dataclass(frozen=True)
class Generation:
    """Generated text and its figures. Times are wall-clock seconds. Figures per token are of the tokens after the first."""

    text: str
    """The generated text, without the prompt."""
    token_ids: list[int]
    """The generated tokens."""
    finish_reason: str
    """`stop` where the model ended it or a stop text was found, or else `length`."""
    seconds_to_first_token: float
    seconds_per_output_token: float | None
    """The median. None where only one token was generated."""
    bytes_per_token: float | None
    """Bytes of experts copied to the device."""
    stalled_seconds_per_token: float | None
    counters: Counters
    """Of the tokens after the first one, which comes from the prompt."""
    steps: str | None = None
    """On a GPU: `captured and replayed`, or why decode steps were not. None on a CPU."""

    def figures(self) -> dict[str, str]:
        """The figures as text for a person, by name."""
        told: dict[str, tuple[Any, Callable[[Any], str]]] = {
            "time to first token": (self.seconds_to_first_token, lambda x: f"{x * 1000:.1f} ms"),
            "time per output token": (self.seconds_per_output_token, lambda x: f"{x * 1000:.1f} ms (median)"),
            "hit rate": (
                self.counters.speculation_hit_rate,
                "{:.3f} of the router's experts were among the candidates".format,
            ),
            "copied per token": (self.bytes_per_token, lambda x: f"{x / 1e6:,.1f} MB"),
            "stalled per token": (self.stalled_seconds_per_token, lambda x: f"{x * 1000:.2f} ms"),
        }
        if self.steps is not None:
            told["decode steps"] = (self.steps, str)
        return {name: "none" if value is None else text(value) for name, (value, text) in told.items()}


class _Streamer(TextStreamer):
    """Passes on each finished word, and notes when each token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Stops, offload: ExpertOffload | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stops, self._offload = stops, offload
        self.times: list[float] = []
        self.token_ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            if not self.times and self._offload is not None:
                self._offload.reset()  # the prompt is measured by the time to first token
            self.times.append(time.perf_counter())
            self.token_ids += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._stops.put(text)
        if stream_end:
            self._stops.end()


def arguments_of(config: GenerationConfig, sampling: Sampling) -> dict[str, Any]:
    """The arguments for a model's `generate`, with what its `config` asks for. Raises `UserError` for what can't be streamed."""
    own = sampling.model_dump(include={"max_new_tokens", "top_k", "top_p", "min_p", "repetition_penalty"})
    if sampling.temperature is not None:
        own |= (
            {"do_sample": True, "temperature": sampling.temperature}
            if sampling.temperature >= COLDEST
            else {"do_sample": False}
        )
    elif {"top_k", "top_p", "min_p"} & sampling.model_fields_set:
        own["do_sample"] = True
    own["stop_strings"] = sampling.stops or None
    return taken_over(config, **{name: value for name, value in own.items() if value is not None})


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | torch.Tensor,
    sampling: Sampling = Sampling(),  # noqa: B008  # it never changes
    seed: int = 0,
    on_text: Callable[[str], None] = lambda _: None,
    is_over: Callable[[], bool] = lambda: False,
    cache: Cache | None = None,
) -> Generation:
    """Continues `prompt`, a text or its token ids `[1, tokens]`, with a model, offloaded or not.

    What `sampling` does not say is taken from the model's generation config; see `predictors.generation`. `on_text` gets the
    text as it comes, and a stop text and what follows it are not part of it. After each token `is_over` can end it. `cache` may hold the keys and values of the first tokens of the prompt, and then holds those of all tokens
    but the last. Raises `UserError` for an empty prompt, for one that the model has no tokens for, and where the generation
    config asks for what can't be streamed.
    """
    assert model.generation_config is not None
    arguments = arguments_of(model.generation_config, sampling)
    token_ids = prompt if isinstance(prompt, torch.Tensor) else tokenizer(prompt, return_tensors="pt")["input_ids"]
    if token_ids.shape[-1] == 0:
        raise UserError("the prompt is empty; give --prompt some text to go on from")
    check_tokens(token_ids, model)
    offload: ExpertOffload | None = vars(model).get("expert_offload")
    streamer = _Streamer(tokenizer, Stops(sampling.stops, on_text), offload)
    torch.manual_seed(seed)
    begun = time.perf_counter()
    model.generate(  # type: ignore[operator]  # transformers' mix-in is hidden by nn.Module's __getattr__
        token_ids.to(model.device),
        attention_mask=torch.ones_like(token_ids, device=model.device),
        streamer=streamer,
        tokenizer=tokenizer,  # for stop strings
        stopping_criteria=[lambda ids, *_, **__: torch.full((len(ids),), is_over(), device=ids.device)],
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **arguments,
        **({} if cache is None else {CACHE: cache}),
    )
    steps = [after - before for before, after in pairwise(streamer.times)]
    counters = offload.counters if offload is not None else Counters()
    stalled = counters.stalled_seconds
    text = str(tokenizer.decode(streamer.token_ids, skip_special_tokens=True))
    ends = model.generation_config.eos_token_id
    is_ended = streamer.token_ids[-1] in (ends if isinstance(ends, list) else [ends])
    for stop in sampling.stops:
        text, found, _ = text.partition(stop)
        is_ended = is_ended or bool(found)
    return Generation(
        text=text,
        token_ids=streamer.token_ids,
        finish_reason="stop" if is_ended else "length",
        seconds_to_first_token=streamer.times[0] - begun,
        seconds_per_output_token=statistics.median(steps) if steps else None,
        bytes_per_token=counters.bytes_copied / len(steps) if steps else None,
        stalled_seconds_per_token=stalled / len(steps) if steps and stalled is not None else None,
        counters=counters,
        steps=_steps(offload),
    )


def _steps(offload: ExpertOffload | None) -> str | None:
    if offload is None or offload.device.type == "cpu":
        return None
    return offload.why_not_captured or "captured and replayed"
