"""Routing and experts written as loops over tokens: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from perilune.ops.moe.routing import RENORMALIZE_EPS, Routing


def route_reference(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    renormalize: bool,
    scale: float,
    weight_includes_bias: bool,
) -> Routing:
    """Same contract as `perilune.ops.route`: s = sigmoid(logits), choice = s + bias, one token at a time."""
    num_experts = logits.shape[1]
    indices = logits.new_zeros(logits.shape[0], top_k, dtype=torch.int64)
    rows: list[Tensor] = []
    for t, row in enumerate(logits.to(torch.promote_types(logits.dtype, torch.float32))):
        scores = torch.sigmoid(row)
        choice = scores + bias.detach().to(row.dtype)
        order = _best_first(choice.tolist())
        allowed = _allowed_experts(choice.tolist(), num_groups, topk_groups)
        chosen = [e for e in order if e in allowed][:top_k]
        indices[t] = torch.tensor(chosen)
        weights = (choice if weight_includes_bias else scores)[chosen]
        rows.append(scale * (weights / (weights.sum() + RENORMALIZE_EPS) if renormalize else weights))
    load = torch.tensor([int((indices == e).sum()) for e in range(num_experts)], device=logits.device)
    return Routing(indices=indices, weights=torch.stack(rows) if rows else logits.new_zeros(0, top_k), load=load)


def _best_first(values: list[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def _allowed_experts(choice: list[float], num_groups: int, topk_groups: int) -> list[int]:
    size = len(choice) // num_groups
    best_two = [sum(sorted(choice[g * size : (g + 1) * size], reverse=True)[:2]) for g in range(num_groups)]
    return [e for g in _best_first(best_two)[:topk_groups] for e in range(g * size, (g + 1) * size)]


def swiglu_expert(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """One expert on one token: w_down (silu(w_gate x) * (w_up x)).

    Args:
        x: `[d]`.
        w_gate_up: `[2f, d]`, gate rows first.
        w_down: `[d, f]`.

    Source: Kimi Linear, section 4 (MoE); SwiGLU: Shazeer (2002.05202).
    """
    gate, up = (w_gate_up @ x).chunk(2)
    return w_down @ (gate * torch.sigmoid(gate) * up)


def moe_experts_reference(x: Tensor, routing: Routing, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """Same contract as `perilune.ops.moe_experts`: y_t = sum_k w_tk SwiGLU_{e_tk}(x_t)."""
    rows = [
        sum(
            (w * swiglu_expert(row, w_gate_up[e], w_down[e]) for w, e in zip(weights, experts.tolist(), strict=True)),
            start=torch.zeros_like(row),
        )
        for row, weights, experts in zip(x, routing.weights, routing.indices, strict=True)
    ]
    return torch.stack(rows) if rows else x + 0 * (w_gate_up.sum() + w_down.sum() + routing.weights.sum())
