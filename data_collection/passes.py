"""The two ways to run a batch under the recorder, and which rows of the trace it gives.

prefill   all tokens of the batch at once
decode    the batch prompts the model; the tokens that it generates are fed back to it one at a time, with its cache,
          and these steps are recorded: the runtime meets the same distribution
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..predictors.architecture import MoELayer
from ..predictors.generation import refused, taken_over
from ..predictors.loading import check_tokens
from .batches import TokenBatch, sample_mask
from .columns import POSITION, SEQUENCE, TOKEN_IDS, Column, Columns, first_not_finite
from .hooks import LayerRecord, OverflowingExpertError, Recorder, Watch
from .settings import CollectConfig, CollectError


class Run(NamedTuple):
    """A model, its MoE layers and its tokenizer, and how to collect from it."""

    config: CollectConfig
    model: PreTrainedModel
    layers: list[MoELayer]
    tokenizer: PreTrainedTokenizerBase
    watch: Watch

    def recorder(self, targets: Iterable[int]) -> Recorder:
        """A new recorder for `targets`, indices of MoE layers."""
        return Recorder(self.layers, targets, self.config.inputs, self.watch)


def run_batch(model: PreTrainedModel, recorder: Recorder, batch: TokenBatch, config: CollectConfig) -> Columns:
    """Runs `batch` in the phase of `config`; returns its rows for the trace, on the CPU.

    The tokens that a model draws depend on the seed and the batch only, also in a resumed or shared collection. Raises
    `CollectError` if something to record is not finite.
    """
    check_tokens(batch.token_ids, model)
    torch.manual_seed(hash((config.seed, batch.number)) & 0x7FFF_FFFF_FFFF_FFFF)
    run = _decode if config.phase == "decode" else _prefill
    columns = run(model, recorder, batch, config)
    if found := first_not_finite(columns):
        layer, kind, row = found
        where = int(columns[POSITION][row]), int(columns[SEQUENCE][row])
        raise _overflow(f"{kind} of layer {layer}", *where, model.dtype)
    return columns


@contextmanager
def _told(model: PreTrainedModel, place: Callable[[int], tuple[int, int]]) -> Iterator[None]:
    """Turns an overflowing expert into a `CollectError`; `place` gives position and sequence of a row of the pass."""
    try:
        yield
    except OverflowingExpertError as error:
        what = f"output of expert {error.expert} of layer {error.layer}"
        raise _overflow(what, *place(error.row), model.dtype) from error


def _overflow(what: str, position: int, sequence: int, dtype: torch.dtype) -> CollectError:
    name = str(dtype).removeprefix("torch.")
    return CollectError(
        f"a value of the {what} is not finite at token {position} of sequence {sequence}, and nothing can be learned from it: "
        + (f"the model overflows in {name}; give --dtype bfloat16 or float32" if dtype == torch.float16
           else f"that is no overflow of {name} but the model's own fault; check its weights")
    )  # fmt: skip


def most_rows(batch: TokenBatch, config: CollectConfig) -> int:
    """The most rows that `run_batch` may give; in `prefill` the exact number."""
    return int(_kept(batch, config).sum())


def _kept(batch: TokenBatch, config: CollectConfig) -> torch.Tensor:
    """Which tokens to record, bool `[sequences, positions]`; in `decode`, the positions are those after the prompt."""
    if config.phase == "decode":
        mask = torch.ones(len(batch.token_ids), config.max_new_tokens, dtype=torch.bool)
        start = batch.token_ids.shape[1]
    else:
        mask, start = batch.mask(), 0
    if config.sample < 1:
        sequence = torch.arange(batch.first, batch.first + len(mask)).unsqueeze(1)
        position = torch.arange(start, start + mask.shape[1]).unsqueeze(0)
        mask &= sample_mask(config.seed, sequence, position, config.sample)
    return mask


def _prefill(model: PreTrainedModel, recorder: Recorder, batch: TokenBatch, config: CollectConfig) -> Columns:
    kept = _kept(batch, config)
    recorder.keep(None if kept.all() else kept.flatten())
    # The body without the head: logits over a large vocabulary cost more than a layer and are not needed.
    with _told(model, lambda row: (row % batch.token_ids.shape[1], batch.first + row // batch.token_ids.shape[1])):
        model.base_model(input_ids=batch.token_ids.to(model.device), use_cache=False)
    columns = layer_columns(recorder.take(), recorder.sources)
    sequence, position = kept.nonzero(as_tuple=True)
    columns[TOKEN_IDS] = batch.token_ids[kept].int()
    columns[POSITION] = position.int()
    columns[SEQUENCE] = (batch.first + sequence).int()
    return columns


def arguments_of(config: GenerationConfig, max_new_tokens: int) -> dict[str, Any]:
    """The arguments of `generate` for one pass of each sequence a token, as a model's generation `config` asks.

    Temperature 0 means greedy. How long a text is, neither a clock nor a word decides. Raises `UserError` for what would need
    other passes.
    """
    if config.stop_strings:
        raise refused("stop strings")
    if config.guidance_scale not in (None, 1):
        raise refused("guidance")
    # The last token that is drawn is never fed back, so no router sees it.
    own = {"max_new_tokens": max_new_tokens + 1, "do_sample": config.temperature != 0, "max_time": None}
    return taken_over(config, **own)


def _decode(model: PreTrainedModel, recorder: Recorder, batch: TokenBatch, config: CollectConfig) -> Columns:
    step = _Steps(recorder, batch, _kept(batch, config), _ends(model))
    prompt = batch.token_ids.to(model.device)
    assert model.generation_config is not None
    with _told(model, step.place):
        model.generate(  # type: ignore[operator]
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            pad_token_id=int(prompt[0, 0]),  # any token: nothing is recorded after a sequence's end
            logits_processor=LogitsProcessorList([_Finite(step, model.dtype)]),
            stopping_criteria=StoppingCriteriaList([step]),
            **arguments_of(model.generation_config, config.max_new_tokens),
        )
    return {name: torch.cat([columns[name] for columns in step.columns]) for name in step.columns[0]}


class _Steps(StoppingCriteria):
    """`generate` calls it after each pass and draw: it takes the records of the pass and prepares the next one.

    It stops nothing. `generate` offers no other hook after each pass.
    """

    def __init__(self, recorder: Recorder, batch: TokenBatch, kept: torch.Tensor, ends: list[int]):
        self.recorder, self.batch, self.kept, self.ends = recorder, batch, kept, torch.tensor(ends)
        self.columns: list[Columns] = []
        """Of each step, including that of the prompt, which has no rows."""
        self.running = torch.ones(len(kept), dtype=torch.bool)
        self.mask = torch.zeros(len(kept), dtype=torch.bool)
        recorder.keep(torch.zeros(batch.token_ids.numel(), dtype=torch.bool))  # nothing of the prompt

    @property
    def length(self) -> int:
        """How many tokens of each sequence the pass reads that runs now."""
        return 1 if self.columns else self.batch.token_ids.shape[1]

    def place(self, row: int) -> tuple[int, int]:
        """Position and sequence of a row of the pass that runs now."""
        start = self.batch.token_ids.shape[1] + len(self.columns) - 1 if self.columns else 0
        return start + row % self.length, self.batch.first + row // self.length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # noqa: ARG002
        columns = layer_columns(self.recorder.take(), self.recorder.sources)
        position = input_ids.shape[1] - 2  # of the token that was fed; the last one has just been drawn
        columns[TOKEN_IDS] = input_ids[:, position].cpu()[self.mask].int()
        columns[POSITION] = torch.full_like(columns[TOKEN_IDS], position)
        columns[SEQUENCE] = (self.batch.first + self.mask.nonzero().flatten()).int()
        self.columns.append(columns)
        self.running &= ~torch.isin(input_ids[:, -1].cpu(), self.ends)
        step = len(self.columns) - 1
        if step < self.kept.shape[1]:
            self.mask = self.running & self.kept[:, step]
            self.recorder.keep(self.mask)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Finite(LogitsProcessor):
    """Raises `CollectError` before a draw from logits that are not finite: the draw itself would crash."""

    def __init__(self, steps: _Steps, dtype: torch.dtype):
        self.steps, self.dtype = steps, dtype

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        wrong = (scores.isnan() | scores.isposinf()).any(-1).cpu() & self.steps.running
        if not wrong.any():
            return scores
        found = self.steps.recorder.first_not_finite()
        what = "logits of the model" if found is None else f"residual of layer {found[0]}"
        row = int(wrong.nonzero()[0]) * self.steps.length if found is None else found[1]
        raise _overflow(what, *self.steps.place(row), self.dtype)


def _ends(model: PreTrainedModel) -> list[int]:
    """The ids that end a generation, as `generate` knows them."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def layer_columns(records: dict[int, LayerRecord], sources: dict[int, int | None]) -> Columns:
    """The columns of one forward pass, on the CPU; `sources` gives each target's source."""
    columns: Columns = {}
    used_as_source = set(sources.values())
    for layer, record in records.items():
        floats = {Column.EXPERT_WEIGHTS: record.routing.weights, Column.INPUT: record.input}
        if layer in used_as_source:
            floats |= {Column.RESIDUAL: record.residual, Column.INNER: record.inner}
        if layer in sources:
            floats |= {Column.ROUTER_LOGITS: record.routing.logits}
        columns[Column.EXPERT_IDS.of(layer)] = record.routing.ids.to("cpu", torch.int16)
        columns |= {
            column.of(layer): tensor.to(torch.bfloat16).cpu() for column, tensor in floats.items() if tensor is not None
        }
    return columns
