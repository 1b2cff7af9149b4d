"""The format of unchanged experts: the model's own tensors in its own dtype, one after another."""

from __future__ import annotations

from typing import Self

import torch
from torch import nn

from ...predictors.experts import expert_linear
from ..errors import StoreError
from . import ExpertFormat, laid_out


class FullFormat(ExpertFormat):
    """The stacked parameters of an experts module, split into experts. All have one dtype."""

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.places.values())).dtype

    @property
    def full(self) -> FullFormat:
        return self

    @classmethod
    def of(cls, experts: nn.Module) -> Self:
        """The format of one expert of a module. Raises `StoreError` where its parameters differ in dtype."""
        parameters = dict(experts.named_parameters(recurse=False))
        dtypes = {p.dtype for p in parameters.values()}
        if len(dtypes) != 1:
            raise StoreError(f"the experts mix the dtypes {sorted(map(str, dtypes))}; load the model in one dtype")
        return cls(*laid_out({name: (p.dtype, p.shape[1:]) for name, p in parameters.items()}))

    @classmethod
    def common(cls, modules: list[nn.Module]) -> Self:
        """The common format of all experts modules of a model. Raises `StoreError` where they differ."""
        found = cls.of(modules[0])
        for experts in modules[1:]:
            found.expect(experts)
        return found

    def expect(self, experts: nn.Module) -> None:
        """Raises `StoreError` where the experts of a module have another format."""
        found = {name: place[:2] for name, place in self.of(experts).places.items()}
        if found != {name: place[:2] for name, place in self.places.items()}:  # they may be registered in another order
            raise StoreError("the experts of this model's layers differ in shape; offloading needs them alike")

    def write(self, name: str, values: torch.Tensor, blocks: torch.Tensor) -> None:
        self.views(blocks)[name].copy_(values)

    def read(self, blocks: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.views(blocks)

    def linear(self, experts: nn.Module, tensors: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
        return expert_linear(experts, tensors, name, x)
