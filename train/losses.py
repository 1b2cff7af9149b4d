"""The losses of training: how far the speculated routing is from the true one.

Each takes the speculated and the true logits `[layers, rows, experts]` and the experts that the router chose `[layers,
rows, top_k]`, and returns a loss a row, `[layers, rows]`, all fp32. A correcting predictor's logits are those of the target's
router, which may choose by more (groups, correction biases). Only `kl` does not read the choice, so only `kl` is right for them
then. A direct predictor's scores are what experts are chosen by: `choice` is right for them, whatever a router returns as its logits.
Where the router chooses by these logits, `kl` is right for them too, and better (docs/predictors.md).
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
    """Binary cross-entropy of "is chosen", the mean over experts.

    Logits are measured from the border between the last chosen expert and the next one, in units of the true logits'
    spread, because routers' logits have any offset and scale.
    """
    top_k = ids.shape[-1]
    border = true.topk(top_k + 1, dim=-1).values[..., -2:].mean(-1, keepdim=True)
    return F.binary_cross_entropy_with_logits(
        (speculated - border) * _unit(true), _chosen(speculated, ids), reduction="none"
    ).mean(-1)


def ranking(speculated: torch.Tensor, true: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Logistic ranking loss: the mean of `log(1 + exp(z_j - z_i))` over all chosen `i` and all other `j`.

    Logits are in units of the true logits' spread.
    """
    z = speculated * _unit(true)
    chosen = z.gather(-1, ids)
    pairs = F.softplus(z.unsqueeze(-2) - chosen.unsqueeze(-1))
    others = (1 - _chosen(speculated, ids)).unsqueeze(-2)
    return (pairs * others).sum((-2, -1)) / (ids.shape[-1] * others.sum((-2, -1)).clamp(min=1))


def choice(speculated: torch.Tensor, true: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    """Cross-entropy of the speculated distribution over experts with the router's choice, the mean over the chosen, in nats.

    It is the only one that does not read the true logits, so it is right whatever a router returns in their place.
    """
    return -speculated.log_softmax(-1).gather(-1, ids).mean(-1)


def _unit(true: torch.Tensor) -> torch.Tensor:
    """Four over the spread of the true logits; 0 if they are all equal, since then there is nothing to learn."""
    return (4 / true.std(-1, keepdim=True)).nan_to_num(nan=0.0, posinf=0.0)


def _chosen(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(logits).scatter_(-1, ids, 1.0)


LOSSES: dict[str, Loss] = {"kl": kl, "bce": bce, "ranking": ranking, "choice": choice}
