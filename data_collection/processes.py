"""Several processes can share a collection: each runs its part of the batches and writes its own shards."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Group:
    """The processes of one collection. This one is `rank` of `count`, and computes on `device`."""

    def __init__(self, device: torch.device, fabric: Any = None):
        self.rank: int = 0 if fabric is None else fabric.global_rank
        self.count: int = 1 if fabric is None else fabric.world_size
        self.device = device if fabric is None else fabric.device
        self._fabric = fabric

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Returns once every process has called it."""
        if self._fabric is not None:
            self._fabric.barrier()

    def share(self, value: T) -> T:
        """The first process's `value`, in every process."""
        return value if self._fabric is None else self._fabric.broadcast(value)


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """The group of processes that torchrun or SLURM's srun started together, or this process alone."""
    launched = _launched()
    if launched is None:
        yield Group(device)
        return
    # Imported here: it takes seconds, and a single process does not need it.
    from lightning.fabric import Fabric
    from lightning.fabric.strategies.ddp import DDPStrategy

    processes, nodes = launched
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # its messages on ranks help nobody
    fabric = Fabric(
        accelerator=device.type,
        devices=processes // nodes,
        num_nodes=nodes,
        # A process that is done waits for the slowest one; if one fails, the launcher ends all.
        strategy=DDPStrategy(timeout=timedelta(days=7)),
    )
    fabric.launch()
    try:
        yield Group(device, fabric)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _launched() -> tuple[int, int] | None:
    """How many processes on how many nodes were launched together, or None for a single process."""
    env = os.environ
    if "LOCAL_WORLD_SIZE" in env and "WORLD_SIZE" in env:  # torchrun
        processes, nodes = int(env["WORLD_SIZE"]), int(env["WORLD_SIZE"]) // int(env["LOCAL_WORLD_SIZE"])
    elif "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:  # srun, not the batch script itself
        processes, nodes = int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_STEP_NUM_NODES", "1"))
    else:
        return None
    return (processes, nodes) if processes > 1 else None
