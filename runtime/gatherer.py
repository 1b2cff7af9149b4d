"""Gathers the experts of a model, whose parameters come one after another, as blocks of a format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import nn

from ..predictors.architecture import ExpertLayer
from .errors import StoreError
from .formats import ExpertFormat
from .formats.registry import format_of
from .formats.shipped import shipped_format
from .quantization import Quantization, Shipped
from .store import empty_blocks

RUN, RUNS = 64, 8
"""A sample of a tensor: so many bytes at so many evenly spaced places in it."""


def sample_experts(tensors: dict[str, torch.Tensor]) -> str:
    """A hash of some bytes of every expert in the stacked `tensors` `[num_experts, ...]` of one layer.

    It tells experts of one shape apart, in milliseconds for a layer of gigabytes: whatever trains an expert changes nearly
    all of its weights.
    """
    digest = xxhash.xxh3_64()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().flatten(1).view(torch.uint8)
        last = max(0, values.shape[1] - RUN)
        starts = torch.tensor([last * number // (RUNS - 1) for number in range(RUNS)])
        places = (starts[:, None] + torch.arange(RUN)).flatten().clamp(max=values.shape[1] - 1)
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(values.index_select(1, places.to(values.device)).cpu().numpy().data)
    return digest.hexdigest()


@dataclass
class Gathered:
    """What a checkpoint has of an experts module, `[num_experts, ...]` each."""

    experts: nn.Module
    format: ExpertFormat
    tensors: dict[str, torch.Tensor]

    @property
    def sample(self) -> str:
        """What `sample_experts` returns for them."""
        return sample_experts(self.tensors)

    def blocks(self) -> torch.Tensor:
        """The blocks `[num_experts, bytes]`, uint8. Raises `StoreError` where a weight can't be quantised."""
        count = min(map(len, self.tensors.values()))  # experts without weights may have rows in some parameters
        blocks = empty_blocks(count, self.format.bytes, torch.device("cpu")).zero_()
        for name, values in self.tensors.items():
            self.format.write(name, values[:count], blocks)
        return blocks


class Gatherer:
    """Gathers experts module by module, and gives each one on as soon as its last parameter has come."""

    def __init__(self, quantize: Quantization | Shipped | None, done: Callable[[Gathered], None]):
        self._quantize, self._done = quantize, done
        self._format: ExpertFormat | None = None
        self._open: dict[nn.Module, Gathered] = {}
        self._modules: list[nn.Module] = []

    def take(self, experts: nn.Module, name: str, values: torch.Tensor) -> None:
        """Takes one stacked parameter `[num_experts, ...]` of an experts module.

        Raises `StoreError` where modules differ, or where a weight can't be quantised.
        """
        if experts not in self._open:
            form = shipped_format(experts) or format_of([experts], self._quantize)
            self._format = self._format or form
            if form != self._format:
                raise StoreError(
                    "the experts of this model's layers differ in shape or form; offloading needs them alike"
                )
            self._open[experts] = Gathered(experts, form, {})
        gathered = self._open[experts]
        loaded = gathered.format.loaded
        if values.dtype != loaded[name].dtype:
            raise StoreError(
                f"the experts mix the dtypes {values.dtype} and {loaded[name].dtype}; give one with dtype="
            )
        gathered.tensors[name] = values
        if gathered.tensors.keys() == loaded.keys():
            self._modules.append(experts)
            self._done(self._open.pop(experts))

    def finish(self, layers: Sequence[ExpertLayer], name: str) -> ExpertFormat:
        """The format of all blocks. Raises `StoreError` unless just the experts of `layers` have come from the checkpoint `name`."""
        if self._open or self._format is None or set(self._modules) != {layer.experts for layer in layers}:
            raise StoreError(
                f"the checkpoint of {name} has weights for {len(self._modules)} layers of experts, and the model has "
                f"{len(layers)} that are routed to; it can't be packed"
            )
        return self._format
