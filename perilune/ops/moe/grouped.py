"""All experts in two grouped matrix products, whose group sizes stay on the device: nothing waits for a count.

That is what a GPU wants, where a product of its own for each of 64 experts leaves it idle, and what lets a decode step
be captured in a graph. Gradients are autograd's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from perilune.ops.moe.torch import moe_experts_torch
from perilune.ops.swiglu import swiglu

_ALIGNMENT = 8
"""Elements of 16 bytes, which rows must be a multiple of."""


def grouped_obstacle(dtype: torch.dtype, w_down: Tensor) -> str | None:
    """Say why the grouped products cannot take a call, as the end of "backend 'grouped' ..."; None if they can."""
    if not hasattr(F, "grouped_mm"):
        return "needs torch 2.10"
    if dtype != torch.bfloat16:
        return f"takes bfloat16, got {dtype}"
    if w_down.is_cuda and torch.cuda.get_device_capability(w_down.device) < (8, 0):
        return "needs compute capability 8.0"
    if w_down.shape[1] % _ALIGNMENT or w_down.shape[2] % _ALIGNMENT:
        return f"needs widths that {_ALIGNMENT} divides, got d={w_down.shape[1]} and f={w_down.shape[2]}"
    return None


def moe_experts_grouped(
    x: Tensor, weights: Tensor, indices: Tensor, load: Tensor, w_gate_up: Tensor, w_down: Tensor
) -> Tensor:
    """Same contract as `perilune.ops.moe_experts`, on checked arguments that `grouped_obstacle` lets pass."""
    (num_tokens, top_k), pairs = indices.shape, indices.numel()
    if not pairs:
        return moe_experts_torch(x, weights, indices, load, w_gate_up, w_down)
    order = indices.flatten().argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(pairs, device=order.device))
    ends = load.cumsum(0).to(torch.int32)
    with torch.autocast(x.device.type, enabled=False):
        h = F.grouped_mm(x.index_select(0, order // top_k), w_gate_up.transpose(1, 2), offs=ends)
        # weighting the activation is weighting the output, on f instead of d columns
        act = swiglu(h) * weights.flatten().index_select(0, order).to(h.dtype)[:, None]
        rows = F.grouped_mm(act, w_down.transpose(1, 2), offs=ends)
    return rows.index_select(0, inverse).view(num_tokens, top_k, -1).sum(1)
