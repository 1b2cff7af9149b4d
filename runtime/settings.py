"""The settings of a model with its experts offloaded, each said once: Python's arguments, YAML's keys and flags are these."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ..predictors.settings import (
    Bytes,
    Count,
    Device,
    Dtype,
    Horizon,
    LocalPath,
    Name,
    Settings,
    Whole,
    choice,
    parse_count,
)
from .automatic import AUTO
from .host.cache import Eviction
from .policy import Gating, Policy


def _candidates(value: Any) -> Any:
    if value == "auto":
        return value
    try:
        number = parse_count(value)
    except ValueError:
        number = None
    if not isinstance(number, int) or number < 1:
        raise ValueError("give a number or auto")
    return number


Candidates = Annotated[int | Literal["auto"], BeforeValidator(_candidates)]
PolicyName = Annotated[Policy | Literal["auto"], choice("policies", *Policy, AUTO)]


class Predicted(Settings):
    """Of a job that speculates."""

    predictors: Name | None = None
    """Folder or Hub name of predictors; without them speculation is training-free."""


class Slots(Settings):
    """Which experts are on the device, and which are fetched."""

    slots: Count | None = None
    """Experts on the device at a time, over all layers, from the top k up; by default a quarter of them all."""
    expert_memory: Bytes | None = None
    """In the place of `slots`: the memory of the device that experts may take, like `8GiB`."""
    candidates: Candidates | None = None
    """Experts fetched for each speculated token: a number, or `auto`, which takes for each layer as many as its recall in
    the predictors says are worth it; by default the top k, and 2 more under gating `resident`."""
    horizon: Horizon | None = None
    """How many MoE layers ahead is guessed, 1 or 2; by default what the predictors were trained for, or else 1. With 2 a copy
    has two layers' time, and a training-free guess is right less often."""
    eviction: Annotated[Eviction, choice("evictions", *Eviction)] = Eviction.LEAST_STALE
    """Which expert makes room for another: `least_stale` (of the layer whose next use is farthest) or `lru`."""

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.slots is not None and self.expert_memory is not None:
            raise ValueError("expert_memory and slots say the same; give one of them")
        return self


class Offloading(Slots):
    """How experts get to the device, whatever the policy."""

    speculated_tokens: Whole = 16
    """A forward pass over more tokens than this is a prompt: it is executed exactly, streaming the experts through the slots,
    since it needs nearly all of them and a guess saves nothing."""
    readers: Count = 2
    """Threads that copy on the CPU or read a file."""
    device: Device = "auto"
    """Where the model computes: `auto` (CUDA where there is one), `cpu` or `cuda`."""


class OffloadConfig(Offloading):
    """What `offload_experts` takes beside a model, its predictors and a store."""

    policy: PolicyName = Policy.PREFETCH
    """`on_demand` and `prefetch` are exact, and so is `auto`: it measures both on the first decoded tokens, by turns, and
    goes on with the faster. `speculative` executes what is there, which changes tokens."""
    gating: Annotated[Gating, choice("gatings", *Gating)] = Gating.TRUE
    """What weights experts under `speculative`: `speculated` (the paper's), `true` (the router's weights of the guess) or
    `resident` (the router's choice among the experts on the device)."""


class Loading(Settings):
    """Where a model's weights come from, and where its experts stay."""

    dtype: Dtype = "auto"
    """`auto` (the packed file's, if there is one, and else the checkpoint's own), `float32`, `bfloat16` or `float16`."""
    store: Annotated[Literal["auto", "host", "file"], choice("stores", "auto", "host", "file")] = "auto"
    """Where the experts are: `host` keeps them in host memory, `file` leaves them in the packed file; `auto` is `file` where
    `pack` is given."""
    pack: LocalPath | None = None
    """Keeps the experts in this packed file, which is made where there is none."""
    seed: int = 0
    """Of whatever is drawn, random weights included."""

    @model_validator(mode="after")
    def _one_store(self) -> Self:
        if self.store == "file" and self.pack is None:
            raise ValueError(
                "the store is a file, and none is named; give pack=PATH, which is made if it does not exist"
            )
        if self.store == "host" and self.pack is not None:
            raise ValueError(
                "a packed file is named, and the store is host memory; give one of pack=PATH and store=host"
            )
        return self


class LoadConfig(OffloadConfig, Loading):
    """What `load_offloaded` takes beside a model and its predictors."""


class Named(Predicted, Loading):
    """Of a command that runs a checkpoint and computes in float32 on a CPU, many of which crawl in bfloat16."""

    argument: ClassVar[str | None] = "model"

    model: Name
    """Folder or Hub name of a mixture-of-experts model."""
    dtype: Dtype = "auto"
    """`auto` (the packed file's, if there is one, and else the checkpoint's own on CUDA and float32 on a CPU), `float32`,
    `bfloat16` or `float16`."""


class GenerateConfig(Named, LoadConfig):
    """Settings of `generate`."""

    prompt: str
    """Text to go on from."""
    max_new_tokens: Count = 128
    """The most tokens to generate."""
    temperature: float = Field(0.0, ge=0)
    """Of the sampling; 0 is greedy."""
    policy: PolicyName = Policy.SPECULATIVE

    @model_validator(mode="after")
    def _some_prompt(self) -> Self:
        if not self.prompt:
            raise ValueError("the prompt is empty; give --prompt some text to go on from")
        return self


class Made(Settings):
    """Of a command that runs a checkpoint or a model that is made up."""

    argument: ClassVar[str | None] = "model"

    model: Name | None = None
    """Folder or Hub name of a mixture-of-experts model."""
    random_weights: Name | None = None
    """Instead of MODEL: the config (.json file, folder or Hub name) of a model to make up."""

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if (self.model is None) == (self.random_weights is None):
            raise ValueError("give a MODEL, or --random-weights with the config of one to make up, and not both")
        return self


class PackConfig(Made):
    """Settings of `pack`."""

    out: LocalPath
    """The packed file; it must be new."""
    dtype: Dtype = "auto"
    """`auto` (the checkpoint's own), `float32`, `bfloat16` or `float16`."""
    seed: int = 0
    """Of random weights."""
