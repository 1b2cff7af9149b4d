"""The experts of a layer computed in blocks of GGUF's types in their slots."""

from __future__ import annotations

import torch
import triton
from torch import nn

from ..formats.ggml import BY_NUMBER
from ..formats.gguf import GgufFormat
from .ggml_kernels import ggml_linear
from .quantized import QuantizedArithmetic

ROWS, COLUMNS = 16, 256
"""Outputs and inputs of a weight that a program multiplies at once."""


class GgufArithmetic(QuantizedArithmetic):
    """Computes one layer's experts, whose types may be other ones than those of the next layer."""

    def __init__(self, experts: nn.Module, form: GgufFormat, memory: torch.Tensor, block: torch.Tensor):
        """`block` `[bytes]`, uint8, in host memory, is that of one of the experts. Only its types are read."""
        super().__init__(experts, form, memory)
        self._parts = form.parts(block)

    def _multiply(self, name: str, x: torch.Tensor, table: torch.Tensor, k: int, gated: bool) -> torch.Tensor:
        parts, rows = self._parts[name], len(table) * k
        output = x.new_empty(rows, parts[0].rows if gated else sum(part.rows for part in parts))
        begin, weight = 0, self._form.places[name].offset
        for part in parts[:1] if gated else parts:
            split = max(BY_NUMBER[one.number].parts for one in (parts if gated else [part]))
            each = max(1, ROWS // split)
            ggml_linear[rows, triton.cdiv(part.rows // split, each)](
                x, self._memory, table, output[:, begin:], self._form.bytes, output.shape[1],
                weight, weight + part.bytes, k, table.shape[1], rows // len(x),
                IN=part.inputs, OUT=part.rows, KIND=part.number, UP=parts[1].number if gated else 0, IN_DTYPE=bool(part.in_dtype),
                PARTS=split, PART=each, COLUMNS=min(COLUMNS, triton.next_power_of_2(part.inputs)),
            )  # fmt: skip
            begin += part.rows
            weight += part.bytes
        return output
