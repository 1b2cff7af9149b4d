"""The settings of `fit`, `export` and `inspect`. This module imports no torch: the help of the command line needs none."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ..predictors.settings import (
    Count,
    Device,
    Figures,
    Horizon,
    Layers,
    LocalPath,
    Memory,
    Name,
    Picture,
    Seed,
    Settings,
    Whole,
    is_written,
    parse_bytes,
)

Source = Literal["quasi_hidden", "layer_input"]


class FitConfig(Settings):
    """Settings of `fit`."""

    argument: ClassVar[str | None] = "trace"

    trace: LocalPath
    """The folder that `collect` wrote."""
    out: LocalPath
    """The run's folder; it must not exist, unless the run is resumed."""
    resume: bool = False
    """Go on with the run in `out` from its last whole epoch."""
    layers: Layers = "all"
    """Target layers: `all`, numbers like 0,1 or 0-3, or `auto`: those whose training-free hit rate is below `threshold`."""
    threshold: float = Field(0.9, gt=0, le=1)
    """The training-free hit rate below which `auto` takes a layer."""
    source: Source = "quasi_hidden"
    """What is corrected: the source layer's `quasi_hidden` state, or the target's own `layer_input`, known only later."""
    horizon: Horizon = 1
    """How many MoE layers ahead of its target the source is, 1 or 2."""
    width: Count = 320
    """Hidden width of each predictor."""
    memory: Memory = 1
    """How many tokens back a predictor remembers what the target's router decided and how wrong the guess was: 0, 1 or 2."""
    form: Literal["correcting", "direct"] | None = None
    """How predictors guess: `correcting` the state that the target's router reads, or `direct` from a router's input to the scores of the
    next one. By default `correcting` where the model's residual can be followed, since it is better there, and else `direct`."""
    budget: str | None = None
    """Instead of a width: the size of all predictors in bfloat16, like `2MB`, or like `1%` of the model's weights
    without its routed experts. Layers that are hard to guess get more of it."""
    loss: Literal["kl", "bce", "ranking", "choice"] | None = None
    """What is minimised: `kl`, `bce`, `ranking` or `choice`; see `train.losses`. By default `kl`, and `choice` for direct predictors of
    routers that do not choose by what they return as their logits."""
    epochs: Count = 5
    """The most times that each row is seen."""
    patience: Count = 3
    """Training ends early after so many epochs in a row without a better mean hit rate on validation."""
    batch_size: Count = 512
    """Rows of a step; every row trains all layers."""
    learning_rate: float = Field(5e-3, gt=0)
    """The highest of a one-cycle schedule."""
    weight_decay: float = Field(0.01, ge=0)
    """Of AdamW."""
    reuse: bool = True
    """Train reuse predictors too, which say what slots should keep (eviction `learned`); of all layers of the trace."""
    validation: float = Field(0.1, gt=0, lt=1)
    """Share of the sequences that is kept for validation."""
    seed: Seed = 0
    """Of the split, the order and the initial weights."""
    device: Device = "auto"
    """`auto` (CUDA where there is one), `cpu` or `cuda`."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """`bf16-mixed` computes the predictors in bfloat16, and all else, weights included, in fp32 (`32-true`); `auto`
    does so where the device has instructions for it."""
    devices: Annotated[Count, Field(le=64)] = 1
    """Processes that train together on each node, one a device."""
    num_nodes: Count = 1
    """Nodes that train together, each started with the same command (by torchrun or SLURM)."""
    strategy: str = "auto"
    """Lightning's name for the way they train together: `auto`, or a kind of `ddp`."""
    workers: Annotated[Whole, Field(le=256)] = 0
    """Processes that read the trace; 0 reads it in the main process, which is enough for a CPU."""

    @field_validator("budget")
    @classmethod
    def _budget_has_a_unit(cls, budget: str | None, info: ValidationInfo) -> str | None:
        if budget is not None and not budget.endswith("%") and is_written(info):
            try:
                parse_bytes(budget)
            except ValueError as error:
                raise ValueError(f"{error}, or a share like 1%") from error
        return budget


class ExportConfig(Settings):
    """Settings of `export`."""

    argument: ClassVar[str | None] = "run"

    run: LocalPath
    """The folder that `fit` wrote."""
    out: LocalPath
    """The predictors' folder; it must be new."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the predictors' weights in the file: `float32` or `bfloat16`; default vectors are fp32."""
    trace: LocalPath | None = None
    """Where the trace is, if it was moved since."""
    also: LocalPath | None = None
    """Another run on the same trace, as one with the other form: of each layer that both trained, the predictor with the higher validation
    hit rate is exported."""


class InspectConfig(Figures):
    """Settings of `inspect`."""

    argument: ClassVar[str | None] = "path"

    path: LocalPath
    """The folder that `collect`, `fit` or `export` wrote."""
    plot: Picture | None = None
    """Draws hit rate by layer, and of a trace the expert loads, to this .png, .pdf or .svg."""
    rows: Count | None = None
    """Of a trace: how many rows training-free hit rates are measured on; by default 32,768."""
    keep: bool = False
    """Of a trace: measure too how often slots hit by the rule that says who keeps them, up to Belady's, which knows the future."""
    predictors: Name | None = None
    """With `keep`: the predictors whose reuse predictors are measured too."""

    @model_validator(mode="after")
    def _keep_is_asked(self) -> Self:
        if self.predictors is not None and not self.keep:
            raise ValueError("predictors are for what slots keep; give keep too")
        return self
