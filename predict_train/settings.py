"""The settings of the commands that use several rooms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from .data_collection.settings import EMBEDDED, Split
from .predictors.settings import Count, Figures, LocalPath, Name, Settings
from .runtime.measure.settings import Evaluating
from .runtime.settings import Named


class EvaluateConfig(Named, Evaluating, Figures):
    """Settings of `evaluate`, which has the experts in memory even where they are read from a packed file."""

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
