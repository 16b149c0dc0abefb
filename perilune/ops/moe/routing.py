"""Which experts each token goes to, and with what weight.

Letters: T tokens; E experts; k experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Keeps the weights of a token whose scores all underflow finite.
RENORMALIZE_EPS = 1e-20


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """A routing decision for T tokens."""

    indices: Tensor
    """`[T, k]` int64, the chosen experts of each token, best first, all different."""
    weights: Tensor
    """`[T, k]` float32 (float64 for float64 logits), what each expert's output is multiplied with; differentiable."""
    load: Tensor
    """`[E]` int64, tokens per expert; sums to T * k."""


def choose(choice: Tensor, top_k: int, num_groups: int, topk_groups: int) -> Tensor:
    """Indices `[T, k]` of the best experts, best first; among equals the lowest index.

    Args:
        choice: `[T, E]`, the biased scores.
        top_k: experts per token.
        num_groups: the experts are this many groups of consecutive ones.
        topk_groups: only the groups with the largest sum of their best two experts stay in the choice.

    Source: Kimi Linear, section 4 (MoE); group limits: DeepSeek-V3, section 2.1.2.
    """
    if topk_groups < num_groups:
        grouped = choice.view(choice.shape[0], num_groups, choice.shape[1] // num_groups)
        best_two = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
        kept = _best(best_two, topk_groups)
        allowed = torch.zeros_like(best_two, dtype=torch.bool).scatter_(1, kept, True)
        choice = grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(1)
    return _best(choice, top_k)


def _best(scores: Tensor, count: int) -> Tensor:
    # topk does not say which of two equal scores it takes; a stable sort takes the first
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def route_torch(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    renormalize: bool,
    scale: float,
    weight_includes_bias: bool,
) -> Routing:
    """Same contract as `perilune.ops.route`, on checked arguments."""
    scores = torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    choice = scores + bias.detach().to(scores.dtype)
    indices = choose(choice.detach(), top_k, num_groups, topk_groups)
    weights = (choice if weight_includes_bias else scores).gather(1, indices)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + RENORMALIZE_EPS)
    load = _count(indices.flatten(), logits.shape[1])
    return Routing(indices=indices, weights=weights * scale, load=load)


def _count(experts: Tensor, num_experts: int) -> Tensor:
    """`[E]` int64, how often each expert is named; on a GPU without asking it for anything, as bincount would."""
    if not experts.is_cuda:
        return torch.bincount(experts, minlength=num_experts)
    return experts.new_zeros(num_experts).scatter_add_(0, experts, torch.ones_like(experts))
