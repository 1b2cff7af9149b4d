"""The experts of a layer computed in their slots, by a table of places. The host waits for nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import nn

from ..formats import ExpertFormat
from .kernels import down_sum, expert_linear, gate_up

ROWS, COLUMNS = 16, 512
"""The most outputs and inputs of a weight that a program multiplies at once."""


class ExpertArithmetic:
    """Computes one layer's experts in blocks of one dtype. The gate and the norm are the module's own, the weights are not."""

    def __init__(self, experts: nn.Module, form: ExpertFormat, memory: torch.Tensor):
        """`memory` `[slots, bytes]`, uint8, holds blocks of format `form`."""
        self._experts, self._places = experts, form.places
        dtype = next(iter(form.places.values())).dtype
        self._memory, self._size = memory.view(dtype), form.bytes // dtype.itemsize
        self._norms = getattr(experts, "has_post_expert_norm", False)
        is_plain = experts.has_gate and not (experts.has_bias or experts.is_transposed or self._norms)
        self._is_silu = is_plain and gates_by_silu(experts, form.places["gate_up_proj"].shape[0], dtype, memory.device)

    def output(self, x: torch.Tensor, weights: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """The weighted sum `[tokens, hidden]` of the experts of `x` `[tokens, hidden]`, in the dtype of `x`.

        `weights` is `[tokens, k]`. `table`, int32 `[tokens, k or more]`, begins each row with the places of the token's experts.
        """
        x, width = x.contiguous(), table.shape[1]
        weights = weights.to(torch.promote_types(x.dtype, weights.dtype)).contiguous()
        if self._is_silu:
            return self._fused(x, weights, table, width)
        experts: Any = self._experts
        k = weights.shape[1]
        hidden = self._linear("gate_up_proj" if experts.has_gate else "up_proj", x, table, k, width, k)
        hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
        outputs = self._linear("down_proj", hidden, table, k, width, 1)
        outputs = experts.post_expert_norm(outputs) if self._norms else outputs
        weighted = outputs * weights.view(-1, 1)
        return weighted.view(*weights.shape, -1).sum(1).to(x.dtype)

    def _fused(self, x: torch.Tensor, weights: torch.Tensor, table: torch.Tensor, width: int) -> torch.Tensor:
        up, down = self._places["gate_up_proj"], self._places["down_proj"]
        (outputs, inner), (tokens, k), itemsize = down.shape, weights.shape, up.dtype.itemsize
        hidden, output = x.new_empty(tokens * k, inner), x.new_empty(tokens, outputs)
        gate_up[tokens * k, triton.cdiv(inner, ROWS)](
            x, self._memory, table, hidden, self._size, k, width, up.offset // itemsize,
            IN=x.shape[1], OUT=inner, ROWS=ROWS, COLUMNS=min(COLUMNS, triton.next_power_of_2(x.shape[1])),
        )  # fmt: skip
        down_sum[tokens, triton.cdiv(outputs, ROWS // 2)](
            hidden, weights, self._memory, table, output, self._size, k, width, down.offset // itemsize,
            IN=inner, OUT=outputs, ROWS=ROWS // 2, COLUMNS=min(COLUMNS, triton.next_power_of_2(inner)),
        )  # fmt: skip
        return output

    def _linear(
        self, name: str, x: torch.Tensor, table: torch.Tensor, k: int, width: int, rows_of_x: int
    ) -> torch.Tensor:
        """One linear layer of each row's expert, `[tokens * k, outputs]`."""
        weight, bias = self._places[name], self._places.get(f"{name}_bias")
        (outputs, inputs), down, across = weight.shape, weight.shape[1], 1
        rows, columns = ROWS, COLUMNS
        if self._experts.is_transposed:
            (inputs, outputs), down, across = weight.shape, 1, weight.shape[1]
            rows, columns = 4 * ROWS, COLUMNS // 4  # neighbours in memory are outputs here
        output, itemsize = x.new_empty(len(x) * rows_of_x, outputs), weight.dtype.itemsize
        expert_linear[len(output), triton.cdiv(outputs, rows)](
            x, self._memory, table, output, self._size, k, width, weight.offset // itemsize,
            -1 if bias is None else bias.offset // itemsize, rows_of_x,
            IN=inputs, OUT=outputs, ROWS=rows, COLUMNS=min(columns, triton.next_power_of_2(inputs)), DOWN=down, ACROSS=across,
        )  # fmt: skip
        return output


@torch.no_grad()
def gates_by_silu(experts: Any, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the gate over `width` outputs is `silu(first half) * (second half)`, which a kernel does on the way."""
    probe = torch.randn(3, width, generator=torch.Generator().manual_seed(0), device="cpu")
    # Clamped gates only differ where their inputs are large.
    probe *= torch.tensor([[1.0], [16.0], [256.0]], device="cpu")
    probe = probe.to(device, dtype)
    gate, up = probe.chunk(2, dim=-1)
    return torch.equal(experts._apply_gate(probe), F.silu(gate) * up)
