"""A trace's rows as batches. Validation rows are whole sequences, so that no sequence is on both sides.

Batches are drawn at random from a few shards at a time, so only these need to be in memory. Several batches are read at
once, with one gather for each column and shard, not one item a row.
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
    """Rows that are read at once: batch `i` of `n` is every `n`-th of them, starting with the `i`-th."""

    pieces: list[Piece]
    batches: int


def plan_blocks(
    rows: list[torch.Tensor], batch_size: int, row_bytes: int, generator: torch.Generator | None
) -> list[Block]:
    """Blocks of batches of about `batch_size` rows of `row_bytes`, each row in exactly one; `rows` holds each shard's rows.

    With a generator, the order is random, drawn from `MIXED_SHARDS` shards at a time; else it is the trace's order.
    """
    order = list(range(len(rows))) if generator is None else torch.randperm(len(rows), generator=generator).tolist()
    at_once = max(1, BLOCK_BYTES // (batch_size * row_bytes))
    blocks: list[Block] = []
    for start in range(0, len(order), MIXED_SHARDS):
        group = order[start : start + MIXED_SHARDS]
        count = max(1, round(sum(len(rows[shard]) for shard in group) / batch_size))
        ends = [min(count, end) for end in range(at_once, count + at_once, at_once)]
        parts = []
        for shard in group:
            shuffled = rows[shard]
            if generator is not None:
                shuffled = shuffled[torch.randperm(len(shuffled), generator=generator)]
            # A row's place in the block decides its batch. Rows in rising order are read faster.
            cuts = [len(shuffled) * end // count for end in ends[:-1]]
            parts.append([piece.sort().values for piece in shuffled.tensor_split(cuts)])
        for begin, end, *pieces in zip([0, *ends], ends, *parts, strict=False):
            own = [(shard, piece) for shard, piece in zip(group, pieces, strict=True) if len(piece)]
            if own:
                blocks.append(Block(own, min(end - begin, sum(len(piece) for _, piece in own))))
    return blocks


class Rows(NamedTuple):
    """The rows of a step that one process has."""

    columns: Columns
    in_all: int
    """Rows of the step, over all processes."""


class TraceBlocks(Dataset[tuple[Columns, Block]]):
    """Item `i` is the block `i` of a plan, with its columns. Each of `world` processes reads every `world`-th row of
    each batch: together they make the same steps as a single process.

    Only the shards of the last block stay mapped, in a `Trace` that no other reader uses.
    """

    def __init__(self, trace: Trace, plan: list[Block], names: list[str], rank: int = 0, world: int = 1):
        self.trace, self.plan, self.names = copy.copy(trace), plan, names
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> tuple[Columns, Block]:
        block, before, pieces = self.plan[number], 0, []
        for shard, rows in block.pieces:
            place = torch.arange(before, before + len(rows))
            pieces.append((shard, rows[place // block.batches % self.world == self.rank]))
            before += len(rows)
        self.trace.unmap(but=[shard for shard, _ in pieces])
        return self.trace.gather(pieces, self.names), block


class TraceLoader(DataLoader[Any]):
    """The batches of `TraceBlocks`, as `Rows`."""

    dataset: TraceBlocks

    def __len__(self) -> int:
        return sum(block.batches for block in self.dataset.plan)

    def __iter__(self) -> Any:
        for columns, block in super().__iter__():
            in_all = sum(len(rows) for _, rows in block.pieces)
            for first in range(block.batches):
                every = slice(first, None, block.batches)
                rows = {name: column[every] for name, column in columns.items()}
                yield Rows(rows, len(range(first, in_all, block.batches)))
        self.dataset.trace.unmap()


class TraceData(lightning.LightningDataModule):
    """Training batches, in another order in each epoch, and validation batches of a trace, with columns for `sources`."""

    def __init__(
        self, trace: Trace, sources: dict[int, int | None], batch_size: int, validation: float, seed: int, workers: int
    ):
        super().__init__()
        self.trace, self.batch_size, self.seed, self.workers = trace, batch_size, seed, workers
        self.names = trace.columns_for(sources)
        held_out = held_out_sequences(trace.manifest.sequences, validation, seed)
        self.train_rows: list[torch.Tensor] = []
        self.validation_rows: list[torch.Tensor] = []
        for shard in range(len(trace.manifest.shards)):
            is_held_out = held_out[trace.column(shard, SEQUENCE).long()]
            self.train_rows.append((~is_held_out).nonzero().flatten())
            self.validation_rows.append(is_held_out.nonzero().flatten())
        trace.unmap()
        for name, rows in (("training", self.train_rows), ("validation", self.validation_rows)):
            if not any(map(len, rows)):
                raise FitError(
                    f"the {name} sequences have no rows, since {trace.path} is a small sample; give another --validation or "
                    "--seed, or collect more tokens"
                )

    def train_dataloader(self) -> TraceLoader:
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return self._loader(self.train_rows, generator)

    def val_dataloader(self) -> TraceLoader:
        return self._loader(self.validation_rows, None)

    def _loader(self, rows: list[torch.Tensor], generator: torch.Generator | None) -> TraceLoader:
        rank, world = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        plan = plan_blocks(rows, self.batch_size, self.trace.row_bytes(self.names), generator)
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
