"""The settings of the commands that use several rooms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from .data_collection.settings import EMBEDDED, CollectConfig, Split
from .predictors.settings import Count, Device, Dtype, Figures, LocalPath, Name, Settings
from .runtime.measure.settings import Evaluating
from .runtime.settings import Loading, Named, Room


class CollectingConfig(CollectConfig, Loading, Room):
    """Settings of `collect`.

    The model is on the device whole, unless one of `pack`, `quantize`, `gguf`, `slots` and `expert_memory` is given, or the store is `host`:
    then its experts pass through slots, and the trace is the same.
    """

    device: Device = "auto"
    """`auto` (CUDA where there is one), `cpu` or `cuda`."""
    dtype: Dtype = "auto"
    """`auto` (the packed file's, if there is one, or else the checkpoint's on CUDA and float32 on a CPU), `float32`, `bfloat16` or
    `float16`."""

    @property
    def is_offloaded(self) -> bool:
        """Whether experts pass through slots."""
        given = self.pack, self.quantize, self.gguf, self.slots, self.expert_memory
        return self.store == "host" or any(value is not None for value in given)

    def decides(self) -> dict[str, Any]:
        return super().decides() | {"quantize": self.quantize, "gguf": None if self.gguf is None else str(self.gguf)}


class EvaluateConfig(Named, Evaluating, Figures):
    """Settings of `evaluate`. The model is on the device whole, unless `pack` or `quantize` is given."""

    corpus: Name = EMBEDDED
    """Whatever `collect` takes as a corpus."""
    split: Split = "held_out"
    """Of the embedded corpus: `train` or `held_out`."""
    tokens: Annotated[Count, Field(ge=2)] = 20_000
    """How many tokens to run each way."""
    sequence_length: Annotated[Count, Field(ge=2)] = 256
    """The most tokens of a sequence."""
    batch_size: Count = 16
    """Sequences of a forward pass."""


class DemoConfig(Settings):
    """Settings of `demo`."""

    out: LocalPath = Path("checkpoints/demo")
    """Folder for everything the demo writes; a demo that stands there is replaced."""
    tokens: Annotated[Count, Field(ge=20_000)] = 200_000
    """Tokens to collect."""
