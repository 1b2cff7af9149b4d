"""Counts right guesses on the device, without a wait."""

from __future__ import annotations

import torch
import triton

from ..hits import HitCount
from .kernels import count_hits


class DeviceHitCount(HitCount):
    """A `HitCount` whose numbers are on the device, so that a captured step counts too."""

    def __init__(self, top_k: int, device: torch.device):
        self._counted = torch.zeros(2, dtype=torch.int64, device=device)
        super().__init__(top_k)

    def clear(self) -> None:
        super().clear()
        self._counted.zero_()

    def add(self, chosen: torch.Tensor, own: torch.Tensor) -> None:
        (rows, m), width = chosen.shape, own.shape[1]
        count_hits[(1,)](
            chosen.to(torch.int64).contiguous(), own.contiguous(), self._counted, rows, m, self._top_k, width,
            M=triton.next_power_of_2(m), WIDTH=triton.next_power_of_2(width), BY_RANK=own.is_floating_point(), num_warps=1,
        )  # fmt: skip

    def totals(self) -> tuple[int, int]:
        hits, seen = self._counted.tolist()
        return hits, seen
