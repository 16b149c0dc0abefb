"""Finding responses that loop: a suffix of the form u u u ... u."""

from __future__ import annotations

import torch
from torch import Tensor

from perilune.engine.config import RepetitionRule


def find_repetition(tokens: Tensor, lengths: Tensor, rule: RepetitionRule) -> Tensor:
    """Tell which rows end in a loop.

    A suffix of `span` tokens has period p exactly when each of its last `span - p` tokens equals the one p before.

    Args:
        tokens: `[N, L]` int64; row n holds its response in the first `lengths[n]` places.
        lengths: `[N]` int64.
        rule: what counts as a loop.

    Returns:
        `[N]` bool.
    """
    found = torch.zeros(lengths.shape[0], dtype=torch.bool, device=tokens.device)
    longest = int(lengths.max()) if lengths.numel() else 0
    for period in range(1, rule.max_period + 1):
        span = rule.span(period)
        if span > longest:
            continue
        rows = (lengths >= span).nonzero()[:, 0]
        window = lengths[rows, None] - span + torch.arange(span, device=tokens.device)
        suffix = tokens[rows[:, None], window]
        found[rows] |= (suffix[:, period:] == suffix[:, :-period]).all(dim=1)
    return found
