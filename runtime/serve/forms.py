"""The requests of OpenAI's interface, as far as they can be answered, and its errors.

A field that changes the answer and is not known here is refused, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..settings import Penalty, Sampling

IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
"""Fields that change no answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}
"""Fields that are not known, with the values that ask for nothing; so does null."""


class RequestError(Exception):
    """A request that can't be answered, in the form of OpenAI's errors."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            status, "server_error" if status >= 500 else "invalid_request_error"
        )
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


Token = Annotated[int, Field(ge=0, lt=2**31)]
MOST_STOPS, LONGEST_STOP = 16, 200
"""What a request may ask for. transformers compares each character of each stop text with its whole vocabulary before the first token."""


class StreamOptions(BaseModel):
    include_usage: bool = False
    include_obfuscation: bool = False


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: Penalty | None = None
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _nothing_unknown(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, neutral in NEUTRAL.items():
            if name in values and values[name] is not None and values[name] not in neutral:
                raise ValueError(f"{name} is not supported here; leave it out")
        return {name: value for name, value in values.items() if name not in NEUTRAL and name not in IGNORED}

    @field_validator("stop")
    @classmethod
    def _some_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if isinstance(stop, list) and not all(stop):
            raise ValueError("stop holds an empty text")
        if len(stops) > MOST_STOPS or any(len(text) > LONGEST_STOP for text in stops):
            raise ValueError(f"stop holds up to {MOST_STOPS} texts of up to {LONGEST_STOP} characters")
        return stop or None

    def sampling(self, default: Sampling, most: int) -> Sampling:
        """How to draw its answer, of up to `most` tokens. What it does not say is as in `default`."""
        asked = self.max_completion_tokens or self.max_tokens or min(default.max_new_tokens, most)
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop")
        said = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        values = default.model_dump(include={*Sampling.model_fields}) | {"max_new_tokens": asked} | said
        if values["temperature"] == 0:  # whoever asks for greedy answers may leave the rest as it is
            values |= dict.fromkeys(("top_k", "top_p", "min_p"))
        return Sampling(**values)


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None
    refusal: None = None
    """Answers have this field, and clients send them back."""
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: list[None] | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates read it."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Request):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)


class CompletionRequest(_Request):
    """The body of `/v1/completions`."""

    prompt: str | list[Token] | list[str]

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if isinstance(self.prompt, list) and self.prompt and isinstance(self.prompt[0], str):
            if len(self.prompt) > 1:
                raise ValueError("only one prompt can be completed at a time")
            self.prompt = self.prompt[0]
        if not self.prompt:
            raise ValueError("the prompt is empty")
        return self


def parsed(kind: type[_Request], body: bytes) -> Any:
    """The request of `kind` in a body. Raises `RequestError`."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        # Of a value that may have several types, the error that lies deepest is that of the type which was meant.
        first = max(error.errors(include_url=False, include_input=False), key=lambda found: len(found["loc"]))
        place = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("list[", "str", "function-")))
        message = first["msg"].removeprefix("Value error, ")
        raise RequestError(400, f"{place}: {message}" if place else message, place or None) from error
