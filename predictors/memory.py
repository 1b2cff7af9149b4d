"""What a token leaves for the guesses for the next tokens of its sequence.

    g  the target router's logits for it                                        [tokens, experts]
    f  the training-free guess at them, router_t(q)                             [tokens, experts]
    h  = [g ; g - f], what is kept: its routing, and how wrong the guess was    [tokens, 2 experts]

A predictor with a memory reads `h` of one or two tokens back. Neighbouring tokens are routed alike, and guesses for them go
wrong alike. All zeros mean that there is nothing to remember, as at the first token of a sequence.
"""

from __future__ import annotations

import torch

MOST = 2
"""The most tokens that a predictor may remember."""


def memory_of(logits: torch.Tensor, guess: torch.Tensor) -> torch.Tensor:
    """What each token leaves, `[..., tokens, 2 experts]`, fp32.

    `logits` are those of the target's router, and `guess` those of the training-free speculation, before any predictor:
    `[..., tokens, experts]` each.
    """
    logits = logits.float()
    return torch.cat((logits, logits - guess), -1)


def follows(sequence: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Whether each row is the token after the one in the row before it, bool `[rows]`, from their places, `[rows]`."""
    found = torch.zeros(len(sequence), dtype=torch.bool, device=sequence.device)
    found[1:] = (sequence[1:] == sequence[:-1]) & (position[1:] == position[:-1] + 1)
    return found


def remembered(left: torch.Tensor, follows: torch.Tensor, tokens: int) -> torch.Tensor:
    """What each row remembers of the `tokens` rows before it, the most recent first: `[..., rows, tokens * columns]`.

    `left` `[..., rows, columns]` is what each row leaves, and `follows` `[rows]` says which row follows the one before it. Where
    one does not, nothing is remembered.
    """
    before = []
    for _ in range(tokens):
        left = torch.where(follows.unsqueeze(-1), left.roll(1, -2), 0)
        before.append(left)
    return torch.cat(before, -1)
