"""Dropless dispatch: tokens sorted by expert, one matrix product per expert on a contiguous run of them.

No expert has a capacity, so no token is dropped or padded. The backward is written by hand: each expert's
intermediates stay in cache, the activation is recomputed from the kept gate and up projections, and the gradient of a
weight is <dy, expert(x)> = <w_down^T dy, act>, which needs no kept expert output.

Letters: T tokens; k experts per token; d model width; f expert width; n tokens of one expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Dispatch:
    """The T * k (token, expert) pairs in the order of their experts."""

    def __init__(self, indices: Tensor, counts: list[int]) -> None:
        num_tokens, top_k = indices.shape
        self.shape = (num_tokens, top_k)
        self.order = indices.flatten().argsort(stable=True)
        self.tokens = self.order // top_k
        self.inverse = torch.empty_like(self.order).index_copy_(
            0, self.order, torch.arange(self.order.numel(), device=indices.device)
        )
        ends = torch.tensor(counts).cumsum(0).tolist()
        self.runs = [
            (e, slice(end - count, end)) for e, (end, count) in enumerate(zip(ends, counts, strict=True)) if count
        ]

    def combine(self, sorted_rows: Tensor) -> Tensor:
        """Sum each token's k rows: `[T * k, d]` in expert order to `[T, d]`."""
        return sorted_rows.index_select(0, self.inverse).view(*self.shape, sorted_rows.shape[1]).sum(1)


class _Experts(torch.autograd.Function):
    """The experts of `perilune.ops.moe_experts`, with their backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, indices: Tensor, counts: list[int]
    ) -> Tensor:
        width = w_down.shape[2]
        dispatch = _Dispatch(indices, counts)
        factors = weights.flatten().index_select(0, dispatch.order).to(x.dtype)[:, None]
        rows = x.new_empty(dispatch.order.numel(), x.shape[1])
        projections: list[Tensor] = []
        with torch.autocast(x.device.type, enabled=False):
            for e, run in dispatch.runs:
                h = x.index_select(0, dispatch.tokens[run]) @ w_gate_up[e].T
                # weighting the activation is weighting the output, on f instead of d columns
                act = F.silu(h[:, :width]).mul_(h[:, width:]).mul_(factors[run])
                torch.mm(act, w_down[e].T, out=rows[run])
                projections.append(h)
            y = dispatch.combine(rows)
        ctx.save_for_backward(x, weights, w_gate_up, w_down, factors, *projections)
        ctx.dispatch = dispatch
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        x, weights, w_gate_up, w_down, factors, *projections = ctx.saved_tensors
        dispatch: _Dispatch = ctx.dispatch
        (d_y,) = grad_outputs
        d_rows = x.new_empty(dispatch.order.numel(), x.shape[1])
        d_factors = weights.new_empty(dispatch.order.numel())
        d_gate_up, d_down = torch.zeros_like(w_gate_up), torch.zeros_like(w_down)
        with torch.autocast(x.device.type, enabled=False):
            for (e, run), h in zip(dispatch.runs, projections, strict=True):
                tokens = dispatch.tokens[run]
                d_o = d_y.index_select(0, tokens)
                d_act = d_o @ w_down[e]
                d_h, act, d_factors[run] = _swiglu_backward(h, d_act, factors[run])
                torch.mm(d_o.T, act, out=d_down[e])
                torch.mm(d_h.T, x.index_select(0, tokens), out=d_gate_up[e])
                torch.mm(d_h, w_gate_up[e], out=d_rows[run])
            d_x = dispatch.combine(d_rows)
        d_weights = d_factors.index_select(0, dispatch.inverse).view(dispatch.shape)
        return d_x, d_weights, d_gate_up, d_down, None, None


def _swiglu_backward(h: Tensor, d_act: Tensor, factors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through `factors * silu(gate) * up`, with `h = [gate, up]`.

    Args:
        h: `[n, 2f]`.
        d_act: `[n, f]`, the gradient of the activation before its factor enters; overwritten.
        factors: `[n, 1]`.

    Returns:
        The gradient of h `[n, 2f]`, the weighted activation `[n, f]`, and the gradient of the factors `[n]`.
    """
    gate, up = h.chunk(2, -1)
    silu = F.silu(gate)
    act = silu * up
    d_factors = (d_act * act).sum(-1, dtype=torch.promote_types(h.dtype, torch.float32))
    d_act.mul_(factors)
    d_h = torch.empty_like(h)
    torch.mul(d_act, silu, out=d_h[:, h.shape[1] // 2 :])
    d_h[:, : h.shape[1] // 2] = torch.ops.aten.silu_backward(d_act.mul_(up), gate)
    return d_h, act.mul_(factors), d_factors


def moe_experts_torch(
    x: Tensor, weights: Tensor, indices: Tensor, load: Tensor, w_gate_up: Tensor, w_down: Tensor
) -> Tensor:
    """Same contract as `perilune.ops.moe_experts`, on checked arguments."""
    y: Tensor = _Experts.apply(x.contiguous(), weights, w_gate_up, w_down, indices, load.tolist())  # pyright: ignore[reportAssignmentType]
    return y
