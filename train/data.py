"""A trace's rows as batches. Validation rows are whole sequences, so that no sequence is on both sides.

Batches are drawn at random from a few shards at a time, so only these need to be in memory. Several batches are read at
once, with one gather for each column and shard, not one item a row.

For predictors with a memory, a batch is made of runs of consecutive tokens, not of single rows. A row remembers the rows before it
in its run, so no row is read twice. The first row of a run remembers nothing; by this the predictors learn to do without.
"""

from __future__ import annotations

import copy
import os
import signal
from typing import Any, NamedTuple

import lightning
import torch
from torch.utils.data import DataLoader, Dataset

from ..data_collection.columns import SEQUENCE, Columns
from ..data_collection.trace import Piece, Trace
from ..predictors.errors import UserError

MIXED_SHARDS = 4
RUN = 4
"""Tokens of a run in training, for each token that is remembered."""
BLOCK_BYTES = 8 << 20
"""About the bytes of a block, at least one batch: reading takes a call for each column and shard."""


class FitError(UserError):
    """A fit that is not possible as asked; the message says why and what to do."""


def held_out_sequences(count: int, share: float, seed: int) -> torch.Tensor:
    """Which of `count` sequences are for validation, bool `[count]`: at least one, never all.

    Raises `FitError` if there are fewer than two.
    """
    if count < 2:
        raise FitError("the trace has a single sequence, and validation needs one of its own; collect more tokens")
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(count, dtype=torch.bool)
    mask[chosen[: min(count - 1, max(1, round(share * count)))]] = True
    return mask


class Block(NamedTuple):
    """Rows that are read at once: batch `i` of `n` is every `n`-th run of them, starting with the `i`-th."""

    pieces: list[Piece]
    runs: torch.Tensor
    """The number of each row's run, int64 `[rows]`, over all pieces."""
    batches: int


