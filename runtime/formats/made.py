"""Formats that weights are quantised to here. Each expert is quantised by itself, so that the whole is never in memory."""

from __future__ import annotations

from abc import abstractmethod
from concurrent.futures import ThreadPoolExecutor

import torch

from ..errors import StoreError
from .quantized import SCALES, QuantizedFormat


class MadeFormat(QuantizedFormat):
    """A format that `write` quantises weights to."""

    @staticmethod
    @abstractmethod
    def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Packs a `weight` `[outputs, inputs]`, float32. Returns it and its scales, in the shapes that `shapes` tells."""

    def write(self, name: str, values: torch.Tensor, blocks: torch.Tensor) -> None:
        views = self.views(blocks)
        if name + SCALES not in views:
            views[name].copy_(values)
            return

        def write_one(expert: int) -> None:
            weight = values[expert]
            with torch.inference_mode(blocks.is_inference()):  # a thread does not inherit the mode
                packed, scales = self.quantize((weight.mT if self.is_transposed else weight).float().contiguous())
                if not scales.isfinite().all():  # a weight that is not finite has such a scale
                    raise StoreError(
                        f"{name} of expert {expert} has values that are not finite or too large, so it can't be quantised"
                    )
                views[name][expert].copy_(packed)
                views[name + SCALES][expert].copy_(scales)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(write_one, range(len(values))))
