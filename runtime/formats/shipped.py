"""Formats that checkpoints are shipped in. Experts are kept in them bit for bit, and are widened when they are computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ...predictors.experts import marks_of
from ..errors import StoreError
from . import Place
from .full import FullFormat
from .quantized import SCALES, QuantizedFormat

FORMAT = "shipped_format"
"""The attribute of an experts module that says in which format its weights come."""


class ShippedFormat(QuantizedFormat):
    """A format whose packed weights and scales come from the checkpoint. Products are computed in the model's dtype."""

    @property
    def loaded(self) -> dict[str, Place]:
        return self.places

    @staticmethod
    def are_sound(name: str, values: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        """For each of the experts in `values` `[experts, ...]`, whether a packed weight or its scales `name` can be widened."""
        return torch.ones(len(values), dtype=torch.bool)

    def write(self, name: str, values: torch.Tensor, blocks: torch.Tensor) -> None:
        if name.removesuffix(SCALES) + SCALES in self.places and not (sound := self.are_sound(name, values)).all():
            raise StoreError(
                f"{name} of expert {int(sound.int().argmin())} has values that are not finite or too large, so it can't be kept "
                "in the form in which it is shipped; get the checkpoint again"
            )
        self.views(blocks)[name].copy_(values)


def expect(experts: nn.Module, format_of: Callable[[FullFormat, bool], ShippedFormat]) -> None:
    """Gives `experts`, a module on the meta device, parameters for weights as they are shipped in the place of its own.

    `format_of` makes their format: it is `ShippedFormat.of` of some kind.

    Raises `StoreError` where its weights can't have that format.
    """
    form = format_of(FullFormat.of(experts), bool(marks_of(experts).is_transposed))
    vars(experts)[FORMAT] = form
    count = next(experts.parameters(recurse=False)).shape[0]
    for name, place in form.loaded.items():
        _put(experts, name, count, place, trains=False)


def forget(experts: nn.Module) -> None:
    """Gives `experts` its own parameters again, without memory, if `expect` has changed them."""
    form = vars(experts).pop(FORMAT, None)
    if form is None:
        return
    count = next(experts.parameters(recurse=False)).shape[0]
    for name in form.loaded.keys() - form.full.places.keys():
        delattr(experts, name)
    for name, place in form.full.places.items():
        _put(experts, name, count, place, trains=True)


def shipped_format(experts: nn.Module) -> ShippedFormat | None:
    """The format in which the weights of a module come, if `expect` was called for it."""
    return vars(experts).get(FORMAT)


def _put(experts: nn.Module, name: str, count: int, place: Place, trains: bool) -> None:
    values = torch.empty(count, *place.shape, dtype=place.dtype, device="meta")
    parameter = nn.Parameter(values, requires_grad=trains)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # else transformers would draw it
    setattr(experts, name, parameter)
