"""The settings of a model with offloaded experts. Python's arguments, YAML's keys and the flags are made from these fields."""

from __future__ import annotations

import os
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ..predictors.settings import (
    Bytes,
    Count,
    Device,
    Dtype,
    Figures,
    Horizon,
    LocalPath,
    Name,
    Seed,
    Settings,
    Whole,
    choice,
    parse_count,
)
from .automatic import AUTO
from .host.cache import Eviction
from .policy import Gating, Policy
from .quantization import Quantization


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
Quantized = Annotated[Quantization, choice("quantisations", *Quantization)]
Penalty = Annotated[float, Field(ge=0.01, le=100)]
"""Beyond, logits would soon not be finite."""
PolicyName = Annotated[Policy | Literal["auto"], choice("policies", *Policy, AUTO)]


class Predicted(Settings):
    """Settings of a job that speculates."""

    predictors: Name | None = None
    """Folder or Hub name of predictors. Without them speculation is training-free."""


class Room(Settings):
    """How much room the experts have."""

    slots: Count | None = None
    """Experts on the device at a time, of all layers together, at least the top k. By default as many as fit beside the other
    weights, the keys and values of `context` tokens and a reserve; on a CPU with the experts in memory, a quarter of them."""
    expert_memory: Bytes | None = None
    """In the place of `slots`: how much memory of the device experts may take, like `8GiB`."""
    context: Count = 4096
    """Tokens whose keys and values are to fit beside the experts, where neither `slots` nor `expert_memory` is given."""
    reserve: Bytes | None = None
    """Memory of the device to leave for activations then; by default 1 GiB, or an eighth of what is free if that is less."""
    host_memory: Bytes | None = None
    """How much host memory experts of a packed file may take, like `12GiB`: those that are asked for most stand there. By default
    none do."""

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.slots is not None and self.expert_memory is not None:
            raise ValueError("expert_memory and slots say the same; give one of them")
        return self


class Slots(Room):
    """Which experts are on the device, and which are fetched."""

    candidates: Candidates | None = None
    """Experts to fetch for each speculated token: a number, or `auto`, which takes for each layer as many as the predictors'
    recall justifies; by default the top k, and 2 more under gating `resident`."""
    horizon: Horizon | None = None
    """How many MoE layers ahead to guess, 1 or 2; by default what the predictors were trained for, or else 1. With 2 a copy has
    the time of two layers, but a training-free guess is right less often."""
    eviction: Annotated[Eviction, choice("evictions", *Eviction)] = Eviction.LEAST_STALE
    """Which expert gives up its slot for another one. `least_stale`: the one used longest ago in the layer that runs again last, which
    is the one that has just run; but a layer with more than an equal share of the slots gives first. `frequency`: in that layer, the
    one used least often in the last tokens. `lru`: of all layers, the one used longest ago. `followers`: of all layers, the one that
    least often follows on the experts of its layer's last token, as counted while the model runs. `learned`: of all layers, the one
    used again last, as predictors that were trained with `fit --reuse` say. `followers` and `learned` need a model that computes on a
    CPU."""


class Offloading(Slots):
    """How experts get to the device, whatever the policy."""

    speculated_tokens: Whole = 16
    """In a forward pass over more tokens than this nothing is guessed, and all experts pass through the slots: it needs nearly
    all of them, so a guess would save nothing. Prompts are exact, however short."""
    readers: Annotated[Count, Field(le=1024)] = 2
    """Number of threads that copy experts on the CPU or read them from a file."""
    device: Device = "auto"
    """Where the model computes: `auto` (CUDA where there is one), `cpu` or `cuda`."""


class OffloadConfig(Offloading):
    """The settings of `offload_experts`."""

    policy: PolicyName = Policy.PREFETCH
    """`on_demand` and `prefetch` are exact. So is `auto`: on a CPU it copies a guess ahead only where that is expected to save time,
    and on a GPU it tries both in turn on the first decoded tokens and then uses the faster one. `speculative` executes the guessed
    experts, which changes tokens."""
    gating: Annotated[Gating, choice("gatings", *Gating)] = Gating.TRUE
    """Where the experts' weights come from under `speculative`: `speculated` (from the guess, as in the paper), `true` (from the
    router, for the guessed experts) or `resident` (from the router, which chooses among the experts on the device)."""


class Gguf(Settings):
    """Settings of a command that can read a GGUF file."""

    gguf: LocalPath | None = None
    """GGUF file to take the weights from, or its name in the model's folder. Its experts are kept in the file's types. The config
    and the tokenizer are those of the model."""


class Loading(Gguf):
    """Where a model's weights come from, and where its experts stay."""

    dtype: Dtype = "auto"
    """`auto` (the packed file's, if there is one, or else the checkpoint's), `float32`, `bfloat16` or `float16`."""
    store: Annotated[Literal["auto", "host", "file"], choice("stores", "auto", "host", "file")] = "auto"
    """Where to keep the experts: `host` (in host memory), `file` (in the packed file) or `auto`, which is `file` if `pack` is
    given."""
    pack: LocalPath | None = None
    """Packed file to keep the experts in. It is made if it does not exist."""
    quantize: Quantized | None = None
    """Bits of the experts' weights: `int8` (nearly without loss) or `int4` (a quarter of the bytes of bfloat16). By default they
    are as in the packed file, or else as in the checkpoint. All other weights stay as they are."""
    seed: Seed = 0
    """Seed of everything that is drawn, random weights included."""

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
    """The settings of `load_offloaded`."""


