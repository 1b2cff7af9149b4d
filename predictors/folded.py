"""A speculator folded into few operations, for the plain norms and routers that most models have.

When one token is decoded, the cost of speculation is the number of its operations and of the weights that it reads.
With a router that takes the largest of `R x + c`, and the RMS norm `norm_t(x) = g x / r(x)`, `r(x) = sqrt(mean(x^2) +
eps)`, the speculated logits are

    R (q + W2 silu(W1 a + V m + U h + b1) + b2) + c
        =  R' u / r(u) + c  +  (R W2) silu(W1' s / r(s) + V m + U h + b1) + R b2

with `u = s + sum_j w_j D[id_j]`, `R' = R diag(g)` and `W1' = W1 diag(g)`. One matrix `[R'; W1']` multiplies `s` alone,
because `R' u = R' s + sum_j w_j (D R'^T)[id_j]`. `R W2` `[experts, width]` replaces `W2` `[hidden, width]`. One table
`[D R'^T | k V^T | D]` holds everything that the source router's weights multiply. Without a predictor and without `c`,
the order of the logits depends on neither `r` nor `u`: both are left out unless weights are asked for. `R' u / r(u) + c` are
the training-free logits, which a memory is made of. Where there is one, `R b2` must stay out of them: it is the output of
one more hidden unit, which is always 1. Without a memory it is added to `c`. Symbols as in `predictors.speculation`.

The scores of a direct predictor (`direct`) are folded likewise: `[S'; W1']` multiplies `s`, and the table is `[k M^T | k V^T]`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import nn

from .architecture import MoELayer
from .direct import DirectMLP
from .routing import Routing
from .speculation import Router, Speculator

PROBES = 256
"""How many random states a norm and a router are compared on with their plain forms."""

SILU_IS_ONE = 1.2784645427610738
"""The `x` with `silu(x) = 1`."""

Weigh = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From logits `[tokens, experts]` and ids `[tokens, top_k]` to weights `[tokens, top_k]`, fp32."""


def _softmax(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1, dtype=torch.float32).gather(-1, ids)


