"""The settings of `collect`. This module imports no torch: the help of the command line needs none."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from ..predictors.errors import UserError
from ..predictors.settings import Bytes, Count, Device, Dtype, Layers, LocalPath, Name, Seed, Settings

EMBEDDED = "embedded"

Split = Literal["train", "held_out"]
Phase = Literal["prefill", "decode"]


class CollectError(UserError):
    """A collection that is not possible as asked; the message says why and what to do."""


class CollectConfig(Settings):
    """Settings of `collect`."""

    argument: ClassVar[str | None] = "model"

    model: Name
    """Folder or Hub name of a mixture-of-experts model."""
    out: LocalPath
    """The trace's folder; it must not exist, or be empty, unless the collection is resumed."""
    resume: bool = False
    """Go on with the unfinished trace in `out`, if there is one; every other setting must be what it was."""
    corpus: Name | list[Name] = EMBEDDED
    """`embedded`, a text file, a folder, a glob, a .jsonl, .json, .csv or .parquet file, a folder of `save_to_disk`, or a Hub
    dataset as name:config:split. A list (the flag given again) mixes them, each as path@weight, by shares of the
    text."""
    split: Split = "train"
    """Of the embedded corpus: `train` or `held_out`."""
    text_column: str = "text"
    """The column with the text, or the chat, of a corpus of rows; without it `messages` or `conversations` is read."""
    tokens: Count = 400_000
    """How many tokens to run (`decode`: to generate, in whole prompts' worth); fewer where the corpus has fewer."""
    sample: float = Field(1.0, gt=0, le=1)
    """The probability with which each token that was run is recorded."""
    max_bytes: Bytes | None = None
    """The most bytes that the trace may have, like `20GB`; the collection then ends with the last whole batch."""
    phase: Phase = "prefill"
    """`prefill` records whole sequences of the corpus, `decode` what the model generates when its documents prompt it."""
    max_new_tokens: Count = 128
    """Of `decode`: tokens generated from each prompt. The prompt has the rest of `sequence_length` at most."""
    concatenate: bool = False
    """Let documents follow one another in a sequence; otherwise a sequence holds tokens of one document only."""
    layers: Layers = "all"
    """Target layers: `all`, numbers like 0,1 or 0-3, or `auto`: those whose training-free hit rate is below `threshold`."""
    threshold: float = Field(0.9, gt=0, le=1)
    """The training-free hit rate below which `auto` takes a layer."""
    inputs: bool = False
    """Record every target's own input, for `fit --source layer_input`; else only that of targets without a source."""
    sequence_length: Count = 256
    """The most tokens of a sequence; a longer document is cut into several, each beginning at position 0."""
    batch_size: Count = 16
    """Sequences of a forward pass; of shorter ones there are more, of as many tokens in all."""
    shard_bytes: Bytes = 256 << 20
    """Bytes of a shard, like `256MiB`; an interruption costs at most the computing of a few of them."""
    device: Device = "auto"
    """`auto` (CUDA where there is one), `cpu` or `cuda`."""
    device_map: Literal["auto"] | None = None
    """`auto` spreads a model that is larger than one GPU over all of them."""
    dtype: Dtype = "auto"
    """`auto` (the checkpoint's on CUDA, float32 on a CPU), `float32`, `bfloat16` or `float16`."""
    seed: Seed = 0
    """Of the sample and of what is generated; the text is read in a fixed order."""

    @property
    def corpora(self) -> list[str]:
        return [self.corpus] if isinstance(self.corpus, str) else self.corpus

    @property
    def batch_tokens(self) -> int:
        """Tokens of a full batch."""
        return self.batch_size * self.sequence_length

    def decides(self) -> dict[str, Any]:
        """The settings that decide what is recorded: all except `out`, `resume`, and where a subclass keeps the experts.

        A whole model is not quantised here, so a subclass says of one that is.
        """
        own = self.model_dump(mode="json", include=set(CollectConfig.model_fields) - {"out", "resume"})
        return own | {"corpus": self.corpora, "quantize": None, "gguf": None}


class ModelsConfig(Settings):
    """Settings of `models`."""

    markdown: bool = False
    """Print the tables of the README instead."""