class Named(Predicted, Loading):
    """Settings of a command that runs a checkpoint. On a CPU it computes in float32, since many CPUs are slow in bfloat16."""

    argument: ClassVar[str | None] = "model"

    model: Name
    """Folder or Hub name of a mixture-of-experts model."""
    dtype: Dtype = "auto"
    """`auto` (the packed file's, if there is one, or else the checkpoint's on CUDA and float32 on a CPU), `float32`, `bfloat16`
    or `float16`."""


class Sampling(Settings):
    """How the next token is chosen. What is None is as the model's generation config says."""

    max_new_tokens: Count = 128
    """The most tokens to generate."""
    temperature: float | None = Field(0.0, ge=0)
    """Temperature of the sampling; 0 is greedy, and so is less than 0.00001."""
    top_k: Count | None = None
    """Draw from this many tokens, the likeliest ones."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Draw from the likeliest tokens that have this much probability together."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Draw from the tokens that are at least this many times as likely as the likeliest one."""
    repetition_penalty: Penalty | None = None
    """Above 1, tokens that were there before become less likely."""
    stop: str | list[str] | None = None
    """Text after which generation ends. The flag may be given several times."""

    @model_validator(mode="after")
    def _something_to_draw(self) -> Self:
        narrowed = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.temperature == 0 and narrowed:
            raise ValueError(
                f"{narrowed[0]} says what to draw from, and nothing is drawn at temperature 0; give a temperature"
            )
        if not all(self.stops):
            raise ValueError("stop is an empty text; leave it out")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Generating(Named, LoadConfig, Sampling):
    """Settings of a command that generates text."""

    policy: PolicyName = Policy.SPECULATIVE


class GenerateConfig(Generating, Figures):
    """Settings of `generate`."""

    prompt: str | list[str]
    """Text to continue; `-` stands for what comes from standard input. The flag may be given several times."""
    chat: bool = False
    """Take each prompt as a message of a user, in the form that the model's chat template gives it."""

    @model_validator(mode="after")
    def _some_prompt(self) -> Self:
        if not self.prompts or not all(self.prompts):
            raise ValueError("the prompt is empty; give --prompt some text to go on from")
        return self

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class ChatConfig(Generating):
    """Settings of `chat`."""

    system: str | None = None
    """A system message: what the model should know or be in all its answers."""
    max_new_tokens: Count = 1024
    """The most tokens of an answer."""
    temperature: float | None = Field(None, ge=0)
    """Temperature of the sampling; 0 is greedy. By default it is as the model's generation config says."""


class ServeConfig(Generating):
    """Settings of `serve`."""

    host: str = "127.0.0.1"
    """The address to listen at. With another one than this machine's own, give an API key."""
    port: int = Field(8000, ge=0, lt=2**16)
    """The port to listen at; 0 takes any that is free."""
    api_key: str | None = Field(None, min_length=1)
    """Clients must send this key. Others can read a command's flags: better give it in the file of settings, or as
    PREDICT_TRAIN_API_KEY in the environment."""
    queue: Whole = 16
    """The most requests that wait while one is answered; more are refused with status 429."""
    max_request: Bytes = 4 << 20
    """The most bytes of a request."""
    max_new_tokens: Count = 1024
    """The most tokens of an answer where the request does not say."""
    temperature: float | None = Field(None, ge=0)
    """Temperature of the sampling where the request does not say; 0 is greedy. By default it is as the model's generation config
    says."""

    @property
    def key(self) -> str | None:
        """The API key, if one is asked for."""
        return self.api_key or os.environ.get("PREDICT_TRAIN_API_KEY") or None


class Made(Settings):
    """Settings of a command that runs a checkpoint, or a model with random weights."""

    argument: ClassVar[str | None] = "model"

    model: Name | None = None
    """Folder or Hub name of a mixture-of-experts model."""
    random_weights: Name | None = None
    """In the place of MODEL: the config (.json file, folder or Hub name) of a model with random weights."""

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if (self.model is None) == (self.random_weights is None):
            raise ValueError("give a MODEL, or --random-weights with the config of one to make up, and not both")
        return self


class PackConfig(Made, Gguf):
    """Settings of `pack`."""

    out: LocalPath
    """The packed file to write. It must not exist yet."""
    dtype: Dtype = "auto"
    """`auto` (the checkpoint's), `float32`, `bfloat16` or `float16`."""
    quantize: Quantized | None = None
    """Bits of the packed weights: `int8` (nearly without loss) or `int4` (a quarter of the bytes of bfloat16); by default they are
    packed as they are."""
    seed: Seed = 0
    """Seed of random weights."""
