"""The settings of `evaluate`, `bench` and `plan`. No torch is imported here: the command line's help needs none of it."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ...predictors.settings import Bytes, Count, Dtype, Figures, Name, Output, Picture, Rate, Settings, Whole
from ..settings import Candidates, Loading, Made, Offloading, Predicted, Slots

PROMPT = "def mean(values):\n    total = 0.0\n    for value in values:\n        total +="


class Evaluating(Offloading):
    """How `evaluate` offloads a model."""

    candidates: Candidates | None = None
    """Of gating `resident`: a number, or `auto`, which takes for each layer as many as its recall in the predictors says are
    worth it; by default the top k + 2."""
    speculated_tokens: Whole = 10**12
    """A forward pass over more tokens than this is a prompt, which is executed exactly; by default every token is
    speculated, as if it were being decoded."""


class Measuring(Offloading):
    """How `bench` measures a model."""

    policies: str = "resident,on_demand,prefetch,speculative"
    """Ways to run it: of resident, on_demand, prefetch, auto, speculative (or speculative/true ...), accelerate."""
    tokens: Count = 64
    """Tokens that are counted in each round."""
    warmup: Whole = 8
    """Tokens before them."""
    rounds: Count = 3
    """How often each way has its turn."""
    timeline: Output | None = None
    """Writes a trace of a few more tokens of each policy, for Perfetto, to this .json file; on CUDA there is one a policy, with
    its name in the file's."""


class Drawn(Settings):
    """A routing that is drawn."""

    preset: str = "qwen3-30b-a3b"
    """Statistics of a synthetic routing: qwen3-30b-a3b (0.43 kept, hit rate 0.89) or moe-1b."""
    kept: float | None = None
    """Share of experts kept from the previous token, over the preset's."""
    hit_rate: float | None = None
    """Hit rate of the speculation, over the preset's."""
    skew: float | None = None
    """Zipf exponent of how popular experts are, over the preset's, which is 0."""


class BenchConfig(Made, Predicted, Measuring, Loading, Drawn, Figures):
    """Settings of `bench`."""

    routing: str | None = None
    """`model` (its own), `synthetic`, or the folder of a trace to replay; by default the model's own, and synthetic with
    random weights."""
    prompt: str = PROMPT
    """Text to go on from; a model that is made up has random tokens."""
    plot: Picture | None = None
    """Draws the times to this .png, .pdf or .svg."""


class PlanConfig(Predicted, Slots, Drawn, Figures):
    """Settings of `plan`."""

    argument: ClassVar[str | None] = "model"

    model: Name
    """Config (.json file, folder or Hub name) of a mixture-of-experts model."""
    device_memory: Bytes
    """Of the device, like `24GiB`."""
    link: Rate
    """From host memory (or the file) to the device, like `25GB/s`."""
    memory_bandwidth: Rate
    """Of the device's own memory, like `768GB/s`."""
    reserve: Bytes = 1 << 30
    """Device memory for activations and the keys and values."""
    launch: float = Field(10.0, ge=0)
    """Microseconds that starting one operation takes."""
    latency: float = Field(10.0, ge=0)
    """Microseconds of one copy beside its bytes."""
    slots: Count | None = None
    """Experts on the device at a time, over all layers, from the top k up; by default as many as fit."""
    candidates: Count | None = None
    """Experts fetched for each speculated token; by default the top k, and 2 more under gating `resident`."""
    routing: str = "synthetic"
    """`synthetic`, or the folder of a trace to replay."""
    tokens: Count = 100
    """Tokens that count, behind as many that fill the slots."""
    cuda: bool = True
    """Whether copies go through a CUDA stream, or threads read them."""
    seed: int = 0
    """Of whatever is drawn."""
    dtype: Dtype = "auto"
    """`auto` (the config's own), `float32`, `bfloat16` or `float16`."""
