"""The settings of `evaluate`, `bench` and `plan`. The help of the command line imports this, so it does not import torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ...predictors.settings import Bytes, Count, Dtype, Figures, Name, Output, Picture, Rate, Seed, Settings, Whole
from ..settings import Candidates, Gguf, Loading, Made, Offloading, Predicted, Quantized, Slots

PROMPT = "def mean(values):\n    total = 0.0\n    for value in values:\n        total +="


class Evaluating(Offloading):
    """How `evaluate` offloads a model."""

    candidates: Candidates | None = None
    """Candidates under gating `resident`: a number, or `auto`, which takes for each layer as many as the predictors' recall
    justifies; by default the top k + 2."""
    speculated_tokens: Whole = 10**12
    """In a forward pass over more tokens than this nothing is guessed. By default every token is speculated, as in decoding."""


class Measuring(Offloading):
    """How `bench` measures a model."""

    policies: str = "resident,on_demand,prefetch,speculative"
    """Ways to run the model: some of resident, on_demand, prefetch, auto, speculative (or speculative/true ...), accelerate."""
    tokens: Count = 64
    """Tokens that are measured in each round."""
    warmup: Whole = 8
    """Tokens before the measured ones."""
    rounds: Count = 3
    """How often each way is measured."""
    timeline: Output | None = None
    """Writes a timeline of a few more tokens of each policy to this .json file, for Perfetto. On CUDA each policy has its own
    file, with the policy in its name."""


class Drawn(Settings):
    """How a synthetic routing is drawn."""

    preset: str = "qwen3-30b-a3b"
    """Statistics of a synthetic routing: qwen3-30b-a3b (hit rate 0.89, caches hit as often as with the real model's routing) or
    moe-1b (hit rate 0.93, 0.38 kept and all other experts equally likely)."""
    kept: float | None = None
    """Share of experts that a token keeps from the previous one, all others being equally likely, in the place of how the preset
    draws. Caches then hit less often than with real routing."""
    hit_rate: float | None = None
    """Hit rate of the speculation, in the place of the preset's."""
    skew: float | None = None
    """How unequally popular the experts are that are not kept: a Zipf exponent, by default 0. Goes with `kept` or moe-1b."""


class BenchConfig(Made, Predicted, Measuring, Loading, Drawn, Figures):
    """Settings of `bench`."""

    routing: str | None = None
    """`model` (the model's own), `synthetic`, or the folder of a trace to replay; by default `model`, or `synthetic` with random
    weights."""
    prompt: str = PROMPT
    """Text to continue. A model with random weights gets random tokens instead."""
    plot: Picture | None = None
    """Draws the times into this .png, .pdf or .svg file."""


class PlanConfig(Predicted, Slots, Drawn, Gguf, Figures):
    """Settings of `plan`."""

    argument: ClassVar[str | None] = "model"

    model: Name
    """Config (.json file, folder or Hub name) of a mixture-of-experts model."""
    device_memory: Bytes | None = None
    """Memory of the device, like `24GiB`; by default what is free on this machine's."""
    link: Rate | None = None
    """Bandwidth from host memory to a GPU, or from the file to a CPU, like `25GB/s`; by default it is measured here."""
    memory_bandwidth: Rate | None = None
    """Bandwidth of the device's own memory, like `768GB/s`; by default it is measured here."""
    ram: Bytes | None = None
    """Memory of the host for experts of a model on a GPU; by default this machine's, or enough where `device_memory` is given."""
    disk: Rate | None = None
    """How fast a GPU's experts are read from a file where `ram` is too small for them; by default it is measured here."""
    launch: float | None = Field(None, ge=0)
    """Microseconds that starting one operation takes; by default 2.6 where a GPU decides what is copied, else 10."""
    latency: float | None = Field(None, ge=0)
    """Microseconds that one copy takes in addition to its bytes; by default 2 where a GPU decides, else 10."""
    slots: Count | None = None
    """Experts on the device at a time, over all layers, from the top k up; by default as many as fit."""
    candidates: Count | None = None
    """Experts to fetch for each speculated token; by default the top k, and 2 more under gating `resident`."""
    routing: str = "synthetic"
    """`synthetic`, or the folder of a trace, whose own routing then counts."""
    tokens: Count = 100
    """Tokens that count. As many tokens before them fill the slots."""
    cuda: bool | None = None
    """Whether the device is a GPU; by default it is where `device_memory` is given, or this machine has one. It decides what is
    copied if there is a slot for each expert that one token needs."""
    seed: Seed = 0
    """Seed of everything that is drawn."""
    dtype: Dtype = "auto"
    """`auto` (the config's own), `float32`, `bfloat16` or `float16`."""
    quantize: Quantized | None = None
    """What the experts are quantised to: `int8` or `int4`; by default they are not."""
