"""The experts of a layer computed in quantised blocks in their slots."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import nn

from ..formats.fp8 import Fp8Format
from ..formats.int4 import GROUP, TILE, Int4Format
from ..formats.int8 import Int8Format
from ..formats.mxfp4 import GROUP as MX_GROUP
from ..formats.mxfp4 import Mxfp4Format
from ..formats.quantized import COMPUTED, SCALES, QuantizedFormat
from .arithmetic import ExpertArithmetic, gates_by_silu
from .quantized_kernels import int4_linear, int8_linear, weighted_sum
from .shipped_kernels import fp8_linear, mxfp4_linear

ROWS, COLUMNS = 16, 512
"""Of a weight of eight bits: outputs and inputs that a program multiplies at once."""
GROUPS, PART, WARPS = 4, 8, 2
"""Of a weight of four bits: groups of inputs and rows of half a tile that a program multiplies at once, and its warps."""
MX_ROWS, MX_GROUPS = 32, 4
"""Of a weight in MXFP4: outputs and groups of inputs that a program multiplies at once."""
SUMMED = 1024
"""Numbers of a token that a program sums."""
NUMBERS = {Int8Format: COMPUTED, Int4Format: torch.int32, Fp8Format: torch.float32, Mxfp4Format: torch.uint8}
"""The formats that have a kernel, and as what it reads their scales: an int4 scale and its zero are one word."""


class QuantizedArithmetic(ExpertArithmetic):
    """Computes one layer's experts in quantised blocks. The gate and the norm are the module's own, the weights are not."""

    def __init__(self, experts: nn.Module, form: QuantizedFormat, memory: torch.Tensor):
        """`memory` `[slots, bytes]`, uint8, holds blocks of format `form`."""
        self._experts, self._form, self._memory = experts, form, memory
        self._norms = getattr(experts, "has_post_expert_norm", False)
        self._biases = memory.view(form.full.dtype)
        first = form.full.places["gate_up_proj" if experts.has_gate else "up_proj"]
        width = first.shape[1] if form.is_transposed else first.shape[0]
        self._is_silu: bool = bool(experts.has_gate and not experts.has_bias) and gates_by_silu(
            experts, width, form.full.dtype, memory.device
        )

    def output(self, x: torch.Tensor, weights: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        x, k = x.contiguous(), weights.shape[1]
        weights = weights.to(torch.promote_types(x.dtype, weights.dtype)).contiguous()
        experts: Any = self._experts
        hidden = self._multiply("gate_up_proj" if experts.has_gate else "up_proj", x, table, k, self._is_silu)
        if not self._is_silu:
            hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
        outputs = self._multiply("down_proj", hidden, table, k, False)
        outputs = experts.post_expert_norm(outputs) if self._norms else outputs
        result = torch.empty_like(x)
        weighted_sum[len(x), triton.cdiv(x.shape[1], SUMMED)](
            outputs, weights, result, k, HIDDEN=x.shape[1], SUMMED=min(SUMMED, triton.next_power_of_2(x.shape[1]))
        )
        return result

    def _multiply(self, name: str, x: torch.Tensor, table: torch.Tensor, k: int, gated: bool) -> torch.Tensor:
        """One linear layer of each row's expert, `[tokens * k, outputs]`. `x` has a row for each token, or for each of those."""
        form, rows = self._form, len(table) * k
        outputs, inputs = form.extent_of(name)
        outputs //= 2 if gated else 1
        output = x.new_empty(rows, outputs)
        weight, scales, bias = (form.places.get(name + end) for end in ("", SCALES, "_bias"))
        assert weight is not None
        assert scales is not None
        numbers = self._memory.view(NUMBERS[type(form)])
        arguments = (
            x, self._memory.view(torch.int8 if isinstance(form, Int8Format) else torch.uint8), numbers, self._biases, table, output,
            form.bytes, weight.offset, scales.offset // numbers.itemsize, -1 if bias is None else bias.offset // bias.dtype.itemsize,
            k, table.shape[1], rows // len(x),
        )  # fmt: skip
        if isinstance(form, Fp8Format):
            (all_outputs, _), (high, wide) = form.extent_of(name), scales.shape
            fp8_linear[rows, triton.cdiv(outputs, ROWS)](
                *arguments, IN=inputs, OUT=outputs, GATED=gated, ROWS=ROWS, COLUMNS=min(COLUMNS, triton.next_power_of_2(inputs)),
                HIGH=all_outputs // high, WIDE=inputs // wide,
            )  # fmt: skip
        elif isinstance(form, Mxfp4Format):
            mxfp4_linear[rows, triton.cdiv(outputs, MX_ROWS)](
                *arguments, IN=inputs, OUT=outputs, GATED=gated, GROUP=MX_GROUP, ROWS=MX_ROWS,
                GROUPS=min(MX_GROUPS, triton.next_power_of_2(inputs // MX_GROUP)),
            )  # fmt: skip
        elif isinstance(form, Int4Format):
            int4_linear[rows, outputs // (2 * PART)](
                *arguments, IN=inputs, OUT=outputs, GATED=gated, GROUP=GROUP, TILE=TILE, PART=PART,
                GROUPS=min(GROUPS, triton.next_power_of_2(inputs // GROUP)), num_warps=WARPS,
            )  # fmt: skip
        else:
            int8_linear[rows, triton.cdiv(outputs, ROWS)](
                *arguments, IN=inputs, OUT=outputs, GATED=gated,
                ROWS=ROWS, COLUMNS=min(COLUMNS, triton.next_power_of_2(inputs)),
            )  # fmt: skip
        return output