def plan_blocks(
    rows: list[torch.Tensor],
    batch_size: int,
    row_bytes: int,
    generator: torch.Generator | None,
    run: int = 1,
    places: list[torch.Tensor] | None = None,
) -> list[Block]:
    """Blocks of batches of about `batch_size` rows of `row_bytes`, each row in exactly one; `rows` holds each shard's rows.

    Up to `run` consecutive tokens stay together; `places` holds each row's place among them (`places_of`), by default all rows of
    a shard are consecutive. With a generator, the order of these runs is random, drawn from `MIXED_SHARDS` shards at a time, and so
    is where the first one ends; else it is that of `rows`.
    """
    order = list(range(len(rows))) if generator is None else torch.randperm(len(rows), generator=generator).tolist()
    at_once, run = max(1, BLOCK_BYTES // (batch_size * row_bytes)), min(run, batch_size)
    blocks: list[Block] = []
    for start in range(0, len(order), MIXED_SHARDS):
        group = order[start : start + MIXED_SHARDS]
        count = max(1, round(sum(len(rows[shard]) for shard in group) / batch_size))
        ends = [min(count, end) for end in range(at_once, count + at_once, at_once)]
        parts = []
        for shard in group:
            place = torch.arange(len(rows[shard])) if places is None else places[shard]
            parts.append(_shared_out(place, run, [end / count for end in ends], generator))
        for begin, end, *shares in zip([0, *ends], ends, *parts, strict=False):
            pieces, before = [], 0
            runs: list[torch.Tensor] = []
            for shard, share in zip(group, shares, strict=True):
                if len(share.rows):
                    pieces.append((shard, rows[shard][share.rows]))
                    runs.append(share.runs + before)
                    before += share.in_all
            if pieces:
                blocks.append(Block(pieces, torch.cat(runs), min(end - begin, before)))
    return blocks


class _Share(NamedTuple):
    """A block's share of a shard's rows."""

    rows: torch.Tensor
    """Rising numbers of rows, which are read faster in this order."""
    runs: torch.Tensor
    """The number of each row's run, from 0 up."""
    in_all: int
    """Runs."""


def places_of(token: torch.Tensor) -> torch.Tensor:
    """The place of each row in its stretch of consecutive tokens, from 0 up, int64 `[rows]`; for `token` see `Trace.by_token`."""
    number = torch.arange(len(token))
    begins = torch.zeros_like(number)
    begins[1:] = torch.where(token.diff() == 1, 0, number[1:])
    return number - begins.cummax(0).values if len(token) else number


def _shared_out(place: torch.Tensor, run: int, ends: list[float], generator: torch.Generator | None) -> list[_Share]:
    """The rows of a shard in runs, shared out to blocks; `ends` are the shares of the rows up to each block's end."""
    first = 0 if generator is None else int(torch.randint(run, (1,), generator=generator))
    number = ((place == 0) | ((place + first) % run == 0)).cumsum(0) - 1
    count = int(number[-1]) + 1 if len(number) else 0
    if generator is not None:
        number = torch.randperm(count, generator=generator)[number]
    cuts = [int(count * end) for end in ends]
    block = torch.bucketize(number, torch.tensor(cuts), right=True)
    order, sizes = block.sort(stable=True).indices, torch.bincount(block, minlength=len(ends)).tolist()
    return [
        _Share(own, number[own] - begin, end - begin)
        for own, begin, end in zip(order.split(sizes), [0, *cuts], cuts, strict=False)
    ]


class Rows(NamedTuple):
    """The rows of a step that one process has."""

    columns: Columns
    in_all: int
    """Rows of the step, over all processes."""


class TraceBlocks(Dataset[tuple[Columns, torch.Tensor, Block]]):
    """Item `i` is the block `i` of a plan, with its columns and the batch of each of their rows. Each of `world` processes
    reads every `world`-th run of each batch: together they make the same steps as a single process.

    Only the shards of the last block stay mapped, in a `Trace` that no other reader uses.
    """

    def __init__(self, trace: Trace, plan: list[Block], names: list[str], rank: int = 0, world: int = 1):
        self.trace, self.plan, self.names = copy.copy(trace), plan, names
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> tuple[Columns, torch.Tensor, Block]:
        block = self.plan[number]
        own = block.runs // block.batches % self.world == self.rank
        parts = own.split([len(rows) for _, rows in block.pieces])
        pieces = [(shard, rows[part]) for (shard, rows), part in zip(block.pieces, parts, strict=True)]
        self.trace.unmap(but=[shard for shard, _ in pieces])
        return self.trace.gather(pieces, self.names), block.runs[own] % block.batches, block


class TraceLoader(DataLoader[Any]):
    """The batches of `TraceBlocks`, as `Rows`."""

    dataset: TraceBlocks

    def __len__(self) -> int:
        return sum(block.batches for block in self.dataset.plan)

    def __iter__(self) -> Any:
        for columns, batch, block in super().__iter__():
            in_all = torch.bincount(block.runs % block.batches, minlength=block.batches).tolist()
            for number, total in enumerate(in_all):
                every = (batch == number).nonzero().flatten()
                yield Rows({name: column.index_select(0, every) for name, column in columns.items()}, total)
        self.dataset.trace.unmap()


class TraceData(lightning.LightningDataModule):
    """Training batches, in another order in each epoch, and validation batches of a trace, with columns for `sources`.

    With a `memory`, the runs of validation are whole sequences, unless these are longer than a batch: every row remembers what it
    would in a running model.
    """

    def __init__(
        self,
        trace: Trace,
        sources: dict[int, int | None],
        batch_size: int,
        validation: float,
        seed: int,
        workers: int,
        memory: int = 0,
    ):
        super().__init__()
        self.trace, self.batch_size, self.seed, self.workers = trace, batch_size, seed, workers
        self.memory, self.names = memory, trace.columns_for(sources, memory)
        held_out = held_out_sequences(trace.manifest.sequences, validation, seed)
        self.train_rows: list[torch.Tensor] = []
        self.validation_rows: list[torch.Tensor] = []
        self._places: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
        """Of the rows of training and of validation."""
        for shard in range(len(trace.manifest.shards)):
            sequence = trace.column(shard, SEQUENCE).long()
            token, order = trace.by_token(shard) if memory else [torch.arange(len(sequence))] * 2
            is_held_out = held_out[sequence[order]]
            for chosen, rows, places in zip(
                (~is_held_out, is_held_out), (self.train_rows, self.validation_rows), self._places, strict=True
            ):
                rows.append(order[chosen])
                places.append(places_of(token[chosen]))
        trace.unmap()
        for name, found in (("training", self.train_rows), ("validation", self.validation_rows)):
            if not any(map(len, found)):
                raise FitError(
                    f"the {name} sequences have no rows, since {trace.path} is a small sample; give another --validation or "
                    "--seed, or collect more tokens"
                )

    def train_dataloader(self) -> TraceLoader:
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return self._loader(generator)

    def val_dataloader(self) -> TraceLoader:
        return self._loader(None)

    def _loader(self, generator: torch.Generator | None) -> TraceLoader:
        """The batches of training, in an order drawn with the generator; without it those of validation."""
        rank, world = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        rows, places = (self.train_rows, self._places[0]) if generator else (self.validation_rows, self._places[1])
        run = 1
        if self.memory:
            most = max(1, self.batch_size // world)  # with longer ones some processes would have no rows
            run = min(RUN * self.memory, most) if generator else most
        plan = plan_blocks(rows, self.batch_size, self.trace.row_bytes(self.names), generator, run, places)
        blocks = TraceBlocks(self.trace, plan, self.names, rank, world)
        return TraceLoader(
            blocks,
            batch_size=None,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_end_quietly,
        )


def _end_quietly(_: int) -> None:
    """Has a reading process end without an error on SIGTERM, which a cluster sends to all processes of a job."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
