"""The length reward: among the responses to one prompt, shorter is better."""

from __future__ import annotations

import torch
from torch import Tensor


def length_reward(lengths: Tensor, is_correct: Tensor, is_valid: Tensor | None = None) -> Tensor:
    """Length reward: lambda = 0.5 - (len - min_len) / (max_len - min_len), for a wrong response at most 0.

    min_len and max_len are over all responses of the group, right or wrong. If they are equal every reward is 0.

    Args:
        lengths: `[..., k]` tokens that the policy generated, the end token included.
        is_correct: `[..., k]` bool.
        is_valid: `[..., k]` bool, members that count; the others get 0.

    Returns:
        `[..., k]` float32 in [-0.5, 0.5].

    Source: Kimi k1.5, section 2.3.3 (length reward).
    """
    mask = torch.ones_like(is_correct) if is_valid is None else is_valid
    sizes = lengths.float()
    shortest = sizes.masked_fill(~mask, torch.inf).amin(dim=-1, keepdim=True)
    longest = sizes.masked_fill(~mask, -torch.inf).amax(dim=-1, keepdim=True)
    spread = longest - shortest
    relative = 0.5 - (sizes - shortest) / torch.where(spread > 0, spread, 1.0)
    reward = torch.where(is_correct, relative, relative.clamp(max=0))
    return torch.where((spread > 0) & mask, reward, 0.0)


def length_weight(progress: float, weight: float, start: float) -> float:
    """w(progress): 0 before the share `start` of the run, then constant, because the penalty slows early learning.

    Source: Kimi k1.5, section 2.3.3 (warm-up of the length penalty).
    """
    return weight if progress >= start else 0.0
