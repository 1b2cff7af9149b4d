"""Stores: they hold all experts of a model, as blocks. Here are their interface and the store in host memory."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..predictors.architecture import ExpertLayer
from .errors import StoreError
from .formats import ExpertFormat, Place
from .formats.full import FullFormat
from .registered import Registration, register

Bytes = NDArray[np.uint8]


def empty_blocks(count: int, size: int, device: torch.device) -> torch.Tensor:
    """Memory for blocks of `size` bytes, uint8 `[count, size]`. In host memory it begins at a multiple of `PAGE`.

    Raises `StoreError` where the device has too little memory.
    """
    try:
        if device.type != "cpu":
            return torch.empty(count, size, dtype=torch.uint8, device=device)
        return torch.frombuffer(_pages(count * size), dtype=torch.uint8).view(count, size)
    except (RuntimeError, OSError, OverflowError) as error:  # on CUDA torch raises a RuntimeError, `mmap` the others
        raise StoreError(
            f"{count} experts take {count * size / 2**30:.1f} GiB, which {device} has not left; ask for fewer slots or a packed file"
        ) from error


def _pages(size: int) -> mmap.mmap:
    """Host memory, in huge pages where the system has them: a direct read into small pages takes half as long again."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # the system may know huge pages and have none
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


@runtime_checkable
class ExpertStore(Protocol):
    """Holds all experts of a model. Whoever opens a store closes it."""

    format: ExpertFormat
    extent: tuple[int, int]
    """The number of MoE layers, and of experts in each."""

    def read(self, layer: int, expert: int, into: Bytes) -> None:
        """Fills `into` `[format.bytes]`, which begins at a multiple of `PAGE`, with the block of one expert.

        `layer` counts the MoE layers from 0, in the model's order. Several threads may call it at once. Raises
        `StoreError` where the block can't be read.
        """

    def close(self) -> None:
        """Frees what the store holds, and gives the model back what it took. The store is not read afterwards."""


class MemoryStore:
    """Experts in host memory: blocks `[experts, bytes]`, uint8, for each MoE layer.

    For a CUDA `device` the blocks are registered, so that it can read them itself. Where the system lets it lock too little
    memory, no block is registered, and a warning says so.
    """

    def __init__(self, form: ExpertFormat, extent: tuple[int, int], device: torch.device):
        self.format, self.extent, self._device = form, extent, device
        self.is_registered = device.type == "cuda"
        """Whether the device can read all blocks itself."""
        self.blocks: list[torch.Tensor] = []
        self._bytes: list[Bytes] = []
        self._registrations: list[Registration] = []

    def _add(self, blocks: torch.Tensor) -> None:
        """Adds a layer's blocks."""
        self.blocks.append(blocks)
        self._bytes.append(blocks.numpy())
        registration = register(blocks, self._device) if self.is_registered else None
        if registration is not None:
            self._registrations.append(registration)
        elif self.is_registered:
            self.is_registered = False
            whole = self.extent[0] * blocks.nbytes
            locked = len(self._registrations) * blocks.nbytes
            self._unregister()
            warnings.warn(
                f"CUDA could lock only {locked / 2**30:.1f} of the {whole / 2**30:.1f} GiB of experts in host memory, so they are "
                "copied through a small buffer, which is slower; give the container or WSL2 more memory that can be locked",
                stacklevel=2,
            )

    def _unregister(self) -> None:
        while self._registrations:
            self._registrations.pop().close()

    def block(self, layer: int, expert: int) -> torch.Tensor:
        """The block `[bytes]` of one expert."""
        return self.blocks[layer][expert]

    def read(self, layer: int, expert: int, into: Bytes) -> None:
        np.copyto(into, self._bytes[layer][expert])

    def close(self) -> None:
        self._unregister()
        self._bytes.clear()
        self.blocks.clear()


class QuantizedExperts(NamedTuple):
    """The experts of a model that was quantised while it was loaded."""

    format: ExpertFormat
    blocks: list[torch.Tensor]
    """For each MoE layer `[experts, bytes]`, uint8."""


class QuantizedStore(MemoryStore):
    """Quantised experts in host memory. The blocks belong to the model, which has no other experts."""

    def __init__(self, experts: QuantizedExperts, device: torch.device):
        super().__init__(experts.format, (len(experts.blocks), len(experts.blocks[0])), device)
        try:
            for layer in experts.blocks:
                self._add(layer)
        except BaseException:
            self.close()
            raise


