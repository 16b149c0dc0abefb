"""Log-probabilities of targets, one token at a time: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_logprobs_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Same contract as `perilune.ops.linear_logprobs`, always with entropy.

    logprob = log softmax(W h / temperature)[target]; entropy = - sum_v p_v log p_v, without gradient.
    """
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    logprobs: list[Tensor] = []
    entropies: list[Tensor] = []
    for h, target in zip(hidden, targets.tolist(), strict=True):
        logits = weight.to(dtype) @ h.to(dtype) / temperature
        everything = logits - torch.logsumexp(logits, 0)
        logprobs.append(everything[target])
        entropies.append(-(everything.exp() * everything).sum().detach())
    if not logprobs:
        empty = hidden.new_zeros(0, dtype=dtype)
        return empty + 0 * (hidden.sum() + weight.sum()).to(dtype), empty
    return torch.stack(logprobs), torch.stack(entropies)
