"""Weights in the types of GGUF files, as llama.cpp's models are shipped.

A file mixes types: a weight may have another type in another layer. So a block tells the types of its own weights, and has room for
the largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Self

import torch

from ..errors import StoreError
from . import Place, laid_out
from .full import FullFormat
from .ggml import arranged, widen
from .quantized import SCALES, Shaped
from .shipped import ShippedFormat

PARTS = 2
"""A weight is put together from at most so many of the file: `gate_up_proj` from its gate and its other half."""


class Part(NamedTuple):
    """What a block tells of a part of a weight."""

    number: int
    """GGML's, of its type."""
    rows: int
    inputs: int
    bytes: int
    in_dtype: int
    """1 where it is widened in the model's dtype, 0 where in float32; see `GgmlType.widen`."""


HEAD = PARTS * len(Part._fields)
"""Numbers, int32, that tell of all parts of a weight. Those of parts that it has not are 0."""


def head_of(parts: list[Part]) -> torch.Tensor:
    """What a block tells of a weight of these `parts`, int32 `[HEAD]`."""
    numbers = [number for part in parts for number in part]
    return torch.tensor(numbers + [0] * (HEAD - len(numbers)), dtype=torch.int32)


def _parts(head: torch.Tensor) -> list[Part]:
    numbers = head.view(PARTS, -1).tolist()
    return [Part(*row) for row in numbers if row[1]]


class GgufFormat(ShippedFormat):
    """`packed` is uint8 `[room]` with the parts one after another, and `scales`, int32 `[HEAD]`, tells of them.

    What is loaded of a weight is one tensor, uint8: `[HEAD * 4 + room]`, with the bytes as in the file.
    """

    @classmethod
    def of(cls, full: FullFormat, is_transposed: bool, rooms: Mapping[str, int] | None = None) -> Self:
        if rooms is None or is_transposed or rooms.keys() != full.places.keys():
            return super().of(full, is_transposed)  # says what is wrong
        tensors: dict[str, Shaped] = {}
        for name, room in rooms.items():
            tensors[name] = (torch.uint8, torch.Size([room]))
            tensors[name + SCALES] = (torch.int32, torch.Size([HEAD]))
        return cls(*laid_out(tensors), full, is_transposed)

    @classmethod
    def shapes(cls, name: str, outputs: int, inputs: int) -> tuple[Shaped, Shaped]:
        raise StoreError(f"how a GGUF file has {name}, {outputs} by {inputs}, is not known; give the file with gguf=")

    @property
    def rooms(self) -> dict[str, int]:
        return {name: self.places[name].bytes for name in self.full.places}

    def parts(self, block: torch.Tensor) -> dict[str, list[Part]]:
        """What a `block` `[bytes]`, uint8, tells of each weight. The blocks of a layer tell the same."""
        views = self.views(block)
        return {name: _parts(views[name + SCALES]) for name in self.rooms}

    @property
    def loaded(self) -> dict[str, Place]:
        return {name: Place(torch.uint8, torch.Size([4 * HEAD + room]), 0) for name, room in self.rooms.items()}

    def write(self, name: str, values: torch.Tensor, blocks: torch.Tensor) -> None:
        views, (outputs, inputs) = self.views(blocks), self.extent_of(name)
        head = values[0, : 4 * HEAD].view(torch.int32)
        parts = _parts(head)
        if sum(part.rows for part in parts) != outputs or any(part.inputs != inputs for part in parts):
            raise StoreError(
                f"the GGUF file has {name} in another shape than the model, {outputs} by {inputs}; give its own"
            )
        for number, (expert, into) in enumerate(zip(values[:, 4 * HEAD :], views[name], strict=True)):
            for part, raw, place in _each(parts, expert, into):
                found = arranged(part.number, raw.view(part.rows, -1), (part.rows, part.inputs))
                if found is None:
                    raise StoreError(
                        f"{name} of expert {number} has values that are not finite, so it can't be kept in the form in which it "
                        "is shipped; get the file again"
                    )
                place.copy_(found)
        views[name + SCALES].copy_(head)

    @staticmethod
    def widen(packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        parts = _parts(scales)
        wide = torch.empty(sum(part.rows for part in parts), parts[0].inputs, dtype=dtype, device=packed.device)
        pieces = wide.split([part.rows for part in parts])
        for (part, values, _), into in zip(_each(parts, packed, packed), pieces, strict=True):
            widen(part.number, values, into, bool(part.in_dtype))
        return wide


def _each(
    parts: list[Part], first: torch.Tensor, second: torch.Tensor
) -> Iterator[tuple[Part, torch.Tensor, torch.Tensor]]:
    """Each part of a weight with its bytes in two tensors, `[room]` each."""
    begin = 0
    for part in parts:
        end = begin + part.bytes
        yield part, first[begin:end], second[begin:end]
        begin = end
