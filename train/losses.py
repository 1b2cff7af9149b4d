"""What training minimises: how far the speculated routing is from the true one.

Each takes the speculated logits and the true ones `[layers, rows, experts]` and the experts that the router chose
`[layers, rows, top_k]`, and gives a loss a row, `[layers, rows]`, all fp32. Only `kl` knows nothing of the choice, and so
is right for routers that choose by more than their logits (groups, correction biases).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def kl(speculated: torch.Tensor, true: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    """KL divergence of the speculated distribution over experts from the true one, in nats."""
    log_true = true.log_softmax(-1)
    return (log_true.exp() * (log_true - speculated.log_softmax(-1))).sum(-1)


def bce(speculated: torch.Tensor, true: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of "is chosen", expert by expert, the mean over experts.

    A logit counts from the border between the last chosen and the first that is not, in units of the true logits' spread:
    routers' logits have any offset and scale.
    """
    top_k = ids.shape[-1]
    border = true.topk(top_k + 1, dim=-1).values[..., -2:].mean(-1, keepdim=True)
    spread = true.std(-1, keepdim=True)
    return F.binary_cross_entropy_with_logits(
        (speculated - border) * (4 / spread), _chosen(speculated, ids), reduction="none"
    ).mean(-1)


def ranking(speculated: torch.Tensor, true: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Logistic ranking loss: `log(1 + exp(z_j - z_i))` for every chosen `i` and every `j` that is not, the mean over pairs.

    Logits count in units of the true logits' spread.
    """
    z = speculated * (4 / true.std(-1, keepdim=True))
    chosen = z.gather(-1, ids)
    pairs = F.softplus(z.unsqueeze(-2) - chosen.unsqueeze(-1))
    others = (1 - _chosen(speculated, ids)).unsqueeze(-2)
    return (pairs * others).sum((-2, -1)) / (ids.shape[-1] * others.sum((-2, -1)).clamp(min=1))


def _chosen(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(logits).scatter_(-1, ids, 1.0)


LOSSES: dict[str, Loss] = {"kl": kl, "bce": bce, "ranking": ranking}
