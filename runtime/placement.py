"""Where a model is while its experts are offloaded: all of it but the experts is on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import nn


def move_rest(model: nn.Module, experts: list[nn.Module], device: torch.device, attached: ExitStack) -> None:
    """Moves everything but `experts` to `device`. When `attached` is closed, it is moved back.

    What has been added to the model since, as an adapter, goes with the others then.
    """
    origins: dict[torch.Tensor, torch.device] = {}
    home = next((tensor.device for tensor in _rest(model, experts) if tensor.device != device), None)
    if home is None:
        return

    def move_back() -> None:
        added = {tensor: home for tensor in _rest(model, experts) if tensor.device == device}
        for tensor, origin in (added | origins).items():
            _move(tensor, origin)

    attached.callback(move_back)
    for tensor in _rest(model, experts):
        origins[tensor] = tensor.device
        _move(tensor, device)


def _rest(model: nn.Module, experts: list[nn.Module]) -> Iterator[torch.Tensor]:
    theirs = {parameter for module in experts for parameter in module.parameters(recurse=False)}
    return (tensor for tensor in [*model.parameters(), *model.buffers()] if tensor not in theirs)


def _move(tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        # In place, since the layers also hold buffers that are arguments of their routers.
        tensor.data = tensor.data.to(device)
