"""A speculator folded into few operations, where the model's norm and router are as plain as they are in most models.

When one token is decoded, speculation is bound by how many operations it starts and by how many weights it reads. Only the
experts are asked for, not their weights. With a router that takes the largest of `R x + c`, and the RMS norm
`norm_t(x) = g x / r(x)`, `r(x) = sqrt(mean(x^2) + eps)`, what is to be compared is

    R (q + W2 silu(W1 a + V m + b1) + b2) + c  =  R' u / r(u) + (R W2) silu(W1' s / r(s) + V m + b1) + (R b2 + c)

with `u = s + sum_j w_j D[id_j]`, `R' = R diag(g)` and `W1' = W1 diag(g)`: one matrix for both, `R W2` `[experts, width]` in
the place of `W2` `[hidden, width]`, and one table `[D | k V^T]`, since both sums weight the same rows. Without a predictor
and `c` even `r` is of no account. Symbols as in `predictors.speculation`.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F

from predictors.architecture import MoELayer
from predictors.speculation import Routing, Speculator

PROBES = 256
"""Random states on which a norm and a router are compared with what they are taken for."""


class FoldedSpeculator:
    """The candidates of one target layer, those of its `Speculator` to rounding. Made by `of`."""

    def __init__(
        self,
        speculator: Speculator,
        gain: torch.Tensor,
        eps: float,
        weight: torch.Tensor,
        bias: torch.Tensor,
        top_k: int,
    ):
        """`gain` `[hidden]` and `eps` are the norm's, `weight` `[experts, hidden]` and `bias` `[experts]` the router's; fp32."""
        mlp, table = speculator.mlp, speculator.default_vectors
        self._experts, hidden_size = weight.shape
        self._is_corrected = mlp is not None
        matrix, offset = weight, bias
        if mlp is not None:
            w1, v, b1, w2, b2 = (p.float() for p in (mlp.w1, mlp.v, mlp.b1, mlp.w2, mlp.b2))
            self._out = (weight @ w2).T.contiguous()
            matrix, offset = torch.cat([weight, w1]), torch.cat([bias + weight @ b2, b1])
            table = torch.cat([torch.zeros_like(weight) if table is None else table, top_k * v.T], dim=1)
        self._is_scale_free = not offset.any()
        # Times sqrt(hidden): the length of a vector is what there is an operation for, not its root mean square.
        self._matrix = (hidden_size**0.5 * gain * matrix).to(next(speculator.router.parameters()).dtype)
        self._offset, self._table = offset, table
        self._eps = (hidden_size * eps) ** 0.5 * torch.ones_like(bias[:1])

    @classmethod
    @torch.no_grad()
    def of(cls, speculator: Speculator, layer: MoELayer) -> Self | None:
        """The speculator of target `layer` folded, or None where its norm or router is another than it would be taken for.

        Both are compared on random states: a router that chooses by more than its logits (groups, correction biases) is
        found out there.
        """
        norm, router = speculator.norm, speculator.router
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        shape = layer.num_experts, layer.hidden_size
        weights = [p for p in router.router.parameters() if p.shape == shape]
        if speculator.post_norm is not None or not isinstance(eps, float) or len(weights) != 1:
            return None
        weight = weights[0]
        states = torch.randn(PROBES, layer.hidden_size, generator=torch.Generator().manual_seed(0)).to(weight)
        close = max(1e-5, 8 * torch.finfo(weight.dtype).eps)
        # A norm of ones is its gain, but for the epsilon.
        gain = norm.forward(torch.ones_like(states[:1]))[0].float() * (1 + eps) ** 0.5
        for scale in (1.0, eps**0.5):  # at the second the epsilon matters
            expected = F.rms_norm(scale * states.float(), gain.shape, gain, eps)
            if not torch.allclose(norm.forward(scale * states).float(), expected, rtol=close, atol=close):
                return None
        states = norm.forward(states)
        ids = router.forward(states).ids.long()
        held = [*router.router.parameters(), *router.router.buffers(), *router.arguments]
        for bias in (torch.zeros_like(weight[:, 0]), *(tensor for tensor in held if tensor.shape == shape[:1])):
            logits = F.linear(states, weight, bias.to(weight.dtype)).float()
            chosen, largest = logits.gather(-1, ids).sort(descending=True).values, logits.topk(ids.shape[-1]).values
            if torch.allclose(chosen, largest, rtol=0, atol=close * float(logits.abs().max())):
                return cls(speculator, gain, eps, weight.float(), bias.float(), ids.shape[-1])
        return None

    @torch.no_grad()
    def candidates(self, residual: torch.Tensor, source: Routing | None, m: int) -> torch.Tensor:
        """The `m` candidates by falling logit, `[tokens, m]`, for `residual` `[tokens, hidden]` of the source layer."""
        guess, mixed = residual, None
        if source is not None and self._table is not None:
            weights, ids = source.weights.to(self._table.dtype), source.ids.long()
            if len(ids) == 1:  # half of what a bag of one costs
                sums = torch.mm(weights, self._table.index_select(0, ids[0]))
            else:
                sums = F.embedding_bag(ids, self._table, per_sample_weights=weights, mode="sum")
            guess = residual + sums[:, : residual.shape[-1]]
            mixed = sums[:, residual.shape[-1] :]
        if not self._is_corrected:
            logits = F.linear(guess.to(self._matrix.dtype), self._matrix)
            if not self._is_scale_free:
                logits = torch.addcdiv(self._offset, logits, self._length(guess))
            return logits.topk(m, dim=-1).indices
        both = torch.stack((guess, residual.to(guess.dtype)))
        both = torch.addcdiv(self._offset, F.linear(both.to(self._matrix.dtype), self._matrix), self._length(both))
        hidden = both[1, :, self._experts :]
        hidden = F.silu(hidden if mixed is None else hidden + mixed)
        return torch.addmm(both[0, :, : self._experts], hidden, self._out).topk(m, dim=-1).indices

    def _length(self, states: torch.Tensor) -> torch.Tensor:
        """`sqrt(hidden) r(states)`, `[..., 1]`, fp32."""
        return torch.hypot(torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32), self._eps)