def _softmax_of_chosen(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    # The same as the softmax of all, divided by its sum over the chosen ones.
    return logits.gather(-1, ids).softmax(-1, dtype=torch.float32)


WEIGHS: tuple[Weigh, ...] = (_softmax, _softmax_of_chosen)


class PlainRouter(NamedTuple):
    """A router that takes the largest of its logits."""

    weight: torch.Tensor
    """`[experts, hidden]`: the router's own, not a copy."""
    bias: torch.Tensor | None
    """`[experts]`, or None if it is zero."""
    top_k: int
    weigh: Weigh | None
    """How it weights the experts that it chose; None if by none of the ways in `WEIGHS`."""
    dtype: torch.dtype
    """Of its weights."""

    @classmethod
    @torch.no_grad()
    def of(cls, router: Router, num_experts: int, states: torch.Tensor) -> Self | None:
        """The plain form of `router`, found on `states` `[n, hidden]`; None if it chooses by more than its logits."""
        shape = num_experts, states.shape[1]
        matrices = [p for p in router.router.parameters() if p.shape == shape]
        if len(matrices) != 1:
            return None
        weight = matrices[0]
        routing = router.forward(states)
        ids, close = routing.ids.long(), _close(weight.dtype)
        held = [*router.router.parameters(), *router.router.buffers(), *router.arguments]
        for bias in (None, *(tensor.to(weight.dtype) for tensor in held if tensor.shape == shape[:1])):
            logits = F.linear(states, weight, bias)
            if not logits.isfinite().all():
                return None
            chosen, largest = logits.gather(-1, ids).sort(descending=True).values, logits.topk(ids.shape[-1]).values
            if torch.allclose(chosen, largest, rtol=0, atol=close * float(logits.abs().max())):
                dtype, near = routing.weights.dtype, max(1e-5, 2 * torch.finfo(weight.dtype).eps)
                for weigh in WEIGHS:
                    if torch.allclose(weigh(logits, ids).to(dtype), routing.weights, rtol=near, atol=near / 8):
                        return cls(weight, bias, ids.shape[-1], weigh, dtype)
                return cls(weight, bias, ids.shape[-1], None, dtype)
        return None

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """`[tokens, experts]` for `state` `[tokens, hidden]`."""
        return F.linear(state, self.weight, self.bias)

    def weighted(self, logits: torch.Tensor, ids: torch.Tensor) -> Routing:
        """Its routing for its `logits` `[tokens, experts]` if it must choose `ids` `[tokens, top_k]`, int64."""
        assert self.weigh is not None
        return Routing(logits, self.weigh(logits, ids).to(self.dtype), ids)


def _close(dtype: torch.dtype) -> float:
    return max(1e-5, 8 * torch.finfo(dtype).eps)


class PlainNorm(NamedTuple):
    """An RMS norm."""

    gain: torch.Tensor
    """`[hidden]`, fp32."""
    eps: float

    @classmethod
    @torch.no_grad()
    def of(cls, norm: nn.Module, states: torch.Tensor) -> Self | None:
        """The plain form of `norm`, compared on `states` `[n, hidden]`; None if it does anything else."""
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if not isinstance(eps, float):
            return None
        close = _close(states.dtype)
        # Of ones, the norm gives its gain, except for the epsilon.
        gain = norm.forward(torch.ones_like(states[:1]))[0].float() * (1 + eps) ** 0.5
        for scale in (1.0, eps**0.5):  # at the second the epsilon matters
            expected = F.rms_norm(scale * states.float(), gain.shape, gain, eps)
            if not torch.allclose(norm.forward(scale * states).float(), expected, rtol=close, atol=close):
                return None
        return cls(gain, eps)


def _states(weight: torch.Tensor) -> torch.Tensor:
    """What norms and routers are compared on, `[PROBES, hidden]`, like a `weight` `[..., hidden]` that reads them."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(PROBES, weight.shape[-1], generator=generator, device="cpu").to(weight)


class Folded(ABC):
    """A speculator in few operations. `of` of its kinds makes one."""

    router: PlainRouter | None
    """Of the target layer. None where it is no plain one, which is no hindrance to a direct predictor."""
    memory: int
    """How many tokens its predictor remembers."""
    _table: torch.Tensor | None
    """What the source router's weights multiply, `[experts, columns]`, fp32."""

    def __init__(self, norm: PlainNorm):
        self._root = len(norm.gain) ** 0.5
        self._eps = torch.full_like(norm.gain[:1], self._root * norm.eps**0.5)

    @abstractmethod
    def logits(
        self, residual: torch.Tensor, source: Routing | None, memory: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The speculated logits and the training-free ones, `[tokens, experts]`; see `Speculator.with_free`."""

    def _weighted(self, base: torch.Tensor, source: Routing) -> torch.Tensor:
        """`base` plus the table's rows that the source chose, times its weights: `[tokens, columns]`, fp32."""
        assert self._table is not None
        weights, ids = source.weights.float(), source.ids.long()
        if weights.requires_grad:
            weights = weights.detach()
        if len(ids) == 1:  # takes half as long as a bag of one
            return torch.addmm(base, weights, self._table.index_select(0, ids.view(-1)))
        return base + F.embedding_bag(ids, self._table, per_sample_weights=weights, mode="sum")

    def _length(self, states: torch.Tensor) -> torch.Tensor:
        """`sqrt(hidden) r(states)`, `[..., 1]`, fp32: torch has an operation for a length, but none for a root mean square."""
        return torch.hypot(torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32), self._eps)


class FoldedSpeculator(Folded):
    """Orders one target layer's experts as its `Speculator`'s logits do, up to rounding. Use `of`."""

    router: PlainRouter

    def __init__(self, speculator: Speculator, norm: PlainNorm, router: PlainRouter, to_scale: bool):
        """For `to_scale` see `of`."""
        super().__init__(norm)
        self.router, mlp, vectors = router, speculator.mlp, speculator.wiring.default_vectors
        weight = router.weight.float()
        self._experts = len(weight)
        matrix, offset = weight, torch.zeros_like(weight[:, 0]) if router.bias is None else router.bias.float()
        self._u = None
        self.memory = 0 if mlp is None else mlp.memory
        if mlp is not None:
            w1, v, b1, w2, b2 = (p.float() for p in (mlp.w1, mlp.v, mlp.b1, mlp.w2, mlp.b2))
            out, shift = (weight @ w2).T, weight @ b2
            if mlp.u is None:
                offset = offset + shift
            else:
                w1, v, u = (F.pad(p, (0, 0, 0, 1)) for p in (w1, v, mlp.u.float()))
                b1, out = F.pad(b1, (0, 1), value=SILU_IS_ONE), torch.cat([out, shift[None]])
                self._u = u.T.contiguous()
            self._out = out.contiguous()
            matrix, offset = torch.cat([weight, w1]), torch.cat([offset, b1])
            vectors = torch.zeros_like(weight) if vectors is None else vectors
        self._is_corrected = mlp is not None
        self._is_scale_free = mlp is None and not offset.any() and not to_scale
        self._matrix = norm.gain * matrix
        self._table = None
        if vectors is not None:
            vectors = vectors.float()
            parts = [vectors @ self._matrix[: self._experts].T]
            parts += [router.top_k * v.T] if self._is_corrected else []
            parts += [] if self._is_scale_free else [vectors]
            self._table = torch.cat(parts, dim=1)
            self._base = F.pad(offset[self._experts :].detach(), (self._experts, vectors.shape[1]))
        if self._is_corrected or matrix.is_cuda:  # a router alone is small: on a CPU it is faster without conversions
            self._matrix = self._matrix.to(router.weight.dtype)
        self._offset = offset.detach()

    @classmethod
    @torch.no_grad()
    def of(cls, speculator: Speculator, layer: MoELayer, to_scale: bool = False, values: bool = False) -> Self | None:
        """The folded speculator of target `layer`, or None if its norm or router is not a plain one.

        Both are compared on random states, which finds routers that choose by more than their logits (groups,
        correction biases). The folded logits have the order of the speculator's. With `to_scale` they also have their
        values, and the router's weights follow from them (`PlainRouter.weighted`). With `values` these are also the values that
        the router returns as its logits, as a memory needs them.
        """
        wiring = speculator.wiring
        weight = next(wiring.router.parameters(), None)
        if weight is None or wiring.post_norm is not None or layer.unfollowed is not None:
            return None
        states, close = _states(weight), _close(weight.dtype)
        norm = PlainNorm.of(wiring.norm, states)
        if norm is None:
            return None
        states = wiring.norm.forward(states)
        router = PlainRouter.of(wiring.router, layer.num_experts, states)
        if router is None or (to_scale and router.weigh is None):
            return None
        remembers = speculator.mlp is not None and speculator.mlp.memory > 0
        if remembers or values:
            logits = wiring.router.forward(states).logits.float()
            if not torch.allclose(
                router.logits(states).float(), logits, rtol=0, atol=close * float(logits.abs().max())
            ):
                return None
        return cls(speculator, norm, router, to_scale or values)

    def logits(
        self, residual: torch.Tensor, source: Routing | None, memory: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The speculated and the training-free logits, `[tokens, experts]` each, for `residual` `[tokens, hidden]` of the source
        layer. The training-free ones are None unless the predictor has a memory.

        `memory` `[tokens, memory * 2 experts]`, fp32, is what the tokens before these left, as in `Speculator.forward`. Without
        `to_scale`, the speculated logits of each token may be off by a factor if there is no predictor.
        """
        if residual.requires_grad:  # much cheaper than switching gradients off and on
            residual = residual.detach()
        logits = F.linear(residual.to(self._matrix.dtype), self._matrix)
        source = None if self._table is None else source
        if self._is_scale_free:
            return logits if source is None else self._weighted(logits.float(), source), None
        logits, hidden = logits[:, : self._experts], logits[:, self._experts :]
        offset, guess = self._offset[self._experts :], residual
        if source is not None:
            inner = logits.shape[-1] + hidden.shape[-1]
            sums = self._weighted(self._base, source)
            offset = sums[:, self._experts : inner]
            logits, guess = logits + sums[:, : self._experts], residual + sums[:, inner:]
        free = torch.addcdiv(self._offset[: self._experts], logits, self._length(guess), value=self._root)
        if not self._is_corrected:
            return free, None
        hidden = torch.addcdiv(offset, hidden, self._length(residual), value=self._root)
        if memory is not None:
            assert self._u is not None
            hidden = torch.addmm(hidden, memory, self._u)
        logits = torch.addmm(free, F.silu(hidden), self._out)
        return logits, None if self._u is None else free


class FoldedDirect(Folded):
    """Scores one target layer's experts as its `DirectMLP` does, up to rounding. Use `of`."""

    def __init__(self, mlp: DirectMLP, norm: PlainNorm, router: PlainRouter | None):
        super().__init__(norm)
        self.router, self.memory, self._experts = router, mlp.memory, mlp.num_experts
        self._matrix = (norm.gain * torch.cat([mlp.skip, mlp.w1]).float()).to(mlp.w1.dtype)
        self._offset = torch.cat([mlp.prior.float() + mlp.b2.float(), mlp.b1.float()])
        self._table = mlp.top_k * torch.cat([mlp.mix, mlp.v]).T.float()
        self._out = mlp.w2.T.float().contiguous()
        self._u = None if mlp.u is None else mlp.u.T.float().contiguous()

    @classmethod
    @torch.no_grad()
    def of(cls, speculator: Speculator, layer: MoELayer) -> Self | None:
        """The folded speculator of target `layer`, whose predictor is direct; None if the layer's norm is not a plain one."""
        wiring, mlp = speculator.wiring, speculator.mlp
        assert isinstance(mlp, DirectMLP)
        states = _states(mlp.w1)
        norm = PlainNorm.of(wiring.norm, states)
        if norm is None:
            return None
        if layer.unfollowed is not None:
            return cls(mlp, norm, None)
        return cls(mlp, norm, PlainRouter.of(wiring.router, layer.num_experts, wiring.norm.forward(states)))

    def logits(
        self, residual: torch.Tensor, source: Routing | None, memory: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The scores, and zeros in the place of training-free logits; see `Folded.logits`."""
        residual = residual.detach()
        offset = self._offset if source is None else self._weighted(self._offset, source)
        sums = F.linear(residual.to(self._matrix.dtype), self._matrix)
        sums = torch.addcdiv(offset, sums, self._length(residual), value=self._root)
        scores, hidden = sums[:, : self._experts], sums[:, self._experts :]
        if memory is not None:
            assert self._u is not None
            hidden = torch.addmm(hidden, memory, self._u)
        scores = torch.addmm(scores, F.silu(hidden), self._out)
        return scores, None if self._u is None else torch.zeros_like(scores)
