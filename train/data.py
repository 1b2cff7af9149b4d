"""A trace's rows as batches. Validation rows are whole sequences, so that no sequence is on both sides.

A batch is drawn from a few shards at a time, at random within them: reading stays near to sequential on a trace that is
larger than memory, and there is one gather a column, not one item a row.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import lightning
import torch
from torch.utils.data import DataLoader, Dataset

from data_collection.trace import Columns, Piece, Trace
from predictors.errors import UserError

MIXED_SHARDS = 4


class FitError(UserError):
    """A fit that can't be made as asked; the message says why and what to do."""


def held_out_sequences(count: int, share: float, seed: int) -> torch.Tensor:
    """Which of `count` sequences are for validation, bool `[count]`: at least one, and never all.

    Raises `FitError` where there are fewer than two.
    """
    if count < 2:
        raise FitError("the trace has a single sequence, and validation needs one of its own; collect more tokens")
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(count, dtype=torch.bool)
    mask[chosen[: min(count - 1, max(1, round(share * count)))]] = True
    return mask


def plan_batches(rows: list[torch.Tensor], batch_size: int, generator: torch.Generator | None) -> list[list[Piece]]:
    """Batches of about `batch_size` rows, each row in exactly one; `rows` holds each shard's rows.

    With a generator the order is random, drawn from `MIXED_SHARDS` shards at a time; without, it is that of the trace.
    """
    order = list(range(len(rows))) if generator is None else torch.randperm(len(rows), generator=generator).tolist()
    batches: list[list[Piece]] = []
    for start in range(0, len(order), MIXED_SHARDS):
        group = order[start : start + MIXED_SHARDS]
        count = max(1, round(sum(len(rows[shard]) for shard in group) / batch_size))
        parts = []
        for shard in group:
            shuffled = rows[shard]
            if generator is not None:
                shuffled = shuffled[torch.randperm(len(shuffled), generator=generator)]
            # In a batch the order does not matter to the loss, and rising rows are read faster.
            parts.append([piece.sort().values for piece in shuffled.tensor_split(count)])
        for pieces in zip(*parts, strict=True):
            batch = [(shard, piece) for shard, piece in zip(group, pieces, strict=True) if len(piece)]
            if batch:
                batches.append(batch)
    return batches


class Rows(NamedTuple):
    """What one process has of a step."""

    columns: Columns
    in_all: int
    """Rows of the step, over all processes."""


class TraceBatches(Dataset[Rows]):
    """Item `i` is the whole batch `i` of a plan: columns of some hundred rows. Of `world` processes that train together,
    each reads every so-many-th row of each batch, so that they make the steps that one would, each row once.

    Only the shards of the last batch stay mapped. They are mapped for these batches alone: two readers don't meet.
    """

    def __init__(self, trace: Trace, plan: list[list[Piece]], names: list[str], rank: int = 0, world: int = 1):
        self.trace, self.plan, self.names = Trace(trace.path, trace.manifest), plan, names
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> Rows:
        in_all, pieces = 0, []
        for shard, rows in self.plan[number]:
            pieces.append((shard, rows[(self.rank - in_all) % self.world :: self.world]))
            in_all += len(rows)
        self.trace.unmap(but=[shard for shard, _ in pieces])
        return Rows(self.trace.gather(pieces, self.names), in_all)


class ReadAhead(DataLoader[Rows]):
    """Reads a batch in a thread while the one before it is used, where no processes do the reading."""

    def __iter__(self) -> Any:
        batches = super().__iter__()
        if self.num_workers:
            yield from batches
            return
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(next, batches, None)
            while (rows := ahead.result()) is not None:
                ahead = reader.submit(next, batches, None)
                yield rows


class TraceData(lightning.LightningDataModule):
    """Training and validation batches of one trace, as `make_batch` reads them for `sources`; the training order is another
    in each epoch."""

    def __init__(
        self,
        trace: Trace,
        sources: dict[int, int | None],
        batch_size: int,
        validation: float,
        seed: int,
        workers: int,
    ):
        super().__init__()
        self.trace, self.batch_size, self.seed, self.workers = trace, batch_size, seed, workers
        self.names = trace.columns_for(sources)
        held_out = held_out_sequences(trace.manifest.sequences, validation, seed)
        self.train_rows: list[torch.Tensor] = []
        self.validation_rows: list[torch.Tensor] = []
        for shard in range(len(trace.manifest.shards)):
            is_held_out = held_out[trace.column(shard, "sequence").long()]
            self.train_rows.append((~is_held_out).nonzero().flatten())
            self.validation_rows.append(is_held_out.nonzero().flatten())

    def train_dataloader(self) -> DataLoader[Rows]:
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return self._loader(plan_batches(self.train_rows, self.batch_size, generator))

    def val_dataloader(self) -> DataLoader[Rows]:
        return self._loader(plan_batches(self.validation_rows, self.batch_size, None))

    def _loader(self, plan: list[list[Piece]]) -> DataLoader[Rows]:
        rank, world = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        batches = TraceBatches(self.trace, plan, self.names, rank, world)
        return ReadAhead(batches, batch_size=None, num_workers=self.workers, pin_memory=torch.cuda.is_available())