class HostStore(MemoryStore):
    """The unchanged experts of a model in host memory.

    While the store is open, the model's expert parameters are views of these blocks. So each weight is in memory once, and
    `state_dict` and `save_pretrained` work. `close` gives the parameters their own memory again.
    """

    def __init__(self, layers: Sequence[ExpertLayer], device: torch.device):
        form = FullFormat.common([layer.experts for layer in layers])
        super().__init__(form, (len(layers), layers[0].stored), device)
        self._layers: list[_Layer] = []
        try:
            # Memory is made at its first use, which takes longer than the copy. So several threads use it first.
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                following = _Layer(layers[0], form, pool)
                for layer in [*layers[1:], None]:
                    taken = following
                    taken.wait()
                    self._layers.append(taken)
                    if not taken.was_on_device:
                        taken.take_parameters()
                    if layer is not None:  # it is filled while the one before is registered
                        following = _Layer(layer, form, pool)
                    self._add(taken.blocks)
                    if taken.was_on_device:  # a copy from there into registered memory is faster
                        taken.take_parameters()
        except BaseException:
            self.close()
            raise

    def check(self, layers: Sequence[ExpertLayer]) -> None:
        """Raises `StoreError` unless these are the layers whose experts it holds."""
        if len(layers) != len(self._layers) or any(
            not mine.holds(layer.experts) for mine, layer in zip(self._layers, layers, strict=True)
        ):
            raise StoreError(
                "the store is closed or holds the experts of another model; give this model's own, or none"
            )

    def close(self) -> None:
        while self._layers:  # layer by layer, so that only one layer is in memory twice
            self._layers[-1].give_back()
            if self._registrations:
                self._registrations.pop().close()
            self._layers.pop()
            del self.blocks[len(self._layers) :], self._bytes[len(self._layers) :]
        super().close()


class _Layer:
    """One layer's experts: the model's parameters, and the blocks that they are moved to and from."""

    def __init__(self, layer: ExpertLayer, blocks_format: ExpertFormat, pool: ThreadPoolExecutor):
        """Begins to fill the blocks, in the threads of `pool`: with the experts, or with zeros if these are on a device."""
        self._parameters = {name: layer.experts.get_parameter(name) for name in blocks_format.places}
        # Experts without weights may have rows in some parameters, which the model keeps here too.
        rows = max(map(len, self._parameters.values()))
        self.blocks = empty_blocks(rows, blocks_format.bytes, torch.device("cpu"))
        self.bytes: Bytes = self.blocks.numpy()
        self._views = {
            name: self._view(place, blocks_format.bytes, len(self._parameters[name]))
            for name, place in blocks_format.places.items()
        }
        self._origin = next(iter(self._parameters.values())).device
        self._orders = {name: sorted(range(p.ndim), key=p.stride, reverse=True) for name, p in self._parameters.items()}
        self._filling: list[Future[None]] = [pool.submit(self._fill, expert) for expert in range(rows)]

    def _view(self, place: Place, size: int, rows: int) -> torch.Tensor:
        """One tensor of all experts `[rows, ...]`, in blocks of `size` bytes.

        To torch it has memory of its own. Transformers would not save weights that share some.
        """
        memory = torch.frombuffer(self.bytes, dtype=place.dtype, offset=place.offset)
        inner = torch.empty(place.shape, device="meta").stride()
        return memory.as_strided((rows, *place.shape), (size // place.dtype.itemsize, *inner))

    @property
    def was_on_device(self) -> bool:
        return self._origin.type != "cpu"

    def _fill(self, expert: int) -> None:
        if self.was_on_device:
            self.bytes[expert] = 0
            return
        for name, view in self._views.items():
            if expert >= len(view):
                continue
            np.copyto(_as_bytes(view[expert]), _as_bytes(self._parameters[name].data[expert]))

    def holds(self, experts: nn.Module) -> bool:
        """Whether the parameters of `experts` are those that it has taken."""
        return all(getattr(experts, name, None) is parameter for name, parameter in self._parameters.items())

    def wait(self) -> None:
        """Returns when the blocks are filled."""
        while self._filling:
            self._filling.pop().result()

    def take_parameters(self) -> None:
        """Makes the parameters views of the blocks. Their own memory is free then. Those on a device are copied first."""
        for name, view in self._views.items():
            if self.was_on_device:
                _copy(view, self._parameters[name].data)
            self._parameters[name].data = view

    def give_back(self) -> None:
        """Gives the parameters memory of their own, where they were."""
        for name, parameter in self._parameters.items():
            order = self._orders[name]  # products of weights that lie otherwise are rounded otherwise
            shape = [parameter.shape[dimension] for dimension in order]
            values = torch.empty(shape, dtype=parameter.dtype, device=self._origin)
            values = values.permute([order.index(dimension) for dimension in range(len(order))])
            _copy(values, parameter.data)
            parameter.data = values


def _as_bytes(tensor: torch.Tensor) -> Bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def _copy(into: torch.Tensor, source: torch.Tensor) -> None:
    # Expert by expert: torch copies between devices directly only where both sides are contiguous.
    for target, expert in zip(into, source, strict=True):
        target.copy_(expert)
